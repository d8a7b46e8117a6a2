"""What sparse word alignments keep of the scores, and whether two ways of aligning agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xsiam.alignment import Alignment, align
from xsiam.analysis.base import (
    MODEL,
    AbstractAnalysis,
    AnalysisResult,
    Needs,
    ResultTable,
    VectorRequest,
    register_analysis,
)
from xsiam.analysis.context import Context
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Interval, judge, ratio_of_sums
from xsiam.analysis.words import fit_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("transport", "mutual_best")
PARTS = ("linked", "not_linked", "special_tokens", "main_effects_and_intercept")

_MOST = 0.5  # "most" is more than half

_QUANTITIES = {
    "share_of_positive": "part of the positive attribution between words that links carry",
    "share_of_score": "the same of the score",
    "random_share_of_score": "part of the score that as many word pairs drawn at random carry",
    "links_per_word": "links / mean number of words of both texts",
    "unmatched_words": "share of words without a link",
    "equal_words_linked": "of the words that stand once in both texts, the share that is linked",
}


def anchors(alignment: Alignment) -> tuple[int, int]:
    """Return how many words that stand exactly once in both texts are linked, and their number.

    Case aside; punctuation does not count. They are what can be known of a right alignment without
    anybody's judgement.
    """
    sides = [[unit.casefold() for unit in u] for u in (alignment.units_a, alignment.units_b)]
    once = [
        {word for word, n in Counter(side).items() if n == 1 and any(c.isalnum() for c in word)}
        for side in sides
    ]
    shared = once[0] & once[1]
    linked = alignment.pairs()
    found = sum((sides[0].index(w), sides[1].index(w)) in linked for w in shared)
    return found, len(shared)


@register_analysis
class AlignmentAnalysis(AbstractAnalysis):
    """Share of the scores in the aligned words, and agreement of both methods (ours).

    Words are those of Unicode's rule, masses are attribution-weighted, all as `xsiam.align` does by
    default. Shares are ratios of sums over text pairs.
    """

    name = "alignment"
    question = "How much of the scores do the words carry that matched each other?"
    source = "ours"
    needs = Needs(packages={"ot": 'pip install "xsiam[analysis]"'}, min_pairs=SMALLEST_SAMPLE)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for the sampled pairs at every layer."""
        return context.pair_requests()

    def run(self, context: Context) -> AnalysisResult:
        """Align the words of every pair by both methods at every layer."""
        shares: list[dict[str, Any]] = []
        parts: list[dict[str, Any]] = []
        agreements: list[dict[str, Any]] = []
        single: list[dict[str, Any]] = []
        findings, metrics = [], {}
        notes: list[str] = []
        for layer in context.layers:
            sums = [r.sum_words() for r in context.pair_attributions(MODEL, layer)]
            notes = notes or fit_notes(sums, "can have no link")
            found = {m: [align(s, method=m) for s in sums] for m in METHODS}
            for method, alignments in found.items():
                where = {"layer": layer, "method": method}
                for quantity, estimate in _estimates(context, alignments, where, notes).items():
                    shares.append({**where, "quantity": quantity, **_row(estimate)})
                    if estimate is not None:
                        metrics[f"layer_{layer}/{method}/{quantity}"] = estimate.estimate
                        findings += _judged(quantity, estimate, where)
                for part in PARTS:
                    values = [_part(alignment, part) for alignment in alignments]
                    parts.append({**where, "part": part, **context.interval(values).row()})
                single += [
                    {**where, "pair": number, **_facts(alignment)}
                    for number, alignment in enumerate(alignments)
                ]
            both = [one.agreement(two) for one, two in zip(*found.values(), strict=True)]
            defined = [f1 for f1 in both if f1 is not None]
            if len(defined) < len(both):
                notes.append(
                    f"Layer {layer}: {len(both) - len(defined)} of {len(both)} pairs have no "
                    "link by either method; their agreement is undefined and left out."
                )
            agreement = context.interval_or_note(
                [defined], np.mean, f"agreement, layer {layer}", notes
            )
            agreements.append({"layer": layer, **_row(agreement)})
            if agreement is not None:
                metrics[f"layer_{layer}/agreement"] = agreement.estimate
        if not context.encoder.shift:
            notes.append(
                "The model has no reference shift: pairs alone do not sum to its scores, so that "
                "shares of the score say little; see `parts` for main effects and intercept."
            )
        return AnalysisResult(
            tables={
                "shares": ResultTable(
                    shares,
                    "; ".join(f"{name}: {text}" for name, text in _QUANTITIES.items()),
                    shown=True,
                ),
                "agreement": ResultTable(
                    agreements, "F1 of the links of both methods, mean over text pairs", shown=True
                ),
                "parts": ResultTable(
                    parts,
                    "what the scores are made of, mean over text pairs in units of the score; "
                    "the residual of quadrature is what is missing",
                    shown=True,
                ),
                "pairs": ResultTable(
                    single, "figures of every text pair, by its place in the sample"
                ),
            },
            metrics=metrics,
            findings=findings,
            notes=notes,
        )

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw the shares of positive attribution and of score."""
        from xsiam.plots import intervals_figure

        bars = {
            f"{r['quantity']}, {r['method']}, layer {r['layer']}".replace("_", " "): (
                r["estimate"],
                r["low"],
                r["high"],
            )
            for quantity in ("share_of_positive", "share_of_score", "random_share_of_score")
            for r in result.tables["shares"].rows
            if r["quantity"] == quantity and r["estimate"] is not None
        }
        return {"shares": intervals_figure(bars, "share that the links carry")} if bars else {}


def _estimates(
    context: Context,
    alignments: Sequence[Alignment],
    where: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Interval | None]:
    covered = [a.covered for a in alignments]
    score = [a.score for a in alignments]
    links = [len(a.links) for a in alignments]
    words = [len(a.units_a) + len(a.units_b) for a in alignments]
    unmatched = [len(a.unmatched_a) + len(a.unmatched_b) for a in alignments]
    drawn = [len(a.links) * a.total / max(1, len(a.units_a) * len(a.units_b)) for a in alignments]
    found = [anchors(a) for a in alignments]
    ratios = {
        "share_of_positive": (covered, [a.positive for a in alignments]),
        "share_of_score": (covered, score),
        "random_share_of_score": (drawn, score),
        "links_per_word": ([2 * n for n in links], words),
        "unmatched_words": (unmatched, words),
        "equal_words_linked": ([f for f, n in found if n], [n for _, n in found if n]),
    }
    place = f"{where['method']}, layer {where['layer']}"
    return {
        name: context.interval_or_note(ratio, ratio_of_sums, f"{name}, {place}", notes)
        for name, ratio in ratios.items()
    }


def _judged(quantity: str, estimate: Interval, where: Mapping[str, Any]) -> list[Any]:
    """Hold two of the quantities of "transport" against one half."""
    claims = {
        "share_of_positive": "The words that matched carry most of the positive attribution",
        "equal_words_linked": "A word that stands once in both texts matches itself",
    }
    if where["method"] != "transport" or quantity not in claims:
        return []
    described = f"{_QUANTITIES[quantity]}, transport, layer {where['layer']}"
    return [judge(claims[quantity], described, estimate, source="ours", above=_MOST)]


def _row(found: Interval | None) -> dict[str, float | int | None]:
    return dict.fromkeys(("estimate", "low", "high", "n")) if found is None else {**found.row()}


def _part(alignment: Alignment, part: str) -> float:
    return {
        "linked": alignment.covered,
        "not_linked": alignment.total - alignment.covered,
        "special_tokens": alignment.rest,
        "main_effects_and_intercept": alignment.main_effects,
    }[part]


def _facts(alignment: Alignment) -> dict[str, Any]:
    return {
        "words_a": len(alignment.units_a),
        "words_b": len(alignment.units_b),
        "links": len(alignment.links),
        **{part: _part(alignment, part) for part in PARTS},
        "score": alignment.score,
        "share_of_score": alignment.share_of_score,
        "share_of_positive": alignment.share_of_positive,
    }
