"""Weights, nodes, degrees of exactness, and that rules are NOT exact beyond them."""

from __future__ import annotations

import pytest
import torch

from xsiam.errors import InputError
from xsiam.quadrature import FIXED_RULES, Rule, fixed_rule, gauss_legendre, panelled

EXACT = 1e-14  # worst measured 8e-17
DEGREES = {"riemann": 0, "midpoint": 1, "gauss_legendre": 9}  # for five nodes


def monomial_error(rule: Rule, degree: int, *, embedded: bool = False) -> float:
    """Return the error on (2x − 1)^degree over [0, 1]."""
    weights = rule.embedded_weights if embedded else rule.weights
    exact = 0.0 if degree % 2 else 1 / (degree + 1)
    return abs(float((weights * (2 * rule.nodes - 1) ** degree).sum()) - exact)


def test_every_registered_rule_has_a_degree() -> None:
    assert set(DEGREES) == set(FIXED_RULES)


@pytest.mark.parametrize("name", sorted(FIXED_RULES))
def test_fixed_rules_are_exact_to_their_degree_and_not_beyond(name: str) -> None:
    rule = fixed_rule(name, 5)
    errors = [monomial_error(rule, d) for d in range(DEGREES[name] + 4)]
    assert max(errors[: DEGREES[name] + 1]) < EXACT
    assert max(errors[DEGREES[name] + 1 :]) > 1e-4


@pytest.mark.parametrize("n_nodes", [1, 2, 49, 50, 98, 103])
def test_riemann_takes_the_published_nodes(n_nodes: int) -> None:
    rule = fixed_rule("riemann", n_nodes)
    assert torch.equal(
        rule.nodes, torch.tensor([k / n_nodes for k in range(1, n_nodes + 1)]).double()
    ) or ((rule.nodes * n_nodes - torch.arange(1, n_nodes + 1)).abs().max() < 1e-12)
    assert rule.n_nodes == n_nodes
    assert rule.nodes[-1] == 1.0
    assert torch.equal(rule.weights, torch.full((n_nodes,), 1 / n_nodes, dtype=torch.float64))


@pytest.mark.parametrize("n_nodes", [2, 5, 8, 16])
def test_the_embedded_gauss_rule_leaves_out_one_coefficient(n_nodes: int) -> None:
    rule = fixed_rule("gauss_legendre", n_nodes)
    errors = [monomial_error(rule, d, embedded=True) for d in range(n_nodes)]
    assert max(errors[: n_nodes - 1]) < 1e-13
    assert errors[n_nodes - 1] > 1e-5


@pytest.mark.parametrize("name", sorted(FIXED_RULES))
@pytest.mark.parametrize("n_nodes", [2, 5, 8])
def test_embedded_rules_integrate_constants_and_are_coarser(name: str, n_nodes: int) -> None:
    rule = fixed_rule(name, n_nodes)
    assert rule.embedded_weights is not None
    assert float(rule.embedded_weights.sum()) == pytest.approx(1.0, abs=1e-12) or n_nodes == 1
    assert not torch.equal(rule.embedded_weights, rule.weights)


@pytest.mark.parametrize("name", sorted(FIXED_RULES))
def test_one_node_has_no_embedded_rule(name: str) -> None:
    assert fixed_rule(name, 1).embedded_weights is None


def test_bad_rules_name_the_value_and_the_key() -> None:
    with pytest.raises(InputError, match=r"got 'simpson'. Set `attribution.quadrature`"):
        fixed_rule("simpson", 5)
    for n_nodes in (0, -3, None, 2.5, True):
        with pytest.raises(InputError, match=rf"got {n_nodes}. Set `attribution.n_nodes`"):
            fixed_rule("riemann", n_nodes)  # type: ignore[arg-type]


def test_rules_on_parts_are_exact_for_what_each_is_exact_for() -> None:
    rule = panelled([0.0, 0.25, 1.0], [gauss_legendre(3), gauss_legendre(5)])
    assert rule.n_nodes == 8
    for degree in range(6):
        assert float(rule.weights @ rule.nodes**degree) == pytest.approx(
            1 / (degree + 1), abs=1e-14
        )
    broken = torch.where(rule.nodes < 0.25, 4 * rule.nodes, 3.0)  # not smooth at the edge
    assert float(rule.weights @ broken) == pytest.approx(0.125 + 2.25, abs=1e-14)
    assert rule.embedded_weights is not None
    assert float(rule.embedded_weights.sum()) == pytest.approx(1, abs=1e-12)
    assert panelled([0.0, 0.5, 1.0], [gauss_legendre(1)] * 2).embedded_weights is None
