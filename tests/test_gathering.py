"""Batches gathered over real processes: the gradients are those of one process with all rows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step import CASES, Case, quietly, shares, step

from xsiam.errors import InputError
from xsiam.gathering import gather_batch
from xsiam.losses import EmbeddedBatch

FLOAT64 = 1e-12  # measured: 1.2e-15
FLOAT32 = 1e-5  # measured: 4.7e-7

Steps = dict[Case, dict[str, Any]]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Steps]:
    """Return what both of two processes got, joined by gloo on the CPU."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "PYTEST"))}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, str(root / "tests" / "one_step.py"), str(folder)],
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    saved = [torch.load(folder / f"process_{rank}.pt", weights_only=True) for rank in range(2)]
    return [dict(zip(CASES, entries, strict=True)) for entries in saved]


@pytest.fixture(scope="module")
def alone() -> Steps:
    """Return what one process gets with all rows."""
    found: Steps = quietly(lambda encoder: {case: step(case, encoder) for case in CASES})
    return found


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of gradients, relative to the largest gradient."""
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max().item() for gradient in theirs.values())
    assert scale > 0
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours) / scale


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_have_the_gradient_of_one(
    case: Case, together: list[Steps], alone: Steps
) -> None:
    bound = FLOAT32 if case.precision == "32-true" else FLOAT64
    for steps_of_rank in together:
        error = difference(steps_of_rank[case]["gradients"], alone[case]["gradients"])
        assert error < bound, error


@pytest.mark.parametrize("case", [case for case in CASES if case.chunk_size is not None], ids=str)
def test_chunks_have_the_gradient_of_the_whole(
    case: Case, together: list[Steps], alone: Steps
) -> None:
    bound = FLOAT32 if case.precision == "32-true" else FLOAT64
    whole = case._replace(chunk_size=None)
    for found in (alone, *together):
        error = difference(found[case]["gradients"], alone[whole]["gradients"])
        assert error < bound, error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_shared_out_and_masked_terms_are_summed(
    case: Case, together: list[Steps], alone: Steps
) -> None:
    first, second = (found[case]["logged"] for found in together)
    expected = alone[case]["logged"]
    mean = (first["train/loss"] + second["train/loss"]) / 2
    assert mean == pytest.approx(expected["train/loss"], rel=1e-5)
    if case.objective == "contrastive":
        # Two rows with the same positive and two with the same anchor, in both directions.
        counts = [values["train/masked_negatives"] for values in (first, second, expected)]
        assert counts == [8, 8, 8]


@pytest.mark.parametrize(
    "case", [Case("contrastive", 1), Case("cosent", 0), Case("distillation", 0)], ids=str
)
def test_the_mean_over_processes_that_gather_nothing_is_another_gradient(
    case: Case, alone: Steps
) -> None:
    """The tests above would see it."""
    first, second = quietly(
        lambda encoder: [step(case, encoder, rows=rows)["gradients"] for rows in shares(case)]
    )
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    assert difference(mean, alone[case]["gradients"]) > 0.02  # measured: 0.054, 0.38, 0.56


def test_different_numbers_of_columns_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values, values + torch.tensor([0, 1])])

    monkeypatch.setattr("xsiam.gathering.gather", with_another)
    batch = EmbeddedBatch(torch.ones(2, 3), torch.ones(2, 3), (torch.ones(2, 3),))
    with pytest.raises(InputError, match=r"but got \[1, 2\]. Set the same `data.train`"):
        gather_batch(batch)
