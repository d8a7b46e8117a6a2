"""The bundled pair set: sentence pairs with graded similarity scores, by linguistic category.

The pairs are made by :mod:`xsiam.probes.generate` from hand-written material and shipped as CSV
with the columns ``sentence1, sentence2, score, category, template, words``. They serve to train
and try a model without any download, and as minimal pairs for the linguistic analyses: pairs with
the same ``template`` and the same base word in ``words`` differ in one slot only. Neither a
template nor a word pair is shared between splits.

Example:
    >>> from xsiam import probes
    >>> pair = probes.load("test")[0]
    >>> 0.0 <= pair.score <= 1.0
    True
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

__all__ = ["CATEGORIES", "COLUMNS", "SPLITS", "ProbePair", "load", "path"]

SPLITS: tuple[str, ...] = ("train", "validation", "test")
"""Names of the splits."""

CATEGORIES: tuple[str, ...] = (
    "paraphrase",
    "synonym",
    "antonym",
    "negation",
    "role_swap",
    "quantity",
    "specificity",
    "unrelated",
)
"""What the two sentences of a pair have to do with each other."""

COLUMNS: tuple[str, ...] = ("sentence1", "sentence2", "score", "category", "template", "words")
"""Columns of the CSV files, in order; the fields of :class:`ProbePair`."""


@dataclass(frozen=True)
class ProbePair:
    """One sentence pair of the bundled set.

    Attributes:
        sentence1: First sentence.
        sentence2: Second sentence.
        score: Similarity in [0, 1], two decimals; the scheme is in :mod:`xsiam.probes.generate`.
        category: One of :data:`CATEGORIES`.
        template: Frame or sentence group that the pair was made from.
        words: What makes the contrast: its kind, a colon, and the contrasted fillers separated
            by ``|``, such as ``antonym:hot|cold``.
    """

    sentence1: str
    sentence2: str
    score: float
    category: str
    template: str
    words: str


def path(split: str) -> Path:
    """Return the CSV file of a split.

    Args:
        split: One of :data:`SPLITS`.

    Raises:
        ValueError: If ``split`` is not one of :data:`SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"Expected `split` to be one of {', '.join(SPLITS)}, but got {split!r}.")
    # str() keeps the file reachable by name; a package imported from a zip has no such path, and
    # xsiam is not installed as one (its wheel is unpacked).
    return Path(str(resources.files(__name__).joinpath("pairs", f"{split}.csv")))


def load(split: str) -> list[ProbePair]:
    """Read the pairs of a split, in the order of its file.

    Args:
        split: One of :data:`SPLITS`.

    Raises:
        ValueError: If ``split`` is not one of :data:`SPLITS`.
    """
    with path(split).open(encoding="utf-8", newline="") as stream:
        return [
            ProbePair(
                sentence1=row["sentence1"],
                sentence2=row["sentence2"],
                score=float(row["score"]),
                category=row["category"],
                template=row["template"],
                words=row["words"],
            )
            for row in csv.DictReader(stream)
        ]
