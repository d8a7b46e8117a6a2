"""What can be wrong with a run as a whole, checked before any long work begins."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

from xsiam.adapters import lora_settings
from xsiam.checkpoint import read_checkpoint
from xsiam.config import TrainConfig
from xsiam.data import SPLITS, PairDataModule, PairDataset
from xsiam.errors import CheckpointError, InputError
from xsiam.metrics import undefined_reason
from xsiam.module import SiameseModule
from xsiam.retrieval import RETRIEVAL_FIGURES

AUTO_RESUME = "auto"
"""Value of `resume` that takes the last checkpoint of the output folder, if there is one."""

FSDP = "fsdp"
"""Value of `trainer.strategy` under which processes share the weights."""

CORRELATIONS = tuple(
    f"val/{kind}_{name}" for kind in ("spearman", "pearson") for name in ("cosine", "dot")
)

LIKENESS = "val/pearson_teacher"

RETRIEVALS = tuple(f"val/{figure}" for figure in RETRIEVAL_FIGURES)


def check_accelerator(name: str, key: str) -> None:
    """Raise InputError, naming the key, where a GPU is asked for and there is none."""
    cuda, mps = CUDAAccelerator.is_available(), MPSAccelerator.is_available()
    present = {"gpu": cuda or mps, "cuda": cuda, "mps": mps}
    if not present.get(name.lower(), True):
        raise InputError(
            f"Expected `{key}` to be there, but got {name!r} and this machine has no "
            f"such device that PyTorch can use. Set `{key}=cpu` or `auto`."
        )


def resume_path(config: TrainConfig, output: Path) -> Path | None:
    """Return the checkpoint to go on from, and check that no other run is overwritten."""
    if output.exists() and not output.is_dir():
        raise InputError(
            f"Expected `output_dir` to be a folder, but {str(output)!r} is a file. "
            "Set `output_dir`."
        )
    checkpoints = output / "checkpoints"
    finished = (output / "results.json").exists()
    path = None
    if config.resume == AUTO_RESUME:
        last = checkpoints / "last.ckpt"
        if last.is_file() or not finished:
            return last if last.is_file() else None
    elif config.resume is not None:
        path = Path(config.resume).expanduser()
        if not path.is_file():
            raise InputError(
                f"Expected `resume` to be a checkpoint or {AUTO_RESUME!r}, but {config.resume!r} "
                "does not exist. Set `resume`."
            )
        if path.resolve().parent == checkpoints.resolve():
            return path
    if finished or any(checkpoints.glob("*.ckpt")):
        raise InputError(
            f"Expected `output_dir` to be a new folder, but {str(output)!r} holds a "
            f"{'finished' if finished else 'started'} run. Set another `output_dir`, or "
            "`resume=auto` to go on from its last checkpoint."
        )
    return path


def check_run(
    config: TrainConfig, module: SiameseModule, data: PairDataModule, resume: Path | None
) -> None:
    """Check what concerns model, data and configuration together."""
    if config.attribution.enabled:
        for layer in config.attribution.layers:
            module.encoder.check_layer(layer, key="attribution.layers")
    has_validation = validates(config, data)
    wants = {
        "attribution.layers": config.attribution.enabled and bool(config.attribution.layers),
        "early_stopping.patience": config.early_stopping.patience is not None,
    }
    for key, wanted in wants.items():
        if wanted and not has_validation:
            raise InputError(
                f"Expected validation pairs for `{key}`, but there are none. Set `data.validation` "
                f"or `data.validation_fraction`, or leave `{key}` out."
            )
    if has_validation:
        _check_monitor(config, module, data)
    if resume is not None:
        _check_resumable(resume, module, sharded=config.trainer.strategy == FSDP)


def check_processes(data: PairDataModule, n_processes: int) -> None:
    """Raise InputError where a process would have no pair, naming the split."""
    for split in SPLITS:
        n = len(data.pairs(split)) if data.has(split) else n_processes
        if n < n_processes:
            raise InputError(
                f"Expected {n_processes} {split} pairs or more, one for each process, but got {n}. "
                f"Set `trainer.devices` or `trainer.num_nodes` lower, or `data.{split}` to more "
                "pairs."
            )


def _check_monitor(config: TrainConfig, module: SiameseModule, data: PairDataModule) -> None:
    """Raise InputError where the monitored metric is unknown or cannot be defined."""
    monitor = config.checkpoint.monitor or default_monitor(module, data)
    layers = config.attribution.layers if config.attribution.enabled else []
    prefixes = tuple(f"attribution/layer_{layer}/" for layer in layers)
    unlabelled = (LIKENESS,) if module.objective.needs_teacher else RETRIEVALS
    plain = (*CORRELATIONS, *unlabelled, "val/loss")
    plain += ("val/anisotropy",) if module.anisotropy else ()
    if monitor not in plain and not monitor.startswith(prefixes):
        known = [*plain, *(f"{prefix}…" for prefix in prefixes)]
        raise InputError(
            f"Expected `checkpoint.monitor` to be one of {', '.join(known)}, but got {monitor!r}. "
            "Set `checkpoint.monitor`, or `attribution.layers` to monitor attributions."
        )
    pairs = data.pairs("validation")
    reason = None
    if monitor in CORRELATIONS:
        reason = _no_correlation(pairs)
    elif monitor in RETRIEVALS:
        reason = _no_retrieval(pairs)
    elif monitor == LIKENESS and len(pairs) < 2:
        reason = f"a correlation needs 2 pairs or more, but there are {len(pairs)}"
    if reason is not None:
        other = default_monitor(module, data)
        hint = "" if other == monitor else f"={other}"
        raise InputError(
            f"Expected `checkpoint.monitor={monitor}` to be defined, but {reason}. "
            f"Set `checkpoint.monitor{hint}` or other validation pairs."
        )


def _no_correlation(pairs: PairDataset) -> str | None:
    """Return why the correlations of scores that differ are undefined, or None."""
    if pairs.labels is None:
        return "the validation pairs have no labels"
    scores = torch.arange(len(pairs.labels))
    return undefined_reason(scores, torch.tensor(pairs.labels))


def _no_retrieval(pairs: PairDataset) -> str | None:
    """Return why the retrieval figures of finite embeddings are undefined, or None."""
    if pairs.labels is not None:
        return "the validation pairs have labels, and anchors rank the texts of pairs without"
    columns = (pairs.texts_b, *pairs.negatives.values())
    if len({text for texts in columns for text in texts}) < 2:
        return "a ranking needs 2 different texts or more, but the validation pairs have 1"
    return None


def _check_resumable(path: Path, module: SiameseModule, *, sharded: bool) -> None:
    """Raise CheckpointError where a checkpoint cannot be continued with this model."""
    checkpoint = read_checkpoint(path)
    missing = [key for key in ("loops", "optimizer_states") if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f"Expected {str(path)!r} to hold the state of a training run, but it has no "
            f"{missing[0]}. Set `model.name` to it, to start a new run from its weights."
        )
    if checkpoint["xsiam"].get("sharded", False) != sharded:
        raise CheckpointError(
            f"Expected `trainer.strategy` to be {'another than ' if sharded else ''}{FSDP!r} as in "
            f"the checkpoint {str(path)!r}, whose optimiser goes with it. Set `trainer.strategy`, "
            "or `model.name` to the checkpoint, to start a new run from its weights."
        )
    _check_layers(path, checkpoint.get("hyper_parameters", {}), module)
    _check_lora(path, checkpoint["xsiam"].get("lora"), module)
    own, theirs = module.state_dict(), checkpoint["state_dict"]
    for name in [*own, *theirs]:
        shapes = [tuple(s[name].shape) if name in s else None for s in (own, theirs)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"Expected the checkpoint {str(path)!r} to be of this model, but {name!r} has "
                f"shape {shapes[1]} there and {shapes[0]} here. Set `resume` or `model.name`."
            )


def _check_layers(path: Path, before: dict[str, Any], module: SiameseModule) -> None:
    """Raise CheckpointError where the optimiser's groups would be others than before."""
    kept = {"optimizer.layer_decay": None, "model.freeze_layers": 0, "model.train_reference": False}
    for key, off in kept.items():
        name = key.partition(".")[2]
        now, then = module.hparams[name], before.get(name, off)
        if now != then:
            raise CheckpointError(
                f"Expected `{key}` to be {then} as in the checkpoint {str(path)!r}, whose "
                f"optimiser goes with it, but got {now}. Set `{key}`, or `model.name` to the "
                "checkpoint, to start a new run from its weights."
            )


