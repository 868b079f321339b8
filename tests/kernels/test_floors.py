"""Machine code read without a GPU (bench/sass.py), how often loops run (bench/trips.py), and that the kernels' loops
issue what bench/results/floors.json says."""

import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))  # bench/*.py import one another
import aot  # noqa: E402
import floors  # noqa: E402
import parts  # noqa: E402
import roi_trips  # noqa: E402
import sass  # noqa: E402
import trips  # noqa: E402
from workloads import make_regions  # noqa: E402

from granvit_kernels.ops.roi_gather import triton_geometry as geometry  # noqa: E402

RECORD = json.loads((BENCH / "results" / "floors.json").read_text())

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")

# ---- code ----

LISTING = """
	.section	.text.rows,"ax",@progbits
        .global         rows
rows:
.text.rows:
	//## File "{source}", line 1
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_0:
	//## File "{source}", line 2 inlined at "{source}", line 3
	//## File "{source}", line 3
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
        /*0040*/                   IMAD R8, R8, R9, RZ ;
.L_x_1:
	//## File "{source}", line 4
        /*0050*/                   FFMA R5, R4, R6, R5 ;
        /*0060*/                   FFMA R5, R4, R7, R5 ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/              @!P3 BRA `(.L_x_2) ;
        /*0090*/                   FFMA R5, R4, R7, R5 ;
.L_x_2:
	//## File "{source}", line 1
        /*00a0*/              @!P4 BRA `(.L_x_3) ;
        /*00b0*/                   CALL.REL.NOINC `($__slow) ;
        /*00c0*/                   MOV R5, R6 ;
.L_x_3:
        /*00d0*/               @P5 STG.E.64 desc[UR4][R2.64], R4 ;
        /*00e0*/               @P6 BRA `(.L_x_0) ;
        /*00f0*/                   EXIT ;
$__slow:
        /*0100*/                   MUFU.RCP R6, R5 ;
        /*0110*/                   RET.REL.NODEC R2 `(rows) ;
.L_x_4:
        /*0120*/                   BRA `(.L_x_4);
.L_x_5:
	.section	.text.other,"ax",@progbits
.text.other:
        /*0000*/                   EXIT ;
"""


@pytest.fixture
def rows(tmp_path):
    source = tmp_path / "kernel.py"
    source.write_text("def rows():\n    load(row)\n    for row in rows:\n        for column in columns:\n")
    return sass.functions(LISTING.format(source=source), lambda name: name == "rows")["rows"]


def opcodes(code):
    return [instruction.opcode.split(".")[0] for instruction in code]


def test_loops_and_what_lies_around_them(rows):
    outer, inner = rows.nested(2)
    assert opcodes(inner.instructions) == ["FFMA", "FFMA", "BRA"]
    assert opcodes(rows.through(outer)) == ["LDC", "EXIT", "EXIT"]  # the first EXIT has a guard: a warp may go on
    with pytest.raises(ValueError, match="not 1, one inside the other"):
        rows.nested(1)


def test_the_least_way_skips_what_it_may(rows):
    outer, inner = rows.nested(2)
    end = ["BRA", "STG", "BRA"]  # not by way of the call
    assert opcodes(outer.through()) == ["LDG", "BRA", *end]
    assert opcodes(outer.through(inner)) == ["LDG", "BRA", "IMAD", "BRA", *end]  # and the branch after the inner loop


def test_a_way_that_does_so_many_steps(rows):
    outer, _ = rows.nested(2)
    for count in (2, 3, 4, 5):  # the inner loop does two at once, and there is a third after it
        assert opcodes(outer.doing(count, "FFMA")).count("FFMA") == count
    assert opcodes(outer.doing(1, "FFMA")).count("FFMA") == 2  # no way has one
    with pytest.raises(ValueError, match="no way through the code has 1 MUFU"):
        outer.doing(1, "MUFU.*")


def test_loops_are_told_by_their_source(rows):
    outer, _ = rows.nested(2)
    assert rows.loop("LDG.*", "load(row)", "for row in rows") is outer
    with pytest.raises(ValueError, match="0 loops have LDG"):
        rows.loop("LDG.*", "for column")
    with pytest.raises(ValueError, match="2 loops have FFMA"):
        rows.loop("FFMA", "for column")


