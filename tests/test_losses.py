"""Objectives and their registry."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from xsiam.errors import InputError
from xsiam.losses import OBJECTIVES, AbstractObjective, get_objective, register_objective

A = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
B = torch.tensor([[4.0, 3.0], [0.0, 1.0], [0.0, 5.0]], dtype=torch.float64)
LABELS = torch.tensor([0.5, 0.25, 1.0])


@pytest.mark.parametrize(
    ("name", "scores"), [("mse_cosine", [0.96, 0.0, 1.0]), ("mse_dot", [24.0, 0.0, 10.0])]
)
def test_value_by_hand(name: str, scores: list[float]) -> None:
    expected = sum((s - y) ** 2 for s, y in zip(scores, LABELS.tolist(), strict=True)) / 3
    assert get_objective(name)(A, B, LABELS).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_a_differentiable_mean_that_states_its_needs(name: str) -> None:
    objective = get_objective(name)
    assert objective.name == name
    low, high = objective.label_range
    assert low < high
    labels = LABELS if objective.needs_label else None
    a = A.clone().requires_grad_()
    loss = objective(a, B, labels)
    loss.backward()
    assert loss.shape == ()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
    twice = None if labels is None else torch.cat([labels, labels])
    assert objective(torch.cat([A, A]), torch.cat([B, B]), twice).item() == pytest.approx(
        loss.item()
    )


def test_label_ranges() -> None:
    assert get_objective("mse_cosine").label_range == (0.0, 1.0)
    assert get_objective("mse_dot").label_range == (-math.inf, math.inf)


def test_missing_labels_are_refused() -> None:
    with pytest.raises(InputError, match=r"objective 'mse_cosine'.*`data.column_label`"):
        get_objective("mse_cosine")(A, B, None)


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"got 'mse_dots'. Did you mean 'mse_dot'\?"):
        get_objective("mse_dots")


def test_a_third_objective_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xsiam.losses.OBJECTIVES", dict(OBJECTIVES))

    @register_objective
    class Distance(AbstractObjective):
        name = "distance"
        needs_label = False

        def __call__(
            self, embeddings_a: torch.Tensor, embeddings_b: torch.Tensor, labels: object = None
        ) -> torch.Tensor:
            return (embeddings_a - embeddings_b).norm(dim=-1).mean()

    assert isinstance(get_objective("distance"), Distance)
    with pytest.raises(InputError, match="'distance' is registered"):
        register_objective(Distance)
    assert inspect.isabstract(AbstractObjective)
