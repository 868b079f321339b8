"""CIDEr-D: the n-grams that a caption shares with the true one, rare ones first (Vedantam et al. 2015, arXiv
1411.5726).

Of n-grams of each length n = 1..4 a caption has a vector: for each n-gram w, tf-idf = (how often it stands there) *
log(N / (how many of the N truths have it)). With c an answer's vector, s its truth's, and l their lengths in words,

    CIDEr-D_n = 10 * exp(-(l(c) - l(s))^2 / (2 * 6^2)) * sum_w min(c_w, s_w) * s_w / (|c| |s|)

and CIDEr-D is the mean over n. The minimum, and the penalty on length, are what -D adds to a cosine: a word said again
and again earns nothing. As in the authors' program an n-gram that no truth has weighs log(N).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import hypot, log

import numpy as np

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0

Ngram = tuple[str, ...]


def cider_d(truths: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each answer against its one truth, both as words: float64 [N], from 0 to 10.

    Raises ValueError where there are not as many answers as truths.
    """
    if len(truths) != len(answers):
        raise ValueError(f"each truth takes an answer; got {len(truths)} truths and {len(answers)} answers")
    cosines = np.zeros(len(truths))  # summed over the orders
    for order in ORDERS:
        true_counts = [_ngrams(truth, order) for truth in truths]
        truths_with = Counter(ngram for counts in true_counts for ngram in counts)
        for i, (counts, answer) in enumerate(zip(true_counts, answers, strict=True)):
            truth = _tf_idf(counts, truths_with, len(truths))
            cosines[i] += _clipped_cosine(_tf_idf(_ngrams(answer, order), truths_with, len(truths)), truth)
    longer = np.array([len(answer) - len(truth) for truth, answer in zip(truths, answers, strict=True)])
    return 10 / len(ORDERS) * cosines * np.exp(-(longer**2) / (2 * SIGMA**2))


def _ngrams(words: Sequence[str], order: int) -> Counter[Ngram]:
    """How often each n-gram of `order` words stands there."""
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def _tf_idf(counts: Mapping[Ngram, int], truths_with: Counter[Ngram], truths: int) -> dict[Ngram, float]:
    return {ngram: count * log(truths / max(1, truths_with[ngram])) for ngram, count in counts.items()}


def _clipped_cosine(answer: Mapping[Ngram, float], truth: Mapping[Ngram, float]) -> float:
    """0 where a vector is zero."""
    norms = hypot(*answer.values()) * hypot(*truth.values())
    shared = sum(min(answer[ngram], weight) * weight for ngram, weight in truth.items() if ngram in answer)
    return shared / norms if norms else 0.0
