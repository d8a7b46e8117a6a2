"""Attribution summed over classes of word pairs, such as pairs of tags, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xsiam.analysis.context import Context
from xsiam.analysis.parsing import Word
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Interval, ratio_of_sums
from xsiam.analysis.words import WordPairs

__all__ = ["ClassSums", "difference_of_means", "enrichment", "sums_by_label"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ClassSums:
    """Sums over the word pairs of each class, for every pair of texts.

    A class is an unordered pair of labels, as the order of the two texts means nothing.

    Attributes:
        labels: Labels of words, L of them.
        entries: Σ A_ij, [n, L, L]; a class is in the upper triangle, the lower one is zero.
        absolute: Σ |A_ij|, of the same shape.
        counts: Number of word pairs, of the same shape.
    """

    labels: tuple[str, ...]
    entries: Array
    absolute: Array
    counts: Array

    def classes(self) -> Iterator[tuple[str, str, Array]]:
        """Yield both labels of each class and the weights that choose it, [L, L]."""
        for i, j in combinations_with_replacement(range(len(self.labels)), 2):
            chosen = np.zeros((len(self.labels),) * 2)
            chosen[i, j] = 1.0
            yield self.labels[i], self.labels[j], chosen

    def among(self, labels: Sequence[str]) -> Array:
        """Return the weights of pairs whose words both have one of the labels, [L, L]."""
        inside = np.isin(self.labels, labels).astype(np.float64)
        return np.triu(np.outer(inside, inside))

    def words(self, label: str) -> Array:
        """Return the weights of single words with a label: half of each pair it is part of."""
        one = (np.array(self.labels) == label).astype(np.float64)
        return np.triu(np.add.outer(one, one) / 2)

    def share(self, chosen: Array) -> tuple[Array, Array]:
        """Return the attribution of the chosen pairs and of all, [n] each."""
        return (self.entries * chosen).sum((1, 2)), self.entries.sum((1, 2))

    def absolute_share(self, chosen: Array) -> tuple[Array, Array]:
        """Return the absolute attribution of the chosen pairs and of all, [n] each."""
        return (self.absolute * chosen).sum((1, 2)), self.absolute.sum((1, 2))

    def mean(self, chosen: Array) -> tuple[Array, Array]:
        """Return the attribution of the chosen pairs and their number, [n] each."""
        return (self.entries * chosen).sum((1, 2)), (self.counts * chosen).sum((1, 2))

    def shares(self, chosen: Array) -> tuple[Array, Array, Array, Array]:
        """Return attribution of the chosen pairs and of all, and both numbers of pairs."""
        return (*self.share(chosen), self.mean(chosen)[1], self.counts.sum((1, 2)))

    def row(self, context: Context, chosen: Array, what: str, notes: list[str]) -> dict[str, Any]:
        """Return the columns of a table: shares and enrichment of the chosen pairs.

        Estimates are None where no word pair is chosen, and so are the intervals where fewer than
        5 text pairs have one.

        Args:
            context: Makes the intervals.
            chosen: Weights of the classes, [L, L].
            what: Names the chosen pairs, for a note where an interval is undefined.
            notes: Where the note goes.
        """
        counts = self.mean(chosen)[1]
        texts = int((counts > 0).sum())
        row: dict[str, Any] = {
            "word_pairs": float(counts.sum()),
            "n": texts,
            "share_of_pairs": float(ratio_of_sums(counts, self.counts.sum((1, 2)))),
        }
        quantities: dict[str, tuple[tuple[Array, ...], Callable[..., Any]]] = {
            "share": (self.share(chosen), ratio_of_sums),
            "absolute_share": (self.absolute_share(chosen), ratio_of_sums),
            "enrichment": (self.shares(chosen), enrichment),
        }
        for name, (values, statistic) in quantities.items():
            estimate = float(statistic(*values)) if texts else None
            found = None
            if texts >= SMALLEST_SAMPLE:
                found = context.interval_or_note(values, statistic, f"{name} of {what}", notes)
            row[name] = estimate if estimate is not None and np.isfinite(estimate) else None
            row[f"{name}_low"] = None if found is None else found.low
            row[f"{name}_high"] = None if found is None else found.high
        return row

    def mean_row(
        self, context: Context, chosen: Array, what: str, notes: list[str]
    ) -> dict[str, Any]:
        """Return the columns of a table: the mean entry of the chosen pairs, as in `row`."""
        entries, counts = self.mean(chosen)
        present = counts > 0
        texts = int(present.sum())
        found: Interval | None = None
        if texts >= SMALLEST_SAMPLE:
            values = (entries[present], counts[present])
            found = context.interval_or_note(values, ratio_of_sums, f"mean of {what}", notes)
        return {
            "word_pairs": int(counts.sum()),
            "n": texts,
            "mean_entry": float(entries.sum() / counts.sum()) if texts else None,
            "low": None if found is None else found.low,
            "high": None if found is None else found.high,
        }


def sums_by_label(
    pairs: Sequence[WordPairs],
    label: Callable[[Word], str],
    labels: Sequence[str],
    keep: Callable[[Word, Word], bool] | None = None,
) -> ClassSums:
    """Sum the entries between words over the pairs of their labels.

    Args:
        pairs: Attributions by words.
        label: Names the label of a word.
        labels: All labels there are.
        keep: Which pairs of words count; None counts all.
    """
    place = {name: k for k, name in enumerate(labels)}
    stacks: list[list[Array]] = [[], [], []]
    for pair in pairs:
        left, right = (
            np.array([place[label(word)] for word in words], dtype=np.intp)
            for words in (pair.words_a, pair.words_b)
        )
        counted = np.ones_like(pair.matrix)
        if keep is not None:
            for (i, one), (j, two) in (
                (x, y) for x in enumerate(pair.words_a) for y in enumerate(pair.words_b)
            ):
                counted[i, j] = keep(one, two)
        rows, columns = np.minimum.outer(left, right), np.maximum.outer(left, right)
        values = (pair.matrix * counted, np.abs(pair.matrix) * counted, counted)
        for stack, value in zip(stacks, values, strict=True):
            total = np.zeros((len(place), len(place)))
            np.add.at(total, (rows, columns), value)
            stack.append(total)
    return ClassSums(tuple(labels), *(np.stack(stack) for stack in stacks))


def enrichment(part: Any, whole: Any, count: Any, count_all: Any, axis: int = -1) -> Any:
    """Return (Σ part / Σ whole) / (Σ count / Σ count_all): a share by its share of the pairs."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return ratio_of_sums(part, whole, axis) / ratio_of_sums(count, count_all, axis)


def difference_of_means(
    entries: Any, counts: Any, other_entries: Any, other_counts: Any, axis: int = -1
) -> Any:
    """Return Σ entries / Σ counts of one class of pairs minus that of another."""
    return ratio_of_sums(entries, counts, axis) - ratio_of_sums(other_entries, other_counts, axis)
