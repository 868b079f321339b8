"""What features tell of labels: a linear probe, nearest neighbours and retrieval."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
HELD_OUT = 5
"""Every so many-th training image chooses the penalty."""

_BLOCK = 256  # queries at a time


def fit_linear(x: Tensor, y: Tensor, classes: int, penalty: float, start: Tensor | None = None) -> Tensor:
    """Multinomial logistic regression: weights and, in the last row, biases [D + 1, classes], by L-BFGS.

    Minimises mean cross entropy + penalty / 2 * the weights' sum of squares; biases go free. That is scikit-learn's
    LogisticRegression with C = 1 / (N * penalty). x: [N, D], y: int64 [N]. start: weights to begin with.
    """
    weights = x.new_zeros(x.shape[1] + 1, classes) if start is None else start.clone()
    weights.requires_grad_()
    steps = torch.optim.LBFGS(
        [weights], max_iter=300, history_size=20, tolerance_grad=1e-5, tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        steps.zero_grad()
        value = F.cross_entropy(scores(weights, x), y) + penalty / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    steps.step(loss)
    return weights.detach()


def scores(weights: Tensor, x: Tensor) -> Tensor:
    """Logits [N, classes]."""
    return torch.addmm(weights[-1], x, weights[:-1])


def linear_probe(x: Tensor, y: Tensor, images: np.ndarray, classes: int) -> tuple[Tensor, float]:
    """The weights of `fit_linear` on all training regions, with that of PENALTIES that names most regions right of
    every HELD_OUT-th image when fitted on the others' (of equal ones the strongest), and that penalty.

    images: [N], the image of each region.
    """
    held_out = torch.from_numpy(np.unique(images, return_inverse=True)[1] % HELD_OUT == 0).to(x.device)
    best, penalty, weights = -1.0, PENALTIES[0], None
    if 0 < held_out.sum() < len(y):
        for candidate in PENALTIES:
            weights = fit_linear(x[~held_out], y[~held_out], classes, candidate, weights)
            right = (scores(weights, x[held_out]).argmax(1) == y[held_out]).float().mean().item()
            if right > best:
                best, penalty = right, candidate
    return fit_linear(x, y, classes, penalty), penalty


def knn_scores(queries: Tensor, x: Tensor, y: Tensor, classes: int) -> Tensor:
    """Votes for each class [Q, classes] of the NEIGHBOURS training regions that are nearest by cosine, each weighed
    exp(cosine / TEMPERATURE), as in DINO (Caron et al. 2021, after Wu et al. 2018)."""
    votes = queries.new_zeros(len(queries), classes)
    x = F.normalize(x, dim=1)
    for begin in range(0, len(queries), _BLOCK):
        cosines = F.normalize(queries[begin : begin + _BLOCK], dim=1) @ x.T
        nearest, places = cosines.topk(min(NEIGHBOURS, len(x)), dim=1)
        votes[begin : begin + _BLOCK].scatter_add_(1, y[places], (nearest / TEMPERATURE).exp())
    return votes


def is_among(scored: Tensor, truth: Tensor, k: int) -> np.ndarray:
    """bool [N]: whether fewer than k other classes score as high as the true one; a tie counts against it."""
    own = scored.gather(1, truth[:, None])
    return ((scored >= own).sum(1) <= k).cpu().numpy()


def neighbours(queries: np.ndarray, x: Tensor, images: np.ndarray) -> Tensor:
    """int64 [Q, R]: for regions `queries` (places in x [R, D]) all regions, the nearest by cosine first, and at the end
    those of the query's own image [R], itself among them."""
    x = F.normalize(x, dim=1)
    own = torch.from_numpy(images[queries][:, None] == images[None]).to(x.device)
    cosines = (x[torch.from_numpy(queries).to(x.device)] @ x.T).masked_fill(own, -torch.inf)
    return cosines.sort(dim=1, descending=True, stable=True).indices


def retrieval(x: Tensor, y: Tensor, images: np.ndarray) -> dict[str, np.ndarray]:
    """Each region as a query among the regions of other images, those of its label being relevant.

    Returns, float [R], NaN for a query without any relevant region: r1 and r5, whether one of the nearest or of the
    five nearest is relevant; map, the average precision of all regions in the order of their cosines.
    """
    values = {name: np.full(len(y), np.nan) for name in ("r1", "r5", "map")}
    for begin in range(0, len(y), _BLOCK):
        queries = np.arange(begin, min(begin + _BLOCK, len(y)))
        order = neighbours(queries, x, images)
        labels = y.to(order.device)
        others = torch.from_numpy((images[queries][:, None] != images[None]).sum(1)).to(order.device)
        ranks = torch.arange(1, len(y) + 1, device=order.device)
        relevant = (labels[order] == labels[queries][:, None]) & (ranks <= others[:, None])
        known = (relevant.sum(1) > 0).cpu().numpy()
        precisions = relevant.double().cumsum(1) / ranks
        average = (precisions * relevant).sum(1) / relevant.sum(1).clamp(min=1)
        for name, value in zip(values, (relevant[:, :1].any(1), relevant[:, :5].any(1), average), strict=True):
            values[name][queries[known]] = value.double().cpu().numpy()[known]
    return values


def random_retrieval(y: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """What `retrieval` gives on average for an order by lot: r1, r5 and map.

    With R relevant regions of N: r5 is 1 - C(N - R, 5) / C(N, 5), and the average precision
    h + (1 - h) (R - 1) / (N - 1) with h = (1 + 1/2 + ... + 1/N) / N.
    """
    expected: dict[str, list[float]] = {"r1": [], "r5": [], "map": []}
    of_label = np.bincount(y)
    pairs, counts = np.unique(np.stack([images, y], 1), axis=0, return_counts=True)
    per_image = dict(zip(*np.unique(images, return_counts=True), strict=True))
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(y) + 1))])
    for (image, label), queries in zip(pairs.tolist(), counts.tolist(), strict=True):
        n, r = len(y) - per_image[image], int(of_label[label]) - queries
        if not r:
            continue
        missed = np.prod([max(0, n - r - i) / (n - i) for i in range(min(5, n))])
        h = harmonic[n] / n
        precision = h + (1 - h) * (r - 1) / (n - 1) if n > 1 else 1.0
        for name, value in zip(expected, (r / n, 1 - missed, precision), strict=True):
            expected[name] += [float(value)] * queries
    return {name: float(np.mean(values)) for name, values in expected.items() if values}
