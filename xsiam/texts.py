"""Texts as users give them: what is refused, and what a model's window cuts off."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from xsiam.errors import InputError, TruncationWarning


def check_texts(texts: Sequence[str], side: str = "texts") -> None:
    """Raise InputError for the first text that is no string, or empty.

    Args:
        texts: The texts of one side.
        side: The name of the argument, for the message.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"Expected every entry of `{side}` to be a string, but row {row} is "
                f"{text!r} ({type(text).__name__})."
            )
        if not text.strip():
            raise InputError(
                f"Expected every entry of `{side}` to hold some text, but row {row} is {text!r}."
            )


def check_pairs(texts_a: Sequence[str], texts_b: Sequence[str]) -> None:
    """Raise InputError where the two sides have different numbers of texts, or a bad text."""
    if len(texts_a) != len(texts_b):
        raise InputError(
            f"Expected as many texts on both sides, but got {len(texts_a)} and {len(texts_b)}."
        )
    check_texts(texts_a, "texts_a")
    check_texts(texts_b, "texts_b")


class Windowed(Protocol):
    """What measuring a truncation needs of an encoder."""

    longest_warned: int

    @property
    def max_length(self) -> int | None:
        """The window in tokens."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""


class Truncations:
    """Collect what the model's window cut off, and warn once at the end."""

    def __init__(self, encoder: Windowed, *, only_longer: bool = False) -> None:
        self._encoder = encoder
        self._only_longer = only_longer
        self._cut: list[int] = []
        self._seen = 0

    def __enter__(self) -> Truncations:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if error is not None or not self._cut:
            return
        if self._only_longer:
            if max(self._cut) <= self._encoder.longest_warned:
                return
            self._encoder.longest_warned = max(self._cut)
        warnings.warn(
            f"{len(self._cut)} of {self._seen} texts are longer than the model's window of "
            f"{self._encoder.max_length} tokens; up to {max(self._cut)} tokens of a text were cut. "
            "Scores and attributions are of the truncated texts. Set `model.max_length` if the "
            "model allows more.",
            TruncationWarning,
            stacklevel=4,
        )

    def look_at(
        self, texts: Sequence[str], features: Mapping[str, Any], prompt: str | None
    ) -> None:
        """Measure the texts that fill the window: only they can have been cut."""
        self._seen += len(texts)
        window = self._encoder.max_length
        if window is None or features["input_ids"].shape[1] < window:
            return
        full = (features["attention_mask"].sum(dim=1) >= window).nonzero().flatten().tolist()
        tokenizer = self._encoder.tokenizer
        for row in full:
            ids = tokenizer((prompt or "") + texts[row], truncation=False, verbose=False)
            if (cut := len(ids["input_ids"]) - window) > 0:
                self._cut.append(cut)
