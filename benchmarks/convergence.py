r"""Does every text reach the tolerance at every layer, with how many nodes and how fast?

    python benchmarks/convergence.py --data stsb/test.csv --output results/convergence
    python benchmarks/convergence.py --data stsb/test.csv --model all-mpnet-base-v2 --layers 11-9 \
        --pairs 100 --output results/convergence-mpnet

The first pairs of a file are attributed at default settings, exact head with cosine similarity. One
line of ``rows.jsonl`` is written for every finished batch of texts, and a second call goes on where
the first one stopped, or adds layers. ``table.md`` is made from the rows. Nothing of the data but
numbers is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import facts
from results import replace_text

from xsiam import ConvergenceWarning, PairAttributor, SiameseEncoder, TruncationWarning
from xsiam.pairs import load_pairs

Row = dict[str, Any]
_WARM_UP = "A child throws a ball over the fence."


def main(arguments: Sequence[str] | None = None) -> int:
    """Attribute what has no row yet, and write the table."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pairs = load_pairs(options.data)
    if len(pairs) < options.pairs:
        raise SystemExit(
            f"Expected at least --pairs {options.pairs} pairs, but {options.data} has {len(pairs)}."
        )
    both = zip(pairs.texts_a[: options.pairs], pairs.texts_b[: options.pairs], strict=True)
    texts = list(dict.fromkeys(text for pair in both for text in pair))
    encoder = SiameseEncoder.from_pretrained(
        options.model,
        similarity="cos",
        shift=True,
        reference=options.reference,
        device=options.device,
    )
    layers = parse_layers(options.layers, encoder.n_layers)
    settings = {
        "model_fingerprint": encoder.model_fingerprint,
        "reference": options.reference,
        "tolerance": options.tolerance,
        "data": hashlib.sha256(Path(options.data).read_bytes()).hexdigest()[:16],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    rows = read_rows(options.output / "rows.jsonl", settings)
    warnings.simplefilter("ignore", ConvergenceWarning)  # every row says it
    warnings.simplefilter("ignore", TruncationWarning)
    command = shlex.join(["python", "benchmarks/convergence.py", *arguments])
    for layer in layers:
        attributor = PairAttributor(encoder, layer, tolerance=options.tolerance, cache_size=1)
        for row in attribute(attributor, texts, options, rows):
            rows.append(row | {"settings": settings, "pairs": options.pairs, "command": command})
            with (options.output / "rows.jsonl").open("a", encoding="utf-8") as file:
                print(json.dumps(rows[-1]), file=file, flush=True)
            replace_text(options.output / "table.md", table(rows, options.device))
            print(
                f"layer {layer}: {row['first'] + len(row['n_nodes'])} of {len(texts)}", flush=True
            )
    replace_text(options.output / "table.md", table(rows, options.device))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--data", required=True, help="file of sentence pairs")
    add("--output", type=Path, required=True, help="folder of the results")
    add("--model", default="all-MiniLM-L6-v2", help="name or folder (%(default)s)")
    add("--layers", help='such as "11-9" or "5,3,0" (all)')
    add("--pairs", type=int, default=200, help="how many, from the start of the file (%(default)s)")
    add("--batch", type=int, default=40, help="texts of one call (%(default)s)")
    add("--tolerance", type=float, default=1e-3)
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--reference", default="pad")
    add("--threads", type=int, help="of torch (its own choice)")
    return parser.parse_args(arguments)


def parse_layers(text: str | None, top: int) -> list[int]:
    """Return the layers that "11-9,5" names, or all from the top."""
    if text is None:
        return list(range(top, -1, -1))
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            step = -1 if last and int(last) < int(first) else 1
            layers += range(int(first), int(last or first) + step, step)
    except ValueError:
        raise SystemExit(
            f'Expected --layers such as "11-9" or "5,3,0", but got {text!r}.'
        ) from None
    if not layers or not all(0 <= layer <= top for layer in layers):
        raise SystemExit(f"Expected --layers between 0 and {top}, but got {text!r}.")
    return layers


def read_rows(path: Path, settings: Row) -> list[Row]:
    """Return the rows of earlier calls; refuse those of another model, data or setting."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # stopped while it was written
        lines.pop()
        replace_text(path, "".join(lines))
    rows = [json.loads(line) for line in lines]
    for row in rows:
        for key, value in settings.items():
            if row["settings"][key] != value:
                raise SystemExit(
                    f"Expected rows with {key} {value!r} in {path}, but got "
                    f"{row['settings'][key]!r}. Set --output to another folder."
                )
    return rows


def attribute(
    attributor: PairAttributor, texts: list[str], options: argparse.Namespace, rows: list[Row]
) -> Any:
    """Yield a row for every batch of texts that has none at this layer."""
    done = {
        number
        for row in rows
        if row["layer"] == attributor.layer
        for number in range(row["first"], row["first"] + len(row["n_nodes"]))
    }
    missing = [number for number in range(len(texts)) if number not in done]
    if missing:
        attributor.token_vectors([_WARM_UP])
    while missing:
        first = missing[0]
        batch = [n for n in missing[: options.batch] if n - first < options.batch]
        batch = batch[: next((k for k, n in enumerate(batch) if n != first + k), len(batch))]
        start = time.perf_counter()
        found = attributor.token_vectors([texts[n] for n in batch])
        seconds = time.perf_counter() - start
        missing = missing[len(batch) :]
        yield {
            "layer": attributor.layer,
            "first": first,
            "seconds": seconds,
            "tokens": [len(text.tokens) for text in found],
            "n_nodes": [text.n_nodes for text in found],
            "completeness_error": [text.completeness_error for text in found],
            "token_error": [text.token_error for text in found],
            "converged": [text.converged for text in found],
        }


def table(rows: Sequence[Row], device: str) -> str:
    """Return the rows as Markdown: what was run, and one line for each layer."""
    machine = facts(device, peak=False)
    commands = list(dict.fromkeys(row["command"] for row in rows))
    settings = rows[0]["settings"] if rows else {}
    lines = [
        "# Nodes to tolerance",
        "",
        *(f"    {command}" for command in commands),
        "",
        *(f"* {key}: {value}" for key, value in {**settings, **machine}.items()),
        "",
        "Texts are distinct ones of the pairs; seconds are per text, median over batches.",
        "",
        "| layer | texts | nodes: median | p95 | max | s per text | largest completeness error "
        "| largest token error | converged |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for layer in sorted({row["layer"] for row in rows}, reverse=True):
        some = [row for row in rows if row["layer"] == layer]
        nodes, errors, tokens, converged = (
            np.concatenate([row[key] for row in some])
            for key in ("n_nodes", "completeness_error", "token_error", "converged")
        )
        seconds = float(np.median([row["seconds"] / len(row["n_nodes"]) for row in some]))
        lines.append(
            f"| {layer} | {len(nodes)} | {np.median(nodes):.0f} | {np.percentile(nodes, 95):.0f} "
            f"| {nodes.max()} | {seconds:.3g} | {errors.max():.1e} | {tokens.max():.1e} "
            f"| {int(converged.sum())} ({converged.mean():.1%}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
