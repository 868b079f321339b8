"""python -m granvit.eval probe: labels, features and measures against plain loops, and the command."""

import json
import re
from itertools import permutations
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import Siglip2VisionConfig

from granvit.data.loader import GranDataset
from granvit.data.schema import FEATURES
from granvit.eval.__main__ import main
from granvit.eval.probe import features, measures
from granvit.eval.probe.encoders import Pixels, load
from granvit.eval.probe.features import Reduction, fit, read_features
from granvit.eval.probe.labels import Labels, Regions, classes, head_word, numbers, read_regions
from granvit.eval.probe.picture import draw
from granvit.model import VisionEncoder

SKLEARN = json.loads(Path(__file__).with_name("probe_sklearn.json").read_text())


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- labels ----


@pytest.mark.parametrize(
    ("caption", "head"),
    [
        ("A small brown dog with a red ball.", "dog"),
        ("group of people on a beach", "people"),
        ("the back of a chair", "chair"),
        ("a man's hat", "hat"),
        ("woman wearing a white coat", "woman"),
        ("guy left", "guy"),
        ("on the table", "table"),
        ("bus 42", "bus"),
        ("un chien noir", "noir"),  # the rule is English
        ("of the", None),
        ("!?", None),
    ],
)
def test_head_words(caption, head):
    assert head_word(caption) == head


def regions_of(*captions):
    """(source, caption) of each, an image each."""
    sources, texts = zip(*captions, strict=True)
    return Regions(np.arange(len(texts)), np.zeros((len(texts), 4), np.float32), list(texts), list(sources))


def test_labels_are_attributes_names_of_classes_or_head_words():
    free = [f"a {colour} cat" for colour in ("red", "big", "old")] + ["two cats", "a glass", "reading glasses"]
    train = regions_of(*[("coco", "Traffic light")] * 5, *[("coco", "dog")] * 5, *(("vg", text) for text in free))
    labels = Labels.of(train)
    assert labels.names == {"coco"}
    assert labels.targets(train) == {
        "word": ["traffic light"] * 5 + ["dog"] * 5 + ["cat"] * 4 + ["glass", "glasses"]
    }
    assert labels.label("large striped red ball on the left", "scenes") == {
        "colour": "red", "pattern": "striped", "kind": "ball"
    }  # fmt: skip
    assert labels.label("a red or blue ball with dots", "scenes-heldout") == {"pattern": "dotted", "kind": "ball"}
    assert labels.label("of the", "vg") == {}


def test_classes_are_the_frequent_labels():
    own = ["b"] * 3 + ["a"] * 3 + ["c"] * 4 + ["d"] + [None] * 9
    assert list(classes(own, 3).items()) == [("c", 4), ("a", 3), ("b", 3)]
    assert numbers(["a", "d", None, "c"], classes(own, 3)).tolist() == [1, -1, -1, 0]


# ---- measures ----


@pytest.mark.parametrize("penalty", SKLEARN["fitted"])
def test_the_linear_probe_is_scikit_learn_s(penalty):
    x = torch.tensor(SKLEARN["points"], dtype=torch.float64)
    y = torch.tensor(SKLEARN["labels"])
    weights = measures.fit_linear(x, y, 3, float(penalty))
    fitted = measures.scores(weights, x).softmax(1)
    torch.testing.assert_close(fitted, torch.tensor(SKLEARN["fitted"][penalty], dtype=torch.float64), rtol=0, atol=1e-3)
    again = measures.fit_linear(x, y, 3, float(penalty))
    assert torch.equal(again, weights)


