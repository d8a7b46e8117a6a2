r"""What each reference does to scores, to main effects and to the cost of attributions.

    python benchmarks/references.py --data stsb/test.csv --output results/references
    python benchmarks/references.py --data stsb/test.csv --output results/references \
        --tuned runs/stsb/checkpoints/best.ckpt --layers 5,4

Four tables and a picture. Scores: the exact model that each reference makes without training, on
all pairs of a labelled file. Pairs: the UNMODIFIED model's attributions with each reference at each
layer, on the first pairs; with ``--tuned`` also their agreement with a tuned exact model's.
Agreement of the references with each other. Faithfulness: how matrices correlate with leave-one-out
interactions, and what is left of a score as the strongest pairs are taken out
(:mod:`faithfulness`). Agreement is Spearman's correlation of matrix entries without special tokens,
the mean over pairs with a bootstrap interval. ``fitted-2`` is ``fitted`` by another seed,
``fitted-texts`` fitted to keep the scores of ``--fit-texts`` (one a line).

One file is written for every finished reference and layer, and a second call goes on where the
first one stopped. Nothing of the data but numbers is written.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from convergence import parse_layers
from faithfulness import deletion
from machine import facts
from reference_pictures import draw, interval
from results import replace_text
from texts import text_of_length

from xsiam import ConvergenceWarning, PairAttribution, PairAttributor, SiameseEncoder
from xsiam.analysis.matrices import centred, correlation, own_entries
from xsiam.metrics import pearson, spearman
from xsiam.pairs import PairDataset, load_pairs
from xsiam.perturbation import PROTOCOLS, Absence, interactions, mean_state
from xsiam.references import (
    FittedReference,
    MeanReference,
    NeutralReference,
    fit_reference,
    get_reference,
)
from xsiam.references.base import AbstractReference
from xsiam.split import evaluation_mode, features_to

Row = dict[str, Any]
REFERENCES = ("pad", "uniform", "fitted", "neutral", "mask", "unk", "mean", "fitted-2")
_ONE_WORD = ("dog",)  # of texts of which the length alone matters
_LENGTHS = (3, 8, 20, 64, 128, 256)
_WARM_UP = "A child throws a ball over the fence."
_ANOTHER_SEED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what has no file yet, and write the tables."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    data = load_pairs(options.data, label_range=options.label_range)
    options.lengths = parse_lengths(options.lengths)
    plain = SiameseEncoder.from_pretrained(
        options.model, similarity="cos", shift=False, device=options.device
    )
    layers = parse_layers(options.layers, plain.n_layers)
    store = Store(options, plain)
    texts = [t for pair in zip(data.texts_a, data.texts_b, strict=True) for t in pair]
    embeddings: torch.Tensor | None = None
    tuned: dict[int, list[PairAttribution]] = {}
    truths: dict[int, Truth] = {}
    warnings.simplefilter("ignore", ConvergenceWarning)  # every row says it
    for name in options.references.split(","):
        reference, seconds = make(name, plain, texts, options)
        if store.read(name, "scores") is None and reference.can_shift:
            if embeddings is None:
                embeddings = plain.encode(texts, batch_size=64)
            row = score_row(plain, reference, data, embeddings) | {"seconds": seconds}
            store.write(name, "scores", row)
        for layer in layers:
            if store.read(name, f"layer-{layer}") is not None:
                continue
            if options.tuned is not None and layer not in tuned:
                tuned[layer] = attribute(
                    SiameseEncoder.from_pretrained(options.tuned, device=options.device),
                    *(layer, data, options),
                )[0]
            row, results = pair_row(plain, reference, layer, data, options, tuned.get(layer))
            if layer not in truths and options.faithfulness:
                truths[layer] = Truth(plain, results, texts, layer)
            if layer in truths:
                row["faithfulness"] = truths[layer].compare(results)
            store.write(name, f"layer-{layer}", row)
        replace_text(options.output / "table.md", table(store, options, layers, arguments))
    draw(
        {layer: store.of_layer(options.references.split(","), layer) for layer in layers},
        options.output / "table.png",
    )
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--data", required=True, help="labelled file of sentence pairs")
    add("--output", type=Path, required=True, help="folder of the results")
    add("--model", default="all-MiniLM-L6-v2", help="name or folder (%(default)s)")
    add("--references", default=",".join(REFERENCES), help="some of: %(default)s")
    add("--layers", default="5-0", help='such as "11-9" or "5,3,0" (%(default)s)')
    add("--pairs", type=int, default=50, help="pairs to attribute (%(default)s)")
    add("--tolerance", type=float, default=1e-3)
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--tuned", help="checkpoint of an exact model, fine-tuned from the same one")
    add("--fit-texts", type=Path, help="unlabelled texts of fitted-texts, one a line")
    add("--lengths", help='that neutral is solved for beside those of the pairs, such as "4-64"')
    add("--no-faithfulness", dest="faithfulness", action="store_false")
    add("--label-range", type=float, nargs=2, help="of the file, where it is not 0 to 1")
    return parser.parse_args(arguments)


def parse_lengths(text: str | None) -> range:
    """Return the lengths that "4-64" names."""
    try:
        first, last = map(int, (text or "1-0").split("-"))
    except ValueError:
        raise SystemExit(f'Expected --lengths such as "4-64", but got {text!r}.') from None
    return range(first, last + 1)


class Store:
    """One file of plain values for every reference and part, of one model, data and setting."""

    def __init__(self, options: argparse.Namespace, plain: SiameseEncoder) -> None:
        self.folder = options.output / "rows"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = {
            "model_fingerprint": plain.model_fingerprint,
            "data": hashlib.sha256(Path(options.data).read_bytes()).hexdigest()[:16],
            "pairs": options.pairs,
            "tolerance": options.tolerance,
        }

    def read(self, name: str, part: str) -> Row | None:
        """Return a finished row, or None; refuse one of other settings."""
        file = self.folder / f"{name}-{part}.json"
        if not file.exists():
            return None
        row: Row = json.loads(file.read_text(encoding="utf-8"))
        if row["settings"] != self.settings:
            raise SystemExit(
                f"Expected rows of {self.settings} in {self.folder}, but {file.name} is of "
                f"{row['settings']}. Set --output to another folder."
            )
        return row

    def of_layer(self, names: Sequence[str], layer: int) -> dict[str, Row]:
        """Return the finished rows of references at a layer."""
        found = {name: self.read(name, f"layer-{layer}") for name in names}
        return {name: row for name, row in found.items() if row is not None}

    def write(self, name: str, part: str, row: Row) -> None:
        """Write a finished row."""
        file = self.folder / f"{name}-{part}.json"
        replace_text(file, json.dumps({**row, "settings": self.settings}, indent=1))
        print(f"{name} {part}: done", flush=True)


def make(
    name: str, plain: SiameseEncoder, texts: Sequence[str], options: argparse.Namespace
) -> tuple[AbstractReference, float]:
    """Return a reference, ready to use, and the seconds that making it took."""
    start = time.perf_counter()
    if name == "mean":
        reference: AbstractReference = MeanReference.of(plain, list(dict.fromkeys(texts)))
    elif name == "fitted":  # anew, whatever is kept on disk
        reference = fit_reference(plain)
    elif name == "fitted-2":
        reference = fit_reference(plain, seed=_ANOTHER_SEED)
    elif name == "fitted-texts":
        lines = options.fit_texts.read_text(encoding="utf-8").splitlines()
        reference = fit_reference(plain, lines)
    elif name == "neutral":
        reference = NeutralReference(options.output / "solutions")
    else:
        reference = get_reference(name)
        reference.prepare(plain.split, [plain._probe_features()])
    return reference, time.perf_counter() - start


def score_row(
    plain: SiameseEncoder, reference: AbstractReference, data: PairDataset, embeddings: torch.Tensor
) -> Row:
    """Return how the exact model of a reference scores, beside the unmodified one."""
    exact = SiameseEncoder(plain.model, similarity="cos", shift=True, reference=reference)
    texts = [t for pair in zip(data.texts_a, data.texts_b, strict=True) for t in pair]
    shifted = exact.encode(texts, batch_size=64)
    before = plain.similarity_of(embeddings[::2], embeddings[1::2]).cpu()
    after = exact.similarity_of(shifted[::2], shifted[1::2]).cpu()
    labels = torch.tensor(data.labels)
    row: Row = {
        "spearman_unmodified": float(spearman(before, labels)),
        "spearman": float(spearman(after, labels)),
        "rms_difference": float((after - before).pow(2).mean().sqrt()),
        "pearson_with_unmodified": float(pearson(after, before)),
        **shift_sizes(plain, reference),
    }
    if isinstance(reference, FittedReference) and reference.report is not None:
        row["fit"] = dataclasses.asdict(reference.report)
    return row


def shift_sizes(plain: SiameseEncoder, reference: AbstractReference) -> Row:
    """Return |e(r)| over the mean |e| of the bundled text lengths, and its spread over lengths."""
    shifts, sizes = [], []
    with torch.no_grad(), evaluation_mode(plain):
        for length in (n for n in _LENGTHS if n <= (plain.max_length or n)):
            text = text_of_length(plain, length, _ONE_WORD)
            features = features_to(plain.preprocess([text]), plain.device)
            shifts.append(reference.embedding(plain.split, features)[0].double())
            sizes.append(float(plain.split.embed(features).norm()))
    stacked, size = torch.stack(shifts), float(np.mean(sizes))
    return {
        "size": float(stacked.norm(dim=1).mean()) / size,
        "spread": float((stacked - stacked[0]).norm(dim=1).max()) / size,
    }


def attribute(
    encoder: SiameseEncoder, layer: int, data: PairDataset, options: argparse.Namespace
) -> tuple[list[PairAttribution], float]:
    """Attribute the first pairs; return the results and the seconds per pair."""
    n = options.pairs
    texts_a, texts_b = data.texts_a[:n], data.texts_b[:n]
    if encoder.reference.is_layered:  # solved once for each length, and kept: not timed here
        others = [text_of_length(encoder, length, _ONE_WORD) for length in options.lengths]
        texts = (*others, *texts_a, *texts_b)
        batch = [features_to(encoder.preprocess([text]), encoder.device) for text in texts]
        with torch.no_grad():
            encoder.reference.make_ready(encoder.split, layer, batch)
    attributor = PairAttributor(encoder, layer, tolerance=options.tolerance)
    attributor.token_vectors([_WARM_UP])
    start = time.perf_counter()
    results = attributor.attribute(texts_a, texts_b)
    return results, (time.perf_counter() - start) / n


def pair_row(
    plain: SiameseEncoder,
    reference: AbstractReference,
    layer: int,
    data: PairDataset,
    options: argparse.Namespace,
    tuned: list[PairAttribution] | None,
) -> tuple[Row, list[PairAttribution]]:
    """Return what attributions of the unmodified model are like with a reference."""
    encoder = SiameseEncoder(plain.model, similarity="cos", shift=False, reference=reference)
    results, seconds = attribute(encoder, layer, data, options)
    nodes = [n for result in results for n in (result.n_nodes_a, result.n_nodes_b)]
    beside = [float(r.main_effects_a.sum() + r.main_effects_b.sum()) for r in results]
    row: Row = {
        "nodes": nodes,
        "converged": [result.converged for result in results],
        "completeness_error": [result.completeness_error for result in results],
        "seconds_per_pair": seconds,
        "main_effects": beside,
        "intercept": [result.intercept for result in results],
        "score": [result.score for result in results],
        "sum_of_pairs": [float(result.matrix.sum()) for result in results],
    }
    if tuned is not None:
        row["agreement"] = [agreement(a, b) for a, b in zip(results, tuned, strict=True)]
    if isinstance(reference, NeutralReference):
        row["solutions"] = [dataclasses.asdict(r) for r in reference.report(encoder.split, layer)]
    row["matrices"] = [own_entries(result).flatten().tolist() for result in results]
    return row, results


class Truth:
    """What leaving tokens out does to the unmodified model's scores at one layer."""

    def __init__(
        self,
        plain: SiameseEncoder,
        results: Sequence[PairAttribution],
        texts: Sequence[str],
        layer: int,
    ) -> None:
        self._plain = plain
        state = mean_state(plain, list(dict.fromkeys(texts)), layer)
        self._absences = [Absence(protocol, layer, state) for protocol in PROTOCOLS]
        self._interactions = [
            [interactions(plain, result, absence) for result in results]
            for absence in self._absences
        ]

    def compare(self, results: Sequence[PairAttribution]) -> dict[str, dict[str, list[float]]]:
        """Return correlations, raw and double-centred, and deletion, of every pair."""
        found = {}
        matrices = [own_entries(result) for result in results]
        for absence, truth in zip(self._absences, self._interactions, strict=True):
            found[absence.protocol] = {
                "raw": [correlation(m, t) for m, t in zip(matrices, truth, strict=True)],
                "centred": [
                    correlation(centred(m), centred(t))
                    for m, t in zip(matrices, truth, strict=True)
                ],
                "deletion": [
                    deletion(self._plain, result, matrix, absence)
                    for result, matrix in zip(results, matrices, strict=True)
                ],
            }
        return found


