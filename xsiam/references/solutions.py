"""Vectors that references were solved for, on disk: a safetensors file for each set of weights."""

from __future__ import annotations

import json
import os
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from xsiam.errors import CheckpointError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SolutionReport:
    """How the reference of one layer and length was found.

    Attributes:
        length: Tokens of the text.
        residual: |e(r)| over |e(text)| of a short text of ours.
        converged: Whether that met the limit.
        distance: |r − r_pad| / |r_pad| over all positions, r_pad with PAD at every one.
        iterations: Jacobians and secant steps.
        seconds: Wall-clock time.
    """

    length: int
    residual: float
    converged: bool
    distance: float
    iterations: int
    seconds: float


@dataclass(frozen=True)
class Solution:
    """The vectors that take turns, [m, D] float64, and how they were found."""

    vectors: Tensor
    report: SolutionReport


def cache_folder(folder: Path | None) -> Path:
    """Return where solutions are kept: ``folder``, `$XSIAM_CACHE`, else `~/.cache/xsiam`."""
    root = folder or Path(os.environ.get("XSIAM_CACHE") or "~/.cache/xsiam").expanduser()
    return root / "references"


def vectors_file(folder: Path | None, name: str, fingerprint: str, dtype: str) -> Path:
    """Return the file of what a reference keeps of one model."""
    return cache_folder(folder) / f"{name}-{fingerprint}-{dtype}.safetensors"


def read_vectors(path: Path, fingerprint: str) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Return the vectors of a file by key, each with its report; none where it does not exist.

    Raises:
        CheckpointError: If the file is damaged, of another format, or of another model.
    """
    if not path.exists():
        return {}
    remedy = f"Delete {path}: it is made anew."
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("xsiam", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"Expected solved references in {path}, but {error}. {remedy}"
        ) from error
    if facts.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"Expected solved references of format {FORMAT_VERSION}, but {path} has "
            f"{facts.get('version')!r}. {remedy}"
        )
    if facts["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"Expected references of the model {fingerprint}, but {path} has those of "
            f"{facts['fingerprint']}. {remedy}"
        )
    if set(facts["reports"]) != set(tensors):
        raise CheckpointError(f"Expected a report for every reference in {path}. {remedy}")
    return {key: (tensors[key], facts["reports"][key]) for key in tensors}


def write_vectors(
    path: Path, fingerprint: str, vectors: Mapping[str, tuple[Tensor, Mapping[str, Any]]]
) -> None:
    """Write a file that appears as a whole or not at all, with what is in it already.

    Warns:
        UserWarning: If that is not possible: what was found then serves this process only.
    """
    try:
        _write(path, fingerprint, {**read_vectors(path, fingerprint), **vectors})
    except OSError as error:
        warnings.warn(
            f"Expected to keep solved references in {path}, but: {error}. They are kept in memory "
            "only. Set `$XSIAM_CACHE` to a folder that can be written.",
            UserWarning,
            stacklevel=4,
        )


def read_solutions(path: Path, fingerprint: str) -> dict[str, Solution]:
    """Return the solutions of a file by key: see :func:`read_vectors`."""
    found = read_vectors(path, fingerprint)
    return {key: Solution(some, SolutionReport(**facts)) for key, (some, facts) in found.items()}


def write_solutions(path: Path, fingerprint: str, solutions: Mapping[str, Solution]) -> None:
    """Write solutions: see :func:`write_vectors`."""
    vectors = {key: (found.vectors, asdict(found.report)) for key, found in solutions.items()}
    write_vectors(path, fingerprint, vectors)


def on_cpu(vectors: Tensor) -> Tensor:
    """Return vectors as they are kept."""
    return vectors.detach().to("cpu", torch.float64)


def _write(
    path: Path, fingerprint: str, vectors: Mapping[str, tuple[Tensor, Mapping[str, Any]]]
) -> None:
    facts = {
        "version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "reports": {key: dict(report) for key, (_, report) in vectors.items()},
    }
    tensors = {key: some.clone() for key, (some, _) in vectors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_bytes(save(tensors, metadata={"xsiam": json.dumps(facts)}))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