def test_the_linear_probe_tells_apart_what_a_line_does_and_chooses_its_penalty():
    centres = torch.eye(4)[:3] * 6
    y = torch.arange(90) % 3
    x = centres[y] + drawn(90, 4)
    weights, penalty = measures.linear_probe(x, y, np.arange(90) // 3, 3)
    assert measures.is_among(measures.scores(weights, x), y, 1).all() and penalty in measures.PENALTIES
    # Two informative dimensions of 60: held-out images want a stronger penalty than the training ones.
    noisy = torch.cat([0.5 * x[:, :2], drawn(90, 58, seed=1)], 1)
    _, strong = measures.linear_probe(noisy, y, np.arange(90) // 3, 3)
    assert strong > min(measures.PENALTIES)
    # One image: nothing to hold out.
    assert measures.linear_probe(x, y, np.zeros(90), 3)[1] == measures.PENALTIES[0]


def test_nearest_neighbours_are_a_double_loop(monkeypatch):
    monkeypatch.setattr(measures, "_BLOCK", 7)
    queries, x, y = drawn(20, 6), drawn(40, 6, seed=1), torch.arange(40) % 7
    votes = measures.knn_scores(queries, x, y, 7)
    for i in range(20):
        cosines = [float(torch.cosine_similarity(queries[i], x[j], 0)) for j in range(40)]
        expected = [0.0] * 7
        for j in sorted(range(40), key=lambda j: -cosines[j])[:20]:
            expected[int(y[j])] += np.exp(cosines[j] / 0.07)
        np.testing.assert_allclose(votes[i].numpy(), expected, rtol=1e-4)
    few = measures.knn_scores(queries, x[:3], y[:3], 7)
    assert (few[:, :3] > 0).all() and not few[:, 3:].any()


def test_a_tie_counts_against_the_true_class():
    scored = torch.tensor([[1.0, 1, 0], [2, 1, 0], [0, 0, 0]])
    truth = torch.tensor([0, 0, 2])
    assert measures.is_among(scored, truth, 1).tolist() == [False, True, False]
    assert measures.is_among(scored, truth, 2).tolist() == [True, True, False]


def test_retrieval_is_a_double_loop(monkeypatch):
    monkeypatch.setattr(measures, "_BLOCK", 7)
    x, y, images = drawn(30, 5), torch.tensor([9] + [i % 4 for i in range(29)]), np.arange(30) // 3
    got = measures.retrieval(x, y, images)
    for i in range(30):
        there = [j for j in range(30) if images[j] != images[i]]
        there.sort(key=lambda j: -float(torch.cosine_similarity(x[i], x[j], 0)))
        relevant = [int(y[j] == y[i]) for j in there]
        if not any(relevant):
            assert all(np.isnan(values[i]) for values in got.values())
            continue
        precisions = [np.mean(relevant[: k + 1]) for k in range(len(there)) if relevant[k]]
        expected = {"r1": relevant[0], "r5": max(relevant[:5]), "map": np.mean(precisions)}
        assert {name: values[i] for name, values in got.items()} == pytest.approx(expected)
    assert np.isnan(got["map"][0])


def test_random_retrieval_is_the_mean_over_all_orders():
    y, images = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 2, 0, 3, 4])
    means = {"r1": [], "r5": [], "map": []}
    for i in range(6):
        there = [j for j in range(6) if images[j] != images[i]]
        orders = [[int(y[j] == y[i]) for j in order] for order in permutations(there)]
        if any(orders[0]):
            means["r1"].append(np.mean([order[0] for order in orders]))
            means["r5"].append(np.mean([max(order[:5]) for order in orders]))
            precisions = [[np.mean(o[: k + 1]) for k in range(len(o)) if o[k]] for o in orders]
            means["map"].append(np.mean([np.mean(p) for p in precisions]))
    expected = {name: float(np.mean(values)) for name, values in means.items()}
    assert measures.random_retrieval(y, images) == pytest.approx(expected)


# ---- features ----


