"""Sums of an attribution over words, sentences or any other spans of characters."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import regex
import torch
from torch import Tensor

from xsiam.errors import InputError

if TYPE_CHECKING:
    from xsiam.result import PairAttribution

Span = tuple[int, int]

_SENTENCE_END = re.compile(
    r"[.!?…]+[\"'”’»)\]]*(?=\s|$)"  # closing quotes and brackets belong to the sentence
    r"|[。！？]+[」』”’）]*"  # these need no white space behind them
    r"|\n[^\S\n]*(?=\n)"  # a blank line ends a heading or a list item as well
)
_WORD_BOUNDARY = regex.compile(r"\b", regex.VERSION1 | regex.WORD)  # the default rule of Unicode


class SpanPair(NamedTuple):
    """One entry of a span matrix with the texts it belongs to."""

    i: int
    j: int
    text_a: str
    text_b: str
    value: float


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of one text lie among its spans: what fits, and what does not.

    Attributes:
        span_of: The span that each token counts for, [S]; the number of spans means the rest.
        n_spans: Number of spans.
        crossing: Tokens that reach into a further span; all of them counts for the first.
        outside: Tokens of the text, neither special nor prompt, that lie in no span.
        untouched: Spans that no token reaches, such as those behind the end of the model's window.
    """

    span_of: tuple[int, ...]
    n_spans: int
    crossing: tuple[int, ...]
    outside: tuple[int, ...]
    untouched: tuple[int, ...]

    @property
    def empty(self) -> tuple[int, ...]:
        """Spans that no token counts for: untouched, or only reached by a crossing token."""
        return tuple(sorted(set(range(self.n_spans)) - set(self.span_of)))

    def counts(self) -> Tensor:
        """Return the number of tokens that count for each span and for the rest, [n_spans + 1]."""
        return torch.bincount(
            torch.tensor(self.span_of, dtype=torch.long), minlength=self.n_spans + 1
        )

    def membership(self) -> Tensor:
        """Return the same as ones, [n_spans + 1, S] float64."""
        member = torch.zeros(self.n_spans + 1, len(self.span_of), dtype=torch.float64)
        member[list(self.span_of), range(len(self.span_of))] = 1.0
        return member


@dataclass(frozen=True, eq=False)
class SpanAttribution:
    """The score of two texts, split over spans of their characters.

    The last row and column, "the rest", hold what belongs to no span: special tokens, prompt and
    tokens outside of all spans. ``score = matrix.sum() + main_effects_a.sum() +
    main_effects_b.sum() + intercept + residual``, as for tokens.

    Attributes:
        spans_a: Character spans of text a, in the order given.
        spans_b: The same of text b.
        span_texts_a: The text of each span of a.
        span_texts_b: The same of b.
        places_a: Which tokens of text a count for which span, and what does not fit.
        places_b: The same of text b.
        matrix: Sums of the token pairs, [n_a + 1, n_b + 1] float64, in units of the score.
        main_effects_a: Sums of the tokens' main effects, [n_a + 1] float64.
        main_effects_b: The same for text b, [n_b + 1].
        intercept: As of the attribution.
        residual: As of the attribution.
        score: As of the attribution.
    """

    spans_a: tuple[Span, ...]
    spans_b: tuple[Span, ...]
    span_texts_a: tuple[str, ...]
    span_texts_b: tuple[str, ...]
    places_a: TokenPlaces
    places_b: TokenPlaces
    matrix: Tensor
    main_effects_a: Tensor
    main_effects_b: Tensor
    intercept: float
    residual: float
    score: float

    def top_spans(self, k: int = 20) -> list[SpanPair]:
        """Return the ``k`` pairs of spans of largest absolute value, strongest first.

        The rest is left out.
        """
        flat = self.matrix[:-1, :-1].flatten()
        columns = len(self.spans_b)
        order = flat.abs().sort(descending=True, stable=True).indices[:k].tolist()
        return [
            SpanPair(
                n // columns,
                n % columns,
                self.span_texts_a[n // columns],
                self.span_texts_b[n % columns],
                float(flat[n]),
            )
            for n in order
        ]

    def means(self) -> Tensor:
        """Return the mean of each block of token pairs, [n_a + 1, n_b + 1] float64.

        For words this is the published figure (P1, the reference code). Unlike the sums, means do
        not add up to the score: a word of many pieces counts as one of a single piece. Blocks
        without tokens have no mean; they are NaN.
        """
        return self.matrix / torch.outer(self.places_a.counts(), self.places_b.counts())


def word_spans(text: str) -> list[Span]:
    """Return the character spans of words, by Unicode's default rule (UAX #29).

    Everything but white space is in a word. Contractions and numbers are one word ("don't",
    "3.14"), an emoji with its modifiers is one, letters keep their accents, punctuation marks and
    Chinese characters are words of their own. The rule knows no language: in scripts written
    without spaces (Thai, Japanese Hiragana) words are single characters, and "New York" is two.
    Where that matters, pass the words of a tokenizer of that language, such as ``(t.idx, t.idx +
    len(t))`` of spaCy's tokens, to :meth:`xsiam.result.PairAttribution.sum_words`.

    References:
        Unicode Standard Annex #29, Unicode Text Segmentation, section 4, as the package ``regex``
        implements it.
    """
    cuts = [0, *(match.start() for match in _WORD_BOUNDARY.finditer(text)), len(text)]
    spans = []
    for start, end in itertools.pairwise(cuts):
        piece = text[start:end]
        if piece.strip():
            spans.append((start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())))
    return spans


