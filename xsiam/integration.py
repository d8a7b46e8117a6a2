"""Integrate token derivatives along attribution paths: fixed rules, and panels to a tolerance.

Adaptive integration plans cheaply and integrates once. The total derivative along a path costs one
tangent where the token vectors cost S, and its integral over any panel [α, β] is known exactly,
from the embeddings at both ends: ẽ(x(β)) − ẽ(x(α)). So panels and their
orders are chosen on exact errors, and only the final nodes carry the tangent of every token. The
rules are Gauss-Legendre with as many nodes as the decay of the Legendre coefficients asks for. Many
texts of one length refine independently but are evaluated together.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from xsiam.paths import PathGroup
from xsiam.quadrature import Rule, gauss_legendre

# The plan keeps a panel sum this share of the tolerance, so that acceptance rarely fails.
_PLAN_SHARE = 0.5
# Nodes of a panel: where planning begins, and what the measured decay may change them to.
_FIRST_ORDER = 8
_LOWER_ORDERS = (2, 3, 4, 5, 6, 7)
_HIGHER_ORDERS = (10, 12, 14, 16)
# A predicted error must lie this far below what is allowed before an order is tried.
_PREDICTION_SAFETY = 0.5
_FASTEST_DECAY = 0.02
# Bounds of the ratio by which a panel's exact total error scales its embedded token differences:
# the ratio can be small by luck (cancelling tokens), so it is tripled and kept from vanishing.
_RATIO_SAFETY = 3.0
_RATIO_FLOOR = 2e-4
# Noise is what rounding was measured to move an embedding by, and at least so many units in the
# last place of its norm.
_NOISE_UNITS = 1.0
# An error up to so many times the noise, which so many bisections in a row lowered by less than
# this factor, is noise too.
_NEAR_NOISE = 64.0
_NO_PROGRESS = 0.25
_MAX_STALLS = 3
_PANELS_AT_ONCE = 16  # bounds the sums that are held while panels are evaluated
_RELATIVE_FLOOR = 1e-6  # |Δ| below this share of |ẽ| is float noise: errors are absolute there


@dataclass(frozen=True)
class Integrated:
    """The integral of one path, with its errors.

    Attributes:
        vectors: Token vectors G, [K, S] float64.
        delta: Δ = ẽ(a) − ẽ(r), [K] float64.
        reference_embedding: e(r) at the start of the path, before any shift, [K] float64.
        completeness_error: |Σ_s G − Δ| / |Δ| (absolute where |Δ| is float noise).
        token_error: Estimated largest error of a single token vector, relative to |Δ|; infinite
            where a rule of one node gives no estimate.
        converged: Whether both errors meet the tolerance (for a fixed rule: its tolerance too).
        n_nodes: Nodes at which token derivatives were evaluated.
    """

    vectors: Tensor
    delta: Tensor
    reference_embedding: Tensor
    completeness_error: float
    token_error: float
    converged: bool
    n_nodes: int


def integrate_fixed(group: PathGroup, rule: Rule, tolerance: float) -> list[Integrated]:
    """Integrate every path of a group with one fixed rule."""
    starts, ends = group.ends()
    rows = torch.arange(group.size).repeat_interleave(rule.n_nodes)
    weights = rule.weights if rule.embedded_weights is None else rule.embedded_weights
    stacked = torch.stack([rule.weights, weights]).repeat(1, group.size)
    sums = group.token_sums(rows, rule.nodes.repeat(group.size), stacked, rows)
    results = []
    for i in range(group.size):
        panel = _whole(group, i, starts[i], ends[i], rule)
        panel.accept(sums[0, i], sums[1, i])
        estimated = rule.embedded_weights is not None
        results.append(_assemble([panel], tolerance, rule.n_nodes, estimated))
    return results


def integrate_adaptive(
    group: PathGroup, tolerance: float, max_nodes: int, deadline: float | None = None
) -> list[Integrated]:
    """Integrate every path of a group to a tolerance, or to the best within the budgets.

    Args:
        group: The paths.
        tolerance: Bound on both the completeness error and the estimated token error.
        max_nodes: Most nodes per text at which token derivatives are evaluated.
        deadline: ``time.monotonic()`` value after which nothing is refined any more.
    """
    starts, ends = group.ends()
    texts = [
        _Text(i, tolerance, max_nodes, [_whole(group, i, starts[i], ends[i], _gauss(_FIRST_ORDER))])
        for i in range(group.size)
    ]
    _plan(group, texts, deadline)
    while pending := [t for t in texts if any(p.vectors is None for p in t.panels)]:
        if _is_over(deadline):
            for text in pending:
                text.cut_short()
        _evaluate(group, [(t, p) for t in pending for p in t.panels if p.vectors is None])
        for text in pending:
            text.refine_evaluated(allowed=not _is_over(deadline))
        _embed_missing_ends(group, texts)
    return [_assemble(t.panels, tolerance, t.n_evaluated) for t in texts]


@dataclass(frozen=True)
class Pulled:
    """What cotangents pulled back along one path give, with its error.

    Attributes:
        products: Inner products of the cotangents with the token vectors, [C, S] float64.
        delta: Δ, [K] float64.
        reference_embedding: e(r) at the start of the path, before any shift, [K] float64.
        completeness_error: As of :class:`Integrated`, from one tangent at the same nodes.
        converged: Whether it meets the tolerance.
        n_nodes: Nodes at which cotangents were pulled.
    """

    products: Tensor
    delta: Tensor
    reference_embedding: Tensor
    completeness_error: float
    converged: bool
    n_nodes: int


def integrate_pulled(
    group: PathGroup,
    cotangents: Tensor,
    rule: Rule | None,
    tolerance: float,
    max_nodes: int,
    deadline: float | None = None,
) -> Pulled:
    """Integrate the path of ONE text against cotangents [C, K]: the mixed mode.

    Args:
        group: One path.
        cotangents: Directions of embedding space, [C, K].
        rule: A fixed rule, or None to choose nodes as :func:`integrate_adaptive` does.
        tolerance: Bound on the completeness error.
        max_nodes: Most nodes of the adaptive choice.
        deadline: As of :func:`integrate_adaptive`.
    """
    start, end = (embeddings[0] for embeddings in group.ends())
    panels = [_whole(group, 0, start, end, rule or _gauss(_FIRST_ORDER))]
    text = _Text(0, tolerance, max_nodes, panels)
    if rule is None:
        _plan(group, [text], deadline)
    rows, alphas, _ = _flatten([(text, panel) for panel in text.panels])
    weights = torch.cat([panel.weights for panel in text.panels])
    pulled = group.token_sums(
        rows, alphas, weights[None], torch.zeros_like(rows), cotangents[None].to(group.start)
    )
    delta = end - start
    error = weights @ group.totals(rows, alphas)[1] - delta
    completeness = float(error.norm()) / _scale(delta, start)
    return Pulled(
        products=pulled[0, 0],
        delta=delta,
        reference_embedding=start,
        completeness_error=completeness,
        converged=completeness <= tolerance,
        n_nodes=len(weights),
    )


@functools.cache
def _gauss(order: int) -> Rule:
    return gauss_legendre(order)


@functools.cache
def _legendre(order: int) -> Tensor:
    """Return what maps values at the Gauss nodes to Legendre coefficients, [order, order]."""
    rule = gauss_legendre(order)
    basis = np.polynomial.legendre.legvander(2 * rule.nodes.numpy() - 1, order - 1)
    degrees = 2 * torch.arange(order, dtype=torch.float64) + 1
    return degrees[:, None] * torch.from_numpy(basis).T * rule.weights


@dataclass
class _Panel:
    """One panel [left, right] of a path, with the embeddings at its ends."""

    left: float
    right: float
    start: Tensor | None
    end: Tensor | None
    rule: Rule
    noise: float
    parent_error: float = float("inf")
    stalls: int = 0
    error: float | None = None
    spectrum: Tensor | None = None
    vectors: Tensor | None = None
    token_errors: Tensor | None = None

    @property
    def alphas(self) -> Tensor:
        """The nodes, as positions on the whole path."""
        return self.left + (self.right - self.left) * self.rule.nodes

    @property
    def weights(self) -> Tensor:
        return (self.right - self.left) * self.rule.weights

    @property
    def embedded_weights(self) -> Tensor:
        assert self.rule.embedded_weights is not None
        return (self.right - self.left) * self.rule.embedded_weights

    def increment(self) -> Tensor:
        """Return what the total derivative integrates to over the panel, exactly."""
        assert self.start is not None
        assert self.end is not None
        return self.end - self.start

    def total_error(self) -> Tensor:
        """Return the exact error of the sum over tokens, [K], once vectors are there."""
        assert self.vectors is not None
        return self.vectors.sum(1) - self.increment()

    def halves(self, error: float) -> tuple[_Panel, _Panel]:
        """Return both halves, which remember the error that the whole panel had."""
        middle = (self.left + self.right) / 2
        rule, stalls = _gauss(_FIRST_ORDER), self._stalls_with(error)
        return (
            _Panel(self.left, middle, self.start, None, rule, self.noise, error, stalls),
            _Panel(middle, self.right, None, self.end, rule, self.noise, error, stalls),
        )

    def predicted_error(self, order: int) -> float:
        """Predict the error of another order from the decay of the Legendre coefficients.

        Gauss-Legendre with n nodes leaves the coefficients from degree 2n on: those that were
        measured are taken as they are, beyond them the last ones decay geometrically.
        """
        assert self.spectrum is not None
        assert self.error is not None
        known, n = self.spectrum, len(self.spectrum)
        last = known[-2:].sum() / known[-4:-2].sum().clamp_min(1e-300)
        decay = float(last.sqrt().clamp(_FASTEST_DECAY, 1.0))
        if order > n:
            return self.error * decay ** (2 * (order - n))
        beyond = float(known[-1]) * decay ** max(1, 2 * order - n + 1)
        return (self.right - self.left) * (float(known[2 * order :].sum()) + beyond)

    def can_improve(self, error: float) -> bool:
        """Whether bisecting lowers an error, or it is float noise of the embeddings.

        Noise is what lies below its expected size, and what several bisections did not lower
        although it was close: a resolved panel's error falls by orders of magnitude.
        """
        near = error <= _NEAR_NOISE * self.noise
        return error > self.noise and not (near and self._stalls_with(error) >= _MAX_STALLS)

    def _stalls_with(self, error: float) -> int:
        """Count the bisections in a row that did not lower the error, up to this panel."""
        return self.stalls + 1 if error > _NO_PROGRESS * self.parent_error else 0

    def accept(self, vectors: Tensor, embedded: Tensor) -> None:
        """Take the token vectors [K, S] by both rules, and estimate the error of every token.

        The difference to the embedded rule is the error of the lower rule; it is scaled by how much
        the higher rule beats the lower one on the sum over tokens, which is known exactly.
        """
        self.vectors = vectors
        difference: Tensor = vectors - embedded
        exact = (self.total_error().norm() - self.noise).clamp_min(0.0)
        ratio = _RATIO_SAFETY * exact / difference.sum(1).norm().clamp_min(1e-300)
        self.token_errors = difference.norm(dim=0) * ratio.clamp(_RATIO_FLOOR, 1.0)


@dataclass
class _Text:
    """The panels of one text and what it may spend."""

    row: int
    tolerance: float
    max_nodes: int
    panels: list[_Panel]
    n_evaluated: int = 0
    root: _Panel = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.panels[0]
        self.scale = _scale(self.root.increment(), self.root.start)

    @property
    def n_planned(self) -> int:
        return sum(p.rule.n_nodes for p in self.panels if p.vectors is None)

    def allowed(self) -> float:
        return self.tolerance * _PLAN_SHARE * self.scale

    def worst_panels(self) -> list[_Panel]:
        """Return the fewest panels whose removal leaves an acceptable planned error."""
        errors = [p.error or 0.0 for p in self.panels]
        if sum(errors) <= self.allowed():
            return []
        left, worst = sum(errors), []
        for panel in sorted(self.panels, key=lambda p: -(p.error or 0.0)):
            if left <= self.allowed() / 2:
                break
            if panel.error and panel.can_improve(panel.error):
                worst.append(panel)
                left -= panel.error
        room = self.max_nodes - self.n_evaluated - self.n_planned
        return worst[: max(0, room // _gauss(_FIRST_ORDER).n_nodes)]

    def raise_order(self, panel: _Panel) -> bool:
        """Give a panel more nodes if that is predicted to do; whether it was."""
        if panel.rule.n_nodes != _FIRST_ORDER:
            return False
        share = self.allowed() / len(self.panels)
        for order in _HIGHER_ORDERS:
            if panel.predicted_error(order) <= _PREDICTION_SAFETY * share:
                panel.rule = _gauss(order)
                return True
        return False

    def split_panel(self, panel: _Panel, error: float) -> list[_Panel]:
        where = next(i for i, p in enumerate(self.panels) if p is panel)
        halves = list(panel.halves(error))
        self.panels[where : where + 1] = halves
        return halves

    def cut_short(self) -> None:
        """Fall back to one panel where the deadline leaves no time for the planned ones."""
        self.panels = [self.root]

    def refine_evaluated(self, allowed: bool) -> None:
        """Bisect evaluated panels where the completeness or token error is still too large."""
        if any(p.vectors is None for p in self.panels):
            return
        total = torch.stack([p.total_error() for p in self.panels]).sum(0)
        limit = self.tolerance * self.scale
        shares = [p.token_errors for p in self.panels if p.token_errors is not None]
        token_error = float(torch.stack(shares).sum(0).max()) + self.root.noise
        if (float(total.norm()) <= limit and token_error <= limit) or not allowed:
            return
        left = token_error
        room = (self.max_nodes - self.n_evaluated) // (2 * _gauss(_FIRST_ORDER).n_nodes)
        ranked = [
            (max(float(share.max()), float(panel.total_error().norm())), float(share.max()), panel)
            for share, panel in zip(shares, self.panels, strict=True)
        ]
        ranked = [entry for entry in ranked if entry[2].can_improve(entry[0])]
        ranked.sort(key=lambda entry: -entry[0])
        for error, share_error, panel in ranked[:room]:
            self.split_panel(panel, error)
            left -= share_error
            if left <= limit / 2:
                break


def _whole(group: PathGroup, row: int, start: Tensor, end: Tensor, rule: Rule) -> _Panel:
    """Return the panel [0, 1] of a path."""
    norm = float(torch.maximum(start.norm(), end.norm()))
    units = _NOISE_UNITS * torch.finfo(group.start.dtype).eps * norm
    return _Panel(0.0, 1.0, start, end, rule, max(units, float(group.noise[row])))


def _plan(group: PathGroup, texts: Sequence[_Text], deadline: float | None) -> None:
    """Choose panels and orders on the exact error of the total derivative's integral."""
    pending = [(t, p) for t in texts for p in t.panels]
    while pending:
        _measure(group, pending)
        if _is_over(deadline):
            return
        worst = [(text, panel) for text in texts for panel in text.worst_panels()]
        pending = []
        for text, panel in worst:
            if text.raise_order(panel):
                pending.append((text, panel))
            else:
                halves = text.split_panel(panel, panel.error or 0.0)
                pending += [(text, half) for half in halves]
        _embed_missing_ends(group, texts)
    _lower_orders(group, texts)


