"""The LightningModule: an encoder with an objective, an optimiser and its metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

from xsiam.bend import BendTerm
from xsiam.checkpoint import check_format
from xsiam.depth import check_depths, freeze_lower_layers, parameter_depths, parameter_groups
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, InputError
from xsiam.gathering import gather_batch, is_distributed
from xsiam.losses import EmbeddedBatch, get_objective, matryoshka_of
from xsiam.metrics import Anisotropy, PairCorrelation, PairMean
from xsiam.references import VectorReference
from xsiam.retrieval import RETRIEVAL_FIGURES, PairRetrieval
from xsiam.sharding import ShardedStrategy, gathered, shard, whole

__all__ = ["SCHEDULES", "SiameseModule"]

Batch = dict[str, Any]

SCHEDULES = ("linear", "constant")
"""Learning rate schedules after the warm-up: falling to 0 at the last step, or staying."""

_STAGES = ("val", "test")
_SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda a, b: torch.nn.functional.cosine_similarity(a, b, dim=-1),
    "dot": lambda a, b: (a * b).sum(dim=-1),
}


class SiameseModule(LightningModule):
    """Train a Siamese encoder on batches of `xsiam.data.PairDataModule`.

    Logs ``train/loss`` and ``train/gradient_norm`` each step and, for validation, ``val/loss``,
    ``val/spearman_cosine``, ``val/pearson_cosine``, ``val/spearman_dot``, ``val/pearson_dot`` and
    ``val/anisotropy`` (`xsiam.metrics.Anisotropy`); for the test the same under ``test/``.
    Validation and test values are those of all pairs on all processes, each counted once. Pairs
    without labels have no correlation; where batches hold "text_ids", their anchors rank the
    positives of all pairs instead: ``val/mrr@10``, ``val/ndcg@10``, ``val/recall@1`` and
    ``val/recall@10`` (`xsiam.retrieval`). Pairs that lack what the objective needs have no loss.

    An objective that compares the pairs of a batch compares those of all processes in training, and
    logs ``train/masked_negatives`` (`xsiam.losses.Contrastive`). In validation it compares those of
    one batch on one process, so that its loss depends on the size of these batches.

    Where batches hold the embeddings of a teacher (``distillation``), ``val/pearson_teacher`` is
    the correlation of the model's own scores with the teacher's, for pairs with labels too.

    Defaults are the published recipe: AdamW, no decay on biases and LayerNorm, linear warm-up over
    the first tenth of the steps, then linear decay to 0.

    Args:
        encoder: The model to train.
        objective: Registered name of the objective, see `xsiam.losses`.
        learning_rate: Highest learning rate.
        weight_decay: Decay of weight matrices; vectors (biases, LayerNorm) have none.
        warmup_fraction: Share of the steps over which the learning rate rises from 0.
        schedule: "linear" or "constant", see `SCHEDULES`.
        objective_options: Options of the objective, such as ``{"temperature": 0.05}``.
        chunk_size: Most texts to embed at once in training; None embeds whole batches. The
            gradients are the same, see `xsiam.chunks`.
        gradient_norm: Whether to log ``train/gradient_norm``, the length of the gradient of all
            weights before it is clipped; without the scale that float16 training multiplies by,
            and of the averaged gradient on several processes.
        anisotropy: Whether to log ``val/anisotropy`` and ``test/anisotropy``.
        layer_decay: Learning rate of a block relative to that of the block above it, above 0 and at
            most 1, see `xsiam.depth.parameter_groups`; None trains all at one rate.
        freeze_layers: Blocks that are frozen, with the embeddings, counted from the bottom; 0
            freezes nothing. They are frozen when training begins.
        activation_checkpointing: Whether training keeps only what enters each block for the
            backward pass, and computes the blocks again there: less memory, the same gradients.
        dims: Numbers of leading dimensions whose losses are added up, see
            `xsiam.losses.Matryoshka`; None has the loss of the whole embedding only. All metrics
            but the loss are those of the whole embedding.
        dim_weights: What the loss of each of `dims` is multiplied by; None is 1.
        train_reference: Whether the vector of the reference is trained along, as one of the
            embeddings, see `SiameseEncoder.train_reference`.
        bend_weight: What the bend of attribution paths is multiplied by and added to the loss in
            training, see `xsiam.bend`; 0 leaves it out. With it ``train/bend`` is logged too, and
            ``train/loss`` stays that of the objective.
        bend_layer: Layer of these paths; None draws one for every step.
        bend_texts: Most texts of a batch whose paths are looked at.

    Attributes:
        undefined: Keys that the last validation or test could not log, and why.

    Raises:
        InputError: If an argument does not meet its constraint.

    References:
        Moeller et al. (EMNLP 2023), training recipe of the reference code.
    """

    def __init__(
        self,
        encoder: SiameseEncoder,
        objective: str = "mse_cosine",
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.1,
        schedule: str = "linear",
        objective_options: Mapping[str, Any] | None = None,
        chunk_size: int | None = None,
        gradient_norm: bool = True,
        anisotropy: bool = True,
        layer_decay: float | None = None,
        freeze_layers: int = 0,
        activation_checkpointing: bool = False,
        dims: Sequence[int] | None = None,
        dim_weights: Sequence[float] | None = None,
        train_reference: bool = False,
        bend_weight: float = 0.0,
        bend_layer: int | None = None,
        bend_texts: int = 8,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["encoder"])
        self.encoder = encoder
        self.objective = get_objective(objective, encoder.similarity, **(objective_options or {}))
        self.matryoshka = matryoshka_of(dims, dim_weights)
        if self.matryoshka is not None:
            self.matryoshka.check(encoder.embedding_dim)
        if chunk_size is not None and chunk_size < 1:
            raise InputError(
                f"Expected `chunk_size` to be 1 or more, but got {chunk_size}. "
                "Set `objective.chunk_size`."
            )
        self.chunk_size = chunk_size
        self.learning_rate = _check(learning_rate, "learning_rate", "above 0", learning_rate > 0)
        self.weight_decay = _check(weight_decay, "weight_decay", "0 or more", weight_decay >= 0)
        self.warmup_fraction = _check(
            warmup_fraction, "warmup_fraction", "between 0 and 1", 0 <= warmup_fraction <= 1
        )
        if schedule not in SCHEDULES:
            raise InputError(
                f"Expected a schedule out of {', '.join(SCHEDULES)}, but got {schedule!r}. "
                "Set `optimizer.schedule`."
            )
        self.schedule = schedule
        if train_reference:
            encoder.train_reference()
        check_depths(encoder, freeze_layers, layer_decay)
        self.layer_decay, self.freeze_layers = layer_decay, freeze_layers
        self.bend = BendTerm(bend_weight, bend_layer, bend_texts) if bend_weight else None
        if self.bend is not None:
            self.bend.check(encoder)
        self.gradient_norm, self.anisotropy = gradient_norm, anisotropy
        self.activation_checkpointing = activation_checkpointing
        self._depths: dict[str, int] | None = None
        self._gradient_length: Tensor | None = None
        self.undefined: dict[str, str] = {}
        self.anisotropies = nn.ModuleDict(
            {stage: Anisotropy(encoder.embedding_dim) for stage in _STAGES}
        )
        self.mean_losses = nn.ModuleDict({stage: PairMean() for stage in _STAGES})
        self.retrievals = nn.ModuleDict(
            {stage: PairRetrieval(encoder.similarity) for stage in _STAGES}
        )
        self.correlations = nn.ModuleDict(
            {f"{stage}_{name}": PairCorrelation() for stage in _STAGES for name in _SIMILARITIES}
        )
        self.likenesses = nn.ModuleDict(
            {stage: PairCorrelation("scores of the teacher") for stage in _STAGES}
        )

    def setup(self, stage: str) -> None:
        """Freeze lower layers and what embeddings do not depend on, and turn dropout on.

        Distributed training would wait for the gradients of what embeddings do not depend on. A
        vector that was fitted is that of the first process: fits differ by rounding, and by far
        where they end in other minima.
        """
        reference = self.encoder.reference
        if isinstance(reference, VectorReference) and self.trainer.world_size > 1:
            reference.c = self.trainer.strategy.broadcast(reference.c)
        if stage == "fit":
            freeze_lower_layers(self.encoder, self.freeze_layers)
            self.encoder.freeze_unused_parameters()
            if self.layer_decay is not None:  # found out before weights may be shared out
                self._depths = parameter_depths(self.encoder)
            # Loaded models are in eval mode, and Lightning trains in the mode that it finds.
            self.train()

    def configure_model(self) -> None:
        """Share the weights out over the processes where the strategy is to do so."""
        if isinstance(self.trainer.strategy, ShardedStrategy):
            shard(self.encoder, self.trainer.strategy.device_mesh["data_parallel"])

    def forward(self, features: Batch) -> Tensor:
        """Embed a batch of features: [n, K]."""
        embeddings: Tensor = self.encoder(features)
        return embeddings

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch and log it, and what else the objective counts."""
        size = len(batch["index"])
        embedded = self._embed(batch, self.chunk_size)
        if self.objective.in_batch and is_distributed():
            embedded = gather_batch(embedded)
        loss = self._loss(embedded)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        for name, count in self.objective.figures(embedded).items():
            self.log(f"train/{name}", count, reduce_fx="sum", sync_dist=True, batch_size=size)
        if self.bend is not None:
            bend = self.bend(self.encoder, [batch["a"], batch["b"]])
            self.log("train/bend", bend, batch_size=size)
            loss = loss + self.bend.weight * bend
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the length of the gradient, which is unscaled here and not yet clipped."""
        if self.gradient_norm:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self._gradient_length = torch.nn.utils.get_total_norm(gradients)
            self.log("train/gradient_norm", whole(self._gradient_length))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient by its length, which is known where it was logged."""
        by_length = gradient_clip_algorithm in (None, "norm")
        if not gradient_clip_val or self._gradient_length is None or not by_length:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        torch.nn.utils.clip_grads_with_norm_(
            self.parameters(), gradient_clip_val, self._gradient_length
        )
        self._gradient_length = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Take a batch into the validation metrics."""
        self._update("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Take a batch into the test metrics."""
        self._update("test", batch)

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._reset("test")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and its schedule, which moves every step."""
        groups = parameter_groups(
            self.encoder, self.learning_rate, self.weight_decay, self.layer_decay, self._depths
        )
        # One pass over the weights; but a fused step unscales gradients itself, after clipping.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=fused)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise InputError(
                "Expected training to have an end, but it has neither epochs nor steps. "
                "Set `trainer.max_epochs` or `trainer.max_steps`."
            )
        warmup = math.ceil(self.warmup_fraction * steps)
        if self.schedule == "linear":
            scheduler = get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
                optimizer, warmup, int(steps)
            )
        else:
            scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": "step",
                "name": "train/learning_rate",
            },
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `SiameseEncoder.from_pretrained` needs to rebuild the encoder."""
        with gathered(self.encoder):
            payload = self.encoder.checkpoint_payload()
        checkpoint["xsiam"] = {
            **payload,
            "sharded": self.encoder.sharded,
            "objective": self.objective.name,
            "objective_options": dict(self.hparams["objective_options"] or {}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse checkpoints that are not ours or of a newer format.

        Raises:
            CheckpointError: If the checkpoint is one of these.
        """
        payload = checkpoint.get("xsiam")
        if not isinstance(payload, dict):
            raise CheckpointError(
                "Expected a checkpoint written by xsiam, but it carries no encoder. Set `resume`."
            )
        check_format(payload.get("format_version"), "the checkpoint")

    # -- inside ---------------------------------------------------------------------------------

    def _embed(self, batch: Batch, chunk_size: int | None = None) -> EmbeddedBatch:
        """Embed all texts of a batch."""
        columns = [batch["a"], batch["b"], *batch.get("negatives", [])]
        embedded = self.encoder.embed_columns(
            columns, chunk_size, recompute=self.training and self.activation_checkpointing
        )
        # In float32 or more, whatever the precision of training.
        a, b, *negatives = (e if e.dtype == torch.float64 else e.float() for e in embedded)
        return EmbeddedBatch(
            a,
            b,
            tuple(negatives),
            batch.get("label"),
            batch.get("text_ids"),
            teacher=batch.get("teacher"),
        )

    def _loss(self, embedded: EmbeddedBatch) -> Tensor:
        """Return the loss; a product of embeddings that autocast rounds is no score."""
        with torch.autocast(embedded.a.device.type, enabled=False):
            if self.matryoshka is not None:
                return self.matryoshka.loss(self.objective, embedded)
            return self.objective(embedded)

    def _update(self, stage: str, batch: Batch) -> None:
        embedded = self._embed(batch)
        if self.anisotropy:
            self._anisotropy(stage).update(torch.cat([embedded.a, embedded.b]))
        if self.objective.problem_with(embedded) is None:
            self._mean_loss(stage).update(self._loss(embedded), len(embedded.a))
        if embedded.teacher is not None:
            scores = self.encoder.similarity_of(embedded.a, embedded.b)
            theirs = embedded.teacher.prod(dim=1).sum(dim=-1)
            self._likeness(stage).update(scores, theirs, batch["index"])
        if embedded.labels is not None:
            for name, similarity in _SIMILARITIES.items():
                scores = similarity(embedded.a, embedded.b)
                self._correlation(stage, name).update(scores, embedded.labels, batch["index"])
        elif embedded.text_ids is not None:
            candidates = torch.stack([embedded.b, *embedded.negatives], dim=1)
            self._retrieval(stage).update(embedded.a, candidates, embedded.text_ids, batch["index"])

    def _log_metrics(self, stage: str) -> None:
        """Log the gathered metrics of a stage; what is undefined is not logged but explained."""
        self.undefined = {}
        if self._mean_loss(stage).update_called:
            loss = self._mean_loss(stage).compute()
            self._log_or_explain(
                f"{stage}/loss",
                loss if torch.isfinite(loss) else None,
                f"the loss is {loss.item()}",
            )
        if self._anisotropy(stage).update_called:
            mean = self._anisotropy(stage).compute()
            self._log_or_explain(
                f"{stage}/anisotropy",
                mean if torch.isfinite(mean) else None,
                f"the mean cosine is {mean.item()}",
            )
        for name in _SIMILARITIES:
            metric = self._correlation(stage, name)
            if metric.update_called:
                result = metric.compute()
                for kind in ("spearman", "pearson"):
                    value, reason = getattr(result, kind), str(result.undefined)
                    self._log_or_explain(f"{stage}/{kind}_{name}", value, reason)
        if self._likeness(stage).update_called:
            result = self._likeness(stage).compute()
            self._log_or_explain(f"{stage}/pearson_teacher", result.pearson, str(result.undefined))
        if self._retrieval(stage).update_called:
            figures, undefined, *_ = self._retrieval(stage).compute()
            for key in RETRIEVAL_FIGURES:
                value = None if figures is None else figures[key]
                self._log_or_explain(f"{stage}/{key}", value, str(undefined))
        self._reset(stage)

    def _log_or_explain(self, key: str, value: Tensor | None, reason: str) -> None:
        if value is None:
            self.undefined[key] = reason
            if self.global_rank == 0:
                warnings.warn(f"`{key}` is undefined: {reason}.", RuntimeWarning, stacklevel=2)
        else:
            # Already over all processes: the same number everywhere, nothing to synchronise.
            shown = any(part in key for part in ("spearman", "mrr", "teacher"))
            self.log(key, value.float(), prog_bar=shown)

    def _reset(self, stage: str) -> None:
        self._mean_loss(stage).reset()
        self._anisotropy(stage).reset()
        self._retrieval(stage).reset()
        self._likeness(stage).reset()
        for name in _SIMILARITIES:
            self._correlation(stage, name).reset()

    def _mean_loss(self, stage: str) -> PairMean:
        return cast(PairMean, self.mean_losses[stage])

    def _anisotropy(self, stage: str) -> Anisotropy:
        return cast(Anisotropy, self.anisotropies[stage])

    def _retrieval(self, stage: str) -> PairRetrieval:
        return cast(PairRetrieval, self.retrievals[stage])

    def _likeness(self, stage: str) -> PairCorrelation:
        return cast(PairCorrelation, self.likenesses[stage])

    def _correlation(self, stage: str, name: str) -> PairCorrelation:
        return cast(PairCorrelation, self.correlations[f"{stage}_{name}"])


def _check(value: float, name: str, expected: str, holds: bool) -> float:
    if not holds:
        raise InputError(
            f"Expected `{name}` to be {expected}, but got {value}. Set `optimizer.{name}`."
        )
    return value
