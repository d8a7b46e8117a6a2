"""Classes of tokens without a parser: by what a tokenizer added, and how common a word is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from xsiam.reading import AttributedText

__all__ = ["TOKEN_CLASSES", "document_frequencies", "token_classes"]

TOKEN_CLASSES = ("special", "prompt", "punctuation", "frequent", "content")
"""Classes of query tokens. Words are "frequent" by the documents they occur in, else "content"."""

FREQUENT = 0.1
"""A word in so large a share of the documents is frequent: hardly any but function words are."""
FEWEST = 3
"""A frequent word is in so many documents at least, or every word of a small collection were."""

_WORD = re.compile(r"\w+")


def document_frequencies(texts: Sequence[str]) -> Counter[str]:
    """Count the texts that each word occurs in; words are runs of letters, digits and marks."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(set(_WORD.findall(text.casefold())))
    return counts


def token_classes(
    text: AttributedText, frequencies: Mapping[str, int], n_documents: int
) -> tuple[str, ...]:
    """Return the class of each token, one of `TOKEN_CLASSES`.

    A piece of a word has the class of the whole word. A script that does not part words has no
    frequent ones. A token whose place in the text is not known is taken for a word of its own.
    """
    enough = max(FEWEST, FREQUENT * n_documents)
    spans = [(match.span(), match.group().casefold()) for match in _WORD.finditer(text.text)]
    found = []
    for token, (start, end), special, prompt in zip(
        text.tokens, text.offsets, text.special_mask, text.prompt_mask, strict=True
    ):
        if special or prompt:
            found.append("special" if special else "prompt")
            continue
        inside = [word for (first, last), word in spans if first < end and start < last]
        word = inside[0] if inside else "" if end > start else token.strip("▁Ġ#").casefold()
        if not _WORD.search(word):
            found.append("punctuation")
        else:
            found.append("frequent" if frequencies.get(word, 0) >= enough else "content")
    return tuple(found)
