"""The published recipe from every reference, several seeds each, beside the model without a shift.

    python benchmarks/recipes.py --train stsb/train.csv --validation stsb/validation.csv \
        --test stsb/test.csv --output results/recipes

Every run trains by ``configs/stsb_minilm.yaml`` with another reference or seed; ``none`` has no
shift, ``fitted-trained`` trains the fitted vector along, ``sentence-transformers`` is the same
recipe in ``SentenceTransformerTrainer`` as a check from outside; the last two with the first seed
only. All are measured alike: the weights that are best on the validation pairs, on all test pairs;
and the nodes that attributions of the first test pairs take at every layer at the default
tolerance.

A finished run is a file at once, and the same command goes on: with the runs that are missing, and
within a run from its last checkpoint. ``key=value`` arguments override the configuration. Nothing
of the data but numbers is written beside the runs. Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from convergence import parse_layers
from lightning.pytorch import seed_everything
from machine import facts
from results import replace_text
from tables import table as markdown_table

from xsiam import ConvergenceWarning, PairAttributor, SiameseEncoder
from xsiam.config import TrainConfig, load_config
from xsiam.metrics import pearson, spearman
from xsiam.pairs import PairDataset, load_pairs
from xsiam.training import run_training
from xsiam.training_parts import build_module

Row = dict[str, Any]
CONFIG = Path(__file__).parents[1] / "configs" / "stsb_minilm.yaml"
SPLITS = ("train", "validation", "test")
UNMODIFIED, NONE, THEIRS = "unmodified", "none", "sentence-transformers"
TRAINED = "fitted-trained"
METHODS = (UNMODIFIED, NONE, "uniform", "pad", "fitted", TRAINED, THEIRS)
_VALIDATION = "validation"  # the name of their evaluator


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, one round of all methods for every seed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    (options.output / "rows").mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", ConvergenceWarning)  # every row says it
    settings = {
        **{s: hashlib.sha256(getattr(options, s).read_bytes()).hexdigest()[:16] for s in SPLITS},
        "recipe": hashlib.sha256(CONFIG.read_bytes()).hexdigest()[:16],
        "overrides": options.overrides,
        "model": options.model,
        "pairs": options.pairs,
    }
    for method, seed in planned(options):
        file = options.output / "rows" / f"{method}-{seed}.json"
        if not done(file, settings):
            row = run(method, seed, options)
            content = {**row, "method": method, "seed": seed, "settings": settings}
            replace_text(file, json.dumps(content, indent=1))
            print(f"{method}, seed {seed}: {row['test_spearman']:.4f} on test", flush=True)
        replace_text(options.output / "table.md", report(options, arguments, settings))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    for split in SPLITS:
        add(f"--{split}", type=Path, required=True, help="labelled file of sentence pairs")
    add("--output", type=Path, required=True, help="folder of runs and results")
    add("--model", default="all-MiniLM-L6-v2", help="name or folder (%(default)s)")
    add("--methods", default=",".join(METHODS), help="some of: %(default)s")
    add("--seeds", default="0,1,2", help="%(default)s")
    add("--pairs", type=int, default=20, help="pairs whose nodes are counted (%(default)s)")
    add("--layers", help='layers to count nodes at, such as "5-0" (all)')
    add("overrides", nargs="*", metavar="key=value", help="of the configuration")
    options = parser.parse_intermixed_args(arguments)
    unknown = set(options.methods.split(",")) - set(METHODS)
    if unknown:
        raise SystemExit(f"Expected --methods among {', '.join(METHODS)}, but got {unknown}.")
    return options


def planned(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return methods and seeds in the order of their runs."""
    methods = options.methods.split(",")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    once = (UNMODIFIED, TRAINED, THEIRS)
    return [(m, seed) for seed in seeds for m in methods if m not in once or seed == seeds[0]]


def done(file: Path, settings: Row) -> bool:
    """Whether a run is finished; refuse one of other settings."""
    if not file.exists():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))["settings"]
    if found != settings:
        raise SystemExit(
            f"Expected rows of {settings} in {file.parent}, but {file.name} is of {found}. Set "
            "--output to another folder."
        )
    return True