def _check_lora(path: Path, then: dict[str, Any] | None, module: SiameseModule) -> None:
    """Raise CheckpointError where adapters are others than before."""
    settings = lora_settings(module.encoder.model)
    now = None if settings is None else asdict(settings)
    if now == then:
        return
    if now is None or then is None:
        now, then = ({"enabled": settings is not None} for settings in (now, then))
    key = next(key for key in now if now[key] != then.get(key))
    raise CheckpointError(
        f"Expected `lora.{key}` to be {then.get(key)} as in the checkpoint {str(path)!r}, but got "
        f"{now[key]}. Set `lora.{key}`, or `model.name` to the checkpoint, to start a new run "
        "from its weights."
    )


def validates(config: TrainConfig, data: PairDataModule) -> bool:
    """Whether a run has validations."""
    return data.has("validation") and config.trainer.limit_val_batches != 0


def default_monitor(module: SiameseModule, data: PairDataModule) -> str:
    """Return the correlation of the model's own score with the labels of validation pairs.

    Without labels that is the correlation with the scores of a teacher, or MRR where there is none.
    All are the better the higher, as the default of ``checkpoint.mode`` says.
    """
    if data.has("validation") and data.pairs("validation").labels is None:
        return LIKENESS if module.objective.needs_teacher else "val/mrr@10"
    return "val/spearman_dot" if module.encoder.similarity == "dot" else "val/spearman_cosine"


def check_evaluation_output(output: Path) -> None:
    """Raise InputError where the output folder cannot be written, or holds something else."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(
            f"Expected `output_dir` to be a folder, but {str(existing)!r} is a file. "
            "Set `output_dir`."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"Expected `output_dir` to be writable, but {str(existing)!r} is not. Set `output_dir`."
        )
    if (output / "checkpoints").exists():
        raise InputError(
            f"Expected `output_dir` to be a folder for evaluations, but {str(output)!r} holds a "
            "training run, whose results would be overwritten. Set `output_dir`."
        )


def prepare_evaluation_output(output: Path) -> None:
    """Make the folder, and remove what an earlier evaluation wrote, but for finished layers."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Expected `output_dir` to be writable, but making {str(output)!r} failed: {error}. "
            "Set `output_dir`."
        ) from error
    # The presence of results says that an evaluation is finished.
    for name in ("results.json", "pairs.parquet", "strongest_pairs.json"):
        (output / name).unlink(missing_ok=True)
    for figure in (output / "figures").glob("layer_*_pair_*.png"):
        figure.unlink()
