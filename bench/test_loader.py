"""The loader alone, from encoded pictures to patches and token ids, beside transformers' processor in a DataLoader.

Both read the same rows of the sample set at 512 pixels, decode every picture, bring it to at most `patches` patches,
normalise it and tokenise six questions of each image, with two processes for it, and hand on float32 patches. The peer
pads, as its processor does; ours packs. A process's start is timed on both sides.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from granvit.data.batches import PackLoader
from granvit.data.loader import GranDataset
from granvit.data.sample import SceneConfig, build_sample, cached_sample
from granvit.data.schema import parse_row
from granvit.toy.tiny import TinyLLM, TinyVision, build_tiny
from granvit_kernels import fit_grid, pack_patches

IMAGES, QUESTIONS = 1920, 6
TASKS = {"bbox2caption": 1.0, "caption2bbox": 1.0, "global_caption": 1.0}
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def data() -> GranDataset:
    return GranDataset(cached_sample(600, scenes=SceneConfig(long_side=512)))


def processor_of(data: GranDataset, patches: int):
    texts = [region.caption for i in range(len(data)) for region in data.annotations(i).regions]
    return build_tiny(texts, TinyVision(), TinyLLM(), max_image_tokens=patches)[1]


class Processed(Dataset):
    """One row a sample, as transformers' processors are used: an image and its questions' ids."""

    def __init__(self, data: GranDataset, processor, patches: int) -> None:
        from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

        self.rows = data.rows.cast_column("image", data.rows.features["image"].__class__(decode=True))
        self.images = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=patches)
        self.processor = processor

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index % len(self.rows)]
        picture: Image.Image = row["image"].convert("RGB")
        asked = self.processor.questions(parse_row(row, decode=False), list(TASKS))[:QUESTIONS]
        texts = [question.prompt + "\n" + question.answer for question in asked]
        ids = self.processor.tokenizer(texts)["input_ids"]
        return {**self.images(picture, return_tensors="pt"), "ids": torch.tensor(sum(ids, []))}


def padded(samples: list[dict]) -> dict:
    batch = {key: torch.cat([sample[key] for sample in samples]) for key in samples[0] if key != "ids"}
    return batch | {"ids": torch.nn.utils.rnn.pad_sequence([sample["ids"] for sample in samples], batch_first=True)}


@pytest.mark.parametrize("patches", [256, 1024])
def test_loader(compare, data, patches):
    processor = processor_of(data, patches)
    tokens = {"images": 0, "all": 0}

    def ours() -> None:
        loader = PackLoader(data, processor, TASKS, capacity=8192, packs=4, questions=QUESTIONS, workers=2)
        left = IMAGES
        tokens.update(images=0, all=0)
        for batch in loader:
            images = batch.packed.images
            grids = [fit_grid(*image.shape[:2], 16, patches) for image in images]
            packed, _ = pack_patches(images, 16, HALF, HALF, grids=grids, dtype=torch.float32)
            tokens["images"] += len(packed)
            tokens["all"] += int((batch.packed.image_index >= 0).sum())
            left -= len(images)
            if left <= 0:
                return

    def theirs() -> None:
        loader = DataLoader(Processed(data, processor, patches), 32, num_workers=2, collate_fn=padded)
        for _ in loader:
            pass

    ours()
    workload = (
        f"{IMAGES} pictures of up to 512x512, {tokens['images']} patches, {tokens['all']} tokens with their questions"
    )
    peer = "transformers in a DataLoader"
    compare(
        "loader", f"up to {patches} patches", workload, ours, {peer: lambda: theirs},
        count=IMAGES, aims={peer: ("ratio", 3)}, rounds=3,
    )  # fmt: skip


def test_generator(compare, tmp_path):
    """The sample set is drawn and written by one process, at 512 pixels."""
    folders = (tmp_path / str(index) for index in range(100))
    made = 256

    def draw() -> None:
        build_sample(next(folders), made, workers=0, scenes=SceneConfig(long_side=512))

    workload = f"{made} pictures of the sample set, scenes of 512 pixels"
    aims = {"granvit": ("per_second", 100)}
    compare("sample_set", "one process", workload, draw, count=made, aims=aims, rounds=5)
