"""Scores of sentences and their negations, and what they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xsiam.analysis.base import MODEL
from xsiam.analysis.context import Context
from xsiam.analysis.minimal_pairs import NegationPair, unrelated_affirmatives
from xsiam.analysis.statistics import SMALLEST_SAMPLE, ratio_of_sums
from xsiam.analysis.word_measures import Row, by_unit, differences, estimate

__all__ = [
    "BEYOND",
    "DROP",
    "ITSELF",
    "partners",
    "score_changes",
    "score_rows",
    "template_of",
]

ITSELF, ANOTHER = "the sentence itself", "another frame"
DROP = "drop by negation / by unrelated sentence"
BEYOND = "change by negation beyond neutral word"


def score_rows(context: Context, pairs: Sequence[NegationPair]) -> list[Row]:
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
    both = partners(pairs)
    firsts = [first.affirmative for first, _ in both]
    base = context.attributions(MODEL, layer, firsts, [p.affirmative for _, p in both])
    negated = context.attributions(MODEL, layer, firsts, [p.negated for _, p in both])
    for (_, p), plain, changed in zip(both, base, negated, strict=True):
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


def partners(pairs: Sequence[NegationPair]) -> list[tuple[NegationPair, NegationPair]]:
    """Return all ordered pairs of different templates of one kind with the same predicate."""
    return [
        (first, second)
        for second in pairs
        for first in pairs
        if (first.kind, first.predicate) == (second.kind, second.predicate)
        and first.template != second.template
    ]


def score_changes(context: Context, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return means of scores and of their changes over templates."""
    found = []
    for against in (ITSELF, ANOTHER):
        own = [r for r in rows if r["against"] == against]
        if not own:
            continue
        base, negated = (by_unit(own, template_of, column) for column in ("base", "negated"))
        values = {"base": list(base.values()), "negated": list(negated.values())}
        values["change by negation"] = differences(negated, base)
        if against == ITSELF:
            with_word = [r for r in own if r["neutral"] is not None]
            neutral = by_unit(with_word, template_of, "neutral")
            same = by_unit(with_word, template_of, "negated")
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
        by_unit(own, template_of, column) for column in ("base", "negated", "unrelated")
    )
    found = []
    where = {"against": ITSELF, "quantity": "unrelated sentence", "unit": "score"}
    found.append({**where, **estimate(context, list(unrelated.values()))})
    if len(base) >= SMALLEST_SAMPLE:
        drops = [differences(base, negated), differences(base, unrelated)]
        share = context.interval(drops, ratio_of_sums, paired=True)
        where = {"quantity": DROP, "unit": "share"}
        found.append({"against": ITSELF, **where, **share.row()})
    return found


def template_of(row: Row) -> str:
    """Return the template of a row, the unit of negations."""
    return str(row["template"])
