"""Tails with closed-form integrated Jacobians, and a slow twin that follows the definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tail = Callable[[Tensor], Tensor]


def separable(seed: int = 0, length: int = 5, width: int = 4, size: int = 3) -> tuple[Tail, Tail]:
    """Return f(x) = Σ_s M_s tanh(x_s) and its exact token vectors M_s (tanh(x_s) − tanh(r_s)).

    The second function maps a stack [2, S, D] of text and reference to [K, S].
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(length, size, width, generator=generator, dtype=torch.float64)

    def tail(hidden: Tensor) -> Tensor:
        return torch.einsum("skd,nsd->nk", mixing, torch.tanh(hidden))

    def exact(pair: Tensor) -> Tensor:
        text, reference = pair
        return torch.einsum("skd,sd->ks", mixing, torch.tanh(text) - torch.tanh(reference))

    return tail, exact


def quadratic(seed: int = 0, length: int = 5, width: int = 4, size: int = 3) -> tuple[Tail, Tail]:
    """Return f_k(x) = xᵀ Q_k x / 2, which mixes tokens, and its exact token vectors.

    ∫ ∂f/∂x_s dα · δ_s = δ_s · Σ_t Q_{st} (x_t + r_t) / 2 for symmetric Q.
    """
    generator = torch.Generator().manual_seed(seed)
    n = length * width
    form = torch.randn(size, n, n, generator=generator, dtype=torch.float64)
    form = (form + form.transpose(1, 2)) / 2

    def tail(hidden: Tensor) -> Tensor:
        flat = hidden.flatten(1)
        return torch.einsum("ni,kij,nj->nk", flat, form, flat) / 2

    def exact(pair: Tensor) -> Tensor:
        text, reference = pair
        mean = (text + reference).flatten() / 2
        share = torch.einsum("kij,j->ki", form, mean) * (text - reference).flatten()
        return share.unflatten(1, (length, width)).sum(2)

    return tail, exact


PROBLEMS = {"separable": separable, "quadratic": quadratic}


def slow_token_vectors(
    tail: Tail, text: Tensor, reference: Tensor, nodes: Tensor, weights: Tensor
) -> Tensor:
    """Integrate the full Jacobian by reverse mode, row by row, as the definition reads: [K, S]."""
    delta = text - reference
    total = None
    for node, weight in zip(nodes.to(text.dtype), weights.to(text.dtype), strict=True):
        point = (reference + node * delta)[None]
        jacobian = torch.autograd.functional.jacobian(tail, point)[0, :, 0]  # [K, S, D]
        part = weight * (jacobian * delta).sum(-1)
        total = part if total is None else total + part
    assert total is not None
    return total
