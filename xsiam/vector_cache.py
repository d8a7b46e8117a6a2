"""Token vectors kept across calls: they depend on one text and the weights only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

from xsiam.reading import TokenVectors

TextKey = tuple[str, str | None]  # text and role


class VectorCache:
    """Token vectors by text and role, the most recently used up to a size in bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._fingerprint: str | None = None
        self._texts: OrderedDict[TextKey, TokenVectors] = OrderedDict()

    def keys(self, fingerprint: str) -> Collection[TextKey]:
        """Return the texts that are known for these weights."""
        return self._texts.keys() if fingerprint == self._fingerprint else ()

    def take(self, fingerprint: str, keys: Iterable[TextKey]) -> dict[TextKey, TokenVectors]:
        """Return those of the texts that are known for these weights."""
        if fingerprint != self._fingerprint:
            self._texts.clear()
            self._fingerprint, self._size = fingerprint, 0
        found = {key: self._texts[key] for key in keys if key in self._texts}
        for key in found:
            self._texts.move_to_end(key)
        return found

    def put(self, fingerprint: str, key: TextKey, text: TokenVectors) -> None:
        """Keep a text, and drop the least recently used ones where there are too many."""
        assert fingerprint == self._fingerprint
        assert key not in self._texts
        self._texts[key] = text
        self._size += text.vectors.nbytes
        while self._size > self._limit:
            self._size -= self._texts.popitem(last=False)[1].vectors.nbytes
