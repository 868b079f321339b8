"""Mixtures: shares that hold in every stretch, whole passes without weights, one order for any ranks."""

from collections import Counter

import datasets
import numpy as np
import pytest

from granvit.data.batches import PackLoader
from granvit.data.loader import GranDataset
from granvit.data.mixture import Mixed, Mixture, dataset_name, described, open_split
from granvit.data.order import Order
from granvit.data.schema import FEATURES
from tests.data.conftest import gran_rows
from tests.helpers import loading
from tests.helpers.loading import joined, seen, write_parquet

SIZES = (120, 40, 60)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three datasets, the second of Parquet; ids say which."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, (name, size) in enumerate(zip("abc", SIZES, strict=True)):
        rows = [row | {"id": f"{name}{row['id']}"} for row in gran_rows(size, seed=number)]
        if name == "b":
            write_parquet(folder / name, rows)
        else:
            datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(folder / name)
    return [str(folder / name) for name in "abc"]


def loader(paths, processor, **options) -> PackLoader:
    return loading.loader(open_split(paths), processor, **{"epochs": 2} | options)


def test_rows_are_the_datasets_one_behind_the_other(paths):
    mixture = open_split(paths)
    assert len(mixture) == sum(SIZES) and mixture.names == ["a", "b", "c"] and len(mixture.ids()) == sum(SIZES)
    for row, name in ((0, "a"), (119, "a"), (120, "b"), (159, "b"), (160, "c"), (219, "c")):
        sample = mixture[row]
        assert (sample.id[0], sample.dataset) == (name, name) and mixture.ids()[row] == sample.id
        assert sample.id in mixture.name(row)
    with pytest.raises(IndexError):
        mixture.read(220, print)
    assert described(mixture, (1, 1, 2))[2] == "c, 60 images, 50.0 % of those drawn"
    assert described(mixture, None)[0].endswith("54.5 % of those drawn")
    assert described(GranDataset(paths[0]), None) == []


@pytest.mark.parametrize("weights", [None, (2, 1, 1)])
def test_a_stop_and_other_ranks_change_nothing(paths, processor, weights):
    whole = [seen(batch, processor) for batch in loader(paths, processor, weights=weights)]
    ids = Counter(name for batch in whole for sequence in batch for name, _ in sequence)
    drawn = Counter({name: sum(number for i, number in ids.items() if i[0] == name) for name in "abc"})
    if weights is None:
        assert set(ids.values()) == {2} and len(ids) == sum(SIZES)
    else:  # 440 draws: half of a, a quarter of each other
        assert drawn == {"a": 220, "b": 110, "c": 110}
        for name, expected in (("a", 220 / 120), ("b", 110 / 40), ("c", 110 / 60)):
            times = [number for i, number in ids.items() if i[0] == name]
            assert len(times) == SIZES["abc".index(name)] and abs(np.array(times) - expected).max() < 2
    batches, state = [], None
    for ranks, steps, workers in ((1, 5, 0), (2, 4, 0), (1, 1000, 2)):
        parts = []
        for rank in range(ranks):
            current = loader(paths, processor, weights=weights, rank=rank, ranks=ranks, workers=workers)
            if state is not None:
                current.load_state_dict(state)
            parts.append([])
            for batch in current:
                parts[-1].append(seen(batch, processor))
                if len(parts[-1]) == steps:
                    break
            after = current.state_dict()
        state = after
        batches += [joined(list(several)) for several in zip(*parts, strict=True)]
    assert batches == whole
    with pytest.raises(ValueError, match="another loader .*weights"):
        loader(paths, processor, weights=(1, 1, 1)).load_state_dict(state)
    with pytest.raises(ValueError, match="another loader .*datasets"):
        loader([paths[1], paths[0], paths[2]], processor, weights=weights).load_state_dict(state)


def test_shares_hold_in_every_stretch_and_lanes_together_draw_exactly():
    sizes, lanes = (20_000, 5_000, 1_000), 4
    orders = [Order(np.ones(size, np.int64), lanes, i, np.ones(size, np.int32)) for i, size in enumerate(sizes)]
    ends = np.cumsum(sizes)
    counts = np.zeros(3, int)
    for lane in range(lanes):
        rows = np.concatenate([rows for _, _, rows, _ in Mixed(orders, (1, 2, 1)).stream(lane, 2)])
        of = np.searchsorted(ends, rows, side="right")
        counts += np.bincount(of, minlength=3)
        for start in range(0, len(of) - 3000, 3000):
            assert abs(np.bincount(of[start : start + 3000], minlength=3) / 3000 - (0.25, 0.5, 0.25)).max() < 0.03
    assert counts.tolist() == [13_000, 26_000, 13_000]
    rare = Mixed(orders, (1, 1e-9, 1))
    rows = np.concatenate([rows for lane in range(lanes) for _, _, rows, _ in rare.stream(lane, 2)])
    assert ((rows >= ends[0]) & (rows < ends[1])).sum() == 2  # one an epoch, however small its share


def test_what_can_not_be_mixed_is_named(paths, processor, tmp_path):
    with pytest.raises(ValueError, match="is named twice"):
        open_split([paths[0], paths[0] + "/../a"])
    (tmp_path / "a").symlink_to(paths[1])
    with pytest.raises(ValueError, match="have one name, 'a'"):
        open_split([paths[0], str(tmp_path / "a")])
    with pytest.raises(ValueError, match="two datasets or more"):
        Mixture([GranDataset(paths[0])])
    for weights in ((1, 2), (1, 2, 0), (1, 2, float("nan"))):
        with pytest.raises(ValueError, match="weights must be a finite number > 0 for each of 3 datasets"):
            loader(paths, processor, weights=weights)
    nothing = gran_rows(3)
    for row in nothing:
        row |= {"regions": [], "caption": "a scene"}
    mixture = Mixture([GranDataset(paths[0]), GranDataset(datasets.Dataset.from_list(nothing, features=FEATURES))])
    with pytest.raises(ValueError, match="in memory.*no image with a question of .'bbox2caption'"):
        PackLoader(mixture, processor, {"bbox2caption": 1.0}, capacity=400, packs=2, weights=(1, 1))
    assert dataset_name("hf://datasets/x/gran.parquet") == "gran" and dataset_name("/data/pages/") == "pages"
