"""What watches over a run: losses that are not finite, losses that jump, and the signal to stop."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from granvit.errors import Failed
from granvit.status import INTERRUPTED, STOPPED

log = logging.getLogger(__name__)


class Terminated(SystemExit):
    """The run was asked to stop; what it had learnt is in a checkpoint. code: STOPPED or INTERRUPTED."""

    def __init__(self, code: int = STOPPED) -> None:
        super().__init__(code)


class NotFinite(Failed):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class Termination:
    """Whether SIGTERM or Ctrl-C has come. During a stage it is looked at after every step; elsewhere it ends the
    process at once, as what is done there is begun anew anyway. So does a second Ctrl-C, anywhere."""

    def __init__(self) -> None:
        self.asked = False
        self.patient = False
        self.code = STOPPED

    def __call__(self, number: int, *_: object) -> None:
        interrupt = number == signal.SIGINT
        if interrupt and (self.code == INTERRUPTED or not self.patient):
            raise KeyboardInterrupt
        self.asked = True
        self.code = INTERRUPTED if interrupt else STOPPED
        if not self.patient:
            raise Terminated
        if interrupt:
            log.warning("Ctrl-C: stopping after this step, which is saved; press it again to stop at once")

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, `asked` is looked at, and nothing is interrupted. A request that nobody has looked at ends the
        process when this is over."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False
        if self.asked:
            raise Terminated(self.code)


@contextmanager
def termination() -> Iterator[Termination]:
    """SIGTERM and Ctrl-C are handled inside; not in a thread, which gets no signals."""
    request = Termination()
    if threading.current_thread() is not threading.main_thread():
        log.warning("training in a thread: SIGTERM and Ctrl-C will not save the run")
        yield request
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set from Python


class Streak:
    """Steps in a row that were skipped because something in them was not finite."""

    def __init__(self, limit: int) -> None:
        self.limit, self.length = limit, 0

    @property
    def over(self) -> bool:
        return self.length >= self.limit

    def add(self, finite: bool) -> None:
        self.length = 0 if finite else self.length + 1

    def restore(self, length: int) -> None:
        """Go on after a streak of this length, by another step at least: the limit may have been lowered since."""
        self.length = min(length, self.limit - 1)


class Gate:
    """A streak as the device knows it, which says there whether a step is taken: where its gradient is finite, but none
    any more after `limit` in a row where it was not. The host learns of those some steps later, and then finds
    parameters and moments as they were."""

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit, self.length = limit, torch.zeros((), dtype=torch.int32, device=device)

    def admit(self, norm: Tensor) -> Tensor:
        """bool []: whether the step whose gradient has this norm [] is taken."""
        taken = norm.isfinite() & (self.length < self.limit)
        self.length.add_(1).mul_(~taken)
        return taken

    def restore(self, length: int) -> None:
        """Go on after a streak of this length, which is below the limit (`Streak.restore`)."""
        self.length.fill_(length)


class Spikes:
    """Tells a loss far above what the last ones were: by more than `height` of their standard deviations.

    Mean and variance are exponential averages over about `memory` steps; a spike itself is not averaged in further than
    its height. The first `memory` steps are only learnt from.
    """

    def __init__(self, memory: int = 100, height: float = 6.0) -> None:
        self.memory, self.height = memory, height
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def add(self, loss: float) -> bool:
        """Whether this loss is a spike."""
        limit = self.mean + self.height * math.sqrt(self.variance)
        spike = self.count >= self.memory and loss > limit
        loss = min(loss, limit) if spike else loss
        self.count += 1
        share = 1 / min(self.count, self.memory)
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)
        return spike

    def state(self) -> list[float]:
        return [self.count, self.mean, self.variance]

    def restore(self, state: list[float]) -> None:
        self.count, self.mean, self.variance = int(state[0]), *state[1:]
