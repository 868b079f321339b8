"""PackedLayout and fit_grid."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from granvit_kernels import PackedLayout, fit_grid, roi_gather

GRIDS = ((2, 3), (1, 2))


def test_tokens_lie_image_after_image_row_major():
    layout = PackedLayout.from_grids([(2, 3), (1, 2)])
    assert layout.grids.dtype == torch.int32 and layout.grids.tolist() == [[2, 3], [1, 2]]
    assert layout.cu_seqlens.dtype == torch.int32 and layout.cu_seqlens.tolist() == [0, 6, 8]
    assert (layout.num_tokens, layout.max_seqlen, len(layout)) == (8, 6, 2)
    assert layout.image_ids().dtype == torch.int64 and layout.image_ids().tolist() == [0] * 6 + [1] * 2
    assert layout.positions().dtype == torch.int64
    assert layout.positions().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [0, 0], [0, 1]]


def test_no_images():
    layout = PackedLayout.from_grids([])
    assert layout.grids.shape == (0, 2) and layout.cu_seqlens.tolist() == [0]
    assert (layout.num_tokens, layout.max_seqlen) == (0, 0)
    assert layout.image_ids().shape == (0,) and layout.positions().shape == (0, 2)
    assert layout.to_grid(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 4)


def test_grids_as_tensor_and_another_device():
    layout = PackedLayout.from_grids(torch.tensor([[4, 5]], dtype=torch.int16), device="cpu")
    assert layout.grids.tolist() == [[4, 5]] and layout.num_tokens == 20
    moved = layout.to("meta")
    assert moved.device.type == "meta" and (moved.num_tokens, moved.max_seqlen) == (20, 20)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([(2, 3), (0, 4)], r"grids\[1\] is \(0, 4\); both sides must be at least 1"),
        ([(2, 3), (1,)], r"grids is \[\(2, 3\), \(1,\)\]; it takes pairs"),
        ([2, 3], r"grids is \[2, 3\]; it takes pairs"),
        (None, "grids is None; it takes pairs"),
        ([(2**70, 1)], r"grids is \[\(11805\d+\.*\d+, 1\)\]; it takes pairs"),
        (torch.zeros(0, 3, dtype=torch.int64), r"grids has shape \[0, 3\]; it takes \[B, 2\]"),
        (torch.zeros(3, 0, dtype=torch.int64), r"grids has shape \[3, 0\]; it takes \[B, 2\]"),
        ([(1, 1), (2**31, 1)], r"grids\[1\] is \(2147483648, 1\); both sides .* below 2\*\*31"),
        ([(2**32, 2**32)], r"grids\[0\] is \(4294967296, 4294967296\); both sides"),
        ([(2**31 - 1, 2**31 - 1)] * 5, r"grids hold 23058430\d+ tokens together; a layout takes fewer"),
        ([(2, 3, 4)], r"grids has shape \[1, 3\]; it takes \[B, 2\]"),
        (torch.tensor([2, 3]), r"grids has shape \[2\]; it takes \[B, 2\]"),
        ([(2.0, 3.0)], r"grids has dtype torch.float32; it takes integers"),
        ([(2**16, 2**15)], r"grids hold 2147483648 tokens together; a layout takes fewer than 2\*\*31"),
    ],
)
def test_bad_grids(grids, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_grids(grids)


@pytest.mark.parametrize("name", ["grids", "cu_seqlens"])
def test_tensors_that_kernels_would_misread_are_refused(name):
    layout = PackedLayout.from_grids([(2, 3)])
    with pytest.raises(ValueError, match=rf"{name} is int64 \[.*; it takes int32"):
        dataclasses.replace(layout, **{name: getattr(layout, name).long()})


def test_grids_are_known_on_the_host():
    """Wherever the tensors are: on meta every read raises."""
    for layout in (
        PackedLayout.from_grids(GRIDS, device="meta"),
        PackedLayout.from_grids(torch.tensor(GRIDS)).to("meta"),
        pickle.loads(pickle.dumps(PackedLayout.from_grids(GRIDS))).to("meta"),
        copy.deepcopy(PackedLayout.from_grids(GRIDS, device="meta")),
    ):
        assert layout.device.type == "meta" and layout.host_grids == GRIDS
        back = layout.to("cpu")
        assert back.grids.tolist() == [[2, 3], [1, 2]] and back.cu_seqlens.tolist() == [0, 6, 8]
        assert back.to("cpu") is back
    with torch.device("meta"):
        assert PackedLayout.from_grids(GRIDS).device.type == "cpu"
    with FakeTensorMode():  # of tensors without numbers
        layout = PackedLayout.from_grids(GRIDS)
        assert layout.host_grids == GRIDS and len(layout.split(torch.zeros(8, 5))) == 2
        assert isinstance(layout.grids, FakeTensor) and layout.to("meta").host_grids == GRIDS


def test_a_layout_of_its_four_fields_reads_its_grids_when_they_are_needed():
    made = PackedLayout.from_grids(GRIDS)
    layout = PackedLayout(made.grids, made.cu_seqlens, 8, 6)
    assert layout.host_grids == GRIDS
    other = dataclasses.replace(made, grids=torch.tensor([[3, 2], [2, 1]], dtype=torch.int32))
    assert other.host_grids == ((3, 2), (2, 1))
    unread = PackedLayout(made.grids.to("meta"), made.cu_seqlens.to("meta"), 8, 6)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        unread.host_grids  # noqa: B018
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \[2\]; it takes \[3\]"):
        PackedLayout(made.grids, made.cu_seqlens[1:], 8, 6)
    with pytest.raises(ValueError, match=r"grids has shape \[4\]; it takes \[B, 2\]"):
        PackedLayout(made.grids.flatten(), made.cu_seqlens, 8, 6)


def test_split_gives_views_of_each_image():
    layout = PackedLayout.from_grids(GRIDS)
    features = torch.randn(8, 5, requires_grad=True)
    first, second = layout.split(features)
    assert first.shape == (2, 3, 5) and second.shape == (1, 2, 5)
    assert first.data_ptr() == features.data_ptr() and torch.equal(second[0, 1], features[7])
    assert [image.shape for image in layout.split(features[:, 0])] == [(2, 3), (1, 2)]
    assert [image.shape for image in layout.split(features[:, None])] == [(2, 3, 1, 5), (1, 2, 1, 5)]
    second.sum().backward()
    assert features.grad[:6].eq(0).all() and features.grad[6:].eq(1).all()
    assert PackedLayout.from_grids([]).split(torch.zeros(0, 5)) == []
    assert [image.shape for image in layout.to("meta").split(features.to("meta"))] == [(2, 3, 5), (1, 2, 5)]


@pytest.mark.parametrize(("shape", "got"), [((7, 5), r"\[7, 5\]"), ((), r"\[\]")])
def test_split_refuses_what_is_not_packed(shape, got):
    with pytest.raises(ValueError, match=rf"features is float32 {got}; it takes \[T, ...\] with T = 8"):
        PackedLayout.from_grids(GRIDS).split(torch.zeros(shape))


def test_host_grids_compile_nothing_anew():
    """A layout in a compiled function: two graphs serve all, and its host grids, where they are read, are constants."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def run(tokens, layout, boxes, image_index):
        return roi_gather(tokens, layout, boxes, image_index)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for count in (2, 3, 5, 6, 9):
        layout = PackedLayout.from_grids([(2 + i, 3 + count) for i in range(count)])
        arguments = torch.randn(layout.num_tokens, 4), layout, torch.rand(count + 1, 4), torch.zeros(count + 1).int()
        assert torch.equal(compiled(*arguments), run(*arguments))
    assert len(graphs) <= 2

    def means(tokens, layout):
        return torch.stack([image.mean((0, 1)) for image in layout.to(tokens.device).split(tokens)])

    compiled = torch.compile(means, fullgraph=True, backend=backend)
    layout = PackedLayout.from_grids(GRIDS)
    tokens = torch.randn(8, 4)
    assert torch.equal(compiled(tokens, layout), means(tokens, layout))