def run(method: str, seed: int, options: argparse.Namespace) -> Row:
    """Train once, unless that is done, and measure."""
    start, resumed = time.perf_counter(), False
    row: Row = {}
    if method == UNMODIFIED:
        encoder = SiameseEncoder.from_pretrained(
            options.model, similarity="cos", shift=False, reference="pad"
        )
    elif method == THEIRS:
        encoder = train_theirs(configuration(NONE, seed, options))
    else:
        config = configuration(method, seed, options)
        output = Path(config.output_dir)
        resumed = config.resume is not None
        if (output / "results.json").exists():  # trained, but not measured yet
            metrics = json.loads((output / "results.json").read_text("utf-8"))["metrics"]
            resumed = True
        else:
            metrics = run_training(config).metrics
        row["validation_spearman"] = metrics["val/spearman_cosine"]
        encoder = SiameseEncoder.from_pretrained(output / "export", reference=reference_of(method))
    if method != UNMODIFIED:
        row["training_seconds"] = None if resumed else time.perf_counter() - start
    return row | measure(encoder, options)


def reference_of(method: str) -> str | None:
    """Return the reference that attributions of an export start from; None is its own."""
    return "pad" if method == NONE else None


def configuration(method: str, seed: int, options: argparse.Namespace) -> TrainConfig:
    """Return the configuration of a run, which goes on where it stopped."""
    output = options.output / "runs" / f"{method}-{seed}"
    last = output / "checkpoints" / "last.ckpt"
    reference = {
        NONE: ["model.shift=false", "model.reference=pad"],
        TRAINED: ["model.reference=fitted", "model.train_reference=true"],
    }.get(method, [f"model.reference={method}"])
    values = [
        f"model.name={options.model}",
        *reference,
        *(f"data.{split}={getattr(options, split)}" for split in SPLITS),
        f"output_dir={output}",
        f"seed={seed}",
        "trainer.progress_bar=false",
        *([f"resume={last}"] if last.exists() else []),
        *options.overrides,
    ]
    return load_config(TrainConfig, [CONFIG], values)


