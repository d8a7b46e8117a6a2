"""Derivatives of an encoder's tail, forward and reverse, by differentiating its own forward.

This is the general path: it serves every model whose forward PyTorch can differentiate, and it is
the slow twin of :mod:`xsiam.postnorm`. The primal is computed once per node and only what comes
after the layer carries the tangent dimension, since ``vmap`` runs over tangents with the primal
unbatched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Tail = Callable[[Tensor], Tensor]  # hidden states [n, S, D] -> embeddings [n, K]


class Linearisation(Protocol):
    """An encoder's tail, linearised at n points [n, S, D]."""

    @property
    def embedding(self) -> Tensor:
        """The embeddings at the points, [n, K]."""

    def total(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings and their derivatives along ``directions`` [n, S, D], each [n, K]."""

    def push_tokens(self, directions: Tensor, tokens: Tensor) -> Tensor:
        """Push the direction of one token [T] at a time: [n, T, K]."""

    def pull_tokens(self, cotangents: Tensor, directions: Tensor) -> Tensor:
        """Pull cotangents [n, C, K] back to tokens along ``directions``: [n, C, S]."""

    def pull(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents [n, C, K] back to hidden states: [n, C, S, D]."""


@dataclass(frozen=True)
class AutodiffLinearisation:
    """The general linearisation: every call differentiates the tail's own forward.

    Attributes:
        tail: Maps hidden states [n, S, D] to embeddings [n, K], row by row.
        points: Where to differentiate, [n, S, D].
    """

    tail: Tail
    points: Tensor

    @property
    def embedding(self) -> Tensor:
        """The embeddings at the points, [n, K]."""
        return self.tail(self.points)

    def total(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings and their derivatives along ``directions`` [n, S, D], each [n, K]."""
        return total_derivative(self.tail, self.points, directions)

    def push_tokens(self, directions: Tensor, tokens: Tensor) -> Tensor:
        """Push the direction of one token [T] at a time: [n, T, K]."""
        return token_derivatives(self.tail, self.points, directions, tokens).transpose(0, 1)

    def pull_tokens(self, cotangents: Tensor, directions: Tensor) -> Tensor:
        """Pull cotangents [n, C, K] back to tokens along ``directions``: [n, C, S]."""
        return (self.pull(cotangents) * directions[:, None]).sum(-1)

    def pull(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents [n, C, K] back to hidden states: [n, C, S, D]."""
        return pulled_back(self.tail, self.points, cotangents)


def token_derivatives(tail: Tail, points: Tensor, directions: Tensor, tokens: Tensor) -> Tensor:
    """Push the direction of one token at a time through the tail.

    Args:
        tail: Maps hidden states [n, S, D] to embeddings [n, K], row by row.
        points: Where to differentiate, [n, S, D].
        directions: δ of each row, [n, S, D].
        tokens: The token positions to differentiate, [T].

    Returns:
        [T, n, K]: Σ_d ∂ẽ_k/∂x_{s,d} δ_{s,d} for each token s in ``tokens``.
    """
    length = points.shape[1]
    one_hot = torch.nn.functional.one_hot(tokens, length).to(points.dtype)

    def along_token(mask: Tensor) -> Tensor:
        return _derivative(tail, points, directions * mask[:, None])

    return vmap(along_token)(one_hot)


def feature_derivatives(tail: Tail, points: Tensor, directions: Tensor, token: int) -> Tensor:
    """Push every feature of one token through the tail: [D, n, K] for points [n, S, D]."""
    n_features = points.shape[2]

    def along_feature(mask: Tensor) -> Tensor:
        tangent = torch.zeros_like(points)
        tangent = torch.cat(
            [tangent[:, :token], (directions[:, token] * mask)[:, None], tangent[:, token + 1 :]], 1
        )
        return _derivative(tail, points, tangent)

    basis = torch.eye(n_features, dtype=points.dtype, device=points.device)
    return vmap(along_feature)(basis)


def total_derivative(tail: Tail, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return embeddings and their derivatives along ``directions``, each [n, K]."""
    result = jvp(tail, (points,), (directions,))
    return result[0], result[1]


def pulled_back(tail: Tail, points: Tensor, cotangents: Tensor) -> Tensor:
    """Pull rows of embeddings back through the tail: reverse mode.

    Args:
        tail: Maps hidden states [n, S, D] to embeddings [n, K], row by row.
        points: Where to differentiate, [n, S, D].
        cotangents: C of them for each point, [n, C, K].

    Returns:
        [n, C, S, D]: Σ_k cotangent_k ∂ẽ_k/∂x_{s,d}.
    """
    back = vjp(tail, points)[1]
    pulled: Tensor = vmap(lambda cotangent: back(cotangent)[0], in_dims=1, out_dims=1)(cotangents)
    return pulled


@contextmanager
def exact_numerics(device: torch.device) -> Iterator[None]:
    """Full matmul precision, no autocast, no lasting graph, and attention that has forward AD.

    The fused attention kernels implement no forward derivative, so the plain one is forced.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.inference_mode(False),  # reverse mode needs it; Lightning evaluates inside one
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _derivative(tail: Tail, points: Tensor, tangent: Tensor) -> Tensor:
    derivative: Tensor = jvp(tail, (points,), (tangent,))[1]
    return derivative