def test_export_takes_a_layout_s_tensors():
    class Module(torch.nn.Module):
        def forward(self, tokens, grids, cu_seqlens, boxes, image_index):
            layout = PackedLayout(grids, cu_seqlens, tokens.shape[0], tokens.shape[0])
            return roi_gather(tokens, layout, boxes, image_index)

    layout = PackedLayout.from_grids(GRIDS)
    tokens, boxes, index = torch.randn(8, 4), torch.rand(3, 4), torch.zeros(3, dtype=torch.int64)
    program = torch.export.export(Module(), (tokens, layout.grids, layout.cu_seqlens, boxes, index))
    found = program.module()(tokens, layout.grids, layout.cu_seqlens, boxes, index)
    assert torch.equal(found, roi_gather(tokens, layout, boxes, index))


@pytest.mark.gpu
def test_nobody_waits_for_a_layout_on_cuda():
    torch.zeros(1, device="cuda")  # CUDA starts
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layouts = [PackedLayout.from_grids([(i + 1, 3), (2, i + 2)], device="cuda") for i in range(64)]
        layouts += [layout.to("cpu").to("cuda") for layout in layouts]
        shapes = [image.shape for image in layouts[5].split(torch.zeros(layouts[5].num_tokens, 4, device="cuda"))]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert shapes == [(6, 3, 4), (2, 7, 4)]
    for i, layout in enumerate(layouts):  # no buffer was reused too early
        i %= 64
        assert layout.grids.tolist() == [[i + 1, 3], [2, i + 2]]
        assert layout.cu_seqlens.tolist() == [0, 3 * i + 3, 5 * i + 7]
    with pytest.raises(RuntimeError, match="make the layout before"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            PackedLayout.from_grids([(2, 3)], device="cuda")


def test_to_grid_refuses_tensors_elsewhere():
    layout = PackedLayout.from_grids([(2, 3)])
    boxes, index = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="boxes is on meta; it takes cpu"):
        layout.to_grid(boxes.to("meta"), index)
    with pytest.raises(ValueError, match="image_index is on cpu; it takes meta"):
        layout.to("meta").to_grid(boxes.to("meta"), index)


