"""PackedLayout: where each image's tokens lie in a packed tensor; and the rule that sizes an image's grid."""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch
from torch import Tensor

from . import checks


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Grids of B images whose tokens lie one after another in a packed tensor [T, ...].

    Image i owns the rows cu_seqlens[i]:cu_seqlens[i + 1], row-major over its grid of (h, w) patches.

    Fields: grids int32 [B, 2] (h, w) · cu_seqlens int32 [B + 1] · num_tokens = T and max_seqlen, the longest
    image's tokens, as Python ints. Make one with `from_grids`: it keeps the grids on the host too (`host_grids`), so
    that nobody has to ask a device for them. A layout made of its four fields reads them off `grids` when they are
    first needed, which waits for the device.
    """

    grids: Tensor
    cu_seqlens: Tensor
    num_tokens: int
    max_seqlen: int

    def __post_init__(self) -> None:
        for name in ("grids", "cu_seqlens"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int32:  # kernels take its address, and would read it as int32
                raise ValueError(f"{name} is {checks.describe(tensor)}; it takes int32")
        if self.grids.dim() != 2 or self.grids.shape[1] != 2:
            raise ValueError(f"grids has shape {list(self.grids.shape)}; it takes [B, 2], (h, w) an image")
        if self.cu_seqlens.shape != (len(self) + 1,):
            raise ValueError(
                f"cu_seqlens has shape {list(self.cu_seqlens.shape)}; it takes [{len(self) + 1}], one more than images"
            )

    @classmethod
    def from_grids(
        cls, grids: Sequence[Sequence[int]] | Tensor, device: torch.device | str | None = None
    ) -> PackedLayout:
        """Layout of images with these (h, w), in this order; an empty list is valid.

        grids: B pairs, or an integer tensor [B, 2] (one on a device costs a synchronisation).
        device: where the tensors go; by default where `grids` is, the CPU for a list. Nobody waits for a copy to CUDA.
        Raises ValueError for another shape or dtype, a side under 1, or 2**31 tokens and more; RuntimeError while a
        CUDA graph is captured on that device.
        """
        sides = _sides(grids)
        if sides and not (min(sides) >= 1 and max(sides) < 2**31):
            image = next(i for i, side in enumerate(sides) if not 1 <= side < 2**31) // 2
            raise ValueError(
                f"grids[{image}] is {tuple(sides[2 * image : 2 * image + 2])}; both sides must be at least 1 and "
                "below 2**31"
            )
        if device is None:
            device = grids.device if isinstance(grids, Tensor) else "cpu"
        return cls._on(torch.device(device), sides)

    @classmethod
    def of_tensors(
        cls, host_grids: tuple[tuple[int, int], ...], grids: Tensor, cu_seqlens: Tensor
    ) -> PackedLayout:
        """Layout of images with these (h, w), around tensors that hold it or that a kernel is about to fill."""
        lengths = [h * w for h, w in host_grids]
        layout = cls(grids, cu_seqlens, sum(lengths), max(lengths, default=0))
        # No field: torch.compile would compile anew for every image's size, and `replace` keep it beside other grids.
        object.__setattr__(layout, "host_grids", host_grids)
        return layout

    @classmethod
    def _on(cls, device: torch.device, sides: Sequence[int]) -> PackedLayout:
        """sides: h and w of image 0, of image 1 and so on, each in 1..2**31 - 1."""
        heights, widths = sides[::2], sides[1::2]
        ends = list(accumulate(map(operator.mul, heights, widths), initial=0))
        if ends[-1] >= 2**31:
            raise ValueError(f"grids hold {ends[-1]} tokens together; a layout takes fewer than 2**31")
        pin = device.type == "cuda" and torch.cuda.is_initialized()
        if pin and torch.cuda.is_current_stream_capturing():  # replays would read memory that is no longer ours
            raise RuntimeError("a CUDA graph can't capture PackedLayout.from_grids or .to: make the layout before")

        def copied(numbers: Sequence[int]) -> Tensor:
            host = torch.tensor(numbers, dtype=torch.int32, device="cpu")
            # Pinned memory goes back to torch's allocator, which waits for the copy's event before it reuses it.
            return (host.pin_memory() if pin else host).to(device, non_blocking=True)

        # Two copies: views of one buffer have offsets, for which torch.compile compiles once more.
        return cls.of_tensors(tuple(zip(heights, widths, strict=True)), copied(sides).view(-1, 2), copied(ends))

    @cached_property
    def host_grids(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of each image as Python ints."""
        return tuple(map(tuple, self.grids.tolist()))

    def __len__(self) -> int:
        """Number of images, B."""
        return self.grids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.grids.device

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout with its tensors on `device`. To CUDA it is copied as from_grids does it."""
        device = torch.empty(0, device=device).device  # "cuda" with its number
        return self if device == self.device else self._on(device, list(chain.from_iterable(self.host_grids)))

    def split(self, features: Tensor) -> list[Tensor]:
        """Packed features [T, ...] image by image: B views [h, w, ...], which gradients flow through.

        Raises ValueError where features don't begin with the layout's T tokens.
        """
        if features.dim() < 1 or len(features) != self.num_tokens:
            raise ValueError(f"features is {checks.describe(features)}; it takes [T, ...] with T = {self.num_tokens}")
        images = features.split([h * w for h, w in self.host_grids])
        return [image.unflatten(0, grid) for image, grid in zip(images, self.host_grids, strict=True)]

    def image_ids(self) -> Tensor:
        """int64 [T]: which image each token belongs to."""
        lengths = self.cu_seqlens.diff().long()
        images = torch.arange(len(self), device=self.device)
        return torch.repeat_interleave(images, lengths, output_size=self.num_tokens)

    def positions(self) -> Tensor:
        """int64 [T, 2]: each token's (row, column) in its image's grid."""
        images = self.image_ids()
        within = torch.arange(self.num_tokens, device=self.device) - self.cu_seqlens[:-1].long()[images]
        widths = self.grids[:, 1].long()[images]
        return torch.stack((within // widths, within % widths), dim=1)

    def to_grid(self, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Boxes relative to their image -> boxes in patch units, as the operators take them.

        boxes [R, 4]: xyxy in [0, 1] of the image, floating point.
        image_index [R]: int32 or int64, the image of each.
        Returns float32 [R, 4], xyxy, image i spanning [0, w] x [0, h]. No gradient.
        Raises ValueError for other shapes, dtypes or devices and, on the CPU, for an index outside [0, B).
        """
        checks.kinds(self, boxes=boxes, image_index=image_index)
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ValueError(f"boxes is {checks.describe(boxes)}; it takes floating-point [R, 4]")
        checks.image_index_shape(image_index, boxes.shape[0])
        checks.same_device(self.device, boxes=boxes, image_index=image_index)
        checks.image_index_values(image_index, len(self))
        sides = self.grids[image_index.long()].flip(1).to(torch.float32)
        return boxes.detach().to(torch.float32) * sides.repeat(1, 2)


