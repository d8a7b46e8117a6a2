"""Estimates with bootstrap intervals, and what they say about a claim made beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap

from xsiam.analysis.base import NotApplicableError

__all__ = ["Finding", "Interval", "Verdict", "interval", "judge", "standardised_mean"]

Verdict = Literal["confirmed", "contradicted", "undecided"]
Statistic = Callable[..., Any]

SMALLEST_SAMPLE = 5
"""Fewest observations of which an interval is given."""


@dataclass(frozen=True)
class Interval:
    """An estimate, the interval it lies in, and of how many observations.

    Attributes:
        estimate: The statistic of the sample.
        low: Lower end of the interval.
        high: Upper end.
        n: Observations.
    """

    estimate: float
    low: float
    high: float
    n: int

    def row(self) -> dict[str, float | int]:
        """Return the columns of a table."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high, "n": self.n}

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


@dataclass(frozen=True)
class Finding:
    """What an analysis says about a claim that was made before it was run.

    Attributes:
        claim: A sentence that can be wrong.
        source: Where it is claimed: "P1" (EMNLP 2023), "P2" (EACL 2024) or "ours".
        verdict: "confirmed" where the interval lies on the claimed side of the threshold,
            "contradicted" where it lies on the other, else "undecided".
        quantity: What was estimated, in words, with its unit.
        interval: The estimate.
        threshold: What the interval was held against.
    """

    claim: str
    source: str
    verdict: Verdict
    quantity: str
    interval: Interval
    threshold: float


def interval(
    values: ArrayLike | Sequence[ArrayLike],
    statistic: Statistic = np.mean,
    *,
    paired: bool = False,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return a statistic with its percentile bootstrap interval.

    Args:
        values: Independent observations [n]; with ``paired`` several sequences of n values each,
            which are resampled together.
        statistic: Takes the values (several arrays with ``paired``) and ``axis``, as NumPy's
            functions do. A function without ``axis`` is called resample by resample.
        paired: Whether there are several values of each observation.
        n_resamples: How often the observations are drawn, with replacement.
        confidence: Probability that the interval is made for.
        seed: Of the draws.

    Raises:
        NotApplicableError: If there are fewer than 5 observations, or one is not finite.

    Note:
        Observations must be independent: token pairs of one text pair are not. Reduce each text
        pair (or each template) to one value first.
    """
    data = [np.asarray(v, dtype=np.float64) for v in (values if paired else [values])]  # type: ignore[union-attr]
    n = len(data[0])
    if n < SMALLEST_SAMPLE:
        raise NotApplicableError(
            f"an interval needs {SMALLEST_SAMPLE} observations or more, but there are n = {n}"
        )
    bad = sum(int((~np.isfinite(v)).sum()) for v in data)
    if bad:
        raise NotApplicableError(f"{bad} of n = {n} observations are not finite")
    with np.errstate(invalid="ignore", divide="ignore"):
        found = bootstrap(
            data,
            statistic,
            paired=paired,
            method="percentile",
            n_resamples=n_resamples,
            confidence_level=confidence,
            rng=np.random.default_rng(seed),
            batch=max(1, 4_000_000 // n),
        )
        estimate = float(statistic(*data))
    draws = found.bootstrap_distribution
    undefined = int((~np.isfinite(draws)).sum())
    if not math.isfinite(estimate) or undefined > 0.05 * n_resamples:
        raise NotApplicableError(
            f"the statistic is undefined on {undefined} of {n_resamples} resamples of n = {n}"
        )
    ends = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(estimate, float(ends[0]), float(ends[1]), n)


def judge(
    claim: str,
    quantity: str,
    found: Interval,
    *,
    source: str,
    above: float | None = None,
    below: float | None = None,
) -> Finding:
    """Hold an estimate against a threshold that was stated before.

    Args:
        claim: What is claimed.
        quantity: What was estimated.
        found: The estimate.
        source: Who claims it.
        above: The claim holds if the quantity is above this.
        below: The claim holds if the quantity is below this; give one of both.
    """
    if (above is None) == (below is None):
        raise ValueError(f"Expected one of `above` and `below`, but got {above} and {below}.")
    threshold = above if above is not None else below
    assert threshold is not None
    over, under = found.low > threshold, found.high < threshold
    holds, fails = (over, under) if above is not None else (under, over)
    verdict: Verdict = "confirmed" if holds else "contradicted" if fails else "undecided"
    return Finding(claim, source, verdict, quantity, found, threshold)


def standardised_mean(differences: Any, axis: int = -1) -> Any:
    """Return mean by standard deviation of paired differences (Cohen's d_z), an effect size."""
    values = np.asarray(differences, dtype=np.float64)
    return values.mean(axis=axis) / values.std(axis=axis, ddof=1)
