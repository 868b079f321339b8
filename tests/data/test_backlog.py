"""Processes read ahead by bytes, and never wait for each other."""

import multiprocessing
import time

import pytest

from granvit.data.backlog import Backlog


def hand_over(backlog, process, sizes, handed):
    for size in sizes:
        backlog.hand(process, size)
        handed[process] += size


def settled(read) -> int:
    """What `read` gives once it stays the same for a quarter of a second."""
    before, since = read(), time.monotonic()
    while time.monotonic() - since < 0.25:
        time.sleep(0.01)
        if read() != before:
            before, since = read(), time.monotonic()
    return before


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_waits_before_its_share_is_full_and_goes_on_when_some_is_taken(method):
    context = multiprocessing.get_context(method)
    backlog, handed = Backlog(2, 20), context.RawArray("q", 2)
    work = [context.Process(target=hand_over, args=(backlog, n, sizes, handed))
            for n, sizes in enumerate(([4] * 5, [30, 1]))]  # fmt: skip
    for process in work:
        process.start()
    deadline = time.monotonic() + 60
    while not (handed[0] and handed[1]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert settled(lambda: handed[0]) == 8  # of a share of 10
    assert settled(lambda: handed[1]) == 30  # larger than a share, and alone
    backlog.take(0, 4)
    assert settled(lambda: handed[0]) == 12
    backlog.take(1, 30)
    assert settled(lambda: handed[1]) == 31
    backlog.release()
    for process in work:
        process.join(20)
        assert process.exitcode == 0
    assert list(handed) == [20, 31]