def test_reductions_standardise_and_keep_the_principal_components():
    x = torch.cat([drawn(40, 9) @ drawn(9, 9, seed=1) + 3, torch.full((40, 1), 7.0)], 1)
    standard = Reduction.of(x)(x)
    torch.testing.assert_close(standard[:, :9].std(0, unbiased=False), torch.ones(9))
    assert standard.mean(0).abs().max() < 1e-5 and not standard[:, 9].any(), "what does not vary is zero"
    reduction = Reduction.of(x, 4)
    u, s, _ = torch.linalg.svd(standard.double(), full_matrices=False)
    expected = u[:, :4] * s[:4]
    torch.testing.assert_close((reduction(x) @ reduction(x).T).double(), expected @ expected.T, rtol=1e-3, atol=1e-2)
    assert reduction.kept == pytest.approx(float((s[:4] ** 2).sum() / (s**2).sum()), abs=1e-4)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    torch.manual_seed(3)  # random: draws with seed 0
    config = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_patches=16, patch_size=8
    )
    folder = tmp_path_factory.mktemp("encoder")
    VisionEncoder(config).save_siglip2(folder, max_num_patches=25)
    return folder


def test_features_do_not_depend_on_the_batch(encoder_folder, sample_set, monkeypatch):
    data = GranDataset(sample_set, "test")
    regions = read_regions(data, None)
    assert regions.ocr > 0 and (np.diff(regions.rows) >= 0).all()
    for encoder in (load(str(encoder_folder)), Pixels()):
        reductions = fit(encoder, data, regions)
        together, read = read_features(encoder, data, regions, reductions)
        assert read.all()
        with monkeypatch.context() as patch:
            patch.setattr(features, "PATCHES", 1)
            singly, _ = read_features(encoder, data, regions, reductions)
        for name, values in together.items():
            assert len(values) == len(regions) and values.isfinite().all()
            torch.testing.assert_close(singly[name], values, rtol=0, atol=1e-5 * float(values.abs().max()))


def test_pixels_are_the_region_s_colours():
    image = torch.zeros(20, 40, 3, dtype=torch.uint8)
    image[:, 20:] = torch.tensor([255, 0, 51], dtype=torch.uint8)
    boxes, index = torch.tensor([[0.5, 0, 1, 1], [0, 0, 0.5, 0.5], [0, 0, 1, 1]]), torch.tensor([0, 0, 0])
    made = Pixels()([image], boxes, index)
    torch.testing.assert_close(made["1x1"][:2], torch.tensor([[1, 0, 0.2], [0, 0, 0]]))
    assert made["1x1"][2].tolist() == pytest.approx([0.5, 0, 0.1], abs=0.01)
    cells = made["7x7"].view(3, 7, 7, 3)
    assert cells[2, :, 0].max() == 0 and cells[2, :, 6, 0].min() == 1


# ---- the command ----


def test_a_table_a_file_and_a_picture(encoder_folder, sample_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out, picture = tmp_path / "probe.json", tmp_path / "probe.png"
    words = ["probe", f"ours $x_[bold]={encoder_folder}", f"random:{encoder_folder}", "--data", str(sample_set)]
    words += ["--json", str(out), "--picture", str(picture), "--device", "cpu"]
    assert main(words) == 0
    shown, result = capsys.readouterr().out, json.loads(out.read_text())
    assert max(map(len, shown.splitlines())) <= 80
    assert picture.stat().st_size > 10_000
    names = ["pixels", "ours $x_[bold]", f"random:{encoder_folder}"]
    assert main(words) == 0
    again = json.loads(out.read_text())
    assert [encoder["name"] for encoder in again["encoders"]] == names
    assert set(result["targets"]) == {"colour", "pattern", "kind"}
    for row, same in zip(result["rows"], again["rows"], strict=True):
        assert row["metrics"] == same["metrics"], "the same result twice"
        expected = {"linear_top1", "knn_top1", "retrieval_r1", "retrieval_r5", "retrieval_map"}
        if len(result["targets"][row["target"]]["classes"]) > 5:
            expected |= {"linear_top5", "knn_top5"}
        assert {name for name in row["metrics"] if "/" not in name} == expected
        assert "scenes/knn_top1" in row["metrics"] and "pages/knn_top1" not in row["metrics"]
        for name, (low, high) in row["intervals"].items():
            assert 0 <= low <= row["metrics"][name] <= high <= 1
        assert re.search(rf"{row['grid']} .*{100 * row['metrics']['linear_top1']:.1f} ±", shown)
    for name, target in result["targets"].items():
        named = target["classes"]
        assert min(named.values()) >= 20 and f"{name}: {len(named)} classes ({next(iter(named))}" in shown
        assert result["chance"][name]["linear_top1"] == result["chance"][name]["knn_top1"]
    assert [row["metrics"] for row in result["rows"] if row["encoder"].startswith("random")] != [
        row["metrics"] for row in result["rows"] if row["encoder"].startswith("ours")
    ]
    colours = {row["grid"]: row["metrics"] for row in result["rows"][:2] if row["target"] == "colour"}
    assert colours["1x1"]["linear_top1"] > 2 * result["chance"]["colour"]["linear_top1"], "a colour shows in pixels"
    assert result["counts"]["train"]["text_left_out"] > 0


def with_a_broken_picture(folder, path):
    """A copy of a dataset, whose first row of scenes with regions in each split has a picture that is none."""
    splits = {}
    for name, rows in datasets.load_from_disk(folder).items():
        rows = rows.cast_column("image", datasets.Image(decode=False)).to_list()
        broken = next(row for row in rows if row["source"] == "scenes")
        broken["image"] = {"bytes": b"no picture", "path": None}
        splits[name] = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in FEATURES}, FEATURES)
    datasets.DatasetDict(splits).save_to_disk(path)
    return path


