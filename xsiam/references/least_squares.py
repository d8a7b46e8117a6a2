"""Roots of underdetermined equations: damped steps of least norm, secant steps near a root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_DAMPING = 1e-2  # of the mean eigenvalue of J Jᵀ
_LESS, _MORE = 0.2, 5.0
_LEAST_DAMPING, _MOST_DAMPING = 1e-9, 1e9
# A step must lower |r|² by this share of what the linear model promises.
_LEAST_GAIN = 0.2
# Steps that lower |r| by less than this share end the search, once so many in a row do.
_STATIONARY, _WEAK_STEPS = 1e-3, 3
_SECANT_DAMPING = 1e-6
_SECANT_GAIN = 0.8  # a secant step must lower |r| to this share, else it is halved
_SECANT_HALVINGS = 3

Equations = Callable[[Tensor], Tensor]  # [N] to [M], float64


@dataclass(frozen=True)
class Root:
    """Where a search ended.

    Attributes:
        x: The best point, [N] float64.
        residual: |r(x)|.
        slopes: The last derivative dr/dx, or what secants made of it, [M, N].
        iterations: Derivatives that were taken, or secant steps.
        is_found: Whether |r(x)| met the target.
    """

    x: Tensor
    residual: float
    slopes: Tensor
    iterations: int
    is_found: bool


def damped_steps(
    equations: Equations,
    derivative: Equations,
    start: Tensor,
    target: float,
    max_iterations: int,
    on_step: Callable[[float], None] | None = None,
) -> Root:
    """Solve r(x) = 0 by steps −Jᵀ(J Jᵀ + λI)⁻¹ r, which for λ = 0 are those of least norm.

    λ falls where a step lowers |r| and grows where it does not.

    Args:
        equations: r.
        derivative: dr/dx, [N] to [M, N].
        start: Where to begin, [N] float64.
        target: |r| that is small enough.
        max_iterations: Most derivatives.
        on_step: Called with |r| after every one.

    References:
        Levenberg (1944), Marquardt (1963): damped least squares.
    """
    x, r = start, equations(start)
    slopes = derivative(x)
    damping, weak, iterations = _FIRST_DAMPING, 0, 1
    while float(r.norm()) > target and weak < _WEAK_STEPS:
        before = float(r.norm())
        while damping < _MOST_DAMPING:
            moved = x + _step(slopes, r, damping)
            found = equations(moved)
            predicted = before**2 - float((r + slopes @ (moved - x)).norm()) ** 2
            gained = before**2 - float(found.norm()) ** 2
            if gained >= _LEAST_GAIN * predicted:
                x, r = moved, found
                damping = max(_LEAST_DAMPING, damping * _LESS)
                break
            damping *= _MORE  # also where something is not finite: no comparison holds
        weak = weak + 1 if float(r.norm()) > (1 - _STATIONARY) * before else 0
        if on_step is not None:
            on_step(float(r.norm()))
        if float(r.norm()) <= target or damping >= _MOST_DAMPING or iterations >= max_iterations:
            break
        slopes = derivative(x)
        iterations += 1
    return Root(x, float(r.norm()), slopes, iterations, float(r.norm()) <= target)


def secant_steps(
    equations: Equations, start: Tensor, slopes: Tensor, target: float, max_iterations: int
) -> Root:
    """Solve r(x) = 0 near a root of similar equations, without a derivative of its own.

    Args:
        equations: r.
        start: A root of the similar ones, [N] float64.
        slopes: Their derivative there, [M, N].
        target: |r| that is small enough.
        max_iterations: Most steps.

    References:
        Broyden, "A class of methods for solving nonlinear simultaneous equations" (1965).
    """
    x, r = start, equations(start)
    best = Root(x, float(r.norm()), slopes, 0, float(r.norm()) <= target)
    for iteration in range(1, max_iterations + 1):
        if best.is_found:
            break
        step = _step(slopes, r, _SECANT_DAMPING)
        found = equations(x + step)
        for _ in range(_SECANT_HALVINGS):
            if float(found.norm()) <= _SECANT_GAIN * float(r.norm()):
                break
            step = step / 2
            found = equations(x + step)
        miss = found - r - slopes @ step
        slopes = slopes + miss[:, None] * step / step.square().sum()
        x, r = x + step, found
        size = float(r.norm())
        if not size < float("inf"):
            break
        if size < best.residual:
            best = Root(x, size, slopes, iteration, size <= target)
    return best


def _step(slopes: Tensor, r: Tensor, damping: float) -> Tensor:
    """Return the damped step of least norm, [N], solved in the smaller dimension."""
    m, n = slopes.shape
    gram = slopes @ slopes.mT if m <= n else slopes.mT @ slopes
    shift = damping * gram.diagonal().mean().clamp_min(1e-300)
    gram.diagonal().add_(shift)
    solved: Tensor = torch.linalg.solve(gram, r if m <= n else slopes.mT @ r)
    return -(slopes.mT @ solved if m <= n else solved)