def sentence_spans(text: str) -> list[Span]:
    """Return the character spans of sentences, by a simple rule.

    A sentence ends at ``. ! ? …`` before white space, with closing quotes and brackets, at
    ``。！？``, or at a blank line. The rule knows no abbreviations ("Dr. Smith" is two sentences);
    where that matters, pass the spans of a sentence splitter, such as ``(s.start_char,
    s.end_char)`` of spaCy's ``doc.sents``, to :meth:`xsiam.result.PairAttribution.sum_spans`.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    spans = []
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        piece = text[start:end]
        if piece.strip():
            spans.append((start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())))
    return spans


def sum_spans(
    result: PairAttribution, spans_a: Sequence[Span], spans_b: Sequence[Span]
) -> SpanAttribution:
    """Sum an attribution over spans: see :meth:`xsiam.result.PairAttribution.sum_spans`."""
    checked_a = _checked(spans_a, result.text_a, "spans_a")
    checked_b = _checked(spans_b, result.text_b, "spans_b")
    places_a = _places(
        checked_a, result.text_a, result.offsets_a, result.special_mask_a, result.prompt_mask_a
    )
    places_b = _places(
        checked_b, result.text_b, result.offsets_b, result.special_mask_b, result.prompt_mask_b
    )
    left, right = places_a.membership(), places_b.membership()
    return SpanAttribution(
        spans_a=checked_a,
        spans_b=checked_b,
        span_texts_a=tuple(result.text_a[start:end] for start, end in checked_a),
        span_texts_b=tuple(result.text_b[start:end] for start, end in checked_b),
        places_a=places_a,
        places_b=places_b,
        matrix=left @ result.matrix.double() @ right.T,
        main_effects_a=left @ result.main_effects_a.double(),
        main_effects_b=right @ result.main_effects_b.double(),
        intercept=result.intercept,
        residual=result.residual,
        score=result.score,
    )


def _checked(spans: Sequence[Span], text: str, name: str) -> tuple[Span, ...]:
    """Return the spans as pairs of integers within the text that do not overlap."""
    checked = tuple((int(start), int(end)) for start, end in spans)
    for start, end in checked:
        if not 0 <= start < end <= len(text):
            raise InputError(
                f"Expected every span of `{name}` to be (start, end) with 0 <= start < end <= "
                f"{len(text)}, the length of the text, but got {(start, end)}. Give spans in "
                "characters of that text."
            )
    ordered = sorted(checked)
    for before, after in itertools.pairwise(ordered):
        if after[0] < before[1]:
            raise InputError(
                f"Expected the spans of `{name}` not to overlap, but {before} and {after} do "
                f"({text[slice(*before)]!r} and {text[slice(*after)]!r}). Give each character to "
                "one span."
            )
    return checked


def _places(
    spans: Sequence[Span],
    text: str,
    offsets: Sequence[Span],
    special: Sequence[bool],
    prompt: Sequence[bool],
) -> TokenPlaces:
    """Place the tokens of one text among spans that do not overlap."""
    others = [s or p for s, p in zip(special, prompt, strict=True)]
    own = [span for span, other in zip(offsets, others, strict=True) if not other]
    if spans and own and not any(end > start for start, end in own):
        raise InputError(
            "Expected tokens that know their place in the text, but this attribution has no "
            "offsets: the model's tokenizer is slow. Load the model with a fast tokenizer."
        )
    order = sorted(range(len(spans)), key=lambda i: spans[i])
    starts = [spans[i][0] for i in order]
    span_of, crossing, outside = [], [], []
    touched: set[int] = set()
    for token, ((start, end), other) in enumerate(zip(offsets, others, strict=True)):
        place = len(spans)
        if not other:
            # Tokenizers count the space before a word to the word, or make it a token of its own.
            while start < len(text) and text[start].isspace():
                start += 1
            reached = _reached(spans, order, starts, start, max(end, start + 1))
            touched.update(reached)
            if len(reached) > 1:
                crossing.append(token)
            if reached and spans[reached[0]][0] <= start:
                place = reached[0]
            else:
                outside.append(token)
        span_of.append(place)
    untouched = tuple(sorted(set(range(len(spans))) - touched))
    return TokenPlaces(tuple(span_of), len(spans), tuple(crossing), tuple(outside), untouched)


def _reached(
    spans: Sequence[Span], order: Sequence[int], starts: Sequence[int], start: int, end: int
) -> list[int]:
    """Return the spans that share a character with start … end, from left to right."""
    rank = max(bisect_right(starts, start) - 1, 0)
    reached = []
    while rank < len(order) and starts[rank] < end:
        if spans[order[rank]][1] > start:
            reached.append(order[rank])
        rank += 1
    return reached