def _measure(group: PathGroup, pending: Sequence[tuple[_Text, _Panel]]) -> None:
    """Set the exact error of each panel's total integral, and its Legendre coefficients."""
    rows, alphas, _ = _flatten(pending)
    _, derivatives = group.totals(rows, alphas)
    counts = [panel.rule.n_nodes for _, panel in pending]
    for (_, panel), values in zip(pending, torch.split(derivatives, counts), strict=True):
        total = (panel.weights[:, None] * values).sum(0)
        panel.error = float((total - panel.increment()).norm())
        panel.spectrum = (_legendre(panel.rule.n_nodes) @ values).norm(dim=1)


def _lower_orders(group: PathGroup, texts: Sequence[_Text]) -> None:
    """Give panels fewer nodes where the error, predicted and then measured, is still allowed."""
    trials = []
    for text in texts:
        share = text.allowed() / len(text.panels)
        for panel in text.panels:
            if panel.rule.n_nodes != _FIRST_ORDER:
                continue
            fitting = (
                order
                for order in _LOWER_ORDERS
                if panel.predicted_error(order) <= _PREDICTION_SAFETY * share
            )
            if (order := next(fitting, None)) is not None:
                trials.append((text, panel, replace(panel, rule=_gauss(order), error=None)))
    if not trials:
        return
    _measure(group, [(text, trial) for text, _, trial in trials])
    for text, panel, trial in trials:
        assert trial.error is not None
        if trial.error <= text.allowed() / len(text.panels):
            panel.rule, panel.error = trial.rule, trial.error


