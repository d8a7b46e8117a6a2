"""How accurate the attributions are, and what fixed numbers of nodes would have given."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xsiam.analysis.base import (
    MODEL,
    AbstractAnalysis,
    AnalysisResult,
    Needs,
    ResultTable,
    VectorRequest,
    register_analysis,
)
from xsiam.analysis.comparison import maximal_score
from xsiam.analysis.context import Context
from xsiam.analysis.fixed_rules import RuleErrors, fixed_rule_errors
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Finding, judge
from xsiam.attribution import PairAttributor
from xsiam.errors import ConvergenceWarning, TruncationWarning
from xsiam.pairs import PairDataset
from xsiam.quadrature import fixed_rule
from xsiam.reading import TokenVectors
from xsiam.result import PairAttribution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RULE = "riemann"
N_NODES = (5, 10, 25, 50, 100, 200)
"""Nodes of the published rule; all lie among those of the last."""

FEW, MANY, COMPARED = 10, 100, 50
"""Nodes between which errors have to fall, and with which layers are compared."""

TIMED_TEXTS = 20
_WARM_UP = "A child throws a ball over the fence."
_FLOAT_NOISE = 1e-6  # of the maximal score: what float32 leaves of sums, whatever the rule
_LEAST_ERROR = 1e-8  # errors below are taken as this one before logarithms

Array = NDArray[np.float64]


def residual_bound(a: TokenVectors, b: TokenVectors) -> float:
    """Return what the completeness errors ε of two texts allow |residual| to be.

    (ε_a |Δ_a| |ẽ(b)| + ε_b |Δ_b| |ẽ(a)| + ε_a ε_b |Δ_a| |Δ_b|) / n, in units of the score.
    """
    left, right = (t.completeness_error * float(t.delta.norm()) for t in (a, b))
    outer = left * float(b.embedding.norm()) + right * float(a.embedding.norm())
    return (outer + left * right) / (a.norm * b.norm)


@register_analysis
class Accuracy(AbstractAnalysis):
    """Errors of the attributions, and the published curves of error against N (P1)."""

    name = "accuracy"
    question = "How accurate are the attributions, and how many nodes does that take?"
    source = "P1"
    version = 2
    needs = Needs(min_pairs=SMALLEST_SAMPLE)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for the sampled pairs at every layer."""
        return context.pair_requests()

    def run(self, context: Context) -> AnalysisResult:
        """Summarise the errors, time some texts, and measure the published rule."""
        subset = context.costly_pairs()
        errors, curves = [], []
        metrics: dict[str, float] = {}
        fixed: dict[int, list[list[RuleErrors]]] = {}
        reached: dict[int, list[PairAttribution]] = {}
        for layer in context.layers:
            row = _errors_row(context, layer)
            row["seconds_per_text"] = _seconds_per_text(context, layer, subset)
            errors.append(row)
            metrics |= {
                f"layer_{layer}/{key}": row[key]
                for key in ("completeness_error", "residual_abs_max", "nodes_median", "converged")
            }
            fixed[layer] = _fixed(context, layer, subset)
            reached[layer] = context.attributions(MODEL, layer, subset.texts_a, subset.texts_b)
            curves += _curve(context, layer, fixed[layer], reached[layer])
        rule = context.attributor(MODEL, context.layers[0]).quadrature
        return AnalysisResult(
            tables={
                "errors": ResultTable(
                    errors,
                    "over text pairs (nodes and converged: over texts); completeness error: mean "
                    "with interval, of the worse text; residual: score minus all terms; of bound: "
                    "largest share of what the completeness errors allow, where that is above "
                    "float noise; token error: largest estimate, relative to |Δ|; seconds on this "
                    "machine",
                    shown=True,
                ),
                "curves": ResultTable(
                    curves,
                    f"errors against the nodes of the published rule (`{RULE}`), and of the "
                    f"attributions ({rule}, median nodes of the worse text): mean over text pairs "
                    "with interval, and standard deviation; attribution error is |score − all "
                    "terms|, which is |f − ΣA| of a model with a reference shift",
                ),
                "published": ResultTable(
                    [_published(r) for r in curves if r["error"] == "attribution"],
                    "attribution error as it was published, mean ± standard deviation over pairs",
                    shown=True,
                ),
            },
            metrics=metrics,
            findings=_findings(context, fixed, reached),
            notes=[
                f"Errors are of n = {len(context.pairs)} pairs. Curves are of n = {len(subset)} of "
                f"them, seconds of up to {TIMED_TEXTS} of their texts, integrated anew, on this "
                "machine.",
                "Errors of fixed rules are those of the sums over tokens, which is all that both "
                "errors speak of.",
            ],
        )

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw errors against nodes, a curve a layer; crosses are the attributions' own."""
        return {
            kind: _draw_curves([r for r in result.tables["curves"].rows if r["error"] == kind])
            for kind in ("completeness", "attribution")
        }


