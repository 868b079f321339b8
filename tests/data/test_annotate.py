"""Bare pictures in, regions out: recogniser, detector and captioner, and plug-ins in their place."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from granvit.data.__main__ import main
from granvit.data.annotate import COLUMNS, Annotator, Detection, Line, TransformersCaptioner, TransformersDetector
from granvit.data.annotate.annotator import NoModel
from granvit.data.annotate.source import Annotate
from granvit.data.build import build_dataset
from granvit.data.loader import GranDataset

HERE = "granvit_test_plugins"
PLUGINS = '''
import hashlib, time
from granvit.data.annotate import Detection, Line

class Reader:
    """Reads a picture's first pixel."""
    def __call__(self, images):
        time.sleep(0.02 * len(images))
        return [[Line((1, 1, 9, 9), "pixel %d %d %d" % image.getpixel((0, 0)), 0.9)] for image in images]

class Fussy:
    """Raises for what is wide."""
    def __call__(self, images):
        if any(image.width > 50 for image in images):
            raise RuntimeError("too wide")
        return [[Detection((0, 0, 30, 30), "thing", 0.8), Detection((0, 0, 30, 30), "faint", 0.2)] for _ in images]

class Sizes:
    def __call__(self, images):
        return ["%d x %d" % image.size for image in images]
