"""The rows of a run on disk: every finished one at once, as JSON and CSV, and taken up again."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from machine import SAME

Row = dict[str, Any]
SCHEMA_VERSION = 1
COLUMNS = (
    *("section", "model", "layer", "method", "title", "status", "seconds", "peak_bytes"),
    *("n_nodes", "n_nodes_max", "completeness_error", "token_error", "converged", "tolerance"),
    *(
        "score",
        "score_explained",
        "matrix_sum",
        "sum_error",
        "pairs",
        "flops",
        "peak_flops",
        "note",
    ),
)


class Results:
    """Rows by the key of their case, in the order they came.

    Args:
        folder: Where ``results.json``, ``results.csv`` and the matrices go.
        resume: Whether rows may be there already.

    Raises:
        ValueError: If there are rows and ``resume`` was not asked for, or if they are damaged or
            of another format.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        self.folder = folder
        self.rows: dict[str, Row] = {}
        self.machine: Row = {}
        self.commands: list[str] = []
        self.models: dict[str, str] = {}
        if self.file.exists():
            if not resume:
                raise ValueError(
                    f"Expected a folder without results, but {folder} has some. Add --resume to go "
                    "on with them, or set --output to another folder."
                )
            self._load()
        (folder / "matrices").mkdir(parents=True, exist_ok=True)

    @property
    def file(self) -> Path:
        """The JSON file."""
        return self.folder / "results.json"

    def begin(self, command: str, machine: Row, models: dict[str, str]) -> None:
        """Note how rows are made from now on.

        Raises:
            ValueError: If earlier rows were made on another machine or with other settings.
        """
        for name in SAME if self.rows else ():
            if self.machine.get(name) != machine[name]:
                raise ValueError(
                    f"Expected the same `{name}` as in {self.file}, "
                    f"{self.machine.get(name)!r}, but got {machine[name]!r}. Set --output to "
                    "another folder: figures of two machines do not compare."
                )
        # The best of all measurements: another process may have been busy during one of them.
        peak = max(machine["peak_flops"], self.machine.get("peak_flops", 0.0))
        self.machine = machine | {"peak_flops": peak}
        self.models |= models
        if command not in self.commands:
            self.commands.append(command)
        self._write()

    def has(self, case: Case) -> bool:
        """Say whether the row is there; failed ones are tried again."""
        row = self.rows.get(case.key)
        return row is not None and row["status"] in ("ok", "timeout")

    def add(self, case: Case, answer: Row) -> Row:
        """Add or replace one row and write all files."""
        answer = dict(answer)
        matrix = answer.pop("matrix", None)
        facts = {k: v for k, v in case.to_dict().items() if k != "settings"}
        row = {**facts, "settings": case.settings, **answer}
        if matrix is not None:
            np.save(self._matrix_file(case.key), np.asarray(matrix, dtype=np.float64))
        self.rows[case.key] = row
        self._write()
        return row

    def matrix(self, key: str) -> np.ndarray[Any, Any] | None:
        """Return the matrix of a row, or None where it has none."""
        file = self._matrix_file(key)
        return np.load(file) if file.exists() else None

    def _matrix_file(self, key: str) -> Path:
        return self.folder / "matrices" / (hashlib.sha1(key.encode()).hexdigest()[:16] + ".npy")

    def _load(self) -> None:
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            version = content["schema_version"]
            rows = {Case(**_case_of(row)).key: row for row in content["rows"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected results of this benchmark in {self.file}, but reading failed: {error}."
            ) from error
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"Expected format {SCHEMA_VERSION} in {self.file}, but it has format {version}. "
                "Set --output to another folder."
            )
        self.rows = rows
        self.machine, self.commands = content["machine"], content["commands"]
        self.models = content["models"]

    def _write(self) -> None:
        """Write both files anew; each is complete at any time."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "commands": self.commands,
            "machine": self.machine,
            "models": self.models,
            "rows": list(self.rows.values()),
        }
        replace_text(self.file, json.dumps(content, indent=1))
        temporary = self.folder / "results.csv.part"
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(self.rows.values())
        temporary.replace(self.folder / "results.csv")


def replace_text(file: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one."""
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def _case_of(row: Row) -> Row:
    return {name: row[name] for name in ("section", "model", "layer", "method", "title")}