def _errors_row(context: Context, layer: int) -> dict[str, Any]:
    results = context.pair_attributions(MODEL, layer)
    both = list(context.pair_vectors(MODEL, layer))
    residuals = np.abs([r.residual for r in results])
    texts = {(t.text, t.role): t for pair in both for t in pair}
    nodes = np.array([t.n_nodes for t in texts.values()])
    tokens = [t.token_error for t in texts.values()]
    completeness = context.interval([r.completeness_error for r in results])
    return {
        "layer": layer,
        "completeness_error": completeness.estimate,
        "low": completeness.low,
        "high": completeness.high,
        "completeness_error_max": max(r.completeness_error for r in results),
        "residual_abs_mean": float(residuals.mean()),
        "residual_abs_max": float(residuals.max()),
        "residual_of_bound": largest_share(
            *(
                np.array(values)
                for values in (
                    residuals,
                    [residual_bound(*pair) for pair in both],
                    [maximal_score(*pair) for pair in both],
                )
            )
        ),
        "token_error_max": max(tokens) if np.isfinite(tokens).all() else None,
        "nodes_median": float(np.median(nodes)),
        "nodes_p95": float(np.quantile(nodes, 0.95)),
        "nodes_max": int(nodes.max()),
        "converged": float(np.mean([t.converged for t in texts.values()])),
        "n_pairs": len(results),
        "n_texts": len(texts),
    }


def largest_share(residuals: Array, bounds: Array, maximal_scores: Array) -> float | None:
    """Return the largest |residual| / bound among bounds above float noise, None without any."""
    above = bounds > _FLOAT_NOISE * maximal_scores
    return float((residuals[above] / bounds[above]).max()) if above.any() else None


