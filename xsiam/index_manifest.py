"""What an index says of itself, and files that appear complete or not at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xsiam.combination import Settings
from xsiam.errors import CheckpointError, InputError
from xsiam.references import REFERENCES, AbstractReference

FORMAT = "xsiam token vector index"
FORMAT_VERSION = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}
MANIFEST = "index.json"
_REBUILD = "It is damaged: delete the folder and build the index again."


@dataclass(frozen=True)
class Manifest:
    """What all shards of an index have in common: everything its numbers depend on.

    Attributes:
        xsiam: The version that wrote it.
        n_texts: How many texts there are.
        shard_size: Texts of a shard; the last one may have fewer.
        dtype: "float16" or "float32": how token vectors are stored.
        role: The role of the texts.
        prompt: The prompt of that role.
        texts_sha256: Names the texts and their order.
        embedding_dim: K.
        max_length: The window that texts were cut at.
        truncate_dim: Where embeddings were cut, or None.
        normalize: Whether the encoder ends in a Normalize.
        n_nodes: Nodes of a fixed rule; None for the adaptive one.
        settings: Of the attributor.
        reference_state: What the reference was saved with beside its name, or None.
    """

    xsiam: str
    n_texts: int
    shard_size: int
    dtype: str
    role: str | None
    prompt: str | None
    texts_sha256: str
    embedding_dim: int
    max_length: int | None
    truncate_dim: int | None
    normalize: bool
    n_nodes: int | None
    settings: Settings
    reference_state: dict[str, Any] | None = None

    def reference(self) -> AbstractReference:
        """Return the reference that token vectors start from, with its own vector if it has one."""
        kind = REFERENCES[self.settings.reference.partition(":")[0]]
        return kind.from_state(self.reference_state or {})

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        return -(-self.n_texts // self.shard_size)

    def texts_of(self, shard: int) -> range:
        """Return the ids of the texts of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.n_texts))

    def facts(self) -> dict[str, Any]:
        """Return everything that must agree, in one flat dictionary; the version need not."""
        plain = dataclasses.asdict(self)
        plain.pop("xsiam")
        plain.pop("reference_state")  # its label is among the settings
        settings: dict[str, Any] = plain.pop("settings")
        # Another model explains all other differences, so it is looked at first.
        return {"model_fingerprint": settings.pop("model_fingerprint"), **settings, **plain}

    def key(self) -> str:
        """Return a digest of the facts, by which a shard knows its index."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write ``index.json``."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_file(folder / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``index.json``.

        Raises:
            CheckpointError: If there is none, or it is damaged or of another format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(
                f"Expected an index in {str(folder)!r}, but it has no `{MANIFEST}`. Make one with "
                "`TokenVectorIndex.build` or `xsiam index build`."
            )
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"Expected JSON in {path}, but {error}. {_REBUILD}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise CheckpointError(f"Expected {path} to describe an {FORMAT}, but it does not.")
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"Expected format version {FORMAT_VERSION} in {path}, but it has {version!r}. "
                f"Install the xsiam that wrote it ({content.get('xsiam')}), or build the index "
                "again in another folder."
            )
        try:
            settings = Settings(**content.pop("settings"))
            manifest = cls(**content, settings=settings)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"Expected {path} to describe an index, but {error}. {_REBUILD}"
            ) from error
        _check_sizes(manifest, path)
        return manifest


def _check_sizes(manifest: Manifest, path: Path) -> None:
    """Raise CheckpointError for a manifest whose sizes cannot be."""
    for name in ("n_texts", "shard_size", "embedding_dim"):
        value = getattr(manifest, name)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"Expected a positive `{name}` in {path}, but it has {value!r}. {_REBUILD}"
            )
    if manifest.dtype not in DTYPES:
        raise CheckpointError(
            f"Expected `dtype` in {path} to be one of {list(DTYPES)}, but it has "
            f"{manifest.dtype!r}. {_REBUILD}"
        )


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears as a whole or not at all, also after a kill or a power cut.

    Raises:
        InputError: If the disk is full, or the file cannot be written for another reason.
    """
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk is full ({error.strerror}). Free some space"
        else:
            reason = f"that failed: {error}. Make the folder writable"
        raise InputError(
            f"Expected to write {len(content)} bytes to {path}, but {reason} and build the index "
            "again with the same arguments: finished shards are kept."
        ) from error
