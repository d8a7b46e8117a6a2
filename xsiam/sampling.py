"""Which rows make which batch, on which process, in which epoch.

Both samplers yield whole batches (lists of row numbers) and go into a `DataLoader` as ``sampler``
with ``batch_size=None``. They derive from `torch.utils.data.DistributedSampler` because that is
what they are, and because Lightning then calls `set_epoch` on them and never puts a sampler of its
own in their place, whatever ``Trainer(use_distributed_sampler=...)`` says. A custom *batch* sampler
would get neither.

The order is a pure function of seed, epoch, number of processes and rank: a resumed run that has
set the epoch sees what the interrupted one saw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DistributedSampler

from xsiam.errors import InputError

MEGABATCH = 50
"""How many batches of every process are sorted by length together.

More saves padding, fewer keep the batches closer to random ones.
"""


class LengthBucketSampler(DistributedSampler[list[int]]):
    """Draw shuffled training batches of texts of similar length.

    All rows are shuffled; runs of `MEGABATCH` batches are sorted by length and cut into batches,
    whose order is shuffled again. With several processes every one draws the same order and takes
    its own slice of each step, so all of them take the same number of steps with equally large
    batches. On one process each row comes exactly once an epoch. On ``num_replicas`` processes at
    most ``num_replicas - 1`` rows come a second time, to make the shares equal; no row is left out.

    Args:
        lengths: approximate length of each row, in any one unit.
        batch_size: rows in a batch of one process.
        bucket: sort by length; False gives plain random batches.
        num_replicas: number of processes.
        rank: number of this process, from 0.
        seed: seed of the order, not negative, equal on all processes.

    Raises:
        InputError: `batch_size` below 1, a negative seed, or fewer rows than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        bucket: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        _check(len(lengths), batch_size, num_replicas, rank)
        if seed < 0:
            raise InputError(f"Expected `seed` to be 0 or more, but got {seed}. Set `seed`.")
        super().__init__(range(len(lengths)), num_replicas, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.bucket = bucket

    def __len__(self) -> int:
        """Return the number of batches of this process, the same on all of them."""
        return math.ceil(self.num_samples / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of this process for the epoch last set by `set_epoch`."""
        for step in self._steps():
            share = len(step) // self.num_replicas
            yield step[self.rank * share : (self.rank + 1) * share].tolist()

    def _steps(self) -> list[np.ndarray]:
        """Return what all processes together see at each step of the epoch."""
        # A pair of integers, not their sum: (seed 0, epoch 1) must differ from (seed 1, epoch 0).
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        order = np.resize(order, self.total_size)  # repeats from the start where shares are unequal
        step_size = self.batch_size * self.num_replicas
        n_full = self.total_size // step_size * step_size
        # The short last step is taken off before sorting, or it would hold the longest texts.
        full, rest = order[:n_full], order[n_full:]
        if self.bucket:
            full = self._sort_megabatches(full, step_size * MEGABATCH)
        steps = list(full.reshape(-1, step_size))
        generator.shuffle(steps)
        return [*steps, rest] if len(rest) else steps

    def _sort_megabatches(self, order: np.ndarray, size: int) -> np.ndarray:
        """Sort each run of `size` rows by length."""
        runs = [order[start : start + size] for start in range(0, len(order), size)]
        runs = [run[np.argsort(self.lengths[run], kind="stable")] for run in runs]
        return np.concatenate(runs) if runs else order


class ShardedEvaluationSampler(DistributedSampler[list[int]]):
    """Draw each row exactly once over all processes, in an order that never changes.

    The rows, sorted by length where lengths are given, are dealt out in turn
    (``rank::num_replicas``) and cut into batches. Unlike PyTorch's own sampler this one never
    repeats a row. All processes still get the same number of batches, as collectives inside a
    forward pass need (DDP broadcasts buffers there): each spreads its rows over that many. With
    ``batch_size=1`` and several processes a batch may therefore hold two rows.

    Args:
        n_rows: number of rows.
        batch_size: rows in a batch of one process.
        lengths: approximate length of each row; given, rows of similar length share a batch.
        num_replicas: number of processes.
        rank: number of this process, from 0.

    Raises:
        InputError: `batch_size` below 1 or fewer rows than processes.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        *,
        lengths: Sequence[int] | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        _check(n_rows, batch_size, num_replicas, rank)
        super().__init__(range(n_rows), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        order = np.arange(n_rows) if lengths is None else np.argsort(lengths, kind="stable")
        self.rows = order[rank::num_replicas]
        self.n_batches = min(math.ceil(self.num_samples / batch_size), n_rows // num_replicas)

    def __len__(self) -> int:
        """Return the number of batches of this process, the same on all of them."""
        return self.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of this process."""
        for batch in np.array_split(self.rows, self.n_batches):
            yield batch.tolist()


def _check(n_rows: int, batch_size: int, num_replicas: int, rank: int) -> None:
    if batch_size < 1:
        raise InputError(
            f"Expected the batch size to be 1 or more, but got {batch_size}. "
            "Set `data.batch_size` and `data.eval_batch_size`."
        )
    if not 0 <= rank < num_replicas:
        raise InputError(
            f"Expected `rank` to be between 0 and {num_replicas - 1} for {num_replicas} "
            f"processes, but got {rank}."
        )
    if n_rows < num_replicas:
        raise InputError(
            f"Expected at least {num_replicas} rows, one for each process, but got {n_rows}. "
            "Set `trainer.devices` lower or give more data."
        )
