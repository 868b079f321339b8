from collections import defaultdict

import pytest
import torch

from granvit.questions.packing import IGNORE, pack_questions
from granvit.questions.prompts import BBOX2CAPTION, Question

TASKS = ("global_caption", "bbox2caption", "caption2bbox")
ALL = (*TASKS, "chat")
VARIANTS = {
    "bins, region token and text": {},
    "text only": {"box_format": "text", "box_style": "text"},
    "text, three region tokens": {"box_format": "text", "box_style": "both", "region_tokens": 3},
    "region tokens only, pixel shuffle": {"box_style": "tokens", "region_tokens": 2, "pixel_shuffle": 2},
}


def pack(processor, samples, capacity=100_000, tasks=TASKS):
    return pack_questions(samples, [processor.questions(s, tasks) for s in samples], processor, capacity)


def score(model, batch):
    features, layout = model.encode(batch.images)
    regions = model.region_embeds(features, layout, batch.boxes, batch.box_image_index)
    return model.answer_logits(batch, model.image_embeds(features, layout), regions)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_one_question_at_a_time(tiny, samples, name):
    model, processor = tiny(**VARIANTS[name])
    batch = pack(processor, samples, tasks=ALL)
    assert any(question.later for sample in samples for question in processor.questions(sample, ALL))
    assert batch.input_ids.shape[0] == 1, "several images are meant to share a sequence"
    packed, packed_targets = score(model, batch)
    (packed.float().log_softmax(-1).gather(1, packed_targets[:, None]).sum()).backward()
    packed_gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logits, targets = [], []
    for sample in samples:
        for question in processor.questions(sample, ALL):
            alone = pack_questions([sample], [[question]], processor, 100_000)
            one, wanted = score(model, alone)
            one.float().log_softmax(-1).gather(1, wanted[:, None]).sum().backward()
            logits.append(one.detach())
            targets.append(wanted)
    assert torch.equal(packed_targets, torch.cat(targets))
    torch.testing.assert_close(
        packed, torch.cat(logits), rtol=0, atol=1e-5 * float(packed.detach().abs().max())
    )
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == packed_gradients.keys()
    largest = defaultdict(float)  # by module: a key's bias has no gradient but rounding (softmax cancels it)
    for key, gradient in gradients.items():
        module = key.rpartition(".")[0]
        largest[module] = max(largest[module], float(gradient.abs().max()))
    for key, gradient in gradients.items():
        limit = 1e-5 * largest[key.rpartition(".")[0]]
        assert (packed_gradients[key] - gradient).abs().max() <= limit, key


def test_sequences_equal_one_long_sequence(tiny, samples):
    model, processor = tiny()
    whole, many = pack(processor, samples), pack(processor, samples, capacity=190)
    assert len(many.input_ids) > 1
    order_whole = whole.image_index.flatten()[whole.answer_slots]
    order_many = many.image_index.flatten()[many.answer_slots]
    one, targets = score(model, whole)
    other, other_targets = score(model, many)
    for image in range(len(samples)):
        assert torch.equal(targets[order_whole == image], other_targets[order_many == image])
        torch.testing.assert_close(one[order_whole == image], other[order_many == image], rtol=0, atol=1e-4)


def test_nothing_leaks(tiny, samples):
    """Change one question's tokens: the logits of every other question stay as they are, bit for bit."""
    model, processor = tiny()
    batch = pack(processor, samples)
    image = batch.image_index.flatten()[batch.answer_slots]
    question = batch.question_index.flatten()[batch.answer_slots]
    before, _ = score(model, batch)
    changed = (batch.image_index == 0) & (batch.question_index == 2)
    marker = batch.input_ids >= model.config.image_token_id
    batch.input_ids[changed & ~marker] = 7
    after, _ = score(model, batch)
    same = (before == after).all(1)
    assert torch.equal(~same, (image == 0) & (question == 2))

    batch.images[2] = 255 - batch.images[2]
    third, _ = score(model, batch)
    assert torch.equal((after != third).any(1), image == 2)


