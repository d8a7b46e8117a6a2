"""Curves in R^K through samples: a rational one from few, one of pieces from many.

Derivatives along an attribution path have poles close to the real axis wherever the path crosses a
sharp turn of the model. A rational function follows such a peak through a handful of samples, which
no polynomial does. Where there are samples enough, at the nodes of rules that crowd around the
peaks, polynomials of the variable that these rules are even in follow the curve without risk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xsiam.quadrature import Array, Rule, gauss_legendre, sinh_unmap

_MOST_COMPONENTS = 16  # directions of R^K that carry a curve of a few dozen samples
_MOST_SUPPORT = 20  # more support points fit noise, and cost
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)
_DENSE_NODES: Array = ((np.arange(24)[:, None] + (_NODES + 1) / 2) / 24).ravel()
_DENSE_WEIGHTS: Array = np.tile(_WEIGHTS / 48, 24)


class Curve(Protocol):
    """A curve over [0, 1] with values in a subspace of R^K, whose integral is known."""

    def __call__(self, points: Array) -> Array:
        """Evaluate at points [p]: coordinates [p, r]."""
        ...

    def integral(self) -> Array:
        """Integrate over [0, 1]: coordinates [r]."""
        ...


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
        return _barycentric(points, self.support, self.weights, self.values)

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
    values, basis = principal(samples, tolerance, _MOST_COMPONENTS)
    wanted = basis @ integral
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


def principal(samples: Array, least: float, most: int | None = None) -> tuple[Array, Array]:
    """Write samples along the few orthonormal directions of R^K that carry them.

    Args:
        samples: [m, K].
        least: Directions in which they have no more than this size (singular value) are left out.
        most: The most directions.

    Returns:
        Coordinates [m, r] and directions [r, K], r ≥ 1.
    """
    left, singular, basis = np.linalg.svd(samples, full_matrices=False)
    kept = max(1, int((singular[:most] > least).sum()))
    return left[:, :kept] * singular[:kept], basis[:kept]


@dataclass(frozen=True)
class Piece:
    """Samples of a curve at the nodes of a Gauss-Legendre rule on a part of [0, 1].

    It is a polynomial, of α or of the variable that nodes around a peak are even in.

    Attributes:
        left: Where the part begins.
        right: Where it ends.
        rule: The rule, perhaps mapped around a peak, on [0, 1].
        values: The samples, [n, r].

    References:
        Wang and Xiang, "On the convergence rates of Legendre approximation" (2012): the weights.
    """

    left: float
    right: float
    rule: Rule
    values: Array

    def __call__(self, points: Array) -> Array:
        """Evaluate at points [p] within the part: [p, r]."""
        alphas = (points - self.left) / (self.right - self.left)
        return _barycentric(self._even(alphas), *self._support, self.values)

    def integral(self) -> Array:
        """Integrate over the part, [r], as accurately as the rule does."""
        result: Array = (self.right - self.left) * (self.rule.weights.numpy() @ self.values)
        return result

    def _even(self, alphas: Array) -> Array:
        return alphas if self.rule.peak is None else sinh_unmap(alphas, *self.rule.peak)

    @cached_property
    def _support(self) -> tuple[Array, Array]:
        plain = gauss_legendre(self.rule.n_nodes).weights.numpy()
        nodes = self._even(self.rule.nodes.numpy())
        signs = 1 - 2 * (np.arange(len(nodes)) % 2)
        return nodes, signs * np.sqrt(nodes * (1 - nodes) * plain)


@dataclass(frozen=True)
class PiecewiseCurve:
    """A curve of pieces, from left to right."""

    pieces: Sequence[Piece]

    def __call__(self, points: Array) -> Array:
        """Evaluate at points [p]: coordinates [p, r]."""
        edges = np.array([piece.left for piece in self.pieces[1:]])
        where = np.searchsorted(edges, points, side="right")
        result = np.empty((len(points), self.pieces[0].values.shape[1]))
        for number, piece in enumerate(self.pieces):
            inside = where == number
            if inside.any():
                result[inside] = piece(points[inside])
        return result

    def integral(self) -> Array:
        """Integrate over [0, 1]: coordinates [r]."""
        result: Array = np.sum([piece.integral() for piece in self.pieces], axis=0)
        return result


def _barycentric(points: Array, support: Array, weights: Array, values: Array) -> Array:
    """Evaluate Σ w_j f_j / (x − z_j) ÷ Σ w_j / (x − z_j), and f_j where x is z_j."""
    distance = points[:, None] - support
    hit = distance == 0
    cauchy = weights / np.where(hit, 1.0, distance)
    any_hit = hit.any(1)
    cauchy[any_hit] = hit[any_hit]
    result: Array = (cauchy @ values) / cauchy.sum(1)[:, None]
    return result


def _through(points: Array, values: Array, chosen: NDArray[np.bool_]) -> RationalCurve:
    """Return the curve through the chosen samples that fits the others best (linearised)."""
    support, rest = points[chosen], points[~chosen]
    differences = values[~chosen][:, :, None] - values[chosen].T  # [m - k, r, k]
    loewner = differences / (rest[:, None, None] - support)
    weights = np.linalg.svd(loewner.reshape(-1, len(support)), full_matrices=False)[2][-1]
    return RationalCurve(support, values[chosen], weights)
