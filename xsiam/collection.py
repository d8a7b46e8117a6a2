"""Documents that queries are ranked over: a list of texts, or those of an index."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from xsiam.attribution import PairAttributor
from xsiam.combination import Settings
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.index import TokenVectorIndex
from xsiam.reading import TokenVectors
from xsiam.texts import check_texts

__all__ = ["AUTO", "Collection", "known_ids", "open_collection"]

AUTO = "auto"
"""Stands for the role "query" or "document" where the model has a prompt for it, else for None."""


@dataclass(frozen=True, eq=False)
class Collection:
    """Documents that queries are ranked over, wherever their token vectors come from.

    Attributes:
        ids: Ids of the documents.
        texts: The documents.
        units: ẽ(d) / n_d, [n, K] float64, whose inner products with a query's are scores.
        read_queries: Integrates queries.
        read_documents: Integrates documents, or reads them; by place in ``ids``.
        role_query: Role of queries.
        role_documents: Role of documents.
        settings: Returns what results have in common, once queries are read.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    units: Tensor
    read_queries: Callable[[Sequence[str]], list[TokenVectors]]
    read_documents: Callable[[Sequence[int]], Iterable[TokenVectors]]
    role_query: str | None
    role_documents: str | None
    settings: Callable[[], Settings]


def open_collection(
    source: PairAttributor | TokenVectorIndex,
    documents: Sequence[str] | Sequence[int] | None,
    role_query: str | None,
    role_documents: str | None,
) -> Collection:
    """Return the documents of a list of texts, or of an index.

    Raises:
        InputError: As `explain_ranking`.
    """
    if isinstance(source, TokenVectorIndex):
        return _of_index(source, documents, role_query, role_documents)
    if documents is None or isinstance(documents, str):
        raise InputError(
            f"Expected `documents` to be a list of texts, but got {documents!r}. Only those of an "
            "index can be left out."
        )
    encoder = source.encoder
    texts = tuple(documents)
    check_texts(texts, "documents")  # type: ignore[arg-type]
    _check_not_empty(texts)
    read_as = _role(encoder, role_query, "query")
    kept_as = _role(encoder, role_documents, "document")
    units = encoder.encode(texts, kept_as).double().cpu()  # type: ignore[arg-type]
    if encoder.similarity == "cos":
        units = torch.nn.functional.normalize(units, dim=-1)
    return Collection(
        ids=tuple(range(len(texts))),
        texts=texts,  # type: ignore[arg-type]
        units=units,
        read_queries=lambda some: source.token_vectors(some, read_as),
        read_documents=lambda places: source.token_vectors(
            [texts[i] for i in places],  # type: ignore[misc]
            kept_as,
        ),
        role_query=read_as,
        role_documents=kept_as,
        settings=lambda: source.settings,
    )


def known_ids(
    name: str, given: SupportsIndex | Sequence[SupportsIndex], ids: Sequence[int]
) -> list[int]:
    """Return distinct ids of documents, all of them checked.

    Raises:
        InputError: If one is unknown or given twice.
    """
    values = [given] if isinstance(given, SupportsIndex) else list(given)
    known = set(ids)
    for value in values:
        number = not isinstance(value, bool) and isinstance(value, SupportsIndex)
        if not number or operator.index(value) not in known:
            raise InputError(
                f"Expected `{name}` to be ids of documents, {_range(ids)}, but got {value!r}."
            )
    numbers = [operator.index(value) for value in values]
    if len(set(numbers)) != len(numbers):
        raise InputError(f"Expected `{name}` to name each document once, but got {numbers}.")
    return numbers


def _of_index(
    index: TokenVectorIndex,
    documents: Sequence[str] | Sequence[int] | None,
    role_query: str | None,
    role_documents: str | None,
) -> Collection:
    encoder, role = index.attributor.encoder, index.manifest.role
    if role_documents not in (AUTO, role):
        raise InputError(
            f"Expected `role_documents` to be {role!r}, as the index was built, but got "
            f"{role_documents!r}. Build another index, or leave it out."
        )
    ids: list[int] = list(range(len(index)))
    if documents is not None:
        if isinstance(documents, str) or any(isinstance(i, str) for i in documents):
            raise InputError(
                f"Expected `documents` to be ids of texts of the index, but got {documents!r}. "
                "Give an attributor to rank other texts."
            )
        ids = known_ids("documents", documents, ids)  # type: ignore[arg-type]
    _check_not_empty(ids)
    read_as = _role(encoder, role_query, "query")
    return Collection(
        ids=tuple(ids),
        texts=tuple(index.texts[i] for i in ids),
        units=index.unit_embeddings()[ids],
        read_queries=lambda some: [index.read_query(text, read_as) for text in some],
        read_documents=lambda places: (index.token_vectors(ids[place]) for place in places),
        role_query=read_as,
        role_documents=role,
        settings=lambda: index.query_settings,
    )


def _role(encoder: SiameseEncoder, role: str | None, kind: str) -> str | None:
    """Return the role that a caller meant."""
    if role != AUTO:
        encoder.check_role(role)
        return role
    # sentence-transformers gives every model empty prompts of both names.
    own, usual = (encoder.prompt_of(name)[0] or "" for name in (kind, None))
    return kind if own != usual else None


def _check_not_empty(documents: Sequence[Any]) -> None:
    if not documents:
        raise InputError("Expected `documents` to hold one document or more, but got none.")


def _range(ids: Sequence[int]) -> str:
    if list(ids) == list(range(len(ids))):
        return f"0 to {len(ids) - 1}"
    return f"among {list(ids[:10])}{' …' if len(ids) > 10 else ''}"
