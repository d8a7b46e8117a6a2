"""The processes that torchrun started, for work that is shared out through files."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from xsiam.index_building import process_of

_PATIENCE = datetime.timedelta(days=7)  # torchrun itself ends all when one dies


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes results."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that RANK and WORLD_SIZE speak of, as torchrun sets them.

    Raises:
        InputError: If these variables cannot be.
    """
    rank, world_size = process_of(None, None)
    if world_size == 1 or dist.is_initialized():
        yield Processes(rank, world_size)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(rank, world_size)
    finally:
        dist.destroy_process_group()
