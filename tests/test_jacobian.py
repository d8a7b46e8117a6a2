"""Derivatives against closed forms and against the definition by reverse mode."""

from __future__ import annotations

import pytest
import torch
from problems import PROBLEMS, slow_token_vectors

from xsiam.jacobian import (
    exact_numerics,
    feature_derivatives,
    token_derivatives,
    total_derivative,
)
from xsiam.quadrature import fixed_rule

FLOAT64 = 1e-11  # worst measured 4e-15; a float32 leak would show as 1e-8


@pytest.fixture(params=sorted(PROBLEMS))
def problem(request: pytest.FixtureRequest):
    return PROBLEMS[request.param]()


def path(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    return pair[0], pair[1]


def integrate(tail, text, reference, n_nodes):
    rule = fixed_rule("gauss_legendre", n_nodes)
    delta = text - reference
    points = reference + rule.nodes[:, None, None] * delta
    directions = delta.expand_as(points)
    derivatives = token_derivatives(tail, points, directions, torch.arange(len(text)))
    return torch.einsum("n,tnk->kt", rule.weights, derivatives)


def test_token_vectors_equal_the_closed_form(problem) -> None:
    tail, exact = problem
    text, reference = path()
    ours = integrate(tail, text, reference, 48)
    assert ours.dtype == torch.float64
    assert (ours - exact(torch.stack([text, reference]))).abs().max() < FLOAT64


def test_one_node_is_not_enough_for_a_curved_tail() -> None:
    tail, exact = PROBLEMS["separable"]()
    text, reference = path()
    assert (
        integrate(tail, text, reference, 1) - exact(torch.stack([text, reference]))
    ).abs().max() > 1e-2


def test_forward_mode_equals_the_definition_by_reverse_mode(problem) -> None:
    tail, _ = problem
    text, reference = path()
    rule = fixed_rule("gauss_legendre", 6)
    slow = slow_token_vectors(tail, text, reference, rule.nodes, rule.weights)
    assert (integrate(tail, text, reference, 6) - slow).abs().max() < FLOAT64


def test_total_derivative_is_the_sum_over_tokens(problem) -> None:
    tail, _ = problem
    text, reference = path()
    points, direction = text[None], (text - reference)[None]
    embedding, total = total_derivative(tail, points, direction)
    tokens = token_derivatives(tail, points, direction, torch.arange(5))
    assert torch.equal(embedding, tail(points))
    assert (total - tokens.sum(0)).abs().max() < FLOAT64


def test_feature_derivatives_sum_to_the_token(problem) -> None:
    tail, _ = problem
    text, reference = path()
    points, direction = text[None], (text - reference)[None]
    features = feature_derivatives(tail, points, direction, 3)
    token = token_derivatives(tail, points, direction, torch.tensor([3]))
    assert features.shape == (4, 1, 3)
    assert (features.sum(0) - token[0]).abs().max() < FLOAT64


def test_numerics_are_restored_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_numerics(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        with pytest.raises(KeyError), exact_numerics(torch.device("cpu")):
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
