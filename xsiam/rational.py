"""Rational interpolation of a curve in R^K from few samples: what polynomials cannot follow.

Derivatives along an attribution path have poles close to the real axis wherever the path crosses a
sharp turn of the model. A rational function follows such a peak through a handful of samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MOST_COMPONENTS = 16  # directions of R^K that carry a curve of a few dozen samples
_MOST_SUPPORT = 20  # more support points fit noise, and cost
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)
_DENSE_NODES: Array = ((np.arange(24)[:, None] + (_NODES + 1) / 2) / 24).ravel()
_DENSE_WEIGHTS: Array = np.tile(_WEIGHTS / 48, 24)


@dataclass(frozen=True)
class RationalCurve:
    """A rational interpolant in barycentric form, with values in a subspace of R^K.

    Attributes:
        support: Points z_j where it interpolates, [k].
        values: Its values there along orthonormal directions of R^K, [k, r].
        weights: Barycentric weights w_j, [k].
    """

    support: Array
    values: Array
    weights: Array

    def __call__(self, points: Array) -> Array:
        """Evaluate at points [p]: coordinates [p, r]."""
        distance = points[:, None] - self.support
        hit = distance == 0
        cauchy = self.weights / np.where(hit, 1.0, distance)
        any_hit = hit.any(1)
        cauchy[any_hit] = hit[any_hit]
        result: Array = (cauchy @ self.values) / cauchy.sum(1)[:, None]
        return result

    def integral(self) -> Array:
        """Integrate over [0, 1]: coordinates [r]."""
        result: Array = _DENSE_WEIGHTS @ self(_DENSE_NODES)
        return result


def rational_curve(
    points: Array, samples: Array, integral: Array, tolerance: float
) -> RationalCurve:
    """Fit a rational curve by the AAA algorithm, with one denominator for all components.

    AAA adds support points one by one. Few samples let a pole slip in between them, so that the
    curve is taken whose integral over [0, 1], which is known, comes closest.

    Args:
        points: Distinct sample points in [0, 1], [m], at least two.
        samples: Values there, [m, K], not all zero.
        integral: The integral over [0, 1], [K].
        tolerance: Misfit at a sample below which no support point is added.

    References:
        Nakatsukasa, Sète and Trefethen, "The AAA algorithm for rational approximation" (2018).
        The choice by the integral is ours.
    """
    left, singular, basis = np.linalg.svd(samples, full_matrices=False)
    kept = max(1, int((singular[:_MOST_COMPONENTS] > tolerance).sum()))
    values = left[:, :kept] * singular[:kept]
    wanted = basis[:kept] @ integral
    misfit = np.linalg.norm(values - values.mean(0), axis=1)
    chosen = np.zeros(len(points), dtype=bool)
    best, smallest = None, np.inf
    most = min(len(points) - 1, _MOST_SUPPORT)
    while best is None or (misfit.max() > tolerance and chosen.sum() < most):
        chosen[misfit.argmax()] = True
        curve = _through(points, values, chosen)
        misfit = np.where(chosen, 0.0, np.linalg.norm(values - curve(points), axis=1))
        difference = float(np.linalg.norm(curve.integral() - wanted))
        if best is None or difference < smallest:
            best, smallest = curve, difference
    return best


def _through(points: Array, values: Array, chosen: NDArray[np.bool_]) -> RationalCurve:
    """Return the curve through the chosen samples that fits the others best (linearised)."""
    support, rest = points[chosen], points[~chosen]
    differences = values[~chosen][:, :, None] - values[chosen].T  # [m - k, r, k]
    loewner = differences / (rest[:, None, None] - support)
    weights = np.linalg.svd(loewner.reshape(-1, len(support)), full_matrices=False)[2][-1]
    return RationalCurve(support, values[chosen], weights)
