"""Probes for the minimal-pair analyses: bundled or the user's own, and which a model may answer.

A file of one's own has the columns of the bundled set (`xsiam.probes`): ``sentence1, sentence2,
category, template, words``; ``score`` may be there and is not read. ``words`` is a name, a colon
and what the two sentences differ in: ``antonym:hot|cold``, ``negation:not|playing chess``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsiam import probes
from xsiam.analysis.base import NotApplicableError
from xsiam.errors import InputError
from xsiam.tables import BUNDLED, Table, read_table

if TYPE_CHECKING:
    from xsiam.analysis.context import Context
    from xsiam.encoder import SiameseEncoder

__all__ = ["KEY", "WORD", "Probe", "ProbeSet", "load_probes", "usable_probes"]

KEY = "analysis.probes"
"""Configuration key of the probes."""

WORD = re.compile(r"\w+(?:['’-]\w+)*")
"""A word: apostrophes and hyphens inside belong to it, punctuation to none."""

REQUIRED = ("sentence1", "sentence2", "category", "template", "words")
_PAIRED = ("synonym", "antonym", "unrelated", "negation")  # whose `words` are read

# English vocabularies cut English words into 1.0 to 1.4 pieces on average and know nearly all of
# them. Twice that, or one unknown word in twenty, says that the probes are in another language than
# the tokenizer's. It is a bound on the tokenizer only: that words are known does not say that the
# model was trained on their language.
MOST_PIECES = 2.0
MOST_UNKNOWN = 0.05


@dataclass(frozen=True)
class Probe:
    """One pair of sentences that differ in something known.

    Attributes:
        text_a: First sentence.
        text_b: Second sentence.
        category: What they have to do with each other, such as "negation".
        template: What the pair was made from; probes of one template are not independent.
        words: What differs, as in the file.
        split: Split of the bundled set, None for other probes.
    """

    text_a: str
    text_b: str
    category: str
    template: str
    words: str
    split: str | None = None

    @property
    def fillers(self) -> tuple[str, ...]:
        """The contrasted words: ``hot`` and ``cold`` of ``antonym:hot|cold``."""
        return tuple(self.words.partition(":")[2].split("|"))

    @property
    def content(self) -> frozenset[str]:
        """The contrasted words, in lower case, without the negating one; none of other categories.

        Negating words are everywhere; what a probe of negation has of its own is what is negated.
        """
        words = self.fillers[1:] if self.category == "negation" else self.fillers
        return frozenset(w.lower() for w in words) if self.category in _PAIRED else frozenset()

    @property
    def kind(self) -> str:
        """The first part of the template's name: "food" of "food/canteen_soup"."""
        return self.template.partition("/")[0]


