"""Each operator beside what one would write in plain PyTorch, image by image: `kernels benchmark` runs these."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark

BINS = 7
PATCH = 16


class Regions:
    """Images of one size, boxes inside them: what the region operators' benchmarks share."""

    seed = 0

    def make(self, *shape):
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def setup(self):
        on_gpu = self.device == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self.images, self.side, self.heads, self.size = (64, 32, 12, 64) if on_gpu else (2, 16, 2, 16)
        self.layout = self.kernel.PackedLayout.from_grids([(self.side, self.side)] * self.images, device=self.device)
        count = 6 * self.images
        low, extent = torch.rand(2, count, 2).unbind()
        extent = 0.2 + 0.6 * extent
        low = low * (1 - extent)
        self.boxes = (torch.cat([low, low + extent], dim=1) * self.side).to(self.device)
        self.index = torch.arange(count, device=self.device) // 6
        self.place = self.layout, self.boxes, self.index

    def by_image(self, tokens):
        """(the image's tokens, the share of each of its cells that each of its boxes covers [6, side, side])."""
        cell = torch.arange(self.side, device=self.device)
        for part, boxes in zip(tokens.split(self.side**2), self.boxes.split(6), strict=True):
            overlap = torch.minimum(boxes[:, None, 2:], cell[:, None] + 1) - torch.maximum(
                boxes[:, None, :2], cell[:, None]
            )
            across, down = overlap.clamp(min=0).unbind(2)
            yield part, down[:, :, None] * across[:, None, :], boxes


class RoiGather(Regions, Benchmark):
    def setup(self):
        super().setup()
        self.tokens = self.make(self.layout.num_tokens, self.heads * self.size)

    def benchmark_forward(self):
        self.out = self.kernel.roi_gather(self.tokens, *self.place)

    def verify_forward(self):
        features = []
        samples = (torch.arange(2 * BINS, device=self.device) + 0.5) / (2 * BINS)
        for part, _, boxes in self.by_image(self.tokens):
            image = part.unflatten(0, (self.side, self.side)).permute(2, 0, 1)[None]
            at = boxes[:, None, :2] + samples[:, None] * (boxes[:, None, 2:] - boxes[:, None, :2])
            x, y = (at * 2 / self.side - 1).unbind(2)
            grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3).to(image.dtype)
            rows = F.grid_sample(image, grid.flatten(0, 1)[None], padding_mode="border", align_corners=False)
            features.append(F.avg_pool2d(rows[0].unflatten(1, (6, -1)).transpose(0, 1), 2))
        return torch.cat(features).permute(0, 2, 3, 1)


class RegionAttention(Regions, Benchmark):
    def setup(self):
        super().setup()
        self.query = self.make(4, self.heads, self.size)
        self.key, self.value = self.make(2, self.layout.num_tokens, self.heads, self.size)

    def benchmark_forward(self):
        self.out = self.kernel.region_attention(self.query, self.key, self.value, *self.place, coverage=True)

    def verify_forward(self):
        attended = []
        query = self.query.transpose(0, 1).repeat(1, 6, 1)  # a region after the other
        values = self.value.split(self.side**2)
        for (key, shares, _), value in zip(self.by_image(self.key), values, strict=True):
            bias = shares.flatten(1).log().to(query.dtype).repeat_interleave(4, 0)
            rows = F.scaled_dot_product_attention(query, key.transpose(0, 1), value.transpose(0, 1), attn_mask=bias)
            attended.append(rows.unflatten(1, (6, 4)).permute(1, 2, 0, 3))
        return torch.cat(attended)


class RegionPool(Regions, Benchmark):
    def setup(self):
        super().setup()
        self.logits = self.make(self.layout.num_tokens, 1, self.heads)
        self.value = self.make(self.layout.num_tokens, 1, self.heads * self.size)

    def benchmark_forward(self):
        self.out = self.kernel.region_pool(self.logits, self.value, *self.place, coverage=True)

    def verify_forward(self):
        pooled = []
        values = self.value.split(self.side**2)
        for (logits, shares, _), value in zip(self.by_image(self.logits), values, strict=True):
            weights = (logits[:, 0].T.float() + shares.flatten(1).log()[:, None]).softmax(2).to(value.dtype)
            pooled.append((weights @ value[:, 0])[:, None])
        return torch.cat(pooled)


class PackPatches(Benchmark):
    seed = 0

    def setup(self):
        side, count = (512, 64) if self.device == "cuda" else (64, 4)
        self.grid = side // PATCH * 3 // 4
        self.images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8).to(self.device).unbind()

    def benchmark_resized(self):
        grids, half = [(self.grid, self.grid)] * len(self.images), [0.5] * 3
        self.out = self.kernel.pack_patches(self.images, PATCH, half, half, grids=grids, dtype=torch.float32)[0]

    def verify_resized(self):
        planes = torch.stack(self.images).permute(0, 3, 1, 2).float()
        side = self.grid * PATCH
        resized = F.interpolate(planes, (side, side), mode="bilinear", antialias=True) / 127.5 - 1
        tiles = resized.unflatten(3, (self.grid, PATCH)).unflatten(2, (self.grid, PATCH))
        return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2)
