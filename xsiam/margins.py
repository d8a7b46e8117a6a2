"""Why one document scores above another, and what tokens add toward a direction of the embedding.

Both follow from token vectors alone: ẽ(x) = ẽ(r_x) + Σ_s G_x[:, s], up to quadrature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xsiam.errors import InputError
from xsiam.reading import TokenVectors


class ScoreParts(NamedTuple):
    """The parts of a score by kind, in its units; with the residual they sum to it.

    Attributes:
        pairs: Sum of the attribution matrix.
        main_effects_query: Sum of the main effects of the query's tokens.
        main_effects_document: Sum of those of the document's tokens.
        intercept: What the two references score.
    """

    pairs: float
    main_effects_query: float
    main_effects_document: float
    intercept: float


@dataclass(frozen=True, eq=False)
class ScoreSplit:
    """One score of a query with a document, split over the tokens of either, units of the score.

    With the normaliser n = |ẽ(q)||ẽ(d)| (1 for a plain dot product)::

        query_tokens[i]    = G_q[:, i]·(ẽ(r_d) + Σ_j G_d[:, j]) / n
        query_rest         = ẽ(r_q)·(ẽ(r_d) + Σ_j G_d[:, j]) / n
        document_tokens[j] = G_d[:, j]·(ẽ(r_q) + Σ_i G_q[:, i]) / n
        document_rest      = ẽ(r_d)·(ẽ(r_q) + Σ_i G_q[:, i]) / n

        score = query_tokens.sum() + query_rest + residual
              = document_tokens.sum() + document_rest + residual
              = sum(parts) + residual

    These are three splits of one number: do not add them. The difference of the splits of two
    documents is their :class:`Margin`.

    Attributes:
        query_tokens: [S_q] float64: row sums of the matrix with the query's main effects.
        query_rest: What does not depend on the query's tokens.
        document_tokens: [S_d] float64: column sums with the document's main effects.
        document_rest: What does not depend on the document's tokens.
        parts: The score by kind.
        score: The model's own score, from the embeddings.
        residual: What quadrature and storage left over.
        names_query: The tokens of the query, as strings.
        names_document: Those of the document.
        completeness_error: Of the worse text.
        token_error: Of the worse text.
        converged: Whether both texts met the tolerance.
    """

    query_tokens: Tensor
    query_rest: float
    document_tokens: Tensor
    document_rest: float
    parts: ScoreParts
    score: float
    residual: float
    names_query: tuple[str, ...]
    names_document: tuple[str, ...]
    completeness_error: float
    token_error: float
    converged: bool


@dataclass(frozen=True, eq=False)
class Margin:
    """The difference of two scores of one query, score(q, a) − score(q, b), token by token.

    With the normalisers n_a = |ẽ(q)||ẽ(a)| and n_b = |ẽ(q)||ẽ(b)| of both scores (1 for a plain dot
    product), and Σ over tokens, the margin is split in two ways, each of which adds up by itself::

        query_tokens[i] = G_q[:, i]·( (ẽ(r_a) + Σ_j G_a[:, j]) / n_a − (the same of b) )
        query_rest      = ẽ(r_q)·( (ẽ(r_a) + Σ_j G_a[:, j]) / n_a − (the same of b) )

        tokens_a[j]     =  G_a[:, j]·(ẽ(r_q) + Σ_i G_q[:, i]) / n_a
        tokens_b[j]     = −G_b[:, j]·(ẽ(r_q) + Σ_i G_q[:, i]) / n_b
        documents_rest  = (ẽ(r_q) + Σ_i G_q[:, i])·( ẽ(r_a) / n_a − ẽ(r_b) / n_b )

        total = query_tokens.sum() + query_rest + residual
              = tokens_a.sum() + tokens_b.sum() + documents_rest + residual

    ``query_tokens`` are the row sums of the matrix of (q, a) with the main effects of q, minus
    those of (q, b); the tokens of a document are its column sums with its own main effects. The two
    splits are of the same number: do not add them. The rests are what the references score: the
    query's against both documents, and the query against the documents'. For a model with a shift
    both vanish. Documents of different norms have different normalisers: with cosine a token also
    counts through the length of its document.

    Attributes:
        query_tokens: [S_q], units of the score; positive entries favour document a.
        query_rest: What does not depend on the query's tokens.
        tokens_a: [S_a]; their sum is what document a's tokens bring.
        tokens_b: [S_b]; negative where a token of b brings b nearer to the query.
        documents_rest: What does not depend on the documents' tokens.
        total: score(q, a) − score(q, b), from the embeddings.
        residual: What quadrature and storage left over.
        names_query: The tokens of the query, as strings.
        names_a: Those of document a.
        names_b: Those of document b.
        completeness_error: Of the worst of the three texts.
        token_error: Of the worst of the three texts.
        converged: Whether all three met the tolerance.
    """

    query_tokens: Tensor
    query_rest: float
    tokens_a: Tensor
    tokens_b: Tensor
    documents_rest: float
    total: float
    residual: float
    names_query: tuple[str, ...]
    names_a: tuple[str, ...]
    names_b: tuple[str, ...]
    completeness_error: float
    token_error: float
    converged: bool


@dataclass(frozen=True, eq=False)
class DirectionContributions:
    """What the tokens of one text add toward M directions w of embedding space.

    ``total = w·ẽ(x) = reference + contributions.sum(1) + residual``, with contributions w·G[:, s].
    Directions are those of ẽ, before a trailing Normalize and after the shift, if there is one. For
    the unit embedding divide everything by the text's norm, as a score does.

    Attributes:
        text: The text.
        tokens: Its tokens, as strings.
        contributions: w·G[:, s], [M, S].
        reference: w·ẽ(r), [M].
        total: w·ẽ(x), [M], from the embedding.
        residual: What quadrature and storage left over, [M].
        norm: What the model divides by: |ẽ(x)|, or 1 for a plain dot product.
        completeness_error: Of the text.
        token_error: Of the text.
        converged: Whether the text met the tolerance.
    """

    text: str
    tokens: tuple[str, ...]
    contributions: Tensor
    reference: Tensor
    total: Tensor
    residual: Tensor
    norm: float
    completeness_error: float
    token_error: float
    converged: bool


def split_of(query: TokenVectors, document: TokenVectors) -> ScoreSplit:
    """Split score(q, d) as :class:`ScoreSplit` states."""
    n = query.norm * document.norm
    sum_q, sum_d = query.vectors.sum(1), document.vectors.sum(1)
    reference_q, reference_d = query.reference_embedding, document.reference_embedding
    query_tokens = query.vectors.T @ (reference_d + sum_d) / n
    query_rest = float(reference_q @ (reference_d + sum_d)) / n
    score = float(query.embedding @ document.embedding) / n
    return ScoreSplit(
        query_tokens=query_tokens,
        query_rest=query_rest,
        document_tokens=document.vectors.T @ (reference_q + sum_q) / n,
        document_rest=float((reference_q + sum_q) @ reference_d) / n,
        parts=ScoreParts(
            pairs=float(sum_q @ sum_d) / n,
            main_effects_query=float(sum_q @ reference_d) / n,
            main_effects_document=float(sum_d @ reference_q) / n,
            intercept=float(reference_q @ reference_d) / n,
        ),
        score=score,
        residual=score - float(query_tokens.sum()) - query_rest,
        names_query=query.tokens,
        names_document=document.tokens,
        completeness_error=max(query.completeness_error, document.completeness_error),
        token_error=max(query.token_error, document.token_error),
        converged=query.converged and document.converged,
    )


def margin_between(a: ScoreSplit, b: ScoreSplit) -> Margin:
    """Return why one query scores document a above document b: the difference of both splits."""
    return Margin(
        query_tokens=a.query_tokens - b.query_tokens,
        query_rest=a.query_rest - b.query_rest,
        tokens_a=a.document_tokens,
        tokens_b=-b.document_tokens,
        documents_rest=a.document_rest - b.document_rest,
        total=a.score - b.score,
        residual=a.residual - b.residual,
        names_query=a.names_query,
        names_a=a.names_document,
        names_b=b.names_document,
        completeness_error=max(a.completeness_error, b.completeness_error),
        token_error=max(a.token_error, b.token_error),
        converged=a.converged and b.converged,
    )


def margin_of(query: TokenVectors, a: TokenVectors, b: TokenVectors) -> Margin:
    """Split score(q, a) − score(q, b) as :class:`Margin` states."""
    return margin_between(split_of(query, a), split_of(query, b))


def directions_of(text: TokenVectors, w: Tensor) -> DirectionContributions:
    """Split w·ẽ(x) over the tokens of a text, for directions w [M, K] in float64."""
    contributions = w @ text.vectors
    reference, total = w @ text.reference_embedding, w @ text.embedding
    return DirectionContributions(
        text=text.text,
        tokens=text.tokens,
        contributions=contributions,
        reference=reference,
        total=total,
        residual=total - reference - contributions.sum(1),
        norm=text.norm,
        completeness_error=text.completeness_error,
        token_error=text.token_error,
        converged=text.converged,
    )


def check_directions(w: Tensor, embedding_dim: int) -> Tensor:
    """Return directions as [M, K] in float64.

    Raises:
        InputError: If they are of another shape, or not finite.
    """
    values = torch.as_tensor(w).detach().cpu().double()
    if values.ndim not in (1, 2) or values.shape[-1] != embedding_dim:
        raise InputError(
            f"Expected `w` to be directions of shape [{embedding_dim}] or [M, {embedding_dim}], "
            f"but got {list(values.shape)}."
        )
    if not torch.isfinite(values).all():
        raise InputError("Expected `w` to be finite, but it holds NaN or infinite entries.")
    return values[None] if values.ndim == 1 else values
