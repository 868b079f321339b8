"""The sample set: reproducible, split by combination and by text, boxes exact, sentences unique."""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from granvit.data.__main__ import main
from granvit.data.loader import GranDataset
from granvit.data.sample import SceneConfig, build, build_sample, cached_sample
from granvit.data.sample.backgrounds import FREE
from granvit.data.sample.build import counts
from granvit.data.sample.fonts import FONTS, font
from granvit.data.sample.pages import INK, draw_page
from granvit.data.sample.photographs import photographs
from granvit.data.sample.scenes import (
    LARGE,
    SMALL,
    combinations,
    draw_scene,
    held_out_pairs,
)
from granvit.data.sample.sprites import COLOURS, KINDS, PATTERNS, sprite

WITH = {
    "with stripes": "striped",
    "with checks": "checked",
    "with dots": "dotted",
    "in halves": "halved",
    "without pattern": "plain",
}


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "set"
    build_sample(path, 400, seed=3, workers=0)
    return path


def every_row(folder):
    stored = datasets.load_from_disk(str(folder))
    return [
        (split, row)
        for split in ("train", "test")
        for row in stored[split].cast_column("image", datasets.Image(decode=False))
    ]


def read(sentence: str) -> dict[str, str]:
    """What a sentence says, read back from its words alone."""
    said = {}
    for phrase, pattern in WITH.items():
        if phrase in sentence:
            said["pattern"] = pattern
            sentence = sentence.replace(phrase, "")
    words = sentence.split()
    for name, values in (("kind", KINDS), ("pattern", PATTERNS), ("colour", tuple(COLOURS))):
        values_said = [word for word in words if word in values]
        if values_said:
            assert name not in said and len(values_said) == 1, sentence
            said[name] = values_said[0]
    said |= {word: word for word in words if word in ("large", "small", "left", "right", "top", "bottom")}
    rest = set(words) - set(said.values()) - {"a", "on", "at", "the"}
    assert not rest, sentence
    return said


def is_true(said: dict[str, str], combination: tuple[str, str, str], box) -> bool:
    side = np.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    facts = {
        "large": side >= LARGE,
        "small": side <= SMALL,
        "left": x < 0.4,
        "right": x > 0.6,
        "top": y < 0.4,
        "bottom": y > 0.6,
    }
    attributes = dict(zip(("pattern", "colour", "kind"), combination, strict=True))
    return all(said[key] == value for key, value in attributes.items() if key in said) and all(
        facts[word] for word in said if word in facts
    )


def test_the_mix_adds_up():
    for images in (16, 17, 100, 1000, 12345):
        made = counts(images, {"train": 25, "test": 11})
        assert sum(sum(sources.values()) for sources in made.values()) == images
        assert all(
            number >= 1
            for sources in made.values()
            for source, number in sources.items()
            if source != "photographs"
        )
    assert counts(4000, {"train": 25, "test": 11}, pages=0.05)["train"]["pages"] == 180
    made = counts(4000, {"train": 25, "test": 11})
    assert made["train"]["photographs"] == 25 and made["test"]["photographs"] == 11
    assert made["train"]["pages"] + made["test"]["pages"] == 800


def test_the_set_is_a_gran_dataset(folder):
    stored = every_row(folder)
    assert len(stored) == 400
    assert len({row["id"] for _, row in stored}) == 400
    sources = {
        split: {row["source"] for other, row in stored if other == split} for split in ("train", "test")
    }
    assert sources["train"] == {"photographs", "scenes", "pages"}
    assert sources["test"] == {"photographs", "scenes", "scenes-heldout", "pages"}
    for split in ("train", "test"):
        data = GranDataset(folder, split, fault_budget=0)
        for index in range(len(data)):
            sample, row = data[index], data.rows[index]
            assert tuple(sample.image.shape) == (row["height"], row["width"], 3)
            assert sample.regions and (sample.caption is None) == (sample.source == "pages")
            assert {region.kind for region in sample.regions} == {"ocr"} or sample.source != "pages"
    pictures = [hash(row["image"]["bytes"]) for _, row in stored]
    assert len(set(pictures)) == 400


def test_equal_arguments_give_equal_rows_whoever_makes_them(folder, tmp_path):
    build_sample(tmp_path / "again", 400, seed=3, workers=2)
    first, again = every_row(folder), every_row(tmp_path / "again")
    assert str(first) == str(again)
    # By which a run that goes on knows its data, though the set was drawn anew.
    for split in ("train", "test"):
        assert GranDataset(folder, split).fingerprint == GranDataset(tmp_path / "again", split).fingerprint
    build_sample(tmp_path / "other", 40, seed=4, workers=0)
    one = {row["id"]: row["image"]["bytes"] for _, row in first}
    for _, row in every_row(tmp_path / "other"):
        assert (one[row["id"]] == row["image"]["bytes"]) == (row["source"] == "photographs")


