"""Choose the nodes of attribution paths: where to evaluate, before anything costly is evaluated.

The total derivative along a path costs one tangent where the token vectors cost S, and its integral
over any panel [α, β] is known exactly: ẽ(x(β)) − ẽ(x(α)). So nodes are chosen on exact errors. From
the samples of the total derivative a rational curve is fitted; on it any rule can be tried for
nothing. The cheapest rule that does on the curve, Gauss-Legendre in a variable that crowds the
nodes around a peak, is then measured on the model itself, which gives new samples. Only where a few
such rules miss is the panel bisected.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from xsiam.curves import Curve, RationalCurve, rational_curve
from xsiam.panels import FIRST_ORDER, MAX_TRIALS, Panel, PathPanels, gauss, scale_of
from xsiam.paths import PathGroup
from xsiam.quadrature import Array, Rule, sinh_map, sinh_mapped

Trial = tuple[PathPanels, Panel, Rule]

# Noise is what rounding was measured to move an embedding by, and at least so many units in the
# last place of its norm.
_NOISE_UNITS = 1.0
_ORDERS = (*range(2, 19), 20, 22, 24)
# More nodes for a rule of many texts, which choose none of their own.
_LARGE_ORDERS = (*range(28, 61, 4), 64, 72, 80, 96, 112, 128)
# Choosing rules for a text, which the processor does, takes about as long as an accelerator takes
# for so many of its nodes: 37 ms against 0.05 ms a node at layer 4 of all-MiniLM-L6-v2, and some
# four times as much at layer 0, on an H200.
_CHOICE_IN_NODES = 200
# The curve's prediction must lie this far below what is allowed before a rule is measured.
_PREDICTION_SHARE = 0.7
# The curve need not follow samples closer than this share of what is allowed.
_MISFIT_SHARE = 0.05
# Fewer nodes are worth measuring where they save at least so many, and more than measuring costs:
# a node of the total derivative takes about as much as three tangents of a token.
_LEAST_SAVED, _TANGENTS_PER_SAMPLE = 2, 3.0
_WORTH_A_TRY = 0.15
# A rational curve is fitted to no fewer samples; with fewer a panel is bisected.
FEWEST_SAMPLES = 6
# Peaks that are tried first, in units of the panel, and how the best of them are varied.
_CENTRES, _WIDTHS = (
    grid.ravel()
    for grid in np.meshgrid(np.linspace(-0.1, 1.1, 13), [0.03, 0.06, 0.12, 0.25, 0.5, 2.0])
)
_SHIFTS, _FACTORS = (grid.ravel() for grid in np.meshgrid(np.linspace(-0.5, 0.5, 5), [0.7, 1, 1.4]))
_LARGEST_SHIFT = 0.1
_TRIED_ORDERS, _LARGE_TRIED_ORDERS = (6, 10, 14), (20, 32, 48)
_KEPT_COARSE, _KEPT_FINE = 3, 4


def whole_panel(group: PathGroup, row: int, rule: Rule, *, rounded: bool = False) -> Panel:
    """Return the panel [0, 1] of a path.

    Args:
        group: The paths.
        row: Which one.
        rule: The nodes to begin with.
        rounded: Whether its matrix products round their factors, which counts as noise.
    """
    start, end = group.start_embeddings[row], group.end_embeddings[row]
    norm = float(torch.maximum(start.norm(), end.norm()))
    units = _NOISE_UNITS * torch.finfo(group.start.dtype).eps * norm
    noise = max(units, float(group.noise[row]))
    if rounded and group.rounding is not None:
        noise += group.rounding.moves * scale_of(end - start, start)
    return Panel(0.0, 1.0, start, end, noise, rule)


def plan(group: PathGroup, texts: Sequence[PathPanels], deadline: float | None) -> None:
    """Choose panels and rules until the planned errors of every text are what it allows.

    Args:
        group: The paths.
        texts: Their panels; those without token vectors are planned.
        deadline: ``time.monotonic()`` value after which the plan is left as it is.
    """
    trials = [(t, p, p.rule) for t in texts for p in t.panels if p.error is None]
    trials = trials or _next_trials(group, texts)
    while trials:
        _measure(group, trials)
        if is_over(deadline):
            return
        trials = _next_trials(group, texts)


def proposed_rule(text: PathPanels, panel: Panel, most: int) -> Rule | None:
    """Return the rule of fewest nodes that does on a curve through the samples, or None.

    Args:
        text: What was sampled.
        panel: Where the rule is for.
        most: The most nodes that it may have.
    """
    curve = fitted_curve(text, panel)
    if curve is None:
        return None
    allowed = _PREDICTION_SHARE * text.share(panel)
    return next((rule for rule, error in candidates(curve, most) if error <= allowed), None)


def fitted_curve(text: PathPanels, panel: Panel) -> RationalCurve | None:
    """Return the curve through the samples of a panel, or None where there are too few of them."""
    points, samples = _samples_in(text, panel)
    if len(points) < FEWEST_SAMPLES or not samples.any():
        return None
    misfit = max(_MISFIT_SHARE * text.share(panel), panel.whole_noise)
    return rational_curve(points, samples, panel.increment().numpy(), misfit)


def candidates(curve: Curve, most: int, *, large: bool = False) -> Iterator[tuple[Rule, float]]:
    """Yield rules of ever more nodes, up to ``most``, that suit a curve, and their errors on it.

    Of each number of nodes these are Gauss-Legendre as it is, and with the best peak; ``large``
    adds numbers of nodes beyond which bisection is usually cheaper.
    """
    exact = curve.integral()
    centres, widths = _peaks(curve, exact, _TRIED_ORDERS + (_LARGE_TRIED_ORDERS if large else ()))
    orders = (*_ORDERS, *_LARGE_ORDERS) if large else _ORDERS
    for order in (order for order in orders if order <= most):
        plain = gauss(order)
        yield plain, error_on(curve, plain)
        errors = _errors(curve, exact, *_mapped(order, centres, widths))
        best = int(errors.argmin())
        yield sinh_mapped(plain, float(centres[best]), float(widths[best])), float(errors[best])


def error_on(curve: Curve, rule: Rule) -> float:
    """Return the error of a rule on a curve."""
    nodes, weights = rule.nodes.numpy()[None], rule.weights.numpy()[None]
    return float(_errors(curve, curve.integral(), nodes, weights)[0])


def sample_cost(length: int) -> float:
    """Return what measuring a node costs, as a share of what evaluating all its tokens does."""
    return min(1.0, _TANGENTS_PER_SAMPLE / length)


def is_measured_first(length: int) -> bool:
    """Whether a first rule is measured on a text's sum before its tokens are evaluated.

    Where that costs a large share of evaluating them, they are at once: the rule does for most.
    """
    return sample_cost(length) < _WORTH_A_TRY


def choice_cost(group: PathGroup) -> int:
    """Return the nodes of a text that take as long as choosing rules for it: 0 on processors."""
    return 0 if group.start.device.type == "cpu" else _CHOICE_IN_NODES


def is_over(deadline: float | None) -> bool:
    """Whether a deadline has passed."""
    return deadline is not None and time.monotonic() > deadline


def flatten(trials: Sequence[Trial]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return text, position and trial number of every node, each [n]."""
    counts = torch.tensor([rule.n_nodes for _, _, rule in trials])
    rows = torch.tensor([text.row for text, _, _ in trials]).repeat_interleave(counts)
    numbers = torch.arange(len(trials)).repeat_interleave(counts)
    return rows, torch.cat([panel.alphas(rule) for _, panel, rule in trials]), numbers


