"""The nodes that paths of a model and layer begin with, found on the paths of a few texts of ours.

Sharp turns of a model lie at much the same place of every path, so that a few short texts tell
where. How much a rule errs differs from text to text: the chance that a text misses the tolerance
follows from its errors on ours and their usual spread. What misses is sampled at the nodes of that
rule and of its own, and evaluated at its own, after choosing, which takes time where evaluating
takes little. The rule is taken that costs the fewest nodes with all that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

import torch

from xsiam.nodes import (
    candidates,
    choice_cost,
    error_on,
    fitted_curve,
    plan,
    sample_cost,
    whole_panel,
)
from xsiam.panels import FIRST_ORDER, PathPanels, gauss
from xsiam.paths import PathGroup
from xsiam.quadrature import Rule, panelled, sinh_mapped

# How the logarithm of a rule's error spreads over texts.
_SPREAD = NormalDist(sigma=1.0)
# A rule that errs by less than this share of the tolerance on xsiam's own texts misses none.
_LEAST_SHARE = 0.02
# A text that misses the first rule is planned to this share of the tolerance.
_OWN_SHARE = 0.5
# A path of ours that takes more nodes than this is left, and there is no rule of its kind to try;
# where choosing takes longer than evaluating, so many times the nodes are fine.
_MOST_PROBED, _MORE_PROBED = 64, 4
# By how much the nodes of our own panels are multiplied for a rule of all texts.
_FACTORS = (1.2, 1.5, 1.8, 2.2)
_NOWHERE = (0.5, 1e3)  # a map so wide that it is none


@dataclass(frozen=True)
class _Probe:
    """One text of ours, with a plan for its path.

    Attributes:
        group: Its path, among others.
        text: Its panels.
        limit: What a rule may err.
        n_nodes: Nodes of its own rule, 0 before it is known.
    """

    group: PathGroup
    text: PathPanels
    limit: float
    n_nodes: int = 0

    def cost_of_missing(self, rule: Rule, error: float) -> float:
        """Return the nodes that a first rule costs beside its own, where it errs so much here."""
        again = sample_cost(self.group) * (rule.n_nodes + self.n_nodes) + self.n_nodes
        return _chance_of_missing(error / self.limit) * (again + choice_cost(self.group))


def first_rule(groups: Sequence[PathGroup], tolerance: float, max_nodes: int) -> Rule:
    """Return the nodes to begin with, from the paths of some groups.

    One rule for the whole path where every text of ours has one. Where not, and choosing takes
    longer than evaluating, panels with a rule each that do for all texts of ours, as one rule. Else
    the plain one, as where a path of ours takes too many nodes.
    """
    plain, probes = gauss(FIRST_ORDER), []
    for group in groups:
        budget = min(max_nodes, _MOST_PROBED * (_MORE_PROBED if choice_cost(group) else 1))
        texts = [
            PathPanels(i, tolerance, budget, [whole_panel(group, i, plain)])
            for i in range(group.size)
        ]
        plan(group, texts, None)
        if any(text.worst_panels() for text in texts):
            return plain
        probes += [_Probe(group, text, tolerance * text.scale) for text in texts]
    found = _whole_rule(probes, max_nodes)
    if found is None and all(choice_cost(group) for group in groups):
        found = _panelled_rule(probes, max_nodes)
    return found or plain


def _whole_rule(probes: Sequence[_Probe], max_nodes: int) -> Rule | None:
    """Return the rule for whole paths that costs least, None where a text of ours has none."""
    fitted, rules = [], []
    for probe in probes:
        curve = fitted_curve(probe.text, probe.text.root)
        if curve is None:
            return None
        tried = candidates(curve, max_nodes, large=choice_cost(probe.group) > 0)
        within = list(_within(probe.limit, tried))
        own = [rule.n_nodes for rule, error in within if error <= _OWN_SHARE * probe.limit]
        if not own:
            return None
        rules += [rule for rule, _ in within]
        fitted.append((_Probe(probe.group, probe.text, probe.limit, own[0]), curve))
    return min(
        rules,
        key=lambda rule: (
            rule.n_nodes
            + fmean(probe.cost_of_missing(rule, error_on(curve, rule)) for probe, curve in fitted)
        ),
    )


def _panelled_rule(probes: Sequence[_Probe], max_nodes: int) -> Rule | None:
    """Return the rule of panels that costs least, None where each misses a text of ours.

    Panels are all that any text of ours was cut into, with the nodes of the text that takes most of
    them there, and some more. How much such a rule errs is measured on the model itself.
    """
    planned = [
        _Probe(p.group, p.text, p.limit, sum(panel.rule.n_nodes for panel in p.text.panels))
        for p in probes
    ]
    edges = sorted({1.0, *(panel.left for probe in probes for panel in probe.text.panels)})
    parts = [
        max(_part_of(probe.text, left, right) for probe in probes)
        for left, right in itertools.pairwise(edges)
    ]
    best, least = None, math.inf
    for factor in _FACTORS:
        rule = panelled(edges, [_with_nodes(factor * n_nodes, peak) for n_nodes, peak in parts])
        if rule.n_nodes > max_nodes:
            break
        errors = [_measured_error(probe, rule) for probe in planned]
        cost = rule.n_nodes + fmean(
            probe.cost_of_missing(rule, error) for probe, error in zip(planned, errors, strict=True)
        )
        worst = max(error / probe.limit for probe, error in zip(planned, errors, strict=True))
        if worst <= 1 and cost < least:
            best, least = rule, cost
        if worst <= _LEAST_SHARE:
            break
    return best


def _part_of(text: PathPanels, left: float, right: float) -> tuple[float, tuple[float, float]]:
    """Return the nodes that a text takes on a part of one of its panels, and where they crowd.

    A part of a panel takes more nodes than its share of them: as the root of it (ours).
    """
    panel = next(p for p in text.panels if p.left <= left and right <= p.right)
    share, start = (right - left) / panel.width, (left - panel.left) / panel.width
    centre, width = panel.rule.peak or _NOWHERE
    return panel.rule.n_nodes * math.sqrt(share), ((centre - start) / share, width / share)


def _with_nodes(n_nodes: float, peak: tuple[float, float]) -> Rule:
    """Return the Gauss-Legendre rule of at least so many nodes that crowd around a peak."""
    return sinh_mapped(gauss(math.ceil(n_nodes)), *peak)


def _measured_error(probe: _Probe, rule: Rule) -> float:
    """Return how much a rule errs on the sum over tokens, exactly."""
    rows = torch.full((rule.n_nodes,), probe.text.row)
    derivatives = probe.group.totals(rows, rule.nodes)[1]
    return float((rule.weights @ derivatives - probe.text.root.increment()).norm())


def _within(limit: float, rules: Iterable[tuple[Rule, float]]) -> Iterator[tuple[Rule, float]]:
    """Yield rules that err by no more than the limit, up to the first that errs by far less."""
    for rule, error in rules:
        if error <= limit:
            yield rule, error
        if error <= _LEAST_SHARE * limit:
            return


def _chance_of_missing(error: float) -> float:
    """Return how often a rule misses a limit that it errs by ``error`` times of on a text of ours.

    Errors on other texts are taken to be as large on average, and log-normally distributed (ours).
    """
    return _SPREAD.cdf(math.log(error)) if error > 0 else 0.0
