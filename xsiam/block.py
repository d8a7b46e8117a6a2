"""One block of a post-norm encoder: its parts, and projections and layouts of what runs through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xsiam.linear import linear


@dataclass(frozen=True)
class PostNormBlock:
    """The parts of one block.

    Attributes:
        query: Projection to queries; likewise ``key``, ``value`` and, back again, ``out``.
        norm_1: The norm behind the attention.
        up: Projection to the inner width; ``down`` back again.
        activation: Between ``up`` and ``down``, elementwise.
        norm_2: The norm that ends the block.
        n_heads: Attention heads H.
        bias: Added to the attention logits, [H, S, S], or None.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    norm_1: nn.LayerNorm
    up: nn.Linear
    activation: Callable[[Tensor], Tensor]
    down: nn.Linear
    norm_2: nn.LayerNorm
    n_heads: int
    bias: Tensor | None = None

    @property
    def scale(self) -> float:
        """What attention logits are multiplied by."""
        return float((self.query.out_features // self.n_heads) ** -0.5)


def unflatten(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """Split a dimension in several."""
    split: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return split


def project(projection: nn.Linear, x: Tensor) -> Tensor:
    """Apply a projection."""
    return linear(x, projection.weight, projection.bias)


def push_through(projection: nn.Linear, tangents: Tensor, *, stays_rounded: bool = False) -> Tensor:
    """Project tangents: the bias has no derivative."""
    return linear(tangents, projection.weight, stays_rounded=stays_rounded)


def pull_through(
    projection: nn.Linear, cotangents: Tensor, *, stays_rounded: bool = False
) -> Tensor:
    """Pull cotangents back through a projection: [..., out] to [..., in]."""
    return linear(cotangents, projection.weight, transposed=True, stays_rounded=stays_rounded)


def batched_linear(x: Tensor, weights: Tensor) -> Tensor:
    """Return x_n W_nᵀ, [n, m, in] and [n, out, in] to [n, m, out]: one by one on processors."""
    if x.is_cpu:
        return torch.stack([linear(one, weight) for one, weight in zip(x, weights, strict=True)])
    return torch.bmm(x, weights.mT)


def by_head(x: Tensor, n_heads: int) -> Tensor:
    """[n, S, D] to [n, H, S, d]."""
    return unflatten(x, 2, (n_heads, -1)).transpose(1, 2).contiguous()


def merged(heads: Tensor) -> Tensor:
    """[n, H, S, d] to [n, S, D]."""
    return heads.transpose(1, 2).flatten(2)


def by_position(heads: Tensor) -> Tensor:
    """[n, H, S, d] to [n, S, H, d]."""
    return heads.transpose(1, 2)


def rows_first(tangents: Tensor, n_heads: int) -> Tensor:
    """[n, S, T, D] to [n·H, S·T, d]."""
    heads = unflatten(tangents, 3, (n_heads, -1)).permute(0, 3, 1, 2, 4)
    return heads.flatten(2, 3).flatten(0, 1)


def positions_first(heads: Tensor, n_heads: int, n_tangents: int) -> Tensor:
    """[n·H, S·T, d] to [n, S, T, D], contiguous."""
    heads = unflatten(unflatten(heads, 0, (-1, n_heads)), 2, (-1, n_tangents))
    return heads.permute(0, 2, 3, 1, 4).flatten(3)