def _evaluate(group: PathGroup, pending: Sequence[tuple[_Text, _Panel]]) -> None:
    """Evaluate the token derivatives of every pending panel, a bounded number at once."""
    for first in range(0, len(pending), _PANELS_AT_ONCE):
        some = pending[first : first + _PANELS_AT_ONCE]
        rows, alphas, panels = _flatten(some)
        sums = group.token_sums(rows, alphas, _both_weights([p for _, p in some]), panels)
        for number, (text, panel) in enumerate(some):
            panel.accept(sums[0, number].clone(), sums[1, number])
            text.n_evaluated += panel.rule.n_nodes


def _both_weights(panels: Sequence[_Panel]) -> Tensor:
    """Return the weights of the nodes of panels and of their embedded rules, [2, n]."""
    return torch.stack(
        [torch.cat([p.weights for p in panels]), torch.cat([p.embedded_weights for p in panels])]
    )


def _embed_missing_ends(group: PathGroup, texts: Sequence[_Text]) -> None:
    """Fill in the embeddings where panels were bisected."""
    missing = [(t, i) for t in texts for i, p in enumerate(t.panels) if p.end is None]
    if not missing:
        return
    rows = torch.tensor([t.row for t, _ in missing])
    alphas = torch.tensor([t.panels[i].right for t, i in missing], dtype=torch.float64)
    embeddings = group.embed(rows, alphas)
    for (text, i), embedding in zip(missing, embeddings, strict=True):
        text.panels[i].end = text.panels[i + 1].start = embedding


