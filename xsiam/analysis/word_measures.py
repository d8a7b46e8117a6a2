"""What an attribution says of single words: their entry, their row or column, their rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from xsiam.analysis.base import NotApplicableError
from xsiam.analysis.minimal_pairs import SlotPair, spans_around
from xsiam.analysis.probe_sets import KEY
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Interval
from xsiam.spans import Span

if TYPE_CHECKING:
    from xsiam.analysis.context import Context
    from xsiam.analysis.statistics import Statistic
    from xsiam.result import PairAttribution

__all__ = [
    "LineCase",
    "WordEntry",
    "WordLine",
    "by_unit",
    "differences",
    "entry_of",
    "estimate",
    "finding_interval",
    "line_of",
    "require_units",
    "rest_note",
    "slot_entries",
    "word_lines",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class WordEntry:
    """The entry of two words in the word-level matrix, the sum over their tokens.

    Attributes:
        value: In units of the score.
        larger: Share of the other entries of words that are larger in size; 0 is the first rank.
        rest: Share of Σ|entries| that involves special tokens, punctuation or a prompt.
        border: Main effects and intercept together, in units of the score; zero with a shift.
    """

    value: float
    larger: float
    rest: float
    border: float


@dataclass(frozen=True)
class WordLine:
    """The row or column of one word in the word-level matrix.

    Attributes:
        pairs: Sum over all tokens of the other text, special ones included, in units of the score.
        main_effect: Main effect of the word; zero with a shift.
        amount: Share of Σ|entries| between words that is in this line.
        evenly: The share that a word has on average, 1 / number of words.
        larger: Share of the other words whose lines have a larger Σ|entries|; 0 is the first rank.
    """

    pairs: float
    main_effect: float
    amount: float
    evenly: float
    larger: float

    @property
    def contribution(self) -> float:
        """What the word adds to the score: pairs and main effect."""
        return self.pairs + self.main_effect


def entry_of(result: PairAttribution, span_a: Span, span_b: Span) -> WordEntry | None:
    """Return the entry of two words; None where one has no token within the model's window."""
    if not (has_token(result, "a", span_a) and has_token(result, "b", span_b)):
        return None
    spans_a, spans_b = spans_around(result.text_a, span_a), spans_around(result.text_b, span_b)
    whole = result.sum_spans(spans_a, spans_b).matrix
    words = whole[:-1, :-1].abs()
    value = whole[spans_a.index(span_a), spans_b.index(span_b)]
    effects = result.main_effects_a.double().sum() + result.main_effects_b.double().sum()
    return WordEntry(
        value=float(value),
        larger=_share_larger(words.flatten(), value.abs()),
        rest=1.0 - float(words.sum() / whole.abs().sum()),
        border=float(effects) + result.intercept,
    )


def line_of(result: PairAttribution, span: Span, side: str) -> WordLine | None:
    """Return the row (``side`` "a") or column ("b") of a word; None where it has no token."""
    if not has_token(result, side, span):
        return None
    spans_a = spans_around(result.text_a, span if side == "a" else None)
    spans_b = spans_around(result.text_b, span if side == "b" else None)
    sums = result.sum_spans(spans_a, spans_b)
    whole, effects, spans = sums.matrix, sums.main_effects_a, spans_a
    if side == "b":
        whole, effects, spans = sums.matrix.T, sums.main_effects_b, spans_b
    index = spans.index(span)
    sizes = whole[:-1, :-1].abs().sum(dim=1)
    return WordLine(
        pairs=float(whole[index].sum()),
        main_effect=float(effects[index]),
        amount=float(sizes[index] / sizes.sum()),
        evenly=1.0 / len(sizes),
        larger=_share_larger(sizes, sizes[index]),
    )


def has_token(result: PairAttribution, side: str, span: Span) -> bool:
    """Return whether a token of the text itself begins within a span, so that sums take it in."""
    text = getattr(result, f"text_{side}")
    offsets, special, prompt = (
        getattr(result, f"{name}_{side}") for name in ("offsets", "special_mask", "prompt_mask")
    )
    for (start, end), *added in zip(offsets, special, prompt, strict=True):
        piece = text[start:end]
        first = start + len(piece) - len(piece.lstrip())
        if piece.strip() and not any(added) and span[0] <= first < span[1]:
            return True
    return False


def _share_larger(sizes: Tensor, size: Tensor) -> float:
    """Return the share of the other sizes that are larger; 0 where there is no other."""
    return int((sizes > size).sum()) / max(1, sizes.numel() - 1)


