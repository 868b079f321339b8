import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from granvit.cost import plan as planning
from granvit.cost.command import parse
from granvit.cost.flops import Asked, Picture, Sizes, count, one_question_each, operations, packed, padded
from granvit.cost.plan import PlanConfig, compare, gpu_hours, measured_reading, measurements, report
from granvit.cost.reading import _looked_at, typical
from granvit.cost.shapes import config_of, on_meta
from granvit.data.loader import GranDataset
from granvit.data.mixture import Mixture
from granvit.lora import Lora
from granvit.train.build import build
from granvit.train.presets import PRESETS, Model

STAGE_1, STAGE_2 = ("encoder", "projector"), ("projector", "llm")
ROUND = Sizes(
    patch=0, encoder=100, encoder_attention=2, projector=0, cells=0, geometry=0, region_logits=0, region_values=0,
    region=0, region_attention=0, llm=50, llm_attention=3, output=0, locations=0,
    parameters={"encoder": 100, "projector": 10, "llm": 60},
)  # fmt: skip
IMAGE = Picture(patches=10, tokens=10, asked=(Asked(tokens=5, answers=2),) * 6, head=0)


def test_six_questions_by_hand():
    ours, theirs = count([IMAGE]), count(one_question_each([IMAGE]))
    assert (ours.tokens, theirs.tokens) == (40, 90)
    assert (ours.pairs, theirs.pairs) == (55 + 6 * (50 + 15), 6 * 120)
    # trained: 6 a weight and token, attention 12; frozen with gradients: 4 and 12; frozen without: 2 and 4
    assert operations(ROUND, ours, STAGE_1).parts["encoder"] == 6 * 100 * 10 + 12 * 2 * 100
    assert operations(ROUND, ours, STAGE_1).parts["llm"] == 4 * 50 * 40 + 12 * 3 * 445
    assert operations(ROUND, ours, STAGE_2).parts["encoder"] == 2 * 100 * 10 + 4 * 2 * 100
    assert operations(ROUND, ours, STAGE_2).parts["llm"] == 6 * 50 * 40 + 12 * 3 * 445
    without_attention = replace(ROUND, encoder_attention=0, llm_attention=0)
    both = compare([[IMAGE]], samples=6)
    assert both.ratio(without_attention, STAGE_1) == (6 * 6000 + 4 * 50 * 90) / (6000 + 4 * 50 * 40)
    assert both.ratio(without_attention, STAGE_1, with_padding=True) == both.ratio(without_attention, STAGE_1)


def test_both_recipes_teach_the_same_crops_once():
    image = replace(IMAGE, asked=(Asked(5, 2), Asked(5, 2), Asked(9, 6, region=False)), crops=(4, 2, 6, 4, 4))
    ours, theirs = count([image]), count(one_question_each([image]))
    assert ours.crops == theirs.crops == 5 and ours.crop_patches == theirs.crop_patches == 20
    assert operations(ROUND, ours, STAGE_1).parts["teacher"] == 2 * 100 * 20 + 4 * 2 * (3 * 16 + 4 + 36)


def test_padding_is_what_the_longest_leaves():
    short, long = replace(IMAGE, asked=(Asked(5, 2),)), replace(IMAGE, patches=12, tokens=12, asked=(Asked(8, 2),))
    full = padded([short, long])
    assert (full.tokens, full.patches, full.patch_pairs, full.pairs) == (40, 24, 288, 2 * 210)
    assert full.answers == count([short, long]).answers
    rows = packed([[short, long], [long]])
    assert rows.tokens == 2 * 35 and rows.pairs == count([short, long, long]).pairs + 15
    assert compare([[short, long], [long]], 2, capacity=50).ours_padded.tokens == 100


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2-135m", 134_515_008), ("qwen2.5-1.5b", 1_543_714_304), ("llama3-8b", 8_030_261_248)],
)
def test_known_llms_have_their_published_sizes(name, parameters):
    sizes = Sizes.of(on_meta(config_of(Model(encoder="siglip2-base", llm=name, box_format="text"))))
    assert sizes.parameters["llm"] == parameters
    # 12 layers of 768: 12 * 768^2 weights each
    assert sizes.encoder == 12 * 12 * 768**2 and sizes.encoder_attention == 12 * 768


