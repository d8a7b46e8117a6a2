"""What a negating word changes: the score, and its own row or column in the attribution."""

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
from xsiam.analysis.minimal_pairs import (
    NEUTRAL,
    NegationPair,
    negation_pairs,
)
from xsiam.analysis.negation_scores import (
    BEYOND,
    DROP,
    ITSELF,
    partners,
    score_changes,
    score_rows,
    template_of,
)
from xsiam.analysis.probe_sets import usable_probes
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Finding, judge, ratio_of_sums
from xsiam.analysis.word_measures import (
    LineCase,
    Row,
    by_unit,
    differences,
    entry_of,
    estimate,
    finding_interval,
    require_units,
    word_lines,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMON = "both negated: common entry"
MORE = "negation minus neutral word"
AMOUNT = "enrichment"

# "Mostly ignored", fixed beforehand. Of the score: a sentence and its negation stay closer to one
# sentence twice than to two unrelated ones. (People who wrote the bundled probes judge that they
# share 0.2 to 0.4 of their meaning, so a model that reads negation loses 0.6 to 0.8 of the way.) Of
# the attribution: the negating word has less than the share of a word on average.
_HALF = 0.5
_EVENLY = 1.0


@register_analysis
class Negation(AbstractAnalysis):
    """Sentences with and without a negation (PROTOCOLS 5, P2).

    The change of the score is taken against the sentence without negation, compared with itself
    ("the sentence itself") and with sentences of other templates of the same kind and predicate
    ("another frame", where the score is not 1 by definition). Two marks to measure it by: a neutral
    word in the place of the negation, and an unrelated sentence. The negating word's column (its
    row where the first text is negated too) is summed over its pieces. Observations are templates,
    of which there are fewer than of negated predicates.
    """

    name = "negation"
    question = "Does negation change the score, and what is attributed to the negating word?"
    source = "P2"
    needs = Needs(probes=True)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for affirmative, negated and neutral sentences."""
        pairs, _ = negations(context, [MODEL])
        texts = [t for p in pairs for t in (p.affirmative, p.negated, p.neutral) if t is not None]
        return context.requests([MODEL], texts, texts)

    def run(self, context: Context) -> AnalysisResult:
        """Compare scores, and sum rows and columns at every layer."""
        pairs, notes = negations(context, [MODEL])
        scores = score_rows(context, pairs)
        changes = score_changes(context, scores)
        lines: list[Row] = []
        entries: list[Row] = []
        beyond = 0
        for layer in context.layers:
            found, left_out = word_lines(context, MODEL, layer, _cases(pairs))
            lines, beyond = lines + found, beyond + left_out
            entries += _common_entries(context, layer, pairs)
        words = _words(context, lines, entries)
        explained = _explained(context, lines, scores)
        if beyond:
            notes.append(f"{beyond} lines are left out: a word is beyond the model's window.")
        metrics = {
            f"{r['against'].replace(' ', '_')}/{r['quantity'].replace(' ', '_')}": r["estimate"]
            for r in changes
            if r["estimate"] is not None
        }
        for row in words:
            if row["line"] == "negation" and row["estimate"] is not None:
                metrics[f"layer_{row['layer']}/{row['quantity']}"] = row["estimate"]
        for row in explained:
            metrics[f"layer_{row['layer']}/explained"] = row["estimate"]
        return AnalysisResult(
            tables={
                "scores": ResultTable(
                    changes,
                    "mean over templates; changes are differences of scores; drop by negation / by "
                    "unrelated sentence is a ratio of means",
                    shown=True,
                ),
                "words": ResultTable(
                    words,
                    "mean over templates; line: column of the negating word beside the affirmative "
                    f"sentence, column of {NEUTRAL!r} in its place, row, column and common entry "
                    "of two negating words in sentences of different templates; contribution: "
                    "pairs and main effect of the word, in units of the score; enrichment: its "
                    "share of Σ|entries| between words / share of one word of all; negative: share "
                    "with a contribution below zero; larger: share of the other words (entries) "
                    "that are larger in size (0: first rank)",
                    shown=True,
                ),
                "explained": ResultTable(
                    explained,
                    "contribution of the negating word / change of the score against the sentence "
                    "itself, a ratio of means over templates; 1: the word's own column is the "
                    "change, below 0: it has the other sign",
                    shown=True,
                ),
                "pairs": ResultTable(scores, "scores of one probe a row; None: not made"),
                "lines": ResultTable(lines, "one word's row or column a row"),
            },
            metrics=metrics,
            findings=_findings(changes, words),
            notes=notes,
        )

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw the scores, and the enrichment of negating and neutral words."""
        from xsiam.plots import intervals_figure

        scores = {
            f"{r['against']}: {r['quantity']}": (r["estimate"], r["low"], r["high"])
            for r in result.tables["scores"].rows
            if r["low"] is not None and r["unit"] == "score"
        }
        words = {
            f"layer {r['layer']}: {r['line']}": (r["estimate"], r["low"], r["high"])
            for r in result.tables["words"].rows
            if r["low"] is not None and r["quantity"] == AMOUNT and r["line"] != MORE
        }
        figures = {"scores": intervals_figure(scores, "score, or its change")}
        if words:
            label = "share of Σ|entries|, 1 = that of an average word"
            figures["enrichment"] = intervals_figure(words, label, at=_EVENLY)
        return figures


def negations(
    context: Context, models: Sequence[str], split: str | None = None
) -> tuple[list[NegationPair], list[str]]:
    """Return the negations that models may be judged by, and notes.

    Args:
        context: Where probes and models are.
        models: Names of the models.
        split: As of `usable_probes`.

    Raises:
        NotApplicableError: If there are too few templates, or as `usable_probes` does.
    """
    probes, notes = usable_probes(context, models, ("negation",), split)
    pairs, missed = negation_pairs(probes)
    if missed:
        notes.append(
            f"{missed} probes are left out: the negating word is not in exactly one of their "
            "sentences, once."
        )
    require_units({p.template for p in pairs}, "templates with a negation")
    return pairs, notes


def negation_cases(pairs: Sequence[NegationPair]) -> list[LineCase]:
    """Return the columns of negating words beside the affirmative sentences."""
    return [
        LineCase(p.affirmative, p.negated, "b", p.span, {"line": "negation", **_facts(p)})
        for p in pairs
    ]


def _cases(pairs: Sequence[NegationPair]) -> list[LineCase]:
    """Return all rows and columns that are looked at."""
    cases = negation_cases(pairs)
    for p in pairs:
        if p.neutral is not None and p.neutral_span is not None:
            facts = {"line": "neutral word", **_facts(p)}
            cases.append(LineCase(p.affirmative, p.neutral, "b", p.neutral_span, facts))
    for first, second in partners(pairs):
        for side, name, p in (("a", "row", first), ("b", "column", second)):
            facts = {"line": f"both negated: {name}", **_facts(p)}
            cases.append(LineCase(first.negated, second.negated, side, p.span, facts))
    return cases


def _facts(pair: NegationPair) -> Row:
    return {"template": pair.template, "marker": pair.marker, "predicate": pair.predicate}


def _common_entries(context: Context, layer: int, pairs: Sequence[NegationPair]) -> list[Row]:
    """Return the entries of two negating words in sentences of different templates."""
    both = partners(pairs)
    results = context.attributions(
        MODEL, layer, [a.negated for a, _ in both], [b.negated for _, b in both]
    )
    rows = []
    for (first, second), result in zip(both, results, strict=True):
        entry = entry_of(result, first.span, second.span)
        if entry is not None:
            rows.append(
                {
                    "layer": layer,
                    "template": second.template,
                    "entry": entry.value,
                    "negative": float(entry.value < 0),
                    "larger": entry.larger,
                }
            )
    return rows


def _words(context: Context, lines: Sequence[Row], entries: Sequence[Row]) -> list[dict[str, Any]]:
    """Return means over templates of each kind of line and of the common entries."""
    of_lines = ("contribution", "enrichment", "negative", "larger")
    of_entries = ("entry", "negative", "larger")
    kinds: dict[tuple[int, str], tuple[str, ...]] = {
        **{(r["layer"], r["line"]): of_lines for r in lines},
        **{(r["layer"], COMMON): of_entries for r in entries},
    }
    found = []
    for (layer, line), quantities in kinds.items():
        rows = entries if line == COMMON else [r for r in lines if r["line"] == line]
        own = [r for r in rows if r["layer"] == layer]
        for quantity in quantities:
            values = list(by_unit(own, template_of, quantity).values())
            where = {"layer": layer, "line": line, "quantity": quantity}
            found.append({**where, **estimate(context, values)})
    for layer in context.layers:
        negating, neutral = (
            by_unit(
                [r for r in lines if (r["layer"], r["line"]) == (layer, n)], template_of, AMOUNT
            )
            for n in ("negation", "neutral word")
        )
        where = {"layer": layer, "line": MORE, "quantity": AMOUNT}
        found.append({**where, **estimate(context, differences(negating, neutral))})
    return sorted(found, key=lambda r: -r["layer"])


def _explained(
    context: Context, lines: Sequence[Row], scores: Sequence[Row]
) -> list[dict[str, Any]]:
    """Return the contribution of the negating word as a share of the change of the score."""
    own = [r for r in scores if r["against"] == ITSELF]
    base, negated = (by_unit(own, template_of, column) for column in ("base", "negated"))
    found = []
    for layer in context.layers:
        here = [r for r in lines if (r["layer"], r["line"]) == (layer, "negation")]
        word = by_unit(here, template_of, "contribution")
        kept = [t for t in word if t in base]
        change = [negated[t] - base[t] for t in kept]
        if len(kept) >= SMALLEST_SAMPLE and any(change):
            share = context.interval([[word[t] for t in kept], change], ratio_of_sums, paired=True)
            found.append({"layer": layer, **share.row()})
    return found


def _findings(
    changes: Sequence[Mapping[str, Any]], words: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Judge the papers' claim by score and by attribution, and ours against a neutral word."""
    findings = []
    for row in changes:
        found = finding_interval(row)
        if found is None or row["against"] != ITSELF:
            continue
        if row["quantity"] == DROP:
            findings.append(
                judge(
                    "Scores mostly ignore negation",
                    "drop of the score by negation, as a share of the drop by an unrelated "
                    "sentence",
                    found,
                    source="P2",
                    below=_HALF,
                )
            )
        if row["quantity"] == BEYOND:
            findings.append(
                judge(
                    "Negation lowers the score more than a neutral word in its place",
                    f"score of the negated sentence minus that with {NEUTRAL!r} instead",
                    found,
                    source="ours",
                    below=0.0,
                )
            )
    for row in words:
        found = finding_interval(row)
        if (row["line"], row["quantity"]) == (MORE, AMOUNT) and found is not None:
            findings.append(
                judge(
                    "The negating word has more attribution than a neutral word in its place",
                    "difference of their shares of Σ|entries|, each relative to an average word, "
                    f"layer {row['layer']}",
                    found,
                    source="ours",
                    above=0.0,
                )
            )
        if (row["line"], row["quantity"]) == ("negation", AMOUNT) and found is not None:
            findings.append(
                judge(
                    "Attributions mostly ignore negation: the negating word has less than an "
                    "average word",
                    "share of Σ|entries| of the negating word relative to an average word, layer "
                    f"{row['layer']}",
                    found,
                    source="P2",
                    below=_EVENLY,
                )
            )
    return findings