def slot_entries(
    context: Context, model: str, layer: int, pairs: Sequence[SlotPair]
) -> tuple[list[Row], int]:
    """Return a row for each pair, and how many are left out: a word beyond the model's window."""

    def row(pair: SlotPair, result: PairAttribution) -> Row | None:
        entry = entry_of(result, pair.span_a, pair.span_b)
        if entry is None:
            return None
        return {
            "layer": layer,
            "frame": pair.frame,
            "relation": pair.relation,
            "word_a": pair.word_a,
            "word_b": pair.word_b,
            "template": pair.template,
            "score": result.score,
            "entry": entry.value,
            "larger": entry.larger,
            "negative": float(entry.value < 0),
            "not_negative": float(entry.value >= 0),
            "rest": entry.rest,
            "border": entry.border,
        }

    results = context.attributions(
        model, layer, [p.text_a for p in pairs], [p.text_b for p in pairs]
    )
    return _kept(map(row, pairs, results))


class LineCase(NamedTuple):
    """Two texts of which one word's row (of text a) or column (of text b) is wanted.

    Attributes:
        text_a: First text.
        text_b: Second text.
        side: "a" or "b", the text of the word.
        span: Characters of the word.
        facts: Further columns of the row.
    """

    text_a: str
    text_b: str
    side: str
    span: Span
    facts: Row


def word_lines(
    context: Context, model: str, layer: int, cases: Sequence[LineCase]
) -> tuple[list[Row], int]:
    """Return a row for each case, and how many are left out: a word beyond the model's window."""

    def row(case: LineCase, result: PairAttribution) -> Row | None:
        line = line_of(result, case.span, case.side)
        if line is None:
            return None
        return {
            "layer": layer,
            **case.facts,
            "score": result.score,
            "contribution": line.contribution,
            "pairs": line.pairs,
            "main_effect": line.main_effect,
            "amount": line.amount,
            "enrichment": line.amount / line.evenly,
            "larger": line.larger,
            "negative": float(line.contribution < 0),
        }

    results = context.attributions(
        model, layer, [c.text_a for c in cases], [c.text_b for c in cases]
    )
    return _kept(map(row, cases, results))


def by_unit(rows: Iterable[Row], unit: Callable[[Row], Hashable], column: str) -> dict[Any, float]:
    """Return the mean of a column in each unit, in the order in which units are first met."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        found.setdefault(unit(row), []).append(row[column])
    return {key: float(np.mean(values)) for key, values in found.items()}


def estimate(
    context: Context, values: Sequence[float], statistic: Statistic = np.mean
) -> dict[str, float | int | None]:
    """Return the columns of an interval; its ends are None of fewer units than intervals need.

    The estimate is None too of no unit at all, or where the statistic is undefined.
    """
    n = len(values)
    if n >= SMALLEST_SAMPLE and (statistic is np.mean or np.ptp(values) > 0):
        return dict(context.interval(values, statistic).row())
    known = n > 0 and statistic is np.mean
    return {
        "estimate": float(np.mean(values)) if known else None,
        "low": None,
        "high": None,
        "n": n,
    }


def require_units(units: Collection[Any], what: str) -> None:
    """Raise NotApplicableError where there are too few observations for an interval."""
    if len(units) < SMALLEST_SAMPLE:
        raise NotApplicableError(
            f"an interval needs {SMALLEST_SAMPLE} different {what} or more, but the probes of "
            f"`{KEY}` that can be used have n = {len(units)}"
        )


def differences(first: Mapping[Any, float], second: Mapping[Any, float]) -> list[float]:
    """Return first − second of the units that both have."""
    return [value - second[key] for key, value in first.items() if key in second]


def _kept(rows: Iterable[Row | None]) -> tuple[list[Row], int]:
    every = list(rows)
    kept = [row for row in every if row is not None]
    return kept, len(every) - len(kept)


def finding_interval(row: Mapping[str, Any]) -> Interval | None:
    """Return the interval of a row, None where its ends are unknown."""
    if row["low"] is None:
        return None
    return Interval(row["estimate"], row["low"], row["high"], row["n"])


def rest_note(rows: Sequence[Row], beyond: int) -> list[str]:
    """Return notes on what the words' entries do not hold, from rows of `slot_entries`."""
    notes = []
    if beyond:
        notes.append(f"{beyond} attributions are left out: a word is beyond the model's window.")
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == layer]
        rest, border = (float(np.mean([abs(row[c]) for row in own])) for c in ("rest", "border"))
        notes.append(
            f"Layer {layer}: pairs with special tokens or punctuation are {rest:.0%} of "
            f"Σ|entries|; main effects and intercept sum to {border:.2g} in size, on average."
        )
    return notes