def test_pictures_that_cannot_be_read_are_counted_and_left_out(encoder_folder, sample_set, tmp_path, capsys):
    data = with_a_broken_picture(sample_set, tmp_path / "data")
    words = ["probe", str(encoder_folder), "--data", str(data), "--device", "cpu"]
    assert main([*words, "--json", str(tmp_path / "probe.json")]) == 0
    result = json.loads((tmp_path / "probe.json").read_text())
    assert all(result["counts"][split]["unreadable_left_out"] > 0 for split in ("train", "test"))
    assert "left out of test: 1 of" in capsys.readouterr().out
    assert main([*words, "--fault-budget", "0"]) == 1
    assert "the fault budget allows 0" in capsys.readouterr().err
    region = {"row": 0, "box": [0, 0, 1, 1], "labels": {}}
    result["nearest"]["queries"] = [region | {"row": GranDataset(data, "test").rows["source"].index("scenes")}]
    with pytest.raises(ValueError, match="can't be read any more"):
        draw(result, GranDataset(data, "test"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "{tmp}/nowhere"}, "no model and no encoder at {tmp}/nowhere"),
        ({"encoder": "{tmp}"}, "{tmp} is of model type None, accepted are siglip2"),
        ({"encoder": "{tmp}/checkpoint"}, "is a checkpoint of a run: `granvit export"),
        ({"encoder": "pixels={encoder}"}, "two encoders are called 'pixels'; write NAME=ENCODER"),
        ({"--split": "dev"}, "split must be one of ['test', 'train']"),
        ({"--data": "{tmp}/bare"}, "split must be one of ['test']"),
        ({"--data": "{tmp}/nowhere"}, "no dataset at {tmp}/nowhere"),
        ({"--min-regions": "99999"}, "too few classes in"),
        ({"--device": "foo"}, "device: got 'foo'"),
    ],
)
def test_what_cannot_be_used_is_one_line(change, message, encoder_folder, sample_set, tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "manifest.json").write_text("{}")
    if "bare" in str(change):
        datasets.DatasetDict({"test": datasets.load_from_disk(sample_set)["test"]}).save_to_disk(tmp_path / "bare")
    options = {"encoder": str(encoder_folder), "--data": str(sample_set), "--device": "cpu"} | change
    named = {"tmp": tmp_path, "encoder": encoder_folder}
    options = {key: value.format(**named) for key, value in options.items()}
    code = main(["probe", options.pop("encoder"), *(part for item in options.items() for part in item)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("granvit eval probe: error: ") and message.format(**named) in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--picture", "picture.txt"], "it takes a name that ends in .png"),
        (["--json", "/none/probe.json"], "there is no such folder"),
    ],
)
def test_usage_errors(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["probe", "encoder", "--data", "data", *options])
    assert message in capsys.readouterr().err
