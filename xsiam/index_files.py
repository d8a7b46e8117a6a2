"""The shards of an index, one safetensors file each.

A folder holds ``index.json`` (:class:`xsiam.index_manifest.Manifest`), ``shard_00000.safetensors``
and so on. The tensors of a shard with n texts of S_1 … S_n tokens, ΣS in all:

======================================================= ========== =================================
vectors                                                 [ΣS, K]    token vectors, float16 or float32
delta, reference_embedding, embedding                   [n, K]     float32
norm, completeness_error, token_error                   [n]        float64
converged, n_nodes, lengths                             [n]        bool, int64, int64
offsets                                                 [ΣS, 2]    int32
special_mask, prompt_mask                               [ΣS]       bool
strings                                                 [bytes]    JSON in UTF-8: texts and tokens
======================================================= ========== =================================

The texts are in the files: whoever may read an index may read them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from xsiam.errors import CheckpointError, InputError
from xsiam.index_manifest import DTYPES, FORMAT_VERSION, Manifest, write_file
from xsiam.reading import TokenVectors

_AGAIN = "Delete the file and build the index again with the same arguments: only it is made anew."

ROUNDING = 2e-3
"""A text whose vectors storage rounds by more than this (or the tolerance) has not converged."""

_NOISE = 1e-6
_NUMBERS = {"norm": torch.float64, "completeness_error": torch.float64}
_NUMBERS |= {"token_error": torch.float64, "converged": torch.bool, "n_nodes": torch.int64}
_EMBEDDINGS = ("delta", "reference_embedding", "embedding")
_MASKS = ("special_mask", "prompt_mask")


@dataclass(frozen=True, eq=False)
class Shard:
    """The texts of one file; tensors are memory-mapped, read when they are used.

    Attributes:
        vectors: [ΣS, K] as stored.
        starts: Where each text begins in it, and the end.
        norms: What the model divides by, of each text.
        rest: The other tensors.
        n_bytes: Size of the file.
    """

    vectors: Tensor
    starts: tuple[int, ...]
    norms: tuple[float, ...]
    rest: dict[str, Tensor]
    n_bytes: int

    def rows(self, k: int) -> Tensor:
        """Return the token vectors of the k-th text, [S, K] in the type they are stored in."""
        return self.vectors[self.starts[k] : self.starts[k + 1]]

    @cached_property
    def strings(self) -> dict[str, Any]:
        """Return ``texts`` and their ``tokens``."""
        content: dict[str, Any] = json.loads(self.rest["strings"].numpy().tobytes())
        return content

    def token_vectors(self, k: int, role: str | None) -> TokenVectors:
        """Return all that is known of the k-th text; tensors are copies in float64."""
        span = slice(self.starts[k], self.starts[k + 1])
        numbers: dict[str, Any] = {name: self.rest[name][k].item() for name in _NUMBERS}
        masks: dict[str, Any] = {name: tuple(self.rest[name][span].tolist()) for name in _MASKS}
        embeddings: dict[str, Any] = {name: self.rest[name][k].double() for name in _EMBEDDINGS}
        return TokenVectors(
            text=self.strings["texts"][k],
            role=role,
            vectors=self.rows(k).double().T,
            tokens=tuple(self.strings["tokens"][k]),
            offsets=tuple((start, end) for start, end in self.rest["offsets"][span].tolist()),
            **numbers,
            **masks,
            **embeddings,
        )


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of a shard."""
    return folder / f"shard_{number:05d}.safetensors"


def write_shard(
    folder: Path, number: int, manifest: Manifest, texts: Sequence[TokenVectors]
) -> None:
    """Write one shard, whole or not at all.

    What rounding changed is added to the completeness error (a bound, then) and the token error.

    Raises:
        InputError: If a vector does not fit the type, or the disk is full.
    """
    stored = [_rounded(text, manifest.dtype) for text in texts]
    errors = [_errors(text, s, manifest) for text, s in zip(texts, stored, strict=True)]
    values = {
        name: [getattr(text, name) for text in texts] for name in _NUMBERS if name not in errors[0]
    }
    values |= {name: [error[name] for error in errors] for name in errors[0]}
    strings = {"texts": [t.text for t in texts], "tokens": [t.tokens for t in texts]}
    encoded = json.dumps(strings).encode()
    tensors = {
        "vectors": torch.cat(stored),
        "lengths": torch.tensor([len(text.tokens) for text in texts]),
        "offsets": torch.tensor([o for t in texts for o in t.offsets], dtype=torch.int32),
        "strings": torch.frombuffer(bytearray(encoded), dtype=torch.uint8),
    }
    tensors |= {n: torch.tensor(values[n], dtype=kind) for n, kind in _NUMBERS.items()}
    tensors |= {n: torch.stack([getattr(t, n) for t in texts]).float() for n in _EMBEDDINGS}
    tensors |= {n: torch.tensor([f for t in texts for f in getattr(t, n)]) for n in _MASKS}
    facts = {"format_version": FORMAT_VERSION, "index": manifest.key(), "shard": number}
    # One entry: the order of several is not fixed, and equal shards are to be equal files.
    path = shard_path(folder, number)
    write_file(path, save(tensors, {"xsiam": json.dumps(facts)}))
    # Of a process that was killed: one process writes a shard. The manifest may have several.
    for stale in path.parent.glob(f".{path.name}-*.part"):
        stale.unlink(missing_ok=True)


