"""Retrieval figures of pairs without labels, exact over any number of processes.

Each distinct anchor text ranks the distinct texts of all positives and hard negatives of a split by
the encoder's own similarity. A candidate is relevant where it is a positive of an anchor of that
text. A candidate of the anchor's own text that is no positive of it is left out, as in training
(`xsiam.losses.repeats`).

torchmetrics' retrieval metrics take every score of every anchor at once and leave ties to the order
of a sort; here anchors are ranked in blocks, and ties count against the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from xsiam.errors import InputError
from xsiam.metrics import first_of_each

__all__ = [
    "RETRIEVAL_FIGURES",
    "PairRetrieval",
    "Retrieval",
    "figures_by_anchor",
    "ranking_figures",
]

RETRIEVAL_FIGURES = ("mrr@10", "ndcg@10", "recall@1", "recall@10")
"""Keys of the figures, in their order."""

TIE = 1e-5
"""Scores that differ by no more are ties. Float32 scores of equal tokens differ by up to 2.7e-6
with the padding of their batch (tiny random models, the worst of six architectures). The unit is
that of a cosine; dot products are taken relative to the longest vectors."""

_CUTOFF = 10
_SCORES = 2**22  # at once, in float64: 32 MiB


class Retrieval(NamedTuple):
    """The figures over all anchors, or the reason why there are none.

    Attributes:
        figures: Float64 scalars by the keys of `RETRIEVAL_FIGURES`; None where undefined.
        undefined: Why they are undefined, None where they are defined.
        n_anchors: Number of distinct anchor texts.
        n_candidates: Number of distinct texts that are ranked.
    """

    figures: dict[str, Tensor] | None
    undefined: str | None
    n_anchors: int
    n_candidates: int


class PairRetrieval(Metric):
    """Let the anchors of all batches and processes rank the candidates of all of them.

    Embeddings are gathered, never figures averaged. A text counts once, by its number, with the
    embedding from the pair of the lowest index; so does a pair that a sampler repeats. What batches
    and processes change is only the rounding of embeddings, which `TIE` allows for in float32 where
    different texts have the same tokens. Training in less precision rounds more than that.

    Memory holds every embedding, and at most 2²² scores at once (or those of one anchor).

    Args:
        similarity: What the encoder scores by, "cos" or "dot".

    Raises:
        InputError: If the similarity is another.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    anchors: list[Tensor]
    candidates: list[Tensor]
    text_ids: list[Tensor]
    index: list[Tensor]

    def __init__(self, similarity: str = "cos") -> None:
        super().__init__()
        _check_similarity(similarity)
        self.similarity = similarity
        for name in ("anchors", "candidates", "text_ids", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, anchors: Tensor, candidates: Tensor, text_ids: Tensor, index: Tensor) -> None:
        """Take in a batch.

        Args:
            anchors: Embeddings of the first texts, [n, K].
            candidates: Embeddings of the positives and of the columns of hard negatives, in this
                order: [n, 1 + columns, K].
            text_ids: Numbers that are equal for equal texts: anchors, positives and negatives,
                [n, 2 + columns].
            index: Number of each pair in its data set, [n] integers.
        """
        self.anchors.append(anchors.detach())
        self.candidates.append(candidates.detach())
        self.text_ids.append(text_ids.detach())
        self.index.append(index.detach())

    def compute(self) -> Retrieval:
        """Return the figures over every pair seen on any process."""
        rows = first_of_each(dim_zero_cat(self.index))
        ids = dim_zero_cat(self.text_ids)[rows]
        vectors = dim_zero_cat(self.candidates)[rows].flatten(0, 1)
        anchors = dim_zero_cat(self.anchors)[rows][first_of_each(ids[:, 0])]
        candidates = vectors[first_of_each(ids[:, 1:].flatten())]
        reason = _undefined_reason(anchors, candidates)
        figures = None
        if reason is None:
            relevant, left_out = _known_pairs(ids)
            figures = ranking_figures(
                anchors, candidates, relevant, left_out, similarity=self.similarity
            )
        return Retrieval(figures, reason, len(anchors), len(candidates))


