"""Minimise a smooth function over a ball: a limited-memory quasi-Newton search."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Settled: the last quarter of the evaluations lowered the value by no more than this share, or its
# root by no more than is asked for.
_SETTLED, _LAST_PART, _FEWEST = 0.02, 0.25, 12
_HISTORY = 30
_EVALUATIONS_PER_ITERATION = 1.5


@dataclass(frozen=True)
class Minimum:
    """Where a search ended.

    Attributes:
        x: The best point, [N] float64.
        value: The function there.
        iterations: Steps.
        is_settled: Whether more steps would hardly lower the value: the last quarter of them did
            not (by a fiftieth, or its root by what is negligible), or there was none that did, or
            the target was met.
        at_bound: Whether |x| is the radius.
    """

    x: Tensor
    value: float
    iterations: int
    is_settled: bool
    at_bound: bool


def minimise_in_ball(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    radius: float,
    max_iterations: int,
    on_step: Callable[[float], None] | None = None,
    target: float = 0.0,
    negligible: float = 0.0,
) -> Minimum:
    """Minimise a function, which is not negative, over |x| ≤ radius.

    What is searched is free: a point outside the ball stands for the nearest one within it, so that
    a gradient that points outwards vanishes at the bound.

    Args:
        function: [N] float64 to a scalar that autograd can differentiate.
        start: Where to begin, [N] float64.
        radius: Of the ball around 0.
        max_iterations: Most steps.
        on_step: Called with the best value so far after every evaluation.
        target: A value that ends the search.
        negligible: Change of the value's root that does not matter: see :class:`Minimum`.

    References:
        Liu and Nocedal, "On the limited memory BFGS method for large scale optimization" (1989).
    """
    with torch.enable_grad():
        free = start.detach().double().clone().requires_grad_()
        best_value, best_x, values = math.inf, start, []
        most = math.ceil(_EVALUATIONS_PER_ITERATION * max_iterations)
        optimizer = torch.optim.LBFGS(
            [free],
            max_iter=max_iterations,
            max_eval=most,
            history_size=_HISTORY,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def evaluate() -> Tensor:
            nonlocal best_value, best_x
            x = _within(free, radius)
            value = function(x)
            (free.grad,) = torch.autograd.grad(value, free)
            found = float(value.detach())
            if found < best_value:
                best_value, best_x = found, x.detach()
            values.append(best_value)
            if on_step is not None:
                on_step(best_value)
            if best_value <= target:
                free.grad = torch.zeros_like(free)  # ends the search
            return value

        optimizer.step(evaluate)  # type: ignore[no-untyped-call]
    iterations = int(optimizer.state[free]["n_iter"])
    before = values[math.floor((1 - _LAST_PART) * (len(values) - 1))]
    little = max((1 + _SETTLED) * best_value, (math.sqrt(best_value) + negligible) ** 2)
    flat = len(values) >= _FEWEST and before <= little
    ended = iterations < max_iterations and len(values) < most
    return Minimum(
        x=best_x,
        value=best_value,
        iterations=iterations,
        is_settled=best_value <= target or ended or flat,
        at_bound=float(best_x.norm()) >= radius * (1 - 1e-9),
    )


def _within(x: Tensor, radius: float) -> Tensor:
    """Return the point of the ball that is nearest to x."""
    nearest: Tensor = x * (radius / x.norm()).clamp_max(1.0)
    return nearest
