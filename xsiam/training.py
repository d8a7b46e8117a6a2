"""A training run from its configuration: check everything, train, test the best, export it.

A run can be repeated and interrupted: see `xsiam.resume`. Several processes run this same function;
files are written by the first one only.
"""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ParallelStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import DistError

from xsiam.adapters import add_lora, check_peft, lora_settings, merge_adapters
from xsiam.checkpoint import export_encoder, read_checkpoint
from xsiam.checks import (
    FSDP,
    check_accelerator,
    check_processes,
    check_run,
    default_monitor,
    resume_path,
    validates,
)
from xsiam.config import (
    AttributionConfig,
    ObjectiveConfig,
    TrainConfig,
    TrainerConfig,
    save_config,
    to_dict,
)
from xsiam.data import PairDataModule
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError, ModelError, ProcessError
from xsiam.history import HistoryLogger, KeepHistory, finite, run_facts, write_results
from xsiam.losses import get_objective, matryoshka_of
from xsiam.module import SiameseModule
from xsiam.provenance import training_record
from xsiam.resume import Interruption, LastCheckpoint, ResumableData, SeededSteps
from xsiam.sharding import ShardedStrategy, load_weights
from xsiam.teacher import Teacher

__all__ = ["TrainingResult", "run_training"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, by the convention of shells."""

# Signs of a lost process in errors that PyTorch raises as plain RuntimeErrors, from gloo and NCCL.
_LOST = ("closed by peer", "reset by peer", "pair closure", "Broken pipe", "imed out", "NCCL")

# What Lightning warns of although it is meant to be so here, or cannot be changed.
_EXPECTED_WARNINGS = (
    r".*does not have many workers",  # tokenising takes little; `data.num_workers` is there
    r".*number of training batches .* is smaller than the logging interval",
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run
    r".*recommended to use `self\.log\(.*sync_dist=True",  # values are gathered already
    r".*dirpath has changed from",  # resumed from the checkpoint of another run
    r".*LeafSpec",  # lightning 2.6 on torch 2.13
    r".*FSDP2-wrapped module .* returned a view",  # T5's blocks; nothing is added in place
)


@dataclass(frozen=True)
class TrainingResult:
    """Where a run has left what.

    Attributes:
        best_checkpoint: Checkpoint that is best by the monitored metric; the last state where there
            was no validation.
        last_checkpoint: Checkpoint to resume from.
        export: Folder of the best weights in sentence-transformers' format.
        tensorboard_dir: Folder of event files.
        results_path: `results.json`.
        metrics: Its flat metrics: those of the best validation, and of the test.
        is_first_process: Whether this is the process that wrote the files.
    """

    best_checkpoint: Path
    last_checkpoint: Path
    export: Path
    tensorboard_dir: Path
    results_path: Path
    metrics: dict[str, float]
    is_first_process: bool = True


class CheckMonitor(Callback):
    """Stop with the reason where the metric that checkpoints are chosen by was not logged.

    Args:
        monitor: Key of the metric.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ModelError for an undefined metric and InputError for an unknown one."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        reason = getattr(pl_module, "undefined", {}).get(self.monitor)
        if reason is not None:
            raise ModelError(
                f"Expected `{self.monitor}` to choose the best checkpoint by, but it is undefined: "
                f"{reason}. Set a lower `optimizer.learning_rate`, or another `checkpoint.monitor`."
            )
        if self.monitor not in trainer.callback_metrics:
            raise InputError(
                "Expected `checkpoint.monitor` to be a metric of the validation "
                f"({', '.join(sorted(trainer.callback_metrics))}), but got {self.monitor!r}. "
                "Set `checkpoint.monitor`."
            )


def run_training(config: TrainConfig) -> TrainingResult:
    """Train, then test and export the best weights.

    Everything that can be wrong in configuration, model and data is checked before training begins.

    Args:
        config: The run, see `xsiam.config.TrainConfig`.

    Returns:
        Where everything is. On processes other than the first the files may not exist yet.

    Raises:
        InputError: If the configuration or the data do not meet a constraint, or the output folder
            holds a run and `resume` is not set.
        ModelError: If the model cannot be used, or training diverged.
        CheckpointError: If the checkpoint to resume from cannot be used.
        ProcessError: If another process of the run died, or did not answer in time.
        SystemExit: With code 130 after Ctrl-C, when the state has been saved.
    """
    output = Path(config.output_dir).expanduser()
    check_accelerator(config.trainer.accelerator, "trainer.accelerator")
    _check_strategy(config)
    resume = resume_path(config, output)
    get_objective(config.objective.name, **_options(config.objective))
    matryoshka_of(config.objective.dims, config.objective.dim_weights)
    seed_everything(config.seed, workers=True, verbose=False)
    with _quiet(), Interruption() as interruption:
        module = build_module(config)
        data = build_data(config, module)
        check_run(config, module, data, resume)
        pairs = data.pairs("train")
        record = training_record(config.model.name, data.facts()["train"], pairs)
        module.encoder.trained_on = [*(module.encoder.trained_on or []), record]
        run = _Run(config, output, module, data, interruption)
        return run.execute(resume)


def _check_strategy(config: TrainConfig) -> None:
    """Refuse what cannot be trained here, or not where processes share the weights."""
    if config.lora.enabled:
        check_peft()
    refused = {
        "lora.enabled": (
            config.lora.enabled,
            "adapters are merged into whole weights, and leave little to share out",
        ),
        "model.train_reference": (
            config.model.train_reference,
            "the vector is read outside of the units that are gathered",
        ),
    }
    for key, (is_set, reason) in refused.items():
        if is_set and config.trainer.strategy == FSDP:
            raise InputError(
                f"Expected `trainer.strategy` to be auto or ddp where `{key}=true`, but got "
                f"{FSDP!r}: {reason}. Set `trainer.strategy=ddp`, or `{key}=false`."
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
        objective_options=_options(config.objective),
        chunk_size=config.objective.chunk_size,
        gradient_norm=config.metrics.gradient_norm,
        anisotropy=config.metrics.anisotropy,
        layer_decay=optimizer.layer_decay,
        freeze_layers=model.freeze_layers,
        activation_checkpointing=config.trainer.activation_checkpointing,
        dims=config.objective.dims,
        dim_weights=config.objective.dim_weights,
        train_reference=model.train_reference,
    )


def _options(objective: ObjectiveConfig) -> dict[str, Any]:
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
        progress=_shows_progress(config.trainer),
    )


