"""Makes roi_gather_torchvision.json: what torchvision's roi_align gives, for tests without torchvision.

`python tests/kernels/make_roi_gather_torchvision.py`, in an environment with torchvision (torch 2.11.0 and
torchvision 0.26.0). Tokens and the outputs' gradients come from a formula of their index, so that the file
holds only boxes, outputs and gradients.
"""

import json
from pathlib import Path

import torch

FILE = Path(__file__).with_name("roi_gather_torchvision.json")
CHANNELS = 3


def wave(*shape: int) -> torch.Tensor:
    """Numbers about as large as unit-normal ones, equal on every machine to float32's last bits."""
    count = torch.Size(shape).numel()
    return (1.5 * torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898)).float().reshape(shape)


def main() -> None:
    import torchvision

    generator = torch.Generator().manual_seed(0)
    cases = []
    for sampling_ratio, output_size in ((2, (7, 7)), (0, (7, 7)), (3, (2, 5)), (1, (1, 1)), (-1, (4, 3))):
        grids = [(9, 12), (1, 1), (5, 3), (16, 8)]
        starts, tokens = [0], sum(h * w for h, w in grids)
        for h, w in grids:
            starts.append(starts[-1] + h * w)
        image_index = torch.randint(4, (14,), generator=generator)
        sides = torch.tensor([grids[i] for i in image_index.tolist()]).flip(1).repeat(1, 2)
        boxes = torch.rand(14, 4, generator=generator) * sides
        upright = 8 if sampling_ratio > 0 else 14  # torchvision fails on adaptive inverted boxes
        corners = boxes[:upright].view(upright, 2, 2)
        boxes[:upright] = torch.cat([corners.amin(1), corners.amax(1)], 1)
        boxes[8] = torch.tensor([1.0, 1.0, 1.0, 1.0])  # empty
        boxes[9] = torch.tensor([-3.0, -2.0, 30.0, 40.0])  # around its image
        boxes[10] = torch.tensor([50.0, 50.0, 60.0, 60.0])  # outside
        boxes[11] = torch.tensor([0.0, 0.0, 1.0, 1.0])  # one patch
        packed = wave(tokens, CHANNELS).requires_grad_(True)
        outputs = []
        for box, image in zip(boxes, image_index.tolist(), strict=True):
            feature = packed[starts[image] : starts[image + 1]].unflatten(0, grids[image]).permute(2, 0, 1)
            found = torchvision.ops.roi_align(
                feature[None].contiguous(), [box[None]], output_size, 1.0, sampling_ratio, aligned=True
            )
            outputs.append(found[0].permute(1, 2, 0))
        output = torch.stack(outputs)
        output.backward(wave(*output.shape))
        cases.append(
            {
                "grids": grids,
                "sampling_ratio": sampling_ratio,
                "output_size": output_size,
                "image_index": image_index.tolist(),
                "boxes": boxes.tolist(),
                "output": [round(x, 6) for x in output.flatten().tolist()],
                "gradient": [round(x, 6) for x in packed.grad.flatten().tolist()],
            }
        )
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    FILE.write_text(json.dumps({"versions": versions, "cases": cases}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
