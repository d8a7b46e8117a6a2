"""Finished analyses on disk: tables as Parquet and CSV, pictures, and a result to go on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pa_csv

import xsiam
from xsiam.analysis.base import AbstractAnalysis, AnalysisResult, ResultTable
from xsiam.analysis.context import Context
from xsiam.analysis.statistics import Finding, Interval
from xsiam.history import SCHEMA_VERSION
from xsiam.layer_store import write_parquet

__all__ = ["Outcome", "read_outcome", "settings_hash", "write_outcome"]

Status = Literal["finished", "skipped", "failed"]
_FILE = "result.json"


@dataclass(frozen=True)
class Outcome:
    """What became of an analysis.

    Attributes:
        name: The analysis.
        status: "finished", "skipped" (not applicable here) or "failed" (by an error).
        reason: Why it was skipped or has failed.
        result: What it found, where it is finished.
        seconds: Time it took.
        reused: Whether an earlier run found it.
        figures: File names of its pictures.
    """

    name: str
    status: Status
    reason: str | None = None
    result: AnalysisResult | None = None
    seconds: float = 0.0
    reused: bool = False
    figures: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return what `results.json` says of it; the tables stay in its folder."""
        result = self.result
        return {
            "status": self.status,
            "reason": self.reason,
            "reused": self.reused,
            "seconds": self.seconds,
            "findings": [] if result is None else [dataclasses.asdict(f) for f in result.findings],
            "notes": [] if result is None else list(result.notes),
            "tables": [] if result is None else list(result.tables),
            "figures": list(self.figures),
        }


def settings_hash(analysis: AbstractAnalysis, context: Context) -> str:
    """Return a digest of everything that the figures of an analysis depend on."""
    wanted = dataclasses.asdict(context.settings)
    for name in ("names", "models"):
        del wanted[name]
    attributor = dict(context.attributor_settings)
    del attributor["memory_budget"]  # never changes numbers
    models = {}
    for name in analysis.models(context):
        encoder = context.model(name)
        models[name] = [
            *(encoder.model_fingerprint, encoder.similarity, encoder.shift),
            *(encoder.reference_label, encoder.normalize, encoder.max_length),
            *(encoder.model.truncate_dim, encoder.model.prompts, encoder.model.default_prompt_name),
            encoder.trained_on,
        ]
    content = {
        "xsiam": xsiam.__version__,
        "schema_version": SCHEMA_VERSION,
        "analysis": [analysis.name, analysis.version],
        "settings": wanted,
        "attributor": attributor,
        "layers": context.layers,
        "models": models,
        "roles": context.roles,
        "pairs": [context.pairs.texts_a, context.pairs.texts_b, context.pairs.labels],
        "probes": context.probes.digest if analysis.needs.probes else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_outcome(
    folder: Path, analysis: AbstractAnalysis, outcome: Outcome, digest: str | None
) -> Outcome:
    """Write an outcome into its folder; `result.json` comes last, as it says that all is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = outcome.result
    if result is not None:
        for name, table in result.tables.items():
            _write_table(folder / name, table)
        outcome = dataclasses.replace(outcome, figures=_draw(folder, analysis, result))
    content = {
        "schema_version": SCHEMA_VERSION,
        "settings_hash": digest,
        **{name: getattr(outcome, name) for name in ("name", "status", "reason", "seconds")},
        "figures": list(outcome.figures),
        "result": None if result is None else dataclasses.asdict(result),
    }
    part = folder / f"{_FILE}.part"
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(folder / _FILE)
    return outcome


def read_outcome(folder: Path) -> tuple[Outcome, str | None] | None:
    """Return an outcome and the digest of its settings, None where there is none."""
    try:
        content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    if content.get("schema_version") != SCHEMA_VERSION:
        return None
    plain = content["result"]
    result = None
    if plain is not None:
        result = AnalysisResult(
            tables={name: ResultTable(**table) for name, table in plain["tables"].items()},
            metrics=plain["metrics"],
            findings=[
                Finding(**{**entry, "interval": Interval(**entry["interval"])})
                for entry in plain["findings"]
            ],
            notes=plain["notes"],
        )
    fields = {name: content[name] for name in ("name", "status", "reason", "seconds")}
    outcome = Outcome(**fields, result=result, figures=tuple(content["figures"]))
    return outcome, content["settings_hash"]


def analysis_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the flat figures of all finished analyses, ``analysis/<name>/<key>``."""
    return {
        f"analysis/{outcome.name}/{key}": value
        for outcome in outcomes
        if outcome.result is not None
        for key, value in outcome.result.metrics.items()
    }


def check_result(result: AnalysisResult) -> None:
    """Raise ValueError where a result breaks what it promises, naming the table and column."""
    for name, table in result.tables.items():
        columns = list(table.rows[0]) if table.rows else []
        for row in table.rows:
            if list(row) != columns:
                raise ValueError(f"Expected equal columns in table {name!r}, but got {list(row)}.")
            for column, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"Expected finite values in {name}.{column}, but got {value}.")
    for key, value in result.metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"Expected a finite metric {key!r}, but got {value}.")


def _write_table(path: Path, table: ResultTable) -> None:
    columns = pa.Table.from_pylist([dict(row) for row in table.rows])
    write_parquet(path.with_suffix(".parquet"), columns)
    pa_csv.write_csv(columns, path.with_suffix(".csv"))


def _draw(folder: Path, analysis: AbstractAnalysis, result: AnalysisResult) -> tuple[str, ...]:
    from xsiam.plots import save_figure  # matplotlib is slow to import

    names = []
    for name, figure in analysis.plot(result).items():
        save_figure(figure, folder / f"{name}.png")
        names.append(f"{name}.png")
    return tuple(names)