@dataclass(frozen=True)
class ProbeSet:
    """Probes, and what they are called.

    Attributes:
        probes: In the order of their source.
        name: "bundled" or the file.
    """

    probes: tuple[Probe, ...]
    name: str

    @property
    def digest(self) -> str:
        """SHA-256 of all that is read, 64 hex digits."""
        content = [
            [p.text_a, p.text_b, p.category, p.template, p.words, p.split] for p in self.probes
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_probes(source: str | Path) -> ProbeSet:
    """Read probes.

    Args:
        source: "bundled" for all splits of the bundled set, or whatever `xsiam.tables` reads.

    Raises:
        InputError: If there is no such file, a column is missing, or a cell is empty or not as
            described at the top of this module; the row is named.
    """
    if source == BUNDLED:
        found = tuple(
            Probe(p.sentence1, p.sentence2, p.category, p.template, p.words, split)
            for split in probes.SPLITS
            for p in probes.load(split)
        )
        return ProbeSet(found, BUNDLED)
    table = read_table(source, key=KEY)
    missing = [name for name in REQUIRED if name not in table.columns]
    if missing:
        raise InputError(
            f"Expected `{KEY}` to have the columns {', '.join(REQUIRED)}, but {table.name} lacks "
            f"{', '.join(missing)} (it has {', '.join(table.columns)}). Set `{KEY}`."
        )
    if not table.n_rows:
        raise InputError(f"Expected probes in `{KEY}`, but {table.name} has no data row.")
    return ProbeSet(tuple(_probe(table, row) for row in range(table.n_rows)), str(source))


def _probe(table: Table, row: int) -> Probe:
    cells = [table.columns[name][row] for name in REQUIRED]
    for name, cell in zip(REQUIRED, cells, strict=True):
        if not isinstance(cell, str) or not cell.strip():
            raise InputError(
                f"Expected text in column {name!r} of `{KEY}`, but {table.where(row)} has {cell!r}."
            )
    probe = Probe(*cells)
    if probe.category in _PAIRED and (
        len(probe.fillers) != 2 or not all(filler.strip() for filler in probe.fillers)
    ):
        raise InputError(
            f"Expected `words` of category {probe.category!r} to look like "
            f"'{probe.category}:one|other', but {table.where(row)} of `{KEY}` has {probe.words!r}."
        )
    return probe


def usable_probes(
    context: Context, models: Sequence[str], categories: Sequence[str], split: str | None = None
) -> tuple[list[Probe], list[str]]:
    """Return the probes of some categories that models may be judged by, and notes about them.

    Left out are probes that one of the models was tuned on, as far as that is recorded: of a
    bundled split that a model has seen, all templates and all contrasted words.

    Args:
        context: Where probes and models are.
        models: Names of the models.
        categories: Categories of probes.
        split: Split of the bundled probes to take; None takes all. Other probes have no split.

    Raises:
        NotApplicableError: If there are none of these categories, none is left, or they are not in
            the language of a tokenizer.
    """
    wanted = [
        p
        for p in context.probes.probes
        if p.category in categories and (p.split is None or split in (None, p.split))
    ]
    listed = " or ".join(categories)
    if not wanted:
        raise NotApplicableError(f"there are no probes of category {listed} in `{KEY}`")
    notes: list[str] = []
    seen: set[str] = set()
    for name in models:
        encoder = context.model(name)
        check_language(encoder, name, wanted)
        splits = _seen_splits(encoder)
        notes.append(_said(name, encoder, splits, context.probes.name))
        seen |= splits
    held_out = _held_out(wanted, seen)
    if not held_out:
        raise NotApplicableError(
            f"all {len(wanted)} probes of category {listed} share a template or a word with "
            f"pairs that a model was tuned on (bundled {', '.join(sorted(seen))}): set `{KEY}`"
        )
    if len(held_out) < len(wanted):
        notes.append(
            f"{len(wanted) - len(held_out)} of {len(wanted)} probes of category {listed} are left "
            f"out: a model was tuned on their templates or words (bundled "
            f"{', '.join(sorted(seen))})."
        )
    return held_out, notes


def check_language(encoder: SiameseEncoder, name: str, wanted: Sequence[Probe]) -> None:
    """Raise NotApplicableError where a tokenizer does not know the words of the probes, or is slow.

    See `MOST_PIECES` and `MOST_UNKNOWN`; a word is cut as it is within a sentence.
    """
    tokenizer: Any = encoder.tokenizer
    if not tokenizer.is_fast:
        raise NotApplicableError(
            f"words are found by the places of their tokens, which the slow tokenizer of `{name}` "
            "does not know: load the model with a fast tokenizer"
        )
    words = [w for p in wanted for text in (p.text_a, p.text_b) for w in WORD.findall(text)]
    cut = {word: tokenizer.tokenize(f" {word}") for word in dict.fromkeys(words)}
    if not words:
        raise NotApplicableError(f"the probes of `{KEY}` have no words")
    pieces = sum(len(cut[word]) for word in words) / len(words)
    unknown = sum(tokenizer.unk_token in cut[word] for word in words) / len(words)
    if pieces > MOST_PIECES or unknown > MOST_UNKNOWN:
        raise NotApplicableError(
            f"the probes are not in the language of `{name}`: its tokenizer cuts a word into "
            f"{pieces:.2f} pieces (at most {MOST_PIECES:g}) and does not know {unknown:.1%} of "
            f"them (at most {MOST_UNKNOWN:.0%}). Set `{KEY}` to probes in its language"
        )


def _seen_splits(encoder: SiameseEncoder) -> set[str]:
    """Return the bundled splits of which a model was tuned on any pair, as far as recorded."""
    return {split for run in encoder.trained_on or [] for split in run["bundled"]}


def _held_out(wanted: Sequence[Probe], seen: set[str]) -> list[Probe]:
    """Return the probes that share neither a template nor a contrasted word with splits seen."""
    of_seen = [p for p in load_probes(BUNDLED).probes if p.split in seen]
    templates = {p.template for p in of_seen}
    words = {word for p in of_seen for word in p.content}
    return [p for p in wanted if p.template not in templates and not words.intersection(p.content)]


def _said(name: str, encoder: SiameseEncoder, splits: set[str], source: str) -> str:
    runs = encoder.trained_on
    if not runs:
        return (
            f"What `{name}` was trained on is unknown: if these probes were among it, figures are "
            "of pairs that it has seen."
        )
    said = "; ".join(f"`{run['source']}` ({run['n_pairs']} pairs)" for run in runs)
    bundled = f"bundled {', '.join(sorted(splits))}" if splits else "no bundled pair"
    other = "" if source == BUNDLED else " Whether probes of your own are among them is unknown."
    return (
        f"`{name}` was tuned on {said}: {bundled} among them.{other} What it was trained on before "
        "is unknown."
    )
