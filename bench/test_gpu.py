"""The operators on a GPU beside what others would write: rows go to DEVICE.json as they are measured.

Every call starts from an L2 without its data: a buffer larger than it is read between any two (a written one would
leave lines that the timed call has to write back). The device sleeps until the host has issued the call, so that what
CUDA events time is the device's work; the host's own microseconds a call stand in the row. Ours is measured once more
as a CUDA graph's replay. Shares are of the bandwidth of a large copy, measured in the same run.

Ours is held to float64 (expected.py), and so are the peers. A case whose rows this commit already has is skipped. What
compiles for long has tests of its own (test_flex_attention, test_compiled_torchvision), and ids name the workload:
`-k "workload_A and not flex and not compiled"`. GRANVIT_BENCH_DEVICE=cpu is a dry run: tiny workloads, rows only where
GRANVIT_BENCH_RESULTS names a folder.
"""

import os
import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import expected
import pytest
import torch
from comparison import WallClock, compare, near, near_pictures
from peers import HALF, corners, flex_attention_peers, pack_patches_peers, region_attention_peers, roi_gather_peers
from rows import Rows, gpu_file, gpu_name, provenance
from torch import Tensor
from workloads import BINS, DESCRIPTIONS, GRAPH, PATCH, aims, cell_shares, pictures, randn, regions

from granvit_kernels import pack_patches, region_attention, roi_gather

DEVICE = os.environ.get("GRANVIT_BENCH_DEVICE", "cuda")
DRY = DEVICE == "cpu"
if not DRY and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if DRY:
    torch.set_num_threads(1)  # tensors so small that a second one is in the way

DTYPE = torch.float32 if DRY else torch.bfloat16
FEW = {"images": 3, "boxes": 2} if DRY else {}
L2 = 2**16 if DRY else 2**28
LONGEST_SLEEP = 0.05
"""Seconds: a peer that waits for the device within its call is not waited for longer."""


# ---- the clock ----


def timed_on_device(run: Callable[[], Any]) -> float:
    """Seconds between two events around what `run` issues."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@cache
def cycles_per_second() -> float:
    torch.cuda._sleep(10**6)
    return 10**7 / timed_on_device(lambda: torch.cuda._sleep(10**7))


@cache
def flushing() -> Tensor:
    return torch.zeros(L2 // 4, device=DEVICE)


class DeviceClock(WallClock):
    """Times what a function has the device do; `host` is how long it keeps the host, in seconds."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)
        self.host = statistics.median(self._host_seconds() for _ in range(3))

    def _host_seconds(self) -> float:
        if not DRY:
            torch.cuda.synchronize()
        return super().seconds()

    def seconds(self) -> float:
        """Of one call, from a cold L2."""
        flushing().sum()
        if DRY:
            return super().seconds()
        torch.cuda._sleep(int(min(2 * self.host, LONGEST_SLEEP) * cycles_per_second()))
        return timed_on_device(self.run)

    def figures(self) -> dict[str, float]:
        return {"host_us": 1e6 * self.host}


@cache
def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.zeros(2**20 if DRY else 2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    clock = DeviceClock(lambda: target.copy_(source))
    return 2 * source.numel() / statistics.median(clock.seconds() for _ in range(15))


def replay(make: Callable) -> Callable:
    """The call that make() gives as a CUDA graph. Made on the stream of the capture: autograd runs a backward on the
    stream of its forward, and one of another stream can't be captured."""
    if DRY:
        return make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = make()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = run()

    def again(keep: Callable = run) -> Any:  # the graph has the addresses of what `run` holds
        graph.replay()
        return output

    return again


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


@WORKLOADS
@pytest.mark.parametrize("channels", [32] if DRY else [768, 1152])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_roi_gather(measure, workload, channels, mode):
    made = regions(workload, DEVICE, **FEW)
    tokens = randn(made.layout.num_tokens, channels, dtype=DTYPE, device=DEVICE).requires_grad_(mode == "backward")
    shape = len(made.boxes), BINS, BINS, channels
    name = f"{workload}, {channels} channels"
    peers = roi_gather_peers(made, tokens)

    def ours(leaf: Tensor = tokens) -> Tensor:
        return roi_gather(leaf, made.layout, made.boxes, made.image_index)

    if mode == "forward":
        index, weight = corners(made)
        touched = index[weight > 0].unique().numel()
        nbytes = (touched * channels + torch.Size(shape).numel()) * tokens.itemsize
        with torch.no_grad():
            measure("roi_gather", mode, name, nbytes, ours, peers, near(expected.roi_gather(made, tokens)))
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
    check = near(expected.roi_gather(made, tokens, grad))
    measure("roi_gather", mode, name, nbytes, backward(ours), peers, check, captured)


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
            output = run()
            if output is None:  # a mask and no attention
                return None
            return output.detach(), *torch.autograd.grad(output, (query, key, value), upstream)

        return forward_and_backward

    def ours() -> Tensor:
        place = made.layout, made.boxes, made.image_index
        return region_attention(query, key, value, *place, coverage=coverage)

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
