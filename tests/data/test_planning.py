"""Sequences are nearly full, nothing is lost or asked twice, and the plan is a function of its arguments."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granvit.data.lengths import Lengths
from granvit.data.mixture import Mixed
from granvit.data.order import MIX, Order
from granvit.data.planning import FULL, PATIENCE, Candidate, Lane, Place, draw, fill, packs_of

TASKS = ("bbox2caption", "global_caption")
WEIGHTS = {"bbox2caption": 1.0, "global_caption": 1.0}
IMAGE = np.random.default_rng(0).integers(1, 100, 1000)


def gran_like(rows: int, budget: int, seed: int = 0) -> Lengths:
    """As in Gran-29M: about 6 regions an image, most images at the budget of tokens, long global captions."""
    rng = np.random.default_rng(seed)
    small = rng.random(rows) < 0.15
    image = np.where(small, rng.integers(budget // 5, budget, rows), rng.integers(budget * 9 // 10, budget + 1, rows))
    regions = np.maximum(1, rng.lognormal(np.log(4.6), 0.8, rows).astype(int))
    task = np.concatenate([[0] * count + [1] for count in regions]).astype(np.int8)
    caption = rng.lognormal(np.log(110), 0.4, len(task)).astype(np.int32)
    question = np.where(task == 0, rng.integers(35, 60, len(task)), caption).astype(np.int32)
    return Lengths(TASKS, image.astype(np.int32), np.cumsum([0, *(regions + 1)]), question, task, [])


def used(lengths: Lengths, pack) -> int:
    return sum(lengths.image[r] + lengths.question[lengths.starts[r] + np.array(asked)].sum() for r, asked in pack)


@pytest.mark.parametrize("budget", [36, 256, 1024])
@pytest.mark.parametrize("wanted", [3, 6, 20])
def test_an_epoch_is_nearly_full_and_loses_no_image(budget, wanted):
    lengths = gran_like(6000, budget)
    order = Order(np.ones(6000, np.int64), 1, 0, lengths.image)
    packs = list(Lane(lengths, order, 0, WEIGHTS, 8192, wanted, 512, epochs=1))
    rows = [row for pack in packs for row, _ in pack]
    assert sorted(rows) == list(range(6000))
    for pack in packs:
        assert used(lengths, pack) <= 8192
        for row, asked in pack:
            assert 1 <= len(asked) == len(set(asked)) <= lengths.starts[row + 1] - lengths.starts[row]
    assert np.mean([used(lengths, pack) for pack in packs[:-1]]) >= 0.97 * 8192


def test_all_questions_of_an_image_are_asked_where_no_number_is_wanted():
    lengths = gran_like(3000, 256)
    packs = list(Lane(lengths, one_lane(lengths), 0, WEIGHTS, 4096, None, 512, epochs=1))
    assert sorted(row for pack in packs for row, _ in pack) == list(range(3000))
    for row, asked in (pair for pack in packs for pair in pack):
        whole = lengths.image[row] + lengths.question[lengths.starts[row] : lengths.starts[row + 1]].sum()
        assert len(asked) == lengths.starts[row + 1] - lengths.starts[row] or whole > 4096
    tokens = [used(lengths, pack) for pack in packs]
    assert max(tokens) <= 4096 and np.mean(tokens[:-2]) >= 0.97 * 4096


def test_packs_for_so_many_images():
    lengths = gran_like(3000, 256)
    for images in (3, 40, 256):
        packs = packs_of(images, lengths, WEIGHTS, 4096, 6, 0)
        lanes = [Lane(lengths, one_lane(lengths, packs), lane, WEIGHTS, 4096, 6, 64) for lane in range(packs)]
        steps = list(islice(zip(*lanes, strict=True), 4))
        assert packs in (1, 2, 4) or packs % 8 == 0
        a_step = sum(len(pack) for step in steps for pack in step) / 4
        assert abs(a_step - images) <= max(0.2 * images, 4 * images / packs)
    with pytest.raises(ValueError, match="fits 20 tokens"):
        packs_of(8, lengths, WEIGHTS, 20, 6, 0)


def test_shortest_questions_are_looked_at_in_blocks(monkeypatch):
    lengths = gran_like(100, 400)
    weights = {task: float(n > 0) for n, task in enumerate(TASKS)}
    whole = lengths.shortest(weights)
    for row in range(100):
        mine = slice(*lengths.starts[row : row + 2])
        asked = [tokens for tokens, task in zip(lengths.question[mine], lengths.task[mine], strict=True) if task > 0]
        assert whole[row] == lengths.image[row] + min(asked) if asked else whole[row] > 1 << 39
    monkeypatch.setattr("granvit.data.lengths._BLOCK", 7)
    assert (lengths.shortest(weights) == whole).all()


def one_lane(lengths: Lengths, lanes: int = 1) -> Order:
    return Order(np.ones(len(lengths.image), np.int64), lanes, 0, lengths.image)


@pytest.mark.parametrize("groups", [np.ones(50_000, np.int64), np.full(1000, 50)])
def test_steps_are_drawn_at_random_from_mixed_data(groups):
    """A fifth of the rows, or of the row groups, are pages of many lines; the others are small photographs."""
    rng = np.random.default_rng(1)
    page = np.repeat(rng.random(len(groups)) < 0.2, groups)
    regions = np.where(page, rng.integers(10, 30, len(page)), rng.integers(1, 5, len(page)))
    image = np.where(page, rng.integers(200, 257, len(page)), rng.integers(20, 80, len(page))).astype(np.int32)
    question = rng.integers(8, 20, regions.sum(), dtype=np.int32)
    lengths = Lengths(TASKS[:1], image, np.cumsum([0, *regions]), question, np.zeros(regions.sum(), np.int8), [])
    order = Order(groups, 4, 0, image)
    lanes = [Lane(lengths, order, lane, WEIGHTS, 1024, 6, 128, epochs=1) for lane in range(4)]
    steps = list(zip(*lanes, strict=False))[:-8]  # its last packs are of what is left
    of_pages = np.array([sum(page[row] for pack in packs for row, _ in pack) for packs in steps])
    series = {
        "images": np.array([sum(map(len, packs)) for packs in steps]),
        "questions": np.array([sum(len(asked) for pack in packs for _, asked in pack) for packs in steps]),
        "tokens": np.array([sum(used(lengths, pack) for pack in packs) for packs in steps]),
    }
    for name, values in series.items():
        apart = values - values.mean()
        correlations = [(apart[:-lag] * apart[lag:]).mean() / values.var() for lag in range(1, 21)]
        assert max(map(abs, correlations)) < 0.1, (name, len(steps), correlations)
    several = np.ones(32)
    share = np.convolve(of_pages, several, "valid") / np.convolve(series["images"], several, "valid")
    assert share.min() > 0.1 and share.max() < 0.3, (share.min(), share.max())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(1, 40), min_size=1, max_size=6)), min_size=1),
    st.integers(1, 8),
)
def test_fill_keeps_everyone_in_bounds(shapes, wanted):
    capacity = 100
    given_ = [Candidate(i, list(range(len(q))), image + np.cumsum(q)) for i, (image, q) in enumerate(shapes)]
    packs, left = fill(given_, capacity, wanted)
    assert packs
    assert sorted([row for pack in packs for row, _ in pack] + [one.row for one in left]) == list(range(len(shapes)))
    for pack in packs:
        assert sum(shapes[row][0] + sum(shapes[row][1][q] for q in asked) for row, asked in pack) <= capacity
    assert all(one.waited == 1 for one in left)


def test_nobody_waits_for_ever():
    awkward = Candidate(0, [0], np.array([60]))
    others = [Candidate(i, [0], np.array([50])) for i in range(1, 9)]
    waiting, rounds = [awkward], 0
    while any(one.row == 0 for one in waiting):
        packs, waiting = fill([*waiting, *others], 100, 1)
        assert all(len(pack) <= 2 for pack in packs)
        rounds += 1
    assert rounds <= PATIENCE + 1 and FULL < 1


def orders(lengths: Lengths, lanes: int) -> dict[str, Order | Mixed]:
    image, rows = lengths.image, len(lengths.image)
    first, second = (Order(np.full(25, rows // 50), lanes, seed, image[: rows // 2]) for seed in (3, 4))
    rare = Order(np.full(rows // 2, 1), lanes, 5, image[rows // 2 :])
    return {
        "single rows": Order(np.ones(rows, np.int64), lanes, 3, image),
        "row groups": Order(np.full(60, rows // 60), lanes, 3, image),
        "fewer row groups than lanes": Order(np.array([rows - 7, 7]), lanes, 3, image),
        "mixed": Mixed([first, second], None),
        "mixed by weights": Mixed([first, rare], [12.0, 0.01]),
    }


@pytest.mark.parametrize("epochs", [2, None])
@pytest.mark.parametrize("name", list(orders(gran_like(600, 100), 3)))
def test_a_lane_goes_on_from_any_place_as_if_it_had_not_stopped(name, epochs, monkeypatch):
    lengths = gran_like(3000, 100)
    lane = Lane(lengths, orders(lengths, 3)[name], 2, WEIGHTS, 1200, 3, 64, epochs)
    whole = list(islice(lane.packs(), 700))
    fills, kept = [], fill
    monkeypatch.setattr("granvit.data.planning.fill", lambda *args: fills.append(1) or kept(*args))
    for at in {0, 1, 5, 40, 263, 264, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
        place = Place.parse(json.loads(json.dumps(whole[at][1])))
        fills.clear()
        other = Lane(lengths, orders(lengths, 3)[name], 2, WEIGHTS, 1200, 3, 64, epochs)
        rest = list(islice(other.packs(place), min(3, len(whole) - 1 - at)))
        assert rest == whole[at + 1 : at + 4] and len(fills) <= 2 + len(rest) // 2
    if epochs:
        assert len(whole) < 700 and not list(lane.packs(whole[-1][1]))
        assert list(lane.packs(whole[9][1])) == whole[10:]


@pytest.mark.parametrize("wrong", [None, [0] * 6, [0] * 5 + [[[1, 2]]], [0, 0, 0, 0, -1, []], [0, 0, 0, 0, "1", []]])
def test_what_is_no_place_is_refused(wrong):
    with pytest.raises(ValueError, match="six fields of integers >= 0"):
        Place.parse(wrong)
    lengths = gran_like(300, 100)
    lane = Lane(lengths, one_lane(lengths), 0, WEIGHTS, 1200, 3, 64)
    for row in (300, 1 << 60):
        with pytest.raises(ValueError, match="one of other data"):
            next(lane.packs(Place(waiting=[(row, 0, 1)])))


@pytest.mark.parametrize("groups", [np.ones(1000, np.int64), np.array([64] * 15 + [40])])
def test_every_row_has_one_lane_an_epoch(groups):
    order = Order(groups, 4, 3, IMAGE)
    for epoch in (0, 1, 5):
        rows = np.concatenate([part for lane in range(4) for part in order.rows(lane, epoch)])
        assert sorted(rows) == list(range(1000))
    one = [np.concatenate(list(order.rows(2, epoch))).tolist() for epoch in (0, 1, 0)]
    assert one[0] == one[2] != one[1]
    assert one[0] != np.concatenate(list(Order(groups, 4, 4, IMAGE).rows(2, 0))).tolist()
    assert one[0] != sorted(one[0])


def test_neighbours_of_a_row_group_are_read_near_each_other():
    order = Order(np.full(100, 64), 1, 0, np.arange(6400))
    rows = np.concatenate(list(order.rows(0, 0)))
    window = rows[: 8 * 64] // 64
    assert len(set(window)) == 8


def test_questions_are_drawn_by_weight_and_anew_each_epoch():
    lengths = gran_like(4000, 100)
    rows = np.arange(4000)

    def first_tasks(weights, epoch=0):
        drawn = draw(lengths, rows, weights, 10_000, 0, epoch)
        return [int(lengths.task[lengths.starts[one.row] + one.questions[0]]) for one in drawn]

    even, heavy = np.mean(first_tasks(WEIGHTS)), np.mean(first_tasks({"bbox2caption": 1.0, "global_caption": 50.0}))
    share = np.mean(1 / (np.diff(lengths.starts)))
    assert even == pytest.approx(share, abs=0.03) and heavy > 0.85
    assert sum(first_tasks({"bbox2caption": 1.0, "global_caption": 0.0})) == 0
    again = [draw(lengths, rows, WEIGHTS, 10_000, 0, epoch) for epoch in (0, 0, 1)]
    orders = [[one.questions for one in drawn] for drawn in again]
    assert orders[0] == orders[1] != orders[2]


def test_rows_without_questions_or_room_are_left_out():
    lengths = Lengths(TASKS, np.array([0, 50, 50, 99], np.int32), np.array([0, 0, 2, 3, 4]),
                      np.array([60, 20, 30, 5], np.int32), np.array([0, 1, 0, 0], np.int8), [])  # fmt: skip
    drawn = draw(lengths, np.arange(4), WEIGHTS, 100, 0, 0)
    assert [(one.row, one.questions) for one in drawn] == [(1, [1]), (2, [0])]


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("groups", [[2, 0], [3, 0, 1, 0], [1000, 1000], [5], [1], [0, 1, 0, 700, 3], [222] * 9, [0]])
def test_few_empty_and_huge_row_groups_are_dealt_out_evenly(groups, lanes):
    order = Order(np.array(groups), lanes, 1, np.arange(sum(groups)) % 7)
    for epoch in range(3):
        parts = [list(order.rows(lane, epoch)) for lane in range(lanes)]
        counts = [sum(map(len, part)) for part in parts]
        assert sorted(np.concatenate([rows for part in parts for rows in [[], *part]])) == list(range(sum(groups)))
        piece = sum(groups) / lanes / MIX  # which a lane may have more than another, and two in place of small groups
        assert max(counts) - min(counts) <= 1 + 3 * piece
        assert all(len(rows) <= 1024 for part in parts for rows in part)


def test_a_lane_without_end_finds_rows_where_there_are_fewer_than_lanes():
    lengths = gran_like(3, 100)
    order = Order(np.array([3]), 8, 0, lengths.image)
    firsts = [next(iter(Lane(lengths, order, lane, WEIGHTS, 1000, 6, 2))) for lane in range(8)]
    assert {row for pack in firsts for row, _ in pack} == {0, 1, 2}


def test_the_smallest_weights_are_weights_too():
    lengths = gran_like(300, 100)
    drawn = [draw(lengths, np.arange(300), dict.fromkeys(TASKS, w), 10_000, 0, 0) for w in (1.0, 5e-324)]
    assert [one.questions for one in drawn[0]] == [one.questions for one in drawn[1]]
    apart = draw(lengths, np.arange(300), {"bbox2caption": 1e-300, "global_caption": 1e300}, 10_000, 0, 0)
    assert [len(one.questions) for one in apart] == np.diff(lengths.starts).tolist()
