"""Pairs of texts on their way into a Lightning trainer.

`PairDataModule` decides which source serves which split, checks all of it in `setup`, and makes
batches: tokenised in the collator, of similar lengths, each row on one process only. Reading and
checking are in `xsiam.pairs`, the order of rows in `xsiam.sampling`.

Batches are dictionaries:

* "a", "b": what `preprocess` returns for the texts of each side;
* "negatives": a list of the same for each column of hard negatives, absent where there are none;
* "label": Tensor[n] float32, absent for unlabelled data;
* "text_ids": Tensor[n, 2 + columns] int64, equal for equal texts of a, b and the negatives; only
  for objectives that compare the pairs of a batch, and for validation and test without labels;
* "teacher": Tensor[n, 2, K] float32, a teacher's embeddings of a and b, where there is a teacher;
* "index": Tensor[n] int64, the row of each pair in ``pairs(split)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import distributed
from torch.utils.data import DataLoader, Sampler

from xsiam.errors import InputError
from xsiam.pairs import LabelRule, NegativeRule, PairDataset, load_pairs, text_id
from xsiam.sampling import LengthBucketSampler, ShardedEvaluationSampler
from xsiam.tables import is_file_name, is_hub_name, split_names
from xsiam.teacher import Teacher

__all__ = ["SPLITS", "PairCollator", "PairDataModule", "PairDataset", "load_pairs"]

SPLITS = {
    "train": ("train",),
    "validation": ("validation", "dev", "val", "valid"),
    "test": ("test",),
}
"""Splits of a run, and under which names a dataset may hold them when none is given."""

Preprocess = Callable[[Sequence[str], str | None], dict[str, Any]]


@dataclass(frozen=True)
class PairCollator:
    """Turn rows into a batch of tensors.

    Attributes:
        preprocess: texts and role in, padded features out (`SiameseEncoder.preprocess`).
        role_a: role of the first texts.
        role_b: role of the second texts and of the negatives.
        with_text_ids: whether batches hold "text_ids".
        teacher: whose embeddings batches hold, prepared; None for none.
    """

    preprocess: Preprocess
    role_a: str | None = None
    role_b: str | None = None
    with_text_ids: bool = False
    teacher: Teacher | None = None

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Return the batch described at the top of this module."""
        batch: dict[str, Any] = {
            "a": self.preprocess(rows["a"], self.role_a),
            "b": self.preprocess(rows["b"], self.role_b),
            "index": torch.tensor(rows["index"], dtype=torch.int64),
        }
        if "label" in rows:
            batch["label"] = torch.tensor(rows["label"], dtype=torch.float32)
        negatives = rows.get("negatives", [])
        if negatives:
            batch["negatives"] = [self.preprocess(texts, self.role_b) for texts in negatives]
        if self.teacher is not None:
            sides = ((rows["a"], self.role_a), (rows["b"], self.role_b))
            vectors = [self.teacher.vectors(texts, role) for texts, role in sides]
            batch["teacher"] = torch.stack(vectors, dim=1)
        if self.with_text_ids:
            columns = [rows["a"], rows["b"], *negatives]
            ids = [[text_id(text) for text in texts] for texts in columns]
            batch["text_ids"] = torch.tensor(ids, dtype=torch.int64).T.contiguous()
        return batch


