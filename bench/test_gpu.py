"""The operators on a GPU beside what others would write: rows go to DEVICE.json as they are measured.

Every call starts with a cold L2: a buffer larger than it is written between any two. Providers alternate within a run;
times are CUDA events' medians. Ours is measured once more as a CUDA graph's replay, and that time gives its share of
the bandwidth of a large copy, measured in the same run. A row that the file already has for this commit is not measured
again. GRANVIT_BENCH_DEVICE=cpu is a dry run: tiny workloads, nothing kept, no aim asserted.
"""

import os
import time
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from peers import HALF, corners, pack_patches_peers, region_attention_peers, roi_gather_peers, unpadded
from rows import Rows, gpu_file, gpu_name, provenance
from torch import Tensor
from workloads import AIMS, DESCRIPTIONS, PATCH, pictures, randn, regions

from granvit_kernels import pack_patches, region_attention, roi_gather

DEVICE = os.environ.get("GRANVIT_BENCH_DEVICE", "cuda")
DRY = DEVICE == "cpu"
if not DRY and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DTYPE = torch.float32 if DRY else torch.bfloat16
ROUNDS = 2 if DRY else 15
FEW = {"images": 3, "boxes": 2} if DRY else {}
L2 = 2**16 if DRY else 2**28


# ---- the clock ----


@cache
def flushed() -> Tensor:
    return torch.empty(L2, dtype=torch.uint8, device=DEVICE)


