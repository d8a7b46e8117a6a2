"""Why documents are ranked as they are: every difference of two scores, token by token.

A score splits over the query's tokens and, once more, over the document's
(`xsiam.margins.ScoreSplit`). Both documents of a comparison share the query's tokens, so that what
lifts one above the other is the difference of their splits: no further pass of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from xsiam.attribution import PairAttributor
from xsiam.collection import AUTO, Collection, known_ids, open_collection
from xsiam.combination import Settings
from xsiam.errors import InputError
from xsiam.index import TokenVectorIndex
from xsiam.margins import Margin, ScoreSplit, margin_between, split_of
from xsiam.reading import AttributedText, TokenVectors
from xsiam.retrieval import TIE

__all__ = ["Comparison", "RankedDocument", "RankingExplanation", "explain_ranking"]

RIVALS = ("below", "above", "relevant")
"""Rivals that are chosen for each document; the id of a document is the other choice."""


class TokenShare(NamedTuple):
    """One token with what it adds to a score or to a margin.

    Attributes:
        position: Of the token in its text, from 0.
        token: The token.
        value: In units of the score.
    """

    position: int
    token: str
    value: float


@dataclass(frozen=True, eq=False)
class RankedDocument:
    """One document of a ranking, with its score split over tokens.

    Attributes:
        corpus_id: Its place in the list of documents, or its id in the index.
        rank: Its place in the ranking, from 1; equal scores keep the order of the documents.
        text: The document.
        relevant: Whether the caller called it relevant.
        tied: Whether another score differs by no more than rounding (`xsiam.retrieval.TIE`).
        kinds: "own", "special" or "prompt" of each of its tokens.
        split: Its score, split over the tokens of the query and over its own.
    """

    corpus_id: int
    rank: int
    text: str
    relevant: bool
    tied: bool
    kinds: tuple[str, ...]
    split: ScoreSplit

    @property
    def score(self) -> float:
        """The model's own score with the query."""
        return self.split.score


@dataclass(frozen=True, eq=False)
class Comparison:
    """Why one document scores above or below another.

    Attributes:
        corpus_id: A document.
        rival_id: What it is compared with.
        margin: score(document) − score(rival), over the query's tokens and over those of both.
    """

    corpus_id: int
    rival_id: int
    margin: Margin

    def strongest_query_tokens(self, k: int = 5) -> list[TokenShare]:
        """Return the ``k`` tokens of the query that move the margin most, strongest first."""
        return strongest(self.margin.names_query, self.margin.query_tokens, k)

    def strongest_document_tokens(self, k: int = 5) -> list[TokenShare]:
        """Return the same of the document's own tokens; positive values speak for it."""
        return strongest(self.margin.names_a, self.margin.tokens_a, k)

    def strongest_rival_tokens(self, k: int = 5) -> list[TokenShare]:
        """Return the same of the rival's tokens; negative values speak for the rival."""
        return strongest(self.margin.names_b, self.margin.tokens_b, k)