def test_a_shape_that_is_not_known_says_what_is(tmp_path):
    with pytest.raises(ValueError, match="model.llm.*smollm2-135m"):
        config_of(Model(llm="somebody/llm"))
    model = on_meta(config_of(Model(llm="smollm2-135m")))
    model.llm.config.save_pretrained(tmp_path)
    assert config_of(Model(llm=str(tmp_path))).text_config.num_hidden_layers == 30


def test_packs_are_the_trainer_s(small_config, sample_set):
    plan = PlanConfig(small_config, rows=40)
    data = GranDataset(sample_set)
    config = config_of(small_config.model)
    processor, note = planning.processor_for(plan, config, data)
    model, its = build(small_config.model, data)
    assert Sizes.of(on_meta(config)) == Sizes.of(model) and len(its.tokenizer) == len(processor.tokenizer)
    for stage in (small_config.pretrain, small_config.adapt):
        measured = measured_reading(plan, stage, data, processor)
        lengths = [sum(one.length for one in row) for row in measured.rows]
        assert note == "" and max(lengths) <= small_config.data.capacity
        assert np.mean(lengths[:-1]) > 0.9 * small_config.data.capacity
        assert (sum(sum(one.crops) for row in measured.rows for one in row) > 0) == (stage.distill > 0)
        both = compare(measured.rows, 8, small_config.data.capacity)
        assert both.ours.questions == both.theirs.questions and both.ours.answers == both.theirs.answers
        assert both.theirs_padded.tokens > both.theirs.tokens > both.ours.tokens


def test_a_chat_template_is_counted(small_config, llm_folder, sample_set):
    data, models = GranDataset(sample_set), {}
    for mode in ("auto", "none"):
        model = replace(small_config.model, llm=str(llm_folder("qwen2")), chat_template=mode)
        run = PlanConfig(replace(small_config, model=model))
        ours, theirs = planning.processor_for(run, config_of(model), data)[0], build(model, data)[1]
        reading = measured_reading(replace(run, rows=20), small_config.adapt, data, ours)
        picture = typical(run, config_of(model), small_config.adapt, reading, 2, (64, 64))
        assert picture.head == len(ours.image_part(0)) and picture.length > picture.tokens > picture.head
        models[mode] = [[*ours.image_part(2), *ids] for ids in ours.prompt_ids(["What is it?"])]
        assert models[mode] == [[*theirs.image_part(2), *ids] for ids in theirs.prompt_ids(["What is it?"])]
    assert len(models["auto"][0]) > len(models["none"][0])


def test_a_mixture_is_looked_at_by_its_shares(small_config, sample_set, tmp_path):
    (tmp_path / "same").symlink_to(sample_set)
    paths, number = (str(sample_set), str(tmp_path / "same")), len(GranDataset(sample_set))
    data = replace(small_config.data, path=paths, weights=(1, 3))
    stage = replace(small_config.pretrain, steps=None, epochs=2)
    config = replace(small_config, data=data, pretrain=stage)
    plan = PlanConfig(config, rows=60)
    mixed = Mixture([GranDataset(path) for path in paths])
    assert np.bincount(np.array(_looked_at(mixed, plan)) // number).tolist() == [15, 45]
    processor, _ = planning.processor_for(plan, config_of(config.model), mixed)
    reading = measured_reading(plan, stage, mixed, processor)
    sees = planning.seen(stage, reading, data.capacity)
    assert sees.images == pytest.approx(4 * number, rel=0.05) and sees.times == 2
    assert sees.steps == pytest.approx(sees.images / (reading.packs * len(reading.rows[0])), rel=0.5)


def test_an_llm_under_adapters_is_frozen():
    model = Model(encoder="siglip2-base", llm="llama3-8b", box_format="text", lora=Lora(16))
    sizes = Sizes.of(on_meta(config_of(model), model.lora))
    whole = Sizes.of(on_meta(config_of(replace(model, lora=Lora()))))
    assert sizes.adapters == 41_943_040 and sizes.parameters == whole.parameters and sizes.llm == whole.llm
    without = replace(sizes, llm_attention=0)
    assert operations(without, count([IMAGE]), STAGE_2).parts["llm"] == 4 * sizes.llm * 40 + 6 * sizes.adapters * 40
    assert operations(without, count([IMAGE]), STAGE_2).parts["output"] == 4 * sizes.output * 12


def test_a_run_that_is_finished_can_be_planned_anew(small_config, tiny, sample_set, tmp_path, capsys):
    model, processor = tiny()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "export")
    model.encoder.save_siglip2(tmp_path / "export" / "encoder")
    assert Sizes.of(on_meta(config_of(Model(whole=str(tmp_path))))) == Sizes.of(model)
    for path in (tmp_path, tmp_path / "export"):
        assert config_of(Model(encoder=str(path))).vision_config.hidden_size == model.encoder.config.hidden_size
    whole = replace(small_config, model=Model(whole=str(tmp_path)))
    stages = {"pretrain": replace(whole.pretrain, steps=0), "align": replace(whole.align, steps=2)}
    report(PlanConfig(replace(whole, **stages), rows=20), Console(width=200))
    said = capsys.readouterr().out
    assert "adapt" in said and "align" in said and "pretrain" not in said
    with pytest.raises(ValueError, match="nothing to plan"):
        none = {name: replace(getattr(whole, name), steps=0) for name in ("pretrain", "adapt")}
        report(PlanConfig(replace(whole, **none)), Console())


