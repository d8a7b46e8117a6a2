"""Say what a local model folder is, from its JSON files alone, and refuse what cannot be loaded.

Nothing here imports torch or runs anything found in a folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xsiam.archives import unsafe_path
from xsiam.errors import CheckpointError, ModelError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""Weight files that are read; pickled ones (`.bin`) through torch's restricted reader only."""

SETTINGS_FILE = "xsiam.json"
"""Beside the files of sentence-transformers: what xsiam knows of a model that it exported."""

STOCK_MODULES = "sentence_transformers."
OWN_MODULES = "xsiam.modules."
# Class names of the reference code and whether they subtract the reference embedding.
_REFERENCE_CLASSES = {"ShiftingReferenceTransformer": True, "ReferenceTransformer": False}
_SIMILARITIES = {"cosine": "cos", "dot": "dot"}


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is and what its source says about itself.

    Attributes:
        path: A local folder or file, or a hub name: what `load_sentence_transformer` loads.
        kind: "folder" (sentence-transformers or plain Hugging Face), "hub", "checkpoint" (a `.ckpt`
            file of ours) or "reference_code" (a folder written by the reference implementation).
        shift: Whether the model subtracts its reference embedding; None where nothing is recorded.
        similarity: "cos", "dot" or another name as recorded; None where nothing is recorded.
        normalize: Whether embeddings are normalised; None where nothing is recorded.
    """

    path: str
    kind: str
    shift: bool | None = None
    similarity: str | None = None
    normalize: bool | None = None


def inspect_folder(folder: Path) -> ResolvedModel:
    """Classify a model folder.

    Raises:
        CheckpointError: A JSON file is damaged or missing.
        ModelError: The folder is no model, has no weights, or needs foreign code.
    """
    modules = read_json(folder / "modules.json", list)
    if modules is None:
        if not (folder / "config.json").is_file():
            raise ModelError(
                "Expected `modules.json` or `config.json` in the model folder "
                f"{str(folder)!r}, but found neither. Give the folder that a model was saved to."
            )
        _check_weights(folder, folder)
        return ResolvedModel(str(folder), "folder")
    types = [_module_type(entry, folder) for entry in modules]
    _check_module_types(types, folder)
    # Only a Transformer's weights have a known place; Routers and static embeddings nest theirs.
    _check_weights(folder, folder / modules[0]["path"] if _is_transformer(types[0]) else None)
    config = read_json(folder / "config_sentence_transformers.json", dict) or {}
    if (model_type := config.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise ModelError(
            f"Expected a SentenceTransformer in {str(folder)!r}, but it says it is a "
            f"{model_type!r}. Give a model that maps one text to one vector."
        )
    recorded = config.get("similarity_fn_name")
    shifts = [shift for name in types if (shift := reference_shift(name)) is not None]
    return ResolvedModel(
        str(folder),
        "reference_code" if shifts else "folder",
        shift=shifts[0] if shifts else None,
        similarity=_SIMILARITIES.get(recorded, recorded) if recorded else None,
    )


def reference_shift(type_name: str) -> bool | None:
    """Say whether a module class of the reference code shifts; None for any other class."""
    if not type_name.startswith("xsbert."):
        return None
    return _REFERENCE_CLASSES.get(type_name.rpartition(".")[2])


def read_json(path: Path, expected: type) -> Any:
    """Read a JSON file of the expected top-level type; None if there is no such file.

    Raises:
        CheckpointError: It is not JSON, or of another type.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(
            f"Expected {str(path)!r} to be JSON, but reading it failed: {error}. Save the model "
            "again."
        ) from error
    if not isinstance(content, expected):
        raise CheckpointError(
            f"Expected {str(path)!r} to hold a {expected.__name__}, but got a "
            f"{type(content).__name__}. Save the model again."
        )
    return content


def _module_type(entry: Any, folder: Path) -> str:
    """Read the class name of an entry of modules.json; its path must lie inside the folder."""
    well_formed = isinstance(entry, dict) and all(
        isinstance(entry.get(key), str) for key in ("type", "path", "name")
    )
    if not well_formed or unsafe_path(entry["path"]):
        raise CheckpointError(
            f"Expected each entry of `modules.json` in {str(folder)!r} to have a `type`, a `name` "
            f"and a `path` inside the folder, but got {entry!r}. Save the model again."
        )
    return str(entry["type"])


def _check_module_types(types: list[str], folder: Path) -> None:
    """Refuse a model that needs code from elsewhere, or lacks what our own modules need."""
    known = (STOCK_MODULES, OWN_MODULES)
    foreign = [t for t in types if reference_shift(t) is None and not t.startswith(known)]
    if foreign or not types:
        raise ModelError(
            f"Expected `modules.json` in {str(folder)!r} to name modules of sentence-transformers, "
            f"but got {foreign[0] if foreign else 'an empty list'!r}. Models that bring their own "
            "code are not supported."
        )
    own = [name for name in types if name.startswith(OWN_MODULES)]
    if own and not (folder / SETTINGS_FILE).is_file():
        raise CheckpointError(
            f"Expected `{SETTINGS_FILE}` beside the module {own[0]!r} in {str(folder)!r}, but it "
            "is missing. Copy the whole folder that `save_pretrained` wrote."
        )


def _is_transformer(type_name: str) -> bool:
    """Tell modules with a Hugging Face model inside: the stock one and the reference code's."""
    return type_name.rpartition(".")[2] == "Transformer" or reference_shift(type_name) is not None


def _check_weights(folder: Path, place: Path | None) -> None:
    """Refuse a folder without a weight file in `place` (None: anywhere in the folder)."""
    found = (
        any(path.name in WEIGHT_FILES for path in folder.rglob("*"))
        if place is None
        else any((place / name).is_file() for name in WEIGHT_FILES)
    )
    if not found:
        raise ModelError(
            f"Expected weights in the model folder {str(folder)!r}, but found none of "
            f"{', '.join(WEIGHT_FILES)} in {str(place or folder)!r}. Copy the weights there, or "
            "save the model again."
        )
