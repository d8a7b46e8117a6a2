"""What a training run is made of: the module, its data, a teacher and the trainer."""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ParallelStrategy,
    Strategy,
)

from xsiam.adapters import add_lora, check_peft
from xsiam.checks import FSDP
from xsiam.config import ObjectiveConfig, TrainConfig, TrainerConfig, to_dict
from xsiam.data import PairDataModule
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.module import SiameseModule
from xsiam.sharding import ShardedStrategy
from xsiam.teacher import Teacher

__all__ = [
    "build_data",
    "build_module",
    "build_teacher",
    "build_trainer",
    "check_strategy",
    "objective_options",
    "shows_progress",
]


def check_strategy(config: TrainConfig) -> None:
    """Refuse what cannot be trained here, or not where processes share the weights."""
    if config.lora.enabled:
        check_peft()
    # Key: what it is, what it would have to be, and why.
    refused = {
        "lora.enabled": (
            config.lora.enabled,
            False,
            "adapters are merged into whole weights, and leave little to share out",
        ),
        "model.train_reference": (
            config.model.train_reference,
            False,
            "the vector is read outside of the units that are gathered",
        ),
        "bend.weight": (
            config.bend.weight,
            0.0,
            "paths run through a part of the model, and the whole is gathered",
        ),
    }
    for key, (value, off, reason) in refused.items():
        if value != off and config.trainer.strategy == FSDP:
            shown = str(value).lower()
            raise InputError(
                f"Expected `trainer.strategy` to be auto or ddp where `{key}={shown}`, but got "
                f"{FSDP!r}: {reason}. Set `trainer.strategy=ddp`, or `{key}={str(off).lower()}`."
            )


def build_module(config: TrainConfig) -> SiameseModule:
    """Return the module that is trained.

    Raises:
        InputError: If a setting of model, adapters, objective or optimiser does not meet its
            constraint.
        ModelError: If the model cannot be loaded or used.
    """
    model = config.model
    named = {} if model.prompt is None else {"default": model.prompt}
    encoder = SiameseEncoder.from_pretrained(
        model.name,
        similarity=model.similarity,
        shift=model.shift,
        reference=model.reference,
        normalize=model.normalize,
        max_length=model.max_length,
        truncate_dim=model.truncate_dim,
        prompts=named or None,
        default_prompt_name="default" if named else None,
        device="cpu",
    )
    for role in (model.role_a, model.role_b):
        encoder.check_role(role)
    if config.lora.enabled:
        settings = to_dict(config.lora)
        del settings["enabled"]
        add_lora(encoder, **settings)
    optimizer = config.optimizer
    return SiameseModule(
        encoder,
        config.objective.name,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        warmup_fraction=optimizer.warmup_fraction,
        schedule=optimizer.schedule,
        objective_options=objective_options(config.objective),
        chunk_size=config.objective.chunk_size,
        gradient_norm=config.metrics.gradient_norm,
        anisotropy=config.metrics.anisotropy,
        layer_decay=optimizer.layer_decay,
        freeze_layers=model.freeze_layers,
        activation_checkpointing=config.trainer.activation_checkpointing,
        dims=config.objective.dims,
        dim_weights=config.objective.dim_weights,
        train_reference=model.train_reference,
        bend_weight=config.bend.weight,
        bend_layer=config.bend.layer,
        bend_texts=config.bend.n_texts,
    )


def objective_options(objective: ObjectiveConfig) -> dict[str, Any]:
    """Return the options of the objective that are set."""
    values = to_dict(objective)
    return {
        key: value
        for key, value in values.items()
        if value is not None and key not in ("name", "chunk_size", "dims", "dim_weights")
    }


def build_data(config: TrainConfig, module: SiameseModule) -> PairDataModule:
    """Return the pairs, all of them read and checked.

    Raises:
        InputError: If a file, column, text or label does not meet its constraint.
    """
    pairs = PairDataModule(
        partial(module.encoder.preprocess, offsets=False),
        **to_dict(config.data),
        seed=config.seed,
        role_a=config.model.role_a,
        role_b=config.model.role_b,
        needs_label=module.objective.needs_label,
        negatives=module.objective.negatives,
        in_batch=module.objective.in_batch,
        expected_range=module.objective.label_range,
        teacher=build_teacher(config, module) if module.objective.needs_teacher else None,
    )
    pairs.pairs("train")
    pairs.setup("fit")
    return pairs


def build_teacher(config: TrainConfig, module: SiameseModule) -> Teacher:
    """Return the teacher of a run, whose embeddings are kept in its folder.

    Raises:
        ModelError: If there is no such model.
    """
    model, other = config.model, config.objective.teacher
    return Teacher(
        other or model.name,
        Path(config.output_dir).expanduser() / "teacher.safetensors",
        similarity=module.encoder.similarity,
        # Another model has a prompt and a window of its own.
        prompt=None if other else model.prompt,
        max_length=None if other else model.max_length,
        progress=shows_progress(config.trainer),
    )


def shows_progress(config: TrainerConfig) -> bool:
    """Return whether progress is shown; in a file or a pipe it is noise."""
    return config.progress_bar and sys.stdout.isatty()


def build_trainer(
    config: TrainerConfig,
    output: Path,
    *,
    loggers: list[Any],
    callbacks: list[Callback],
    validates: bool,
) -> Trainer:
    """Return the trainer; what Lightning refuses becomes an InputError."""
    show_progress = any(isinstance(callback, RichProgressBar) for callback in callbacks)
    try:
        trainer = Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=ShardedStrategy() if config.strategy == FSDP else config.strategy,
            precision=config.precision,  # type: ignore[arg-type]  # any text; Lightning checks it
            max_epochs=config.max_epochs,
            max_steps=-1 if config.max_steps is None else config.max_steps,
            gradient_clip_val=config.gradient_clip_val,
            accumulate_grad_batches=config.accumulate_grad_batches,
            log_every_n_steps=config.log_every_n_steps,
            val_check_interval=config.val_check_interval,
            check_val_every_n_epoch=config.check_val_every_n_epoch,
            limit_train_batches=config.limit_train_batches,
            limit_val_batches=config.limit_val_batches if validates else 0,
            deterministic=config.deterministic,
            enable_progress_bar=show_progress,
            enable_model_summary=False,
            # A validation before training would draw random numbers and log at step 0.
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module knows its process
            default_root_dir=output,
            logger=loggers,
            callbacks=callbacks,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise InputError(
            f"Expected settings that the trainer can use, but got `trainer.accelerator="
            f"{config.accelerator}`, `trainer.devices={config.devices}`, `trainer.strategy="
            f"{config.strategy}`, `trainer.precision={config.precision}`: {error}"
        ) from error
    _set_up(trainer.strategy, config)
    return trainer


def _set_up(strategy: Strategy, config: TrainerConfig) -> None:
    """Refuse strategies that share weights in ways of their own, and set how long all wait."""
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):
        raise InputError(
            "Expected `trainer.strategy` to be auto, ddp or fsdp, but got "
            f"{config.strategy!r}, whose checkpoints are not one file with whole weights. Set "
            f"`trainer.strategy={FSDP}`."
        )
    if config.timeout is not None and isinstance(strategy, ParallelStrategy):
        # Lightning takes it as an argument, but "auto" leaves it the choice of the strategy.
        strategy._timeout = timedelta(seconds=config.timeout)  # type: ignore[attr-defined]
