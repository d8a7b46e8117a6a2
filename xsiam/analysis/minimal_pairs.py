"""Minimal pairs from probes: where the contrasted words stand, and what is compared with what.

Everything is derived from the probes by fixed rules; what does not fit a rule is left out and
counted, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xsiam.analysis.probe_sets import WORD, Probe, usable_probes
from xsiam.spans import Span

if TYPE_CHECKING:
    from xsiam.analysis.context import Context

__all__ = [
    "NEUTRAL",
    "NegationPair",
    "SlotPair",
    "in_another_frame",
    "locate",
    "negation_pairs",
    "slot_pairs",
    "spans_around",
    "unrelated_affirmatives",
    "usable_slots",
]

NEUTRAL = "really"
"""The word put in the place of the negating word, as one that leaves the statement as it is."""

RELATIONS = ("synonym", "antonym", "unrelated")
IDENTICAL = "identical"

_ADVERBS = ("not", "never", "n't", "n’t")
_CONTRACTIONS = ("n't", "n’t")
_IRREGULAR = {"ca": "can", "wo": "will", "sha": "shall"}  # before "n't"


@dataclass(frozen=True)
class SlotPair:
    """Two sentences that have one word, or another, in the same slot.

    Attributes:
        text_a: With the base word.
        text_b: With the other word.
        span_a: Characters of the base word.
        span_b: Characters of the other word.
        relation: "identical", "synonym", "antonym" or "unrelated", of the other to the base word.
        word_a: The base word.
        word_b: The other word.
        template: Of text b.
        kind: First part of the template's name.
        frame: "same" where both sentences are of one template, "another" where they are not.
        split: Split of the bundled set, None for other probes.
    """

    text_a: str
    text_b: str
    span_a: Span
    span_b: Span
    relation: str
    word_a: str
    word_b: str
    template: str
    kind: str
    frame: str = "same"
    split: str | None = None

    @property
    def words(self) -> str:
        """Base and other word, which name a word pair."""
        return f"{self.word_a}|{self.word_b}"


@dataclass(frozen=True)
class NegationPair:
    """A sentence and its negation.

    Attributes:
        affirmative: The sentence.
        negated: Its negation.
        span: Characters of the negating word in ``negated``; a contraction ("isn't") is one word,
            since tokenizers do not cut it between verb and negation.
        marker: The negating word as the probe names it.
        predicate: What is negated.
        template: Of both.
        kind: First two parts of the template's name: frames of one kind take the same predicates.
        neutral: ``negated`` with `NEUTRAL` for the negation, where that only adds the word to the
            affirmative sentence; None elsewhere.
        neutral_span: Where that word is.
        split: Split of the bundled set, None for other probes.
    """

    affirmative: str
    negated: str
    span: Span
    marker: str
    predicate: str
    template: str
    kind: str
    neutral: str | None = None
    neutral_span: Span | None = None
    split: str | None = None


def locate(text: str, word: str) -> Span | None:
    """Return the characters of a word, or several, in a text; case does not matter.

    None where it is not there as a whole word or is there more than once. "n't" is found as the
    contraction that ends in it.
    """
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    if word in _CONTRACTIONS:
        pattern = r"(?<!\w)\w+n['’]t(?!\w)"
    found = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
    return found[0] if len(found) == 1 else None


def spans_around(text: str, kept: Span | None = None) -> list[Span]:
    """Return the spans of all words of a text in order, those within ``kept`` as one.

    Other than for `xsiam.spans.word_spans`, punctuation belongs to no word, and a hyphen does: what
    is asked is how a word compares with other words.
    """
    words = [match.span() for match in WORD.finditer(text)]
    if kept is None:
        return words
    return sorted([kept, *(w for w in words if w[1] <= kept[0] or w[0] >= kept[1])])


def slot_pairs(probes: Iterable[Probe]) -> tuple[list[SlotPair], int]:
    """Return synonym, antonym and unrelated-word pairs, and for each base the pair with itself.

    Returns:
        The pairs, and how many probes were left out since a word is not in its sentence exactly
        once. Unrelated pairs of different sentences (template ``unrelated/…``) have no slot and are
        not counted.
    """
    pairs: list[SlotPair] = []
    identical: dict[tuple[str, str], SlotPair] = {}
    missed = 0
    for probe in probes:
        if probe.category not in RELATIONS or probe.kind == "unrelated":
            continue
        base, other = probe.fillers
        span_a, span_b = locate(probe.text_a, base), locate(probe.text_b, other)
        if span_a is None or span_b is None:
            missed += 1
            continue
        pair = SlotPair(
            *(probe.text_a, probe.text_b, span_a, span_b, probe.category, base, other),
            *(probe.template, probe.kind),
            split=probe.split,
        )
        pairs.append(pair)
        itself = replace(pair, text_b=pair.text_a, span_b=span_a, relation=IDENTICAL, word_b=base)
        identical.setdefault((probe.template, probe.text_a), itself)
    return [*identical.values(), *pairs], missed


def usable_slots(
    context: Context, models: Sequence[str], categories: Sequence[str], split: str | None = None
) -> tuple[list[SlotPair], list[str]]:
    """Return the :func:`slot_pairs` of probes that models may be judged by, and notes about them.

    Args:
        context: As of :func:`usable_probes`, and so are all others.
        models: Names of the models.
        categories: Categories of probes.
        split: Split of the bundled probes to take.

    Raises:
        NotApplicableError: As :func:`usable_probes` does.
    """
    probes, notes = usable_probes(context, models, categories, split)
    pairs, missed = slot_pairs(probes)
    if missed:
        notes.append(f"{missed} probes are left out: a word is not in its sentence exactly once.")
    return pairs, notes


def in_another_frame(pairs: Sequence[SlotPair]) -> list[SlotPair]:
    """Return each pair with its first sentence replaced by those of other templates.

    They hold the same base word, so that two sentences share no more than what is in the slots.
    """
    bases: dict[str, list[SlotPair]] = {}
    for pair in pairs:
        if pair.relation == IDENTICAL:
            bases.setdefault(pair.word_a, []).append(pair)
    return [
        replace(pair, text_a=base.text_a, span_a=base.span_a, frame="another")
        for pair in pairs
        for base in bases.get(pair.word_a, [])
        if base.template != pair.template
    ]


def negation_pairs(probes: Iterable[Probe]) -> tuple[list[NegationPair], int]:
    """Return sentences with their negations, whichever of a probe's sentences is the negated one.

    Returns:
        The pairs, and how many probes were left out since the negating word is not in exactly one
        of their sentences, once.
    """
    pairs, missed = [], 0
    for probe in probes:
        if probe.category != "negation":
            continue
        marker, predicate = probe.fillers
        spans = [locate(text, marker) for text in (probe.text_a, probe.text_b)]
        if (spans[0] is None) == (spans[1] is None):
            missed += 1
            continue
        texts = (probe.text_a, probe.text_b)
        affirmative, negated = texts if spans[0] is None else texts[::-1]
        span = spans[0] or spans[1]
        assert span is not None
        neutral = _neutral(affirmative, negated, span, marker)
        pairs.append(
            NegationPair(
                *(affirmative, negated, span, marker, predicate, probe.template),
                kind=probe.template.rpartition("/")[0],
                neutral=neutral,
                neutral_span=None if neutral is None else locate(neutral, NEUTRAL),
                split=probe.split,
            )
        )
    return pairs, missed


def unrelated_affirmatives(pairs: Sequence[NegationPair]) -> list[str | None]:
    """Return for each pair an affirmative sentence of another template and predicate.

    The first that fits in the order of templates, beginning half-way round, so that different
    sentences get different ones; None where none fits.
    """
    order = sorted(range(len(pairs)), key=lambda i: (pairs[i].template, pairs[i].predicate))
    found: list[str | None] = [None] * len(pairs)
    for place, index in enumerate(order):
        own = pairs[index]
        for step in range(len(order)):
            other = pairs[order[(place + len(order) // 2 + step) % len(order)]]
            if other.template != own.template and other.predicate != own.predicate:
                found[index] = other.affirmative
                break
    return found


def _neutral(affirmative: str, negated: str, span: Span, marker: str) -> str | None:
    """Return the negated sentence with `NEUTRAL` for its negation, where the rule allows it.

    The marker is an adverb, the sentence no question (where the word order would be wrong), and
    without the marker it is the affirmative sentence.
    """
    if marker.lower() not in _ADVERBS or "?" in negated:
        return None
    verb = ""
    if marker.lower() in _CONTRACTIONS:
        stem = negated[span[0] : span[1] - 3]
        verb = f"{_IRREGULAR.get(stem.lower(), stem)} "
    before, after = negated[: span[0]] + verb, negated[span[1] :]
    if (before.rstrip() + after).lower() != affirmative.lower():
        return None
    text = f"{before}{NEUTRAL}{after}"
    return text if locate(text, NEUTRAL) is not None else None
