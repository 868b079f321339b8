"""PackedLayout and fit_grid."""

import dataclasses

import pytest
import torch

from granvit_kernels import PackedLayout, fit_grid


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
