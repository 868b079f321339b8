"""Batches: full, the same for any number of ranks and workers, found again after a stop; faults leave slots empty."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from PIL import Image

from granvit.data import planning
from granvit.data.batches import KEPT_PLACES, PackLoader, with_all_places
from granvit.data.collate import Read, join
from granvit.data.faults import FaultBudgetExceeded
from granvit.data.loader import GranDataset
from granvit.data.sample import build_sample
from granvit.data.schema import FEATURES
from granvit.questions.packing import write_parts
from granvit.questions.schema import Sample
from tests.data.conftest import gran_rows
from tests.helpers.loading import TASKS, joined, loader, seen, write_parquet


def test_a_batch_is_split_into_batches_of_its_sequences(gran, processor):
    """Each is what its sequences make when they are put together: every field is."""
    batch = next(iter(loader(GranDataset(gran), processor, packs=5)))
    rows = [list(dict.fromkeys(row[row >= 0].tolist())) for row in batch.packed.image_index]
    for number, cuts in ((1, (0, 5)), (2, (0, 2, 5)), (7, (0, 0, 1, 2, 2, 3, 4, 5))):
        parts = batch.split(number)
        for part, (first, end) in zip(parts, pairwise(cuts), strict=True):
            kept = sorted(i for row in rows[first:end] for i in row)
            plan = [[kept.index(i) for i in row] for row in rows[first:end]]
            samples, asked = [batch.samples[i] for i in kept], [batch.asked[i] for i in kept]
            read = Read(plan, samples, asked, write_parts(samples, asked, processor))
            assert_same(part, join([read], processor, 400))
    assert len(batch.crops) == sum(len(part.crops) for part in parts) > len(parts)


def assert_same(ours: object, theirs: object) -> None:
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif is_dataclass(ours) and not isinstance(ours, Sample):
        for field in fields(ours):
            assert_same(getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(ours, list) and ours and isinstance(ours[0], torch.Tensor):
        assert all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs)
    else:
        assert ours is theirs or ours == theirs


def test_an_epoch_shows_every_image_once_in_full_sequences(gran, processor):
    batches = list(loader(GranDataset(gran), processor))
    ids = [sample.id for batch in batches for sample in batch.samples]
    assert sorted(ids) == sorted(gran["id"])
    tokens = [(batch.packed.image_index >= 0).sum(1).tolist() for batch in batches]
    filled = [n for counts in tokens[:-2] for n in counts]
    assert max(filled) <= 400 and sum(filled) / len(filled) > 0.97 * 400
    for batch in batches:
        assert [tuple(image.shape) for image in batch.packed.images] == [tuple(s.image.shape) for s in batch.samples]
        assert len(batch.regions) == sum(len(sample.regions) for sample in batch.samples)


def test_the_sample_set_fills_sequences(tmp_path, processor):
    build_sample(tmp_path / "sample", 300, workers=0)
    one = loader(GranDataset(tmp_path / "sample"), processor, capacity=8192, packs=1, questions=6, window=512)
    packs = list(one.lanes[0])
    lengths = one.lengths
    used = [
        sum(lengths.image[row] + sum(lengths.question[lengths.starts[row] + n] for n in asked) for row, asked in pack)
        for pack in packs
    ]
    assert sorted(row for pack in packs for row, _ in pack) == list(range(len(one.dataset)))
    assert len(packs) >= 3 and sum(used[:-1]) / (len(used) - 1) >= 0.97 * 8192 and max(used) <= 8192


def test_images_are_the_rows_own_also_from_another_process(gran, processor):
    here = list(loader(GranDataset(gran), processor))
    there = list(loader(GranDataset(gran), processor, workers=2))
    assert len(here) == len(there)
    for one, two in zip(here, there, strict=True):
        assert [s.id for s in one.samples] == [s.id for s in two.samples]
        for a, b in zip(one.packed.images, two.packed.images, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(one.packed.input_ids, two.packed.input_ids)
        for sample in two.samples:
            assert abs(int(sample.image.float().mean()) - int(sample.id[1:]) % 256) <= 2


def test_stopped_and_gone_on_with_on_other_numbers_of_ranks(gran, processor):
    """1 rank, stopped in mid-epoch, then 2, stopped in the next epoch, then 4, then 1 with a process beside it: the
    global order is that of one rank that was never stopped."""
    data = GranDataset(gran)
    whole = [seen(batch, processor) for batch in loader(data, processor, epochs=3)]
    state, batches = None, []
    for ranks, steps, workers in ((1, 4, 0), (2, 9, 0), (4, 3, 0), (1, 100, 2)):
        parts, states = [], []
        for rank in range(ranks):
            one = loader(data, processor, epochs=3, rank=rank, ranks=ranks, workers=workers)
            if state is not None:
                one.load_state_dict(state)
            part = []
            for batch in one:
                part.append(seen(batch, processor))
                if len(part) == steps:
                    break
            parts.append(part)
            states.append(one.state_dict())
        state = json.loads(json.dumps(with_all_places(states)))
        assert set(state["places"]) == {lane for one in states for lane in one.pop("places")} == set("0123")
        assert all(other == states[0] for other in states) and isinstance(state["step"], int)
        for batch in zip(*parts, strict=True):
            batches.append(joined(list(batch)))
    assert batches == whole
    rows = [name for batch in whole for sequence in batch for name, _ in sequence]
    assert sorted(rows) == sorted(list(gran["id"]) * 3)
    first = [name for batch in whole[: len(whole) // 3] for sequence in batch for name, _ in sequence]
    assert first != sorted(first) and rows[: len(gran)] != rows[len(gran) : 2 * len(gran)]


def test_a_state_tells_where_lanes_stood_so_that_nothing_is_planned_again(gran, processor, monkeypatch):
    """Of a step that was trained while others were read ahead, too; without the places, as in older states, all is."""
    data, fills, kept = GranDataset(gran), [], planning.fill
    first = loader(data, processor, epochs=None)
    batches = iter(first)
    whole = [seen(next(batches), processor) for _ in range(60)]
    state = json.loads(json.dumps(first.state_dict(step=50)))
    assert state["step"] == 50 and first.step == 60
    monkeypatch.setattr(planning, "fill", lambda *args: fills.append(1) or kept(*args))
    older = {key: value for key, value in state.items() if key != "places"}
    halves = {**state, "places": {lane: place for lane, place in state["places"].items() if lane in "02"}}
    for part, most in ((state, range(4, 9)), (halves, range(9, 99)), (older, range(20, 999))):
        fills.clear()
        second = loader(data, processor, epochs=None)
        second.load_state_dict(part)
        second.step = 51  # a step to go on at may be set, too
        assert seen(next(iter(second)), processor) == whole[51]
        assert len(fills) in most
    first.step = 7  # also the same loader goes on elsewhere
    assert [seen(batch, processor) for batch, _ in zip(first, range(3), strict=False)] == whole[7:10]
    stood, place = first.step, state["places"]["0"]
    for wrong, message in (
        ({"places": {"0": [3, "x"]}}, "six fields"),
        ({"places": {"0": [*place[:-1], [[0, 0, 2**63]]]}}, "six fields"),
        ({"places": {"0": ["3", *place[1:]]}}, "lanes 0 to 3, each with a step from 0 to 50"),
        ({"places": {"0": [51, *place[1:]]}}, "lanes 0 to 3, each with a step from 0 to 50"),
        ({"places": {"4": place}}, "for lane '4'"),
        ({"places": {"0": None}}, "got None for lane '0'"),
        ({"places": [place]}, "a step >= 0 and its lanes' places"),
        ({"step": -1}, "a step >= 0"),
        ({"step": "50"}, "a step >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            first.load_state_dict(state | wrong)
    assert first.step == stood


def test_a_state_is_told_while_a_thread_reads_ahead(gran, processor):
    first = loader(GranDataset(gran), processor, epochs=None)
    thread = threading.Thread(target=lambda: [packs for packs, _ in zip(first.plan(), range(600), strict=False)])
    thread.start()
    states = 0
    while thread.is_alive():
        first.state_dict(step=0)  # looks at all that it knows
        states += 1
    assert states > 10 and len(first._places) == KEPT_PLACES


def test_another_seed_or_state_of_another_loader(gran, processor):
    data = GranDataset(gran)
    one, two = (next(iter(loader(data, processor, seed=seed))) for seed in (0, 1))
    assert [s.id for s in one.samples] != [s.id for s in two.samples]
    state = loader(data, processor, packs=8).state_dict()
    with pytest.raises(ValueError, match="another loader .packs: 8 there, 4 here"):
        loader(data, processor).load_state_dict(state)
    for wrong, message in (
        ({"ranks": 3}, "multiple of ranks"),
        ({"rank": 2, "ranks": 2}, "multiple of ranks"),
        ({"capacity": 0}, "capacity must be >= 1"),
        ({"capacity": 12}, "fits 12 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(data, processor, **wrong)
    with pytest.raises(ValueError, match="weights >= 0"):
        PackLoader(data, processor, {"bbox2caption": -1.0})
    with pytest.raises(ValueError, match="accepted are"):
        PackLoader(data, processor, {"singing": 1.0})


def broken(rows: list[dict]) -> dict[str, str]:
    """Break ten rows in ten ways; id: kind of fault."""

    def image(picture: Image.Image, form: str = "PNG", **options) -> dict:
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        return {"image": {"bytes": buffer.getvalue(), "path": None}, "width": picture.width, "height": picture.height}

    rows[3]["image"] = {"bytes": rows[3]["image"]["bytes"][:300], "path": None}
    rows[17] |= image(Image.new("RGB", (1, 1)))
    rows[31] |= image(Image.new("RGB", (20_000, 10)))
    rows[40] |= {"regions": [rows[40]["regions"][0] | {"box": [float("nan"), 0, 1, 1]}], "caption": None}
    rows[58] |= {"regions": [rows[58]["regions"][0] | {"caption": ""}], "caption": None}
    rows[77]["image"] = {"bytes": b"not an image", "path": None}
    rows[78]["image"] = {"bytes": None, "path": "/nowhere.png"}
    rows[90]["width"] += 1
    rows[101]["regions"] = [{"box": [0.5, 0.5, 0.2, 0.9], "caption": "x", "kind": "natural", "score": None}]
    rows[101]["caption"] = None
    rows[120]["id"] = ""
    kinds = {3: "image", 17: "image_shape", 31: "image_shape", 40: "box", 58: "region_caption", 77: "image"}
    kinds |= {78: "image", 90: "size", 101: "box", 120: "id"}
    return {rows[i]["id"]: kind for i, kind in kinds.items()}


def unusual(rows: list[dict]) -> None:
    """Pictures of other modes, which are no faults: CMYK, 16 bits, a palette, a transparent one, one turned by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {
        5: (Image.new("CMYK", (40, 30)), "JPEG", {}),
        6: (Image.new("I;16", (40, 30), 30_000), "PNG", {}),
        7: (Image.new("P", (40, 30)), "PNG", {}),
        8: (Image.new("RGBA", (40, 30)), "PNG", {}),
        9: (Image.new("L", (30, 40)), "JPEG", {"exif": exif}),
    }
    for index, (picture, form, options) in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        rows[index] |= {"image": {"bytes": buffer.getvalue(), "path": None}, "width": 40, "height": 30}


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_are_counted_and_leave_their_slots_empty(processor, workers, caplog):
    rows = gran_rows(240)
    unusual(rows)
    kinds = broken(rows)
    data = GranDataset(datasets.Dataset.from_list(rows, features=FEATURES), fault_budget=0.1)
    one = loader(data, processor, workers=workers)
    read = [seen(batch, processor) for batch in one]
    assert {name for batch in read for row in batch for name, _ in row} == {row["id"] for row in rows} - set(kinds)
    counted = {kind: list(kinds.values()).count(kind) for kind in kinds.values()}
    counted["empty_row"] = 3  # those whose only region is at fault
    assert dict(one.faults.counts) == counted and len(one.faults.faulty) == 10
    for name in kinds:
        assert f"id={name!r}" in caplog.text