@dataclass(frozen=True, eq=False)
class RankingExplanation:
    """A ranking with every score split over tokens, so that any two documents can be compared.

    For documents a and b, score(a) − score(b) = Σ query tokens + rest + residual, and the same
    over the tokens of both documents: see `xsiam.margins.Margin`. An entry at layer l belongs to
    the contextualised positions that enter block l, not to "the word alone".

    Attributes:
        query: The query, without prompt.
        tokens: Its tokens, prompt and special tokens included.
        kinds: "own", "special" or "prompt" of each of them.
        documents: The documents that are explained, best first.
        n_documents: How many were ranked.
        against: What documents are compared with: "below", "above", "relevant" or an id.
        role_query: Role of the query.
        role_documents: Role of the documents.
        settings: Layer, reference, similarity and the like.
    """

    query: str
    tokens: tuple[str, ...]
    kinds: tuple[str, ...]
    documents: tuple[RankedDocument, ...]
    n_documents: int
    against: str | int
    role_query: str | None
    role_documents: str | None
    settings: Settings

    @property
    def converged(self) -> bool:
        """Whether all texts met the tolerance."""
        return all(document.split.converged for document in self.documents)

    @property
    def completeness_error(self) -> float:
        """The completeness error of the worst text."""
        return max(document.split.completeness_error for document in self.documents)

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every document with its rival, best document first; without a rival, none."""
        found = []
        for place, document in enumerate(self.documents):
            rival = self._rival(place)
            if rival is not None:
                found.append(self.compare(document.corpus_id, rival.corpus_id))
        return tuple(found)

    def document(self, corpus_id: int) -> RankedDocument:
        """Return a document by its id.

        Raises:
            InputError: If it is not among those that are explained.
        """
        for document in self.documents:
            if document.corpus_id == corpus_id:
                return document
        raise InputError(
            f"Expected the id of an explained document, one of "
            f"{[d.corpus_id for d in self.documents]}, but got {corpus_id!r}. Raise `top_k`, or "
            "name it in `relevant`."
        )

    def compare(self, corpus_id: int, rival_id: int) -> Comparison:
        """Compare any two explained documents.

        Raises:
            InputError: If one is not among those that are explained.
        """
        split, rival = self.document(corpus_id).split, self.document(rival_id).split
        return Comparison(corpus_id, rival_id, margin_between(split, rival))

    def rank(self, return_documents: bool = False) -> list[dict[str, Any]]:
        """Return the ranking as sentence-transformers' ``CrossEncoder.rank`` does, best first.

        Args:
            return_documents: Whether the texts are put in, under "text".
        """
        return [
            {"corpus_id": d.corpus_id, "score": d.score}
            | ({"text": d.text} if return_documents else {})
            for d in self.documents
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; tensors become lists."""
        documents = [
            vars(d)
            | {"score": d.score, "split": vars(d.split) | {"parts": d.split.parts._asdict()}}
            for d in self.documents
        ]
        comparisons = [
            {"corpus_id": c.corpus_id, "rival_id": c.rival_id, **vars(c.margin)}
            for c in self.comparisons
        ]
        names = (
            *("query", "tokens", "kinds", "n_documents", "against", "role_query"),
            *("role_documents", "converged", "completeness_error"),
        )
        content = {name: getattr(self, name) for name in names} | asdict(self.settings)
        return {
            key: _plain(value)
            for key, value in (
                content | {"documents": documents, "comparisons": comparisons}
            ).items()
        }

    def to_html(self) -> str:
        """Return ranking and comparisons as an HTML fragment without scripts, texts escaped."""
        from xsiam.page import render_ranking

        return render_ranking(self)

    def _repr_html_(self) -> str:
        """Show the ranking in a notebook."""
        return self.to_html()

    def __str__(self) -> str:
        from xsiam.report import ranking_text

        return ranking_text(self)

    def _rival(self, place: int) -> RankedDocument | None:
        """Return what the document at a place, from 0, is compared with."""
        own = self.documents[place]
        if self.against == "below":
            return self.documents[place + 1] if place + 1 < len(self.documents) else None
        if self.against == "above":
            return self.documents[place - 1] if place else None
        if self.against == "relevant":
            # A relevant document with the strongest wrong one, a wrong one with the best relevant.
            return next((d for d in self.documents if d.relevant != own.relevant), None)
        return None if own.corpus_id == self.against else self.document(int(self.against))


def explain_ranking(
    attributor_or_index: PairAttributor | TokenVectorIndex,
    query: str,
    documents: Sequence[str] | Sequence[int] | None = None,
    *,
    relevant: int | Sequence[int] = (),
    against: str | int | None = None,
    top_k: int | None = None,
    role_query: str | None = AUTO,
    role_documents: str | None = AUTO,
) -> RankingExplanation:
    """Rank documents for a query, and split every difference of scores over tokens.

    Args:
        attributor_or_index: What integrates texts; or an index of documents that was opened with
            an attributor, so that only the query is integrated.
        query: The query.
        documents: Texts for an attributor. For an index ids of its texts; None is all.
        relevant: Ids of documents that should be first: places in ``documents``, or ids of the
            index. They are explained wherever they rank.
        against: What each document is compared with: the one "below", the one "above" (of those
            that are explained), the best "relevant" one (and relevant ones with the strongest that
            is not), or the document of an id. None is "relevant" where there is one, else "below".
        top_k: How many of the best are explained; None is all. Ranks count all documents.
        role_query: Role of the query; "auto" is "query" where the model has a prompt for queries.
        role_documents: Role of the documents; "auto" is "document" likewise. Those of an index
            have the role that it was built with.

    Returns:
        The ranking; any two of its documents can be compared.

    Raises:
        InputError: If there is no document, a text is empty, an id is unknown or given twice, a
            role is unknown or not that of the index, or ``against`` or ``top_k`` is out of range.

    Warns:
        ConvergenceWarning: If a text did not meet the tolerance.

    Example:
        >>> found = explain_ranking(attributor, query, texts, relevant=3)  # doctest: +SKIP
        >>> found.rank()[0]  # doctest: +SKIP
        {'corpus_id': 1, 'score': 0.71}
        >>> found.comparisons[0].strongest_query_tokens(2)  # doctest: +SKIP
    """
    collection = open_collection(attributor_or_index, documents, role_query, role_documents)
    wanted = known_ids("relevant", relevant, collection.ids)
    rival = _checked_rival(against, wanted, collection.ids)
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise InputError(f"Expected `top_k` to be a positive number, but got {top_k!r}.")
    (read,) = collection.read_queries([query])
    kept = [*wanted, *([rival] if isinstance(rival, int) else [])]
    return _explained(collection, read, set(wanted), rival, kept, top_k)


