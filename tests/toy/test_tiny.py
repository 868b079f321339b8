import torch

from granvit.questions.packing import pack_questions
from granvit.questions.prompts import DESCRIBE_IMAGE, describe_box, find_box
from granvit.toy.tiny import build_tiny, train_tokenizer

TEXTS = ["a red circle at 12:45", "a blue square", "two red circles"] * 5


def test_sizes_of_the_default():
    model, processor = build_tiny(TEXTS)
    sizes = {name: sum(p.numel() for p in group) for name, group in model.groups().items()}
    assert 0.8e6 < sizes["encoder"] < 1.0e6 and sizes["projector"] < 0.2e6 and sizes["llm"] < 0.8e6
    assert processor.image_tokens(96, 96) == 36


def test_tokenizer_gives_back_any_text_and_splits_numbers():
    tokenizer = train_tokenizer(TEXTS, 400)
    for text in ("a red circle", "Grün, 北京 \n\n\t«é» 0.125!", " leading and trailing "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("0.123", add_special_tokens=False)["input_ids"]) == 5
    assert len(tokenizer) <= 400


def test_fixed_sentences_are_single_tokens():
    _, processor = build_tiny(TEXTS, box_style="tokens")
    asked = [
        describe_box((0, 0, 1, 1), box_style="tokens").prompt,
        find_box("a red circle").prompt,
        DESCRIBE_IMAGE,
    ]
    lengths = [len(ids) for ids in processor.prompt_ids(asked)]
    assert lengths[0] == 3 and lengths[1] <= 6 and lengths[2] == 1


def test_one_seed_one_model():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build_tiny(TEXTS)[0].state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_it_learns_by_heart(tiny, samples):
    """A hundred steps on four images: answers come back word by word, boxes too."""
    model, processor = tiny()
    tasks = ("bbox2caption", "caption2bbox")
    asked = [processor.questions(sample, tasks) for sample in samples]
    batch = pack_questions(samples, asked, processor, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    flat = [(i, question) for i, row in enumerate(asked) for question in row]
    inputs = processor([s.image for s in samples], [q for _, q in flat], image_index=[i for i, _ in flat])
    answers = processor.decode_answers(model.generate(**inputs, max_new_tokens=24))
    right = sum(answer == question.answer for answer, (_, question) in zip(answers, flat, strict=True))
    assert right >= 0.9 * len(flat)
