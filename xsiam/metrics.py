"""Correlations of scores with labels and other means, exact over any number of processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from xsiam.errors import InputError

__all__ = [
    "Anisotropy",
    "Correlations",
    "PairCorrelation",
    "PairMean",
    "first_of_each",
    "pearson",
    "spearman",
    "undefined_reason",
]


class Correlations(NamedTuple):
    """Correlations over all pairs, or the reason why there are none.

    Attributes:
        spearman: Spearman's rank correlation, float64 scalar, None where undefined.
        pearson: Pearson's correlation, float64 scalar, None where undefined.
        undefined: Why they are undefined, None where they are defined.
        n_pairs: Number of distinct pairs.
    """

    spearman: Tensor | None
    pearson: Tensor | None
    undefined: str | None
    n_pairs: int


def pearson(scores: Tensor, labels: Tensor) -> Tensor:
    """Return Pearson's correlation of two [n] tensors, computed in float64.

    Raises:
        InputError: If it is undefined: fewer than two pairs, values that are all equal, or values
            that are not finite.

    Example:
        >>> pearson(torch.tensor([0.1, 0.4, 0.3]), torch.tensor([0.0, 1.0, 0.5])).item() > 0.9
        True
    """
    _check_defined(scores, labels)
    return _pearson(scores.double(), labels.double())


def spearman(scores: Tensor, labels: Tensor) -> Tensor:
    """Return Spearman's rank correlation of two [n] tensors; ties get their average rank.

    torchmetrics' function of that name adds 1e-6 to the denominator and rounds to the input's type;
    this one is exact in float64.

    Raises:
        InputError: If it is undefined, as for :func:`pearson`.
    """
    _check_defined(scores, labels)
    return _pearson(_ranks(scores), _ranks(labels))


def undefined_reason(scores: Tensor, labels: Tensor, called: str = "labels") -> str | None:
    """Return why the correlation of two [n] tensors is undefined, None where it is defined.

    Args:
        scores: One tensor, [n].
        labels: The other, [n].
        called: What to call the other.

    Raises:
        InputError: If the tensors are not one-dimensional and of equal length.
    """
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise InputError(
            "Expected scores and labels to be one-dimensional and equally many, but got shapes "
            f"{tuple(scores.shape)} and {tuple(labels.shape)}."
        )
    if len(scores) < 2:
        return f"a correlation needs 2 pairs or more, but there are {len(scores)}"
    for name, values in (("scores", scores), (called, labels)):
        finite = torch.isfinite(values)
        if not finite.all():
            return f"{int((~finite).sum())} of {len(values)} {name} are not finite"
        if (values == values[0]).all():
            return f"all {len(values)} {name} are equal to {values[0].item():g}"
    return None


class PairCorrelation(Metric):
    """Correlate scores with labels over all batches and processes.

    Scores are gathered, never correlations averaged: the mean of two Spearmans is not a Spearman.
    A pair that a sampler repeats to fill up a batch counts once, by its index.

    Args:
        called: What to call the labels, for the reason why a correlation is undefined.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    scores: list[Tensor]
    labels: list[Tensor]
    index: list[Tensor]

    def __init__(self, called: str = "labels") -> None:
        super().__init__()
        self.called = called
        for name in ("scores", "labels", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor, index: Tensor) -> None:
        """Take in a batch.

        Args:
            scores: The model's scores, [n].
            labels: Gold scores, [n].
            index: Number of each pair in its data set, [n] integers.
        """
        self.scores.append(scores.detach().float())
        self.labels.append(labels.detach().float())
        self.index.append(index.detach())

    def compute(self) -> Correlations:
        """Return both correlations over every pair seen on any process."""
        scores, labels = dim_zero_cat(self.scores), dim_zero_cat(self.labels)
        first = first_of_each(dim_zero_cat(self.index))
        scores, labels = scores[first].cpu(), labels[first].cpu()
        reason = undefined_reason(scores, labels, self.called)
        if reason is not None:
            return Correlations(None, None, reason, len(scores))
        return Correlations(spearman(scores, labels), pearson(scores, labels), None, len(scores))


class PairMean(Metric):
    """Average batch means over all pairs of all batches and processes, however uneven they are.

    torchmetrics' `MeanMetric` either drops NaN (a diverged loss would look fine) or, with that
    switched off, ignores the weights.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    total: Tensor
    n_pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "n_pairs"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, mean: Tensor, n_pairs: int) -> None:
        """Take in the mean of a batch of ``n_pairs`` pairs."""
        self.total += mean.detach().float() * n_pairs
        self.n_pairs += n_pairs

    def compute(self) -> Tensor:
        """Return the mean over all pairs."""
        mean: Tensor = self.total / self.n_pairs
        return mean


class Anisotropy(Metric):
    """Mean cosine of all pairs of different embeddings, over all batches and processes.

    With unit vectors u_i that is (|Σ u_i|² − Σ |u_i|²) / (n (n − 1)), so that no pair is formed and
    nothing is sampled. It is exact up to rounding in float32. A text that comes several times
    counts as often; an embedding of length 0 has cosines of 0.

    Near 0 embeddings point in all directions; at 1 all of them point in one.

    Args:
        embedding_dim: K, dimension of the embeddings.

    References:
        Ethayarajh, "How Contextual are Contextualized Word Representations?" (EMNLP 2019), section
        4.1, estimates the same mean from a sample of pairs.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    total: Tensor
    squares: Tensor
    n_embeddings: Tensor

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        for name, shape in (("total", (embedding_dim,)), ("squares", ())):
            self.add_state(name, default=torch.zeros(shape), dist_reduce_fx="sum")
        zero = torch.zeros((), dtype=torch.int64)
        self.add_state("n_embeddings", default=zero, dist_reduce_fx="sum")

    def update(self, embeddings: Tensor) -> None:
        """Take in embeddings, [n, K]."""
        units = torch.nn.functional.normalize(embeddings.detach().float(), dim=-1)
        self.total += units.sum(dim=0)
        self.squares += units.square().sum()
        self.n_embeddings += len(units)

    def compute(self) -> Tensor:
        """Return the mean, a float64 scalar; NaN for fewer than two or embeddings with NaN."""
        total, squares, n = (
            v.cpu().double() for v in (self.total, self.squares, self.n_embeddings)
        )
        mean: Tensor = (total @ total - squares) / (n * (n - 1))
        return mean


def _check_defined(scores: Tensor, labels: Tensor) -> None:
    reason = undefined_reason(scores, labels)
    if reason is not None:
        raise InputError(f"Expected a defined correlation, but {reason}.")


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of two centred float64 vectors."""
    x, y = x - x.mean(), y - y.mean()
    # Scaled first: the square of a tiny or huge deviation would leave the range of float64.
    x, y = x / x.abs().max(), y / y.abs().max()
    correlation: Tensor = (x / x.norm()) @ (y / y.norm())
    return correlation.clamp(-1.0, 1.0)


def _ranks(values: Tensor) -> Tensor:
    """Return float64 ranks from 1; equal values share the mean of their ranks."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = last - (counts.double() - 1) / 2
    return ranks[group]


def first_of_each(index: Tensor) -> Tensor:
    """Return the place of the first occurrence of each distinct value, in order of the values."""
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return order[new]
