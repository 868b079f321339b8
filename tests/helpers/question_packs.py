"""Packs of questions as numbers alone: a pack is a list of rows, a row a list of (image tokens, question lengths)."""

import numpy as np
import torch

ORDINARY = [[(9, [4, 6]), (12, [3, 8, 5])], [(7, []), (10, [2])]]
UNUSUAL = {
    "one image without questions": [[(6, [])]],
    "a question of one token": [[(5, [1])]],
    "an image of one token": [[(1, [1, 1, 1])]],
    "a row of padding": [[(6, [3, 2])], []],
    "many images": [[(1 + i % 3, [1 + i % 2] * (i % 4)) for i in range(20)]],
    "padding longer than a segment of it": [[(90, [50])], [(2, [1])]],
}


def random_pack(seed):
    """1 to 3 rows of up to 5 images; some rows are empty."""
    rng = np.random.default_rng(seed)

    def image():
        return int(rng.integers(1, 14)), rng.integers(1, 10, size=rng.integers(0, 5)).tolist()

    return [[(3, [2])], *([image() for _ in range(rng.integers(0, 6))] for _ in range(rng.integers(0, 3)))]


def index(rows):
    """(image_index, question_index) int64 [B, L], as PackedBatch has them; L is the longest row's length."""
    length = max(sum(part + sum(asked) for part, asked in row) for row in rows)
    image, question = np.full((len(rows), length), -1), np.zeros((len(rows), length), dtype=np.int64)
    count = 0
    for r, row in enumerate(rows):
        place = 0
        for part, asked in row:
            for number, tokens in enumerate([part, *asked]):
                image[r, place : place + tokens], question[r, place : place + tokens] = count, number
                place += tokens
            count += 1
    return image, question


def visible(image, question):
    """bool [B, L, L] by the contract's words: j <= i, of one image, and j in the image part or in i's question."""
    image, question = torch.from_numpy(image), torch.from_numpy(question)
    earlier = torch.ones(image.shape[1], image.shape[1], dtype=torch.bool).tril()
    same = (image[:, :, None] == image[:, None]) & (image[:, None] >= 0)
    return earlier & same & ((question[:, None] == 0) | (question[:, :, None] == question[:, None]))