def _seconds_per_text(context: Context, layer: int, subset: PairDataset) -> float:
    keys = dict.fromkeys(
        (text, role)
        for pair in zip(subset.texts_a, subset.texts_b, strict=True)
        for text, role in zip(pair, context.roles, strict=True)
    )
    chosen = list(keys)[:TIMED_TEXTS]
    attributor = PairAttributor(context.encoder, layer, **context.attributor_settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # noted of all texts
        warnings.simplefilter("ignore", TruncationWarning)
        attributor.token_vectors([_WARM_UP], context.roles[0])
        start = time.perf_counter()
        for role in dict.fromkeys(context.roles):
            texts = [text for text, own in chosen if own == role]
            if texts:
                attributor.token_vectors(texts, role)
    return (time.perf_counter() - start) / len(chosen)


def _fixed(context: Context, layer: int, subset: PairDataset) -> list[list[RuleErrors]]:
    rules = [fixed_rule(RULE, n) for n in N_NODES]
    attributor = context.attributor(MODEL, layer)
    return fixed_rule_errors(attributor, subset.texts_a, subset.texts_b, rules, context.roles)


def _completeness(errors: RuleErrors | PairAttribution) -> float:
    return max(errors.completeness_error_a, errors.completeness_error_b)


def _curve(
    context: Context,
    layer: int,
    fixed: Sequence[Sequence[RuleErrors]],
    reached: Sequence[PairAttribution],
) -> list[dict[str, Any]]:
    points: list[tuple[str, float, Sequence[RuleErrors | PairAttribution]]] = [
        (RULE, float(n), [pair[i] for pair in fixed]) for i, n in enumerate(N_NODES)
    ]
    median = float(np.median([result.n_nodes for result in reached]))
    points.append((reached[0].quadrature, median, reached))
    rows = []
    for rule, nodes, errors in points:
        both = {
            "completeness": [_completeness(e) for e in errors],
            "attribution": [abs(e.residual) for e in errors],
        }
        for kind, values in both.items():
            row = {"layer": layer, "rule": rule, "nodes": nodes, "error": kind}
            sd = float(np.std(values, ddof=1))
            rows.append({**row, **context.interval(values).row(), "sd": sd})
    return rows


def _published(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("layer", "rule", "nodes")
    return {k: row[k] for k in kept} | {"mean": row["estimate"], "sd": row["sd"], "n": row["n"]}


def _findings(
    context: Context,
    fixed: Mapping[int, Sequence[Sequence[RuleErrors]]],
    reached: Mapping[int, Sequence[PairAttribution]],
) -> list[Finding]:
    findings = []
    for layer in context.layers:
        few, many = (_residuals(fixed[layer], n) for n in (FEW, MANY))
        findings.append(
            judge(
                "More nodes lower the attribution error",
                f"attribution error with N = {MANY} minus with N = {FEW}, layer {layer}",
                context.interval(many - few),
                source="P1",
                below=0.0,
            )
        )
    top, bottom = context.layers[0], context.layers[-1]
    if top != bottom:
        findings.append(
            judge(
                "Deep layers need fewer nodes",
                f"attribution error with N = {COMPARED}, layer {bottom} minus layer {top}",
                context.interval(
                    _residuals(fixed[bottom], COMPARED) - _residuals(fixed[top], COMPARED)
                ),
                source="P1",
                above=0.0,
            )
        )
    for layer in context.layers:
        if all(result.quadrature == "adaptive" for result in reached[layer]):
            gain = _gain(fixed[layer], reached[layer])
            if len(gain) >= SMALLEST_SAMPLE:
                findings.append(
                    judge(
                        "Adaptive nodes err less than as many or more of the published rule",
                        f"log10 of the completeness error, adaptive minus published, layer {layer}",
                        context.interval(gain),
                        source="ours",
                        below=0.0,
                    )
                )
    return findings


def _residuals(fixed: Sequence[Sequence[RuleErrors]], n: int) -> Array:
    return np.array([abs(pair[N_NODES.index(n)].residual) for pair in fixed])


def _gain(fixed: Sequence[Sequence[RuleErrors]], reached: Sequence[PairAttribution]) -> list[float]:
    """Return log10 adaptive / published error of the pairs that the most tabulated nodes exceed."""
    found = []
    for pair, result in zip(fixed, reached, strict=True):
        published = next((e for e in pair if e.n_nodes >= result.n_nodes), None)
        if published is not None:
            ratio = [max(_completeness(e), _LEAST_ERROR) for e in (result, published)]
            found.append(float(np.log10(ratio[0] / ratio[1])))
    return found


def _draw_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    from xsiam.plots import curves_figure

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    published = {
        f"layer {layer}": [
            (row["nodes"], row["estimate"], row["low"], row["high"])
            for row in rows
            if (row["layer"], row["rule"]) == (layer, RULE)
        ]
        for layer in layers
    }
    kind = rows[0]["error"]
    y_label = "|score − all terms|" if kind == "attribution" else "completeness error"
    figure = curves_figure(
        published, "nodes (curves: published rule)", y_label, log_x=True, log_y=True
    )
    axes = figure.axes[0]
    for line, layer in zip(list(axes.lines), layers, strict=True):
        own = next(r for r in reversed(rows) if r["layer"] == layer)
        style: dict[str, Any] = {
            "marker": "X",
            "markersize": 9,
            "markeredgecolor": "black",
            "linestyle": "none",
        }
        axes.plot([own["nodes"]], [own["estimate"]], color=line.get_color(), **style)
    axes.set_title("crosses: the attributions' own rule", fontsize="small")
    return figure
