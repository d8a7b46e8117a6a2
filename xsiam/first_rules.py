"""The nodes that paths of a model and layer begin with, found on the paths of a few texts of ours.

Sharp turns of a model lie at much the same place of every path, so that a few short texts tell
where. Some of them are planned, and all are sampled twice as densely as those plans ask for, so
that any rule can be tried on all of them at once. How much a rule errs differs from text to text:
the chance that a text misses the tolerance follows from its errors on ours and their usual spread.
What misses is planned on its own. For every length of text the rule is taken that costs the fewest
nodes with all that, if that is fewer than planning every text costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

import numpy as np
import torch

from xsiam.curves import Curve, Piece, PiecewiseCurve, principal
from xsiam.nodes import (
    FEWEST_SAMPLES,
    candidates,
    choice_cost,
    error_on,
    is_measured_first,
    plan,
    sample_cost,
    whole_panel,
)
from xsiam.panels import FIRST_ORDER, Panel, PathPanels, gauss
from xsiam.paths import PathGroup
from xsiam.quadrature import Array, Rule, panelled, sinh_mapped

# How the logarithm of a rule's error spreads over texts that are like one of ours.
_SPREAD = NormalDist(sigma=0.5)
# A rule that errs by less than this share of the tolerance on xsiam's own texts misses hardly any.
_LEAST_SHARE = 0.1
# A plain one that errs by less than this share is exact.
_STRAIGHT = 3e-3
# So many texts are planned. One that takes more nodes than this is left, and there is no rule of
# its kind to try; where choosing takes longer than evaluating, so many times the nodes are fine.
_PLANNED, _MOST_PLANNED, _MORE_PLANNED = 3, 64, 4
# A token is estimated to err by so many times what the sum over tokens does (1 to 3 on STS-B), so
# that it takes so many times the nodes of a plan, which looks at the sum.
_TOKENS_ERR, _TOKENS_TAKE = 1.6, 1.5
# Samples are taken at so many times the nodes of a plan and a few more, and at so many at least: a
# polynomial through fewer is integrated exactly by rules of half as many nodes, whatever the path.
_DENSITY, _EXTRA, _FEWEST = 2, 4, 2 * FEWEST_SAMPLES
# What samples do not tell: directions of embedding space in which a path moves by less than this
# share of what it may err by.
_LEAST_MOVE = 1e-3
# By how much the nodes of our own panels are multiplied for a rule of all texts.
_FACTORS = (1.2, 1.5, 1.8, 2.2)
_NOWHERE = (0.5, 1e3)  # a map so wide that it is none


@dataclass(frozen=True)
class _Together:
    """The curves of several texts as one, so that a rule for all of them can be sought."""

    curves: Sequence[Curve]

    def __call__(self, points: Array) -> Array:
        """Evaluate at points [p]: coordinates [p, r], of one curve after the other."""
        return np.concatenate([curve(points) for curve in self.curves], axis=1)

    def integral(self) -> Array:
        """Integrate over [0, 1]: coordinates [r]."""
        return np.concatenate([curve.integral() for curve in self.curves])


@dataclass(frozen=True)
class FirstRules:
    """Rules that paths of a model and layer may begin with: what each costs depends on the text.

    Attributes:
        options: Rules, with the chance that a text misses the tolerance by them.
        n_sampled: Nodes that a text is sampled at where it is planned on its own.
        n_planned: Nodes that it is evaluated at then.
        choosing: Nodes that choosing them takes as long as.
    """

    options: Sequence[tuple[Rule, float]] = ()
    n_sampled: float = 0.0
    n_planned: float = 0.0
    choosing: float = 0.0

    def of(self, length: int) -> Rule | None:
        """Return the rule that costs least for texts of so many tokens, None if planning does."""
        sampling = sample_cost(length)
        planning = sampling * self.n_sampled + self.n_planned + self.choosing
        is_measured = not self.choosing and is_measured_first(length)
        best, least = None, planning
        for rule, missing in self.options:
            share = sampling + 1 - missing if is_measured else 1.0  # of its nodes' cost
            cost = share * rule.n_nodes + missing * planning
            if cost < least:
                best, least = rule, cost
        return best


def first_rules(groups: Sequence[PathGroup], tolerance: float, max_nodes: int) -> FirstRules:
    """Return the nodes to begin with, from the paths of some groups.

    There are rules for whole paths, and panels with a rule each as one rule. There is none where a
    path of ours takes too many nodes.
    """
    plain = gauss(FIRST_ORDER)
    choosing = min(choice_cost(group) for group in groups)
    limit = min(max_nodes, _MOST_PLANNED * (_MORE_PLANNED if choosing else 1))
    texts = [
        (group, PathPanels(row, tolerance, limit, [whole_panel(group, row, plain)]))
        for group in groups
        for row in range(group.size)
    ]
    planned = texts[:_PLANNED]
    for group in groups:
        own = [text for its_group, text in planned if its_group is group]
        plan(group, own, None)
        if any(text.worst_panels() for text in own):
            return FirstRules()
    panels = [text.panels for _, text in planned]
    rest = [max(panels, key=_n_nodes)] * (len(texts) - len(planned))
    curves = [_curve(*both, own) for both, own in zip(texts, panels + rest, strict=True)]
    rules = [*_whole_rules(curves, max_nodes), *_panelled_rules(panels, max_nodes)]
    return FirstRules(
        [(rule, fmean(_chance_of_missing(error_on(c, rule)) for c in curves)) for rule in rules],
        n_sampled=fmean(sum(map(len, text.points)) for _, text in planned),
        n_planned=_TOKENS_TAKE * fmean(map(_n_nodes, panels)),
        choosing=choosing,
    )


def _n_nodes(panels: Sequence[Panel]) -> int:
    return sum(panel.rule.n_nodes for panel in panels)


def _curve(group: PathGroup, text: PathPanels, panels: Sequence[Panel]) -> PiecewiseCurve:
    """Sample the total derivative along a path, in units of what a rule may err, on panels."""
    sizes = [max(_FEWEST, _DENSITY * panel.rule.n_nodes + _EXTRA) for panel in panels]
    rules = [_with_nodes(size, p.rule.peak) for size, p in zip(sizes, panels, strict=True)]
    alphas = torch.cat([p.alphas(rule) for p, rule in zip(panels, rules, strict=True)])
    samples = group.totals(torch.full((len(alphas),), text.row), alphas)[1]
    values, _ = principal(samples.numpy() / (text.tolerance * text.scale), _LEAST_MOVE)
    parts = np.split(values, np.cumsum([rule.n_nodes for rule in rules])[:-1])
    return PiecewiseCurve(
        [
            Piece(panel.left, panel.right, rule, part)
            for panel, rule, part in zip(panels, rules, parts, strict=True)
        ]
    )


def _whole_rules(curves: Sequence[Curve], max_nodes: int) -> Iterator[Rule]:
    """Yield rules for whole paths, up to the first that hardly any text misses.

    None has fewer nodes than planning needs samples, for a text that missed it would be bisected;
    but where paths are straight, as at the last layer, none misses.
    """
    for rule, error in candidates(_Together(curves), max_nodes, large=True):
        is_straight = rule.peak is None and error <= _STRAIGHT
        if rule.n_nodes < FEWEST_SAMPLES and not is_straight:
            continue
        yield rule
        if error <= _LEAST_SHARE:
            return


def _panelled_rules(planned: Sequence[Sequence[Panel]], max_nodes: int) -> Iterator[Rule]:
    """Yield rules of panels.

    Panels are all that any text of ours was cut into, with the nodes of the text that takes most of
    them there, and some more.
    """
    edges = sorted({1.0, *(panel.left for panels in planned for panel in panels)})
    parts = [
        max(_part_of(panels, left, right) for panels in planned)
        for left, right in itertools.pairwise(edges)
    ]
    for factor in _FACTORS:
        rule = panelled(edges, [_with_nodes(factor * n_nodes, peak) for n_nodes, peak in parts])
        if FEWEST_SAMPLES <= rule.n_nodes <= max_nodes:
            yield rule


def _part_of(
    panels: Sequence[Panel], left: float, right: float
) -> tuple[float, tuple[float, float]]:
    """Return the nodes that a text takes on a part of one of its panels, and where they crowd.

    A part of a panel takes more nodes than its share of them: as the root of it (ours).
    """
    panel = next(p for p in panels if p.left <= left and right <= p.right)
    share, start = (right - left) / panel.width, (left - panel.left) / panel.width
    centre, width = panel.rule.peak or _NOWHERE
    return panel.rule.n_nodes * math.sqrt(share), ((centre - start) / share, width / share)


def _with_nodes(n_nodes: float, peak: tuple[float, float] | None) -> Rule:
    """Return the Gauss-Legendre rule of at least so many nodes that crowd around a peak, if any."""
    plain = gauss(math.ceil(n_nodes))
    return plain if peak is None else sinh_mapped(plain, *peak)


def _chance_of_missing(error: float) -> float:
    """Return how often a rule misses a limit that it errs by ``error`` times of on a text of ours.

    Errors on texts like it are taken to be as large on average, and log-normally distributed
    (ours); those of single tokens are estimated to be some larger.
    """
    return _SPREAD.cdf(math.log(_TOKENS_ERR * error)) if error > 0 else 0.0
