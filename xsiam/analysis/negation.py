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
    unrelated_affirmatives,
)
from xsiam.analysis.probe_sets import usable_probes
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Finding, judge
from xsiam.analysis.word_measures import (
    LineCase,
    Row,
    by_unit,
    differences,
    entry_of,
    estimate,
    finding_interval,
    ratio_of_means,
    require_units,
    word_lines,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ITSELF, ANOTHER = "the sentence itself", "another frame"
DROP = "drop by negation / by unrelated sentence"
BEYOND = "change by negation beyond neutral word"
COMMON = "both negated: common entry"

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
        scores = _score_rows(context, pairs)
        changes = _changes(context, scores)
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
            if r["low"] is not None and r["quantity"] == "enrichment"
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
        split: Split of the bundled probes to take; None takes all. Other probes have no split.

    Raises:
        NotApplicableError: If there are too few templates, or as `usable_probes` does.
    """
    probes, notes = usable_probes(context, models, ("negation",))
    pairs, missed = negation_pairs(p for p in probes if p.split is None or split in (None, p.split))
    if missed:
        notes.append(
            f"{missed} probes are left out: the negating word is not in exactly one of their "
            "sentences, once."
        )
    require_units({p.template for p in pairs}, "templates with a negation")
    return pairs, notes


def _score_rows(context: Context, pairs: Sequence[NegationPair]) -> list[Row]:
    """Return the scores of each probe against itself, as far as there is something to compare."""
    layer = context.layers[0]  # scores are the same at every layer

    def scores(texts_b: Sequence[str | None]) -> list[float | None]:
        there = [(p.affirmative, b) for p, b in zip(pairs, texts_b, strict=True) if b is not None]
        found = iter(
            context.attributions(MODEL, layer, [a for a, _ in there], [b for _, b in there])
        )
        return [None if b is None else next(found).score for b in texts_b]

    columns = {
        "base": scores([p.affirmative for p in pairs]),
        "negated": scores([p.negated for p in pairs]),
        "neutral": scores([p.neutral for p in pairs]),
        "unrelated": scores(unrelated_affirmatives(pairs)),
    }
    rows = [
        {
            "against": ITSELF,
            "template": p.template,
            "marker": p.marker,
            "predicate": p.predicate,
            **{k: values[i] for k, values in columns.items()},
        }
        for i, p in enumerate(pairs)
    ]
    partners = _partners(pairs)
    firsts = [first.affirmative for first, _ in partners]
    base = context.attributions(MODEL, layer, firsts, [p.affirmative for _, p in partners])
    negated = context.attributions(MODEL, layer, firsts, [p.negated for _, p in partners])
    for (_, p), plain, changed in zip(partners, base, negated, strict=True):
        rows.append(
            {
                "against": ANOTHER,
                "template": p.template,
                "marker": p.marker,
                "predicate": p.predicate,
                "base": plain.score,
                "negated": changed.score,
                "neutral": None,
                "unrelated": None,
            }
        )
    return rows


def _partners(pairs: Sequence[NegationPair]) -> list[tuple[NegationPair, NegationPair]]:
    """Return all ordered pairs of different templates of one kind with the same predicate."""
    return [
        (first, second)
        for second in pairs
        for first in pairs
        if (first.kind, first.predicate) == (second.kind, second.predicate)
        and first.template != second.template
    ]


def _changes(context: Context, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return means of scores and of their changes over templates."""
    found = []
    for against in (ITSELF, ANOTHER):
        own = [r for r in rows if r["against"] == against]
        if not own:
            continue
        base, negated = (by_unit(own, _template, column) for column in ("base", "negated"))
        values = {"base": list(base.values()), "negated": list(negated.values())}
        values["change by negation"] = differences(negated, base)
        if against == ITSELF:
            with_word = [r for r in own if r["neutral"] is not None]
            neutral = by_unit(with_word, _template, "neutral")
            same = by_unit(with_word, _template, "negated")
            values["neutral word"] = list(neutral.values())
            values[BEYOND] = differences(same, neutral)
        found += [
            {"against": against, "quantity": name, "unit": "score", **estimate(context, list(v))}
            for name, v in values.items()
        ]
    return [*found, *_drop(context, rows)]


def _drop(context: Context, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the drop by negation as a share of the drop by an unrelated sentence."""
    own = [r for r in rows if r["against"] == ITSELF and r["unrelated"] is not None]
    base, negated, unrelated = (
        by_unit(own, _template, column) for column in ("base", "negated", "unrelated")
    )
    found = []
    where = {"against": ITSELF, "quantity": "unrelated sentence", "unit": "score"}
    found.append({**where, **estimate(context, list(unrelated.values()))})
    if len(base) >= SMALLEST_SAMPLE:
        drops = [differences(base, negated), differences(base, unrelated)]
        share = context.interval(drops, ratio_of_means, paired=True)
        where = {"quantity": DROP, "unit": "share"}
        found.append({"against": ITSELF, **where, **share.row()})
    return found


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
    for first, second in _partners(pairs):
        for side, name, p in (("a", "row", first), ("b", "column", second)):
            facts = {"line": f"both negated: {name}", **_facts(p)}
            cases.append(LineCase(first.negated, second.negated, side, p.span, facts))
    return cases


def _facts(pair: NegationPair) -> Row:
    return {"template": pair.template, "marker": pair.marker, "predicate": pair.predicate}


def _common_entries(context: Context, layer: int, pairs: Sequence[NegationPair]) -> list[Row]:
    """Return the entries of two negating words in sentences of different templates."""
    both = _partners(pairs)
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
            values = list(by_unit(own, _template, quantity).values())
            where = {"layer": layer, "line": line, "quantity": quantity}
            found.append({**where, **estimate(context, values)})
    return sorted(found, key=lambda r: -r["layer"])


def _explained(
    context: Context, lines: Sequence[Row], scores: Sequence[Row]
) -> list[dict[str, Any]]:
    """Return the contribution of the negating word as a share of the change of the score."""
    own = [r for r in scores if r["against"] == ITSELF]
    base, negated = (by_unit(own, _template, column) for column in ("base", "negated"))
    found = []
    for layer in context.layers:
        here = [r for r in lines if (r["layer"], r["line"]) == (layer, "negation")]
        word = by_unit(here, _template, "contribution")
        kept = [t for t in word if t in base]
        change = [negated[t] - base[t] for t in kept]
        if len(kept) >= SMALLEST_SAMPLE and any(change):
            share = context.interval([[word[t] for t in kept], change], ratio_of_means, paired=True)
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
        if (row["line"], row["quantity"]) == ("negation", "enrichment") and found is not None:
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


def _template(row: Row) -> str:
    return str(row["template"])
