"""Make the bundled pair set from its hand-written material.

Run ``python -m xsiam.probes.generate`` after a change of :mod:`xsiam.probes.material`;
``--check`` compares the committed files with a fresh generation instead of writing.

Scores say how much of their meaning two sentences share, from 0 (nothing) to 1 (the same). They
are judgements written down with the material, on this scheme (:data:`SCORE_RANGES`):

===========  =========  ==========================================================================
category     score      contrast
===========  =========  ==========================================================================
paraphrase   0.90-1.00  the same statement in other words, another voice or a converse relation
synonym      0.85-0.97  one word for another of the same meaning
specificity  0.60-0.82  a more general word, or a sentence without some of the details
quantity     0.40-0.62  another number, share, amount, duration or frequency; less when further off
role_swap    0.40-0.55  the same words with their roles exchanged, in the same or another voice
negation     0.20-0.40  the sentence denied; more where only a part of it is denied
antonym      0.20-0.45  one word for its opposite; more where the word is a detail of the sentence
unrelated    0.00-0.45  see below
===========  =========  ==========================================================================

``unrelated`` has two halves. Sentences about different things score 0 to 0.1: 0.00 from different
walks of life, 0.03 where those touch, 0.08 from the same one. An unrelated word in the slot where
the synonym and the antonym stand scores 0.14 to 0.45, since the rest of the sentence is shared;
for the same frame and base word it is near the antonym's score and far below the synonym's.

In a frame whose slot decides only a share ``weight`` of the meaning, a filler pair judged ``s`` on
its own scores ``1 - weight * (1 - s)``.

For every frame and word family the synonym, the antonym (where there is one) and the unrelated
word stand in the same slot opposite the same base word: same ``template``, and ``words`` such as
``synonym:hot|steaming``, ``antonym:hot|cold``, ``unrelated:hot|salty``. The remaining control, the
same word on both sides, is a sentence paired with itself and therefore not listed.

Words of a family occur in one split only, as do templates. Function words that negate ("not")
occur in all splits, so ``words`` names them together with the predicate that they negate. Role
swaps come in three forms over the same two fillers: roles exchanged in the same voice, roles
exchanged while the order of the words stays (``:restated``; not for converse relations), and the
restatement with the roles kept (category ``paraphrase``).

Rows are in the order of a SHA-256 of their text, so that categories mix, a file is the same on
every machine, and an edit of the material moves no other row.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

from xsiam.probes import COLUMNS, SPLITS, ProbePair, path
from xsiam.probes.material import MATERIAL, Group, Material, RoleFrame, RolePair

NEIGHBOURING_FIELDS: frozenset[frozenset[str]] = frozenset(
    frozenset(pair)
    for pair in (
        ("animals", "nature"),
        ("family", "home"),
        ("health", "science"),
        ("health", "sport"),
        ("home", "money"),
        ("law", "money"),
        ("money", "work"),
        ("music", "school"),
        ("nature", "weather"),
        ("science", "technology"),
        ("sport", "weather"),
        ("technology", "travel"),
        ("travel", "weather"),
    )
)
"""Walks of life that touch each other, for the scores of unrelated sentences."""

SAME_FIELD, NEIGHBOURING_FIELD, DIFFERENT_FIELD = 0.08, 0.03, 0.0

SCORE_RANGES: dict[str, tuple[float, float]] = {
    "paraphrase": (0.90, 1.00),
    "synonym": (0.85, 0.97),
    "specificity": (0.60, 0.82),
    "quantity": (0.40, 0.62),
    "role_swap": (0.40, 0.55),
    "negation": (0.20, 0.40),
    "antonym": (0.20, 0.45),
    "unrelated": (0.00, 0.45),
}
"""Lowest and highest score of each category."""


def fill(text: str, **fillers: str) -> str:
    """Put fillers into the slots of a frame, with their articles, and capitalise the sentence.

    Example:
        >>> fill("{a x} lane leads to {y}.", x="old", y="Rome")
        'An old lane leads to Rome.'
    """

    def replace(match: re.Match[str]) -> str:
        filler = fillers[match["slot"]]
        return f"{indefinite_article(filler)} {filler}" if match["article"] else filler

    sentence = re.sub(r"\{(?P<article>a )?(?P<slot>\w+)\}", replace, text)
    return sentence[0].upper() + sentence[1:]


def indefinite_article(word: str) -> str:
    """Return ``a`` or ``an``, going by the first sound of the words that occur in the material."""
    if re.match(r"(hour|hon[eo]|heir)", word):
        return "an"
    if re.match(r"(u[ns]i|use|one|eu)", word):
        return "a"
    return "an" if word[0] in "aeiou" else "a"


def weighted(score: float, weight: float) -> float:
    """Return the score of a pair whose contrast decides a share ``weight`` of the meaning."""
    return round(1.0 - weight * (1.0 - score), 2)


def family_pairs(material: Material) -> Iterator[ProbePair]:
    """Yield synonym, antonym and unrelated-word pairs of every frame with every family."""
    for frame in material.frames:
        for family in material.families:
            if family.kind != frame.kind:
                continue
            alternatives = (
                ("synonym", family.synonym, family.synonym_score),
                ("antonym", family.antonym, family.antonym_score),
                ("unrelated", family.unrelated, family.unrelated_score),
            )
            for category, word, score in alternatives:
                if word is not None:
                    yield ProbePair(
                        fill(frame.text, x=family.base),
                        fill(frame.text, x=word),
                        weighted(score, frame.weight),
                        category,
                        f"{frame.kind}/{frame.id}",
                        f"{category}:{family.base}|{word}",
                    )


def contrast_pairs(material: Material) -> Iterator[ProbePair]:
    """Yield quantity pairs and word-level specificity pairs."""
    for category, frames in material.contrast_frames.items():
        for frame in frames:
            for contrast in material.contrasts[category]:
                if contrast.kind == frame.kind:
                    yield ProbePair(
                        fill(frame.text, x=contrast.first),
                        fill(frame.text, x=contrast.second),
                        weighted(contrast.score, frame.weight),
                        category,
                        f"{category}/{frame.kind}/{frame.id}",
                        f"{category}:{contrast.first}|{contrast.second}",
                    )


def role_pairs(material: Material) -> Iterator[ProbePair]:
    """Yield exchanged roles in the same and in another voice, and the other voice by itself."""
    for frame in material.role_frames:
        for pair in material.role_pairs:
            if pair.kind == frame.kind:
                yield from _role_forms(frame, pair)


def _role_forms(frame: RoleFrame, pair: RolePair) -> Iterator[ProbePair]:
    """Yield the pairs of one role frame with one pair of fillers."""
    template = f"role/{frame.kind}/{frame.id}"
    words = f"{pair.first}|{pair.second}"
    plain = fill(frame.text, x=pair.first, y=pair.second)
    swapped = fill(frame.text, x=pair.second, y=pair.first)
    yield ProbePair(plain, swapped, frame.score, "role_swap", template, f"role_swap:{words}")
    if frame.restated is None:
        return
    kept = fill(frame.restated, x=pair.first, y=pair.second)
    exchanged = fill(frame.restated, x=pair.second, y=pair.first)
    restated = f"{template}:restated"
    # In a converse relation this one would be a contrast of two words, not one of roles.
    if not frame.converse:
        yield ProbePair(plain, exchanged, frame.score, "role_swap", restated, f"role_swap:{words}")
    yield ProbePair(
        plain, kept, frame.restated_score, "paraphrase", restated, f"paraphrase:{words}"
    )


def negation_pairs(material: Material) -> Iterator[ProbePair]:
    """Yield sentences with their negations, from frames and written out."""
    for frame in material.negation_frames:
        for predicate in material.predicates:
            if predicate.kind == frame.kind:
                yield ProbePair(
                    fill(frame.affirmative, x=predicate.text),
                    fill(frame.negated, x=predicate.text),
                    frame.score,
                    "negation",
                    f"negation/{frame.kind}/{frame.id}",
                    f"negation:{frame.marker}|{predicate.text}",
                )
    for pair in material.negated_pairs:
        yield ProbePair(
            pair.affirmative,
            pair.negated,
            pair.score,
            "negation",
            f"negation/written/{pair.id}",
            f"negation:{pair.marker}|{pair.id}",
        )


def group_pairs(groups: Sequence[Group], category: str) -> Iterator[ProbePair]:
    """Yield the three pairs of each group of sentences."""
    for group in groups:
        for (i, j), score in zip(((0, 1), (0, 2), (1, 2)), group.scores, strict=True):
            yield ProbePair(
                group.sentences[i],
                group.sentences[j],
                score,
                category,
                f"{category}/written/{group.id}",
                f"{category}:{group.id}/{i + 1}|{j + 1}",
            )


def unrelated_pairs(material: Material) -> Iterator[ProbePair]:
    """Yield pairs of sentences from different paraphrase groups."""
    groups = material.paraphrases
    for step in material.unrelated_steps:
        for i, first in enumerate(groups):
            second = groups[(i + step) % len(groups)]
            yield ProbePair(
                first.sentences[step % 3],
                second.sentences[i % 3],
                field_score(first.field, second.field),
                "unrelated",
                f"unrelated/{first.id}+{second.id}",
                f"unrelated:{first.id}|{second.id}",
            )


def field_score(first: str, second: str) -> float:
    """Return the score of two unrelated sentences, going by the walks of life they are from."""
    if first == second:
        return SAME_FIELD
    return (
        NEIGHBOURING_FIELD if frozenset((first, second)) in NEIGHBOURING_FIELDS else DIFFERENT_FIELD
    )


def generate(split: str) -> list[ProbePair]:
    """Make the pairs of a split, in the order of its file.

    Args:
        split: One of :data:`xsiam.probes.SPLITS`.

    Raises:
        ValueError: If the material gives the same two sentences twice, a sentence with itself, or
            a score outside the range of its category.
    """
    material = MATERIAL[split]
    pairs = [
        *group_pairs(material.paraphrases, "paraphrase"),
        *family_pairs(material),
        *negation_pairs(material),
        *role_pairs(material),
        *contrast_pairs(material),
        *group_pairs(material.details, "specificity"),
        *unrelated_pairs(material),
    ]
    _refuse_repeats(pairs)
    _refuse_outliers(pairs)
    return sorted(pairs, key=_order)


def _refuse_repeats(pairs: Sequence[ProbePair]) -> None:
    """Raise where two pairs have the same sentences, in either order, or both are one sentence."""
    seen: set[frozenset[str]] = set()
    for pair in pairs:
        sentences = frozenset((pair.sentence1, pair.sentence2))
        if len(sentences) == 1 or sentences in seen:
            raise ValueError(
                f"Expected every pair to have two different sentences and to occur once, but got "
                f"{pair}. Change the material in xsiam/probes/material.py."
            )
        seen.add(sentences)


def _refuse_outliers(pairs: Sequence[ProbePair]) -> None:
    """Raise where a score is not on the scheme of its category."""
    for pair in pairs:
        low, high = SCORE_RANGES[pair.category]
        if not low <= pair.score <= high:
            raise ValueError(
                f"Expected the score of category {pair.category!r} to be between {low:.2f} and "
                f"{high:.2f}, but got {pair.score:.2f} for {pair}. "
                f"Change the material in xsiam/probes/material.py."
            )


def _order(pair: ProbePair) -> str:
    """Return the sort key of a row: arbitrary, but the same on every machine and for ever."""
    return hashlib.sha256(f"{pair.sentence1}\n{pair.sentence2}".encode()).hexdigest()


def to_csv(pairs: Sequence[ProbePair]) -> str:
    """Return pairs as RFC 4180 CSV with a header and LF line ends."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for pair in pairs:
        sentence1, sentence2, score, *rest = astuple(pair)
        writer.writerow((sentence1, sentence2, f"{score:.2f}", *rest))
    return stream.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files of all splits, or with ``--check`` report those that are out of date."""
    parser = argparse.ArgumentParser(description="Make the bundled pair set of xsiam.")
    parser.add_argument("--output", type=Path, help="folder to use instead of the package's own")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(argv)
    folder = options.output or path(SPLITS[0]).parent
    stale = 0
    for split in SPLITS:
        file = folder / f"{split}.csv"
        pairs = generate(split)
        content = to_csv(pairs).encode("utf-8")
        if options.check:
            if not file.is_file() or file.read_bytes() != content:
                print(f"{file} is not what the material gives.", file=sys.stderr)
                stale += 1
            continue
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        print(f"{file}: {len(pairs)} pairs")
    if stale:
        print("Run `python -m xsiam.probes.generate` and commit the files.", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
