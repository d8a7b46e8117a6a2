"""Whether a word is matched with itself more than with another word of the same meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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
from xsiam.analysis.minimal_pairs import SlotPair, in_another_frame, usable_slots
from xsiam.analysis.statistics import Finding, judge, standardised_mean
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

FRAMES = ("same", "another")
RELATIONS = ("identical", "synonym", "unrelated")
CONTRASTS = (("identical", "synonym"), ("synonym", "unrelated"))


@register_analysis
class LexicalBias(AbstractAnalysis):
    """The same word in both texts against a synonym and an unrelated word (PROTOCOLS 7, P2).

    The entry of the two words is compared in sentences that differ in this slot only ("same"
    frame), and in sentences of different templates ("another" frame), where the sentence with the
    same word in both slots is not simply the sentence itself. Observations are base words: entries
    are averaged over the templates in which a word stands, and differences are taken word by word.
    """

    name = "lexical_bias"
    question = "Is a word matched with itself more than with a synonym in the same slot?"
    source = "P2"
    needs = Needs(probes=True)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for all sentences with base words, synonyms and unrelated words."""
        pairs, _ = _pairs(context)
        texts = [text for p in pairs for text in (p.text_a, p.text_b)]
        return context.requests([MODEL], texts, texts)

    def run(self, context: Context) -> AnalysisResult:
        """Compare entries base word by base word."""
        pairs, notes = _pairs(context)
        rows: list[Row] = []
        beyond = 0
        for layer in context.layers:
            found, left_out = slot_entries(context, MODEL, layer, pairs)
            rows, beyond = rows + found, beyond + left_out
        levels, contrasts = _levels(context, rows), _contrasts(context, rows)
        metrics = {
            f"layer_{r['layer']}/{r['frame']}/{r['contrast'].replace(' ', '_')}": r["estimate"]
            for r in contrasts
            if r["estimate"] is not None
        }
        return AnalysisResult(
            tables={
                "entries": ResultTable(
                    levels,
                    "entry of the two words in units of the score, mean over base words; sd: "
                    "standard deviation over base words; larger: mean share of other entries of "
                    "words that are larger in size (0: first rank)",
                    shown=True,
                ),
                "differences": ResultTable(
                    contrasts,
                    "difference of the entries of one base word, mean over words; effect_size: "
                    "mean by standard deviation of the differences",
                    shown=True,
                ),
                "pairs": ResultTable(rows, "one pair of sentences a row"),
            },
            metrics=metrics,
            findings=_findings(contrasts),
            notes=[*notes, *rest_note(rows, beyond)],
        )

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw the entries by layer, frame and relation."""
        from xsiam.plots import intervals_figure

        bars = {
            f"layer {r['layer']}, {r['frame']} frame: {r['relation']}": (
                *(r["estimate"], r["low"], r["high"]),
            )
            for r in result.tables["entries"].rows
            if r["low"] is not None
        }
        label = "entry of the two words, in units of the score"
        return {"entries": intervals_figure(bars, label)} if bars else {}


def _pairs(context: Context) -> tuple[list[SlotPair], list[str]]:
    """Return the pairs of both frames, and notes on what was left out.

    Raises:
        NotApplicableError: If there are too few words, or as `usable_probes` does.
    """
    pairs, notes = usable_slots(context, [MODEL], ("synonym", "unrelated"))
    require_units({p.word_a for p in pairs if p.relation == "synonym"}, "words with a synonym")
    return [*pairs, *in_another_frame(pairs)], notes


def _levels(context: Context, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return mean, standard deviation and rank of each relation."""
    levels = []
    for layer in context.layers:
        for frame in FRAMES:
            for relation in RELATIONS:
                chosen = _chosen(rows, layer, frame, relation)
                values = list(by_unit(chosen, _word, "entry").values())
                ranks = list(by_unit(chosen, _word, "larger").values())
                levels.append(
                    {
                        "layer": layer,
                        "frame": frame,
                        "relation": relation,
                        **estimate(context, values),
                        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                        "larger": float(np.mean(ranks)) if ranks else None,
                    }
                )
    return levels


def _contrasts(context: Context, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the differences of relations that have the same base word."""
    found = []
    for layer in context.layers:
        for frame in FRAMES:
            for first, second in CONTRASTS:
                change = differences(
                    by_unit(_chosen(rows, layer, frame, first), _word, "entry"),
                    by_unit(_chosen(rows, layer, frame, second), _word, "entry"),
                )
                size = estimate(context, change, standardised_mean)
                found.append(
                    {
                        "layer": layer,
                        "frame": frame,
                        "contrast": f"{first} minus {second}",
                        **estimate(context, change),
                        "effect_size": size["estimate"],
                        "effect_low": size["low"],
                        "effect_high": size["high"],
                    }
                )
    return found


def _findings(contrasts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Judge the papers' claim at every layer and in both frames; 0 is no bias."""
    findings = []
    for row in contrasts:
        found = finding_interval(row)
        if row["contrast"] == "identical minus synonym" and found is not None:
            findings.append(
                judge(
                    "Models show lexical bias: a word is matched with itself more than with a "
                    "synonym",
                    f"entry of the same word twice minus entry of word and synonym, layer "
                    f"{row['layer']}, {row['frame']} frame, in units of the score",
                    found,
                    source="P2",
                    above=0.0,
                )
            )
    return findings


def _chosen(rows: Sequence[Row], layer: int, frame: str, relation: str) -> list[Row]:
    wanted = (layer, frame, relation)
    return [r for r in rows if (r["layer"], r["frame"], r["relation"]) == wanted]


def _word(row: Row) -> str:
    return str(row["word_a"])
