"""Samples a second in training, beside SentenceTransformerTrainer of sentence-transformers.

    python benchmarks/training.py --output results/training
    python benchmarks/training.py --data stsb/train.csv --output results/training-stsb --steps 60

Both sides train the same model with the same loss on the same rows in the same order, tokenised and
padded alike (which is checked), with the same optimiser, clipping, schedule, precision, logging and
loader workers. What either does with a batch is its own: xsiam embeds both columns by length. Runs
take turns in one process; each times its steps after a few that warm up, data loading included.
Every finished run is in ``results.json`` at once, and the same command goes on where it stopped.
``results.md`` has medians, spreads and ratios. Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from machine import SAME, facts, synchronize
from results import replace_text
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, CosineSimilarityLoss
from tables import table
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from xsiam import training, training_parts
from xsiam.config import TrainConfig, load_config
from xsiam.data import PairDataModule
from xsiam.encoder import SiameseEncoder
from xsiam.history import HistoryLogger
from xsiam.pairs import PairDataset
from xsiam.resume import ResumableData, SeededSteps
from xsiam.sampling import LengthBucketSampler

Row = dict[str, Any]
SCHEMA_VERSION = 1
THEIRS = "sentence-transformers"
LOSSES = {"cosent": CoSENTLoss, "mse_cosine": CosineSimilarityLoss}
PRECISIONS = {"32-true": False, "bf16-mixed": True}
LOG_EVERY = 10


@dataclass(frozen=True)
class Method:
    """What trains, and on which batches.

    Attributes:
        name: `THEIRS`, or the reference of xsiam; "none" has no shift.
        bucketed: Whether batches hold texts of similar length, by xsiam's sampler.
    """

    name: str
    bucketed: bool

    @property
    def key(self) -> str:
        """Its name in results."""
        return f"{self.name} on {'bucketed' if self.bucketed else 'random'} batches"


NAMES = (THEIRS, "none", "fitted", "uniform", "pad")
METHODS = tuple(Method(name, bucketed) for bucketed in (False, True) for name in NAMES)


class Clock:
    """Time what comes after some steps, until the last one.

    Args:
        warm_up: Steps that are not timed.
        steps: Steps that are.
        device: "cpu" or "cuda", which is waited for.
    """

    def __init__(self, warm_up: int, steps: int, device: str) -> None:
        self.warm_up, self.last, self.device = warm_up, warm_up + steps, device
        self.started: tuple[float, float] | None = None
        self.seconds: float | None = None
        self.processor_seconds: float | None = None

    def step_ended(self, number: int) -> None:
        """Note that a step, counted from 1, has ended."""
        if number not in (self.warm_up, self.last):
            return
        synchronize(self.device)
        now = (time.perf_counter(), time.process_time())
        if number == self.warm_up:
            self.started = now
        elif self.started is not None:
            self.seconds, self.processor_seconds = (
                end - start for end, start in zip(now, self.started, strict=True)
            )

    def row(self) -> Row:
        """Return what was timed.

        Raises:
            RuntimeError: If training ended before the last step.
        """
        if self.seconds is None:
            raise RuntimeError(f"Expected {self.last} steps, but training ended before.")
        return {"seconds": self.seconds, "processor_seconds": self.processor_seconds}


class LightningClock(Callback):
    """A clock among the callbacks of Lightning's trainer."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Tell the clock."""
        self.clock.step_ended(trainer.global_step)


class TransformersClock(TrainerCallback):
    """A clock among the callbacks of transformers' trainer."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the clock."""
        self.clock.step_ended(state.global_step)


