"""README and docs tell the truth: examples run and are judged by their answers, commands and links exist."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Siglip2VisionModel

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def block(page: str, section: str, language: str) -> str:
    """The code of one language under a heading."""
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    (code,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return code


def run(code: str) -> dict:
    """The names that Python code leaves."""
    names: dict = {}
    exec(compile(code, "example", "exec"), names)
    return names


def test_the_example_of_the_operators_has_the_shapes_of_its_comments():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = run(code)
    shapes = re.findall(r"^(\w+) = .*# \[([\d, ]+)\]", code, re.MULTILINE)
    assert {name for name, _ in shapes} >= {"features", "pooled"}
    for name, shape in shapes:
        assert list(names[name].shape) == [int(n) for n in shape.split(",")], name


BOX, SENTENCE = (0.1, 0.2, 0.6, 0.9), "a striped red ball"  # what README asks


def teach(model, processor, photo: torch.Tensor) -> None:
    """Train the model until it knows by heart what README asks of a picture, and another region of it."""
    from granvit.questions.packing import pack_questions
    from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX
    from granvit.questions.schema import Region, Sample

    regions = (Region(BOX, SENTENCE, "natural"), Region((0.6, 0.0, 1.0, 0.3), "a plain blue box", "natural"))
    sample = Sample("photo", photo, None, regions, "test", "")
    batch = pack_questions([sample], [processor.questions(sample, (BBOX2CAPTION, CAPTION2BBOX))], processor, 1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        features, layout = model.encode(batch.images)
        regions = model.region_embeds(features, layout, batch.boxes, batch.box_image_index)
        model.answer_losses(batch, model.image_embeds(features, layout), regions).mean().backward()
        optimizer.step()


def test_the_example_of_the_model_answers_what_the_model_was_taught(tiny, tmp_path, monkeypatch, capsys):
    """In the form of the smoke preset: a box is asked about by region tokens, and answered by location tokens."""
    from granvit.eval.metrics import box_iou
    from granvit.questions.pictures import decode_image

    Image.effect_noise((64, 48), 80).convert("RGB").save(tmp_path / "photo.jpg")
    photo = torch.from_numpy(np.array(decode_image((tmp_path / "photo.jpg").read_bytes())))
    model, processor = tiny(box_style="tokens", box_format="bins")
    teach(model, processor, photo)
    export = tmp_path / "runs" / "quick" / "export"
    model.save_pretrained(export)
    processor.save_pretrained(export)
    model.encoder.save_siglip2(export / "encoder")
    monkeypatch.chdir(tmp_path)

    code = block(README, "Use the model", "python")
    assert str(BOX) in code and f'"{SENTENCE}"' in code
    assert len(code.splitlines()) <= 15
    names = run(code)
    captions, boxes = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    assert captions == [SENTENCE]
    assert box_iou(boxes[0], [BOX])[0] > 0.7
    layout, grid = names["layout"], names["grid"]
    assert grid.shape == (*layout.host_grids[0], model.config.vision_config.hidden_size)
    assert torch.equal(grid.flatten(0, 1), names["features"])
    assert isinstance(names["encoder"], Siglip2VisionModel)
    assert names["encoder"].config.hidden_size == grid.shape[-1]


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A folder in which README's lines and its command to convert them were used as they are printed."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "photos").mkdir()
    for name in ("1.jpg", "2.jpg"):
        Image.effect_noise((64, 48), 80).save(folder / "photos" / name)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(block(README, "Your own data", "json"))
    command = block(README, "Your own data", "bash").splitlines()[0].replace("python", sys.executable)
    subprocess.run(["bash", "-euc", command], cwd=folder, check=True, capture_output=True)
    return folder


def test_the_lines_of_your_own_data_convert_as_they_are_printed(converted):
    files = {split: str(converted / "mydata" / f"{split}-*.parquet") for split in ("train", "test")}
    rows = datasets.load_dataset("parquet", data_files=files)
    for split in ("train", "test"):
        assert [row["regions"][0]["caption"] for row in rows[split]] == ["a red kite", "OPEN"]
        assert [row["caption"] for row in rows[split]] == [None, "a shop"]


def test_a_run_trains_on_the_converted_lines(converted, small_config, monkeypatch):
    from granvit.train.__main__ import parse
    from granvit.train.run import train

    monkeypatch.chdir(converted)
    words = block(README, "Your own data", "bash").splitlines()[1].split()
    assert words[:3] == ["python", "-m", "granvit.train"]
    asked = parse(words[3:])
    data = dataclasses.replace(small_config.data, path=asked.data.path, eval_images=2)
    train(dataclasses.replace(small_config, data=data, output=asked.output))
    assert (converted / "runs" / "mine" / "report" / "index.html").is_file()


def headings(page: Path) -> set[str]:
    """The anchors that a repository viewer gives a page's headings, and the site too."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    ("page", "link"),
    [(page, link) for page in PAGES for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text("utf-8"))],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_links_lead_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists()
    assert not anchor or anchor in headings(target)


@pytest.mark.parametrize("page", sorted(page.relative_to(ROOT / "docs") for page in PAGES[2:]), ids=str)
def test_pages_stand_in_the_sites_navigation(page):
    assert re.search(rf"^ +- .*: {re.escape(str(page))}$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


def test_ci_calls_a_command_that_stands_here():
    assert re.search(r"^python -m pytest", README, re.MULTILINE)


@pytest.mark.parametrize(
    "target", sorted({name for page in PAGES for name in re.findall(r"`make ([\w-]+)`", page.read_text("utf-8"))})
)
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150


def test_the_tables_are_those_of_the_result_files():
    """What stands between the markers is what bench/readme.py writes there."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import readme
    finally:
        sys.path.remove(str(ROOT / "bench"))
    for file, tables in readme.FILES.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        for name, table in tables.items():
            written = text.split(readme.BEGIN.format(name))[1].split(readme.END)[0]
            assert written == "\n".join(table()) + "\n\n", f"{file}: {name}; run python bench/readme.py"
