"""Objectives that bring scores towards labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.util import pairwise_cos_sim, pairwise_dot_score
from torch import Tensor

from xsiam.losses.base import AbstractObjective, EmbeddedBatch, check_positive, register_objective


@register_objective
class MSECosine(AbstractObjective):
    """Mean squared error between cosine similarity and label, the published objective.

    References:
        The training recipe of the reference code of Moeller et al. (EMNLP 2023), where a label is
        the STS score divided by 5.
    """

    name = "mse_cosine"

    def loss(self, batch: EmbeddedBatch) -> Tensor:
        """Return mean((cos(a, b) − label)²)."""
        scores = torch.nn.functional.cosine_similarity(batch.a, batch.b, dim=-1)
        return torch.nn.functional.mse_loss(scores, _labels(batch))


@register_objective
class MSEDot(AbstractObjective):
    """Mean squared error between dot product and label; any finite label will do."""

    name = "mse_dot"
    label_range = (-math.inf, math.inf)

    def loss(self, batch: EmbeddedBatch) -> Tensor:
        """Return mean((a·b − label)²)."""
        return torch.nn.functional.mse_loss((batch.a * batch.b).sum(dim=-1), _labels(batch))


@register_objective
@dataclass(frozen=True)
class CoSENT(AbstractObjective):
    """Order the scores of a batch as the labels are ordered; only the order of labels counts.

    log(1 + Σ exp(scale (s_j − s_i))) over all i, j with label_i > label_j, where s is the encoder's
    own score, cosine or dot product. Over several processes the batch is that of all of them. The
    loss is sentence-transformers' `CoSENTLoss`.

    Args:
        similarity: See `AbstractObjective`.
        scale: Inverse temperature of differences of scores, above 0. The default is for the cosine;
            for dot products of long vectors take one near 1.

    References:
        Huang et al., "CoSENT: Consistent Sentence Embedding via Similarity Ranking" (IEEE/ACM TASLP
        2024).
    """

    name = "cosent"
    label_range = (-math.inf, math.inf)
    in_batch = True

    scale: float = 20.0

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)

    def loss(self, batch: EmbeddedBatch) -> Tensor:
        """Return the loss of all rows, those of other processes included."""
        score = pairwise_cos_sim if self.similarity == "cos" else pairwise_dot_score
        no_model: Any = None  # used by its forward only
        theirs = CoSENTLoss(no_model, scale=self.scale, similarity_fct=score)
        loss: Tensor = theirs.compute_loss_from_embeddings([batch.a, batch.b], _labels(batch))
        return loss


def _labels(batch: EmbeddedBatch) -> Tensor:
    """Return the labels in the precision of the embeddings."""
    assert batch.labels is not None
    return batch.labels.to(batch.a.dtype)