def keep_samples(
    group: PathGroup, text: PathPanels, panel: Panel, rule: Rule, values: torch.Tensor
) -> float:
    """Keep the total derivatives [n, K] at a rule's nodes; return the rule's error on the panel."""
    text.points.append(panel.alphas(rule))
    text.samples.append(values)
    resolution = torch.finfo(group.start.dtype).eps
    panel.steepness = max(panel.steepness, resolution * float(values.norm(dim=1).max()))
    return float((panel.width * (rule.weights @ values) - panel.increment()).norm())


def embed_missing_ends(group: PathGroup, texts: Sequence[PathPanels]) -> None:
    """Fill in the embeddings where panels were bisected."""
    missing = [(t, i) for t in texts for i, p in enumerate(t.panels) if p.end is None]
    if not missing:
        return
    rows = torch.tensor([text.row for text, _ in missing])
    alphas = torch.tensor([t.panels[i].right for t, i in missing], dtype=torch.float64)
    embeddings = group.embed(rows, alphas)
    for (text, i), embedding in zip(missing, embeddings, strict=True):
        text.panels[i].end = text.panels[i + 1].start = embedding


def _measure(group: PathGroup, trials: Sequence[Trial]) -> None:
    """Measure the exact error of rules on panels; keep those that do, and every sample."""
    rows, alphas, _ = flatten(trials)
    _, derivatives = group.totals(rows, alphas)
    counts = [rule.n_nodes for _, _, rule in trials]
    for (text, panel, rule), values in zip(trials, torch.split(derivatives, counts), strict=True):
        error = keep_samples(group, text, panel, rule, values)
        share = text.share(panel)
        before = float("inf") if panel.error is None else panel.error
        if error <= share or before > max(share, error):
            panel.rule, panel.error = rule, error
            if panel.is_whole and error <= share:
                text.panels = [panel]  # it may have been bisected before