def test_hours():
    assert gpu_hours(3.6e18, 0.4, 1000) == pytest.approx(2.5)


def test_a_measured_speed_takes_the_place_of_the_assumed_one(tmp_path):
    plan, stage = PlanConfig(PRESETS["paper"]), PRESETS["paper"].pretrain
    row = {"provider": "granvit", "mode": "pretrain", "shapes": ["siglip2-so400m", "qwen2.5-1.5b"], "mfu": 0.5}
    (tmp_path / "x-training.json").write_text(json.dumps([row, {**row, "mode": "adapt", "mfu": 0.1}]))
    assert measurements(plan, stage, tmp_path) == {**row, "file": "x-training.json"}
    other = replace(plan, run=replace(plan.run, model=replace(plan.run.model, llm="smollm2-135m")))
    assert measurements(other, stage, tmp_path) is None


def test_the_command_prints_every_table(small_config, sample_set, capsys):
    report(PlanConfig(PRESETS["paper"], rows=500), Console(width=80))
    said = capsys.readouterr().out
    assert "assumed, not measured" in said and "29.51 M images, 183.55 M regions" in said
    total, first, second, memory, *rest = said.splitlines()
    assert re.fullmatch(r"peak memory of a rank: pretrain [\d.]+ GiB in \w+, adapt [\d.]+ GiB in \w+", memory)
    assert re.fullmatch(r"[\d,]+ GPU hours of training, without evaluations", total)
    pattern = r"(pretrain|adapt): [\d,e+.]+ GPU hours, (\d\d\d,\d\d\d) steps of (\d+) images, 100.0 % of regions asked"
    for line in (first, second):
        _, steps, images = re.fullmatch(pattern, line).groups()
        assert 230 <= int(images) <= 280
        assert int(steps.replace(",", "")) * int(images) == pytest.approx(29.51e6, rel=0.01)
    assert not [line for line in rest if "…" in line or len(line) > 80]  # all of it fits a terminal
    report(PlanConfig(small_config, rows=20), Console(width=200))
    said = capsys.readouterr().out
    assert said.startswith("under 0.01 GPU hours") and f"rows of {sample_set}" in said.replace("\n", "")


def test_arguments():
    plan = parse(["compact", "--mfu", "0.5", "--model.llm", "qwen2.5-1.5b", "--data.path", "somewhere"])
    assert (plan.mfu, plan.run.model.llm, plan.run.data.path) == (0.5, "qwen2.5-1.5b", "somewhere")
    with pytest.raises(ValueError, match="there is no preset 'nothing'; there are quick"):
        parse(["nothing"])
    for wrong in ({"mfu": 1.5}, {"device_gb": float("inf")}, {"prompt_tokens": -1}, {"image_size": (0, 5)},
                  {"regions": 1e9, "images": 10}):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            PlanConfig(PRESETS["smoke"], **wrong)
