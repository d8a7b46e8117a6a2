"""Fill an index: shard after shard, in any number of processes, going on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xsiam
from xsiam.attribution import PairAttributor
from xsiam.errors import CheckpointError, ConvergenceWarning, InputError, TruncationWarning
from xsiam.index_files import read_shard, shard_path, write_shard
from xsiam.index_manifest import DTYPES, MANIFEST, Manifest
from xsiam.texts import check_texts


def describe(
    attributor: PairAttributor, texts: Sequence[str], role: str | None, dtype: str, shard_size: int
) -> Manifest:
    """Return what an index of these texts would say of itself.

    Raises:
        InputError: If an argument does not meet its constraint.
    """
    encoder = attributor.encoder
    if isinstance(texts, str) or not len(texts):
        raise InputError(f"Expected `texts` to be a list of at least one text, but got {texts!r}.")
    check_texts(texts)
    encoder.check_role(role)
    if dtype not in DTYPES:
        raise InputError(f"Expected `dtype` to be one of {list(DTYPES)}, but got {dtype!r}.")
    if isinstance(shard_size, bool) or not isinstance(shard_size, int) or shard_size < 1:
        raise InputError(f"Expected `shard_size` to be 1 or more texts, but got {shard_size!r}.")
    rule = attributor.rule
    return Manifest(
        xsiam=xsiam.__version__,
        n_texts=len(texts),
        shard_size=shard_size,
        dtype=dtype,
        role=role,
        prompt=encoder.prompt_of(role)[0],
        texts_sha256=hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(),
        embedding_dim=encoder.embedding_dim,
        max_length=encoder.max_length,
        truncate_dim=encoder.model.truncate_dim,
        normalize=encoder.normalize,
        n_nodes=None if rule is None else len(rule.nodes),
        settings=attributor.settings,
        reference_state=encoder.reference.state(encoder.split, encoder._probe_features()) or None,
    )


def prepare_folder(folder: Path, manifest: Manifest) -> None:
    """Make the folder of an index, or check that what it holds is the same index.

    Raises:
        InputError: If it is no folder, holds other files, or an index that differs.
        CheckpointError: If its manifest is damaged or of another format.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"Expected `path` to be a folder, but {str(folder)!r} is a file. Set another `path`."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Names with a dot are parts of files that other processes write at this moment.
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise InputError(
            f"Expected `path` to be a writable folder, but {str(folder)!r} is not: {error}. "
            "Set another `path`."
        ) from error
    if not names:
        manifest.write(folder)
    elif MANIFEST not in names:
        raise InputError(
            f"Expected `path` to be a new folder or an index, but {str(folder)!r} holds "
            f"{names[0]!r} and no `{MANIFEST}`. Set another `path`."
        )
    found = Manifest.read(folder).facts()
    for name, value in manifest.facts().items():
        if found.get(name) != value:
            raise InputError(
                f"Expected `{name}` to be {found.get(name)!r} as in the index in {str(folder)!r}, "
                f"but got {value!r}. Set another `path`, or delete that folder."
            )


def process_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return this process's number and how many there are: as given, else as torchrun says.

    Raises:
        InputError: If only one of both is given, or they cannot be.
    """
    if (rank is None) != (world_size is None):
        raise InputError(
            f"Expected both or none of `rank` and `world_size`, but got {rank} and {world_size}."
        )
    given: tuple[object, object] = (rank, world_size)
    if rank is None:
        given = (os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1"))
    try:
        number, total = (int(str(value)) for value in given)
    except ValueError:
        number, total = -1, -1
    if not 0 <= number < total:
        raise InputError(
            "Expected `rank` (or the environment variable RANK) to be at least 0 and below "
            f"`world_size` (WORLD_SIZE), but got {given[0]!r} and {given[1]!r}."
        )
    return number, total


def fill_shards(
    attributor: PairAttributor,
    texts: Sequence[str],
    folder: Path,
    manifest: Manifest,
    shards: Iterable[int],
    progress: bool,
) -> None:
    """Compute and write those shards that are not there.

    Raises:
        CheckpointError: If one that is there is truncated or of another index.
        InputError: If the disk is full, or a vector does not fit the type.
    """
    wanted = list(shards)
    missing = [k for k in wanted if not shard_path(folder, k).exists()]
    for k in sorted({*wanted} - {*missing}):
        read_shard(folder, k, manifest)
    with _one_warning(len(missing)):
        for k in _tracked(missing, manifest, progress):
            some = [texts[i] for i in manifest.texts_of(k)]
            write_shard(folder, k, manifest, attributor.token_vectors(some, manifest.role))


def missing_shards(folder: Path, manifest: Manifest) -> list[str]:
    """Return the names of the shards that are not there."""
    paths = [shard_path(folder, k) for k in range(manifest.n_shards)]
    return [path.name for path in paths if not path.exists()]


def check_complete(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError, naming the shards that are missing."""
    missing = missing_shards(folder, manifest)
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise CheckpointError(
            f"Expected {manifest.n_shards} shards in {str(folder)!r}, but {len(missing)} are "
            f"missing: {shown}. Build the index again with the same arguments: finished shards are "
            "kept."
        )


@contextmanager
def _one_warning(n_shards: int) -> Iterator[None]:
    """Say once that texts were cut, not once per shard; convergence is told of the whole index."""
    cut: list[Warning | str] = []
    show = warnings.showwarning

    def collect(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, TruncationWarning):
            cut.append(message)
        else:
            show(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("always", TruncationWarning)
        warnings.showwarning = collect
        yield
    if cut:
        warnings.warn(
            f"In {len(cut)} of {n_shards} shards: {cut[0]}", TruncationWarning, stacklevel=5
        )


def _tracked(shards: Sequence[int], manifest: Manifest, progress: bool) -> Iterator[int]:
    """Yield shards, with a progress bar that counts texts."""
    if not progress:
        yield from shards
        return
    from rich.console import Console
    from rich.progress import Progress

    total = sum(len(manifest.texts_of(k)) for k in shards)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("indexing texts", total=total)
        for k in shards:
            yield k
            bar.advance(task, len(manifest.texts_of(k)))
