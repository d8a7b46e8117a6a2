"""Integrate token derivatives along attribution paths: by fixed rules, and to a tolerance.

Adaptive integration plans cheaply (:mod:`xsiam.nodes`) and integrates once: only the planned nodes
carry the tangent of every token. What was planned is then accepted on both errors, that of the sum
over tokens, known exactly, and that of single tokens, estimated; where either fails the panel is
planned again, more cautiously, or bisected. Many texts of one length refine independently but are
evaluated together. Where a tolerance leaves room for it, matrix products first round their factors,
which is counted as noise; a text that is not accepted so is integrated again without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xsiam.nodes import (
    choice_cost,
    embed_missing_ends,
    flatten,
    is_measured_first,
    is_over,
    keep_samples,
    plan,
    whole_panel,
)
from xsiam.panels import (
    FIRST_ORDER,
    Panel,
    PathPanels,
    gauss,
    noise_of,
    rule_error_of,
    scale_of,
)
from xsiam.paths import PathGroup, Rounding
from xsiam.quadrature import Rule

# Where the rules err by at most so many times the noise of the embeddings, the noise of the token
# vectors, which can be larger, is measured too: with this margin, at one node for so many that were
# evaluated, but a few at least.
_NEAR_NOISE, _NOISE_SAFETY = 10.0, 2.0
_PER_NODE, _NOISE_NODES, _MOST_NOISE_NODES = 16, 5, 24
_TEXTS_AT_ONCE = 3  # bounds the derivatives that are held meanwhile
_CAUTION = 0.5  # how far below the tolerance a path is planned that had missed it
_PANELS_AT_ONCE = 16  # bounds the sums that are held while panels are evaluated
_NODE_GRID = 2.0**40  # nodes that are equal to this are one


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
    rows = torch.arange(group.size).repeat_interleave(rule.n_nodes)
    weights = rule.weights if rule.embedded_weights is None else rule.embedded_weights
    stacked = torch.stack([rule.weights, weights]).repeat(1, group.size)
    sums, _ = group.token_sums(rows, rule.nodes.repeat(group.size), stacked, rows)
    texts = [
        PathPanels(i, tolerance, rule.n_nodes, [whole_panel(group, i, rule)])
        for i in range(group.size)
    ]
    for text in texts:
        text.root.accept(sums[0, text.row], sums[1, text.row], text.scale)
        text.n_evaluated = rule.n_nodes
    is_estimated = rule.embedded_weights is not None
    if is_estimated:
        _measure_noise(group, texts)
    return [_assemble(text, is_estimated) for text in texts]


def integrate_adaptive(
    group: PathGroup,
    tolerance: float,
    max_nodes: int,
    deadline: float | None = None,
    first: Rule | None = None,
) -> list[Integrated]:
    """Integrate every path of a group to a tolerance, or to the best within the budgets.

    Args:
        group: The paths.
        tolerance: Bound on both the completeness error and the estimated token error.
        max_nodes: Most nodes per text at which token derivatives are evaluated.
        deadline: ``time.monotonic()`` value after which nothing is refined any more.
        first: The rule that is tried first, as by :meth:`xsiam.first_rules.FirstRules.of`; None to
            plan every path from the plain one.
    """
    rounded, rule = group.rounding is not None, first or gauss(FIRST_ORDER)
    whole = [whole_panel(group, i, rule, rounded=rounded) for i in range(group.size)]
    texts = [
        PathPanels(i, tolerance, max_nodes, [panel], is_rounded=rounded)
        for i, panel in enumerate(whole)
    ]
    if first is None or first.n_nodes > max_nodes or not _is_worth_a_try(group):
        plan(group, texts, deadline)
    while pending := [text for text in texts if not text.is_evaluated]:
        if is_over(deadline):
            for text in pending:
                text.cut_short()
        _evaluate(group, [(t, p) for t in pending for p in t.panels if p.vectors is None])
        if is_over(deadline):
            break
        for text in pending:
            if text.is_rounded and not text.is_accepted():
                _begin_again(group, text, rule)
            else:
                _reconsider(text)
        embed_missing_ends(group, texts)
        plan(group, [text for text in texts if not text.is_evaluated], deadline)
        for panel in (panel for text in texts for panel in text.panels):
            panel.restore()
    _measure_noise(group, texts)
    return [_assemble(text) for text in texts]


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
    first: Rule | None = None,
) -> Pulled:
    """Integrate the path of ONE text against cotangents [C, K]: the mixed mode.

    Args:
        group: One path.
        cotangents: Directions of embedding space, [C, K].
        rule: A fixed rule, or None to choose nodes as :func:`integrate_adaptive` does.
        tolerance: Bound on the completeness error.
        max_nodes: Most nodes of the adaptive choice.
        deadline: As of :func:`integrate_adaptive`.
        first: Likewise.
    """
    text = PathPanels(
        0, tolerance, max_nodes, [whole_panel(group, 0, rule or first or gauss(FIRST_ORDER))]
    )
    start, delta = group.start_embeddings[0], text.root.increment()
    if rule is None:
        plan(group, [text], deadline)
    rows, alphas, _ = flatten([(text, panel, panel.rule) for panel in text.panels])
    weights = torch.cat([panel.width * panel.rule.weights for panel in text.panels])
    products, total = group.pulled_sums(rows, alphas, weights, cotangents.to(group.start))
    completeness = float((total - delta).norm()) / scale_of(delta, start)
    return Pulled(
        products=products,
        delta=delta,
        reference_embedding=start,
        completeness_error=completeness,
        converged=completeness <= tolerance,
        n_nodes=len(weights),
    )


@dataclass(frozen=True)
class Summed:
    """The sum of a path's token vectors by a fixed rule, from one tangent a node.

    Attributes:
        total: Σ_s G[:, s], [K] float64.
        delta: Δ, [K] float64.
        reference_embedding: e(r) at the start of the path, before any shift, [K] float64.
        completeness_error: As of :class:`Integrated`.
        converged: Whether it meets the tolerance.
        n_nodes: Nodes of the rule.
    """

    total: Tensor
    delta: Tensor
    reference_embedding: Tensor
    completeness_error: float
    converged: bool
    n_nodes: int


def integrate_totals(
    group: PathGroup, rules: Sequence[Rule], tolerance: float
) -> list[list[Summed]]:
    """Return the sums of token vectors by each of some fixed rules, for every path of a group.

    The total derivative along δ is all it takes, at 1/S of the cost of the token vectors; nodes
    that rules share are evaluated once.
    """
    both = torch.cat([rule.nodes for rule in rules])
    places, inverse = torch.unique((both * _NODE_GRID).round(), return_inverse=True)
    shares = torch.split(inverse, [rule.n_nodes for rule in rules])
    found = []
    for row in range(group.size):
        start, end = group.start_embeddings[row], group.end_embeddings[row]
        delta, scale = end - start, scale_of(end - start, start)
        rows = torch.full((len(places),), row)
        derivatives = group.totals(rows, places / _NODE_GRID)[1]
        sums = [rule.weights @ derivatives[mine] for rule, mine in zip(rules, shares, strict=True)]
        errors = [float((total - delta).norm()) / scale for total in sums]
        found.append(
            [
                Summed(total, delta, start, error, error <= tolerance, rule.n_nodes)
                for rule, total, error in zip(rules, sums, errors, strict=True)
            ]
        )
    return found


def roundings_of(group: PathGroup, rule: Rule) -> Iterator[Rounding]:
    """Measure on the first path what rounding does: that of all factors, and of tangents' only."""
    weights, numbers = rule.weights[None], torch.zeros(rule.n_nodes, dtype=torch.long)
    arguments = (numbers, rule.nodes, weights, numbers)
    exact = group.token_sums(*arguments)[0][0, 0]
    start, delta = group.start_embeddings[0], group.end_embeddings[0] - group.start_embeddings[0]
    for of_points in (True, False):
        tried = replace(group, rounding=Rounding(math.inf, of_points))
        difference = tried.token_sums(*arguments, rounded=True)[0][0, 0] - exact
        moved = torch.maximum(difference.norm(dim=0).max(), difference.sum(1).norm())
        yield Rounding(float(moved) / scale_of(delta, start), of_points)