class GivenBatches(DefaultBatchSampler):
    """Batches of rows that were chosen before."""

    def __init__(self, dataset: Any, batches: list[list[int]], **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.batches = batches

    def __len__(self) -> int:
        """Return their number."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches."""
        yield from self.batches


def choose_batches(
    lengths: Sequence[int], batch_size: int, n: int, *, bucketed: bool, seed: int
) -> list[list[int]]:
    """Return the first n batches that xsiam trains on, over as many epochs as that takes."""
    sampler = LengthBucketSampler(lengths, batch_size, bucket=bucketed, seed=seed)
    batches: list[list[int]] = []
    for epoch in range(math.ceil(n / len(sampler))):
        sampler.set_epoch(epoch)
        batches += sampler
    return batches[:n]


class Bench:
    """One model, one set of pairs and one set of settings, trained by either side.

    Args:
        options: The command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.total = options.warm_up + options.steps
        self.config = self._config(METHODS[0])
        module = training_parts.build_module(self.config)
        self.pairs: PairDataset = training_parts.build_data(self.config, module).pairs("train")
        self.fingerprint = module.encoder.model_fingerprint
        self.dataset = Dataset.from_dict(
            {"a": self.pairs.texts_a, "b": self.pairs.texts_b, "label": self.pairs.labels}
        )

    def batches(self, method: Method) -> list[list[int]]:
        """Return the rows of every step."""
        return choose_batches(
            self.pairs.lengths,
            self.options.batch,
            self.total,
            bucketed=method.bucketed,
            seed=self.config.seed,
        )

    def run(self, method: Method) -> Row:
        """Train once and return what was timed."""
        clock = Clock(self.options.warm_up, self.options.steps, self.options.device)
        seed_everything(self.config.seed, workers=True, verbose=False)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train = self.train_theirs if method.name == THEIRS else self.train_ours
            train(method, clock, Path(folder))
        samples = sum(len(rows) for rows in self.batches(method)[self.options.warm_up :])
        return {"samples": samples, **clock.row()}

    def train_ours(self, method: Method, clock: Clock, folder: Path) -> SiameseEncoder:
        """Train with what `xsiam train` trains with; checkpoints and validation apart."""
        config = self._config(method)
        module = training_parts.build_module(config)
        data = training_parts.build_data(config, module)
        callbacks = [SeededSteps(config.seed), LearningRateMonitor("step"), LightningClock(clock)]
        with training._quiet():
            trainer = training_parts.build_trainer(
                config.trainer,
                folder,
                loggers=[TensorBoardLogger(folder, "tensorboard", version=""), HistoryLogger()],
                callbacks=callbacks,
                validates=False,
            )
            trainer.fit(module, datamodule=ResumableData(data))
        return module.encoder

    def train_theirs(self, method: Method, clock: Clock, folder: Path) -> SiameseEncoder:
        """Train the same with SentenceTransformerTrainer."""
        from sentence_transformers import (
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )

        config = self._config(method)
        encoder = training_parts.build_module(config).encoder
        batches = self.batches(method)
        optimizer = config.optimizer
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            max_steps=self.total,
            per_device_train_batch_size=self.options.batch,
            batch_sampler=lambda dataset, **kwargs: GivenBatches(dataset, batches, **kwargs),
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            warmup_steps=math.ceil(optimizer.warmup_fraction * self.total),
            lr_scheduler_type=optimizer.schedule,
            optim="adamw_torch_fused",
            max_grad_norm=config.trainer.gradient_clip_val,
            bf16=PRECISIONS[self.options.precision],
            dataloader_num_workers=self.options.workers,
            dataloader_persistent_workers=self.options.workers > 0,
            logging_steps=LOG_EVERY,
            report_to=["tensorboard"],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=self.options.device == "cpu",
            seed=config.seed,
        )
        trainer = SentenceTransformerTrainer(
            model=encoder.model,
            args=arguments,
            train_dataset=self.dataset,
            loss=LOSSES[self.options.loss](encoder.model),
            callbacks=[TransformersClock(clock)],
        )
        trainer.train()
        return encoder

    def check_inputs(self) -> None:
        """Check that both sides make the same tensors of the same rows.

        Raises:
            RuntimeError: If they do not.
        """
        from sentence_transformers.sentence_transformer.data_collator import (
            SentenceTransformerDataCollator,
        )

        module = training_parts.build_module(self.config)
        data: PairDataModule = training_parts.build_data(self.config, module)
        theirs_of = SentenceTransformerDataCollator(module.encoder.model.preprocess)
        for method in (Method("none", False), Method("none", True)):
            for rows in self.batches(method)[:3]:
                ours = data.collator(self.pairs[rows])
                theirs = theirs_of([self.dataset[row] for row in rows])
                for side in ("a", "b"):
                    for key in ("input_ids", "attention_mask"):
                        if not torch.equal(ours[side][key], theirs[f"{side}_{key}"]):
                            raise RuntimeError(
                                f"Expected the same {key} of texts {side} on both sides, but they "
                                f"differ for rows {rows}."
                            )

    def settings(self) -> Row:
        """Return what all runs of one result have in common."""
        options = self.options
        names = ("loss", "batch", "steps", "warm_up", "precision", "workers", "device")
        content = json.dumps(self.dataset.to_dict(), sort_keys=True).encode()
        return {
            "model_fingerprint": self.fingerprint,
            "data": hashlib.sha256(content).hexdigest()[:16],
            "pairs": len(self.pairs),
            **{name: getattr(options, name) for name in names},
        }

    def _config(self, method: Method) -> TrainConfig:
        options = self.options
        data = ["data.name=bundled", "data.train=train"]
        values = [
            f"model.name={options.model}",
            *(data if options.data is None else [f"data.train={options.data}"]),
            *("data.validation=null", "data.test=null", f"data.batch_size={options.batch}"),
            f"data.num_workers={options.workers}",
            f"data.length_bucketing={str(method.bucketed).lower()}",
            f"objective.name={options.loss}",
            f"trainer.accelerator={options.device}",
            *("trainer.devices=1", f"trainer.precision={options.precision}"),
            *(f"trainer.max_steps={self.total}", f"trainer.max_epochs={self.total}"),
            *(f"trainer.log_every_n_steps={LOG_EVERY}", "trainer.progress_bar=false"),
        ]
        if options.label_range is not None:
            values.append(f"data.label_range={options.label_range}")
        if method.name in (THEIRS, "none"):
            # A model without a shift does not need its reference: no vector is to be fitted.
            values += ["model.shift=false", "model.reference=pad"]
        else:
            values.append(f"model.reference={method.name}")
        return load_config(TrainConfig, [], values)


def read_results(file: Path, machine: Row, settings: Row) -> Row:
    """Return earlier results to go on with, or new ones; refuse those of other conditions."""
    if not file.exists():
        return {"schema_version": SCHEMA_VERSION, "commands": [], "rows": []}
    found: Row = json.loads(file.read_text(encoding="utf-8"))
    for name, own in {"settings": settings, "machine": machine}.items():
        keys = SAME if name == "machine" else tuple(settings)
        for key in keys:
            if found[name].get(key) != own[key]:
                raise SystemExit(
                    f"Expected results with {key} {own[key]!r} in {file}, but got "
                    f"{found[name].get(key)!r}. Set --output to another folder."
                )
    return found


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return a line for each method: samples a second, and how many times the other side's.

    Ratios are medians over the runs, each run against the one of the other side in the same turn.
    """
    speeds: dict[str, dict[int, float]] = {}
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        speeds.setdefault(row["method"], {})[row["run"]] = row["samples"] / row["seconds"]
        times.setdefault(row["method"], {})[row["run"]] = row["samples"] / row["processor_seconds"]
    lines = []
    for method in METHODS:
        if method.key not in speeds:
            continue
        found = sorted(speeds[method.key].values())
        line = {
            "method": method.key,
            "runs": len(found),
            "median": statistics.median(found),
            "lowest": found[0],
            "highest": found[-1],
        }
        for name, bucketed in (("ratio_same", method.bucketed), ("ratio_random", False)):
            other = Method(THEIRS, bucketed).key
            line[name] = _ratio(speeds[method.key], speeds.get(other, {}))
        other = Method(THEIRS, method.bucketed).key
        line["ratio_processor"] = _ratio(times[method.key], times.get(other, {}))
        lines.append(line)
    return lines


def _ratio(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    both = [ours[run] / theirs[run] for run in ours if run in theirs]
    return statistics.median(both) if both else None


def markdown(content: Row) -> str:
    """Return the report."""

    def show(name: str, form: str) -> Any:
        return lambda line: "–" if line[name] is None else form.format(line[name])

    columns = [
        ("method", show("method", "{}")),
        ("runs", show("runs", "{}")),
        ("samples a second", show("median", "{:.1f}")),
        ("lowest", show("lowest", "{:.1f}")),
        ("highest", show("highest", "{:.1f}")),
        (f"÷ {THEIRS}, same batches", show("ratio_same", "{:.3f}")),
        (f"÷ {THEIRS}, random batches", show("ratio_random", "{:.3f}")),
        ("same batches, by processor time", show("ratio_processor", "{:.3f}")),
    ]
    described = {**content["settings"], **content["machine"]}
    lines = [
        "# Training throughput",
        "",
        *(f"    {command}" for command in content["commands"]),
        "",
        *(f"* {key}: {value}" for key, value in described.items()),
        "",
        "A sample is a pair. Methods are references of xsiam, *none* trains without a shift. Runs "
        "take turns; ratios compare those of one turn, and all figures are medians over the runs.",
        "",
    ]
    return "\n".join(lines) + "\n" + table(summary(content["rows"]), columns)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the results")
    add("--data", help="file of labelled sentence pairs (default: the bundled ones)")
    add("--label-range", help='of the labels in the file, such as "[0,5]" (default: [0,1])')
    add("--model", default="all-MiniLM-L6-v2", help="name or folder (%(default)s)")
    add("--loss", choices=tuple(LOSSES), default="cosent", help="%(default)s")
    add("--methods", default=",".join(NAMES), help="some of: %(default)s")
    add("--batch", type=int, default=16, help="pairs in a batch (%(default)s)")
    add("--steps", type=int, default=40, help="timed steps of a run (%(default)s)")
    add("--warm-up", type=int, default=5, help="steps before them (%(default)s)")
    add("--runs", type=int, default=5, help="of each method (%(default)s)")
    add("--precision", choices=tuple(PRECISIONS), default="32-true", help="%(default)s")
    add("--workers", type=int, default=0, help="processes that tokenise (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="%(default)s")
    add("--threads", type=int, help="of torch (its own choice)")
    options = parser.parse_args(arguments)
    if unknown := set(options.methods.split(",")) - set(NAMES):
        raise SystemExit(f"Expected --methods among {', '.join(NAMES)}, but got {unknown}.")
    for name in ("batch", "steps", "warm_up", "runs"):
        if getattr(options, name) < 1:
            key = name.replace("_", "-")
            raise SystemExit(f"Expected --{key} of 1 or more, but got {getattr(options, name)}.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, and write the results."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    bench = Bench(options)
    bench.check_inputs()
    machine, settings = facts(options.device, peak=False), bench.settings()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.json"
    content = read_results(file, machine, settings)
    content |= {"machine": machine, "settings": settings}
    command = shlex.join(["python", "benchmarks/training.py", *arguments])
    content["commands"] = list(dict.fromkeys([*content["commands"], command]))
    done = {(row["method"], row["run"]) for row in content["rows"]}
    for run in range(options.runs):
        for method in METHODS:
            if method.name not in options.methods.split(",") or (method.key, run) in done:
                continue
            row = {"method": method.key, "run": run, **bench.run(method)}
            content["rows"].append(row)
            content["summary"] = summary(content["rows"])
            replace_text(file, json.dumps(content, indent=1))
            replace_text(options.output / "results.md", markdown(content))
            speed = row["samples"] / row["seconds"]
            print(f"run {run}: {method.key}: {speed:.1f} samples a second", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
