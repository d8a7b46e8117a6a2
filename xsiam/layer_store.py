"""Attributions of a sample at one layer: written when finished, reused where nothing changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import xsiam
from xsiam.accuracy import layer_key, summarise_values, values_of
from xsiam.config import AttributionConfig
from xsiam.encoder import SiameseEncoder
from xsiam.history import SCHEMA_VERSION
from xsiam.pairs import PairDataset
from xsiam.result import PairAttribution

GAP = 0.1
"""Difference of score and matrix sum that counts as large, in units of the score."""


@dataclass(frozen=True)
class LayerResults:
    """The attributions at one layer: a row of numbers a pair, and the examples in full."""

    rows: list[dict[str, Any]]
    examples: dict[int, PairAttribution]
    seconds: float
    notes: list[str]


@dataclass
class LayerStore:
    """A folder of finished layers.

    Attributes:
        folder: Where they are.
        encoder: The model.
        settings: Arguments of `PairAttributor`.
        chosen: The sampled pairs.
        rows: Their row numbers in the data.
        example_rows: Row numbers of the pairs that are kept in full.
        roles: Roles of both sides.
        notes: What a reader has to know is added here.
    """

    folder: Path
    encoder: SiameseEncoder
    settings: Mapping[str, Any]
    chosen: PairDataset
    rows: Sequence[int]
    example_rows: Sequence[int]
    roles: tuple[str | None, str | None]
    notes: list[str] = field(default_factory=list)

    def _paths(self, layer: int) -> tuple[Path, Path]:
        """Return the file of a layer's rows, and the folder of its examples."""
        folder = self.folder / f"layer_{layer}"
        return folder.with_suffix(".parquet"), folder

    def write(self, layer: int, found: LayerResults) -> None:
        """Write a layer; the rows come last, since they say that it is finished."""
        path, folder = self._paths(layer)
        path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for row, result in found.examples.items():
            result.save(folder / f"pair_{row}.safetensors")
        facts = {
            "schema_version": SCHEMA_VERSION,
            "settings_hash": self._settings_hash(layer),
            "model_fingerprint": self.encoder.model_fingerprint,
            "examples": list(found.examples),
            "seconds": found.seconds,
            "notes": found.notes,
        }
        table = pa.Table.from_pylist(found.rows)
        write_parquet(path, table.replace_schema_metadata({"xsiam": json.dumps(facts)}))

    def read(self, layer: int) -> LayerResults | None:
        """Return a layer that was computed before from the same model, pairs and settings."""
        path, folder = self._paths(layer)
        if not path.is_file():
            return None
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            self.notes.append(
                f"Layer {layer} is computed anew: {path.name} cannot be read ({error})."
            )
            return None
        facts = json.loads((table.schema.metadata or {}).get(b"xsiam", b"{}"))
        wanted = self.example_rows
        if facts.get("settings_hash") != self._settings_hash(layer):
            return None
        files = {row: folder / f"pair_{row}.safetensors" for row in wanted}
        if not set(wanted) <= set(facts["examples"]) or not all(
            f.is_file() for f in files.values()
        ):
            return None
        said = f"Layer {layer} is reused from an earlier run with the same settings ({path.name})."
        examples = {row: PairAttribution.load(file) for row, file in files.items()}
        return LayerResults(table.to_pylist(), examples, facts["seconds"], [said, *facts["notes"]])

    def _settings_hash(self, layer: int) -> str:
        """Return a digest of everything that the numbers of a layer depend on."""
        encoder = self.encoder
        settings = dict(self.settings)
        del settings["memory_budget"]  # never changes numbers
        content = {
            "xsiam": xsiam.__version__,
            "schema_version": SCHEMA_VERSION,
            "layer": layer,
            "attribution": settings,
            "model": [encoder.model_fingerprint, repr(encoder.model), str(encoder.dtype)],
            "head": [encoder.similarity, encoder.shift, encoder.reference_label, encoder.normalize],
            "texts": [encoder.max_length, encoder.model.truncate_dim],
            "prompts": [encoder.model.prompts, encoder.model.default_prompt_name, self.roles],
            "pairs": [self.rows, self.chosen.texts_a, self.chosen.texts_b],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def attributor_settings(config: AttributionConfig) -> dict[str, Any]:
    """Return the arguments of `PairAttributor` that are configured."""
    names = ("tolerance", "quadrature", "n_nodes", "max_nodes", "memory_budget", "time_budget")
    return {name: getattr(config, name) for name in names}


def row_of(index: int, result: PairAttribution) -> dict[str, Any]:
    """Return the numbers of one pair; ``n_nodes`` is the mean of both texts."""
    names = ("score", "attributed_score", "residual", "convergence_delta", "completeness_error_a",
             "completeness_error_b", "token_error", "n_nodes_a", "n_nodes_b")  # fmt: skip
    return {
        "index": index,
        "sum": float(result.matrix.sum()),
        **{name: getattr(result, name) for name in names},
        "main_effects_a": float(result.main_effects_a.sum()),
        "main_effects_b": float(result.main_effects_b.sum()),
        "main_effects_a_abs": float(result.main_effects_a.abs().sum()),
        "main_effects_b_abs": float(result.main_effects_b.abs().sum()),
        **values_of(result),
        "converged": result.converged,
    }


def layer_metrics(layer: int, found: LayerResults) -> dict[str, float]:
    """Return accuracy and reference terms of a layer, over the sampled pairs."""
    rows = found.rows
    accuracy = summarise_values(rows, found.seconds)
    gaps = [abs(row["score"] - row["sum"]) for row in rows]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    terms = {
        "main_effects_a_abs_sum_mean": mean([row["main_effects_a_abs"] for row in rows]),
        "main_effects_b_abs_sum_mean": mean([row["main_effects_b_abs"] for row in rows]),
        "intercept_mean": mean([row["intercept"] for row in rows]),
        "score_minus_sum_abs_mean": mean(gaps),
        f"score_minus_sum_above_{GAP}_share": mean([float(gap > GAP) for gap in gaps]),
    }
    metrics = {layer_key(layer, name): value for name, value in accuracy.items()}
    return metrics | {f"reference_terms/layer_{layer}/{name}": v for name, v in terms.items()}


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a file that appears as a whole or not at all."""
    part = path.with_suffix(".parquet.part")
    pq.write_table(table, part)
    part.replace(path)
