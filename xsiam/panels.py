"""Panels of attribution paths: what is known of each, and what a text may still spend on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xsiam.quadrature import Rule, gauss_legendre

# The plan keeps a panel sum this share of the tolerance, so that acceptance rarely fails.
_PLAN_SHARE = 0.5
# Nodes of a panel of which nothing is known yet.
FIRST_ORDER = 8
# Bounds of the ratio by which a panel's exact total error scales its embedded token differences:
# the ratio can be small by luck (cancelling tokens), so it is tripled and kept from vanishing. The
# error of a Gauss rule is about the square of its last coefficient, which is the difference.
_RATIO_SAFETY = 3.0
_RATIO_FLOOR = 2e-4
# Rules that are tried for a panel before it is bisected, which a panel this near its goal is not.
MAX_TRIALS = 3
_NEAR_GOAL = 1.75
# Noise is reported as large as it may be; below this share of it nothing is ever improved.
_SURE_NOISE = 1 / 4
# An error up to so many times the noise or the steepness, which so many bisections in a row lowered
# by less than this factor, is noise too.
_NEAR_NOISE, _NEAR_STEEPNESS = 64.0, 4.0
_NO_PROGRESS = 0.25
_MAX_STALLS = 3
_RELATIVE_FLOOR = 1e-6  # |Δ| below this share of |ẽ| is float noise: errors are absolute there


@functools.cache
def gauss(order: int) -> Rule:
    """Return the Gauss-Legendre rule of ``order`` nodes."""
    return gauss_legendre(order)


def scale_of(delta: Tensor, start: Tensor | None) -> float:
    """Return |Δ|, or 1 where it is float noise and errors are absolute."""
    norm = float(delta.norm())
    noise = 0.0 if start is None else _RELATIVE_FLOOR * float(start.norm())
    return norm if norm > noise else 1.0


def rule_error_of(panels: Sequence[Panel]) -> float:
    """Return the largest estimated error of a token vector along a path, noise of ends apart.

    Errors of rules add; what rounding makes at steep turns of several panels is independent.
    """
    rules = torch.stack([p.token_errors for p in panels if p.token_errors is not None]).sum(0)
    turns = torch.stack([p.token_rounding for p in panels if p.token_rounding is not None])
    return float((rules + turns.norm(dim=0)).max())


def noise_of(panels: Sequence[Panel]) -> float:
    """Return how far rounding may move a token vector, by what it may move an embedding by.

    Token vectors that are longer than the embeddings, and cancel in the sum, are moved by as much
    more (ours).

    Args:
        panels: Those of one whole path, evaluated.
    """
    first, last = panels[0], panels[-1]
    assert first.start is not None
    assert last.end is not None
    vectors = torch.stack([p.vectors for p in panels if p.vectors is not None]).sum(0)
    longest = torch.maximum(first.start.norm(), last.end.norm()).clamp_min(1e-300)
    return first.noise * max(1.0, float(vectors.norm(dim=0).max() / longest))


@dataclass(eq=False)
class Panel:
    """One panel [left, right] of a path.

    Attributes:
        left: Where it begins, as a position α on the path.
        right: Where it ends.
        start: Embedding at ``left``, [K] float64, or None as long as it is unknown.
        end: Embedding at ``right``.
        noise: What rounding may move an embedding by anywhere, in units of the embedding.
        steepness: What it moves an embedding of the panel by where that changes fastest: a point of
            the path is known to one unit in the last place of α (ours).
        rule: The planned nodes.
        error: Exact error of the total derivative's integral by ``rule``, None before it is known.
        trials: Other rules that were proposed for it.
        goal: What its sum over tokens may err once single tokens had erred too much, or None.
        is_thrifty: Whether fewer nodes were tried.
        least_error: Least error of the panels that it is a part of.
        stalls: Bisections in a row above it that lowered no error.
        vectors: Token vectors of the panel, [K, S], once they are evaluated.
        token_errors: Their estimated errors by the rule, [S].
        token_rounding: Those by rounding at a steep turn, [S].
    """

    left: float
    right: float
    start: Tensor | None
    end: Tensor | None
    noise: float
    rule: Rule
    steepness: float = 0.0
    error: float | None = None
    trials: int = 0
    goal: float | None = None
    is_thrifty: bool = False
    least_error: float = float("inf")
    stalls: int = 0
    vectors: Tensor | None = None
    token_errors: Tensor | None = None
    token_rounding: Tensor | None = None
    _evaluated: tuple[Rule, Tensor | None, Tensor | None, Tensor | None] | None = None

    @property
    def width(self) -> float:
        """How much of the path it covers."""
        return self.right - self.left

    @property
    def is_whole(self) -> bool:
        """Whether it covers the whole path."""
        return self.width == 1.0

    @property
    def whole_noise(self) -> float:
        """What rounding may move an embedding of the panel by."""
        return self.noise + self.steepness

    def alphas(self, rule: Rule | None = None) -> Tensor:
        """Return the nodes of its own or another rule, as positions on the path."""
        return self.left + self.width * (rule or self.rule).nodes

    def increment(self) -> Tensor:
        """Return what the total derivative integrates to over the panel, exactly."""
        assert self.start is not None
        assert self.end is not None
        return self.end - self.start

    def total_error(self) -> Tensor:
        """Return the exact error of the sum over tokens, [K], once vectors are there."""
        assert self.vectors is not None
        return self.vectors.sum(1) - self.increment()

    def reopen(self, factor: float) -> None:
        """Ask for a rule that errs less by a factor; what was evaluated is kept if there is none.

        The goal is one of its own, not a share of what the path may err: shares shrink with every
        bisection, down to noise.
        """
        self.goal = factor * max(float(self.total_error().norm()), self.whole_noise)
        self.trials, self.is_thrifty = 0, True
        self._evaluated = (self.rule, self.vectors, self.token_errors, self.token_rounding)
        self.vectors = self.token_errors = self.token_rounding = None

    def misses_goal(self) -> bool:
        """Whether it has a goal and its planned error misses it by as much as is worth a trial."""
        if self.goal is None or self.error is None:
            return False
        return self.error > self.goal * (1.0 if self.trials < MAX_TRIALS else _NEAR_GOAL)

    def restore(self) -> None:
        """Take back what was evaluated if the rule is still the same."""
        if self._evaluated is not None and self._evaluated[0] is self.rule:
            _, self.vectors, self.token_errors, self.token_rounding = self._evaluated

    def halves(self, error: float) -> list[Panel]:
        """Return both halves, which remember the error that the whole panel had."""
        middle = (self.left + self.right) / 2
        left = Panel(self.left, middle, self.start, None, self.noise, gauss(FIRST_ORDER))
        right = Panel(middle, self.right, None, self.end, self.noise, gauss(FIRST_ORDER))
        for half in (left, right):
            half.least_error = min(error, self.least_error)
            half.stalls = self._stalls_with(error)
            half.goal = None if self.goal is None else self.goal / 2
            half.is_thrifty = self.is_thrifty
        return [left, right]

    def can_improve(self, error: float) -> bool:
        """Whether more nodes lower an error, or it is float noise of the embeddings.

        Noise is what lies below its expected size, and what several bisections did not lower
        although it was close: a resolved panel's error falls by orders of magnitude.
        """
        near = error <= max(_NEAR_NOISE * self.noise, _NEAR_STEEPNESS * self.steepness)
        return error > max(_SURE_NOISE * self.noise, self.steepness) and not (
            near and self._stalls_with(error) >= _MAX_STALLS
        )

    def _stalls_with(self, error: float) -> int:
        """Count the bisections in a row that did not lower the error, up to this panel.

        Held against the least error above, since noise is now and then less than before by luck.
        """
        return self.stalls + 1 if error > _NO_PROGRESS * self.least_error else 0

    def accept(self, vectors: Tensor, embedded: Tensor, scale: float) -> None:
        """Take the token vectors [K, S] by both rules, and estimate the error of every token.

        The difference to the embedded rule is the error of the lower rule; it is scaled by how much
        the higher rule beats the lower one on the sum over tokens, which is known exactly. As much
        of that error as rounding makes at a steep turn is no rule's, needs no safety, and lands on
        tokens as the turn itself does (ours).

        Args:
            vectors: By the rule.
            embedded: By the rule embedded in it.
            scale: |Δ| of the path.
        """
        self.vectors = vectors
        difference: Tensor = vectors - embedded
        exact = (self.total_error().norm() - self.noise).clamp_min(0.0)
        rounded = exact.clamp_max(self.steepness)
        total = difference.sum(1).norm().clamp_min(1e-300)
        floor = min(_RATIO_FLOOR, float(total) / scale)
        differences, sizes = difference.norm(dim=0), vectors.norm(dim=0)
        self.token_errors = differences * (_RATIO_SAFETY * (exact - rounded) / total).clamp(
            floor, 1
        )
        turn = torch.maximum(self.increment().norm(), exact).clamp_min(1e-300)
        self.token_rounding = torch.maximum(
            differences * (rounded / total).clamp_max(1), rounded * sizes / turn
        )

    def worst_token(self) -> float:
        """Return the largest estimated error of a token vector of this panel."""
        assert self.token_errors is not None
        assert self.token_rounding is not None
        return float((self.token_errors + self.token_rounding).max())


@dataclass
class PathPanels:
    """The panels of one text's path, the derivatives sampled along it, and what it may spend.

    Attributes:
        row: The text's number in its group.
        tolerance: Bound on the errors, relative to |Δ|.
        max_nodes: Most nodes at which token derivatives are evaluated.
        panels: From left to right.
        n_evaluated: Nodes at which they were.
        points: Positions α at which the total derivative was sampled, [m] each.
        samples: Its values there, [m, K] each.
        is_merged: Whether one rule for the whole path was tried after bisecting it.
        is_rounded: Whether products of its tangents round their factors.
        token_noise: How far rounding was measured to move a token vector; 0 where it was not.
    """

    row: int
    tolerance: float
    max_nodes: int
    panels: list[Panel]
    n_evaluated: int = 0
    points: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    is_merged: bool = False
    is_rounded: bool = False
    token_noise: float = 0.0
    root: Panel = field(init=False)

    def __post_init__(self) -> None:
        self.begin(self.panels[0])
        self.scale = scale_of(self.root.increment(), self.root.start)

    def begin(self, root: Panel) -> None:
        """Start from one panel for the whole path, of which nothing was evaluated."""
        self.root, self.panels = root, [root]

    @property
    def room(self) -> int:
        """Nodes that are left beside the planned ones."""
        planned = sum(p.rule.n_nodes for p in self.panels if p.vectors is None)
        return self.max_nodes - self.n_evaluated - planned

    @property
    def is_evaluated(self) -> bool:
        """Whether every panel has its token vectors."""
        return all(panel.vectors is not None for panel in self.panels)

    def allowed(self) -> float:
        """Return what the planned errors may sum to."""
        return self.tolerance * _PLAN_SHARE * self.scale

    def share(self, panel: Panel) -> float:
        """Return what one panel may err."""
        if panel.goal is not None:
            return panel.goal
        return self.allowed() * (1.0 if panel.is_whole else 1 / len(self.panels))

    def whole_again(self) -> Panel:
        """Return a new panel for the whole path, to be tried in place of its parts."""
        root = self.root
        return Panel(root.left, root.right, root.start, root.end, root.noise, root.rule)

    def worst_panels(self) -> list[Panel]:
        """Return the fewest panels whose removal leaves an acceptable planned error."""
        open_panels = [p for p in self.panels if p.vectors is None]
        worst = [p for p in open_panels if p.misses_goal() and p.can_improve(p.error or 0.0)]
        left = sum(p.error or 0.0 for p in self.panels)
        if left <= self.allowed():
            return worst
        for panel in sorted(open_panels, key=lambda p: -(p.error or 0.0)):
            if left <= self.allowed() / 2:
                break
            if panel.error and panel.can_improve(panel.error):
                worst.append(panel)
                left -= panel.error
        return list({id(panel): panel for panel in worst}.values())

    def split(self, panel: Panel, error: float) -> list[Panel]:
        """Replace a panel by its halves and return them."""
        where = next(i for i, p in enumerate(self.panels) if p is panel)
        halves = panel.halves(error)
        self.panels[where : where + 1] = halves
        return halves

    def cut_short(self) -> None:
        """Fall back to one panel where the deadline leaves no time for the planned ones."""
        self.panels = [self.root]

    def is_accepted(self) -> bool:
        """Whether both errors of what was evaluated meet the tolerance."""
        return max(self.total_error(), self.token_error()) <= self.tolerance * self.scale

    def total_error(self) -> float:
        """Return the exact error of the sum over tokens."""
        return float(torch.stack([panel.total_error() for panel in self.panels]).sum(0).norm())

    def token_error(self) -> float:
        """Return the largest estimated error of a token vector, rounding included."""
        return rule_error_of(self.panels) + max(noise_of(self.panels), self.token_noise)