def train_theirs(config: TrainConfig) -> SiameseEncoder:
    """Train by the same recipe with SentenceTransformerTrainer; the best weights on validation."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
    )
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    seed_everything(config.seed, workers=True, verbose=False)
    encoder = build_module(config).encoder
    train, validation = load_pairs(config.data.train), load_pairs(config.data.validation)
    optimizer = config.optimizer
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=encoder.model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                num_train_epochs=config.trainer.max_epochs,
                max_steps=config.trainer.max_steps or -1,
                per_device_train_batch_size=config.data.batch_size,
                learning_rate=optimizer.learning_rate,
                weight_decay=optimizer.weight_decay,
                warmup_ratio=optimizer.warmup_fraction,
                lr_scheduler_type=optimizer.schedule,
                max_grad_norm=config.trainer.gradient_clip_val,
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                load_best_model_at_end=True,
                metric_for_best_model=f"eval_{_VALIDATION}_spearman_cosine",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                seed=config.seed,
            ),
            train_dataset=Dataset.from_dict(
                {"a": train.texts_a, "b": train.texts_b, "label": train.labels}
            ),
            loss=CosineSimilarityLoss(encoder.model),
            evaluator=EmbeddingSimilarityEvaluator(
                validation.texts_a, validation.texts_b, validation.labels, name=_VALIDATION
            ),
        )
        trainer.train()
    return encoder.eval()


def measure(encoder: SiameseEncoder, options: argparse.Namespace) -> Row:
    """Return correlations on all test pairs, and nodes on the first ones."""
    pairs: PairDataset = load_pairs(options.test)
    scores = encoder.score(pairs.texts_a, pairs.texts_b).cpu()
    labels = torch.tensor(pairs.labels)
    row: Row = {
        "test_spearman": float(spearman(scores, labels)),
        "test_pearson": float(pearson(scores, labels)),
        "layers": {},
    }
    texts = pairs.texts_a[: options.pairs], pairs.texts_b[: options.pairs]
    for layer in parse_layers(options.layers or f"{encoder.n_layers - 1}-0", encoder.n_layers):
        found = PairAttributor(encoder, layer).attribute(*texts)
        row["layers"][str(layer)] = {
            "nodes": [n for result in found for n in (result.n_nodes_a, result.n_nodes_b)],
            "completeness_error": max(result.completeness_error for result in found),
            "converged": sum(result.converged for result in found) / len(found),
        }
    return row


def report(options: argparse.Namespace, arguments: Sequence[str], settings: Row) -> str:
    """Return what is there as Markdown."""
    files = sorted((options.output / "rows").glob("*.json"))
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files if done(file, settings)]
    grouped = {m: [r for r in rows if r["method"] == m] for m in METHODS}
    lines = [lines_of(method, found, grouped[NONE]) for method, found in grouped.items() if found]
    layers = sorted({int(layer) for row in rows for layer in row["layers"]}, reverse=True)
    columns = [
        (name, _shown(key, form))
        for name, key, form in (
            ("method", "method", "{}"),
            ("seeds", "seeds", "{}"),
            ("test Spearman", "spearman", "{:.2f}"),
            ("of each seed", "each", "{}"),
            ("− no shift", "difference", "{:+.2f}"),
            ("test Pearson", "pearson", "{:.2f}"),
            ("validation Spearman", "validation", "{:.2f}"),
            ("minutes", "minutes", "{:.1f}"),
        )
    ]
    nodes = [(f"layer {n}", _shown(f"nodes_{n}", "{}")) for n in layers]
    return "\n".join(
        [
            "# The published recipe from every reference",
            "",
            f"    {shlex.join(['python', 'benchmarks/recipes.py', *arguments])}",
            "",
            *(f"* {key}: {value}" for key, value in facts("cpu", peak=False).items()),
            f"* model {settings['model']}, nodes on {settings['pairs']} pairs",
            "",
            "Correlations are means over the seeds, times 100. A run that was interrupted has no "
            "time.",
            "",
            markdown_table(lines, columns),
            "Nodes of a text: median (95th percentile), largest completeness error; all seeds.",
            "",
            markdown_table(lines, [columns[0], *nodes]),
        ]
    )


def lines_of(method: str, rows: Sequence[Row], base: Sequence[Row]) -> Row:
    """Return the line of a method; differences are of means over the seeds that both have."""
    mean = statistics.fmean
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in base}
    both = [
        mean(row["test_spearman"] for row in some if row["seed"] in seeds)
        for some in (rows, base)
        if seeds
    ]
    seconds = [r["training_seconds"] for r in rows if r.get("training_seconds") is not None]
    validation = [r["validation_spearman"] for r in rows if "validation_spearman" in r]
    line: Row = {
        "method": method,
        "seeds": len(rows),
        "spearman": 100 * mean(row["test_spearman"] for row in rows),
        "each": ", ".join(f"{100 * row['test_spearman']:.2f}" for row in rows),
        "difference": 100 * (both[0] - both[1]) if both else None,
        "pearson": 100 * mean(row["test_pearson"] for row in rows),
        "validation": 100 * mean(validation) if validation else None,
        "minutes": mean(seconds) / 60 if seconds else None,
    }
    for layer in rows[0]["layers"]:
        nodes = sorted(n for row in rows for n in row["layers"][layer]["nodes"])
        error = max(row["layers"][layer]["completeness_error"] for row in rows)
        high = nodes[min(len(nodes) - 1, round(0.95 * len(nodes)))]
        line[f"nodes_{layer}"] = f"{statistics.median(nodes):g} ({high}), {error:.1e}"
    return line


def _shown(key: str, form: str) -> Any:
    return lambda row: "–" if row.get(key) is None else form.format(row[key])


if __name__ == "__main__":
    sys.exit(main())
