"""Texts that come more than once in a batch of pairs, and would be false negatives there.

A candidate is no negative of an anchor where the batch says that it is right: where its text is the
anchor's own, or that of a positive of an anchor with the same text. So neither the same positive
twice nor the same anchor twice makes a negative. Texts are compared by number, never by embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256  # looked up at once: numbers of pairs take 8 bytes a candidate


def repeats_of_anchors(text_ids: Tensor | None, rows: slice) -> Tensor | None:
    """Return which candidates of the anchors in ``rows`` are known to be right, or None for none.

    Args:
        text_ids: Numbers of the texts of all pairs: a, b and negatives, [n, 2 + columns].
        rows: Pairs whose anchors are meant, m of them.

    Returns:
        [m, n (1 + columns)] booleans. Candidates are all positives, then the negatives column by
        column; the anchor's own positive is not marked.
    """
    ids = _numbered(text_ids)
    if ids is None:
        return None
    return _repeats(ids, ids[rows, 0], ids[:, 1:].T.flatten(), rows, swapped=False)


def repeats_of_positives(text_ids: Tensor | None, rows: slice) -> Tensor | None:
    """Return which anchors are known to be right for the positives in ``rows``: [m, n] booleans.

    As `repeats_of_anchors`, the other way round; the positive's own anchor is not marked.
    """
    ids = _numbered(text_ids)
    if ids is None:
        return None
    return _repeats(ids, ids[rows, 1], ids[:, 0], rows, swapped=True)


def _numbered(text_ids: Tensor | None) -> Tensor | None:
    """Return the numbers as 0, 1, … in the same places, or None where all texts differ."""
    if text_ids is None:
        return None
    distinct, numbers = torch.unique(text_ids, return_inverse=True)
    return None if len(distinct) == text_ids.numel() else numbers


def _repeats(ids: Tensor, own: Tensor, candidates: Tensor, rows: slice, swapped: bool) -> Tensor:
    """Mark candidates [c] that equal a text of ``own`` [m], or make a pair of the batch with it."""
    size = int(ids.max()) + 1
    # A pair of texts as one number, so that pairs can be looked up among those of the batch.
    pairs = torch.unique(ids[:, 0] * size + ids[:, 1])
    marks = []
    for part in torch.split(own[:, None], _ROWS):
        made = candidates * size + part if swapped else part * size + candidates
        places = torch.searchsorted(pairs, made).clamp_(max=len(pairs) - 1)
        marks.append((pairs[places] == made) | (candidates == part))
    repeats = torch.cat(marks)
    places = torch.arange(rows.start, rows.stop, device=ids.device)
    repeats[places - rows.start, places] = False
    return repeats
