"""What decides between a query's relevant document and the strongest of the others.

A query is one observation: the margin score(relevant) − score(rival), split over its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from xsiam.collection import Collection
from xsiam.margins import Margin, ScoreParts, ScoreSplit, margin_between, split_of
from xsiam.reading import TokenVectors
from xsiam.retrieval import RETRIEVAL_FIGURES, TIE, figures_by_anchor
from xsiam.token_classes import TOKEN_CLASSES, document_frequencies, token_classes

__all__ = ["QueryMargin", "query_margins", "share_of_strongest", "tokens_to_reverse"]

_QUERIES = 64  # read at once


@dataclass(frozen=True, eq=False)
class QueryMargin:
    """What decides between the best relevant document of a query and the strongest other one.

    Attributes:
        query: The query.
        words: What each of its tokens stands for in the text; the token itself where it has no
            place there.
        classes: One of `TOKEN_CLASSES` for each of its tokens.
        relevant_id: The best relevant document.
        relevant_text: Its text.
        rival_id: The document of the highest score that is not relevant.
        rival_text: Its text.
        place: Place of the relevant document, from 1; ties count against it.
        figures: MRR@10, nDCG@10, recall@1 and recall@10 of the query, `RETRIEVAL_FIGURES`.
        relevant: Score of the relevant document, split.
        rival: Score of the rival, split.
    """

    query: str
    words: tuple[str, ...]
    classes: tuple[str, ...]
    relevant_id: int
    relevant_text: str
    rival_id: int
    rival_text: str
    place: int
    figures: tuple[float, ...]
    relevant: ScoreSplit
    rival: ScoreSplit

    @cached_property
    def margin(self) -> Margin:
        """score(relevant) − score(rival): positive tokens speak for the relevant document."""
        return margin_between(self.relevant, self.rival)

    @property
    def missed(self) -> bool:
        """Whether the relevant document is not first."""
        return self.place > 1

    @property
    def parts(self) -> ScoreParts:
        """The margin by kind: pairs of tokens, main effects, intercept; with the residual all."""
        pairs = zip(self.relevant.parts, self.rival.parts, strict=True)
        return ScoreParts(*(ours - theirs for ours, theirs in pairs))

    def by_class(self, values: Tensor) -> dict[str, float]:
        """Sum one value a token over the classes of tokens."""
        sums = dict.fromkeys(TOKEN_CLASSES, 0.0)
        for name, value in zip(self.classes, values.tolist(), strict=True):
            sums[name] += value
        return sums

    def class_shares(self) -> dict[str, float] | None:
        """Return the share of Σ|contribution| of each class; None where all are zero."""
        sizes = self.margin.query_tokens.abs()
        whole = float(sizes.sum())
        return None if whole == 0 else self.by_class(sizes / whole)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        margin = self.margin
        names = ("query", "words", "classes", "relevant_id", "rival_id", "place")
        return {name: getattr(self, name) for name in names} | {
            "figures": dict(zip(RETRIEVAL_FIGURES, self.figures, strict=True)),
            "margin": margin.total,
            "query_tokens": margin.query_tokens.tolist(),
            "query_rest": margin.query_rest,
            "parts": self.parts._asdict(),
            "residual": margin.residual,
            "converged": margin.converged,
        }


def query_margins(
    collection: Collection, queries: Sequence[str], relevant: Sequence[Sequence[int]]
) -> tuple[list[QueryMargin], int]:
    """Rank all documents for every query, and split the margin that decides.

    Args:
        collection: The documents.
        queries: The queries.
        relevant: Ids of relevant documents of each query, one or more.

    Returns:
        The distinct queries in their order, and how many were left out as all that they rank is
        relevant.
    """
    place_of = {corpus_id: place for place, corpus_id in enumerate(collection.ids)}
    texts: dict[str, int] = {}
    for place, text in enumerate(collection.texts):
        texts.setdefault(text, place)
    kept = list(texts.values())  # places of distinct documents
    number = {text: i for i, text in enumerate(texts)}
    known: dict[str, set[int]] = {}
    for text, ids in zip(queries, relevant, strict=True):
        mine = known.setdefault(text, set())
        mine.update(number[collection.texts[place_of[i]]] for i in ids)
    own = {text: number[text] for text in known if text in number}
    ranked = [
        text
        for text, mine in known.items()
        if len(mine | ({own[text]} if text in own else set())) < len(kept)
    ]
    frequencies = document_frequencies(list(texts))
    units = collection.units[kept]
    found: list[QueryMargin] = []
    for start in range(0, len(ranked), _QUERIES):
        some = ranked[start : start + _QUERIES]
        reads = collection.read_queries(some)
        found += _margins_of(collection, reads, known, own, kept, units, frequencies)
    return found, len(known) - len(ranked)


def tokens_to_reverse(values: Tensor, total: float) -> int | None:
    """Return the fewest tokens whose contributions must be taken away to reverse a margin.

    Args:
        values: Contributions of the tokens, [S].
        total: The margin: their sum and what does not depend on them.

    Returns:
        A number from 0 (for a margin of zero) to S; None where the order stays without any.
    """
    sign = 1.0 if total >= 0 else -1.0
    left = sign * total
    if left <= 0:
        return 0
    for count, value in enumerate((sign * values).sort(descending=True).values.tolist(), start=1):
        if value <= 0:
            return None
        left -= value
        if left <= 0:
            return count
    return None


def share_of_strongest(values: Tensor, k: int) -> float | None:
    """Return the share of Σ|value| that the ``k`` largest hold; None where all are zero."""
    sizes = values.abs().sort(descending=True).values
    whole = float(sizes.sum())
    return None if whole == 0 else float(sizes[:k].sum()) / whole


def _margins_of(
    collection: Collection,
    reads: Sequence[TokenVectors],
    known: Mapping[str, set[int]],
    own: Mapping[str, int],
    kept: Sequence[int],
    units: Tensor,
    frequencies: Mapping[str, int],
) -> list[QueryMargin]:
    """Split the margins of some queries; documents are numbered by their place in ``kept``."""
    anchors = torch.stack([read.embedding / read.norm for read in reads])
    scores = anchors @ units.T
    relevant = [(row, i) for row, read in enumerate(reads) for i in sorted(known[read.text])]
    left_out = [
        (row, own[read.text])
        for row, read in enumerate(reads)
        if read.text in own and own[read.text] not in known[read.text]
    ]
    pairs = [torch.tensor(p, dtype=torch.long).reshape(-1, 2) for p in (relevant, left_out)]
    figures = figures_by_anchor(anchors, units, *pairs, similarity="dot").tolist()
    is_relevant, is_left_out = (torch.zeros_like(scores, dtype=torch.bool) for _ in pairs)
    for mask, some in zip((is_relevant, is_left_out), pairs, strict=True):
        mask[some[:, 0], some[:, 1]] = True
    best = scores.masked_fill(~is_relevant, -torch.inf).argmax(dim=1)
    wrong = scores.masked_fill(is_relevant | is_left_out, -torch.inf)
    rival = wrong.argmax(dim=1)
    # Ties as `figures_by_anchor` counts them.
    tie = TIE * anchors.norm(dim=1) * units.norm(dim=1).max()
    reached = scores.gather(1, best[:, None])[:, 0] - tie
    places = 1 + (wrong >= reached[:, None]).sum(dim=1)
    needed = list(dict.fromkeys([*best.tolist(), *rival.tolist()]))
    texts = dict(zip(needed, collection.read_documents([kept[i] for i in needed]), strict=True))
    return [
        QueryMargin(
            query=read.text,
            words=tuple(
                read.text[start:end] or token
                for token, (start, end) in zip(read.tokens, read.offsets, strict=True)
            ),
            classes=token_classes(read, frequencies, len(kept)),
            relevant_id=collection.ids[kept[int(best[row])]],
            relevant_text=texts[int(best[row])].text,
            rival_id=collection.ids[kept[int(rival[row])]],
            rival_text=texts[int(rival[row])].text,
            place=int(places[row]),
            figures=tuple(figures[row]),
            relevant=split_of(read, texts[int(best[row])]),
            rival=split_of(read, texts[int(rival[row])]),
        )
        for row, read in enumerate(reads)
    ]
