"""What it takes to interrupt a training run at any point and lose nothing.

Lightning restores weights, optimiser, schedule and counters. Missing, and found here:

* the randomness of a step (dropout): `SeededSteps` makes it a function of seed, epoch, batch and
  process, so that there is no state to restore;
* the position in the data: `ResumableData` begins an epoch at the batch where the trainer stands;
* checkpoints from which the trainer continues exactly: `LastCheckpoint` writes them between steps
  only, and an interrupted validation is done again from its beginning;
* Ctrl-C: `Interruption` lets the running step finish first.
"""

from __future__ import annotations

import itertools
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from xsiam.data import PairDataModule

__all__ = ["Interruption", "LastCheckpoint", "ResumableData", "ResumableLoader", "SeededSteps"]


class SeededSteps(Callback):
    """Seed the random number generators before every training step.

    Dropout is then the same whether or not a run was interrupted, and whatever else draws random
    numbers between steps. Processes draw different numbers.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed PyTorch, NumPy and Python."""
        place = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        state = int(np.random.SeedSequence(place).generate_state(1)[0])
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)


class ResumableLoader:
    """Batches of a training loader, from the one at which the trainer stands.

    Args:
        loader: A loader whose sampler yields whole batches and has a fixed order in an epoch.
        position: How many batches of the epoch are done; asked when the first one is needed.
    """

    def __init__(self, loader: DataLoader[Any], position: Callable[[], int]) -> None:
        self.loader = loader
        self.position = position

    @property
    def sampler(self) -> Any:
        """The loader's sampler, which the trainer tells the epoch."""
        return self.loader.sampler

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches that are left.

        A generator, since the trainer asks for the iterator before it knows epoch and position.
        """
        done = self.position()
        yield from self._from(done) if done else self.loader

    def _from(self, done: int) -> DataLoader[Any]:
        """Return a loader of all but the first ``done`` batches, which are not even tokenised."""
        rest = list(itertools.islice(iter(self.loader.sampler), done, None))
        return DataLoader(
            self.loader.dataset,
            batch_size=None,
            sampler=rest,
            collate_fn=self.loader.collate_fn,
            num_workers=self.loader.num_workers,
            pin_memory=self.loader.pin_memory,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the trainer's own counters say where an epoch was left."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing; with `state_dict` it tells the trainer that resuming is provided for."""


class ResumableData(LightningDataModule):
    """A `PairDataModule` whose training batches continue in mid-epoch.

    Args:
        data: The pairs.
    """

    def __init__(self, data: PairDataModule) -> None:
        super().__init__()
        self.data = data

    def prepare_data(self) -> None:
        """Download what has to be, and let a teacher embed the texts."""
        self.data.trainer = self.trainer
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read and check the splits of a stage."""
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches that are left of the epoch."""
        return ResumableLoader(self.data.train_dataloader(), self._position)

    def val_dataloader(self) -> Any:
        """Return the validation batches."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """Return the test batches."""
        return self.data.test_dataloader()

    def _position(self) -> int:
        """Return how many batches of the running epoch the trainer has done."""
        trainer = self.trainer
        return 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.current.ready


class Interruption:
    """Turn the first Ctrl-C into a request, so that the running training step finishes.

    As a context manager it handles SIGINT, on the main thread only. A second Ctrl-C, or one where
    nothing would be lost, stops at once.

    Attributes:
        requested: Whether Ctrl-C was pressed.
        immediate: Whether to stop at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.immediate = True
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.immediate or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nStopping after this step; press Ctrl-C again to stop at once.", file=sys.stderr)


class LastCheckpoint(Checkpoint):
    """Keep one checkpoint of the newest state, from which training continues exactly.

    It is written after every validation, after epochs without one, every ``every_n_steps`` steps
    and on Ctrl-C. The file is replaced as a whole: a run killed meanwhile keeps the old one.

    Args:
        path: The file.
        every_n_steps: Steps between checkpoints, besides those at validation.
        interruption: Where Ctrl-C is noted.
    """

    def __init__(
        self,
        path: Path,
        every_n_steps: int | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.interruption = interruption or Interruption()
        self._saved_step = -1
        self._validation_unfinished = False
        self._agreed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stay stopped where early stopping had already decided so; let steps finish from now."""
        for stopping in trainer.early_stopping_callbacks:
            patience = getattr(stopping, "patience", None)
            if patience is not None and getattr(stopping, "wait_count", 0) >= patience:
                trainer.should_stop = True
        self.interruption.immediate = False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save between two steps, where that is due or Ctrl-C was pressed."""
        is_last = batch_idx + 1 >= trainer.num_training_batches
        if is_last or _validation_follows(trainer, batch_idx):
            return  # it is saved after validation or at the end of the epoch
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients that are being accumulated are in no checkpoint
        stop = self._stop_wanted(trainer)
        every = self.every_n_steps
        if stop or (every is not None and trainer.global_step % every == 0):
            self._save(trainer)
        if stop:
            raise KeyboardInterrupt

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Allow Ctrl-C at any moment, unless other processes would wait for this one."""
        if _is_fitting(trainer):
            self._validation_unfinished = True
            self.interruption.immediate = trainer.world_size == 1

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop where Ctrl-C was pressed on any process."""
        if _is_fitting(trainer) and self._stop_wanted(trainer):
            raise KeyboardInterrupt

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the validation is done, also for the checkpoints of other callbacks."""
        if _is_fitting(trainer):
            self.interruption.immediate = False
            self._validation_unfinished = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state after validation."""
        if not _is_fitting(trainer):
            return
        self._save(trainer)
        if self._stop_wanted(trainer):
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after an epoch that ended without validation."""
        if self._saved_step != trainer.global_step:
            self._save(trainer)
            if self._stop_wanted(trainer):
                raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let Ctrl-C stop at once again."""
        self.interruption.immediate = True

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save where Ctrl-C has cut a validation short; training steps have saved before."""
        together = trainer.world_size == 1 or self._agreed
        if isinstance(exception, KeyboardInterrupt) and self._validation_unfinished and together:
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say in the trainer's counters whether the validation is still to be done.

        The trainer repeats a validation of which it finds one batch begun and none done, and skips
        one that it finds complete.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        if self._validation_unfinished and trainer.state.fn == TrainerFn.FITTING:
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress.update(total=dict(begun), current=dict(begun), is_last_batch=False)
        else:
            progress.update(total=dict(progress["current"]))

    def _stop_wanted(self, trainer: Trainer) -> bool:
        """Return whether any process was interrupted; all get the same answer."""
        requested = self.interruption.requested
        self._agreed = bool(trainer.strategy.reduce_boolean_decision(requested, all=False))
        return self._agreed

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_step = trainer.global_step


def _is_fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether the trainer validates after this training batch."""
    epochs, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or (epochs and (trainer.current_epoch + 1) % epochs):
        return False
    return batches is not None and (batch_idx + 1) % batches == 0
