import re
from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers
from question_packs import ORDINARY, UNUSUAL, index, random_pack, visible
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from granvit.model import GranViT, llm, question_attention
from granvit.model.question_attention import NAME, find_grids, why_not_flash
from granvit.questions.packing import pack_questions
from granvit.questions.segments import find_segments

TASKS = ("global_caption", "bbox2caption", "caption2bbox")
PACKS = {**UNUSUAL, "ordinary": ORDINARY, **{f"random {seed}": random_pack(seed) for seed in range(25)}}


def draw(rows, heads, shared, size, dtype, device="cpu"):
    """q, k, v [T, heads, size] and a gradient of the output that is zero at padding, all drawn in dtype."""
    image, _ = index(rows)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(image.size, h, size, generator=generator, dtype=torch.float64) for h in (heads, shared, shared)]
    grad = torch.randn(image.size, heads, size, generator=generator, dtype=torch.float64)
    grad[torch.from_numpy(image.ravel() < 0)] = 0
    q, k, v, grad = (t.to(device, dtype) for t in (*made, grad))
    return *(t.requires_grad_() for t in (q, k, v)), grad


def dense(rows, q, k, v, scale=None):
    """Attention by the mask. Padding, which attends to itself there, is set to zero."""
    image, question = index(rows)
    length = image.shape[1]
    mask = visible(image, question) | torch.eye(length, dtype=torch.bool)
    q_, k_, v_ = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
    mask = mask[:, None].to(q.device)
    # Key heads repeated, as transformers does it with a mask: enable_gqa would take the float32 path on a GPU.
    k_, v_ = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k_, v_))
    out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=scale)
    out = out.transpose(1, 2).flatten(0, 1)
    return out * torch.from_numpy(image.ravel() >= 0)[:, None, None].to(q.device)


def by_segments(rows, q, k, v, scale=None):
    segments = find_segments(*index(rows)).to(q.device)
    out = question_attention.question_attention(q, k, v, segments, scale)
    assert torch.isfinite(out).all()
    return out * torch.from_numpy(index(rows)[0].ravel() >= 0)[:, None, None].to(q.device)


def by_grids(rows, q, k, v, scale=None):
    image, question = index(rows)
    return find_grids(torch.from_numpy(image), torch.from_numpy(question), q.dtype).attend(q, k, v, scale)


