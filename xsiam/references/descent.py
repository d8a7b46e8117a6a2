"""Minimise a smooth function over a ball: quasi-Newton searches from several starts at once.

What is searched here is a network's input, of which evaluating several costs hardly more than one:
the weights are read once. So all starts are followed together for a while, and the best of them to
the end, with what it has learned of the curvature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Settled: the last quarter of the steps lowered the value by no more than this share, or its root
# by no more than is asked for.
_SETTLED, _LAST_PART, _FEWEST = 0.02, 0.25, 12
_HISTORY = 100
# A step must lower the value by this share of what the slope promises, else it is shortened.
_LEAST_GAIN, _SHORTENED, _MOST_SHORTENINGS = 1e-4, 0.3, 12
# Pairs of steps and gradients whose curvature is less than this are rounding.
_LEAST_CURVATURE = 1e-10
_TINY = 1e-300

Function = Callable[[Tensor], Tensor]  # [S, N] to [S], float64, each from its own row


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
    function: Function,
    starts: Tensor,
    radius: float,
    max_iterations: int,
    first_look: int = 0,
    on_step: Callable[[float], None] | None = None,
    target: float = 0.0,
    negligible: float = 0.0,
) -> Minimum:
    """Minimise a function, which is not negative, over |x| ≤ radius.

    What is searched is free: a point outside the ball stands for the nearest one within it, so that
    a gradient that points outwards vanishes at the bound.

    Args:
        function: [S, N] float64 to [S] that autograd can differentiate.
        starts: Where to begin, [S, N] float64.
        radius: Of the ball around 0.
        max_iterations: Most steps.
        first_look: Steps that every start gets; then the best of them goes on.
        on_step: Called with the best value so far after every step.
        target: A value that ends the search.
        negligible: Change of the value's root that does not matter: see :class:`Minimum`.

    References:
        Liu and Nocedal, "On the limited memory BFGS method for large scale optimization" (1989).
    """
    searches = _Searches(function, starts.detach().double(), radius)
    values = [searches.least()]
    while len(values) <= max_iterations and values[-1] > target and searches.can_improve():
        searches.step()
        if len(values) == first_look:
            searches.keep_best()
        values.append(searches.least())
        if on_step is not None:
            on_step(values[-1])
    value, iterations = values[-1], len(values) - 1
    before = values[math.floor((1 - _LAST_PART) * iterations)]
    little = max((1 + _SETTLED) * value, (math.sqrt(value) + negligible) ** 2)
    flat = iterations >= _FEWEST and before <= little
    searches.keep_best()
    x = searches.points()[0]
    return Minimum(
        x=x,
        value=value,
        iterations=iterations,
        is_settled=value <= target or iterations < max_iterations or flat,
        at_bound=float(x.norm()) >= radius * (1 - 1e-9),
    )


class _Searches:
    """Searches from S starts, each with a curvature and a step of its own, evaluated together.

    Args:
        function: As in :func:`minimise_in_ball`.
        starts: [S, N].
        radius: Of the ball.
    """

    def __init__(self, function: Function, starts: Tensor, radius: float) -> None:
        self._function, self._radius, self._free = function, radius, starts
        self._values, self._slopes = self._evaluate(starts)
        self._history: list[tuple[Tensor, Tensor, Tensor]] = []
        self._scale = torch.ones_like(self._values)
        # Whether the next step is down the gradient, and whether not even that lowers the value.
        self._is_fresh = torch.zeros(len(starts), dtype=torch.bool)
        self._is_stuck = torch.zeros_like(self._is_fresh)
        self._forget(~self._is_fresh)

    def least(self) -> float:
        """Return the least value."""
        return float(self._values.min())

    def points(self) -> Tensor:
        """Return where the searches are, within the ball, [S, N]."""
        return self._within(self._free)

    def can_improve(self) -> bool:
        """Whether any of the searches can go on."""
        return not bool(self._is_stuck.all())

    def keep_best(self) -> None:
        """Give up all but the best."""
        best = int(self._values.argmin())
        kept = slice(best, best + 1)
        self._free, self._values, self._slopes = (
            found[kept] for found in (self._free, self._values, self._slopes)
        )
        self._scale, self._is_fresh, self._is_stuck = (
            found[kept] for found in (self._scale, self._is_fresh, self._is_stuck)
        )
        self._history = [(s[kept], y[kept], rho[kept]) for s, y, rho in self._history]

    def step(self) -> None:
        """Move every search down its own direction, as far as its value falls enough."""
        direction = self._direction()
        promised = (self._slopes * direction).sum(1).clamp_max(0.0)
        length = torch.ones_like(self._values)
        for _ in range(_MOST_SHORTENINGS):
            moved = self._free + length[:, None] * direction
            values, slopes = self._evaluate(moved)
            holds = values < self._values + _LEAST_GAIN * length * promised  # False where it is NaN
            if holds.all():
                break
            length = torch.where(holds, length, _SHORTENED * length)
        change = torch.where(holds[:, None], moved - self._free, 0.0)
        turn = torch.where(holds[:, None], slopes - self._slopes, 0.0)
        self._is_stuck = ~holds & self._is_fresh
        self._free = torch.where(holds[:, None], moved, self._free)
        self._slopes = self._slopes + turn
        self._values = torch.where(holds, values, self._values)
        self._learn(change, turn)
        self._forget(~holds)

    def _direction(self) -> Tensor:
        """Return −H g, with the inverse Hessian H that the last steps tell of, [S, N]."""
        wanted, weights = self._slopes.clone(), []
        for s, y, rho in reversed(self._history):
            weight = rho * (s * wanted).sum(1)
            wanted -= weight[:, None] * y
            weights.append(weight)
        wanted *= self._scale[:, None]
        for (s, y, rho), weight in zip(self._history, reversed(weights), strict=True):
            wanted += (weight - rho * (y * wanted).sum(1))[:, None] * s
        return -wanted

    def _learn(self, change: Tensor, turn: Tensor) -> None:
        """Remember what a step tells of the curvature, where it is no rounding."""
        curvature, size = (change * turn).sum(1), turn.square().sum(1)
        tells = curvature > _LEAST_CURVATURE * size
        rho = torch.where(tells, 1 / curvature.clamp_min(_TINY), 0.0)
        self._history = [*self._history[1 - _HISTORY :], (change, turn, rho)]
        self._scale = torch.where(tells, curvature / size.clamp_min(_TINY), self._scale)
        self._is_fresh &= ~tells

    def _forget(self, rows: Tensor) -> None:
        """Begin again down the gradient, by a first step of length 1 at most."""
        self._history = [(s, y, torch.where(rows, 0.0, rho)) for s, y, rho in self._history]
        first = 1 / self._slopes.norm(dim=1).clamp_min(1.0)
        self._scale = torch.where(rows, first, self._scale)
        self._is_fresh = self._is_fresh | rows

    def _evaluate(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values at free points, [S], and their gradients, [S, N]."""
        with torch.enable_grad():
            free = free.detach().requires_grad_()
            values = self._function(self._within(free))
            (slopes,) = torch.autograd.grad(values.sum(), free)
        return values.detach(), slopes

    def _within(self, x: Tensor) -> Tensor:
        """Return the points of the ball that are nearest to x."""
        nearest: Tensor = x * (self._radius / x.norm(dim=1, keepdim=True)).clamp_max(1.0)
        return nearest
