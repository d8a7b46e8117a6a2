"""Attributions by the words of a parser, and what of a text does not fit the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from xsiam.analysis.context import Context
from xsiam.analysis.parsing import ParsedText, Word, foreign_words
from xsiam.result import PairAttribution
from xsiam.spans import SpanAttribution

__all__ = ["WordPairs", "fit_notes", "language_notes", "word_pairs", "word_pairs_of"]


@dataclass(frozen=True)
class WordPairs:
    """The attribution of one pair of texts by words, with the parses of both.

    Words that no token counts for are left out of ``words_a``, ``words_b`` and ``matrix``: they are
    beyond the model's window, or inside a token that counts for the word before.

    Attributes:
        sums: The attribution summed over all words; last row and column are special tokens,
            prompt and what else belongs to no word.
        parsed_a: The parse of text a.
        parsed_b: The same of text b.
    """

    sums: SpanAttribution
    parsed_a: ParsedText
    parsed_b: ParsedText

    @cached_property
    def words_a(self) -> tuple[Word, ...]:
        """Words of text a that have tokens."""
        return tuple(self.parsed_a.words[i] for i in self._kept_a)

    @cached_property
    def words_b(self) -> tuple[Word, ...]:
        """Words of text b that have tokens."""
        return tuple(self.parsed_b.words[j] for j in self._kept_b)

    @cached_property
    def matrix(self) -> NDArray[np.float64]:
        """Entries between these words, [n_a, n_b], in units of the score."""
        return self.sums.matrix.numpy()[np.ix_(self._kept_a, self._kept_b)]

    @property
    def _kept_a(self) -> list[int]:
        return sorted(set(range(len(self.parsed_a.words))) - set(self.sums.places_a.empty))

    @property
    def _kept_b(self) -> list[int]:
        return sorted(set(range(len(self.parsed_b.words))) - set(self.sums.places_b.empty))


def word_pairs(result: PairAttribution, parsed_a: ParsedText, parsed_b: ParsedText) -> WordPairs:
    """Sum an attribution over the words of two parses.

    Raises:
        InputError: If the model's tokenizer gives no offsets.
    """
    return WordPairs(result.sum_words(parsed_a.spans, parsed_b.spans), parsed_a, parsed_b)


def word_pairs_of(context: Context, model: str, layer: int) -> list[WordPairs]:
    """Return the attributions of the sampled pairs by words, in their order."""
    parsed_a, parsed_b = (context.parses(t) for t in (context.pairs.texts_a, context.pairs.texts_b))
    results = context.pair_attributions(model, layer)
    return [word_pairs(*parts) for parts in zip(results, parsed_a, parsed_b, strict=True)]


def fit_notes(sums: Sequence[SpanAttribution], what_of_words: str) -> list[str]:
    """Say how many words and tokens of both sides do not fit each other, one sentence each.

    Args:
        sums: Attributions summed over words.
        what_of_words: What the analysis does with words that have no token, "they …".
    """
    places = [place for s in sums for place in (s.places_a, s.places_b)]
    words = sum(place.n_spans for place in places)
    tokens = sum(len(place.span_of) for place in places)
    crossing = sum(len(place.crossing) for place in places)
    outside = sum(len(place.outside) for place in places)
    empty = sum(len(place.empty) for place in places)
    untouched = sum(len(place.untouched) for place in places)
    return [
        f"{empty} of {words} words have no token that counts for them, {untouched} of these since "
        f"the model's window ends before them; they {what_of_words}.",
        f"{crossing} of {tokens} tokens reach into a second word and count for the first; "
        f"{outside} tokens of the texts belong to no word and are counted with the special tokens.",
    ]


def language_notes(context: Context) -> list[str]:
    """Say what the parses are made with, and what can be said of the texts' language."""
    parser = context.parser
    name = f"{parser.meta['lang']}_{parser.meta['name']} {parser.meta['version']}"
    lines = [f"Words, tags and relations are those of spaCy's {name}; nothing corrects them."]
    if parser.lang == "en":
        texts = sorted({*context.pairs.texts_a, *context.pairs.texts_b})
        foreign, words = foreign_words(context.parses(texts))
        lines.append(
            f"{foreign} of {words} words hold letters that are not Latin. A text in another "
            "language of this script would not be noticed; its tags mean nothing."
        )
    return lines