'''


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    (tmp_path / f"{HERE}.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop(HERE, None)


def pictures(folder: Path, number: int, size=(40, 32)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        Image.new("RGB", size, (i % 256, i // 256, 7)).save(folder / f"{i:04}.png")
    return folder


def build(source, output, **options):
    return build_dataset(source, output, workers=0, shard_rows=8, **options)


def read(output) -> list:
    data = GranDataset(output)
    return [data[i] for i in range(len(data))]


def test_a_folder_with_plug_ins(plugins, tmp_path, caplog):
    folder = pictures(tmp_path / "in", 20)
    Image.new("RGB", (60, 32)).save(folder / "wide.jpg")
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    os.symlink("/etc/hostname", folder / "link.jpg")
    own = {"ocr": f"{HERE}:Reader", "detector": f"{HERE}:Fussy", "captioner": f"{HERE}:Sizes", "captions": True}
    summary = build(Annotate(str(folder), **own, licence="mine"), tmp_path / "out", fault_budget=0.5)
    assert (summary.read, summary.kept, summary.faulty) == (23, 21, 3)
    assert summary.dropped == {"object under the least score": 20}
    rows = read(tmp_path / "out")
    first, wide = rows[0], rows[-1]
    assert (first.id, first.caption, first.licence) == ("0000.png", "40 x 32", "mine")
    assert [(r.kind, r.caption) for r in first.regions] == [("ocr", "pixel 0 0 7"), ("natural", "30 x 30")]
    assert first.regions[1].box == pytest.approx((0, 0, 30 / 40, 30 / 32))
    assert first.regions[1].score == pytest.approx(0.8)
    assert [r.kind for r in wide.regions] == ["ocr"]
    for message in ("wide.jpg: Fussy: RuntimeError: too wide", "link.jpg", "broken.png"):
        assert message in caplog.text


def test_rows_of_a_dataset_keep_what_they_have(plugins, tmp_path):
    folder = pictures(tmp_path / "in", 3)
    build(Annotate(str(folder), ocr=f"{HERE}:Reader"), tmp_path / "read")
    source = Annotate(str(tmp_path / "read"), detector=f"{HERE}:Fussy", captioner=f"{HERE}:Sizes", captions=True)
    build(source, tmp_path / "both")
    for row in read(tmp_path / "both"):
        assert [r.kind for r in row.regions] == ["ocr", "natural"] and row.caption == "40 x 32"
    bare = datasets.Dataset.from_dict({"image": [str(p) for p in sorted(folder.iterdir())]})
    bare = bare.cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": bare}).save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="from_split must be one of .'test'."):
        build(Annotate(str(tmp_path / "bare"), ocr=f"{HERE}:Reader"), tmp_path / "out")
    build(Annotate(str(tmp_path / "bare"), ocr=f"{HERE}:Reader", from_split="test"), tmp_path / "out")
    assert [row.id for row in read(tmp_path / "out")] == ["0", "1", "2"]


def test_a_row_that_names_a_file_of_the_machine(plugins, tmp_path, caplog):
    secret = pictures(tmp_path / "secret", 1) / "0000.png"
    rows = [{"image": {"bytes": secret.read_bytes(), "path": None}}, {"image": {"bytes": None, "path": str(secret)}}]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "in" / "a.parquet"))
    summary = build(Annotate(str(tmp_path / "in"), ocr=f"{HERE}:Reader"), tmp_path / "out")
    assert (summary.kept, summary.faulty) == (1, 1)
    assert "must hold its picture's bytes" in caplog.text


def test_nothing_found_is_a_rule_and_nothing_at_all_an_error(plugins, tmp_path):
    folder = pictures(tmp_path / "in", 3)
    source = Annotate(str(folder), detector=f"{HERE}:Fussy", detector_score=0.9)
    with pytest.raises(ValueError, match="no usable image"):
        build(source, tmp_path / "none")
    pictures(folder, 1, (12, 12))  # smaller than an object has to be
    summary = build(Annotate(str(folder), detector=f"{HERE}:Fussy"), tmp_path / "out")
    assert summary.kept == 2
    assert summary.dropped["image in which nothing was found"] == summary.dropped["object of less than 16 pixels"] == 1


class Nonsense:
    def __init__(self, *answers):
        self.answers = answers

    def __call__(self, images):
        return [self.answers[i % len(self.answers)] for i in range(len(images))]


def test_what_a_model_says_is_checked():
    image = Image.new("RGB", (100, 50))
    far, nan = (-50.0, -50.0, 500.0, 20.0), (float("nan"), 0, 10, 10)
    lines = [Line(far, " two\n words ", 0.9), Line(nan, "x", 0.9), Line((0, 0, 5, 5), " ", 0.9), Line(far, "x", 0.1)]
    row = Annotator(ocr=Nonsense(lines))({"image": [image, b"no picture"]})
    [region] = row["regions"][0]
    assert region["caption"] == "two words" and region["box"] == [0, 0, 1, 0.4]
    assert [line.partition(":")[0] for line in row["faults"][0].split("\n")] == ["box", "region_caption"]
    assert row["dropped"][0] == "line under the least score"
    assert (row["width"], row["height"]) == ([100, 0], [50, 0]) and row["faults"][1].startswith("image: ")
    objects = [Detection(nan, "a", 0.9), Detection((0, 0, 40, 40), "b", 0.9)]
    row = Annotator(detector=Nonsense(objects), captioner=Nonsense(""))({"image": [image]})
    assert row["regions"] == [[]]
    assert row["dropped"] == ["object of less than 16 pixels\nobject without a sentence"]
    with pytest.raises(ValueError, match="<lambda>|function returned 0 results for 1 images"):
        Annotator(ocr=lambda images: [])({"image": [image]})


@pytest.mark.parametrize(
    "models",
    [
        {"ocr": Nonsense([Line((0, 0, 9, 9), None, 0.9)])},
        {"ocr": Nonsense([Line((0, 0, 9), "x", 0.9)])},
        {"ocr": Nonsense(["x"])},
        {"detector": Nonsense([Detection((0, 0, 40, 40), 7, 0.9)])},
        {"detector": Nonsense([Detection((0, 0, 40, 40), "a", 0.9)]), "captioner": Nonsense(None)},
        {"describer": Nonsense(None)},
    ],
)
def test_what_is_no_result_is_the_pictures_fault(models):
    row = Annotator(**models)({"image": [Image.new("RGB", (100, 50))]})
    assert row["regions"] == [[]] and row["faults"][0].startswith("model: Nonsense: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "nothing to do"),
        ({"ocr": "rapidocr", "captioner": "x"}, "needs a --detector"),
        ({"ocr": "rapidocr", "captions": True}, "needs a --captioner"),
        ({"ocr": "tesseract"}, "'tesseract' can't be loaded"),
        ({"ocr": "no.such.module:Class"}, "can't be loaded: ModuleNotFoundError: No module named"),
        ({"detector": "json:NoClass"}, "has no attribute 'NoClass'"),
        ({"ocr": "datetime:date"}, "can't be loaded: TypeError"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, flags, message):
    pictures(tmp_path / "in", 1)
    with pytest.raises(ValueError, match=message):
        build(Annotate(str(tmp_path / "in"), **flags), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_ends_the_run(tmp_path):
    pictures(tmp_path / "in", 3)
    with pytest.raises(NoModel, match="can't be loaded by AutoImageProcessor"):
        build(Annotate(str(tmp_path / "in"), detector=str(tmp_path / "none")), tmp_path / "out")


def test_as_a_function_of_datasets_map(plugins, tmp_path):
    folder = pictures(tmp_path / "in", 6)
    rows = datasets.Dataset.from_dict({"image": [str(p) for p in sorted(folder.iterdir())]})
    rows = rows.cast_column("image", datasets.Image())
    annotator = Annotate("", detector=f"{HERE}:Fussy", captioner=f"{HERE}:Sizes").annotator()
    features = datasets.Features({**rows.features, **COLUMNS})
    annotated = rows.map(annotator, batched=True, batch_size=4, features=features, num_proc=2)
    assert annotated[5]["regions"][0]["caption"] == "30 x 30" and annotated[5]["caption"] is None


def test_killed_again_and_again(plugins, tmp_path):
    """kill -9 at random moments: in the end the same rows as of a run that nobody disturbed."""
    folder = pictures(tmp_path / "in", 120)
    draw, out = random.Random(3), tmp_path / "out"
    command = [sys.executable, "-m", "granvit.data", "annotate", str(folder), "--ocr", f"{HERE}:Reader"]
    command += ["--output", str(out), "--workers", "2", "--shard-rows", "4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    kills = 0
    while kills < 3:
        before = len(list(out.glob(".unfinished/0*.json")))
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and len(list(out.glob(".unfinished/0*.json"))) <= before + 1:
            time.sleep(0.02)
        time.sleep(draw.random() * 0.3)
        if process.poll() is not None:
            break
        # Now its workers with it, now it alone: they see that it is gone.
        (os.killpg if kills else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2
    subprocess.run(command, env=environment, check=True, capture_output=True)
    build(Annotate(str(folder), ocr=f"{HERE}:Reader"), tmp_path / "undisturbed")
    assert read_all(out) == read_all(tmp_path / "undisturbed")
    assert not list(out.glob(".*"))


def test_ctrl_c_is_one_line_and_goes_on(plugins, tmp_path):
    folder, out = pictures(tmp_path / "in", 60), tmp_path / "out"
    command = [sys.executable, "-m", "granvit.data", "annotate", str(folder), "--ocr", f"{HERE}:Reader"]
    command += ["--output", str(out), "--workers", "2", "--shard-rows", "4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in a background don't
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listening
    )
    while process.poll() is None and not list(out.glob(".unfinished/0*.json")):  # the other process may still import
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=120)[1] == "granvit annotate: stopped\n" and process.returncode == 130
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert len(read_all(out)) == 60


def read_all(output) -> list:
    rows = GranDataset(output).rows
    return sorted(json.dumps(rows[i], default=lambda b: b.hex(), sort_keys=True) for i in range(len(rows)))


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """Folders of tiny detectors with random weights: one that takes a mask, one of a fixed size."""
    from transformers import (
        DetrConfig,
        DetrForObjectDetection,
        DetrImageProcessorPil,
        ResNetConfig,
        YolosConfig,
        YolosForObjectDetection,
        YolosImageProcessorPil,
    )

    folder = tmp_path_factory.mktemp("detectors")
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, out_features=["stage4"])
    size = {"shortest_edge": 64, "longest_edge": 96}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        d_model=16, num_queries=5, num_labels=3, **layers, **heads,
    )  # fmt: skip
    DetrForObjectDetection(config).save_pretrained(folder / "detr")
    DetrImageProcessorPil(size=size).save_pretrained(folder / "detr")
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[64, 96],
        patch_size=16, num_detection_tokens=5, num_labels=3,
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder / "yolos")
    YolosImageProcessorPil(size=size).save_pretrained(folder / "yolos")
    return folder


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["detr", "yolos"])
def test_detectors_of_transformers(detectors, name):
    """A picture's objects are the same alone and in a batch of other sizes, and as transformers' pipeline has them."""
    from transformers import pipeline

    images = [noise(100, 80, 1), noise(60, 90, 2), noise(100, 80, 3)]
    detector = TransformersDetector(str(detectors / name), score=0.1)
    detected = detector(images)
    assert all(detected) and {d.label for objects in detected for d in objects} <= {"LABEL_0", "LABEL_1", "LABEL_2"}
    for image, objects in zip(images, detected, strict=True):
        [alone] = detector([image])
        assert [d.box for d in alone] == [pytest.approx(d.box, abs=0.05) for d in objects]
    theirs = pipeline("object-detection", str(detectors / name), device="cpu")(images[1], threshold=0.1)
    whole = [tuple(int(side) for side in d.box) for d in detected[1]]
    assert whole == [tuple(t["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")) for t in theirs]


@pytest.fixture(scope="module")
def captioners(tmp_path_factory):
    """Folders of tiny captioners with random weights: BLIP, and a LLaVA with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("captioners")
    torch.manual_seed(0)
    words = [f"word{i}" for i in range(30)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    special = {"pad_token_id": 0, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    text = {**tiny, "vocab_size": len(tokenizer), **special}
    config = BlipConfig(text_config=text, vision_config={**tiny, "image_size": 32, "patch_size": 16})
    BlipForConditionalGeneration(config).save_pretrained(folder / "blip")
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder / "blip")

    special = ["<pad>", "<unk>", "</s>", "<image>", "USER:", "ASSISTANT:"]
    table = {word: i for i, word in enumerate([*special, *words])}
    plain = Tokenizer(models.WordLevel(table, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        additional_special_tokens=["<image>"], extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tiny, "image_size": 32, "patch_size": 16},
        text_config={"model_type": "llama", **tiny, "vocab_size": len(table), "pad_token_id": 0, "eos_token_id": 2},
        image_token_index=table["<image>"],
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder / "llava")
    template = (
        "{% for m in messages %}USER: {% for c in m.content %}{{ '<image> ' if c.type == 'image' else c.text + ' ' }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        pixels, tokenizer, patch_size=16, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder / "llava")  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["blip", "llava"])
def test_captioners_of_transformers(captioners, name):
    """A batch says what each picture says alone, and none of it is the prompt."""
    images = [noise(50, 40, i) for i in range(3)]
    captioner = TransformersCaptioner(str(captioners / name), "word1 word2", 6)
    said = captioner(images)
    assert len(said) == 3 and all(1 <= len(one.split()) <= 6 for one in said)
    assert [captioner([image])[0] for image in images] == said
    assert not any("USER" in one or "ASSISTANT" in one or "<image>" in one for one in said)


def test_the_command_with_transformers(detectors, captioners, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        noise(100, 80, i).save(folder / f"{i}.png")
    arguments = ["annotate", str(folder), "--detector", str(detectors / "yolos"), "--detector-score", "0.1"]
    arguments += ["--captioner", str(captioners / "blip"), "--captions", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--workers", "0"]) == 0, capsys.readouterr().err
    rows = read(tmp_path / "out")
    assert len(rows) == 3 and all(row.caption and row.regions for row in rows)
    assert main(["annotate", str(folder), "--output", str(tmp_path / "no")]) == 2
    assert "error: nothing to do: give --ocr" in capsys.readouterr().err


def test_ray_where_it_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["annotate", str(pictures(tmp_path / "in", 1)), "--ocr", "rapidocr", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--ray", "auto"]) == 2
    assert "error: --ray takes pip install 'granvit[ray]'" in capsys.readouterr().err
    assert main([*arguments, "--gpus-per-worker", "1"]) == 2
    assert "error: --gpus-per-worker needs --ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def examples() -> list[str]:
    [section] = re.findall(r"^## Annotate your own pictures$(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_documents_own_models(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(examples()[0])
    monkeypatch.syspath_prepend(tmp_path)
    folder = pictures(tmp_path / "in", 2)
    picture = Image.new("RGB", (80, 60), "white")
    picture.paste("red", (20, 10, 60, 40))
    picture.save(folder / "red.png")
    arguments = ["annotate", str(folder), "--detector", "mine:RedThings", "--captioner", "mine:Redness"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--workers", "0"]) == 0
    [row] = read(tmp_path / "out")
    [region] = row.regions
    assert region.caption == "a thing of redness 255"
    assert region.box == pytest.approx((0.25, 1 / 6, 0.75, 2 / 3))


def test_the_documents_map_over_many_processes(tmp_path, monkeypatch):
    pytest.importorskip("rapidocr")
    from granvit.data.sample.fonts import font

    page = Image.new("RGB", (300, 60), "white")
    ImageDraw.Draw(page).text((20, 15), "Ticket 4711", "black", font("matplotlib", "DejaVuSans.ttf", 24))
    (tmp_path / "IMAGES").mkdir()
    for i in range(2):
        page.save(tmp_path / "IMAGES" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(examples()[1], "data.md", "exec"), names)
    for row in names["annotated"]:
        assert " ".join(region["caption"] for region in row["regions"]) == "Ticket 4711"


def test_pictures_in_an_archive(plugins, tmp_path):
    folder = pictures(tmp_path / "in", 2)
    shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path, folder.name)
    build(Annotate(f"zip://in::{tmp_path}/all.zip", ocr=f"{HERE}:Reader"), tmp_path / "out")
    assert [row.id for row in read(tmp_path / "out")] == ["0000.png", "0001.png"]
