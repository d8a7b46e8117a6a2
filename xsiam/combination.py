"""Join the token vectors of two texts into the attribution of their score."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from xsiam.reading import AttributedText, TokenVectors
from xsiam.result import PairAttribution

_PER_TEXT = (
    *("completeness_error", "token_error", "converged", "n_nodes"),
    *("tokens", "offsets", "special_mask", "prompt_mask", "text"),
)


@dataclass(frozen=True)
class Settings:
    """What the attributions of one attributor have in common.

    Attributes:
        layer: Where the paths live.
        reference: The registered name of the reference.
        quadrature: The rule.
        tolerance: What the errors were asked to meet.
        similarity: "cos" or "dot".
        shift: Whether the encoder subtracts e(r).
        dtype: What the model computed in, such as "float32".
        model_fingerprint: 16 hex digits that name the weights.
    """

    layer: int
    reference: str
    quadrature: str
    tolerance: float
    similarity: str
    shift: bool
    dtype: str
    model_fingerprint: str


@dataclass(frozen=True)
class Products:
    """The inner products of which an attribution is made, before the normaliser.

    Attributes:
        pairs: G_aᵀ G_b, [S_a, S_b] float64.
        main_a: G_aᵀ ẽ(r_b), [S_a].
        main_b: G_bᵀ ẽ(r_a), [S_b].
    """

    pairs: Tensor
    main_a: Tensor
    main_b: Tensor


def products(a: TokenVectors, b: TokenVectors) -> Products:
    """Multiply the token vectors of two texts."""
    return Products(
        pairs=a.vectors.T @ b.vectors,
        main_a=a.vectors.T @ b.reference_embedding,
        main_b=b.vectors.T @ a.reference_embedding,
    )


def combine(
    a: AttributedText, b: AttributedText, settings: Settings, known: Products | None = None
) -> PairAttribution:
    """Join two texts by the identity that :class:`PairAttribution` states.

    Every term is computed from its definition; the residual is what quadrature left over.

    Args:
        a: The first text; with token vectors unless ``known`` is given.
        b: The second text, likewise.
        settings: What the attribution was asked for.
        known: The inner products, where they are known already.
    """
    if known is None:
        assert isinstance(a, TokenVectors)
        assert isinstance(b, TokenVectors)
        known = products(a, b)
    normaliser = a.norm * b.norm
    matrix, main_a, main_b = (
        known.pairs / normaliser,
        known.main_a / normaliser,
        known.main_b / normaliser,
    )
    intercept = float(a.reference_embedding @ b.reference_embedding) / normaliser
    score = float(a.embedding @ b.embedding) / normaliser
    attributed = float(a.delta @ b.delta) / normaliser
    explained = float(matrix.sum() + main_a.sum() + main_b.sum()) + intercept
    dtype = torch.promote_types(getattr(torch, settings.dtype), torch.float32)
    sides = {"_a": a, "_b": b}
    per_text = {
        f"{name}{suffix}": getattr(text, name)
        for suffix, text in sides.items()
        for name in _PER_TEXT
    }
    return PairAttribution(
        matrix=matrix.to(dtype),
        main_effects_a=main_a.to(dtype),
        main_effects_b=main_b.to(dtype),
        intercept=intercept,
        residual=score - explained,
        score=score,
        attributed_score=attributed,
        convergence_delta=float(matrix.sum()) - attributed,
        completeness_error=max(a.completeness_error, b.completeness_error),
        token_error=float(np.maximum(a.token_error, b.token_error)),  # nan where either is
        converged=a.converged and b.converged,
        n_nodes=max(a.n_nodes, b.n_nodes),
        **asdict(settings),
        **per_text,
    )