class PairDataModule(LightningDataModule):
    """Pairs for training, validation and test.

    Each split comes from where its argument says: a file, a saved dataset, a hub name, or, with
    `name`, a split of that dataset (a value that is a file stays a file). With `name` a split that
    is not given is taken by its usual name where the dataset has it. `validation_fraction` and
    `test_fraction` cut splits off the training pairs instead: disjoint, chosen by `seed` alone.

    Training pairs must have labels if the objective needs them and must not otherwise; validation
    pairs must have them if the objective does; test pairs may. ``column_label="none"`` leaves them
    out everywhere. The same holds for columns of hard negatives, but that validation and test pairs
    never need them: those of an objective without negatives stay in `PairDataset.extra`.

    With a `teacher` pairs are texts to score, and no more. Labels of training pairs are left
    unread, those of validation and test pairs are read where there are any; one column of texts is
    enough for every split (see `load_pairs`); pairs without labels are not ranked, since they need
    not belong together. `prepare_data` lets the teacher embed all texts.

    Args:
        preprocess: texts and role in, padded features out; called in the collator. With
            `num_workers` it runs in worker processes.
        train: source or split name of the training pairs.
        validation: the same for validation.
        test: the same for test.
        name: dataset that holds the splits: "bundled", a saved dataset folder or a hub name.
        column_a: see `load_pairs`, as are the next four.
        column_b: see `load_pairs`.
        column_label: see `load_pairs`.
        columns_negative: see `load_pairs`.
        label_range: see `load_pairs`.
        validation_fraction: share of the training pairs to validate on, between 0 and 1.
        test_fraction: share of the training pairs to test on, between 0 and 1.
        batch_size: training pairs in a batch of one process.
        eval_batch_size: the same for validation and test.
        length_bucketing: batch texts of similar length.
        num_workers: worker processes that tokenise; 0 does it in the main process.
        seed: seed of splits and order, equal on all processes.
        role_a: role of the first texts.
        role_b: role of the second texts and of the negatives.
        needs_label: whether the objective needs labels.
        negatives: whether the objective needs columns of hard negatives in the training pairs
            ("required"), can use them ("optional") or cannot ("forbidden"); "unused" reads none.
        in_batch: whether the objective compares the pairs of a batch. All batches then hold
            "text_ids", and training batches of a single pair are refused where there are no
            negatives.
        limit: use only the first so many pairs of every split.
        expected_range: labels the objective can take.
        teacher: model whose scores the objective keeps; batches then hold "teacher", and never
            "text_ids".

    Raises:
        InputError: on construction for a wrong number, on `setup` for wrong data, on
            `train_dataloader` for batches with nothing to compare.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        *,
        train: str | Path | None = None,
        validation: str | Path | None = None,
        test: str | Path | None = None,
        name: str | None = None,
        column_a: str | None = None,
        column_b: str | None = None,
        column_label: str | None = None,
        columns_negative: Sequence[str] | None = None,
        label_range: Sequence[float] | None = None,
        validation_fraction: float | None = None,
        test_fraction: float | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        length_bucketing: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        role_a: str | None = None,
        role_b: str | None = None,
        needs_label: bool = True,
        negatives: NegativeRule = "forbidden",
        in_batch: bool = False,
        limit: int | None = None,
        expected_range: tuple[float, float] = (0.0, 1.0),
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        in_batch = in_batch and teacher is None
        self.collator = PairCollator(preprocess, role_a, role_b, in_batch, teacher)
        self.teacher = teacher
        self.name = name
        self.sources = {"train": train, "validation": validation, "test": test}
        self.fractions = {"validation": validation_fraction, "test": test_fraction}
        self.columns = {"column_a": column_a, "column_b": column_b, "column_label": column_label}
        self.columns_negative = columns_negative
        self.label_range = label_range
        self.expected_range = expected_range
        self.needs_label = needs_label
        self.negatives = negatives
        self.in_batch = in_batch
        self.batch_size = _at_least(batch_size, 1, "data.batch_size")
        self.eval_batch_size = _at_least(eval_batch_size, 1, "data.eval_batch_size")
        self.length_bucketing = length_bucketing
        self.num_workers = _at_least(num_workers, 0, "data.num_workers")
        self.seed = _at_least(seed, 0, "seed")
        self.limit = None if limit is None else _at_least(limit, 1, "data.limit")
        self._available: tuple[str, ...] | None = None
        self._pairs: dict[str, PairDataset] = {}
        self._check_fractions()

    def prepare_data(self) -> None:
        """Download what comes from the hub, and let the teacher embed all texts.

        Lightning calls this on one process of each machine, and the others wait.
        """
        for split in SPLITS:
            located = self._locate(split)
            if located is not None and is_hub_name(located[0]):
                self._load(split)
        if self.teacher is not None:
            self.teacher.prepare(self._texts(), self._device())

    def setup(self, stage: str | None = None) -> None:
        """Read and check the splits of a stage; training checks all of them before it begins.

        Args:
            stage: "fit", "validate", "test", "predict" or None for all splits.
        """
        wanted = {"validate": ("validation",), "test": ("test",), "predict": ("test",)}
        for split in wanted.get(stage or "", tuple(SPLITS)):
            if split not in self._pairs and self.has(split):
                self._add(split)

    def has(self, split: str) -> bool:
        """Return whether there are pairs for `split`, without reading them."""
        _check_split(split)
        return self._fraction(split) is not None or self._locate(split) is not None

    def pairs(self, split: str) -> PairDataset:
        """Return the checked pairs of "train", "validation" or "test", read on first use.

        Raises:
            InputError: there is no such split, or its data is wrong.
        """
        if not self.has(split):
            raise InputError(
                f"Expected {split} pairs, but none are given. Set `data.{split}` to a file or "
                f"`data.name` to a dataset that has them"
                + ("." if split == "train" else f", or `data.{split}_fraction`.")
            )
        if split not in self._pairs:
            self._add(split)
        return self._pairs[split]

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return of every split where it came from and how many pairs it has, as plain values.

        "source" is a file or dataset, "split" the name of a dataset's split, "fraction" what was
        drawn of the training pairs; the last two are None where there is no such thing.
        """
        return {split: self._facts_of(split) for split in SPLITS if self.has(split)}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled, length-bucketed batches; see `LengthBucketSampler`.

        Raises:
            InputError: the objective compares the pairs of a batch and a batch would have only one.
        """
        pairs = self.pairs("train")
        world, rank = self._processes()
        if self.in_batch and not pairs.negatives:
            _check_batches(len(pairs), self.batch_size, world)
        sampler = LengthBucketSampler(
            pairs.lengths,
            self.batch_size,
            bucket=self.length_bucketing,
            num_replicas=world,
            rank=rank,
            seed=self.seed,
        )
        return self._loader(pairs, sampler, self.collator)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation batches, no row twice; an empty list where there are no pairs."""
        return self._evaluation_loader("validation") if self.has("validation") else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches, no row twice."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        pairs = self.pairs(split)
        world, rank = self._processes()
        sampler = ShardedEvaluationSampler(
            len(pairs),
            self.eval_batch_size,
            lengths=pairs.lengths if self.length_bucketing else None,
            num_replicas=world,
            rank=rank,
        )
        # Without labels anchors rank the texts of all pairs, which have to be told apart.
        with_ids = self.in_batch or (pairs.labels is None and self.teacher is None)
        return self._loader(pairs, sampler, replace(self.collator, with_text_ids=with_ids))

    def _loader(
        self, pairs: PairDataset, sampler: Sampler[list[int]], collator: PairCollator
    ) -> DataLoader[Any]:
        """Return a loader for a sampler that yields whole batches, hence no batch size."""
        return DataLoader(
            pairs,
            batch_size=None,
            sampler=sampler,
            collate_fn=collator,  # type: ignore[arg-type]  # torch expects a list of samples
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._device().type == "cuda",
        )

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _texts(self) -> dict[str | None, list[str]]:
        """Return the texts of all splits by role."""
        texts: dict[str | None, list[str]] = {}
        for pairs in (self.pairs(split) for split in SPLITS if self.has(split)):
            texts.setdefault(self.collator.role_a, []).extend(pairs.texts_a)
            texts.setdefault(self.collator.role_b, []).extend(pairs.texts_b)
        return texts

    def _processes(self) -> tuple[int, int]:
        """Return the number of processes that share the data, and the number of this one."""
        if self.trainer is not None:
            strategy = self.trainer.strategy
            if isinstance(strategy, ParallelStrategy):
                # With tensor parallelism several processes see the same data; only this knows.
                shared = strategy.distributed_sampler_kwargs
                return int(shared["num_replicas"]), int(shared["rank"])
            return self.trainer.world_size, self.trainer.global_rank
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_world_size(), distributed.get_rank()
        return 1, 0

    def _fraction(self, split: str) -> float | None:
        return self.fractions.get(split)

    def _check_fractions(self) -> None:
        """Check that fractions are shares, leave training pairs, and clash with no source."""
        for split, fraction in self.fractions.items():
            if fraction is None:
                continue
            if not 0 < fraction < 1:
                raise InputError(
                    f"Expected `data.{split}_fraction` to lie between 0 and 1, but got {fraction}."
                )
            if self.sources[split] is not None:
                raise InputError(
                    f"Expected either `data.{split}` or `data.{split}_fraction`, but got "
                    f"{str(self.sources[split])!r} and {fraction}. Set one of them to null."
                )
        total = sum(fraction or 0.0 for fraction in self.fractions.values())
        if total >= 1:
            raise InputError(
                "Expected `data.validation_fraction` and `data.test_fraction` to leave training "
                f"pairs, but they add up to {total:g}."
            )

    def _facts_of(self, split: str) -> dict[str, Any]:
        fraction = self._fraction(split)
        located = self._locate(split if fraction is None else "train")
        assert located is not None
        source, name, _ = located
        pairs = self.pairs(split)
        return {
            "source": str(source),
            "split": name if self.name is not None and source == self.name else None,
            "fraction": fraction,
            "n_pairs": len(pairs),
            "labelled": pairs.labels is not None,
        }

    def _locate(self, split: str) -> tuple[str | Path, str, str] | None:
        """Return source, split name and configuration key of a split, None where it has none."""
        given, key = self.sources[split], f"data.{split}"
        if self.name is None:
            return None if given is None else (given, split, key)
        if given is not None:
            return (given, split, key) if is_file_name(given) else (self.name, str(given), key)
        if self._available is None:
            self._available = self._list_splits(self.name)
        names = [name for name in SPLITS[split] if name in self._available]
        return (self.name, names[0], key) if names else None

    def _list_splits(self, name: str) -> tuple[str, ...]:
        names = split_names(name, key="data.name")
        if not names:
            raise InputError(
                "Expected `data.name` to be 'bundled', a folder saved with `Dataset.save_to_disk` "
                f"or a hub name like 'owner/name', but got {name!r}. Set `data.name`, or "
                "`data.train`, `data.validation` and `data.test` for files."
            )
        return names

    def _load(self, split: str) -> PairDataset:
        """Read and check the source of one split."""
        located = self._locate(split)
        if located is None:
            raise InputError(f"Expected `data.{split}`, but none is given. Set `data.{split}`.")
        rule: LabelRule = "required" if self.needs_label else "optional"
        if split == "train" and not self.needs_label:
            rule = "forbidden" if self.teacher is None else "unread"
        if split == "test":
            rule = "optional"
        negatives = self.negatives
        if split != "train":
            negatives = "available" if negatives in ("required", "optional") else "unused"
        source, split_name, key = located
        return load_pairs(
            source,
            split_name,
            **self.columns,
            columns_negative=self.columns_negative,
            labels=rule,
            negatives=negatives,
            expected_range=self.expected_range,
            label_range=self.label_range,
            one_column=self.teacher is not None,
            key=key,
        )

    def _add(self, split: str) -> None:
        """Read `split`, and with fractions all that is cut from the training pairs."""
        cut = [name for name in self.fractions if self._fraction(name) is not None]
        if not cut or (split != "train" and split not in cut):
            self._pairs[split] = self._limited(self._load(split))
            return
        pairs = self._load("train")
        for name, rows in self._cut(len(pairs)).items():
            self._pairs[name] = self._limited(pairs.select(rows))

    def _cut(self, n: int) -> dict[str, list[int]]:
        """Return disjoint rows, in their order, of the training pairs and of what is cut off."""
        order = np.random.default_rng(self.seed).permutation(n)
        rows: dict[str, list[int]] = {}
        start = 0
        for split, fraction in self.fractions.items():
            if fraction is not None:
                stop = start + max(1, round(fraction * n))
                rows[split] = sorted(order[start:stop].tolist())
                start = stop
        if start >= n:
            raise InputError(
                f"Expected training pairs to be left after `data.validation_fraction` and "
                f"`data.test_fraction`, but they take {start} of {n}. Set them lower."
            )
        rows["train"] = sorted(order[start:].tolist())
        return rows

    def _limited(self, pairs: PairDataset) -> PairDataset:
        if self.limit is None or self.limit >= len(pairs):
            return pairs
        return pairs.select(range(self.limit))


def _at_least(value: int, least: int, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"Expected `{key}` to be {least} or more, but got {value!r}. Set `{key}`.")
    return value


def _check_batches(n: int, batch_size: int, world: int) -> None:
    """Raise InputError where a batch over all processes would be a single pair."""
    last = n % batch_size or batch_size
    if world == 1 and last == 1:
        raise InputError(
            "Expected training batches of 2 pairs or more, since the objective compares the pairs "
            f"of a batch, but {n} training pairs in batches of {batch_size} leave a batch of 1. "
            "Set `data.batch_size`, or give hard negatives (`data.columns_negative`)."
        )


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise InputError(f"Expected a split out of {', '.join(SPLITS)}, but got {split!r}.")
