"""The distillation objective: the scores of a teacher, kept without any label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xsiam.losses.base import AbstractObjective, EmbeddedBatch, register_objective


@register_objective
@dataclass(frozen=True)
class Distillation(AbstractObjective):
    """Keep the scores of a teacher, such as the unmodified model that training starts from.

    With the encoder's own score s, cosine or dot product, and the teacher's score t by the same
    similarity, the loss is

    ½ mean((s(x, y) − t(x, y))²) + ½ mean((s(a_i, b_i) − t(a_i, b_i))²)

    with the first mean over all pairs of two texts x ≠ y (in place, not in words) of the batch, on
    whichever side they stand, and the second over its own pairs. All texts against each other use
    every embedding n times; the pairs, which are few among them, are what is scored in use. Over
    several processes the batch is that of all of them.

    Only scores are compared, so that teacher and model may differ in the dimension of embeddings.

    Args:
        similarity: See `AbstractObjective`.
        teacher: Folder, checkpoint or hub name of the teacher; None is the model that training
            starts from, as it is. What makes the batches has to look after that: see
            `xsiam.teacher`.

    References:
        After Tung and Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019), who compare
        the similarities of all inputs of a batch, with normalised rows; comparing the scores
        themselves, and the second mean, are ours.
    """

    name = "distillation"
    needs_label = False
    label_range = (-math.inf, math.inf)  # of validation and test pairs
    needs_teacher = True
    in_batch = True

    teacher: str | None = None

    def loss(self, batch: EmbeddedBatch) -> Tensor:
        """Return the loss of this process's texts against all, weighted by its share of them."""
        assert batch.teacher is not None
        ours, theirs = torch.stack([batch.a, batch.b], dim=1), batch.teacher.to(batch.a)
        if self.similarity == "cos":
            ours = torch.nn.functional.normalize(ours, dim=-1)
        rows, n = batch.rows, len(batch.a)
        every = (_scores(ours, rows) - _scores(theirs, rows)).square()
        itself = every.diagonal(offset=2 * rows.start)
        pairs = _own_scores(ours[rows]) - _own_scores(theirs[rows])
        means = (every.sum() - itself.sum()) / (2 * n * (2 * n - 1)) + pairs.square().sum() / n
        return batch.n_processes * means / 2

    def problem_with(self, batch: EmbeddedBatch) -> str | None:
        """Return why a batch has no loss, or None where it has one; a single pair will do."""
        if batch.teacher is None:
            return (
                f"Expected a teacher's embeddings for objective {self.name!r}, but the batch has "
                "none. Give `PairDataModule` a `teacher`."
            )
        return None


def _scores(vectors: Tensor, rows: slice) -> Tensor:
    """Return the products of the texts of some pairs, m, with all: [2 m, 2 n] from [n, 2, K]."""
    return vectors[rows].flatten(0, 1) @ vectors.flatten(0, 1).T


def _own_scores(vectors: Tensor) -> Tensor:
    """Return the products of both texts of each pair, [n] from [n, 2, K]."""
    return (vectors[:, 0] * vectors[:, 1]).sum(dim=-1)
