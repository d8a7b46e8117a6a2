"""What a training run leaves behind beside its weights: validation history and `results.json`."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

import xsiam

__all__ = [
    "SCHEMA_VERSION",
    "HistoryLogger",
    "KeepHistory",
    "git_commit",
    "run_facts",
    "write_results",
]

SCHEMA_VERSION = 1
"""Version of the layout of `results.json`."""

_PACKAGES = ("lightning", "transformers", "sentence-transformers", "datasets", "numpy", "peft")


class HistoryLogger(Logger):
    """Collect what every validation logs.

    A logger and not a callback, because ``trainer.callback_metrics`` keeps values of earlier
    validations, which a later one may not have logged again.

    Attributes:
        validations: One dict a validation: "step" (number of the last step before), "epoch" and the
            values by key. Every value is finite.
    """

    def __init__(self) -> None:
        super().__init__()
        self.validations: list[dict[str, float | int]] = []

    @property
    def name(self) -> str:
        """The name that loggers have to have."""
        return "history"

    @property
    def version(self) -> int:
        """The version that loggers have to have."""
        return SCHEMA_VERSION

    @property
    @rank_zero_experiment
    def experiment(self) -> list[dict[str, float | int]]:
        """What is written to."""
        return self.validations

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take in what a validation logged; the same step again replaces the entry."""
        wanted = ("val/", "attribution/")
        kept = finite({key: value for key, value in metrics.items() if key.startswith(wanted)})
        if not kept:
            return
        place = {"step": step or 0, "epoch": int(metrics.get("epoch", 0))}
        known = [entry for entry in self.validations if entry["step"] == place["step"]]
        if known:
            known[0].update(place | kept)
        else:
            self.validations.append(place | kept)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters: `results.json` holds the whole configuration."""

    def at(self, step: int) -> dict[str, float | int]:
        """Return the values logged at a step, without step and epoch."""
        for entry in self.validations:
            if entry["step"] == step:
                return {key: entry[key] for key in entry if key not in ("step", "epoch")}
        return {}


class KeepHistory(Callback):
    """Carry the history and the time spent through checkpoints.

    Args:
        history: The logger that collects it.
    """

    def __init__(self, history: HistoryLogger) -> None:
        self.history = history
        self._seconds_before = 0.0
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent on the run, also before it was resumed."""
        return self._seconds_before + time.monotonic() - self._start

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, so that checkpoints load weights-only."""
        entries = [dict(entry) for entry in self.history.validations]
        return {"validations": entries, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the checkpoint was written."""
        self.history.validations = [dict(entry) for entry in state_dict["validations"]]
        self._seconds_before = state_dict["seconds"]


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values that are finite numbers, as floats: JSON has no NaN."""
    numbers = {key: float(value) for key, value in values.items()}
    return {key: number for key, number in numbers.items() if math.isfinite(number)}


def run_facts() -> dict[str, Any]:
    """Return where and by which versions a run was made."""
    versions = {name: version(name) for name in _PACKAGES if find_spec(name.replace("-", "_"))}
    return {
        "command": list(sys.argv),
        "commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            "xsiam": xsiam.__version__,
            "torch": torch.__version__,  # with the build, which the package's version leaves out
            **versions,
        },
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """Return the commit of the checkout that the working directory is in, None in no checkout.

    It ends in "-dirty" where files that git knows were changed since.
    """
    # Nothing of a repository's own configuration is run: no file system monitor, no tags' names.
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here, or a checkout on a disk that does not answer
    return done.stdout.strip() or None if done.returncode == 0 else None


def _processor() -> str:
    """Return the name of the processor, which decides how results are rounded."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []  # not Linux
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_results(path: Path, metrics: Mapping[str, float], facts: Mapping[str, Any]) -> None:
    """Write `results.json`: flat metrics, the schema's version and the run's facts.

    The file appears as a whole or not at all, since its presence says that the run is finished.
    """
    content = {"schema_version": SCHEMA_VERSION, "metrics": finite(metrics), **facts}
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    part = path.with_suffix(".json.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
