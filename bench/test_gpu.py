"""The operators on a GPU beside what others would write: rows go to DEVICE.json as they are measured.

The device's work is timed (gpu_clock.py), and the host's own microseconds a call stand in the row. Ours is measured
once more as a CUDA graph's replay. Shares are of the bandwidth of a large copy, measured in the same run.

Ours is held to float64 (expected.py), and so are the peers. A case whose rows this commit already has is skipped. What
compiles for long has tests of its own (test_flex_attention, test_compiled_torchvision), and ids name the workload:
`-k "workload_A and not flex and not compiled"`. GRANVIT_BENCH_DEVICE=cpu is a dry run: tiny workloads, rows only where
GRANVIT_BENCH_RESULTS names a folder.
"""

from collections.abc import Callable
from functools import partial

import expected
import pytest
import torch
from attention_peers import flex_attention_peers, region_attention_peers, region_prompt_peers
from comparison import compare, near, near_pictures
from gpu_clock import DEVICE, DRY, DeviceClock, bandwidth, replay
from peers import HALF, pack_patches_peers, roi_align_loop_peers, roi_gather_peers
from processors import FAMILIES
from rows import Rows, gpu_file, gpu_name, provenance
from torch import Tensor, nn
from workloads import BINS, DESCRIPTIONS, GRAPH, PATCH, aims, cell_shares, pictures, randn, regions

from granvit.model.region_prompt import RegionPrompt
from granvit_kernels import pack_patches, region_attention, roi_gather

if not DRY and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if DRY:
    torch.set_num_threads(1)  # tensors so small that a second one is in the way

DTYPE = torch.float32 if DRY else torch.bfloat16
FEW = {"images": 3, "boxes": 2} if DRY else {}

# ---- the rows ----
ROWS = Rows(gpu_file(), ("operator", "mode", "workload", "provider"))


@pytest.fixture
def measure(benchmark) -> Callable[..., None]:
    """measure(operator, mode, workload, nbytes, ours, peers, check, captured=None)

    ours: a function of nothing. peers: {name: make}, make() giving such a function. check: as comparison.compare takes
    it. nbytes: that the operator has to read and write. captured: makes `ours` for the CUDA graph, where it holds a
    graph of autograd.
    """

    def measure(operator, mode, workload, nbytes, ours, peers, check, captured=None) -> None:
        case = {"operator": operator, "mode": mode, "workload": workload}
        mine = {"granvit": lambda: ours, GRAPH: lambda: replay(captured or (lambda: ours))}
        if all(ROWS.has(**case, provider=name, failed=None) for name in mine) and all(
            ROWS.has(**case, provider=name) for name in peers
        ):
            pytest.skip("measured at this commit")
        letter = workload.split(",")[0]
        compare(
            benchmark, ROWS,
            {**case, "bytes": nbytes, **provenance(gpu_name()), "copy_bytes_per_second": bandwidth()},
            mine, peers, check, aims(operator, mode, letter),
            lambda median: {"share": nbytes / median / bandwidth()},
            DeviceClock, rounds=2 if DRY else 15 if letter == "A" else 7,
        )  # fmt: skip

    return measure


# ---- the comparisons ----
WORKLOADS = pytest.mark.parametrize("workload", DESCRIPTIONS, ids=lambda letter: f"workload_{letter}")


DIRECTIONS = pytest.mark.parametrize("mode", ["forward", "backward"])


def gather(
    measure, workload: str, mode: str, channels: int, peers_of: Callable, bins: int = BINS, ratio: int = 2
) -> None:
    """roi_gather one way, beside peers_of(regions, tokens)."""
    made = regions(workload, DEVICE, **FEW)
    tokens = randn(made.layout.num_tokens, channels, dtype=DTYPE, device=DEVICE).requires_grad_(mode == "backward")
    shape = len(made.boxes), bins, bins, channels
    name = f"{workload}, {channels} channels"
    if (bins, ratio) != (BINS, 2):
        name += f", {bins}x{bins}, {f'{ratio} samples' if ratio else 'adaptive'}"
    peers = peers_of(made, tokens)

    def ours(leaf: Tensor = tokens) -> Tensor:
        return roi_gather(leaf, made.layout, made.boxes, made.image_index, (bins, bins), ratio)

    if mode == "forward":
        touched = expected.read_tokens(made, bins, ratio)
        nbytes = (touched * channels + torch.Size(shape).numel()) * tokens.itemsize
        with torch.no_grad():
            check = near(expected.roi_gather(made, tokens, None, bins, ratio))
            measure("roi_gather", mode, name, nbytes, ours, peers, check)
        return
    grad = randn(*shape, dtype=DTYPE, device=DEVICE, seed=4)

    def backward(run: Callable, leaf: Tensor = tokens) -> Callable:
        output = run()
        return lambda: torch.autograd.grad(output, leaf, grad.view_as(output), retain_graph=True)[0]

    def captured() -> Callable:
        leaf = tokens.detach().requires_grad_()  # autograd's node of `tokens` is of another stream
        return backward(partial(ours, leaf), leaf)

    nbytes = (tokens.numel() + grad.numel()) * tokens.itemsize
    peers = {name: lambda make=make: backward(make()) for name, make in peers.items()}
    check = near(expected.roi_gather(made, tokens, grad, bins, ratio))
    measure("roi_gather", mode, name, nbytes, backward(ours), peers, check, captured)


