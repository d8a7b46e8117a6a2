"""How accurate attributions are, over a sample of pairs: one naming for monitor and evaluation."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from xsiam.result import PairAttribution

# What one pair contributes, by name; `summarise_values` turns them into the logged keys.
PairValues = dict[str, float]

KEYS = (
    "completeness_error_mean",
    "completeness_error_max",
    "convergence_delta_abs_mean",
    "convergence_delta_abs_max",
    "converged_fraction",
    "n_nodes_mean",
    "negative_share",
    "main_effects_abs_mean",
    "intercept_mean",
    "seconds",
)


def layer_key(layer: int, name: str) -> str:
    """Return the key of a per-layer metric: ``attribution/layer_4/completeness_error_mean``."""
    return f"attribution/layer_{layer}/{name}"


def sample_pairs(n_total: int, n_pairs: int, seed: int) -> list[int]:
    """Draw rows without replacement: sorted, all of them if there are fewer than ``n_pairs``.

    The draw depends on the arguments alone and leaves the global random state as it is.
    """
    return sorted(random.Random(seed).sample(range(n_total), min(n_pairs, n_total)))


def values_of(result: PairAttribution) -> PairValues:
    """Return what one pair contributes to the summary, as plain numbers."""
    effects = float(result.main_effects_a.abs().sum() + result.main_effects_b.abs().sum())
    return {
        "completeness_error": result.completeness_error,
        "convergence_delta_abs": abs(result.convergence_delta),
        "converged": float(result.converged),
        "n_nodes": (result.n_nodes_a + result.n_nodes_b) / 2,
        "negative_share": result.negative_share,
        "main_effects_abs": effects / (result.matrix.shape[0] + result.matrix.shape[1]),
        "intercept": result.intercept,
    }


def summarise_values(values: Sequence[Mapping[str, float]], seconds: float) -> dict[str, float]:
    """Summarise the values of pairs under the names of ``KEYS``.

    Args:
        values: One mapping per pair, from :func:`values_of`; at least one.
        seconds: Time the attributions took.
    """

    def mean(name: str) -> float:
        return sum(v[name] for v in values) / len(values)

    def largest(name: str) -> float:
        return max(v[name] for v in values)

    return {
        "completeness_error_mean": mean("completeness_error"),
        "completeness_error_max": largest("completeness_error"),
        "convergence_delta_abs_mean": mean("convergence_delta_abs"),
        "convergence_delta_abs_max": largest("convergence_delta_abs"),
        "converged_fraction": mean("converged"),
        "n_nodes_mean": mean("n_nodes"),
        "negative_share": mean("negative_share"),
        "main_effects_abs_mean": mean("main_effects_abs"),
        "intercept_mean": mean("intercept"),
        "seconds": seconds,
    }


def summarise(results: Sequence[PairAttribution], seconds: float) -> dict[str, float]:
    """Summarise the attributions of one layer: see :func:`summarise_values`."""
    return summarise_values([values_of(result) for result in results], seconds)