def _sides(grids: Sequence[Sequence[int]] | Tensor) -> list[int]:
    """h and w of image 0, of image 1 and so on. Raises ValueError for what is no table [B, 2] of whole numbers."""
    table = grids
    if not isinstance(grids, Tensor):
        try:
            rows = [tuple(grid) for grid in grids]
            if set(map(len, rows)) <= {2}:
                with suppress(TypeError):  # for what is no whole number
                    return array("q", chain.from_iterable(rows)).tolist()
            table = torch.tensor(rows, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):  # no pairs, ragged ones, other things in them
            raise ValueError(f"grids is {checks.shown(grids)}; it takes pairs (h, w) of whole numbers") from None
    if table.shape == (0,):
        return []
    if table.dim() != 2 or table.shape[1] != 2:
        raise ValueError(f"grids has shape {list(table.shape)}; it takes [B, 2], (h, w) an image")
    if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
        raise ValueError(f"grids has dtype {table.dtype}; it takes integers")
    return list(chain.from_iterable(table.tolist()))


def fit_grid(height: int, width: int, patch_size: int, max_tokens: int) -> tuple[int, int]:
    """Grid (h, w) of an image with h * w <= max_tokens, its aspect ratio about kept: SigLIP2 NaFlex's rule.

    The largest scale at which both sides, rounded up to whole patches, still fit, found by the same bisection
    as transformers' `get_image_size_for_max_num_patches`, so that both give the same grid. Small images are
    scaled up. height, width, patch_size: pixels. Raises ValueError where an argument is under 1.
    """
    for name, value in (
        ("height", height), ("width", width), ("patch_size", patch_size), ("max_tokens", max_tokens)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")

    def patches(scale: float, side: int) -> int:
        return max(1, math.ceil(side * scale / patch_size))

    precision = 1e-5
    low, high = precision / 10, 100.0
    while high - low >= precision:
        scale = (low + high) / 2
        if patches(scale, height) * patches(scale, width) <= max_tokens:
            low = scale
        else:
            high = scale
    return patches(low, height), patches(low, width)
