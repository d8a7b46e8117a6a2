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
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import DistError

from xsiam.adapters import lora_settings, merge_adapters
from xsiam.checkpoint import export_encoder, read_checkpoint
from xsiam.checks import (
    check_accelerator,
    check_processes,
    check_run,
    default_monitor,
    resume_path,
    validates,
)
from xsiam.config import AttributionConfig, TrainConfig, save_config, to_dict
from xsiam.data import PairDataModule
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError, ModelError, ProcessError
from xsiam.history import HistoryLogger, KeepHistory, finite, run_facts, write_results
from xsiam.losses import get_objective, matryoshka_of
from xsiam.module import SiameseModule
from xsiam.provenance import training_record
from xsiam.resume import Interruption, LastCheckpoint, ResumableData, SeededSteps
from xsiam.sharding import load_weights
from xsiam.training_parts import (
    build_data,
    build_module,
    build_trainer,
    check_strategy,
    objective_options,
    shows_progress,
)

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
    check_strategy(config)
    resume = resume_path(config, output)
    get_objective(config.objective.name, **objective_options(config.objective))
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
        self.trainer = build_trainer(
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
        if shows_progress(config.trainer):
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