def kinds_of(text: AttributedText) -> tuple[str, ...]:
    """Return "own", "special" or "prompt" for each token of a text."""
    return tuple(
        "special" if special else "prompt" if prompt else "own"
        for special, prompt in zip(text.special_mask, text.prompt_mask, strict=True)
    )


def strongest(names: Sequence[str], values: Tensor, k: int) -> list[TokenShare]:
    """Return the ``k`` tokens of largest absolute value, strongest first."""
    order = values.abs().sort(descending=True, stable=True).indices[:k].tolist()
    return [TokenShare(i, names[i], float(values[i])) for i in order]


def _explained(
    collection: Collection,
    query: TokenVectors,
    relevant: set[int],
    against: str | int,
    kept: Sequence[int],
    top_k: int | None,
) -> RankingExplanation:
    """Rank by embeddings, then split the scores of the best and of those that must be kept."""
    unit = query.embedding / query.norm
    scores = collection.units @ unit
    n = len(scores)
    best = scores.sort(descending=True, stable=True).indices[: n if top_k is None else top_k]
    place_of = {corpus_id: place for place, corpus_id in enumerate(collection.ids)}
    places = list(dict.fromkeys([*best.tolist(), *(place_of[i] for i in kept)]))
    parts = [
        (text.text, kinds_of(text), split_of(query, text))
        for text in collection.read_documents(places)
    ]
    # Of the one forward that the splits belong to: batches of others round differently.
    scores[places] = torch.tensor([split.score for *_, split in parts], dtype=scores.dtype)
    ranks = torch.empty(n, dtype=torch.long)
    ranks[scores.sort(descending=True, stable=True).indices] = torch.arange(1, n + 1)
    lengths = collection.units.norm(dim=1) * unit.norm()
    documents = [
        RankedDocument(
            corpus_id=collection.ids[place],
            rank=int(ranks[place]),
            text=text,
            relevant=collection.ids[place] in relevant,
            tied=int(((scores - scores[place]).abs() <= TIE * lengths[place]).sum()) > 1,
            kinds=kinds,
            split=split,
        )
        for place, (text, kinds, split) in zip(places, parts, strict=True)
    ]
    return RankingExplanation(
        query=query.text,
        tokens=query.tokens,
        kinds=kinds_of(query),
        documents=tuple(sorted(documents, key=lambda document: document.rank)),
        n_documents=n,
        against=against,
        role_query=collection.role_query,
        role_documents=collection.role_documents,
        settings=collection.settings(),
    )


def _checked_rival(
    against: str | int | None, relevant: Sequence[int], ids: Sequence[int]
) -> str | int:
    if against is None:
        return "relevant" if relevant else "below"
    if isinstance(against, SupportsIndex):
        return known_ids("against", against, ids)[0]
    if against not in RIVALS:
        raise InputError(
            f"Expected `against` to be one of {list(RIVALS)} or the id of a document, but got "
            f"{against!r}."
        )
    if against == "relevant" and not relevant:
        raise InputError("Expected `relevant` to name a document for `against='relevant'`.")
    return against


def _plain(value: Any) -> Any:
    """Return tensors and tuples as lists."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