def agreement(one: PairAttribution, other: PairAttribution) -> float:
    """Return Spearman's correlation of two matrices of a pair, without special tokens."""
    return correlation(own_entries(one), own_entries(other))


def table(
    store: Store, options: argparse.Namespace, layers: Sequence[int], arguments: Sequence[str]
) -> str:
    """Return everything that is there as Markdown."""
    asked = options.references.split(",")
    names = [n for n in asked if store.read(n, "scores") is not None]
    machine = facts(options.device, peak=False)
    lines = [
        "# References",
        "",
        f"    {shlex.join(['python', 'benchmarks/references.py', *arguments])}",
        "",
        *(f"* {key}: {value}" for key, value in {**store.settings, **machine}.items()),
        "",
        "## Scores of the exact model without training, all pairs",
        "",
        "| reference | \\|e(r)\\| / \\|e\\| | spread over lengths | Spearman | (unmodified) "
        "| RMS score difference | Pearson with unmodified | seconds to make |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        row = store.read(name, "scores")
        assert row is not None
        lines.append(
            f"| {name} | {row['size']:.3g} | {row['spread']:.1e} | {100 * row['spearman']:.2f} "
            f"| {100 * row['spearman_unmodified']:.2f} | {row['rms_difference']:.4f} "
            f"| {row['pearson_with_unmodified']:.4f} | {row['seconds']:.1f} |"
        )
    lines += [
        "",
        f"## Attributions of the unmodified model, {options.pairs} pairs",
        "",
        "Main effects, intercept and the miss of the sum are those of a pair, medians of absolute "
        "values; of the miss the largest too.",
        "",
        "| layer | reference | nodes: median | max | converged | largest completeness error "
        "| s per pair | main effects | intercept | \\|sum of pairs − score\\| "
        "| largest | agreement with the tuned model |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for layer in layers:
        for name in asked:
            row = store.read(name, f"layer-{layer}")
            if row is not None:
                lines.append(f"| {layer} | {name} {_pair_cells(row)}")
    for layer in layers:
        rows = store.of_layer(asked, layer)
        lines += ["", f"## Layer {layer}: agreement of references", "", *_agreement_table(rows)]
        if any("faithfulness" in row for row in rows.values()):
            lines += ["", f"## Layer {layer}: faithfulness", "", *_faithfulness_table(rows)]
    if solved := [(layer, r) for layer in layers if (r := store.read("neutral", f"layer-{layer}"))]:
        lines += ["", "## Neutral references, over lengths", "", *solution_table(solved)]
    return "\n".join(lines) + "\n"


def _agreement_table(rows: dict[str, Row]) -> list[str]:
    """Return the mean agreement of every two references."""
    lines = ["| | " + " | ".join(rows) + " |", "|---|" + "--:|" * len(rows)]
    for name, row in rows.items():
        cells = []
        for other in rows.values():
            pairs = zip(row["matrices"], other["matrices"], strict=True)
            values = [correlation(torch.tensor(a), torch.tensor(b)) for a, b in pairs]
            cells.append(f"{np.nanmean(values):.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _faithfulness_table(rows: dict[str, Row]) -> list[str]:
    """Return correlations with leave-one-out interactions, and deletion, by protocol."""
    heads = [f"{p}: {kind}" for p in PROTOCOLS for kind in ("raw", "centred", "deletion")]
    lines = [
        "Correlation with leave-one-out interactions (higher is better), raw and double-centred;",
        "deletion: the score that is left, mean over steps (lower is better).",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---|" + "--:|" * len(heads),
    ]
    for name, row in rows.items():
        if "faithfulness" in row:
            cells = [
                _interval(values)
                for kinds in row["faithfulness"].values()
                for values in kinds.values()
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def solution_table(solved: Sequence[tuple[int, Row]]) -> list[str]:
    """Return how neutral references were found, one line for each layer."""
    lines = [
        "| layer | lengths | found | largest \\|e(r)\\| / \\|e\\| | distance: median | max "
        "| iterations: median | max | seconds, all |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for layer, row in solved:
        reports = row["solutions"]
        values = {key: [report[key] for report in reports] for key in reports[0]}
        lines.append(
            f"| {layer} | {len(reports)} | {np.mean(values['converged']):.1%} "
            f"| {max(values['residual']):.1e} | {np.median(values['distance']):.2f} "
            f"| {max(values['distance']):.2f} | {np.median(values['iterations']):.0f} "
            f"| {max(values['iterations'])} | {sum(values['seconds']):.1f} |"
        )
    return lines


def _pair_cells(row: Row) -> str:
    off = np.abs(np.subtract(row["sum_of_pairs"], row["score"]))
    return (
        f"| {np.median(row['nodes']):.0f} | {max(row['nodes'])} | {np.mean(row['converged']):.1%} "
        f"| {max(row['completeness_error']):.1e} | {row['seconds_per_pair']:.3g} "
        f"| {np.median(np.abs(row['main_effects'])):.3f} "
        f"| {np.median(np.abs(row['intercept'])):.3f} | {np.median(off):.3f} | {off.max():.1e} "
        f"| {_interval(row.get('agreement'))} |"
    )


def _interval(values: Sequence[float] | None) -> str:
    """Return the mean of values with its 95 % bootstrap interval."""
    if values is None:
        return "–"
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
