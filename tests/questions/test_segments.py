import numpy as np
import pytest
import torch
from question_packs import ORDINARY, UNUSUAL, index, random_pack, visible

from granvit.questions.segments import PADDING, attended_pairs, find_segments


@pytest.mark.parametrize("rows", [*UNUSUAL.values(), ORDINARY, *(random_pack(seed) for seed in range(20))])
def test_segments_are_the_mask(rows):
    """Causal within each segment, and from an image's questions to its image part: together just the mask, each pair
    once."""
    image, question = index(rows)
    segments = find_segments(image, question)
    tokens = image.size
    got = np.zeros((tokens, tokens), dtype=int)
    ends = segments.cu_segments.tolist()
    assert ends[0] == 0 and ends[-1] == tokens
    for a, b in zip(ends, ends[1:], strict=False):
        assert 0 < b - a <= segments.max_segment
        got[a:b, a:b] += np.tri(b - a, dtype=int)
    asked, parts = segments.cu_questions.tolist(), segments.cu_images.tolist()
    assert len(asked) == len(parts) and asked[-1] == len(segments.question_tokens)
    assert parts[-1] == len(segments.image_tokens)
    for i in range(len(asked) - 1):
        queries = segments.question_tokens[asked[i] : asked[i + 1]].numpy()
        keys = segments.image_tokens[parts[i] : parts[i + 1]].numpy()
        assert 0 < len(queries) <= segments.max_questions and 0 < len(keys) <= segments.max_image
        got[np.ix_(queries, keys)] += 1
    real = image.ravel() >= 0
    expected = np.zeros_like(got)
    for row, mask in enumerate(visible(image, question).numpy()):
        here = slice(row * image.shape[1], (row + 1) * image.shape[1])
        expected[here, here] = mask
    assert np.array_equal(got[real], expected[real])
    assert (got[~real][:, real] == 0).all(), "padding is a segment of its own"


def test_padding_costs_little():
    image = np.full((2, 1000), -1)
    segments = find_segments(image, np.zeros_like(image))
    assert segments.max_segment == PADDING and len(segments.cu_segments) == 1 + 2 * -(-1000 // PADDING)
    assert segments.max_questions == segments.max_image == 0 and len(segments.question_tokens) == 0


def test_nothing():
    segments = find_segments(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64))
    assert segments.cu_segments.tolist() == [0] and segments.max_segment == 0


def test_attended_pairs_counts_the_mask():
    assert attended_pairs(3, []) == 6 and attended_pairs(1, [1]) == 3 and attended_pairs(2, [1, 2]) == 3 + 3 + 7
    for seed in range(10):
        rows = random_pack(seed)
        pairs = sum(attended_pairs(part, asked) for row in rows for part, asked in row)
        assert pairs == int(visible(*index(rows)).sum())


def test_to_moves_every_tensor():
    segments = find_segments(*index(ORDINARY)).to("meta")
    assert all(value.is_meta for value in vars(segments).values() if isinstance(value, torch.Tensor))
    assert segments.cu_segments.dtype == segments.cu_images.dtype == segments.cu_questions.dtype == torch.int32
    assert segments.question_tokens.dtype == segments.image_tokens.dtype == torch.int64