def ranking_figures(
    anchors: Tensor,
    candidates: Tensor,
    relevant: Tensor,
    left_out: Tensor | None = None,
    *,
    similarity: str = "cos",
    block: int | None = None,
) -> dict[str, Tensor]:
    """Return the means over all anchors of what `figures_by_anchor` says, with its arguments.

    Returns:
        Float64 scalars by the keys of `RETRIEVAL_FIGURES`.
    """
    found = figures_by_anchor(
        anchors, candidates, relevant, left_out, similarity=similarity, block=block
    )
    return dict(zip(RETRIEVAL_FIGURES, found.mean(dim=0).cpu().unbind(), strict=True))


def figures_by_anchor(
    anchors: Tensor,
    candidates: Tensor,
    relevant: Tensor,
    left_out: Tensor | None = None,
    *,
    similarity: str = "cos",
    block: int | None = None,
) -> Tensor:
    """Return MRR@10, nDCG@10, recall@1 and recall@10 of every anchor.

    The relevant candidates of an anchor rank among themselves by score, and each behind every wrong
    candidate that scores no less than `TIE` below it: ties are broken against the model. With p_i
    the place of the i-th of m relevant candidates, and sums over those with p_i ≤ 10,

    * MRR@10 is 1 / p_1, or 0 where p_1 > 10;
    * nDCG@10 is Σ 1 / log2(1 + p_i), divided by the same sum at p_i = i;
    * recall@k is the share of the m candidates with p_i ≤ k.

    Args:
        anchors: Embeddings, [n, K].
        candidates: Embeddings, [c, K].
        relevant: Distinct pairs of an anchor's and a candidate's number, [m, 2] integers; every
            anchor has one or more.
        left_out: Such pairs of candidates that an anchor does not rank, none of them relevant.
        similarity: "cos" or "dot".
        block: Anchors to rank at once; None takes what 2²² scores allow. It changes no figure.

    Returns:
        [n, 4] float64, in the order of `RETRIEVAL_FIGURES`.

    Raises:
        InputError: If the similarity is another.

    References:
        Voorhees, "The TREC-8 Question Answering Track Report" (1999) for the reciprocal rank;
        Järvelin and Kekäläinen, "Cumulated Gain-Based Evaluation of IR Techniques" (TOIS 2002),
        with a gain of 1, the logarithm of base 2 and no discount at rank 1 only.
    """
    _check_similarity(similarity)
    anchors, candidates = _scaled(anchors, candidates, similarity)
    relevant = relevant.to(anchors.device)
    left_out = relevant[:0] if left_out is None else left_out.to(anchors.device)
    size = max(1, _SCORES // len(candidates)) if block is None else block
    found = []
    for start in range(0, len(anchors), size):
        scores = anchors[start : start + size] @ candidates.T
        known = _mask(relevant, start, scores)
        places = _places(scores, known, known | _mask(left_out, start, scores))
        found.append(_figures(places, known.sum(dim=1)))
    return torch.cat(found)


def _check_similarity(similarity: str) -> None:
    if similarity not in ("cos", "dot"):
        raise InputError(f"Expected `similarity` to be 'cos' or 'dot', but got {similarity!r}.")


def _undefined_reason(anchors: Tensor, candidates: Tensor) -> str | None:
    if len(candidates) < 2:
        return f"a ranking needs 2 different texts or more, but there are {len(candidates)}"
    for name, vectors in (("anchors", anchors), ("candidates", candidates)):
        broken = int((~vectors.isfinite().all(dim=-1)).sum())
        if broken:
            return f"the embeddings of {broken} of {len(vectors)} {name} are not finite"
    return None


def _known_pairs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return which candidates are relevant for which anchors, and which are left out: [m, 2] each.

    Anchors and candidates are numbered by the order of their distinct ids.

    Args:
        ids: Numbers of the texts, [n, 2 + columns].
    """
    anchor_ids, anchor = torch.unique(ids[:, 0], return_inverse=True)
    candidate_ids, candidate = torch.unique(ids[:, 1:], return_inverse=True)
    relevant = torch.unique(torch.stack([anchor, candidate[:, 0]], dim=1), dim=0)
    places = torch.searchsorted(candidate_ids, anchor_ids).clamp_(max=len(candidate_ids) - 1)
    same = candidate_ids[places] == anchor_ids
    own = torch.stack([torch.arange(len(anchor_ids), device=ids.device), places], dim=1)[same]
    # A pair of numbers as one number.
    keys, own_keys = (pairs[:, 0] * len(candidate_ids) + pairs[:, 1] for pairs in (relevant, own))
    return relevant, own[~torch.isin(own_keys, keys)]


def _scaled(anchors: Tensor, candidates: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    """Return float64 vectors whose products lie in [-1, 1] and rank as the similarity does."""
    device = anchors.device if anchors.device.type == "cuda" else torch.device("cpu")
    anchors, candidates = (v.to(device, torch.float64) for v in (anchors, candidates))
    anchors = torch.nn.functional.normalize(anchors, dim=-1)
    if similarity == "cos":
        return anchors, torch.nn.functional.normalize(candidates, dim=-1)
    longest = candidates.norm(dim=-1).max()
    return anchors, candidates / longest.clamp_min(torch.finfo(torch.float64).tiny)


def _mask(pairs: Tensor, start: int, scores: Tensor) -> Tensor:
    """Mark the pairs of the anchors from ``start`` on, [block, c] as ``scores``."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    inside = (pairs[:, 0] >= start) & (pairs[:, 0] < start + len(scores))
    rows, columns = pairs[inside].unbind(dim=1)
    mask[rows - start, columns] = True
    return mask


def _places(scores: Tensor, relevant: Tensor, not_wrong: Tensor) -> Tensor:
    """Return the places of up to 10 relevant candidates, best first: [block, ≤ 10].

    Places from 1; those above 10 are lower bounds, also above 10, and 11 or more where there are no
    further relevant candidates.
    """
    top = min(_CUTOFF, scores.shape[1])
    best = scores.masked_fill(~relevant, -torch.inf).topk(top, dim=1).values
    # Ten wrong candidates ahead are enough to know that a place is no longer looked at.
    wrong = scores.masked_fill(not_wrong, -torch.inf).topk(top, dim=1).values
    ahead = (wrong[:, None] >= best[:, :, None] - TIE) & wrong.isfinite()[:, None]
    places = ahead.sum(dim=2) + torch.arange(1, top + 1, device=scores.device)
    return places.masked_fill(~best.isfinite(), _CUTOFF + 1)


def _figures(places: Tensor, n_relevant: Tensor) -> Tensor:
    """Return the figures of each anchor, [block, 4], from places [block, ≤ 10]."""
    gains = _gains(places)
    ideal = torch.arange(1, places.shape[1] + 1, device=places.device)
    best = _gains(ideal).masked_fill(ideal > n_relevant[:, None], 0.0)
    first = places[:, 0]
    found = [(places <= k).sum(dim=1) / n_relevant.double() for k in (1, _CUTOFF)]
    reciprocal = torch.where(first <= _CUTOFF, 1 / first.double(), 0.0)
    return torch.stack([reciprocal, gains.sum(dim=1) / best.sum(dim=1), *found], dim=1)


def _gains(places: Tensor) -> Tensor:
    """Return 1 / log2(1 + place), or 0 behind the tenth place."""
    return torch.where(places <= _CUTOFF, 1 / (1 + places.double()).log2(), 0.0)
