"""A teacher: a model whose scores others learn to keep, embedded once and read from a file.

Training needs no more of a teacher than its embeddings of the texts, so that it is run once, on one
process of each machine, before training begins, and is in memory at no time after that.

The file is a safetensors file of

* "keys": numbers of the texts in their roles, ascending, [n] int64;
* "vectors": their embeddings [n, K] in float32, whose inner products are the teacher's scores: of
  length 1 where it scores by cosine;

with a JSON object "xsiam" in its header: what the teacher is, and the SHA-256 of all that its
embeddings depend on and of the vectors. A file that does not agree with these is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xsiam.embedding import TextInRole, embed_texts
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, InputError, ModelError
from xsiam.pairs import text_id
from xsiam.pretrained import records_shift

__all__ = ["Teacher"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class _Table:
    """What a file holds; the tensors are mapped into memory and read when they are looked at."""

    keys: Tensor
    vectors: Tensor
    header: dict[str, Any]


class Teacher:
    """The scores of a model as it is: unmodified, with a reference shift only if it records one.

    `prepare` embeds all texts and writes the file; `vectors` reads it. A file that is there already
    is taken where it was made by the same teacher from the same texts and is undamaged; any other
    is made anew, with a warning that says why.

    Args:
        name: Folder, checkpoint or hub name.
        path: File of the embeddings.
        similarity: What the scores are to be, "cos" or "dot". It must be the teacher's own; for
            embeddings of length 1 both are the same.
        prompt: Text put before every text that has no role; None keeps the model's own.
        max_length: Longest text in tokens; None takes the model's limit.
        progress: Whether to show progress.

    Raises:
        ModelError: If there is no such model.
        InputError, CheckpointError: As `xsiam.pretrained.resolve` does.
    """

    def __init__(
        self,
        name: str | Path,
        path: str | Path,
        *,
        similarity: str = "cos",
        prompt: str | None = None,
        max_length: int | None = None,
        progress: bool = False,
    ) -> None:
        self.name, self.path = str(name), Path(path)
        self.similarity = similarity
        self.prompt, self.max_length = prompt, max_length
        self.progress = progress
        self._is_shifted = records_shift(name)
        self._prepared: Tensor | None = None
        self._opened: _Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the opened file: processes that load batches open it themselves."""
        return self.__dict__ | {"_opened": None}

    def prepare(
        self,
        texts: Mapping[str | None, Iterable[str]],
        device: str | torch.device = "cpu",
    ) -> None:
        """Make sure that the file holds the embeddings of some texts and no others.

        Args:
            texts: The texts of each role, repeated ones too.
            device: Where to embed what is not there.

        Raises:
            InputError: If the teacher scores by another similarity, or a role is unknown.
            ModelError: If the teacher cannot be used, or its embeddings are not finite.

        Warns:
            UserWarning: If there is a file that has to be made anew, with the reason.
            TruncationWarning: If texts are longer than the teacher's window.
        """
        wanted = {_key(text, role): (text, role) for role in texts for text in texts[role]}
        keys = torch.tensor(sorted(wanted), dtype=torch.int64)
        if self._prepared is not None and torch.equal(self._prepared, keys):
            return
        encoder = self._load(texts)
        identity = _identity(encoder)
        if self.path.exists():
            reason = _unusable_reason(self.path, keys, identity)
            if reason is not None:
                warnings.warn(
                    f"The teacher's embeddings in {self.path} are computed anew: {reason}.",
                    UserWarning,
                    stacklevel=2,
                )
                self.path.unlink()
        if not self.path.exists():
            vectors = self._embed(encoder.to(device), [wanted[key] for key in keys.tolist()])
            _write(self.path, keys, vectors, {"identity": identity, "facts": self._facts(encoder)})
        self._prepared, self._opened = keys, None

    def vectors(self, texts: Sequence[str], role: str | None = None) -> Tensor:
        """Return the embeddings of texts, [n, K] float32; their inner products are the scores.

        Raises:
            InputError: If the file does not exist or lacks a text.
            CheckpointError: If the file cannot be read.
        """
        table = self._table()
        keys = torch.tensor([_key(text, role) for text in texts], dtype=torch.int64)
        places = torch.searchsorted(table.keys, keys).clamp_(max=len(table.keys) - 1)
        missing = (table.keys[places] != keys).nonzero().flatten().tolist()
        if missing:
            raise InputError(
                f"Expected the teacher's embeddings of all texts in {self.path}, but it has none "
                f"of {texts[missing[0]]!r} in role {role!r}. Call `prepare` with all texts."
            )
        return table.vectors[places]

    def facts(self) -> dict[str, Any]:
        """Return what the teacher is and how many texts it has embedded, as plain values.

        Raises:
            InputError, CheckpointError: As `vectors` does.
        """
        table = self._table()
        return {**table.header["facts"], "n_texts": len(table.keys)}

    # -- inside ---------------------------------------------------------------------------------

    def _table(self) -> _Table:
        if self._opened is None:
            if not self.path.exists():
                raise InputError(
                    f"Expected the teacher's embeddings in {self.path}, but there is no such file. "
                    "Call `prepare`; on several processes, set `output_dir` to a folder that those "
                    "of a machine share."
                )
            self._opened = _read(self.path)
        return self._opened

    def _load(self, roles: Iterable[str | None]) -> SiameseEncoder:
        """Return the teacher, when it is known that its scores are its own and can be compared."""
        named = {} if self.prompt is None else {"default": self.prompt}
        encoder = SiameseEncoder.from_pretrained(
            self.name,
            shift=None if self._is_shifted else False,
            reference=None if self._is_shifted else "pad",  # not used, and every model allows it
            max_length=self.max_length,
            prompts=named or None,
            default_prompt_name="default" if named else None,
            device="cpu",
        )
        of_length_1 = encoder.normalize and encoder.model.truncate_dim is None
        if encoder.similarity != self.similarity and not of_length_1:
            raise InputError(
                f"Expected a teacher that scores by {self.similarity!r} as the model that is "
                f"trained, but {self.name!r} scores by {encoder.similarity!r}. Set "
                f"`model.similarity={encoder.similarity}`, or another `objective.teacher`."
            )
        for role in roles:
            encoder.check_role(role)
        encoder.check_parity()
        return encoder

    def _embed(self, encoder: SiameseEncoder, keys: Sequence[TextInRole]) -> Tensor:
        """Return the vectors of texts in their order, [n, K]."""
        found = embed_texts(encoder, keys, progress=self.progress)
        vectors = torch.stack([found[key] for key in keys]).float()
        if self.similarity == "cos":
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        bad = (~vectors.isfinite().all(dim=-1)).nonzero().flatten().tolist()
        if bad:
            raise ModelError(
                f"Expected finite embeddings of the teacher {self.name!r}, but those of {len(bad)} "
                f"of {len(keys)} texts are not, such as {keys[bad[0]][0]!r}. Set another "
                "`objective.teacher`."
            )
        return vectors

    def _facts(self, encoder: SiameseEncoder) -> dict[str, Any]:
        return {
            "name": self.name,
            "architecture": encoder.split.name,
            "fingerprint": encoder.model_fingerprint,
            "embedding_dim": encoder.embedding_dim,
            "similarity": self.similarity,
            "shift": encoder.shift,
        }


