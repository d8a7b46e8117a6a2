"""Comparing matrices of token pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from xsiam.metrics import spearman
from xsiam.result import PairAttribution, own_places

__all__ = ["centred", "correlation", "own_entries"]


def own_entries(result: PairAttribution) -> Tensor:
    """Return the matrix without special and prompt tokens, [n_a, n_b] float64."""
    rows, columns = own_places(result)
    return result.matrix[rows][:, columns].double()


def centred(matrix: Tensor) -> Tensor:
    """Remove means of rows and columns: what is left has no main effects."""
    if min(matrix.shape) == 1:
        return torch.zeros_like(matrix)  # exactly: there is nothing but rounding to correlate
    return matrix - matrix.mean(0, keepdim=True) - matrix.mean(1, keepdim=True) + matrix.mean()


def correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's correlation of two matrices, nan where it is undefined.

    It is with fewer than three entries, or where all of a matrix are equal: a matrix of one row
    that is double-centred, say.
    """
    if one.numel() < 3 or any(bool(torch.all(m == m.flatten()[0])) for m in (one, other)):
        return float("nan")
    return float(spearman(one.flatten(), other.flatten()))
