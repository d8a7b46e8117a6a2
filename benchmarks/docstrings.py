"""Contrastive training on the documentation of the running Python, against its base model.

    python benchmarks/docstrings.py --output results/docstrings

A docstring of the standard library is a pair: its first sentence is the anchor, the rest of it the
positive. Source files are parsed, nothing is imported. Top-level modules, not pairs, are shared out
over training, validation and test, so that tests ask about modules that training has not seen. The
model is trained by ``configs/docstrings_minilm.yaml``, and both rank the held-out positives.

The interval of the difference is that of a bootstrap over modules, whose docstrings are alike. A
training that was interrupted goes on; what is finished is not done again. ``key=value`` arguments
override the configuration.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import random
import re
import sys
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import facts
from results import replace_text

from xsiam import SiameseEncoder
from xsiam.config import TrainConfig, load_config
from xsiam.errors import TruncationWarning
from xsiam.retrieval import RETRIEVAL_FIGURES, figures_by_anchor
from xsiam.training import run_training

CONFIG = Path(__file__).parents[1] / "configs" / "docstrings_minilm.yaml"
SPLITS = ("train", "validation", "test")
SHARES = (0.7, 0.1, 0.2)  # of the modules, by their docstrings
SEED = 0
FEWEST_WORDS = 3  # of an anchor and of a positive
SKIPPED = {"test", "tests", "idle_test", "site-packages", "lib2to3"}
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Pair:
    """A docstring: its first sentence, the rest, and the top-level module that it is from."""

    anchor: str
    positive: str
    module: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect, train and compare."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    splits = share_out(collect(Path(sysconfig.get_paths()["stdlib"])))
    files = {split: write(options.output, split, splits[split]) for split in SPLITS}
    config = configure(options, files)
    trained = train(config)
    warnings.simplefilter("ignore", TruncationWarning)  # the same of both models
    base = SiameseEncoder.from_pretrained(
        config.model.name, similarity="cos", shift=False, max_length=config.model.max_length
    )
    found = {
        "base": figures(base, splits["test"]),
        "trained": figures(SiameseEncoder.from_pretrained(trained), splits["test"]),
    }
    results = compare(found, [pair.module for pair in splits["test"]])
    results["pairs"] = {split: len(pairs) for split, pairs in splits.items()}
    results["modules"] = {s: len({pair.module for pair in pairs}) for s, pairs in splits.items()}
    results["machine"] = facts("cpu", peak=False)
    results["command"] = " ".join(["python", "benchmarks/docstrings.py", *arguments])
    replace_text(options.output / "results.json", json.dumps(results, indent=2) + "\n")
    replace_text(options.output / "table.md", table(results))
    print(table(results))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    return parser.parse_args(arguments)


def collect(library: Path) -> list[Pair]:
    """Return the pairs of all docstrings below a folder of Python sources, each text once."""
    pairs: dict[str, Pair] = {}
    positives: set[str] = set()
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if SKIPPED & set(parts) or parts[0] not in sys.stdlib_module_names:
            continue
        for docstring in docstrings(file):
            pair = pair_of(docstring, parts[0])
            if pair is not None and pair.anchor not in pairs and pair.positive not in positives:
                pairs[pair.anchor] = pair
                positives.add(pair.positive)
    return list(pairs.values())


def docstrings(file: Path) -> Iterator[str]:
    """Yield the docstrings of a source file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates and samples of wrong code are no modules
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def pair_of(docstring: str, module: str) -> Pair | None:
    """Return first sentence and rest of a docstring, None where one of them says too little."""
    first, _, rest = partition(docstring)
    anchor, positive = " ".join(first.split()), " ".join(rest.split())
    if min(len(text.split()) for text in (anchor, positive)) < FEWEST_WORDS:
        return None
    return Pair(anchor, positive, module)


def partition(text: str) -> tuple[str, str, str]:
    """Return what stands before the end of the first sentence, the gap, and what comes after."""
    found = SENTENCE.search(text)
    return (
        (text, "", "") if found is None else (text[: found.start()], found[0], text[found.end() :])
    )


