"""Join the token vectors of two texts into the attribution of their score."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from xsiam.reading import TokenVectors
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


def combine(a: TokenVectors, b: TokenVectors, settings: Settings) -> PairAttribution:
    """Join two texts' token vectors by the identity that :class:`PairAttribution` states.

    Every term is computed from its definition; the residual is what quadrature left over.
    """
    normaliser = a.norm * b.norm
    matrix = a.vectors.T @ b.vectors / normaliser
    main_a = a.vectors.T @ b.reference_embedding / normaliser
    main_b = b.vectors.T @ a.reference_embedding / normaliser
    intercept = float(a.reference_embedding @ b.reference_embedding) / normaliser
    score = float(a.embedding @ b.embedding) / normaliser
    attributed = float(a.delta @ b.delta) / normaliser
    explained = float(matrix.sum() + main_a.sum() + main_b.sum()) + intercept
    dtype = getattr(torch, settings.dtype)
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
        token_error=max(a.token_error, b.token_error),
        converged=a.converged and b.converged,
        n_nodes=max(a.n_nodes, b.n_nodes),
        **asdict(settings),
        **per_text,
    )