def test_above_the_budget_the_run_stops(processor):
    rows = gran_rows(240)
    broken(rows)
    data = GranDataset(datasets.Dataset.from_list(rows, features=FEATURES))
    with pytest.raises(FaultBudgetExceeded, match="of 240 rows have faults .*the fault budget allows 2"):
        list(loader(data, processor))


def test_a_faulty_image_is_not_replaced(processor):
    rows = gran_rows(60)
    plain = GranDataset(datasets.Dataset.from_list(rows, features=FEATURES))
    before = [seen(batch, processor) for batch in loader(plain, processor)]
    rows[11]["image"] = {"bytes": b"broken", "path": None}
    faulty = GranDataset(datasets.Dataset.from_list(rows, features=FEATURES), fault_budget=0.1)
    after = [seen(batch, processor) for batch in loader(faulty, processor)]
    without = [[[pair for pair in row if pair[0] != "r11"] for row in batch] for batch in before]
    assert after == without


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ((torch.UntypedStorage, "_new_shared"), RuntimeError("unable to allocate shared memory(shm) for file </t>")),
        ((torch.multiprocessing, "Queue"), OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_small_shared_memory_is_named(gran, processor, monkeypatch, place, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(*place, full)
    with pytest.raises(ValueError, match="/dev/shm, which is full.*--data.workers 0"):
        list(loader(GranDataset(gran), processor, workers=1))


def test_a_small_limit_of_what_is_read_ahead_changes_nothing(gran, processor, monkeypatch):
    batches = [seen(batch, processor) for batch in loader(GranDataset(gran), processor)]
    monkeypatch.setattr("granvit.data.batches.PREFETCH_BYTES", 1)
    limited = loader(GranDataset(gran), processor, workers=2)
    assert [seen(batch, processor) for batch in limited] == batches
    iterator = iter(limited := loader(GranDataset(gran), processor, workers=2))
    next(iterator)
    began = time.monotonic()
    iterator.close()  # its processes wait for room
    assert limited.step == 1 and time.monotonic() - began < 4


def runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


PRINTER = """
import multiprocessing, sys
from tests.data.test_batches import *
from granvit.model import GranViTProcessor
multiprocessing.set_start_method(sys.argv[4])
data, processor = GranDataset(sys.argv[1]), GranViTProcessor.from_pretrained(sys.argv[2])
one = loader(data, processor, epochs=2, workers=2 if sys.argv[4] == "fork" else 1)  # others take long to start
one.step = int(sys.argv[3])
for batch in one:
    if one.step == 1:
        print([child.pid for child in multiprocessing.active_children()], flush=True)
    print(one.step, seen(batch, processor), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_killed_in_mid_epoch(tmp_path, many_rows, processor, method):
    """However its workers are started (forkserver from Python 3.14 on): they end with it, and the rest is as if it had
    gone on, and as without workers."""
    write_parquet(tmp_path / "set", many_rows)
    processor.save_pretrained(tmp_path / "processor")
    root = Path(__file__).resolve().parents[2]

    def start(step: int) -> subprocess.Popen:
        paths = str(tmp_path / "set"), str(tmp_path / "processor")
        command = [sys.executable, "-c", PRINTER, *paths, str(step), method]
        environment = os.environ | {"PYTHONPATH": str(root), "GRANVIT_CACHE": str(tmp_path)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=environment)

    killed = start(0)
    workers = json.loads(killed.stdout.readline())
    lines = [killed.stdout.readline() for _ in range(5)]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert workers
    deadline = time.monotonic() + 60
    while running := [worker for worker in workers if runs(worker)]:
        assert time.monotonic() < deadline, f"workers {running} outlive their parent"
        time.sleep(0.1)
    whole = [seen(b, processor) for b in loader(GranDataset(tmp_path / "set"), processor, epochs=2)]
    printed = [f"{step} {batch}\n" for step, batch in enumerate(whole, 1)]
    assert lines == printed[:5]
    if method == "fork":
        assert start(5).communicate()[0] == "".join(printed[5:])


def test_rows_of_tasks_that_are_not_asked_are_no_faults(processor):
    rows = [row | ({"caption": "a scene", "regions": []} if i % 2 else {}) for i, row in enumerate(gran_rows(20))]
    data = GranDataset(datasets.Dataset.from_list(rows, features=FEATURES))
    one = PackLoader(data, processor, {"bbox2caption": 1.0, "global_caption": 0.0}, capacity=400, packs=2, epochs=1)
    assert not one.faults.faulty
    with pytest.raises(ValueError, match="no image with a question"):
        loader(GranDataset(datasets.Dataset.from_list(rows, features=FEATURES).select([])), processor)
    with pytest.raises(ValueError, match="finite weights"):
        PackLoader(data, processor, {"bbox2caption": float("inf")})


def test_a_budget_that_holds_in_one_epoch_holds_in_all(processor):
    """A rank sees other rows in each epoch: the faulty ones it has seen are more than its share of one epoch's."""
    rows = gran_rows(240)
    for row in rows[::13]:
        row["image"] = {"bytes": b"broken", "path": None}
    data = GranDataset(datasets.Dataset.from_list(rows, features=FEATURES), fault_budget=0.1)
    one = loader(data, processor, epochs=6, ranks=4)
    assert sum(1 for _ in one) == one.steps
    assert len(one.faults.faulty) > 7


def test_a_state_of_other_lengths_order_or_tasks_is_refused(gran, many_rows, processor, tmp_path):
    data = GranDataset(gran)
    state = loader(data, processor).state_dict()
    loader(GranDataset(gran), processor).load_state_dict(state)
    longer = [*many_rows[:-1], many_rows[-1] | {"caption": "a far longer caption of it"}]
    write_parquet(tmp_path / "set", many_rows)
    others = [
        loader(GranDataset(datasets.Dataset.from_list(longer, features=FEATURES)), processor),
        loader(GranDataset(tmp_path / "set"), processor),
        loader(data, processor, epochs=2),
        PackLoader(data, processor, dict.fromkeys(TASKS, 1.0), capacity=400, packs=4, questions=3, window=24, epochs=1),
    ]
    for other in others:
        with pytest.raises(ValueError, match="another loader"):
            other.load_state_dict(state)


def test_iterating_leaves_the_random_numbers_of_training_alone(gran, processor):
    before = torch.get_rng_state()
    next(iter(loader(GranDataset(gran), processor)))
    assert torch.equal(before, torch.get_rng_state())


def test_rows_that_are_all_faulty_are_said_to_be(processor):
    rows = [row | {"width": 0} for row in gran_rows(5)]
    with pytest.raises(ValueError, match="no image with a question .*faults: {'size': 5}"):
        loader(GranDataset(datasets.Dataset.from_list(rows, features=FEATURES)), processor)


def test_a_batch_that_lost_every_image_trains_nothing(tiny):
    model, processor = tiny()
    rows = [row | {"image": {"bytes": b"broken", "path": None}} for row in gran_rows(6)]
    data = GranDataset(datasets.Dataset.from_list(rows, features=FEATURES), fault_budget=1)
    over = GranDataset(datasets.Dataset.from_list(gran_rows(3), features=FEATURES))
    for one in (loader(data, processor, workers=2), loader(over, processor, rank=3, ranks=4)):
        for batch in one:
            assert not batch.samples and batch.packed.image_index.eq(-1).all()
            loss = model(batch.packed).loss
            loss.backward()
            assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
