"""Statistics that compare two rankings, matrices or models; arrays in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from xsiam.analysis.context import Context
from xsiam.analysis.statistics import SMALLEST_SAMPLE
from xsiam.reading import AttributedText

__all__ = [
    "DiscordantShare",
    "estimate_row",
    "maximal_score",
    "pearson_along",
    "score_bins",
    "spearman_along",
    "top_overlap",
]

Array = NDArray[np.float64]


def pearson_along(x: ArrayLike, y: ArrayLike, axis: int = -1) -> Any:
    """Return Pearson's correlation along an axis; nan where one side is constant."""
    values_x, values_y = (np.asarray(v, dtype=np.float64) for v in (x, y))
    left = values_x - values_x.mean(axis=axis, keepdims=True)
    right = values_y - values_y.mean(axis=axis, keepdims=True)
    constant = (np.ptp(values_x, axis=axis) == 0) | (np.ptp(values_y, axis=axis) == 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        units = []
        for side in (left, right):
            scaled = side / np.abs(side).max(axis=axis, keepdims=True)  # squares do not underflow
            units.append(scaled / np.linalg.norm(scaled, axis=axis, keepdims=True))
        return np.where(constant, np.nan, np.sum(units[0] * units[1], axis=axis))


def spearman_along(x: ArrayLike, y: ArrayLike, axis: int = -1) -> Any:
    """Return Spearman's rank correlation along an axis, ties by average rank; nan as above."""
    return pearson_along(rankdata(x, axis=axis), rankdata(y, axis=axis), axis=axis)


def top_overlap(x: ArrayLike, y: ArrayLike, share: float) -> float:
    """Return the Jaccard index of the entries of largest absolute value of two arrays.

    Args:
        x: One array.
        y: Another of the same shape.
        share: How much of the entries are taken, 0 < share <= 1; at least one is. Of equal values
            the first are.

    Returns:
        |both| / |either|, in [0, 1]. Two random choices of a share p have about p / (2 − p).
    """
    left, right = (np.abs(np.asarray(v, dtype=np.float64)).ravel() for v in (x, y))
    if left.shape != right.shape:
        raise ValueError(f"Expected arrays of one size, but got {left.size} and {right.size}.")
    n = max(1, int(np.ceil(share * left.size - 1e-9)))
    chosen = [set(np.argsort(-values, kind="stable")[:n].tolist()) for values in (left, right)]
    return len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1])


class DiscordantShare:
    """The share of the orderings of two observations by x that y has the other way round.

    Two observations of equal x have no ordering; equal y count as half. It is (1 − γ) / 2 of
    Goodman and Kruskal's γ where nothing is tied.

    Args:
        x: What orders, [n].
        y: What is held against it, [n].

    Example:
        >>> float(DiscordantShare([1, 2, 3], [1, 3, 2])(np.arange(3)))  # one of three
        0.3333333333333333
    """

    def __init__(self, x: ArrayLike, y: ArrayLike) -> None:
        order_x, order_y = (
            np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, float), np.asarray(y, float))
        )
        self._ordered = (order_x != 0).astype(np.float64)
        self._wrong = self._ordered * (1 - order_x * order_y) / 2

    def __call__(self, rows: ArrayLike, axis: int = -1) -> Any:
        """Return the share for resamples, given by the numbers of the observations they drew.

        Args:
            rows: Numbers 0 … n − 1, [..., m].
            axis: The last one: the others are resamples.
        """
        drawn = np.asarray(rows, dtype=np.int64)
        flat = drawn.reshape(-1, drawn.shape[axis])
        n = len(self._ordered)
        counts = np.zeros((len(flat), n))
        np.add.at(counts, (np.arange(len(flat))[:, None], flat), 1.0)
        wrong, ordered = (np.sum(counts @ m * counts, axis=1) for m in (self._wrong, self._ordered))
        with np.errstate(invalid="ignore", divide="ignore"):
            return (wrong / ordered).reshape(drawn.shape[:-1])


def maximal_score(a: AttributedText, b: AttributedText) -> float:
    """Return |ẽ(a)| |ẽ(b)| / n, which no score of two texts exceeds: 1 of cosines."""
    return float(a.embedding.norm() * b.embedding.norm()) / (a.norm * b.norm)


def score_bins(scores: ArrayLike, n_bins: int) -> list[tuple[str, NDArray[np.int64]]]:
    """Return bins of about equally many observations, lowest first: a name, and the members.

    Args:
        scores: [n]; equal ones are in one bin.
        n_bins: Most bins; there are fewer where each would hold less than the smallest sample.
    """
    values = np.asarray(scores, dtype=np.float64)
    n_bins = max(1, min(n_bins, len(values) // SMALLEST_SAMPLE))
    inner = np.quantile(values, np.arange(1, n_bins) / n_bins)
    numbers = np.searchsorted(inner, values, side="right")
    bins: list[tuple[str, NDArray[np.int64]]] = []
    for number in np.unique(numbers):
        members = np.flatnonzero(numbers == number)
        low, high = values[members].min(), values[members].max()
        bins.append((f"{len(bins) + 1}: {low:.2f} to {high:.2f}", members))
    return bins


def estimate_row(context: Context, values: Sequence[float | None]) -> dict[str, Any]:
    """Return the mean of the defined values with its interval, as columns.

    Returns:
        estimate, low and high (None where fewer than the smallest sample are defined), n (defined)
        and undefined (how many are not).
    """
    known = [value for value in values if value is not None]
    missing = len(values) - len(known)
    if len(known) < SMALLEST_SAMPLE:
        return {"estimate": None, "low": None, "high": None, "n": len(known), "undefined": missing}
    return {**context.interval(known).row(), "undefined": missing}
