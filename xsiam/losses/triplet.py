"""The triplet objective: negatives stay further away than the positive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xsiam.errors import InputError
from xsiam.losses.base import AbstractObjective, EmbeddedBatch, check_positive, register_objective


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 − cos of the rows of two [n, K] tensors, [n] in [0, 2]."""
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)


def euclidean_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return |a − b| of the rows of two [n, K] tensors, [n]; its gradient at 0 is 0, not NaN."""
    distance: Tensor = torch.linalg.vector_norm(a - b, dim=-1)
    return distance


DISTANCES = {"cosine": cosine_distance, "euclidean": euclidean_distance}
"""Distances between embeddings by name."""


@register_objective
@dataclass(frozen=True)
class Triplet(AbstractObjective):
    """Keep each negative at least a margin further from the anchor than the positive is.

    mean(max(0, d(a, b) − d(a, negative) + margin)) over the pairs and their negatives.

    Args:
        similarity: See `AbstractObjective`; not used.
        margin: How much further away, in units of the distance, above 0. The cosine distance is
            2 at most; lengths of unnormalised embeddings are the model's own.
        distance: "cosine" (1 − cosine similarity) or "euclidean".

    References:
        Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering" (CVPR
        2015), equation 2, there with squared distances.
    """

    name = "triplet"
    needs_label = False
    negatives = "required"

    margin: float = 0.5
    distance: str = "cosine"

    def __post_init__(self) -> None:
        check_positive("margin", self.margin)
        if self.distance not in DISTANCES:
            raise InputError(
                f"Expected a distance out of {', '.join(DISTANCES)}, but got {self.distance!r}. "
                "Set `objective.distance`."
            )

    def loss(self, batch: EmbeddedBatch) -> Tensor:
        """Return the mean over pairs and columns of negatives."""
        losses = [
            torch.nn.functional.triplet_margin_with_distance_loss(
                batch.a,
                batch.b,
                negative,
                distance_function=DISTANCES[self.distance],
                margin=self.margin,
            )
            for negative in batch.negatives
        ]
        return torch.stack(losses).mean()
