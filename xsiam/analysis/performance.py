"""How well the scores of the evaluated model and of those beside it predict the labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xsiam.analysis.base import (
    CONTROL,
    MODEL,
    UNMODIFIED,
    UNSHIFTED,
    UNSHIFTED_CONTROL,
    AbstractAnalysis,
    AnalysisResult,
    Needs,
    NotApplicableError,
    ResultTable,
    register_analysis,
)
from xsiam.analysis.comparison import pearson_along, spearman_along
from xsiam.analysis.context import Context
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Finding, Interval, judge
from xsiam.metrics import undefined_reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHERS = (CONTROL, UNSHIFTED, UNSHIFTED_CONTROL, UNMODIFIED)
REFERRED = (UNSHIFTED, UNMODIFIED)
"""Models that the evaluated one is held against, pair by pair."""

CORRELATIONS: Mapping[str, Callable[..., Any]] = {
    "spearman": spearman_along,
    "pearson": pearson_along,
}
KINDS = ("cosine", "dot")
Key = tuple[str, str, str]  # model, scores, correlation

_MOST_LOST = 0.01  # of Spearman's correlation: one point, as results are printed


def both_scores(embeddings_a: Tensor, embeddings_b: Tensor) -> dict[str, Tensor]:
    """Return cosine and dot product of [n, K] embeddings, each [n] float64 on the CPU."""
    a, b = (e.double().cpu() for e in (embeddings_a, embeddings_b))
    return {
        "cosine": torch.nn.functional.cosine_similarity(a, b, dim=-1),
        "dot": (a * b).sum(dim=-1),
    }


@register_analysis
class Performance(AbstractAnalysis):
    """Correlations of scores with labels (PROTOCOLS, P2's first question), on the sampled pairs."""

    name = "performance"
    question = "How well do the scores predict the labels, and what does exactness cost?"
    source = "P2"
    needs = Needs(optional=OTHERS, labels=True, min_pairs=SMALLEST_SAMPLE)

    def run(self, context: Context) -> AnalysisResult:
        """Score the sampled pairs by every model that is given."""
        assert context.pairs.labels is not None
        labels = torch.tensor(context.pairs.labels, dtype=torch.float64)
        if bool((labels == labels[0]).all()):
            raise NotApplicableError(
                f"correlations are undefined, as all n = {len(labels)} labels are equal to "
                f"{float(labels[0]):g}"
            )
        others, notes = context.available(OTHERS)
        scores = {}
        for name in (MODEL, *others):
            encoder, pairs = context.model(name), context.pairs
            sides = zip((pairs.texts_a, pairs.texts_b), context.roles, strict=True)
            scores[name] = both_scores(*(encoder.encode(t, role) for t, role in sides))
        undefined = {
            (name, kind): reason
            for name, both in scores.items()
            for kind, values in both.items()
            if (reason := undefined_reason(values, labels)) is not None
        }
        notes += [
            f"The correlations of `{name}` ({kind}) are undefined: {reason}."
            for (name, kind), reason in undefined.items()
        ]
        notes.append(
            f"Correlations are of the n = {len(labels)} sampled pairs; those of all pairs are "
            "`test/spearman_cosine` and its like in `results.json`."
        )
        found: dict[Key, Interval | None] = {}
        differences: dict[Key, Interval | None] = {}
        for kind, correlation in itertools.product(KINDS, CORRELATIONS):
            function = CORRELATIONS[correlation]
            own = scores[MODEL][kind]
            for name, both in scores.items():
                data = [labels.numpy(), both[kind].numpy()]
                known = (name, kind) not in undefined
                found[name, kind, correlation] = (
                    context.interval(data, function, paired=True) if known else None
                )
                if name in REFERRED:
                    known = known and (MODEL, kind) not in undefined
                    differences[name, kind, correlation] = (
                        context.interval(
                            [*data, own.numpy()], partial(_difference, function), paired=True
                        )
                        if known
                        else None
                    )
        return AnalysisResult(
            tables={
                "correlations": ResultTable(
                    [_row("model", key, value, len(labels)) for key, value in found.items()],
                    "correlation of scores with labels over text pairs; a dash where the scores "
                    "are constant",
                    shown=True,
                ),
                "differences": ResultTable(
                    [_row("minus", key, value, len(labels)) for key, value in differences.items()],
                    "correlation of `model` minus that of another on the same text pairs",
                    shown=True,
                ),
            },
            metrics={
                "/".join((name, f"{correlation}_{kind}")): value.estimate
                for (name, kind, correlation), value in found.items()
                if value is not None
            },
            findings=_findings(context, differences),
            notes=notes,
        )

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw Spearman's correlations with their intervals."""
        from xsiam.plots import intervals_figure

        bars = {
            f"{row['model']}, {row['scores']}": (row["estimate"], row["low"], row["high"])
            for row in result.tables["correlations"].rows
            if row["correlation"] == "spearman" and row["estimate"] is not None
        }
        if not bars:
            return {}
        return {"spearman": intervals_figure(bars, "Spearman's correlation with labels", at=None)}


def _difference(
    function: Callable[..., Any], labels: Any, other: Any, own: Any, axis: int = -1
) -> Any:
    return function(labels, own, axis=axis) - function(labels, other, axis=axis)


def _row(column: str, key: Key, found: Interval | None, n: int) -> dict[str, Any]:
    name, kind, correlation = key
    values = dict.fromkeys(("estimate", "low", "high")) | {"n": n} if found is None else found.row()
    return {column: name, "scores": kind, "correlation": correlation, **values}


def _findings(context: Context, differences: Mapping[Key, Interval | None]) -> list[Finding]:
    """Hold the exact model against those that are not, by the similarity it was made for."""
    if not context.encoder.shift:
        return []
    kind = "cosine" if context.encoder.similarity == "cos" else "dot"
    return [
        judge(
            "The exact model retains the predictive performance",
            f"Spearman's correlation of `model` minus `{name}`, {kind}",
            found,
            source="P2",
            above=-_MOST_LOST,
        )
        for name in REFERRED
        if (found := differences.get((name, kind, "spearman"))) is not None
    ]