def both_ways(attend, rows, q, k, v, grad):
    out = attend(rows, q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.fixture
def always_grids(monkeypatch):
    monkeypatch.setattr(question_attention, "GAIN", 0)


@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("attend", [by_segments, by_grids])
@pytest.mark.parametrize("name", PACKS)
def test_it_equals_the_dense_mask(always_grids, name, attend, shared):
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        tensors = draw(PACKS[name], 4, shared, 8, dtype)
        expected = both_ways(dense, PACKS[name], *tensors)
        for one, other in zip(both_ways(attend, PACKS[name], *tensors), expected, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other, rtol=0, atol=limit * float(other.abs().max()))


@pytest.mark.parametrize("attend", [by_segments, by_grids])
def test_the_scale_is_taken(always_grids, attend):
    q, k, v, _ = draw(ORDINARY, 4, 2, 8, torch.float64)
    torch.testing.assert_close(attend(ORDINARY, q, k, v, 0.7), dense(ORDINARY, q, k, v, 0.7))


def test_scores_far_apart_do_not_overflow():
    """A question whose own keys, or whose image, carry all of the weight: exp of either lse alone would be inf."""
    q, k, v, grad = draw(ORDINARY, 2, 2, 8, torch.float64)
    with torch.no_grad():
        k[::3] *= 2000
    for one, other in zip(
        both_ways(by_segments, ORDINARY, q, k, v, grad), both_ways(dense, ORDINARY, q, k, v, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def check_accuracy(dtype, rows, heads, shared, size, device):
    """The kernels' contract for output and gradients: against float64 from the same rounded inputs, at most twice the
    dense mask's error in the same precision, plus one eps of the largest value."""
    low = draw(rows, heads, shared, size, dtype, device)
    exact = both_ways(dense, rows, *(t.detach().double().requires_grad_() for t in low[:3]), low[3].double())
    results = zip(both_ways(by_segments, rows, *low), both_ways(dense, rows, *low), exact, strict=True)
    for name, (ours, theirs, exact) in zip(("out", "dq", "dk", "dv"), results, strict=True):
        limit = 2 * (theirs - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= limit, name


def test_merging_in_bfloat16_costs_no_accuracy():
    """Parts round their outputs to half precision before they are merged; that stays within the kernels' contract."""
    check_accuracy(torch.bfloat16, [[(60, [20, 9, 31]), (40, [13, 13])]], 4, 2, 32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("heads, shared, size", [(9, 3, 64), (12, 2, 128)], ids=["SmolLM2-135M", "Qwen2-1.5B"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_on_a_gpu(heads, shared, size, dtype):
    """Among them questions of one token, where the kernel takes short cuts, and sequences without any."""
    large = [[(256, [40, 25, 60, 18]), (196, [33, 7])], [(300, [90] * 5)], [(50, [1, 1])], []]
    for rows in (large, *PACKS.values()):
        check_accuracy(dtype, rows, heads, shared, size, "cuda")


@pytest.mark.gpu
def test_an_llm_takes_flash_attention_on_a_gpu_without_waiting_for_it():
    model = random_llm("Llama", num_key_value_heads=2, head_dim=64).to("cuda", torch.bfloat16)
    assert llm.use_question_attention(model)
    embeds, _, places = inputs(ORDINARY)
    embeds, places, segments = embeds.detach().to("cuda", torch.bfloat16), places.cuda(), ways(ORDINARY)["segments"]
    segments = segments.to("cuda")
    assert why_not_flash(model, embeds) is None
    assert "float32" in why_not_flash(model, embeds.float())
    llm.decode(model, embeds, segments, places).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        llm.decode(model, embeds, segments, places).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


FORWARD = """query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale,
    window_size_left, window_size_right, seqused_k, alibi_slopes"""
BACKWARD = """grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, scale, window_size_left, window_size_right"""


def test_torchs_flash_attention_is_the_one_we_call():
    """Arguments beyond these must have defaults; the signatures are private to torch, and a change must not pass."""
    for op, names in (
        (torch.ops.aten._flash_attention_forward.default, FORWARD),
        (torch.ops.aten._flash_attention_backward.default, BACKWARD),
    ):
        names = re.findall(r"\w+", names)
        arguments = op._schema.arguments
        assert [argument.name for argument in arguments[: len(names)]] == names
        assert all(argument.has_default_value() for argument in arguments[len(names) :])
    returned = [each.name for each in torch.ops.aten._flash_attention_forward.default._schema.returns]
    assert returned[:2] == ["output", "softmax_logsumexp"]


def test_flash_attention_gives_the_layout_that_is_merged():
    with FakeTensorMode():
        q, k = (torch.empty(5, h, 64, dtype=torch.bfloat16, device="cuda") for h in (4, 2))
        cu = torch.empty(3, dtype=torch.int32, device="cuda")
        arguments = (cu, cu, 3, 3, True, 0.125)
        assert question_attention._parts(q)[0] is question_attention.flash_forward
        out, lse = question_attention.flash_forward(q, k, k, *arguments)
        assert (out.shape, out.dtype) == ((5, 4, 64), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((4, 5), torch.float32)
        grads = question_attention.flash_backward(out, q, k, k, out, lse, *arguments)
        assert [tuple(grad.shape) for grad in grads] == [(5, 4, 64), (5, 2, 64), (5, 2, 64)]


def test_the_operator_is_registered_well():
    q, k, v, _ = draw(ORDINARY, 4, 2, 8, torch.float32)
    segments = find_segments(*index(ORDINARY))
    torch.library.opcheck(torch.ops.granvit.question_attention.default, (q, k, v, *vars(segments).values(), 0.3))


# In an LLM

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SIZES |= {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
LLMS = {
    "Llama": {},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": GROUPED,
    "Gemma": GROUPED,
    "Mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "Granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.5},
    "Phi3": {"num_key_value_heads": 2},
    "Olmo2": {"num_key_value_heads": 2},
    "SmolLM3": {"num_key_value_heads": 2},
    "GPTNeoX": {},
}


def random_llm(name, **options):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()


def inputs(rows):
    """Embeddings with a gradient, the dense mask and position ids of a pack."""
    image, question = index(rows)
    embeds = torch.randn(*image.shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    places = visible(image, question).sum(-1).sub(1).clamp(0)
    allowed = visible(image, question) | torch.eye(image.shape[1], dtype=torch.bool)
    return embeds.requires_grad_(), llm.additive_mask(allowed[:, None], embeds.dtype), places


def ways(rows):
    image, question = index(rows)
    grids = find_grids(torch.from_numpy(image), torch.from_numpy(question), torch.float64)
    return {"segments": find_segments(image, question), "grids": grids}


def decoded(model, how, embeds, places, real):
    """Hidden states of real tokens, and the gradients of embeddings and parameters."""
    hidden = llm.decode(model, embeds, how, places)[real]
    weights = [p for p in model.get_decoder().parameters() if p.requires_grad]
    grads = torch.autograd.grad(hidden.square().sum(), (embeds, *weights), allow_unused=True)
    return [hidden.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("name", LLMS)
def test_llms_give_what_they_give_with_the_mask(always_grids, name):
    model = random_llm(name, **LLMS[name])
    embeds, mask, places = inputs(ORDINARY)
    real = torch.from_numpy(index(ORDINARY)[0] >= 0)
    expected = decoded(model, mask, embeds, places, real)
    assert llm.use_question_attention(model) and model.config._attn_implementation == NAME
    for how in (mask, *ways(ORDINARY).values()):
        for one, other in zip(decoded(model, how, embeds, places, real), expected, strict=True):
            # A key's bias has no gradient but rounding: softmax cancels it.
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * max(1, float(other.abs().max())))


def test_what_would_change_attention_is_refused():
    model = random_llm("Llama")
    module, segments = model.get_decoder().layers[0].self_attn, find_segments(*index(ORDINARY))
    q = torch.zeros(2, 4, segments.cu_segments[-1] // 2, 8)
    attend = partial(question_attention.attention_forward, module, q, q, q, None, granvit_segments=segments)
    out, _ = attend(position_ids=torch.zeros(1), use_cache=False, softcap=None, sliding_window=None)
    assert out.shape == (2, q.shape[2], 4, 8)
    for name, value in (("softcap", 50.0), ("sliding_window", 4), ("s_aux", torch.zeros(4)), ("unheard_of", 1)):
        with pytest.raises(ValueError, match=f"LlamaAttention asks attention for {name}, which"):
            attend(**{name: value})
    with pytest.raises(ValueError, match="asks attention for dropout"):
        attend(dropout=0.1)
    with pytest.raises(ValueError, match="asks attention for is_causal=False"):
        attend(is_causal=False)
    with pytest.raises(ValueError, match="accepted are equal lengths and head sizes"):
        question_attention.attention_forward(module, q, q[:, :, 1:], q[:, :, 1:], None, granvit_segments=segments)


class Forgetful(LlamaForCausalLM):
    """Says that it hands arguments down to attention, and does not."""

    def __init__(self, config):
        super().__init__(config)
        decoder = self.get_decoder()
        forward = decoder.forward
        decoder.forward = lambda *args, granvit_segments=None, **kwargs: forward(*args, **kwargs)


def test_who_loses_the_segments_keeps_the_mask():
    model = Forgetful(transformers.LlamaConfig(**SIZES)).eval()
    llm.check_llm(model)
    assert not llm.use_question_attention(model) and model.config._attn_implementation == "sdpa"
    assert llm.use_question_attention(model, trial=False)
    embeds, _, places = inputs(ORDINARY)
    hidden = llm.decode(model, embeds.float(), find_segments(*index(ORDINARY)), places)
    assert hidden.isnan().all(), "a loss must not be computed from attention to everything"


def test_who_has_no_interface_keeps_the_mask():
    model = random_llm("Llama")
    model.config._attn_implementation = "eager"
    assert not llm.use_question_attention(model) and model.config._attn_implementation == "eager"
    model.config._attn_implementation = "sdpa"
    model._supports_attention_backend = False
    assert not llm.use_question_attention(model) and model.config._attn_implementation == "sdpa"


def test_generation_is_as_it_was(tiny, samples):
    model, processor = tiny()
    asked = [(i, q) for i, sample in enumerate(samples) for q in processor.questions(sample, TASKS)]
    rows = processor([s.image for s in samples], [q for _, q in asked], image_index=[i for i, _ in asked])
    assert model.llm.config._attn_implementation == NAME
    made = model.generate(**rows, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    model.llm.config._attn_implementation = "sdpa"
    expected = model.generate(**rows, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(made.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(made.logits, expected.logits, strict=True))


def test_a_loaded_model_has_it_too(tiny, tmp_path):
    model, _ = tiny()
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert GranViT.from_pretrained(tmp_path).llm.config._attn_implementation == NAME
    eager = GranViT.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.llm.config._attn_implementation == "eager"


def test_a_batch_takes_the_best_there_is(tiny, samples, monkeypatch):
    """Flash attention where it runs, grids where they are less work, the mask else; one result."""
    model, processor = tiny()
    batch = pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 10_000)
    took, decode = [], llm.decode
    monkeypatch.setattr(llm, "decode", lambda *args: took.append(type(args[2]).__name__) or decode(*args))
    losses = []
    for gain, reason in ((1e9, "CPU"), (0, "CPU"), (0, None)):
        monkeypatch.setattr(question_attention, "GAIN", gain)
        monkeypatch.setattr(llm, "why_not_flash", lambda *_, reason=reason: reason)
        losses.append(model(batch).loss)
    assert took == ["Tensor", "Grids", "Segments"]
    torch.testing.assert_close(losses[1:], [losses[0]] * 2, rtol=1e-6, atol=0)
    model.llm.config._attn_implementation = "sdpa"
    monkeypatch.setattr(llm, "why_not_flash", why_not_flash)
    model(batch)
    assert took[-1] == "Tensor"


def test_why_not_flash_says_so():
    model = random_llm("Llama")
    embeds = torch.zeros(1, 1, 32)
    assert why_not_flash(model, embeds) == "the LLM's attention is 'sdpa', not transformers' interface"
    model.config._attn_implementation = NAME
    assert why_not_flash(model, embeds) == "flash attention runs on CUDA, not on cpu"
    cuda = torch.device("cuda")
    assert question_attention._why_no_kernel(cuda, torch.float32, 4, 4, 8) == (
        "flash attention takes half precision, not torch.float32"
    )
    assert "multiple of 8 channels, not 20" in question_attention._why_no_kernel(cuda, torch.bfloat16, 4, 4, 20)


@pytest.mark.parametrize("how", ["segments", "grids"])
def test_half_precision_on_a_cpu(always_grids, how):
    """As weights and by autocast, under which rotary embeddings leave q and k in float32 and v in half."""
    model = random_llm("Llama").float()
    llm.use_question_attention(model)
    embeds, _, places = inputs(ORDINARY)
    real = torch.from_numpy(index(ORDINARY)[0] >= 0)
    image, question = map(torch.from_numpy, index(ORDINARY))
    way = find_segments(*index(ORDINARY)) if how == "segments" else find_grids(image, question, torch.float32)
    exact = llm.decode(model, embeds.float(), way, places)[real]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = llm.decode(model, embeds.float(), way, places)[real]
    assert (rounded - exact).abs().mean() < 0.02 * exact.std()
    rounded = llm.decode(model.bfloat16(), embeds.bfloat16(), way, places)[real]
    assert rounded.dtype == torch.bfloat16 and (rounded.float() - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("how", ["segments", "grids"])
def test_activation_checkpointing(always_grids, how):
    model = random_llm("Llama")
    llm.use_question_attention(model)
    embeds, _, places = inputs(ORDINARY)
    real = torch.from_numpy(index(ORDINARY)[0] >= 0)
    way = ways(ORDINARY)[how]
    expected = decoded(model, way, embeds, places, real)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for one, other in zip(decoded(model, way, embeds, places, real), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_layer_compiles_whole(backend):
    """No graph break, and another batch's segments make no new graph after the second."""
    torch._dynamo.reset()
    model = random_llm("Llama")
    llm.use_question_attention(model)
    layer, counter = model.get_decoder().layers[0], torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for rows in (ORDINARY, [[(6, [4, 2]), (5, [3])]], [[(8, [3, 2, 2]), (4, [9, 6])]], [[(7, [3, 2, 2, 5])]]):
        embeds, mask, places = inputs(rows)
        rotary = model.get_decoder().rotary_emb(embeds, places)
        segments, real = find_segments(*index(rows)), torch.from_numpy(index(rows)[0] >= 0)
        results = []
        for run in (layer, compiled):
            out = run(embeds, attention_mask=mask, position_embeddings=rotary, granvit_segments=segments)[real]
            results.append([out, *torch.autograd.grad(out.square().sum(), (embeds, *layer.parameters()))])
        for one, other in zip(*results, strict=True):  # Llama's norms are in float32, whatever its weights are
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.detach().abs().max()))
    assert counter.frame_count <= 3


def test_a_compiled_llm_keeps_the_mask_on_a_cpu(always_grids, tiny, samples, monkeypatch):
    model, processor = tiny()
    batch = pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 10_000)
    took, decode = [], llm.decode
    monkeypatch.setattr(llm, "decode", lambda *args: took.append(type(args[2]).__name__) or decode(*args))
    model(batch)
    model.llm.get_decoder().layers[0].compile(backend="eager")
    model(batch)
    assert took == ["Grids", "Tensor"]
