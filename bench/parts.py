"""The stretches of code that the GPU kernels are made of: what a trip through each issues, which sass.py reads from the
machine code, and how often warps run it, which trips.py counts from a workload. floors.py adds it up.

The code is what ships: the launchers run on the meta device, at the workload's size, and what they launch is compiled
for Hopper (aot.py); pack_patches is compiled by nvcc.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import aot
import roi_trips
import sass
import trips
from workloads import Regions

ARCHITECTURE = 90
DTYPE = "bfloat16"
VALUES = 8
"""Values of DTYPE in 16 bytes."""


class Part(NamedTuple):
    """A stretch of a kernel's code: instructions of one trip through it (a loop that does several steps at once: of
    each), trips of all warps, and instructions by kind."""

    kernel: str
    part: str
    instructions: float
    trips: int
    kinds: dict[str, int]


def part(kernel: str, name: str, code: list[sass.Instruction], count: int, steps: int = 1) -> Part:
    return Part(kernel, name, len(code) / steps, count, sass.counted(code))


# ---- the Triton kernels ----


def roi_forward(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    (column,) = code.nested(1)
    programs, slices, arguments = math.prod(launch.grid), launch.grid[1], launch.arguments
    counts = roi_trips.forward(made, arguments["out_h"], arguments["SAMPLES"])
    added = arguments["PARTS"] * arguments["BLOCK_C"] // trips.WARP  # multiplications of a vector
    rows, bare = 2 * arguments["SAMPLES"], column.through()  # rows: of a column, at most
    yield "once a row of bins", code.through(column), programs
    yield "a bin", bare, programs * arguments["out_w"]
    # A column is loaded before it is known which of its rows count; what is loaded later belongs to the first of them.
    early = next(n for n in range(1, rows * arguments["PARTS"] + 1) if column.exactly(FFMA=added, LDG=n))
    for kind, loads in {"held": 0, "next": early, "anew": 2 * early}.items():
        for name, sums in ((kind, 2), (f"{kind}, on", 1)):
            sample = column.exactly(FFMA=sums * added, LDG=loads)
            yield f"a sample, columns {name}", sass.without(sample, bare), counts[name] * slices
    # Of a bin whose samples all want two columns anew, with all of their rows, against none of them.
    samples, columns = arguments["SAMPLES"], 2 * arguments["SAMPLES"]
    full = column.exactly(FFMA=(2 * samples + columns * rows) * added, LDG=columns * rows * arguments["PARTS"])
    cells = sass.without(full, column.exactly(FFMA=2 * samples * added, LDG=columns * early))
    yield "a cell of a column", cells, counts["cells"] * slices, columns * rows


def roi_forward_any_ratio(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    (bin,) = code.loops
    (columns,) = bin.loops
    *column_search, rows = columns.loops
    *row_search, column = rows.loops
    (cell,) = column.loops
    programs, slices, arguments = math.prod(launch.grid), launch.grid[1], launch.arguments
    counts = roi_trips.forward_any_ratio(made, arguments["out_h"], arguments["ratio"], trips.WARP)
    counts = {name: slices * count for name, count in counts.items()}
    yield "once a row of bins", code.through(bin), programs
    yield "a bin", bin.through(columns), programs * arguments["out_w"]
    yield "32 columns of cells", columns.through(*columns.loops), counts["column blocks"]
    yield from searched("columns", column_search, counts["column trips"])
    yield "32 rows of cells", rows.through(*rows.loops), counts["row searches"]
    yield "32 rows of cells, held", rows.through(column), counts["row blocks"] - counts["row searches"]
    yield from searched("rows", row_search, counts["row trips"])
    yield "a column of cells", column.through(cell), counts["columns of cells"]
    yield "a cell", cell.through(), counts["cells"]


def searched(what: str, loops: list[sass.Region], counts: Any) -> Iterator[tuple]:
    """Of a search for shares: the loops that look for the first sample and the last, and that over the samples."""
    first, last, samples = loops
    for name, loop, count in zip(("the first sample", "the last"), (first, last), counts.tolist()[:2], strict=True):
        yield f"{name} of {what}, a step", loop.through(), count
    yield f"a sample of {what}", samples.through(), int(counts[2])


def roi_backward(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    (tile_row,) = code.loops
    (group,) = tile_row.loops
    (region,) = group.loops
    (rows,) = region.loops
    *row_search, columns = rows.loops
    *column_search, column = columns.loops
    (row,) = column.loops
    arguments, slices = launch.arguments, launch.grid[1]
    shape = arguments["TILE"], arguments["out_h"], arguments["SAMPLES"], trips.WARP
    counts = {name: slices * count for name, count in roi_trips.backward(made, *shape).items()}
    yield "once a tile of tokens", code.through(tile_row), slices * len(trips.TokenTiles(made, arguments["TILE"]))
    yield "a row of the tile", tile_row.through(group), counts["tile rows"]
    yield "32 regions elsewhere", group.through(), counts["idle"]
    yield "32 regions", group.through(region), counts["groups"] - counts["idle"]
    yield "a region without a row of bins", region.through(rows) + rows.through(*row_search), counts["rowless"]
    each = region.through(rows) + rows.through(*rows.loops) + columns.through(*columns.loops)
    yield "a region that touches", each, counts["touch"] - counts["rowless"]
    if row_search:
        yield from searched("rows", row_search, counts["row trips"])
        yield from searched("columns", column_search, counts["column trips"])
    yield "a column of bins", column.through(row), counts["columns"]
    yield "a bin", row.through(), counts["bins"]


def roi_places(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    each = code.through(*code.loops)
    for loop in code.loops:  # along y, along x; a few bins are one trip
        each = each + loop.through()
    yield "once a region", each, launch.grid[0]


def tile_tokens(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    names = ("images before", "tiles written", "regions counted", "regions written")
    counts = trips.tile_tokens(made, launch.arguments["TILE"], launch.arguments["BLOCK"])
    yield "once an image", code.through(*code.loops), launch.grid[0]
    for loop, name, count in zip(code.loops, names, counts, strict=True):
        yield name, loop.through(), count


def attention_walk(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    (block,) = code.nested(1)
    programs, splits = math.prod(launch.grid), launch.grid[1]
    walks = programs // len(made.boxes) // splits  # of a box: heads, blocks of queries
    yield "once a box and head", code.through(block), programs
    yield "a block of cells", block.through(), trips.walked_blocks(made, launch.arguments["BLOCK_N"]) * walks


PRODUCT = "(HMMA|HGMMA).*"  # on the tensor cores


def attention_tokens(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    (block,) = code.nested(1)
    arguments = launch.arguments
    counts = trips.attention_tokens(made, arguments["BLOCK_T"], arguments["queries"], arguments["BLOCK_M"])
    products = sum(it.is_a(PRODUCT) for it in block.instructions)
    tiles = len(trips.TokenTiles(made, arguments["BLOCK_T"])) * arguments["heads"]
    yield "once a tile of tokens and head", code.through(block), tiles
    yield "columns elsewhere", block.through(), (counts["blocks"] - counts["computed"]) * arguments["heads"]
    yield "a block of columns", block.doing(products, PRODUCT), counts["computed"] * arguments["heads"]


def pool_walk(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    (block,) = code.nested(1)
    programs = math.prod(launch.grid)
    walks = programs // len(made.boxes)  # of a box: chunks of channels, blocks of rows
    yield "once a box" + " and chunk" * (walks > 1), code.through(block), programs
    yield "a block of cells", block.through(), trips.walked_blocks(made, launch.arguments["BLOCK_N"]) * walks


def pool_compare(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    programs, chunks = math.prod(launch.grid), trips.blocks(launch.arguments["SIZE"], launch.arguments["BLOCK_D"])
    yield "once a box", code.through(*code.loops), programs
    for block in code.loops:
        yield "a block of channels", block.through(), programs * chunks


def pool_logits(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    look, region, chunk = code.nested(3)
    arguments, row_blocks = launch.arguments, launch.grid[1]
    counts = trips.pool_tokens(made, arguments["BLOCK_T"], arguments["LANES"])
    tiles = len(trips.TokenTiles(made, arguments["BLOCK_T"]))
    yield "once a tile of tokens", code.through(look), tiles * row_blocks
    yield "a look at 32 regions", look.through(region), counts["looks"] * row_blocks
    yield "a region that meets the tile", region.through(chunk), counts["met"] * row_blocks
    yield "a chunk of its channels", chunk.through(), counts["met"] * row_blocks * arguments["chunks"]


def pool_value(code: sass.Region, launch: aot.Launch, made: Regions) -> Iterator[tuple]:
    chunk, look, region = code.nested(3)  # few blocks of rows are unrolled
    arguments, slices = launch.arguments, launch.grid[1]
    counts = trips.pool_tokens(made, arguments["BLOCK_T"], arguments["LANES"])
    tiles, chunks = len(trips.TokenTiles(made, arguments["BLOCK_T"])), arguments["chunks"]
    yield "once a tile of tokens", code.through(chunk), tiles * slices
    yield "a chunk of its channels", chunk.through(look), tiles * chunks
    yield "a look at 32 regions", look.through(region), counts["looks"] * chunks
    yield "a region that meets the tile", region.through(), counts["met"] * chunks


KERNELS = {
    ("region_pool", "weigh"): pool_walk,
    ("region_pool", "pool"): pool_walk,
    ("region_pool", "compare"): pool_compare,
    ("region_pool", "_tile_tokens"): tile_tokens,
    ("region_pool", "backward_logits"): pool_logits,
    ("region_pool", "backward_value"): pool_value,
    ("roi_gather", "forward"): roi_forward,
    ("roi_gather", "forward_any_ratio"): roi_forward_any_ratio,
    ("roi_gather", "backward"): roi_backward,
    ("roi_gather", "_tile_tokens"): tile_tokens,
    ("roi_gather", "place_regions"): roi_places,
    ("region_attention", "forward_walk"): attention_walk,
    ("region_attention", "backward_walk"): attention_walk,
    ("region_attention", "_tile_tokens"): tile_tokens,
    ("region_attention", "backward_tokens"): attention_tokens,
}
"""How a kernel is counted: (code, launch, regions) -> (part, its instructions, trips of a program[, steps]) each."""


def launched(operator: str, options: dict[str, Any], made: Regions) -> dict[str, list[Part]]:
    """{direction: its kernels' parts} of an operator that Triton compiles."""
    case = aot.Case(operator, DTYPE, tuple(options.items()))
    place = made.layout.to("meta"), made.boxes.to("meta"), made.image_index.to("meta")
    parts: dict[str, list[Part]] = {}
    for direction, call in aot.directions(case, *place).items():
        with aot.compile_only(ARCHITECTURE) as launches:
            call()
        parts[direction] = [
            part(launch.name.lstrip("_"), name, code, count * launch.kernel.metadata.num_warps, *steps)
            for launch in launches
            for name, code, count, *steps in KERNELS[operator, launch.name](_code(launch), launch, made)
        ]
    return parts


def _code(launch: aot.Launch) -> sass.Region:
    (code,) = _functions(launch.kernel.asm["cubin"]).values()
    return code


@cache
def _functions(cubin: bytes) -> dict[str, sass.Region]:
    return sass.functions(sass.disassemble(cubin))


# ---- pack_patches ----


@cache
def pack_kernels() -> tuple[str, dict[str, sass.Region]]:
    """nvcc's release, and {"copy", "weights", "resample": the code that bilinear calls without rounding run}."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("pack_patches is compiled by nvcc, and there is none on PATH")
    release = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "pack.cubin")
        command = [nvcc, "-cubin", "-arch=sm_90a", "-std=c++17", "-O3", "-lineinfo", f"-I{trips.CSRC.parent}"]
        subprocess.run([*command, str(trips.CSRC / "pack_patches.cu"), "-o", str(cubin)], check=True)
        listing = sass.disassemble(cubin.read_bytes())
    wanted = re.compile("(copy)_kernelI.*Bfloat16E|(weights)_kernel|(resample)_kernelI.*Bfloat16ELi2ELb0E")
    code = sass.functions(listing, wanted.search)
    return release, {wanted.search(name)[wanted.search(name).lastindex]: region for name, region in code.items()}


LOAD, STORE = r"LDGSTS\.E.*128.*", r"STG\.E\.128"


def pack_copy(grids: list[tuple[int, int]]) -> Iterator[Part]:
    code, named = pack_kernels()[1]["copy"], trips.constants()
    counts, warps = trips.copied(grids, VALUES), named["COPY_THREADS"] // trips.WARP
    setup = code.loop("STS.*", "shared.tile = copy_tile<T>(")
    rows, slots = code.loop(LOAD, "load_shared(to, reinterpret_cast"), code.loop(STORE, "each(tile.slots.divisor")
    values = code.loop(r"STS\.64", "copy_values<4, PLANES>(job", "copy_values<false>(job")
    (search,) = setup.loops
    yield part("copy", "once a tile", code.through(setup, rows, values, slots), counts["blocks"] * warps)
    yield part("copy", "its place, one warp", setup.through(search), counts["blocks"])
    yield part("copy", "search for its crop", search.through(), counts["searched"])
    yield part("copy", "16 bytes in", rows.doing(1, LOAD), counts["rows"])
    stores = sum(it.is_a(r"STS\.64") for it in values.instructions)
    yield part("copy", "4 pixels made", values.through(), counts["values"], steps=stores // 3)
    yield part("copy", "16 bytes out", slots.doing(1, STORE), counts["slots"])


def pack_weights(counts: dict[str, Any]) -> Iterator[Part]:
    code, weights = pack_kernels()[1]["weights"], counts["weights"]
    summed, made = ("DMUL", "sum += unscaled(t)"), (r"F2I\.F64.*", "fixed_weight(unscaled(")
    row, column = "make_row_weights(rows", "make_column_weights(columns"
    column_sum, column_groups = code.loop(*summed, column), code.loop(*made, column)
    later_sum, later_store = code.loop(*summed, "Blend later", row), code.loop(*made, "later.weight(source)", row)
    (outer,), (later,) = code.loops, [loop for loop in code if later_sum in loop.loops]
    (row_sum,) = [loop for loop in outer.loops if loop.holds(*summed, row)]
    for (axis, taps), count in sorted(weights.items()):
        if axis == "column":
            way = outer.through(column_sum, column_groups) + taps * column_sum.doing(1, *summed)
            for four in range(0, taps, 4):
                way += column_groups.doing(min(taps - four, 4), *made)
        else:  # that shrinks: each source row has two weights
            both = later.through(later_sum, later_store) + taps * later_sum.doing(1, *summed)
            both += taps // 2 * later_store.doing(1, *made)
            way = outer.through(row_sum, later) + taps * row_sum.doing(1, *summed) + 2 * both
        yield part("weights", f"an output {axis} of {taps} taps", way, count)


def pack_resample(counts: dict[str, Any]) -> Iterator[Part]:
    """counts: trips.resampled's."""
    code, warps = pack_kernels()[1]["resample"], trips.constants()["TILE_COLUMNS"] // trips.WARP
    search = code.loop("LDC.*", "job.crop[middle]")
    (setup,) = [loop for loop in code.loops if search in loop.loops]
    loads, runs = code.loop(LOAD, "load_shared(to, reinterpret_cast"), code.loop(r"STS\.64", "shared.to[run] = run_to(")
    slots = code.loop(STORE, "store_slot(shared.values + run")
    walk = {
        "shrink": code.loop("FFMA", "sum[k][c] += weights.at[k] * pixel[c]"),
        "grow": code.loop("I2F.*", "walk.blend(strip", "walk_rows(By<Way::grows>"),
    }
    done = {
        "shrunk": code.loop("STS.U16", "shared.values[walk.to", "walk_rows(By<Way::shrinks>"),
        "grown": code.loop("STS.U16", "shared.values[walk.to", "walk_rows(By<Way::grows>"),
    }
    (chunk,) = [loop for loop in code if loads in loop.loops]
    (band,) = [loop for loop in code if chunk in loop.loops]
    yield part("resample", "once a strip", code.through(setup, band), counts["strips"] * warps)
    yield part("resample", "its place, one warp", setup.through(search), counts["strips"])
    yield part("resample", "search for its crop", search.through(), counts["searched"])
    yield part("resample", "once a band", band.through(chunk, runs, slots), counts["bands"] * warps)
    yield part("resample", "some source rows", chunk.through(loads), counts["chunks"] * warps)
    yield part("resample", "16 bytes in", loads.doing(1, LOAD), counts["loads"])
    read = r"SHF\.R\.W.*", "funnel(from[k], from[k + 1]"
    for (way, groups), count in sorted(counts["walked"].items()):
        code_of_row = walk[way].doing(3 * groups, *read)
        yield part("resample", f"a source row to {way}, {4 * groups} pixels", code_of_row, count)
    for way, loop in done.items():
        yield part("resample", f"an output row {way}", loop.doing(3, "STS.U16"), counts.get(way, 0))
    yield part("resample", "places of runs", runs.through(), counts["runs"])
    yield part("resample", f"{VALUES} values out", slots.doing(1, STORE), counts["slots"])
