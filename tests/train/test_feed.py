import threading

import pytest

from granvit.train.feed import read_ahead


def test_one_item_is_read_ahead_in_order_and_nothing_after_the_end():
    read, event = [], threading.Event()

    def source():
        for number in range(4):
            read.append(number)
            if number == 1:
                event.set()
            yield number

    ahead = read_ahead(source())
    assert next(ahead) == 0 and event.wait(10)  # 1 is read while 0 is used
    assert [*ahead] == [1, 2, 3] and read == [0, 1, 2, 3]


def test_an_error_comes_where_its_item_would_and_closing_ends_the_thread():
    def source():
        yield from (0, 1)
        raise OSError("no disk")

    ahead = read_ahead(source())
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="no disk"):
        next(ahead)
    ahead = read_ahead(iter(range(9)))
    next(ahead)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read ahead")]
