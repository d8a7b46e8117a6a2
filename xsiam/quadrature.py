"""Quadrature on [0, 1]: fixed rules, and nested panel rules for adaptive refinement.

Nodes are built from integers (``torch.arange(1, 0, -1/N)`` yields N + 1 points for some N). All
nodes and weights are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xsiam.errors import InputError


@dataclass(frozen=True)
class Rule:
    """A quadrature rule on [0, 1].

    Attributes:
        nodes: [n] float64.
        weights: [n] float64.
        embedded_weights: [n] float64, a rule of lower degree on the same nodes whose difference
            from ``weights`` estimates an error, or None.
    """

    nodes: Tensor
    weights: Tensor
    embedded_weights: Tensor | None = None

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


# Gauss-Kronrod pairs on [-1, 1]: the nodes >= 0 of the Kronrod rule in descending order, their
# weights, and the weights of the embedded Gauss rule at every second node. The values are the
# tabulated ones (Kronrod 1965; also in QUADPACK); the tests check their degrees of exactness.
_KRONROD: dict[int, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    3: (
        (0.7745966692414833770, 0.0),
        (0.5555555555555555556, 0.8888888888888888889),
        (2.0,),
    ),
    7: (
        (0.9604912687080202834, 0.7745966692414833770, 0.4342437493468025580, 0.0),
        (
            0.1046562260264672652,
            0.2684880898683334407,
            0.4013974147759622229,
            0.4509165386584741423,
        ),
        (0.5555555555555555556, 0.8888888888888888889),
    ),
    15: (
        (
            0.9914553711208126392,
            0.9491079123427585245,
            0.8648644233597690728,
            0.7415311855993944399,
            0.5860872354676911303,
            0.4058451513773971669,
            0.2077849550078984676,
            0.0,
        ),
        (
            0.0229353220105292250,
            0.0630920926299785533,
            0.1047900103222501838,
            0.1406532597155259187,
            0.1690047266392679028,
            0.1903505780647854099,
            0.2044329400752988924,
            0.2094821410847278280,
        ),
        (
            0.1294849661688696933,
            0.2797053914892766679,
            0.3818300505051189449,
            0.4179591836734693878,
        ),
    ),
}
KRONROD_ORDERS = tuple(_KRONROD)


def gauss_kronrod(n_nodes: int) -> Rule:
    """Return the Kronrod rule of 3, 7 or 15 nodes on [0, 1] with its embedded Gauss rule.

    The Kronrod rules are exact to degree 5, 11 and 23, their Gauss rules to degree 1, 5 and 13.
    """
    half_nodes, half_weights, half_gauss = _KRONROD[n_nodes]
    nodes = [-x for x in half_nodes] + list(half_nodes[-2::-1])
    weights = [*half_weights, *half_weights[-2::-1]]
    gauss = torch.zeros(n_nodes, dtype=torch.float64)
    gauss[1::2] = torch.tensor([*half_gauss, *half_gauss[-2::-1]], dtype=torch.float64)
    as_tensor = torch.tensor(nodes, dtype=torch.float64)
    return Rule((as_tensor + 1) / 2, torch.tensor(weights, dtype=torch.float64) / 2, gauss / 2)


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