def _is_worth_a_try(group: PathGroup) -> bool:
    """Whether to evaluate a first rule at once: its samples cost much, or choosing another does."""
    return choice_cost(group) > 0 or not is_measured_first(group.length)


def _begin_again(group: PathGroup, text: PathPanels, rule: Rule) -> None:
    """Forget what was evaluated, and round no factors any more."""
    text.begin(whole_panel(group, text.row, rule))
    text.is_rounded = False


def _evaluate(group: PathGroup, pending: Sequence[tuple[PathPanels, Panel]]) -> None:
    """Evaluate the token derivatives of every pending panel, a bounded number at once."""
    for rounded in (False, True):
        chosen = [(text, panel) for text, panel in pending if text.is_rounded == rounded]
        for first in range(0, len(chosen), _PANELS_AT_ONCE):
            some = chosen[first : first + _PANELS_AT_ONCE]
            rows, alphas, numbers = flatten([(text, panel, panel.rule) for text, panel in some])
            weights = _both_weights([panel for _, panel in some])
            sums, totals = group.token_sums(rows, alphas, weights, numbers, rounded=rounded)
            for number, (text, panel) in enumerate(some):
                if panel.error is None and not rounded:  # how steep it is belongs to its errors
                    own = totals[numbers == number]
                    panel.error = keep_samples(group, text, panel, panel.rule, own)
                panel.accept(sums[0, number].clone(), sums[1, number], text.scale)
                text.n_evaluated += panel.rule.n_nodes


