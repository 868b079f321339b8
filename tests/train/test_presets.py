import subprocess
import sys
from dataclasses import replace

import pytest

from granvit.train.__main__ import parse
from granvit.train.help import COMMON
from granvit.train.presets import PRESETS, load_config, save_config
from granvit.train.stages import Stage


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_configuration_reads_back_the_same(name, tmp_path):
    save_config(PRESETS[name], tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == PRESETS[name]


def test_the_first_word_picks_a_preset_and_flags_change_it():
    assert parse([]) == PRESETS["quick"]
    assert parse(["compact"]) == PRESETS["compact"]
    changed = parse(["smoke", "--pretrain.distill", "0", "--output", "elsewhere", "--seeds", "3"])
    assert (changed.pretrain.distill, changed.output, changed.seeds) == (0, "elsewhere", 3)
    assert replace(changed, pretrain=PRESETS["smoke"].pretrain, output="runs/smoke", seeds=1) == PRESETS["smoke"]


def test_config_reloads_a_run_and_flags_go_on_top(tmp_path):
    save_config(replace(PRESETS["compact"], seed=7), tmp_path / "config.yaml")
    config = parse(["--config", str(tmp_path / "config.yaml"), "--output", "again"])
    assert config == parse([f"--config={tmp_path / 'config.yaml'}", "--output", "again"])
    assert config == replace(PRESETS["compact"], seed=7, output="again")


def test_several_datasets_and_their_weights(tmp_path):
    mixed = parse(["smoke", "--data.path", "some/a", "b", "--data.weights", "2", "1"])
    assert mixed.data.paths == mixed.data.path == ("some/a", "b") and mixed.data.weights == (2.0, 1.0)
    save_config(mixed, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == mixed
    single = parse(["smoke", "--data.path", "a"])
    assert single.data.path == "a" and single.data.paths == ("a",) and PRESETS["paper"].data.paths == ()
    save_config(single, tmp_path / "config.yaml")
    assert "path: a\n" in (tmp_path / "config.yaml").read_text()


def test_paper_s_preset_says_what_the_paper_says():
    paper = PRESETS["paper"]
    for stage in (paper.pretrain, paper.adapt):
        assert (stage.epochs, stage.images, stage.learning_rate) == (1, 256, 1e-5)
        assert stage.projector_learning_rate is None
    assert (paper.pretrain.distill, paper.distill.alpha, paper.distill.target) == (1.0, 0.9, "mse")
    assert (paper.model.pixel_shuffle, paper.model.box_style, paper.model.cell_positions) == (2, "text", False)
    shorter = parse(["paper", "--pretrain.steps", "10", "--pretrain.epochs", "None"]).pretrain
    assert (shorter.steps, shorter.epochs) == (10, None)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="there is no .huge.; presets quick, smoke, compact, paper"):
        parse(["huge"])


def test_a_run_from_before_chat_templates_stays_raw(tmp_path):
    path = tmp_path / "config.yaml"
    save_config(PRESETS["compact"], path)
    path.write_text("".join(line for line in path.open() if "chat_template" not in line))
    assert (PRESETS["compact"].model.chat_template, load_config(path).model.chat_template) == ("auto", "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: [", "no readable configuration"),
        ("[" * 3000, "no readable configuration"),
        ("seed: " + "9" * 5000, "no readable configuration"),
        ("\xff", "no readable configuration"),
        ("seed: many", "seed: "),
        ("just words", "granvit: Input should be"),
        ("colour: red", "colour: "),
    ],
    ids=len,
)
def test_a_faulty_file_is_refused_with_the_field(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        load_config(path)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--data.eval-images", "1", "data.eval_images is 1; it is at least 2"),
        ("--data.questions-per-image", "0", "data.questions_per_image is 0"),
        ("--data.fault-budget", "2", "data.fault_budget is 2.0"),
        ("--model.encoder-heads", "0", "model.encoder_heads is 0"),
        ("--model.encoder-heads", "3", "model.encoder_width is 128; it takes a multiple"),
        ("--distill.alpha", "1.5", "distill.alpha is 1.5"),
        ("--distill.crop-tokens", "1025", "distill.crop_tokens is 1025; it is at most 1024"),
        ("--distill.region-grid", "0 4", "distill.region_grid is (0, 4)"),
        ("--checkpoint-every", "0", "config.checkpoint_every is 0"),
        ("--seeds", "-2", "config.seeds is -2"),
        ("--threads", "-1", "config.threads is -1"),
        ("--pretrain.learning-rate", "-1", "pretrain.learning_rate is -1.0"),
        ("--pretrain.projector-learning-rate", "-1", "pretrain.projector_learning_rate is -1.0"),
        ("--pretrain.distill", "nan", "pretrain.distill is nan"),
        ("--pretrain.betas", "0.9 1", "pretrain.betas are (0.9, 1.0)"),
        ("--pretrain.clip", "0", "pretrain.clip is 0.0"),
        ("--llm.lora", "-1", "lora: rank is -1"),
        ("--llm.lora", "8", "model.lora.rank is 8; an LLM made from scratch"),
        ("--model.parallel-boxes", "--model.box-style both", "model.parallel_boxes takes box_style tokens"),
        ("--sft.steps", "-1", "sft.steps is -1"),
        ("--data.weights", "1 2", "data.weights is (1.0, 2.0); it takes"),
        ("--pretrain.epochs", "2", "pretrain.epochs is 2; exactly"),
    ],
)
def test_a_value_out_of_range_is_named_before_anything_starts(flag, value, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as raised:
        parse(["smoke", flag, *value.split()])
    assert message in str(raised.value) + "".join(capsys.readouterr())


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_sequences_hold_its_largest_image_and_some_questions(name):
    preset = PRESETS[name]
    assert preset.data.capacity >= preset.model.max_image_tokens // preset.model.pixel_shuffle**2 + 200


def test_stages_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="encoder, projector, llm"):
        Stage("x", train=("decoder",), tasks=("bbox2caption",))
    with pytest.raises(ValueError, match="bbox2caption"):
        Stage("x", train=("llm",), tasks=())
    with pytest.raises(ValueError, match="distill"):
        Stage("x", train=("llm",), tasks=("bbox2caption",), distill=1.0)
    with pytest.raises(ValueError, match="steps is -1"):
        Stage("x", train=("llm",), tasks=("bbox2caption",), steps=-1)
    for given in ({"epochs": 1}, {"steps": None}, {"images": 256}, {"packs": None}):
        with pytest.raises(ValueError, match="exactly one of them is a number"):
            Stage("x", train=("llm",), tasks=("bbox2caption",), **given)


def test_the_rate_rises_and_falls_to_zero():
    stage = Stage("x", train=("llm",), tasks=("bbox2caption",), steps=100, warmup_steps=10)
    rates = [stage.rate(step) for step in range(1, 101)]
    assert rates[9] == 1.0 and rates[0] == pytest.approx(0.1)
    assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True)) and all(
        a > b for a, b in zip(rates[9:-1], rates[10:], strict=True)
    )
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert replace(stage, steps=1, warmup_steps=0).rate(1) == 1.0  # else it would learn nothing


@pytest.mark.parametrize("word", [*PRESETS, "adapt", "sft"])
def test_the_short_help_names_flags_that_are_there(word, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([word, "--help"])
    short = capsys.readouterr().out
    assert ended.value.code == 0 and len(short.splitlines()) < 60
    with pytest.raises(SystemExit) as ended:
        parse([word, "--help-all"])
    every = capsys.readouterr().out
    assert ended.value.code == 0 and len(every.splitlines()) > 200
    for flag in COMMON.keys() - {"config FILE"}:
        assert f"--{flag} " in short and f"--{flag}" in every


def test_help_needs_neither_torch_nor_transformers():
    code = "import sys, granvit.train.__main__; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
