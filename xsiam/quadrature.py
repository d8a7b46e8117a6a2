"""Quadrature on [0, 1]: fixed rules, each with an embedded rule of lower degree.

Nodes are built from integers (``torch.arange(1, 0, -1/N)`` yields N + 1 points for some N). All
nodes and weights are float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xsiam.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """A quadrature rule on [0, 1].

    Attributes:
        nodes: [n] float64.
        weights: [n] float64.
        embedded_weights: [n] float64, a rule of lower degree on the same nodes whose difference
            from ``weights`` estimates an error, or None.
        peak: Where nodes crowd and how closely, the centre and width of :func:`sinh_map`, or None.
    """

    nodes: Tensor
    weights: Tensor
    embedded_weights: Tensor | None = None
    peak: tuple[float, float] | None = None

    @property
    def n_nodes(self) -> int:
        """The number of nodes."""
        return len(self.nodes)


FIXED_RULES: dict[str, Callable[[int], Rule]] = {}


def _fixed(rule: Callable[[int], Rule]) -> Callable[[int], Rule]:
    FIXED_RULES[rule.__name__] = rule
    return rule


@_fixed
def riemann(n_nodes: int) -> Rule:
    """Right-endpoint Riemann sum: nodes k/N, k = 1 … N, as published.

    References:
        Moeller et al. (EMNLP 2023), equation of the approximated integrated Jacobian.
    """
    nodes = torch.arange(1, n_nodes + 1, dtype=torch.float64) / n_nodes
    return Rule(nodes, _equal_weights(n_nodes), _every_second(n_nodes))


@_fixed
def midpoint(n_nodes: int) -> Rule:
    """Midpoint rule: nodes (k − 1/2)/N, degree 1."""
    nodes = (torch.arange(n_nodes, dtype=torch.float64) + 0.5) / n_nodes
    return Rule(nodes, _equal_weights(n_nodes), _every_second(n_nodes))


@_fixed
def gauss_legendre(n_nodes: int) -> Rule:
    """Gauss-Legendre rule: exact for polynomials of degree 2N − 1.

    The embedded rule leaves out the highest Legendre coefficient that N nodes resolve, so that the
    difference of the two is that coefficient.
    """
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    top = np.polynomial.legendre.Legendre.basis(n_nodes - 1)(nodes)
    embedded = (
        None if n_nodes == 1 else torch.from_numpy(weights * (1 - (2 * n_nodes - 1) * top)) / 2
    )
    return Rule(torch.from_numpy(nodes + 1) / 2, torch.from_numpy(weights) / 2, embedded)


def sinh_map(u: Array, centre: Array | float, width: Array | float) -> tuple[Array, Array]:
    """Map u in [0, 1] to α = centre + width · sinh(s) with s linear in u; arrays broadcast.

    Nodes that are even in u crowd around ``centre`` in α. A function with poles at centre ±
    i·width, for which a polynomial rule needs many nodes, becomes a smooth one of u.

    Returns:
        α in [0, 1] and dα/du.

    References:
        Johnston and Elliott, "A sinh transformation for evaluating nearly singular boundary element
        integrals" (2005). Its use for attribution paths is ours.
    """
    low, high = np.arcsinh(-centre / width), np.arcsinh((1 - centre) / width)
    s = low + u * (high - low)
    return centre + width * np.sinh(s), width * np.cosh(s) * (high - low)


def sinh_unmap(alpha: Array, centre: float, width: float) -> Array:
    """Return the u that :func:`sinh_map` maps to α."""
    low, high = np.arcsinh(-centre / width), np.arcsinh((1 - centre) / width)
    u: Array = (np.arcsinh((alpha - centre) / width) - low) / (high - low)
    return u


def sinh_mapped(rule: Rule, centre: float, width: float) -> Rule:
    """Return a rule for functions with a peak at ``centre``: the given one in u of ``sinh_map``.

    Weights take the factor dα/du, so that it is exact for no polynomial, and as accurate as the
    given rule is for the function of u.
    """
    nodes, slope = sinh_map(rule.nodes.numpy(), centre, width)
    factor = torch.from_numpy(slope)
    embedded = None if rule.embedded_weights is None else rule.embedded_weights * factor
    return Rule(torch.from_numpy(nodes), rule.weights * factor, embedded, (centre, width))


def panelled(edges: Sequence[float], rules: Sequence[Rule]) -> Rule:
    """Return the rule that takes one of ``rules`` on each part of [0, 1] between ``edges``."""
    widths = [right - left for left, right in itertools.pairwise(edges)]
    parts = list(zip(edges, widths, rules, strict=False))
    embedded = [
        width * rule.embedded_weights
        for _, width, rule in parts
        if rule.embedded_weights is not None
    ]
    return Rule(
        torch.cat([left + width * rule.nodes for left, width, rule in parts]),
        torch.cat([width * rule.weights for _, width, rule in parts]),
        torch.cat(embedded) if len(embedded) == len(parts) else None,
    )


def fixed_rule(name: str, n_nodes: int | None) -> Rule:
    """Return the fixed rule of that name with ``n_nodes`` nodes.

    Raises:
        InputError: If the name is unknown or ``n_nodes`` is not a positive integer.
    """
    if name not in FIXED_RULES:
        raise InputError(
            f"Expected `quadrature` to be 'adaptive' or one of {sorted(FIXED_RULES)}, but got "
            f"{name!r}. Set `attribution.quadrature`."
        )
    if not isinstance(n_nodes, int) or isinstance(n_nodes, bool) or n_nodes < 1:
        raise InputError(
            f"Expected `n_nodes` to be a positive integer for quadrature {name!r}, but got "
            f"{n_nodes!r}. Set `attribution.n_nodes`."
        )
    return FIXED_RULES[name](n_nodes)


def _equal_weights(n_nodes: int) -> Tensor:
    return torch.full((n_nodes,), 1.0 / n_nodes, dtype=torch.float64)


def _every_second(n_nodes: int) -> Tensor | None:
    """Return the weights of the coarser rule in which every second node stands for two."""
    if n_nodes == 1:
        return None
    weights = torch.zeros(n_nodes, dtype=torch.float64)
    kept = torch.arange(n_nodes - 1, -1, -2)
    weights[kept] = 2.0 / n_nodes
    if n_nodes % 2:
        weights[0] = 1.0 / n_nodes
    return weights