def share_out(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Share modules out over the splits, whole ones, in a seeded order."""
    by_module = defaultdict(list)
    for pair in pairs:
        by_module[pair.module].append(pair)
    modules = sorted(by_module)
    random.Random(SEED).shuffle(modules)
    splits: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for module in modules:
        behind = [
            len(splits[split]) / (share * len(pairs))
            for split, share in zip(SPLITS, SHARES, strict=True)
        ]
        splits[SPLITS[int(np.argmin(behind))]] += by_module[module]
    return splits


def write(folder: Path, split: str, pairs: Sequence[Pair]) -> Path:
    """Write the pairs of a split as CSV."""
    path = folder / f"{split}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("anchor", "positive"))
        writer.writerows((pair.anchor, pair.positive) for pair in pairs)
    return path


def configure(options: argparse.Namespace, files: dict[str, Path]) -> TrainConfig:
    """Return the configuration of the training."""
    sources = [f"data.{split}={files[split]}" for split in SPLITS]
    run = options.output / "run"
    last = run / "checkpoints" / "last.ckpt"
    resume = [f"resume={last}"] if last.exists() else []
    overrides = [*sources, f"output_dir={run}", *resume, *options.overrides]
    return load_config(TrainConfig, [CONFIG], overrides)


def train(config: TrainConfig) -> Path:
    """Train, unless that is done, and return the folder of the best weights."""
    export = Path(config.output_dir) / "export"
    return (
        export
        if (Path(config.output_dir) / "results.json").exists()
        else run_training(config).export
    )


def figures(encoder: SiameseEncoder, pairs: Sequence[Pair]) -> np.ndarray:
    """Return the figures of every anchor, which ranks all positives: [n, 4]."""
    anchors = encoder.encode([pair.anchor for pair in pairs])
    positives = encoder.encode([pair.positive for pair in pairs])
    numbers = torch.arange(len(pairs))
    found: np.ndarray = figures_by_anchor(
        anchors, positives, torch.stack([numbers, numbers], dim=1), similarity=encoder.similarity
    ).numpy()
    return found


def compare(found: dict[str, np.ndarray], modules: Sequence[str]) -> dict[str, Any]:
    """Return means, and differences with their 95 % intervals by a bootstrap over modules."""
    names = sorted(set(modules))
    members = np.array([[name == module for module in modules] for name in names], dtype=float)
    change = found["trained"] - found["base"]
    sums, counts = members @ change, members.sum(axis=1)
    generator = np.random.default_rng(SEED)
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    resampled = (drawn @ sums) / (drawn @ counts)[:, None]
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    rows = {}
    for i, key in enumerate(RETRIEVAL_FIGURES):
        rows[key] = {
            "base": float(found["base"][:, i].mean()),
            "trained": float(found["trained"][:, i].mean()),
            "difference": float(change[:, i].mean()),
            "interval": [float(low[i]), float(high[i])],
        }
    return {"figures": rows, "n_anchors": len(change)}


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    pairs, modules = results["pairs"], results["modules"]
    counts = ", ".join(f"{s} {pairs[s]} ({modules[s]} modules)" for s in SPLITS)
    lines = [
        "# Retrieval of documentation, before and after contrastive training",
        "",
        f"    {results['command']}",
        "",
        *(f"* {key}: {value}" for key, value in results["machine"].items()),
        f"* pairs: {counts}",
        "",
        f"Every one of the {results['n_anchors']} first sentences of held-out modules ranks the "
        f"rests of all their docstrings. Intervals are 95 %, by {RESAMPLES} bootstrap samples of "
        "modules.",
        "",
        "| figure | base model | trained, exact | difference |",
        "|---|--:|--:|--:|",
    ]
    for key, row in results["figures"].items():
        low, high = row["interval"]
        lines.append(
            f"| {key} | {row['base']:.4f} | {row['trained']:.4f} "
            f"| {row['difference']:+.4f} [{low:+.4f}, {high:+.4f}] |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
