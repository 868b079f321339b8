import threading
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from granvit.data.collate import collate
from granvit.train.feed import Feed, read_ahead
from granvit.world import World


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


def test_a_gpu_s_batches_are_pinned_and_wait_for_the_copies_before(tiny, samples, monkeypatch):
    """With a stand-in for CUDA: the order of what is asked of it."""
    model, processor = tiny()
    batch = collate(samples, [processor.questions(sample, ["bbox2caption"]) for sample in samples], processor, 256)
    done, pinned = [], []

    class Event:
        def synchronize(self):
            done.append("waited")

        def record(self):
            done.append("recorded")

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    feed = Feed(batch, 1, (), World(), torch.device("cpu"))
    feed._copied = Event()
    asked = iter([False, True])
    first, second = feed.steps(iter([[batch], [batch]]), lambda: next(asked))
    assert done == ["waited", "recorded"] * 2
    assert (first.stop, second.stop) == (False, True) and first.counts["images"] == len(samples)
    (part,) = first.parts
    assert part.ids == [sample.id for sample in batch.samples]
    for tensor in (batch.regions, batch.packed.input_ids, batch.packed.segments.cu_segments, *batch.packed.images):
        assert sum(tensor is other for other in pinned) == 2
