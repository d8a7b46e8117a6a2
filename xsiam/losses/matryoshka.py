"""Matryoshka: any objective at several numbers of leading dimensions at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from xsiam.errors import InputError
from xsiam.losses.base import AbstractObjective, EmbeddedBatch


class Matryoshka:
    """Make leading dimensions of an embedding embeddings of their own.

    Σ_d w_d L(e[:d]), where L is any objective and e the embedding as the user sees it: shifted, and
    normalised where the model says so. A shift commutes with the cut, and sentence-transformers
    cuts last, so that L(e[:d]) is the loss of the same model with ``truncate_dim=d``. A teacher is
    not cut: its scores are what all lengths are to reach.

    sentence-transformers' `MatryoshkaLoss` runs the model itself, which leaves no place for a
    gathered batch, and normalises what it has cut also where the score is a dot product.

    Args:
        dims: Numbers of leading dimensions, all different.
        weights: What their losses are multiplied by, as many, above 0; None is 1 for each.

    Raises:
        InputError: If an argument does not meet its constraint.

    References:
        Kusupati et al., "Matryoshka Representation Learning" (NeurIPS 2022), equation 1.
    """

    def __init__(self, dims: Sequence[int], weights: Sequence[float] | None = None) -> None:
        self.dims = tuple(dims)
        self.weights = (1.0,) * len(self.dims) if weights is None else tuple(weights)
        if not self.dims or min(self.dims) < 1 or len(set(self.dims)) < len(self.dims):
            raise InputError(
                "Expected `dims` to be different whole numbers of 1 or more, but got "
                f"{list(self.dims)}. Set `objective.dims`."
            )
        positive = all(0 < weight < math.inf for weight in self.weights)
        if len(self.weights) != len(self.dims) or not positive:
            raise InputError(
                f"Expected `dim_weights` to be {len(self.dims)} positive numbers, one for each of "
                f"`dims`, but got {list(self.weights)}. Set `objective.dim_weights`."
            )

    def check(self, embedding_dim: int) -> None:
        """Raise InputError where the dimensions are not those of an embedding and its beginnings.

        Without the whole embedding among them its last dimensions would not be trained.
        """
        if max(self.dims) != embedding_dim:
            what = "at most" if max(self.dims) > embedding_dim else "the whole embedding of"
            raise InputError(
                f"Expected `dims` to have {what} {embedding_dim} dimensions as its largest, but "
                f"got {list(self.dims)}. Set `objective.dims`, or `model.truncate_dim` to leave "
                "the last dimensions out of the model."
            )

    def loss(self, objective: AbstractObjective, batch: EmbeddedBatch) -> Tensor:
        """Return the weighted sum of an objective's losses of the cut embeddings, a scalar.

        Raises:
            InputError: If the batch lacks what the objective needs.
        """
        losses = [
            weight * objective(_cut(batch, dim))
            for dim, weight in zip(self.dims, self.weights, strict=True)
        ]
        return torch.stack(losses).sum()


def matryoshka_of(dims: Sequence[int] | None, weights: Sequence[float] | None) -> Matryoshka | None:
    """Return the `Matryoshka` of optional settings, None where there are none.

    Raises:
        InputError: If there are weights without dimensions, or a setting breaks its constraint.
    """
    if dims is None and weights is not None:
        raise InputError(
            f"Expected `dims` for `dim_weights`, but got {list(weights)} without any. Set "
            "`objective.dims`, or leave `objective.dim_weights` out."
        )
    return None if dims is None else Matryoshka(dims, weights)


def _cut(batch: EmbeddedBatch, dim: int) -> EmbeddedBatch:
    """Return a batch with the leading dimensions of its embeddings."""
    negatives = tuple(vectors[:, :dim] for vectors in batch.negatives)
    return replace(batch, a=batch.a[:, :dim], b=batch.b[:, :dim], negatives=negatives)