def seconds(run: Callable) -> float:
    """One call from a cold L2."""
    flushed().zero_()
    if DRY:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)  # so that the host is ahead, and what is timed is the device's
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@cache
def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(2**20 if DRY else 2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / float(np.median([seconds(lambda: target.copy_(source)) for _ in range(ROUNDS)]))


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

    def again(keep: Callable = run) -> Tensor:  # the graph has the addresses of what `run` holds
        graph.replay()
        return output

    return again


# ---- the rows ----


@cache
def machine() -> dict:
    return {**provenance(gpu_name()), "copy_bytes_per_second": bandwidth()}


ROWS = Rows(gpu_file(), ("operator", "mode", "workload", "provider"))


@pytest.fixture
def compare(benchmark) -> Callable:
    """compare(operator, mode, workload, nbytes, ours, peers, check, captured=None): times, writes the rows, asserts
    the aims.

    ours: a function of nothing. peers: {name: make}, make() giving such a function. check(output, name): raises where
    a peer's output is not ours. captured: makes `ours` for the CUDA graph, where it holds a graph of autograd.
    """

    def compare(operator, mode, workload, nbytes, ours, peers, check, captured=None):
        letter = workload.split(",")[0]
        if ROWS.has(operator=operator, mode=mode, workload=workload, provider="granvit"):
            pytest.skip("measured at this commit")
        graph = "granvit, CUDA graph"
        providers = {"granvit": ours, graph: replay(captured or (lambda: ours))}
        check(providers[graph](), graph)  # a graph that captured nothing would be the fastest of all
        common = {"operator": operator, "mode": mode, "workload": workload, "bytes": nbytes, **machine()}
        for name, make in peers.items():
            try:
                run = make()
                output = run()
                if output is not None:
                    check(output, name)
                providers[name] = run
            except AssertionError:
                raise
            except Exception as error:  # a peer's own trouble is a row, not our failure
                ROWS.save({**common, "provider": name, "failed": f"{type(error).__name__}: {error}"[:200]})
                if DRY and not isinstance(error, (ImportError, NotImplementedError)):  # FlexAttention's backward
                    raise
        times: dict[str, list[float]] = {name: [] for name in providers}
        for run in providers.values():
            run()

        def others() -> None:
            for name, run in list(providers.items())[1:]:
                times[name].append(seconds(run))

        benchmark.pedantic(lambda: times["granvit"].append(seconds(ours)), setup=others, rounds=ROUNDS, iterations=1)
        medians = {name: float(np.median(found)) for name, found in times.items()}
        figures = {}
        for name, median in sorted(medians.items(), key=lambda item: item[0] == "granvit"):  # ours last: all are there
            row = {
                **common,
                "provider": name,
                "median": median,
                "quantiles": np.quantile(times[name], [0.1, 0.9]).tolist(),
                "ratio": median / medians["granvit"],
                "share": nbytes / median / machine()["copy_bytes_per_second"],
            }
            figures[name] = row
            ROWS.save(row)
        benchmark.extra_info["ratios"] = {name: row["ratio"] for name, row in figures.items()}
        if DRY:
            return
        missed = []
        for aimed, way, where, provider, figure, least in AIMS:
            if (aimed, way, where) != (operator, mode, letter):
                continue
            provider = "granvit, CUDA graph" if figure == "share" else provider
            if provider in figures and figures[provider][figure] < least:
                missed.append(f"{provider}: {figure} {figures[provider][figure]:.2f}, aimed at {least}")
        assert not missed, "; ".join(missed)

    return compare


def close(tolerance: float) -> Callable:
    """check(output, name) for compare, against what ours gives."""

    def check(expected: Tensor) -> Callable:
        def same(output: Tensor, name: str) -> None:
            torch.testing.assert_close(
                output.reshape(expected.shape).float(), expected.float(), rtol=0, atol=tolerance,
                msg=lambda text: f"{name}: {text}",
            )  # fmt: skip

        return same

    return check


# ---- the comparisons ----
WORKLOADS = pytest.mark.parametrize("workload", DESCRIPTIONS)


@WORKLOADS
@pytest.mark.parametrize("channels", [32] if DRY else [768, 1152])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_roi_gather(compare, workload, channels, mode):
    made = regions(workload, DEVICE, **FEW)
    tokens = randn(made.layout.num_tokens, channels, dtype=DTYPE, device=DEVICE).requires_grad_(mode == "backward")

    def ours(leaf: Tensor = tokens) -> Tensor:
        return roi_gather(leaf, made.layout, made.boxes, made.image_index)

    output = ours()
    check = close(1e-3 if DRY else 0.06)(output.detach())
    peers = roi_gather_peers(made, tokens)
    index, weight = corners(made)
    touched = index[weight > 0].unique().numel()
    nbytes = (touched * channels + output.numel()) * tokens.itemsize
    if mode == "backward":
        grad = randn(*output.shape, dtype=DTYPE, device=DEVICE)
        nbytes = (tokens.numel() + output.numel()) * tokens.itemsize

        def backward(make: Callable, leaf: Tensor = tokens) -> Callable:
            def made_backward() -> Callable:
                found = make()()
                check(found, "forward")
                return lambda: torch.autograd.grad(found, leaf, grad.view_as(found), retain_graph=True)[0]

            return made_backward

        def captured() -> Callable:
            leaf = tokens.detach().requires_grad_()  # autograd's node of `tokens` is of another stream
            return backward(lambda: partial(ours, leaf), leaf)()

        run = backward(lambda: ours)()
        check_backward = close(1e-3 if DRY else 0.25)(run())
        peers = {name: backward(make) for name, make in peers.items()}
        name = f"{workload}, {channels} channels"
        compare("roi_gather", mode, name, nbytes, run, peers, check_backward, captured)
        return
    with torch.no_grad():
        compare("roi_gather", mode, f"{workload}, {channels} channels", nbytes, ours, peers, check)


@pytest.mark.parametrize(
    ("workload", "queries"),  # FlexAttention compiles anew for each
    [*((letter, 2 if DRY else 4) for letter in DESCRIPTIONS), *([] if DRY else [("A", 1), ("A", 16)])],
)
def test_region_attention(compare, workload, queries):
    made = regions(workload, DEVICE, **FEW)
    heads, size = (2, 16) if DRY else (12, 64)
    query = randn(queries, heads, size, dtype=DTYPE, device=DEVICE, seed=4).requires_grad_()
    key, value = (
        randn(made.layout.num_tokens, heads, size, dtype=DTYPE, device=DEVICE, seed=5 + i).requires_grad_()
        for i in range(2)
    )
    upstream = randn(len(made.boxes), queries, heads, size, dtype=DTYPE, device=DEVICE, seed=7)

    def both_ways(run: Callable) -> Callable:
        def forward_and_backward() -> Tensor | None:
            output = run()
            if output is None:  # the mask alone
                return None
            torch.autograd.grad(output, (query, key, value), upstream)
            return output.detach()

        return forward_and_backward

    def ours() -> Tensor:
        return region_attention(query, key, value, made.layout, made.boxes, made.image_index)

    met = torch.zeros(made.layout.num_tokens, dtype=torch.bool)
    grids, starts = made.grids, made.layout.cu_seqlens.tolist()
    for (x1, y1, x2, y2), image in zip(made.boxes.tolist(), made.image_index.tolist(), strict=True):
        cells = met[starts[image] : starts[image + 1]].view(grids[image])
        cells[int(y1) : int(-(-y2 // 1)), int(x1) : int(-(-x2 // 1))] = True
    covered, token = int(met.sum()), 2 * heads * size  # a key and a value
    results = 4 * upstream.numel() + 2 * query.numel()  # output and its gradient; both read again by the backward
    nbytes = (2 * covered * token + made.layout.num_tokens * token + results) * query.itemsize
    peers = {
        name: lambda make=make: both_ways(make())
        for name, make in region_attention_peers(made, query, key, value).items()
    }
    run = both_ways(ours)
    name = f"{workload}, {heads} x {size}, {queries} queries"
    compare("region_attention", "forward+backward", name, nbytes, run, peers, close(1e-3 if DRY else 0.05)(run()))


@pytest.mark.parametrize("workload", ["A", "B", "D"])
@pytest.mark.parametrize("mode", ["as it is", "resized"])
def test_pack_patches(compare, workload, mode):
    made = pictures(workload, mode == "resized", DEVICE, *((2, 16) if DRY else ()))

    def ours() -> Tensor:
        return pack_patches(made.images, PATCH, HALF, HALF, grids=made.grids, dtype=DTYPE)[0]

    output = ours()
    nbytes = sum(image.numel() for image in made.images) + output.numel() * output.element_size()
    same = close(2.5 / 127.5)(output)  # the processor rounds to 8 bits, and bfloat16 by half a step
    compare(
        "pack_patches", mode, f"{workload}, patches of {PATCH}", nbytes, ours, pack_patches_peers(made, DTYPE),
        lambda found, name: same(unpadded(found, made), name),
    )  # fmt: skip
