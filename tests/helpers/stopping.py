"""Runs that are hit by signals: `python stopping.py PLACES ARGUMENTS...` is `python -m granvit.train ARGUMENTS...`,
over and over, hit at each of the places in turn and then let run to its end.

PLACES: places STAGE:STEP:SIGNAL[:WHO] separated by commas; it comes when that step has been taken (step "final": when
the stage's final checkpoint is written). WHO: self; later, which is self at some moment of what comes next, until
another step has been taken; parent (torchrun). Exit codes are printed. Under torchrun there is one place, and no run
after it.
"""

import os
import random
import signal
import sys
import threading
import time

import pytest

from granvit.train import __main__, loop, run  # noqa: F401  (imported once, before the processes part)


def hit(who: str, number: int) -> None:
    os.kill(os.getpid() if who == "self" else os.getppid(), number)
    if who == "parent":  # until it has come back to us, so that it is this step's
        for _ in range(1000):
            if not signal.getsignal(number).asked:
                time.sleep(0.01)


def prepare(place: str) -> None:
    """Let the signal come there in this process, where it is the first of its run."""
    if os.environ.get("RANK", "0") != "0":
        return
    stage, step, name, who = [*place.split(":"), "self"][:4]
    number = signal.Signals["SIG" + name]
    if step == "final":
        train_phase = loop.train_phase

        def after(phase, *others):
            train_phase(phase, *others)
            if phase.stage.name == stage:
                hit(who, number)

        run.train_phase = after
        return
    take, timers = loop.Phase.take, []

    def at(phase, batches):
        began = time.perf_counter()
        take(phase, batches)
        while timers:  # a first step takes as long as many others
            timers.pop().join()
        if (phase.stage.name, phase.step) == (stage, int(step)):
            if who == "later":
                seconds = random.random() * (time.perf_counter() - began)
                timers.append(threading.Timer(seconds, hit, ("self", number)))
                timers[0].start()
            else:
                hit(who, number)

    loop.Phase.take = at


def cut(monkeypatch, config, stage: str, step: int) -> None:
    """Train until that step of the stage has been taken, like kill -9: nothing is saved but what had been."""
    take = loop.Phase.take

    def until(self, batches):
        take(self, batches)
        if (self.stage.name, self.step) == (stage, step):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Phase, "take", until)
        with pytest.raises(KeyboardInterrupt):
            run.train(config)


def main() -> None:
    places, sys.argv = sys.argv[1].split(","), ["granvit.train", *sys.argv[2:]]
    if "RANK" in os.environ:
        prepare(places[0])
        return __main__.main()
    for place in places:
        child = os.fork()
        if not child:
            prepare(place)
            __main__.main()
            os._exit(0)
        print(f"{place} -> {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
    __main__.main()


if __name__ == "__main__":
    main()