def test_held_out_combinations_are_never_in_train(folder):
    config = SceneConfig()
    pairs = set(held_out_pairs(config))
    assert len(pairs) == 8
    seen, held = combinations(config, False), combinations(config, True)
    assert len(seen) + len(held) == config.kinds * config.patterns * config.colours
    for values, place in ((PATTERNS[: config.patterns], 0), (COLOURS, 1), (KINDS[: config.kinds], 2)):
        assert {one[place] for one in seen} == set(values)
    counts = {"seen": 0, "held": 0}
    for split, row in every_row(folder):
        if not row["source"].startswith("scenes"):
            continue
        for region in row["regions"]:
            said = read(region["caption"])
            is_held = bool({(said["kind"], said["colour"]), (said["pattern"], said["colour"])} & pairs)
            assert is_held == (row["source"] == "scenes-heldout")
            assert split == "test" or not is_held
            counts["held" if is_held else "seen"] += 1
    assert min(counts.values()) >= 30


def test_no_text_of_test_is_in_train(folder):
    texts = {"train": set(), "test": set()}
    for split, row in every_row(folder):
        if row["source"] == "pages":
            texts[split] |= {" ".join(region["caption"].casefold().split()) for region in row["regions"]}
    assert len(texts["train"]) > 200 and len(texts["test"]) > 20
    assert not texts["train"] & texts["test"]


@pytest.mark.parametrize("held_out", [False, True])
def test_each_sentence_is_true_of_its_object_only(held_out):
    twins = qualified = 0
    for seed in range(400):
        scene = draw_scene(SceneConfig(long_side=96), "train", held_out, rng(7, seed))
        assert 2 <= len(scene.things) <= 8
        for index, sentence in enumerate(scene.sentences):
            said = read(sentence)
            assert {"kind", "pattern", "colour"} <= set(said)
            true = [is_true(said, thing.combination, thing.box) for thing in scene.things]
            assert true == [other == index for other in range(len(scene.things))], (sentence, scene.things)
        assert len(set(scene.sentences)) == len(scene.sentences)
        for a, b in itertools.combinations(scene.things, 2):
            same = sum(x == y for x, y in zip(a.combination, b.combination, strict=True))
            twins += same >= 2
            qualified += same == 3
    assert twins > 100 and qualified > 40


def test_scene_boxes_are_those_of_the_visible_pixels():
    for seed in range(60):
        scene = draw_scene(SceneConfig(), "train", False, rng(8, seed))
        height, width = scene.owner.shape
        assert scene.image.size == (width, height)
        for index, thing in enumerate(scene.things):
            rows, columns = np.nonzero(scene.owner == index)
            tight = (
                columns.min() / width,
                rows.min() / height,
                (columns.max() + 1) / width,
                (rows.max() + 1) / height,
            )
            assert thing.box == pytest.approx(tight, abs=1e-9)
            # What owner says is what the picture shows: the object's tones are where its pixels are.
            pixels = np.asarray(scene.image).astype(int)[rows, columns]
            tones = np.array([*COLOURS[thing.colour], (20, 20, 28)])
            off = np.abs(pixels[:, None] - tones[None]).max(axis=2).min(axis=1)
            assert np.mean(off <= 60) > 0.6, (seed, thing)


def test_objects_fill_their_boxes_and_differ():
    drawn = {}
    for kind, pattern, colour in itertools.product(KINDS, PATTERNS, COLOURS):
        picture, mask = sprite(kind, pattern, colour, 24, 24, rng(0))
        box = Image.eval(mask, lambda value: 255 * (value >= 128)).getbbox()
        assert np.abs(np.subtract(box, (0, 0, 24, 24))).max() <= 2, kind  # tips are thinner than a pixel
        drawn[kind, pattern, colour] = np.asarray(picture).astype(int) * (np.asarray(mask)[..., None] >= 128)
    for a, b in itertools.combinations(drawn, 2):
        assert np.abs(drawn[a] - drawn[b]).mean() > 4, (a, b)


def test_the_most_frequent_wording_and_many_others():
    sentences = []
    for seed in range(200):
        scene = draw_scene(SceneConfig(long_side=64), "train", False, rng(9, seed))
        sentences += [
            (thing, sentence) for thing, sentence in zip(scene.things, scene.sentences, strict=True)
        ]
    fixed = [sentence.startswith(" ".join(thing.combination)) for thing, sentence in sentences]
    assert 0.65 < np.mean(fixed) < 0.9
    forms = {
        sentence.replace(thing.kind, "K").replace(thing.colour, "C").replace(thing.pattern, "P")
        for thing, sentence in sentences
    }
    assert {"P C K", "C P K", "large P C K", "P C K on the left", "a C K with dots"} <= forms