def read_shard(folder: Path, number: int, manifest: Manifest) -> Shard:
    """Map one shard into memory and check that it is whole and belongs to this index.

    Raises:
        CheckpointError: If it is missing, truncated, or of another index.
    """
    path = shard_path(folder, number)
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("xsiam", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(
            f"Expected {path} to be there, but it is missing. Build the index again with the same "
            "arguments: finished shards are kept."
        ) from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"Expected a whole shard in {path}, but it is truncated or damaged ({error}). {_AGAIN}"
        ) from error
    if facts.get("index") != manifest.key() or facts.get("shard") != number:
        raise CheckpointError(
            f"Expected shard {number} of index {manifest.key()[:16]} in {path}, but it holds shard "
            f"{facts.get('shard')} of {str(facts.get('index'))[:16]}. {_AGAIN}"
        )
    vectors, lengths = tensors.pop("vectors"), tensors["lengths"].tolist()
    expected = (len(manifest.texts_of(number)), (sum(lengths), manifest.embedding_dim))
    found = (len(lengths), tuple(vectors.shape))
    if found != expected or vectors.dtype != DTYPES[manifest.dtype]:
        raise CheckpointError(
            f"Expected texts and vectors {expected} in {manifest.dtype} in {path}, but got {found} "
            f"in {vectors.dtype}. {_AGAIN}"
        )
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    norms = tuple(tensors["norm"].tolist())
    return Shard(vectors, tuple(ends), norms, tensors, path.stat().st_size)


class ShardCache:
    """Keep the shards that were used last, up to a number of mapped bytes (at least one shard)."""

    def __init__(self, folder: Path, manifest: Manifest, n_bytes: int) -> None:
        self._folder = folder
        self._manifest = manifest
        self._limit = n_bytes
        self._used = 0
        self._shards: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return len(self._shards)

    def get(self, number: int) -> Shard:
        """Return a shard, from disk where it is not kept."""
        shard = self._shards.get(number)
        if shard is not None:
            self._shards.move_to_end(number)
            return shard
        shard = read_shard(self._folder, number, self._manifest)
        self._shards[number] = shard
        self._used += shard.n_bytes
        while self._used > self._limit and len(self._shards) > 1:
            self._used -= self._shards.popitem(last=False)[1].n_bytes
        return shard


def _rounded(text: TokenVectors, dtype: str) -> Tensor:
    """Return a text's token vectors as they are stored, [S, K].

    Raises:
        InputError: If an entry is beyond the range of the type.
    """
    stored = text.vectors.T.to(DTYPES[dtype])
    if not torch.isfinite(stored).all():
        limit, largest = torch.finfo(DTYPES[dtype]).max, float(text.vectors.abs().max())
        advice = 'Set `dtype="float32"`.' if dtype == "float16" else "Check the model's weights."
        raise InputError(
            f"Expected token vectors between ±{limit:.4g} for {dtype}, but the largest entry of "
            f"{text.text!r} is {largest:.4g}. {advice}"
        )
    return stored


def _errors(text: TokenVectors, stored: Tensor, manifest: Manifest) -> dict[str, Any]:
    """Return the errors of the vectors that are stored: those of the text, and of rounding."""
    change = stored.double() - text.vectors.T
    delta, largest = float(text.delta.norm()), float(text.vectors.norm(dim=0).max())
    # Errors are absolute where Δ is float noise, as those of the text are.
    scale = delta if delta > _NOISE * largest else 1.0
    rounding = float(change.norm(dim=1).max()) / scale
    allowed = max(manifest.settings.tolerance, ROUNDING)
    return {
        "completeness_error": text.completeness_error + float(change.sum(0).norm()) / scale,
        "token_error": text.token_error + rounding,
        "converged": text.converged and rounding <= allowed,
    }
