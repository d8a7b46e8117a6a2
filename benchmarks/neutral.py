r"""Which lengths and layers have a neutral reference, how far away, and what finding it takes.

    python benchmarks/neutral.py --output results/neutral-lengths
    python benchmarks/neutral.py --output results/neutral-lengths-mpnet \
        --model all-mpnet-base-v2 --layers 11-3

States with e(r) = 0 are solved for at every layer and length; nothing is attributed. One file is
written for every finished layer, and a second call goes on where the first one stopped.
``table.md`` is made from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from convergence import parse_layers
from machine import facts
from references import parse_lengths, solution_table
from results import replace_text
from texts import text_of_length

from xsiam import ConvergenceWarning, SiameseEncoder
from xsiam.references import NeutralReference
from xsiam.split import features_to

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Solve at every layer that has no file yet, and write the table."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    lengths = parse_lengths(options.lengths)
    plain = SiameseEncoder.from_pretrained(
        options.model, similarity="cos", shift=False, reference="pad", device=options.device
    )
    settings = {
        "model_fingerprint": plain.model_fingerprint,
        "lengths": options.lengths,
        **facts(options.device, peak=False),
    }
    layers = parse_layers(options.layers, plain.n_layers)
    reference = NeutralReference(options.output / "solutions")
    encoder = SiameseEncoder(plain.model, similarity="cos", shift=False, reference=reference)
    warnings.simplefilter("ignore", ConvergenceWarning)  # the table says it
    options.output.mkdir(parents=True, exist_ok=True)
    for layer in layers:
        file = options.output / f"layer-{layer}.json"
        if read(file, settings) is None:
            row = {"solutions": solve(encoder, reference, layer, lengths), "settings": settings}
            replace_text(file, json.dumps(row, indent=1))
            print(f"layer {layer}: done", flush=True)
        replace_text(
            options.output / "table.md", table(options.output, layers, settings, arguments)
        )
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the results")
    add("--model", default="all-MiniLM-L6-v2", help="name or folder (%(default)s)")
    add("--layers", help='such as "11-9" or "5,3,0" (all)')
    add("--lengths", default="4-64", help="in tokens (%(default)s)")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    return parser.parse_args(arguments)


def solve(
    encoder: SiameseEncoder, reference: NeutralReference, layer: int, lengths: range
) -> list[Row]:
    """Solve for all lengths at a layer and return the reports, by length."""
    texts = [text_of_length(encoder, length, ("dog",)) for length in lengths]
    batch = [features_to(encoder.preprocess([text]), encoder.device) for text in texts]
    with torch.no_grad():
        reference.make_ready(encoder.split, layer, batch)
    found = reference.report(encoder.split, layer)
    return [dataclasses.asdict(report) for report in found if report.length in lengths]


def read(file: Path, settings: Row) -> Row | None:
    """Return a finished row, or None; refuse one of other settings."""
    if not file.exists():
        return None
    row: Row = json.loads(file.read_text(encoding="utf-8"))
    if row["settings"] != settings:
        raise SystemExit(
            f"Expected rows of {settings} in {file.parent}, but {file.name} is of "
            f"{row['settings']}. Set --output to another folder."
        )
    return row


def table(folder: Path, layers: Sequence[int], settings: Row, arguments: Sequence[str]) -> str:
    """Return what is there as Markdown."""
    rows = [(layer, read(folder / f"layer-{layer}.json", settings)) for layer in layers]
    lines = [
        "# Neutral references over lengths",
        "",
        f"    {shlex.join(['python', 'benchmarks/neutral.py', *arguments])}",
        "",
        *(f"* {key}: {value}" for key, value in settings.items()),
        "",
        *solution_table([(layer, row) for layer, row in rows if row is not None]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
