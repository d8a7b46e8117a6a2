"""Which way to differentiate: forward from tokens, reverse from the embedding, or mixed for a pair.

Token vectors of a text of S tokens cost S tangents pushed forward, or K cotangents pulled back from
the embedding's K dimensions. A pair's matrix also follows from the token vectors of one text and as
many cotangents pulled through the other, which is far cheaper for a short query and a long
document. That leaves no token vectors of the long text to keep, and no token error of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence

from xsiam.errors import InputError

MODES = ("auto", "forward", "reverse", "mixed")
# The other way must promise this share of the cost: estimates are that rough.
_WORTH_IT = 0.8
# What a cotangent costs, in tangents of one token: measured on all-MiniLM-L6-v2, 256 tokens.
_COTANGENT = 2.0


def check_mode(mode: str) -> str:
    """Return ``mode``; raise InputError where it is none."""
    if mode not in MODES:
        raise InputError(
            f"Expected `mode` to be one of {list(MODES)}, but got {mode!r}. Set `mode`."
        )
    return mode


def is_reverse(mode: str, length: int, n_dimensions: int, *, factored: bool = False) -> bool:
    """Whether token vectors of a text of ``length`` tokens are pulled back.

    Args:
        mode: One of :data:`MODES`.
        length: S.
        n_dimensions: K.
        factored: Whether tangents run in factors, which cotangents cannot.
    """
    if mode in ("forward", "reverse"):
        return mode == "reverse"
    return not factored and _COTANGENT * n_dimensions < _WORTH_IT * length


def pulled_sides(
    pairs: Sequence[tuple[Hashable, Hashable]],
    lengths: Mapping[Hashable, int],
    *,
    mode: str,
    n_dimensions: int,
    token_errors: bool,
    cached: Collection[Hashable] = (),
) -> list[int | None]:
    """Return for each pair which of its texts is pulled through (0 or 1), or None.

    Args:
        pairs: Keys of the texts of each pair.
        lengths: Tokens of each text.
        mode: "mixed" pulls through the longer text of every pair; "auto" where that is cheaper,
            the text is in no other pair and not cached, and nobody asked for its token error.
        n_dimensions: K.
        token_errors: Whether the token error of every text is asked for.
        cached: Texts whose token vectors are known.
    """
    if mode in ("forward", "reverse") or (mode == "auto" and token_errors):
        return [None] * len(pairs)
    uses = Counter(key for pair in set(pairs) for key in set(pair))
    sides: list[int | None] = []
    for pair in pairs:
        side = int(lengths[pair[1]] > lengths[pair[0]])
        long, short = pair[side], pair[1 - side]
        pulled = lengths[short] + 2
        alone = min(lengths[long], n_dimensions)
        cheaper = pulled < _WORTH_IT * alone and uses[long] == 1 and long not in cached
        sides.append(side if mode == "mixed" or cheaper else None)
    return sides