def _both_weights(panels: Sequence[Panel]) -> Tensor:
    """Return the weights of the nodes of panels and of their embedded rules, [2, n]."""
    both = []
    for panel in panels:
        embedded = panel.rule.embedded_weights
        assert embedded is not None
        both.append(panel.width * torch.stack([panel.rule.weights, embedded]))
    return torch.cat(both, dim=1)


def _reconsider(text: PathPanels) -> None:
    """Reopen or bisect evaluated panels where the completeness or token error is too large."""
    if text.is_accepted():
        return
    limit, left = text.tolerance * text.scale, text.token_error()
    worst = max(text.total_error(), left)
    text.is_merged = True
    room = (text.max_nodes - text.n_evaluated) // (2 * FIRST_ORDER)
    ranked = []
    for panel in text.panels:
        share = panel.worst_token()
        ranked.append((max(share, float(panel.total_error().norm())), share, panel))
    ranked = [entry for entry in ranked if entry[2].can_improve(entry[0])]
    ranked.sort(key=lambda entry: -entry[0])
    for error, share, panel in ranked[:room]:
        _refine(text, panel, error, _CAUTION * limit / worst)
        left -= share
        if left <= limit / 2:
            break


def _refine(text: PathPanels, panel: Panel, error: float, factor: float) -> None:
    """Plan an evaluated panel again if that was not done before and may help; else bisect it."""
    is_new = panel.goal is None
    panel.reopen(factor)
    if not (is_new and panel.error is not None and panel.error > text.share(panel)):
        text.split(panel, error)


def _measure_noise(group: PathGroup, texts: Sequence[PathPanels]) -> None:
    """Measure how far rounding moves token vectors, of texts that err by little else.

    Along the path to the hidden states that rounding has perturbed, token derivatives are others.
    Those of two tokens can move by as much in opposite directions, which no embedding shows. What
    they move by is integrated, and limited by the median over the path: at a sharp turn they move a
    lot, which integrates to little (ours).
    """
    near = [
        text
        for text in texts
        if not text.is_rounded and rule_error_of(text.panels) <= _NEAR_NOISE * noise_of(text.panels)
    ]
    for first in range(0, len(near), _TEXTS_AT_ONCE):
        _measure_noise_of(group, near[first : first + _TEXTS_AT_ONCE])


def _measure_noise_of(group: PathGroup, texts: Sequence[PathPanels]) -> None:
    """Measure the noise of few texts, whose derivatives are held at every node."""
    orders = [max(_NOISE_NODES, min(_MOST_NOISE_NODES, t.n_evaluated // _PER_NODE)) for t in texts]
    rows = torch.tensor([text.row for text in texts]).repeat_interleave(torch.tensor(orders))
    nodes = torch.cat([gauss(order).nodes for order in orders])
    arguments = (rows, nodes, torch.ones(1, len(rows)), torch.arange(len(rows)))
    moved, own = (paths.token_sums(*arguments)[0] for paths in (group.perturbed(), group))
    differences = torch.split((moved - own)[0], orders)
    for text, order, difference in zip(texts, orders, differences, strict=True):
        typical = difference.norm(dim=1).amax(dim=1).median()
        integral = torch.einsum("n,nks->ks", gauss(order).weights, difference).norm(dim=0).max()
        text.token_noise = _NOISE_SAFETY * float(torch.minimum(typical, integral))


def _assemble(text: PathPanels, is_estimated: bool = True) -> Integrated:
    start, end = text.root.start, text.root.end
    assert start is not None
    assert end is not None
    vectors = torch.stack([p.vectors for p in text.panels if p.vectors is not None]).sum(0)
    completeness = text.total_error() / text.scale
    token = text.token_error() / text.scale if is_estimated else float("inf")
    return Integrated(
        vectors=vectors,
        delta=end - start,
        reference_embedding=start,
        completeness_error=completeness,
        token_error=token,
        converged=max(completeness, token) <= text.tolerance,
        n_nodes=text.n_evaluated,
    )
