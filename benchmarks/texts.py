"""Texts to measure with: the demo pair, bundled pairs, and texts of a given number of tokens."""

from __future__ import annotations

import itertools
from typing import Any

from cases import DEMO_A, DEMO_B

from xsiam import SiameseEncoder, probes

_WARM_UP = (
    "A woman repairs the old bicycle in the shop.",
    "The engineer is fixing a broken machine in his garage today.",
)
_WORDS_A = ("dog", "cat", "house", "garden", "river", "old", "runs", "water", "green", "street")
_WORDS_B = ("car", "road", "wind", "light", "small", "tree", "sings", "night", "blue", "paper")


def demo_pair() -> tuple[str, str]:
    """Return the pair that single measurements use."""
    return DEMO_A, DEMO_B


def warm_up_pair() -> tuple[str, str]:
    """Return another pair, so that nothing of a measured one is known before."""
    return _WARM_UP


def make_pairs(encoder: SiameseEncoder, wanted: Any = None) -> tuple[list[str], list[str]]:
    """Return first and second texts.

    Args:
        encoder: Its tokenizer counts tokens.
        wanted: None for the demo pair, ``{"kind": "bundled", "n": 32}``, or
            ``{"kind": "words", "tokens_a": 10, "tokens_b": 256}``, special tokens included.
    """
    if wanted is None:
        return [DEMO_A], [DEMO_B]
    if wanted["kind"] == "bundled":
        found = [pair for split in probes.SPLITS for pair in probes.load(split)]
        # Every third pair and so on: categories stand together in the files.
        mixed = [pair for start in range(3) for pair in found[start::3]]
        if len(mixed) < wanted["n"]:
            raise ValueError(f"Expected at most {len(mixed)} pairs, but got {wanted['n']}.")
        chosen = mixed[: wanted["n"]]
        return [pair.sentence1 for pair in chosen], [pair.sentence2 for pair in chosen]
    text_a = text_of_length(encoder, wanted["tokens_a"], _WORDS_A)
    return [text_a], [text_of_length(encoder, wanted["tokens_b"], _WORDS_B)]


def text_of_length(encoder: SiameseEncoder, tokens: int, words: tuple[str, ...]) -> str:
    """Repeat ``words`` to a text of exactly ``tokens`` tokens, special tokens included.

    Raises:
        ValueError: If the words do not come out at that number.
    """
    tokenizer: Any = encoder.model.tokenizer
    n_words = tokens - tokenizer.num_special_tokens_to_add()
    text = " ".join(itertools.islice(itertools.cycle(words), n_words))
    length = len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    if length != tokens:
        raise ValueError(f"Expected a text of {tokens} tokens, but it has {length}.")
    return text