def test_layout_of_a_sequence(tiny, samples):
    model, processor = tiny(region_tokens=2)
    asked = [
        [Question(BBOX2CAPTION, "what is <region> here", "a dog", ((0.1, 0.1, 0.5, 0.5),), 0)],
        [
            Question(
                BBOX2CAPTION, "what is <region> or <region>", "a cat", ((0, 0, 1, 1), (0, 0, 0.5, 1)), 1
            ),
            Question("global_caption", "what is there", "a tree"),
        ],
    ]
    batch = pack_questions(samples[:2], asked, processor, 1000)
    ids, tokenizer = batch.input_ids.flatten(), processor.tokenizer
    assert batch.regions == 2
    assert batch.box_image_index.tolist() == [0, 1, 1]
    assert ids[batch.region_slots].tolist() == [model.config.region_token_id] * 6
    assert ids[batch.image_slots].tolist() == [model.config.image_token_id] * len(batch.image_slots)
    owners = batch.image_index.flatten()
    assert owners[batch.image_slots].tolist() == sorted(owners[batch.image_slots].tolist())
    assert owners[batch.region_slots].tolist() == [0, 0, 1, 1, 1, 1]
    assert torch.equal(ids[batch.answer_slots + 1], batch.targets)
    assert torch.equal(batch.labels.flatten()[batch.answer_slots + 1], batch.targets)
    assert int((batch.labels != IGNORE).sum()) == len(batch.targets)
    assert tokenizer.decode(batch.targets) == "a dog<eos>a cat<eos>a tree<eos>"
    for i, sample in enumerate(samples[:2]):
        mine = batch.image_index == i
        start = int((mine & (batch.question_index == 0)).sum())
        assert start == 1 + processor.image_tokens(*sample.image.shape[:2])
        for q in range(len(asked[i]) + 1):
            positions = batch.position_ids[mine & (batch.question_index == q)].tolist()
            assert positions == list(range(0 if q == 0 else start, (0 if q == 0 else start) + len(positions)))


def test_a_conversations_turns_see_those_before_and_are_all_scored(tiny, samples):
    model, processor = tiny()
    turns = (("what is there", "a dog"), ("which colour", "red"), ("sure", "yes"))
    asked = [Question("chat", *turns[0], later=turns[1:]), Question("chat", *turns[1])]
    batch = pack_questions(samples[:1], [asked], processor, 1000)
    assert processor.tokenizer.decode(batch.targets) == "a dog<eos>red<eos>yes<eos>red<eos>"
    mine = batch.question_index[0] == 1
    start = int((batch.question_index[0] == 0).sum())
    text = processor.tokenizer.decode(batch.input_ids[0, mine])
    assert text == "\nwhat is there\na dog<eos>\nwhich colour\nred<eos>\nsure\nyes<eos>"
    assert batch.position_ids[0, mine].tolist() == list(range(start, start + int(mine.sum())))

    before, _ = score(model, batch)
    first = batch.input_ids[0, batch.answer_slots[0] + 1].item()
    batch.input_ids[0, batch.answer_slots[0] + 1] = first - 1  # a word of the first answer
    after, _ = score(model, batch)
    changed = (before != after).any(1).tolist()
    scored, lengths = [], [len(ids) for ids in processor.answer_ids([answer for _, answer in turns])]
    for number, length in enumerate(lengths):
        scored += [number > 0 or i > 0 for i in range(length)]
    assert changed == scored + [False] * lengths[1]


def test_mask_is_the_contracts(tiny, samples):
    _, processor = tiny()
    batch = pack(processor, samples, capacity=190)
    mask, image, question = batch.attention()[:, 0], batch.image_index, batch.question_index
    assert (image < 0).any(), "a row with padding is meant to be among them"
    for b in range(len(mask)):
        for i in range(0, mask.shape[1], 7):
            for j in range(mask.shape[1]):
                visible = j <= i and image[b, i] == image[b, j] >= 0 and question[b, j] in (0, question[b, i])
                assert bool(mask[b, i, j]) == (visible or i == j)


def test_to_moves_every_tensor(tiny, samples):
    batch = pack(tiny()[1], samples).to("meta")
    fields = [*vars(batch).values(), *vars(batch.segments).values(), *batch.images]
    tensors = [value for value in fields if isinstance(value, torch.Tensor)]
    assert len(tensors) == 20 and all(tensor.is_meta for tensor in tensors)


def test_nothing_to_pack(tiny):
    model, processor = tiny()
    batch = pack_questions([], [], processor, 100)
    assert batch.input_ids.shape == (0, 0) and batch.regions == 0


def test_faults_are_named(tiny, samples):
    _, processor = tiny()
    with pytest.raises(ValueError, match=r"'sample-2' with its 9 questions takes \d+ tokens.* takes 150"):
        pack(processor, samples, capacity=150)
    with pytest.raises(ValueError, match="got 1 lists for 2 samples"):
        pack_questions(samples[:2], [[]], processor, 100)
    with pytest.raises(ValueError, match="answer to 'what' is empty"):
        pack_questions(samples[:1], [[Question("chat", "what", " ")]], processor, 100)
    with pytest.raises(ValueError, match="answer to 'and' is empty"):
        pack_questions(samples[:1], [[Question("chat", "what", "it", later=(("and", ""),))]], processor, 100)
    with pytest.raises(ValueError, match="1 <region> markers, but 0 boxes"):
        pack_questions(samples[:1], [[Question("chat", "a <region>", "b")]], processor, 100)