@WORKLOADS
@pytest.mark.parametrize("channels", [32] if DRY else [768, 1152])
@DIRECTIONS
def test_roi_gather(measure, workload, channels, mode):
    gather(measure, workload, mode, channels, roi_gather_peers)


@pytest.mark.parametrize(("bins", "ratio"), [(BINS, 1), (1, 0)], ids=["a sample a bin", "a vector a box"])
@DIRECTIONS
def test_other_bins_of_workload_A(measure, bins, ratio, mode):
    gather(measure, "A", mode, 32 if DRY else 768, lambda *_: {}, bins, ratio)


@pytest.mark.parametrize(("bins", "ratio"), [(1, 0), (16, 2)], ids=["a vector a box", "16 x 16 a box"])
@DIRECTIONS
def test_roi_gather_as_others_call_roi_align(measure, bins, ratio, mode):
    """A region classifier's vector a box (FG-CLIP 2), and a region's features replayed (Grasp Any Region)."""
    peers = partial(roi_align_loop_peers, bins=bins, ratio=ratio)
    gather(measure, "B", mode, 32 if DRY else 768, peers, bins, ratio)


def attend(measure, workload: str, queries: int, heads: int, size: int, coverage: bool, peers_of: Callable) -> None:
    """region_attention forward and backward beside peers_of(regions, query, key, value)."""
    made = regions(workload, DEVICE, **FEW)
    query = randn(queries, heads, size, dtype=DTYPE, device=DEVICE, seed=4).requires_grad_()
    key, value = (
        randn(made.layout.num_tokens, heads, size, dtype=DTYPE, device=DEVICE, seed=seed).requires_grad_()
        for seed in (5, 6)
    )
    upstream = randn(len(made.boxes), queries, heads, size, dtype=DTYPE, device=DEVICE, seed=7)

    def both_ways(run: Callable) -> Callable:
        def forward_and_backward() -> tuple[Tensor, ...] | None:
            output = run(query, key, value)
            if output is None:  # a mask and no attention
                return None
            return output.detach(), *torch.autograd.grad(output, (query, key, value), upstream)

        return forward_and_backward

    def ours(*tensors: Tensor) -> Tensor:
        return region_attention(*tensors, made.layout, made.boxes, made.image_index, coverage=coverage)

    covered = sum(
        int((cell_shares(made.boxes[which], *grid) > 0).any(0).sum()) for _, grid, which in expected.by_image(made)
    )
    token = 2 * heads * size  # a key and a value
    results = 4 * upstream.numel() + 2 * query.numel()  # output and its gradient; both read again by the backward
    nbytes = (2 * covered * token + made.layout.num_tokens * token + results) * query.itemsize
    name = f"{workload}, {heads} x {size}, {queries} {'query' if queries == 1 else 'queries'}"
    peers = {who: lambda make=make: both_ways(make()) for who, make in peers_of(made, query, key, value).items()}
    measure(
        "region_attention", "forward+backward", name + (", coverage" if coverage else ""), nbytes,
        both_ways(ours), peers, near(*expected.region_attention(made, query, key, value, upstream, coverage)),
    )  # fmt: skip


HEADS, SIZE, QUERIES = (2, 16, 2) if DRY else (12, 64, 4)


@WORKLOADS
def test_region_attention(measure, workload):
    attend(measure, workload, QUERIES, HEADS, SIZE, False, region_attention_peers)


@pytest.mark.parametrize("queries", [3] if DRY else [1, 16])
def test_other_numbers_of_queries_of_workload_A(measure, queries):
    attend(measure, "A", queries, HEADS, SIZE, False, region_attention_peers)


def test_the_models_region_prompt_of_workload_A(measure):
    """As the model calls it with so400m: one query, heads of 72, coverage."""
    heads, size = (2, 18) if DRY else (16, 72)
    attend(measure, "A", 1, heads, size, True, partial(region_attention_peers, coverage=True))


@WORKLOADS
def test_flex_attention(measure, workload):
    attend(measure, workload, QUERIES, HEADS, SIZE, False, flex_attention_peers)