def test_to_grid_scales_by_the_image_of_each_box():
    layout = PackedLayout.from_grids([(2, 3), (10, 20)])
    boxes = torch.tensor([[0.0, 0.5, 1.0, 1.0], [0.25, 0.1, 0.5, 0.9]], dtype=torch.float64)
    scaled = layout.to_grid(boxes, torch.tensor([0, 1], dtype=torch.int32))
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.tensor([[0.0, 1.0, 3.0, 2.0], [5.0, 1.0, 10.0, 9.0]]))


@pytest.mark.parametrize(
    ("boxes", "index", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2, dtype=torch.int64),
            r"boxes is float32 \[2, 3\]; it takes floating-point \[R, 4\]",
        ),
        (torch.zeros(2, 4).int(), torch.zeros(2, dtype=torch.int64), r"boxes is int32 \[2, 4\]"),
        (
            torch.zeros(2, 4),
            torch.zeros(3, dtype=torch.int64),
            r"image_index is int64 \[3\]; it takes int32 or int64 \[2\]",
        ),
        (torch.zeros(2, 4), torch.zeros(2), r"image_index is float32 \[2\]"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), r"image_index holds 1; it takes \[0, 1\)"),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), r"image_index holds -1; it takes \[0, 1\)"),
    ],
)
def test_to_grid_errors(boxes, index, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_grids([(2, 3)]).to_grid(boxes, index)


def test_fit_grid_is_naflex():
    naflex = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    rule = naflex.get_image_size_for_max_num_patches
    generator = torch.Generator().manual_seed(0)
    for height, width, patch, tokens in zip(
        torch.randint(1, 4000, (300,), generator=generator).tolist(),
        torch.randint(1, 4000, (300,), generator=generator).tolist(),
        torch.randint(1, 33, (300,), generator=generator).tolist(),
        torch.randint(1, 2000, (300,), generator=generator).tolist(),
        strict=True,
    ):
        h, w = rule(height, width, patch, tokens)
        assert fit_grid(height, width, patch, tokens) == (h // patch, w // patch)


@pytest.mark.parametrize("bad", ["height", "width", "patch_size", "max_tokens"])
def test_fit_grid_errors(bad):
    arguments = {"height": 10, "width": 10, "patch_size": 4, "max_tokens": 16, bad: 0}
    with pytest.raises(ValueError, match=f"{bad} is 0; it must be at least 1"):
        fit_grid(**arguments)