def _shows_progress(config: TrainerConfig) -> bool:
    """Return whether progress is shown; in a file or a pipe it is noise."""
    return config.progress_bar and sys.stdout.isatty()


class _Run:
    """One run: its trainer, and the steps from training to results."""

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        module: SiameseModule,
        data: PairDataModule,
        interruption: Interruption,
    ) -> None:
        self.config = config
        self.output = output
        self.module = module
        self.trained: dict[str, Any] = {}
        self.data = ResumableData(data)
        self.validates = validates(config, data)
        self.checkpoints = output / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = ModelCheckpoint(
            self.checkpoints,
            "best",
            monitor=config.checkpoint.monitor or default_monitor(module, data),
            mode=config.checkpoint.mode,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.history = HistoryLogger()
        self.keeper = KeepHistory(self.history)
        self.tensorboard = TensorBoardLogger(
            output, "tensorboard", version="", default_hp_metric=False
        )
        self.trainer = _build_trainer(
            config.trainer,
            output,
            loggers=[self.tensorboard, self.history],
            callbacks=self._callbacks(data, interruption),
            validates=self.validates,
        )
        check_processes(data, self.trainer.world_size)

    def execute(self, resume: Path | None) -> TrainingResult:
        """Train, test, export and write the results."""
        with _together(self.trainer, self.last):
            return self._execute(resume)

    def _execute(self, resume: Path | None) -> TrainingResult:
        trainer = self.trainer
        if trainer.is_global_zero:
            save_config(self.config, self.output / "config.yaml")
        self._fit(resume)
        self.trained = _trained(self.module.encoder)
        best = self._load_best()
        metrics = self._metrics(best)
        if trainer.is_global_zero:
            encoder = self._whole_encoder()
            facts = self._facts(encoder)
            export_encoder(encoder, self.output / "export", {"metrics": metrics, **facts})
            self._log_hyperparameters(metrics, best["global_step"])
            write_results(self.output / "results.json", metrics, facts)
        trainer.strategy.barrier("results")
        return TrainingResult(
            best_checkpoint=self.checkpoints / "best.ckpt",
            last_checkpoint=self.last,
            export=self.output / "export",
            tensorboard_dir=self.output / "tensorboard",
            results_path=self.output / "results.json",
            metrics=metrics,
            is_first_process=trainer.is_global_zero,
        )

    def _callbacks(self, data: PairDataModule, interruption: Interruption) -> list[Callback]:
        """Return the callbacks; the order matters, since checkpoints hold what came before."""
        config = self.config
        callbacks: list[Callback] = [SeededSteps(config.seed), LearningRateMonitor("step")]
        if _shows_progress(config.trainer):
            callbacks.append(RichProgressBar())
        if self.validates:
            monitor = self.best.monitor
            assert monitor is not None
            callbacks += _attribution_monitor(config, data)
            callbacks.append(CheckMonitor(monitor))
            stopping = config.early_stopping
            if stopping.patience is not None:
                callbacks.append(
                    EarlyStopping(
                        monitor,
                        min_delta=stopping.min_delta,
                        patience=stopping.patience,
                        mode=config.checkpoint.mode,
                        check_on_train_epoch_end=False,
                    )
                )
            callbacks.append(self.best)
        last = LastCheckpoint(self.last, config.checkpoint.every_n_steps, interruption)
        return [*callbacks, self.keeper, last]

    def _fit(self, resume: Path | None) -> None:
        """Train; after Ctrl-C say where the state is and leave."""
        trainer = self.trainer
        try:
            trainer.fit(self.module, datamodule=self.data, ckpt_path=resume, weights_only=True)
        except SystemExit:
            if not trainer.interrupted:
                raise
            if trainer.is_global_zero:
                print(_farewell(self.last, trainer.global_step), file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None

    def _load_best(self) -> dict[str, Any]:
        """Load the best weights into the module, and return the checkpoint that they are in.

        Adapters are merged: what is tested is what is exported.
        """
        best = self.checkpoints / "best.ckpt"
        recorded = self.best.best_model_path if self.validates else ""
        if self.trainer.is_global_zero:
            if not recorded:
                # Never validated: the last state is the best that is known.
                shutil.copyfile(self.last, best)
            elif not best.is_file():
                shutil.copyfile(recorded, best)  # resumed from another run's folder
        self.trainer.strategy.barrier("best")
        checkpoint = read_checkpoint(best)
        load_weights(self.module, checkpoint["state_dict"])
        merge_adapters(self.module.encoder.model)
        return checkpoint

    def _whole_encoder(self) -> SiameseEncoder:
        """Return the encoder with the best weights, read anew where processes share its weights."""
        encoder = self.module.encoder
        if not encoder.sharded:
            return encoder
        return SiameseEncoder.from_pretrained(self.checkpoints / "best.ckpt", device="cpu")

    def _metrics(self, best: dict[str, Any]) -> dict[str, float]:
        """Return the metrics of the best validation, and those of a test with the best weights."""
        trainer, data = self.trainer, self.data
        metrics: dict[str, Any] = dict(self.history.at(best["global_step"] - 1))
        if self.validates and not self.best.best_model_path:  # the same on all processes
            # `max_steps` ended the run before its first validation.
            metrics.update(trainer.validate(self.module, datamodule=data, verbose=False)[0])
        if data.data.has("test"):
            metrics.update(trainer.test(self.module, datamodule=data, verbose=False)[0])
        return dict(trainer.strategy.broadcast(finite(metrics)))  # only the first has the history

    def _log_hyperparameters(self, metrics: dict[str, float], step: int) -> None:
        """Write configuration and final metrics as TensorBoard's HParams, if there are metrics.

        The metrics have keys of their own, or the curves of validation would get another point.
        """
        final = {f"final/{key}": value for key, value in metrics.items()}
        self.tensorboard.log_hyperparams(to_dict(self.config), final, step)
        self.tensorboard.finalize("success")

    def _facts(self, encoder: SiameseEncoder) -> dict[str, Any]:
        trainer, teacher = self.trainer, self.data.data.teacher
        score = self.best.best_model_score
        return {
            **run_facts(),
            "seed": self.config.seed,
            "config": to_dict(self.config),
            "model": {
                "name": self.config.model.name,
                "architecture": encoder.split.name,
                "fingerprint": encoder.model_fingerprint,
                "n_layers": encoder.n_layers,
                "embedding_dim": encoder.embedding_dim,
                "parameters": sum(p.numel() for p in encoder.parameters()),
                **self.trained,
            },
            "teacher": None if teacher is None else teacher.facts(),
            "data": self.data.data.facts(),
            "processes": trainer.world_size,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "duration_seconds": self.keeper.seconds,
            "best": {
                "monitor": self.best.monitor if self.validates else None,
                "value": None if score is None else float(score),
            },
            "history": self.history.validations,
            "undefined": dict(self.module.undefined),
        }


def _trained(encoder: SiameseEncoder) -> dict[str, Any]:
    """Return how many numbers were trained, and by which adapters."""
    lora = lora_settings(encoder.model)
    return {
        "trained_parameters": sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        "lora": None if lora is None else asdict(lora),
    }


def _build_trainer(
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


def _attribution_monitor(config: TrainConfig, data: PairDataModule) -> list[Callback]:
    """Return the monitor of attributions, or nothing where no layer is asked for."""
    wanted: AttributionConfig = config.attribution
    if not wanted.enabled or not wanted.layers:
        return []
    from xsiam.callbacks import AttributionMonitor

    settings = to_dict(wanted)
    del settings["enabled"]
    return [
        AttributionMonitor(
            data.pairs("validation"),
            **settings,
            role_a=config.model.role_a,
            role_b=config.model.role_b,
        )
    ]


@contextmanager
def _together(trainer: Trainer, last: Path) -> Iterator[None]:
    """Say what has happened, and what to do, where this process loses another one."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, DistError) or any(sign in str(error) for sign in _LOST)
        if trainer.world_size == 1 or not lost:
            raise
        first = str(error).partition(". ")[0].strip()
        saved = f"The last state is in {last}: `resume=auto` goes on from there. "
        raise ProcessError(
            f"Expected all {trainer.world_size} processes of the run to answer, but process "
            f"{trainer.global_rank} lost one of the others ({type(error).__name__}: {first}). "
            f"{saved if last.is_file() else ''}Look for the first error of the others; one that "
            "was killed, as where memory runs out, left none. Where one was only slow, set "
            "`trainer.timeout` higher."
        ) from error


def _farewell(last: Path, step: int) -> str:
    if not last.is_file():
        return "Stopped by Ctrl-C before the first step; there is nothing to save."
    return (
        f"Stopped by Ctrl-C after step {step}. The state is in {last}: the same command with "
        "`resume=auto` goes on from there."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's greetings and expected warnings off the screen meanwhile."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(level)