def prompt(measure, peers_of: Callable) -> None:
    """The model's region prompt of workload A with so400m (one query, 16 heads of 72, coverage), from features to
    projected vectors, forward and backward, beside keys and values of every token and attention of peers_of."""
    heads, size = (2, 18) if DRY else (16, 72)
    made, width = regions("A", DEVICE, **FEW), heads * size
    torch.manual_seed(8)
    module = RegionPrompt(width, heads, tokens=1, outputs=width).to(DEVICE, DTYPE)
    nn.init.normal_(module.value.bias)
    features = randn(made.layout.num_tokens, width, dtype=DTYPE, device=DEVICE, seed=5).requires_grad_()
    leaves = features, module.queries, module.key.weight, module.value.weight, module.value.bias
    upstream = randn(len(made.boxes), 1, width, dtype=DTYPE, device=DEVICE, seed=7)

    def both_ways(run: Callable) -> Callable:
        def forward_and_backward() -> tuple[Tensor, ...] | None:
            output = run()
            if output is None:  # a mask and no attention
                return None
            return output.detach(), *torch.autograd.grad(output, leaves, upstream)

        return forward_and_backward

    def ours() -> Tensor:
        return module.attend(features, made.layout, made.boxes, made.image_index).flatten(2)

    peers = region_prompt_peers(peers_of, made, features, module.queries, module.key, module.value)
    nbytes = (3 * features.numel() + 4 * upstream.numel() + 4 * width**2) * features.itemsize
    exact = expected.region_prompt(made, features, module.queries, module.key, module.value, upstream)
    measure(
        "region_prompt", "forward+backward", f"A, {heads} x {size}, 1 query, coverage", nbytes, both_ways(ours),
        {who: lambda make=make: both_ways(make()) for who, make in peers.items()}, near(*exact),
    )  # fmt: skip


def test_region_prompt_of_workload_A(measure):
    prompt(measure, region_attention_peers)


def test_region_prompt_by_flex_attention(measure):
    prompt(measure, flex_attention_peers)


def pack(measure, workload: str, mode: str, compiled: bool) -> None:
    made = pictures(workload, mode == "resized", DEVICE, *((2, 16) if DRY else ()))

    def ours() -> Tensor:
        return pack_patches(made.images, PATCH, HALF, HALF, grids=made.grids, dtype=DTYPE)[0]

    nbytes = sum(image.numel() for image in made.images) + made.tokens * PATCH**2 * 3 * DTYPE.itemsize
    peers = {
        name: make for name, make in pack_patches_peers(made, DTYPE).items() if compiled == name.endswith("compiled")
    }
    name = f"{workload}, patches of {PATCH}"
    measure("pack_patches", mode, name, nbytes, ours, peers, near_pictures(made, DTYPE))


MODES = pytest.mark.parametrize("mode", ["as it is", "resized"])


@pytest.mark.parametrize("workload", ["A", "B", "D"], ids=lambda letter: f"workload_{letter}")
@MODES
def test_pack_patches(measure, workload, mode):
    pack(measure, workload, mode, compiled=False)


@MODES
def test_compiled_torchvision_of_workload_A(measure, mode):
    pack(measure, "A", mode, compiled=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_processors(measure, name):
    """Workload A as a family's processor makes it, resized and rounded as Pillow does it; beside the family's processor
    that uses torchvision, on the GPU too."""
    family, made = FAMILIES[name], pictures("A", True, DEVICE, *((2, 16) if DRY else ()))
    planes = [image.permute(2, 0, 1).contiguous() for image in made.images]
    few = made.images[:4]
    exact = family.pack([image.cpu() for image in few], round="pil").to(DEVICE)

    def ours() -> Tensor:
        return family.pack(made.images, DTYPE, round="pil")

    def theirs() -> Callable:
        process = family.processor(pillow=False)
        return lambda: process(planes, return_tensors="pt", device=str(DEVICE))

    def check(output: Tensor, tolerance: float) -> None:
        patches = output if tolerance == 1 else family.patches(output)
        apart = (patches[: len(exact)].float() - exact).abs()
        rounding = torch.finfo(DTYPE).eps * exact.abs() + 1e-5
        if tolerance == 1:
            assert (apart <= rounding).all(), f"it is off by {float(apart.max()):.5f}"
        else:  # its weights have 15 bits, and overshoots are clipped elsewhere
            assert apart.mean() < 1 / 127.5, f"it is off by {float(apart.mean()):.5f} on average"

    nbytes = sum(image.numel() for image in made.images) + ours().numel() * DTYPE.itemsize
    workload = f"A, patches of {family.patch}"
    peers = {"transformers' processor": theirs}
    measure("pack_patches", f"as {name}'s processor", workload, nbytes, ours, peers, check)
