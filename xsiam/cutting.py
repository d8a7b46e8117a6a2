"""Cut a text that is longer than a model's window into overlapping windows, between words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xsiam.errors import InputError, ModelError

Span = tuple[int, int]

# What a cut before a token would separate, from best to worst.
_BETWEEN_WORDS = 2  # white space lies there, or the text ends
_BETWEEN_PIECES = 1  # words of the tokenizer's own pre-tokenisation, such as "dog" and "."
_INSIDE_WORD = 0
_INSIDE_CHARACTER = -1  # several tokens share a character: no cut


@dataclass(frozen=True)
class Windows:
    """The windows of one text.

    Attributes:
        spans: Character span of each window, in order; together they hold the whole text.
        split_words: How many cuts fall inside a word, because it is longer than a window.
    """

    spans: tuple[Span, ...]
    split_words: int = 0


class WindowCutter:
    """Cut texts into windows that a model reads whole, prompt and special tokens included.

    A window is a substring of the text and is tokenised as an ordinary text. Cuts fall on token
    boundaries of the whole text: at white space where there is some, else between the words that
    the tokenizer itself tells apart (punctuation, Chinese characters), and inside a word only where
    the word alone is longer than a window. Neighbours share at least ``overlap`` tokens, except
    beside a word so long that whole words leave no room for them.

    A window that does not start the text starts with the white space before its first word, as that
    is part of the word for byte-level tokenizers; after a prompt that ends in white space it does
    not, and white space at a cut can then be in no window. Windows of white space alone, which a
    model cannot embed, are left out. Every other character of the text is in a window.

    Args:
        tokenizer: The model's tokenizer; a slow one can only tell that a text fits.
        prompt: What precedes every window.
        window: The most tokens of one window, prompt and special tokens included.
        overlap: Tokens that neighbours share, or, as a float below 1, the share of a window's room
            for text.
    """

    def __init__(self, tokenizer: Any, prompt: str, window: int, overlap: int | float) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.window = window
        self.overlap = overlap

    def cut(self, text: str) -> Windows:
        """Return the windows of a text; one that fits is one window.

        Raises:
            InputError: If the window has no room for a token of the text, or the overlap fills it.
            ModelError: If the text does not fit and the tokenizer gives no offsets.
        """
        if self.count(text) <= self.window:
            return Windows(((0, len(text)),))
        if not getattr(self.tokenizer, "is_fast", False):
            raise ModelError(
                f"Expected a fast tokenizer, whose offsets say where to cut a text of "
                f"{self.count(text)} tokens, but {type(self.tokenizer).__name__} is slow. Load the "
                f"model with a fast tokenizer, or give texts of at most {self.window} tokens."
            )
        return _Cut(self, text).windows()

    def count(self, text: str) -> int:
        """Return how many tokens the model would read, were there no limit."""
        ids = self.tokenizer(self.prompt + text, truncation=False, verbose=False)["input_ids"]
        return len(ids)


class _Cut:
    """The cutting of one text: boundaries are numbers of tokens of the text, 0 … n."""

    def __init__(self, cutter: WindowCutter, text: str) -> None:
        self.cutter = cutter
        self.text = text
        self.offsets, words, others = self._tokenise()
        self.n = len(self.offsets)
        self.room = cutter.window - others
        if self.room < 1:
            raise InputError(
                f"Expected `window` to be larger than the {others} tokens of prompt and special "
                f"tokens, but got {cutter.window}. Set `window` to more tokens, or shorten the "
                "prompt."
            )
        overlap = cutter.overlap
        self.overlap = int(overlap * self.room) if isinstance(overlap, float) else overlap
        if self.overlap >= self.room:
            raise InputError(
                f"Expected `overlap` to be smaller than the {self.room} tokens of text that a "
                f"window of {cutter.window} holds beside prompt and special tokens, but got "
                f"{overlap}. Set `overlap` to fewer tokens, or to a fraction such as 0.25."
            )
        self.levels = [
            _BETWEEN_WORDS if i in (0, self.n) else self._level(i, words) for i in range(self.n + 1)
        ]

    def windows(self) -> Windows:
        spans: list[Span] = []
        used: set[int] = set()
        start = end = 0
        while end < self.n:
            start, end = self._next(start, end)
            used |= {start, end}
            first, last = self._span(start, end)
            if self.text[first:last].strip():
                spans.append((first, last))
        return Windows(tuple(spans), sum(self.levels[i] == _INSIDE_WORD for i in used))

    def _tokenise(self) -> tuple[list[Span], list[int | None], int]:
        """Return offsets and word numbers of the text's own tokens, and the number of others."""
        encoding = self.cutter.tokenizer(
            self.cutter.prompt + self.text,
            truncation=False,
            verbose=False,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        before = len(self.cutter.prompt)
        kept = [
            (max(0, start - before), end - before, word)
            for (start, end), special, word in zip(
                encoding["offset_mapping"],
                encoding["special_tokens_mask"],
                encoding.word_ids(),
                strict=True,
            )
            if not special and end >= before and (end > before or before == 0)
        ]
        others = len(encoding["input_ids"]) - len(kept)
        return [(s, e) for s, e, _ in kept], [word for *_, word in kept], others

    def _level(self, i: int, words: list[int | None]) -> int:
        before, after = self.offsets[i - 1], self.offsets[i]
        if after[0] < before[1]:
            return _INSIDE_CHARACTER
        # Byte-level and SentencePiece tokenizers may count the white space to a token.
        around = self.text[max(before[1] - 1, 0) : after[0] + 1]
        if any(character.isspace() for character in around):
            return _BETWEEN_WORDS
        return _INSIDE_WORD if words[i] == words[i - 1] else _BETWEEN_PIECES

    def _next(self, start: int, end: int) -> Span:
        """Return the window after the one from ``start`` to ``end``: it ends behind ``end``."""
        best: Span | None = None
        for first in self._starts(start, end):
            last = self._end(first, end)
            if last is None:
                continue
            if self.levels[last] > _INSIDE_WORD:
                return first, last
            best = best or (first, last)
        if best is None:
            position = self._span(end, end + 1)[0]
            raise InputError(
                f"Expected `window` to hold at least one character beside prompt and special "
                f"tokens, but {self.cutter.window} tokens do not hold the one at {position}: "
                f"{self.text[position : position + 1]!r}. Set `window` to more tokens."
            )
        return best

    def _starts(self, start: int, end: int) -> Iterator[int]:
        """Yield where the next window may start, the best first, the later ones after it."""
        if end == 0:
            yield 0
            return
        target = max(end - self.overlap, start + 1)
        # Going back to the start of a word must leave at least half of what a window gains.
        lowest = max(target - (self.room - self.overlap) // 2, start + 1)
        back = [i for i in range(target, lowest - 1, -1) if self.levels[i] > _INSIDE_WORD]
        if not back and self.levels[end] == _INSIDE_WORD:  # in a word that is cut anyway
            back = [i for i in range(target, lowest - 1, -1) if self.levels[i] >= _INSIDE_WORD]
        if back:
            yield max(back, key=lambda i: (self.levels[i], i))
        yield from (i for i in range(target + 1, end) if self.levels[i] > _INSIDE_WORD)
        yield end

    def _end(self, start: int, end: int) -> int | None:
        """Return the best end behind ``end`` that fits a window, or None."""
        limit = min(start + self.room, self.n)
        half = end + (limit - end) // 2
        choices = [i for i in range(limit, end, -1) if self.levels[i] >= _INSIDE_WORD]
        # A substring can have more tokens than it has inside the text, so each is counted.
        choices.sort(key=lambda i: (self.levels[i] == _INSIDE_WORD, i <= half, -self.levels[i]))
        return next((i for i in choices if self._fits(start, i)), None)

    def _fits(self, start: int, end: int) -> bool:
        first, last = self._span(start, end)
        return self.cutter.count(self.text[first:last]) <= self.cutter.window

    def _span(self, start: int, end: int) -> Span:
        """Return the characters of a window, with the white space before its first token."""
        first = self.offsets[start - 1][1] if start else 0
        last = self.offsets[end - 1][1] if end < self.n else len(self.text)
        if start and self.cutter.prompt[-1:].isspace():
            first += len(self.text[first:last]) - len(self.text[first:last].lstrip())
        return first, last