def _next_trials(group: PathGroup, texts: Sequence[PathPanels]) -> list[Trial]:
    trials = []
    for text in texts:
        if worst := text.worst_panels():
            trials += [trial for panel in worst for trial in _better(text, panel)]
        else:
            cost = math.inf if choice_cost(group) else sample_cost(group.length)
            trials += _merged(text, cost) or [
                trial for panel in text.panels for trial in _cheaper(text, panel, cost)
            ]
    embed_missing_ends(group, texts)
    return trials


def _better(text: PathPanels, panel: Panel) -> list[Trial]:
    """Return what may lower the error of a panel: another rule, or its halves."""
    if panel.trials < MAX_TRIALS:
        panel.trials += 1
        if rule := proposed_rule(text, panel, panel.rule.n_nodes + text.room):
            return [(text, panel, rule)]
        panel.trials = MAX_TRIALS
        if panel.goal is not None and panel not in text.worst_panels():
            return []
    if text.room < 2 * FIRST_ORDER - panel.rule.n_nodes:
        return []
    return [(text, half, half.rule) for half in text.split(panel, panel.error or 0.0)]


def _cheaper(text: PathPanels, panel: Panel, cost: float) -> list[Trial]:
    """Return a rule of fewer nodes for a panel that is accurate enough, once.

    It must save more nodes than measuring it takes, at ``cost`` of an evaluated node each.
    """
    if panel.vectors is not None or panel.is_thrifty:
        return []
    panel.is_thrifty = True
    n_nodes = panel.rule.n_nodes
    most = min(n_nodes - _LEAST_SAVED, int(n_nodes / (1 + cost)))
    rule = None if most < _ORDERS[0] else proposed_rule(text, panel, most)
    return [] if rule is None else [(text, panel, rule)]


def _merged(text: PathPanels, cost: float) -> list[Trial]:
    """Return one rule for a whole path that was bisected, once all samples are there."""
    if len(text.panels) == 1 or text.is_merged or any(p.vectors is not None for p in text.panels):
        return []
    text.is_merged = True
    n_nodes = sum(panel.rule.n_nodes for panel in text.panels)
    most = min(n_nodes - _LEAST_SAVED, int(n_nodes / (1 + cost)))
    rule = None if most < _ORDERS[0] else proposed_rule(text, text.root, most)
    return [] if rule is None else [(text, text.whole_again(), rule)]


def _samples_in(text: PathPanels, panel: Panel) -> tuple[Array, Array]:
    """Return positions within the panel, [m] in [0, 1], and derivatives by them, [m, K]."""
    alphas, values = torch.cat(text.points).numpy(), torch.cat(text.samples).numpy()
    inside = (alphas >= panel.left) & (alphas <= panel.right)
    points, first = np.unique((alphas[inside] - panel.left) / panel.width, return_index=True)
    return points, values[inside][first] * panel.width


def _peaks(curve: Curve, exact: Array, orders: Sequence[int]) -> tuple[Array, Array]:
    """Return centres and widths of the maps that serve the curve best: a grid, then finer."""
    best = _best([_coarse(order) for order in orders], curve, exact, _KEPT_COARSE)
    centres, widths = _CENTRES[best][:, None], _WIDTHS[best][:, None]
    centres = (centres + _SHIFTS * np.minimum(widths, _LARGEST_SHIFT)).ravel()
    widths = (widths * _FACTORS).ravel()
    rules = [_mapped(order, centres, widths) for order in orders]
    best = _best(rules, curve, exact, _KEPT_FINE)
    return centres[best], widths[best]


def _best(rules: Sequence[tuple[Array, Array]], curve: Curve, exact: Array, kept: int) -> Array:
    """Return which maps are among the best few for one of the orders."""
    ranked = [np.argsort(_errors(curve, exact, *rule))[:kept] for rule in rules]
    found: Array = np.unique(np.concatenate(ranked))
    return found


def _errors(curve: Curve, exact: Array, nodes: Array, weights: Array) -> Array:
    """Return the error of rules, nodes and weights [R, n], on the curve, [R]."""
    values = curve(nodes.ravel()).reshape(*nodes.shape, -1)
    errors: Array = np.linalg.norm(np.einsum("rn,rnd->rd", weights, values) - exact, axis=1)
    return errors


@functools.cache
def _coarse(order: int) -> tuple[Array, Array]:
    return _mapped(order, _CENTRES, _WIDTHS)


def _mapped(order: int, centres: Array, widths: Array) -> tuple[Array, Array]:
    """Return nodes and weights [R, n] of one Gauss-Legendre rule under R maps."""
    rule = gauss(order)
    nodes, slope = sinh_map(rule.nodes.numpy(), centres[:, None], widths[:, None])
    return nodes, rule.weights.numpy() * slope