def _key(text: str, role: str | None) -> int:
    """Return the number of a text in its role: see `text_id`."""
    return text_id(f"{role!r}\n{text}")


def _identity(encoder: SiameseEncoder) -> str:
    """Return the SHA-256 of weights, settings, configuration and tokenizer of an encoder."""
    payload = encoder.checkpoint_payload()
    files = {
        name: hashlib.sha256(content.numpy().data).hexdigest()
        for name, content in payload["files"].items()
    }
    reference = encoder.reference_label if encoder.shift else None
    content = {
        "weights": encoder.model_fingerprint,
        "files": files,
        "head": [encoder.similarity, encoder.shift, reference, encoder.normalize],
        "texts": [encoder.max_length, encoder.model.truncate_dim],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unusable_reason(path: Path, keys: Tensor, identity: str) -> str | None:
    """Return why a file is not that of these texts and this teacher, or None where it is."""
    try:
        table = _read(path)
    except CheckpointError as error:
        return str(error)
    if table.header.get("identity") != identity:
        return "they are those of another teacher, or of other settings"
    if not torch.equal(table.keys, keys):
        return "they are those of other texts"
    if table.header.get("sha256") != _digest(table.vectors):
        return "they are damaged"
    return None


def _digest(vectors: Tensor) -> str:
    return hashlib.sha256(vectors.numpy().data).hexdigest()


def _read(path: Path) -> _Table:
    """Open a file.

    Raises:
        CheckpointError: If it cannot be read, or is of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("xsiam", "{}"))
            keys, vectors = (file.get_tensor(name) for name in ("keys", "vectors"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no file of a teacher's embeddings ({error})") from error
    if header.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {header.get('version')!r} and not {FORMAT_VERSION}"
        )
    return _Table(keys, vectors, header)


def _write(path: Path, keys: Tensor, vectors: Tensor, header: Mapping[str, Any]) -> None:
    """Write a file that appears as a whole or not at all."""
    header = {"version": FORMAT_VERSION, **header, "sha256": _digest(vectors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.part")
    try:
        tensors = {"keys": keys, "vectors": vectors}
        save_file(tensors, part, metadata={"xsiam": json.dumps(header)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