def test_page_boxes_are_those_of_the_ink():
    angles = 0
    for seed in range(40):
        page = draw_page("train", rng(10, seed))
        height, width = page.owner.shape
        assert page.image.size == (width, height) and page.lines
        for index, line in enumerate(page.lines):
            rows, columns = np.nonzero(page.owner == index)
            tight = (
                columns.min() / width,
                rows.min() / height,
                (columns.max() + 1) / width,
                (rows.max() + 1) / height,
            )
            assert line.box == pytest.approx(tight, abs=1e-9)
        assert len({line.text for line in page.lines}) == len(page.lines)
        # The picture is dark or light where the owner says that ink is, against what surrounds it.
        grey = np.asarray(page.image.convert("L")).astype(float)
        ink = grey[page.owner >= 0].mean()
        assert abs(ink - np.median(grey)) > 40
        angles += INK > 0
    assert angles == 40


def test_fonts_draw_every_character():
    everything = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"
    for package, name in FONTS:
        face = font(package, name, 20)
        shapes = {bytes(face.getmask(character)) for character in everything + "\uffff"}
        # Small capitals share shapes with capitals; a missing glyph looks like that of no character.
        missing = bytes(face.getmask("\uffff"))
        assert not [character for character in everything if bytes(face.getmask(character)) == missing], name
        assert len(shapes) > 36, name


def test_backgrounds_need_no_name_beside_them():
    assert {row["licence"] for row in photographs("train")} - set(FREE), "else the filter has nothing to do"
    for split in ("train", "test"):
        assert sum(row["licence"] in FREE for row in photographs(split)) >= 5


def test_the_cache_builds_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GRANVIT_CACHE", str(tmp_path))
    first = cached_sample(16, seed=1, workers=0)
    monkeypatch.setattr(build, "build_sample", lambda *args: pytest.fail("built again"))
    assert cached_sample(16, seed=1, workers=0) == first and first.parent == tmp_path
    monkeypatch.undo()
    monkeypatch.setenv("GRANVIT_CACHE", str(tmp_path))
    assert cached_sample(16, seed=1, workers=0, scenes=SceneConfig(kinds=4)) != first
    assert cached_sample(16, seed=1, workers=0, pages=0.5) != first
    with pytest.raises(ValueError, match="pages must be a share of 2 pictures at least and .8 at most, got 0.05 of 16"):
        cached_sample(16, workers=0, pages=0.05)
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRANVIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="/file can't be the cache .*set GRANVIT_CACHE to"):
        cached_sample(16, workers=0)


BUILDING = """
import signal, sys
from granvit.data.sample import build_sample

def asked(*_):
    raise SystemExit(75)

signal.signal(signal.SIGTERM, asked)
build_sample(sys.argv[1], 100_000, workers=2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc, and sigtimedwait")
@pytest.mark.parametrize(("name", "everybody", "code"), [("TERM", True, 75), ("TERM", False, 75), ("KILL", False, -9)])
def test_nobody_is_left_when_the_process_that_builds_it_is_ended(tmp_path, name, everybody, code):
    """With a handler of its own, as a run has, which forked processes inherit; the signal comes to all as torchrun,
    schedulers and `timeout` send it, or to the one."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", BUILDING, str(tmp_path / "set")]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait_until(lambda: any(path.stat().st_size for path in tmp_path.rglob("*.arrow")))
        if everybody:  # one that obeyed in the middle of handing something over would leave the others waiting
            for child in map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
                os.kill(child, signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(3)
        (os.killpg if everybody else os.kill)(process.pid, signal.Signals[f"SIG{name}"])
        assert process.wait(60) == code
        wait_until(lambda: not alive(process.pid))
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(there, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"kinds": 0}, "kinds must be in 1.."),
        ({"patterns": 99}, "patterns must be in 1.."),
        ({"colours": 7}, "colours must be in 1..6, got 7"),
        ({"objects": (1, 4)}, "objects must be"),
        ({"size": (0.5, 0.2)}, "size must be"),
        ({"long_side": 8}, "long_side must be"),
        ({"kinds": 1, "patterns": 1, "colours": 1}, "leaves no combination to train"),
    ],
)
def test_knobs_out_of_range(knobs, message):
    with pytest.raises(ValueError, match=message):
        SceneConfig(**knobs)


def test_command_line(tmp_path, capsys):
    assert (
        main(["sample", "--images", "20", "--output", str(tmp_path / "a"), "--seed", "5", "--workers", "1"])
        == 0
    )
    stored = every_row(tmp_path / "a")
    assert len(stored) == 20
    assert Image.open(io.BytesIO(stored[0][1]["image"]["bytes"])).size == (
        stored[0][1]["width"],
        stored[0][1]["height"],
    )
    assert main(["sample", "--images", "20", "--output", str(tmp_path / "a")]) == 2
    assert "new or an empty folder" in capsys.readouterr().err
    assert main(["sample", "--images", "3", "--output", str(tmp_path / "b")]) == 2
    assert "images must be >= 16" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
