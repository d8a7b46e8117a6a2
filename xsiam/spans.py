"""Sums of an attribution over sentences or any other spans of characters."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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


class SpanPair(NamedTuple):
    """One entry of a span matrix with the texts it belongs to."""

    i: int
    j: int
    text_a: str
    text_b: str
    value: float


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
    left = _membership(
        checked_a,
        result.text_a,
        result.offsets_a,
        [s or p for s, p in zip(result.special_mask_a, result.prompt_mask_a, strict=True)],
    )
    right = _membership(
        checked_b,
        result.text_b,
        result.offsets_b,
        [s or p for s, p in zip(result.special_mask_b, result.prompt_mask_b, strict=True)],
    )
    return SpanAttribution(
        spans_a=checked_a,
        spans_b=checked_b,
        span_texts_a=tuple(result.text_a[start:end] for start, end in checked_a),
        span_texts_b=tuple(result.text_b[start:end] for start, end in checked_b),
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


def _membership(
    spans: Sequence[Span], text: str, offsets: Sequence[Span], outside: Sequence[bool]
) -> Tensor:
    """Return which token belongs to which span, or to the rest, as ones: [n_spans + 1, S]."""
    own = [span for span, other in zip(offsets, outside, strict=True) if not other]
    if spans and own and not any(end > start for start, end in own):
        raise InputError(
            "Expected tokens that know their place in the text, but this attribution has no "
            "offsets: the model's tokenizer is slow. Load the model with a fast tokenizer."
        )
    member = torch.zeros(len(spans) + 1, len(offsets), dtype=torch.float64)
    for token, ((start, end), other) in enumerate(zip(offsets, outside, strict=True)):
        piece = text[start:end]
        # Byte-level tokenizers count the space before a word to the word.
        first = start + len(piece) - len(piece.lstrip()) if piece.strip() else start
        row = len(spans)
        if not other:
            row = next((i for i, (s, e) in enumerate(spans) if s <= first < e), row)
        member[row, token] = 1.0
    return member
