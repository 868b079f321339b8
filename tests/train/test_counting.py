"""Steps out of `epochs` and sequences out of `images`: every image so many times, on any number of ranks."""

from collections import Counter
from dataclasses import replace

import pytest

from granvit.data.batches import PackLoader
from granvit.data.loader import GranDataset
from granvit.train import counting
from granvit.train.counting import check_ranks, counted, order_arguments


@pytest.fixture
def config(small_config):
    """Two passes over the data, in steps of two batches of about 48 images together."""
    stage = replace(small_config.pretrain, steps=None, epochs=2, packs=None, images=48, accumulate=2)
    return replace(small_config, pretrain=stage)


def test_every_image_is_seen_so_many_times_by_any_ranks(config, sample_set, tiny, tmp_path, monkeypatch):
    data, processor = GranDataset(sample_set), tiny()[1]
    known = tmp_path / "counts.json"
    whole = counted(config, lambda stage: data, processor, known)
    stage = whole.pretrain
    assert stage.epochs is stage.images is None and stage.passes == 2
    assert whole.warmup == config.warmup and whole.adapt == config.adapt

    def rows(rank: int, ranks: int) -> list[list[list[int]]]:
        loader = PackLoader(
            data, processor, stage.weights, **order_arguments(whole, stage), rank=rank, ranks=ranks, workers=0
        )
        loader.steps = stage.steps * stage.accumulate
        return [[[row for row, _ in pack] for pack in packs] for packs in loader.plan()]

    with pytest.raises(ValueError, match=f"pretrain: {stage.packs} sequences a batch .* no multiple of 7 ranks"):
        check_ranks(replace(whole, warmup=replace(whole.warmup, steps=0)), 7)
    single = rows(0, 1)
    assert len(single) == stage.steps * stage.accumulate
    seen = Counter(row for packs in single for pack in packs for row in pack)
    assert set(seen.values()) == {2} and len(seen) == len(data)
    images = [sum(map(len, packs)) for packs in single]
    assert any(images[-stage.accumulate :]) and 16 <= sum(images[:2]) <= 72
    together = zip(rows(0, 2), rows(1, 2), strict=True)
    assert [[pack for pair in zip(*both, strict=True) for pack in pair] for both in together] == single

    monkeypatch.setattr(counting, "_count", None)  # it is kept
    assert counted(config, lambda stage: data, processor, known) == whole
