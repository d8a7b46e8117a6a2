"""The contrastive objective: an anchor's positive against all other texts of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xsiam.losses.base import AbstractObjective, EmbeddedBatch, check_positive, register_objective
from xsiam.losses.repeats import repeats_of_anchors, repeats_of_positives


@register_objective
@dataclass(frozen=True)
class Contrastive(AbstractObjective):
    """Tell the positive of an anchor from the other pairs' positives and all hard negatives.

    Also known as InfoNCE, or as multiple negatives ranking. With the encoder's own score s, cosine
    or dot product, the loss of pair i is

    −log(exp(s(a_i, b_i) / T) / Σ_c exp(s(a_i, c) / T)),

    where c runs over the positives and the negatives of all pairs of the batch. Over several
    processes the batch is that of all of them. Candidates that are known to be positive, by their
    text, are left out of the sum (`xsiam.losses.repeats`) and counted: ``masked_negatives`` is
    the number of terms that are left out. Batches without `text_ids` are taken as they are.

    Args:
        similarity: See `AbstractObjective`.
        temperature: T, above 0. The default is for the cosine; for dot products of long vectors
            take one near 1.
        symmetric: Whether to average this with the loss of telling the anchor of a positive from
            the other anchors. Hard negatives have no part in that.

    References:
        van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018),
        equation 4; Henderson et al., "Efficient Natural Language Response Suggestion for Smart
        Reply" (2017), section 4.4; for the symmetric loss Radford et al., "Learning Transferable
        Visual Models From Natural Language Supervision" (ICML 2021), figure 3.
    """

    name = "contrastive"
    needs_label = False
    negatives = "optional"
    in_batch = True

    temperature: float = 0.05
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def loss(self, batch: EmbeddedBatch) -> Tensor:
        """Return the mean over this process's pairs, weighted by its share of all pairs."""
        rows = batch.rows
        candidates = torch.cat([batch.b, *batch.negatives])
        repeats = repeats_of_anchors(batch.text_ids, rows)
        losses = self._losses(batch.a[rows], candidates, rows, repeats)
        if self.symmetric:
            repeats = repeats_of_positives(batch.text_ids, rows)
            losses = (losses + self._losses(batch.b[rows], batch.a, rows, repeats)) / 2
        return losses.sum() * (batch.n_processes / len(batch.a))

    def figures(self, batch: EmbeddedBatch) -> dict[str, Tensor]:
        """Return the number of terms left out of the sums of this process's pairs."""
        found = [repeats_of_anchors(batch.text_ids, batch.rows)]
        if self.symmetric:
            found.append(repeats_of_positives(batch.text_ids, batch.rows))
        masked = batch.a.new_zeros(())
        for repeats in found:
            if repeats is not None:
                masked = masked + repeats.sum()
        return {"masked_negatives": masked}

    def _losses(
        self, own: Tensor, candidates: Tensor, rows: slice, repeats: Tensor | None
    ) -> Tensor:
        """Return the loss of each text, [n]; the right candidates are those numbered ``rows``."""
        if self.similarity == "cos":
            own, candidates = (
                torch.nn.functional.normalize(vectors, dim=-1) for vectors in (own, candidates)
            )
        logits = own @ candidates.T / self.temperature
        if repeats is not None:
            logits = logits.masked_fill(repeats, -torch.inf)
        targets = torch.arange(rows.start, rows.stop, device=logits.device)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
