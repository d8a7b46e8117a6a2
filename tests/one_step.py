"""One training step of several settings, in one process or in one of several; writes gradients.

Started by test_gathering.py with the environment variables of `torch.distributed`.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from models import TEXTS, tiny_model
from torch.utils.data import DataLoader

from xsiam.data import PairCollator
from xsiam.encoder import SiameseEncoder
from xsiam.module import SiameseModule
from xsiam.pairs import PairDataset
from xsiam.sharding import ShardedStrategy, whole


class Case(NamedTuple):
    """One setting of a step."""

    objective: str
    columns: int
    chunk_size: int | None = None
    sizes: tuple[int, int] = (4, 4)  # rows of the first process and of the second
    precision: str = "64-true"
    dims: tuple[int, ...] | None = None
    strategy: str = "ddp"
    recompute: bool = False

    def __str__(self) -> str:
        return "-".join(str(value).replace(", ", "+") for value in self)


CASES = (
    *(Case("contrastive", columns) for columns in (0, 1, 2)),
    *(Case("contrastive", columns, sizes=(5, 3)) for columns in (0, 1)),
    *(Case("contrastive", columns, chunk) for columns in (0, 2) for chunk in (1, 3)),
    Case("contrastive", 1, precision="32-true"),
    Case("contrastive", 1, 3, precision="32-true"),
    Case("cosent", 0),
    Case("cosent", 0, sizes=(5, 3)),
    Case("mse_cosine", 0),
    Case("mse_cosine", 0, recompute=True),
    *(Case("contrastive", 1, chunk, strategy="fsdp", precision="32-true") for chunk in (None, 3)),
    *(
        Case("cosent", 0, strategy="fsdp", precision="32-true", recompute=recompute)
        for recompute in (False, True)
    ),
    Case("distillation", 0),
    Case("distillation", 0, sizes=(5, 3)),
    Case("distillation", 0, 3),
    Case("contrastive", 1, dims=(32, 8, 3)),
    Case("contrastive", 1, 3, dims=(32, 8, 3)),
    Case("distillation", 0, sizes=(5, 3), dims=(32, 8)),
)

WORDS = ("dog", "cat", "kitten", "house", "yard", "garden", "red", "big")


def pairs(columns: int, labelled: bool) -> PairDataset:
    """Return 8 pairs; rows 1 and 6 have the same positive, rows 2 and 5 the same anchor."""
    anchors = [f"{TEXTS[i % 4]} {word}" for i, word in enumerate(WORDS)]
    positives = [f"{word} {TEXTS[(i + 1) % 4]}" for i, word in enumerate(WORDS)]
    positives[6], anchors[5] = positives[1], anchors[2]
    negatives = {
        f"negative_{column}": [f"{word} {WORDS[column]} runs" for word in WORDS]
        for column in range(columns)
    }
    labels = [i / 8 for i in range(8)] if labelled else None
    return PairDataset(anchors, positives, labels, negatives=negatives)


def teacher() -> torch.Tensor:
    """Return a teacher's embeddings of the pairs, of another dimension than ours."""
    vectors = torch.randn(8, 2, 7, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(vectors, dim=-1)


class KeepGradients(Callback):
    """Keep the gradients of the first step, as they are when the optimiser gets them."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients = {
            name: whole(parameter.grad).clone()
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None
        }


def step(
    case: Case, encoder: SiameseEncoder, n_processes: int = 1, rows: Sequence[int] = range(8)
) -> dict[str, Any]:
    """Make one step with some rows on this process; return gradients and logged values."""
    options = {"symmetric": True, "temperature": 0.3} if case.objective == "contrastive" else None
    module = SiameseModule(
        copy.deepcopy(encoder),
        case.objective,
        objective_options=options,
        chunk_size=case.chunk_size,
        activation_checkpointing=case.recompute,
        dims=case.dims,
    )
    several = ShardedStrategy() if case.strategy == "fsdp" else case.strategy
    collate = PairCollator(encoder.preprocess, with_text_ids=module.objective.in_batch)
    data = pairs(case.columns, labelled=module.objective.needs_label)
    keep = KeepGradients()
    trainer = Trainer(
        accelerator="cpu",
        devices=n_processes,
        strategy=several if n_processes > 1 else "auto",
        precision=case.precision,  # type: ignore[arg-type]
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[keep],
    )
    batch = collate(data[list(rows)])
    if module.objective.needs_teacher:
        batch["teacher"] = teacher()[list(rows)]
    trainer.fit(module, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    logged = {key: value.item() for key, value in trainer.logged_metrics.items()}
    return {"gradients": keep.gradients, "logged": logged}


def quietly(make: Callable[[SiameseEncoder], Any]) -> Any:
    """Return what is made of an encoder, where every unexpected warning is an error."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        for message in ("does not have many workers", "no `val_dataloader`", "LeafSpec"):
            warnings.filterwarnings("ignore", message=f".*{message}")
        return make(SiameseEncoder(tiny_model(dropout=0.0), reference="uniform"))


def shares(case: Case) -> tuple[range, range]:
    """Return the rows of both processes."""
    return range(case.sizes[0]), range(case.sizes[0], 8)


if __name__ == "__main__":
    rank = int(os.environ["LOCAL_RANK"])
    # One encoder for all: transformers writes models on the first of several joined processes only.
    found = quietly(lambda encoder: [step(case, encoder, 2, shares(case)[rank]) for case in CASES])
    assert torch.distributed.get_world_size() == 2
    torch.save(found, Path(sys.argv[1]) / f"process_{rank}.pt")
    torch.distributed.destroy_process_group()