def test_kinds_of_instructions(rows):
    kinds = sass.counted([instruction for region in rows for instruction in region.instructions])
    assert kinds == {
        "branch": 8, "float": 3, "move, select, compare": 2, "integer": 1, "load, 128 bits": 1, "store, 64 bits": 1,
        "guarded": 7,
    }  # fmt: skip


# ---- trips ----


@contextmanager
def interpreted():
    """What Triton's interpreter does meanwhile: ({kernel: its arguments}, {(kernel, argument): loads from it})."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    run, load = InterpretedFunction.run, InterpreterBuilder.create_masked_load
    launches, loads, places = {}, Counter(), []

    def launch(self, *args, grid, warmup, **options):
        name = self.fn.__name__
        launches[name] = {**dict(zip(self.arg_names, args, strict=False)), **options}
        places[:] = [
            ((name, argument), tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
            for argument, tensor in launches[name].items()
            if isinstance(tensor, torch.Tensor)
        ]
        run(self, *args, grid=grid, warmup=warmup, **options)

    def counted(self, pointers, *rest):
        address = int(pointers.data.flat[0])
        loads.update(key for key, begin, end in places if begin <= address < end)
        return load(self, pointers, *rest)

    with mock.patch.object(InterpretedFunction, "run", launch):
        with mock.patch.object(InterpreterBuilder, "create_masked_load", counted):
            yield launches, loads


interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not set")


@pytest.fixture
def made():
    return make_regions([(5, 7), (2, 3), (7, 2)], 2, "cpu")


@interpreter
def test_trips_of_roi_gather(made):
    samples = 2
    case = aot.Case("roi_gather", "float32", (("channels", 80), ("sampling_ratio", samples), ("bins", 3)))
    with interpreted() as (launches, loads):
        for direction in aot.directions(case, made.layout, made.boxes, made.image_index).values():
            direction()
    parts, tile = launches["forward"]["PARTS"], launches["backward"]["TILE"]
    assert launches["backward"]["PARTS"] == parts and parts * launches["forward"]["BLOCK_C"] >= 80  # in one program
    counts = roi_trips.forward(made, 3, samples)
    columns = counts["next"] + counts["next, on"] + 2 * (counts["anew"] + counts["anew, on"])
    assert loads["forward", "tokens"] == parts * 2 * samples * columns  # with rows that have no share
    assert columns < counts["cells"] <= 2 * samples * columns
    counts = roi_trips.backward(made, tile, 3, samples, trips.WARP)
    assert loads["backward", "extents"] == 4 * counts["groups"]  # a region's first and last row and column
    assert loads["backward", "regions"] == counts["touch"] > counts["rowless"]
    assert loads["backward", "places"] == samples * (2 * counts["touch"] - counts["rowless"])
    assert loads["backward", "grad"] == parts * counts["bins"] > 0
    assert counts["tile rows"] > len(trips.TokenTiles(made, tile)) and 0 < counts["idle"] < counts["groups"]
    before, _, counted, written = trips.tile_tokens(made, tile, launches["_tile_tokens"]["BLOCK"])
    assert loads["_tile_tokens", "image_index"] == counted + written
    assert loads["_tile_tokens", "cu_seqlens"] == 2 * (before + len(made.grids))


@interpreter
def test_trips_of_adaptive_roi_gather(made):
    """Each step of a search asks where a sample lies, and each of its last loop where two do; each span asks, too."""
    case = aot.Case("roi_gather", "float32", (("channels", 32), ("sampling_ratio", 0), ("bins", 1)))
    directions = aot.directions(case, made.layout, made.boxes, made.image_index)
    positions = mock.Mock(side_effect=geometry._rising)
    counts = roi_trips.forward_any_ratio(made, 1, 0, trips.WARP)
    with interpreted() as (launches, loads), mock.patch.object(geometry, "_rising", positions):
        directions["forward"]()
        asked = positions.call_count
        directions["backward"]()
    asked = asked, positions.call_count - asked
    steps = sum(int(n) for name in ("row trips", "column trips") for n in counts[name] * torch.tensor([1, 1, 2]))
    assert loads["forward_any_ratio", "tokens"] == counts["cells"]
    assert asked[0] == steps + 2 * 2 * len(made.boxes)  # spans of a row of bins, and of its bin
    counts = roi_trips.backward(made, launches["backward"]["TILE"], 1, 0, trips.WARP)
    assert loads["backward", "boxes"] == 4 * counts["touch"] and loads["backward", "grad"] == counts["bins"]
    steps = sum(int(n) for name in ("row trips", "column trips") for n in counts[name] * torch.tensor([1, 1, 2]))
    assert asked[1] == steps + 2 * 2 * len(made.boxes)  # spans of a region along y and x


@interpreter
def test_trips_of_region_attention(made):
    case = aot.Case("region_attention", "float32", (("queries", 3), ("heads", 2), ("size", 16)))
    with interpreted() as (launches, loads):
        for direction in aot.directions(case, made.layout, made.boxes, made.image_index).values():
            direction()
    for kernel in ("forward_walk", "backward_walk"):
        assert loads[kernel, "key"] == 2 * trips.walked_blocks(made, launches[kernel]["BLOCK_N"])
    arguments = launches["backward_tokens"]
    counts = trips.attention_tokens(made, arguments["BLOCK_T"], 3, arguments["BLOCK_M"])
    assert loads["backward_tokens", "image_regions"] == 2 * counts["blocks"]
    assert loads["backward_tokens", "query"] == 2 * counts["computed"] > 0


@interpreter
def test_trips_of_region_pool(made):
    case = aot.Case("region_pool", "float32", (("queries", 3), ("heads", 8), ("size", 40)))
    with interpreted() as (launches, loads):
        for direction in aot.directions(case, made.layout, made.boxes, made.image_index).values():
            direction()
    chunks, row_blocks = trips.blocks(40, launches["pool"]["BLOCK_C"]), 2
    assert loads["weigh", "logits"] == 2 * trips.walked_blocks(made, launches["weigh"]["BLOCK_N"])  # both ways
    assert loads["pool", "value"] == chunks * trips.walked_blocks(made, launches["pool"]["BLOCK_N"])
    for kernel, chunks in (("backward_logits", 1), ("backward_value", launches["backward_value"]["chunks"])):
        arguments = launches[kernel]
        counts = trips.pool_tokens(made, arguments["BLOCK_T"], arguments["LANES"])
        programs = row_blocks if kernel == "backward_logits" else 1
        assert loads[kernel, "image_regions"] == programs * chunks * counts["looks"]
        assert loads[kernel, "delta"] == row_blocks * chunks * counts["met"] > 0


@pytest.mark.parametrize(("source", "outputs"), [(614, 512), (1228, 512), (76, 512), (37, 16), (512, 512)])
def test_taps_of_resampling(source, outputs):
    """They hold every source pixel with a weight (design.md's formula), and not two more."""
    step = source / outputs
    for i in range(outputs):
        away = torch.arange(source) + 0.5 - (i + 0.5) * step
        weighs = (away.abs() < max(step, 1.0)).nonzero()[:, 0]
        first, taps = trips._first_tap(source, outputs, i), trips._taps(source, outputs)
        assert first <= weighs[0] and weighs[-1] < first + taps <= source
        assert taps <= len(weighs) + 2


def test_trips_of_pack_patches():
    counts = trips.copied([(3, 16), (1, 16)], parts.VALUES)
    assert counts["blocks"] == 4 * 2 and counts["searched"] == counts["blocks"]  # one step tells two crops apart
    assert counts["values"] * trips.WARP * 12 == 64 * 768  # 12 values a thread
    assert 64 * 768 <= counts["slots"] * trips.WARP * parts.VALUES < 64 * 768 * 1.1
    partial = trips.copied([(3, 3)], parts.VALUES)  # tiles that are not full
    assert partial["blocks"] == 3 and partial["searched"] == 0 and partial["values"] * trips.WARP * 12 == 9 * 768


def test_trips_of_resampling():
    """Three pictures of 614 x 614 to 512 x 512: a block makes a band, of 4 patches, and reads some 20 rows for it."""
    counts = trips.resampled([(614, 614)] * 3, [(32, 32)] * 3, parts.VALUES)
    assert counts["strips"] == counts["bands"] == counts["chunks"] == 3 * 32 * 8
    assert counts["shrunk"] * trips.WARP == 3 * 512 * 512 and "grown" not in counts
    ((way, groups), rows), = counts["walked"].items()  # fmt: skip
    assert (way, groups) == ("shrink", 1)
    source, warps = 614 / 512 * 16, 3 * 32 * 8 * 2
    assert warps * source < rows <= warps * (source + 4)
    assert counts["loads"] * trips.WARP * 16 > 3 * 614 * 614 * 3
    assert 3 * 32 * 32 * 768 <= counts["slots"] * trips.WARP * parts.VALUES < 3 * 32 * 32 * 768 * 1.1
    assert counts["weights"] == {("row", 3): 3 * 16, ("column", 3): 3 * 16}
    # 1228 columns of 5 taps take two groups of pixels each; a window of 64 columns is wider than 16 rows fit in.
    wide = trips.resampled([(512, 5000)], [(32, 32)], parts.VALUES)
    assert wide["chunks"] > 2 * wide["bands"] and [groups for _, groups in wide["walked"]] == [5]
    grown = trips.resampled([(100, 100)], [(32, 32)], parts.VALUES)
    assert grown["grown"] * trips.WARP == 512 * 512 and list(grown["walked"]) == [("grow", 1)]
    # Many pictures: a block makes several bands, and reads the rows between them once.
    many = trips.resampled([(614, 614)] * 256, [(32, 32)] * 256, parts.VALUES)
    assert many["bands"] == 256 * 32 * 8 == 8 * many["strips"]
    assert sum(many["walked"].values()) < 256 / 3 * rows


# ---- the record ----


def test_the_record_adds_up():
    assert Counter(row["operator"] for row in RECORD["rows"]) == {
        "roi_gather": 32, "region_attention": 16, "region_pool": 16, "pack_patches": 6,
    }  # fmt: skip
    issues = {"H100": 132 * 4 * 1.83e9, "H200": 132 * 4 * 1.83e9}
    copies = {"H100": 3.0e12, "H200": 4.3e12}
    for row in RECORD["rows"]:
        issued = sum(part["instructions"] * part["trips"] for part in row["parts"])
        assert row["instructions"] == round(issued) > 0
        for part in row["parts"]:
            kinds = {kind: count for kind, count in part["kinds"].items() if kind != "guarded"}
            assert sum(kinds.values()) % part["instructions"] == 0  # of several steps at once, or of one
        for chip in issues:
            assert row["issue_seconds"][chip] == pytest.approx(issued / issues[chip])
            assert row["memory_seconds"][chip] == pytest.approx(row["bytes"] / copies[chip])
            longer = "issue" if row["issue_seconds"][chip] > row["memory_seconds"][chip] else "memory"
            assert row["binds"][chip] == longer


def test_loops_issue_what_is_recorded():
    """Over all trips, within a tenth: more is a slower kernel, and less a record to write anew (make floors). What is
    under a twentieth of its row on every workload may change."""
    if triton.__version__ != RECORD["versions"]["triton"]:
        pytest.skip(f"recorded with triton {RECORD['versions']['triton']}, and this is {triton.__version__}")
    with aot.compilers(2) as pool:
        compiled = [pool.submit(rows, "D") for rows in (floors.roi_rows, floors.attention_rows, floors.pool_rows)]
        rows = [row for future in compiled for row in future.result()]

    def issued_by_part(rows):
        for row in rows:
            for part in row["parts"]:
                issued = part["instructions"] * part["trips"]
                name = row["operator"], row["direction"], row["shape"], part["kernel"], part["part"]
                yield name, issued, issued / row["instructions"]

    main = {name for name, _, share in issued_by_part(RECORD["rows"]) if share > 0.05}
    recorded = [row for row in RECORD["rows"] if row["workload"] == "D" and row["operator"] != "pack_patches"]
    wanted = {name: pytest.approx(issued, rel=0.1) for name, issued, _ in issued_by_part(recorded) if name in main}
    assert len(wanted) > 20
    assert {name: issued for name, issued, _ in issued_by_part(rows) if name in main} == wanted
