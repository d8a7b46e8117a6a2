"""One process of a training run, which can be made to die or to stop; started by test_parallel.py.

Arguments are those of `xsiam train`; DIE_AT names a process, a step and a signal.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from xsiam import cli
from xsiam.resume import LastCheckpoint


def die_at(rank: int, step: int, number: int) -> None:
    """Let a process send itself a signal when it has made so many steps, and has saved."""
    inner = LastCheckpoint.on_train_batch_end

    def ends(self: Any, trainer: Any, *args: Any) -> None:
        inner(self, trainer, *args)
        if (trainer.global_rank, trainer.global_step) == (rank, step):
            os.kill(os.getpid(), number)

    LastCheckpoint.on_train_batch_end = ends  # type: ignore[method-assign]


if __name__ == "__main__":
    if "DIE_AT" in os.environ:
        die_at(*(int(number) for number in os.environ["DIE_AT"].split()))
    sys.exit(cli.main(["train", *sys.argv[1:]]))
