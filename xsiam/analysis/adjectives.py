"""How adjectives of the same, the opposite or an unrelated meaning are matched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from xsiam.analysis.minimal_pairs import IDENTICAL, SlotPair, usable_slots
from xsiam.analysis.statistics import Finding, judge
from xsiam.analysis.word_measures import (
    Row,
    by_unit,
    differences,
    estimate,
    finding_interval,
    require_units,
    rest_note,
    slot_entries,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("person", "mood", "thing", "place", "task", "food", "road", "transport")
"""Kinds of bundled templates whose slot takes an adjective."""

RELATIONS = ("synonym", "antonym", "unrelated")
CONTRASTS = (("synonym", "antonym"), ("antonym", "unrelated"))
QUANTITIES = ("entry", "negative", "not_negative", "larger")

_OFTEN = 0.5  # "often no negative entry": of more than half of the antonym pairs


@register_analysis
class Adjectives(AbstractAnalysis):
    """The entry of two adjectives in one slot of one sentence (PROTOCOLS 6, P2).

    "The lettuce was fresh." against "The lettuce was crisp / rotten / organic.": entry of the two
    adjectives by their relation. Observations are word pairs; a pair is averaged over the templates
    it stands in. Of the bundled probes those whose slot takes an adjective are used, of a file of
    one's own all synonyms, antonyms and unrelated words.
    """

    name = "adjectives"
    question = "Do opposite adjectives in the same slot get a negative entry?"
    source = "P2"
    needs = Needs(probes=True)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for all sentences with adjectives."""
        pairs, _ = adjective_pairs(context, [MODEL])
        texts = [text for p in pairs for text in (p.text_a, p.text_b)]
        return context.requests([MODEL], texts, texts)

    def run(self, context: Context) -> AnalysisResult:
        """Average entries over word pairs, at every layer."""
        pairs, notes = adjective_pairs(context, [MODEL])
        rows: list[Row] = []
        beyond = 0
        for layer in context.layers:
            found, left_out = slot_entries(context, MODEL, layer, pairs)
            rows, beyond = rows + found, beyond + left_out
        levels, contrasts = _levels(context, rows), _contrasts(context, rows)
        metrics = {
            f"layer_{r['layer']}/{r['relation']}/{r['quantity']}": r["estimate"]
            for r in levels
            if r["estimate"] is not None
        }
        return AnalysisResult(
            tables={
                "entries": ResultTable(
                    levels,
                    "mean over word pairs; entry: of the two adjectives, in units of the score; "
                    "negative: share with an entry below zero, not_negative: the others; larger: "
                    "share of the other entries of words that are larger in size (0: first rank)",
                    shown=True,
                ),
                "differences": ResultTable(
                    contrasts,
                    "difference of the entries of one base word, mean over base words, in units of "
                    "the score",
                    shown=True,
                ),
                "pairs": ResultTable(rows, "one pair of sentences a row"),
            },
            metrics=metrics,
            findings=_findings(levels, contrasts),
            notes=[*notes, *rest_note(rows, beyond)],
        )

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw the entries by layer and relation."""
        from xsiam.plots import intervals_figure

        bars = {
            f"layer {r['layer']}: {r['relation']}": (r["estimate"], r["low"], r["high"])
            for r in result.tables["entries"].rows
            if r["quantity"] == "entry" and r["low"] is not None
        }
        label = "entry of the two adjectives, in units of the score"
        return {"entries": intervals_figure(bars, label)} if bars else {}


def adjective_pairs(
    context: Context, models: Sequence[str], split: str | None = None
) -> tuple[list[SlotPair], list[str]]:
    """Return the pairs with adjectives that models may be judged by, and notes.

    Args:
        context: Where probes and models are.
        models: Names of the models.
        split: As of `usable_probes`.

    Raises:
        NotApplicableError: If there are too few pairs of antonyms, or as `usable_probes` does.
    """
    found, notes = usable_slots(context, models, RELATIONS, split)
    pairs = [
        pair
        for pair in found
        if pair.relation != IDENTICAL and (pair.split is None or pair.kind in KINDS)
    ]
    require_units({p.words for p in pairs if p.relation == "antonym"}, "antonym pairs")
    return pairs, notes


def _levels(context: Context, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the mean of each quantity by layer and relation."""
    return [
        {
            "layer": layer,
            "relation": relation,
            "quantity": quantity,
            **estimate(
                context, list(by_unit(_chosen(rows, layer, relation), _words, quantity).values())
            ),
        }
        for layer in context.layers
        for relation in RELATIONS
        for quantity in QUANTITIES
    ]


def _contrasts(context: Context, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the differences of relations that have the same base word."""
    return [
        {
            "layer": layer,
            "contrast": f"{first} minus {second}",
            **estimate(
                context,
                differences(
                    by_unit(_chosen(rows, layer, first), _base, "entry"),
                    by_unit(_chosen(rows, layer, second), _base, "entry"),
                ),
            ),
        }
        for layer in context.layers
        for first, second in CONTRASTS
    ]


def _findings(
    levels: Sequence[Mapping[str, Any]], contrasts: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Judge the papers' claim about antonyms, and ours that synonyms are told from them."""
    findings = []
    for row in levels:
        found = finding_interval(row)
        if (row["relation"], row["quantity"]) == ("antonym", "not_negative") and found is not None:
            findings.append(
                judge(
                    "Antonyms often have no negative entry",
                    f"share of antonym pairs whose entry is not negative, layer {row['layer']}",
                    found,
                    source="P2",
                    above=_OFTEN,
                )
            )
    for row in contrasts:
        found = finding_interval(row)
        if row["contrast"] == "synonym minus antonym" and found is not None:
            findings.append(
                judge(
                    "Synonyms have larger entries than antonyms of the same word",
                    f"entry of the synonym minus entry of the antonym, layer {row['layer']}, in "
                    "units of the score",
                    found,
                    source="ours",
                    above=0.0,
                )
            )
    return findings


def _chosen(rows: Sequence[Row], layer: int, relation: str) -> list[Row]:
    return [r for r in rows if (r["layer"], r["relation"]) == (layer, relation)]


def _words(row: Row) -> str:
    return f"{row['word_a']}|{row['word_b']}"


def _base(row: Row) -> str:
    return str(row["word_a"])
