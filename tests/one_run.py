"""One process of a training run, which can be made to die or to stop; started by test_parallel.py.

Arguments are those of `xsiam train`; DIE_AT names a process, a step and a signal, and VECTORS a
folder where each process writes the vector of its reference, which is moved in all but the first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from xsiam import cli, training
from xsiam.module import SiameseModule
from xsiam.resume import LastCheckpoint


def die_at(rank: int, step: int, number: int) -> None:
    """Let a process send itself a signal when it has made so many steps, and has saved."""
    inner = LastCheckpoint.on_train_batch_end

    def ends(self: Any, trainer: Any, *args: Any) -> None:
        inner(self, trainer, *args)
        if (trainer.global_rank, trainer.global_step) == (rank, step):
            os.kill(os.getpid(), number)

    LastCheckpoint.on_train_batch_end = ends  # type: ignore[method-assign]


def note_vectors(folder: Path) -> None:
    """Let a process begin with a vector of its own, and write the one that it trained with."""
    build, ends, rank = training.build_module, SiameseModule.on_train_end, os.environ["LOCAL_RANK"]

    def moved(config: Any) -> SiameseModule:
        module = build(config)
        module.encoder.reference.c *= 1 + 0.1 * int(rank)
        return module

    def note(self: Any) -> None:
        ends(self)
        torch.save(self.encoder.reference.c, folder / f"{rank}.pt")

    training.build_module = moved
    SiameseModule.on_train_end = note  # type: ignore[method-assign]


if __name__ == "__main__":
    if "VECTORS" in os.environ:
        note_vectors(Path(os.environ["VECTORS"]))
    if "DIE_AT" in os.environ:
        die_at(*(int(number) for number in os.environ["DIE_AT"].split()))
    sys.exit(cli.main(["train", *sys.argv[1:]]))