def _flatten(pending: Sequence[tuple[_Text, _Panel]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return text, position and panel number of every node."""
    counts = torch.tensor([p.rule.n_nodes for _, p in pending])
    rows = torch.tensor([t.row for t, _ in pending]).repeat_interleave(counts)
    panels = torch.arange(len(pending)).repeat_interleave(counts)
    return rows, torch.cat([p.alphas for _, p in pending]), panels


def _assemble(
    panels: Sequence[_Panel], tolerance: float, n_nodes: int, estimated: bool = True
) -> Integrated:
    first, last = panels[0], panels[-1]
    assert first.start is not None
    assert last.end is not None
    delta = last.end - first.start
    scale = _scale(delta, first.start)
    vectors = torch.stack([p.vectors for p in panels if p.vectors is not None]).sum(0)
    completeness = float((vectors.sum(1) - delta).norm()) / scale
    token = float("inf")
    if estimated:
        shares = [p.token_errors for p in panels if p.token_errors is not None]
        estimate = float(torch.stack(shares).sum(0).max())
        token = (estimate + first.noise) / scale
    return Integrated(
        vectors=vectors,
        delta=delta,
        reference_embedding=first.start,
        completeness_error=completeness,
        token_error=token,
        converged=completeness <= tolerance and token <= tolerance,
        n_nodes=n_nodes,
    )


def _scale(delta: Tensor, start: Tensor | None) -> float:
    """Return |Δ|, or 1 where it is float noise and errors are absolute."""
    norm = float(delta.norm())
    noise = 0.0 if start is None else _RELATIVE_FLOOR * float(start.norm())
    return norm if norm > noise else 1.0


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline
