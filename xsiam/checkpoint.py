"""Write and read encoders: exported folders, and what a training checkpoint carries."""

from __future__ import annotations

import json
import pickle
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Module, Normalize, Transformer
from torch import Tensor, nn

from xsiam.adapters import (
    LoraSettings,
    check_peft,
    inject_lora,
    lora_settings,
    merge_adapters,
    merged_adapters,
    without_lora,
)
from xsiam.encoder import SIMILARITIES, SiameseEncoder
from xsiam.errors import CheckpointError
from xsiam.model_card import model_card
from xsiam.model_folders import SETTINGS_FILE, ResolvedModel, read_json
from xsiam.modules import ReferenceShift
from xsiam.pretrained import load_sentence_transformer, local_copy, resolve
from xsiam.references import REFERENCES, AbstractReference, get_reference
from xsiam.split import evaluation_mode

FORMAT_VERSION = 1
# A folded shift is still the model's own where ẽ(r) is below this share of e(r).
_FOLD_TOLERANCE = 1e-4
_WEIGHT_SUFFIXES = {".safetensors", ".bin"}
_STATE_PREFIX = "encoder.model."  # where a LightningModule with `self.encoder` keeps the weights


def load_encoder(
    name_or_path: str | Path,
    *,
    similarity: str | None,
    shift: bool | None,
    reference: str | AbstractReference | None,
    normalize: bool | None,
    **loading: Any,
) -> SiameseEncoder:
    """Load an encoder from anything :func:`xsiam.pretrained.resolve` understands.

    Arguments that are not None win over what the source records. Adapters are merged.
    """
    resolved = local_copy(resolve(name_or_path))
    if resolved.kind == "checkpoint":
        model, settings = _load_checkpoint(Path(resolved.path), loading)
    else:
        model = load_sentence_transformer(resolved, **loading)
        merge_adapters(model)
        settings = {"shift": resolved.shift, "similarity": resolved.similarity}
        if resolved.kind == "reference_code" and resolved.shift:
            settings["reference"] = "pad"
        settings |= _take_out_shift(model, _read_settings(resolved.path))
    given = {
        "similarity": similarity,
        "shift": shift,
        "reference": reference,
        "normalize": normalize,
    }
    saved = _saved_reference(settings)
    settings |= {key: value for key, value in given.items() if value is not None}
    is_another = saved is None or reference not in (None, saved.name)
    if is_another and settings.get("reference"):
        saved = get_reference(settings["reference"])
    shift = settings.get("shift")
    if shift is None:
        shift = saved is None or saved.can_shift
    encoder = SiameseEncoder(
        model,
        similarity=settings.get("similarity"),
        shift=bool(shift),
        reference=saved,
        normalize=settings.get("normalize"),
    )
    encoder.trained_on = settings.get("trained_on")
    return encoder


def export_encoder(
    encoder: SiameseEncoder, path: Path, run: Mapping[str, Any] | None = None
) -> None:
    """Write a sentence-transformers folder that scores as the encoder does.

    A length-free shift is folded into a stock ``Dense`` (identity weight, bias −e(r)), so that
    ``SentenceTransformer(path)`` needs nothing of ours. Another shift is written as
    :class:`~xsiam.modules.ReferenceShift`, which plain sentence-transformers refuses. Adapters are
    merged into the weights that are written; the encoder keeps them. README.md is
    :func:`~xsiam.model_card.model_card` of the training run, if there was one.
    """
    path.mkdir(parents=True, exist_ok=True)
    with merged_adapters(encoder.model):
        modules = list(encoder.split.modules)
        if encoder.shift:
            modules.append(_shift_module(encoder))
        if encoder.normalize:
            modules.append(Normalize())
        similarity = next(name for name, ours in SIMILARITIES.items() if ours == encoder.similarity)
        _assemble(encoder, modules, similarity).save(str(path), create_model_card=False)
        settings = {
            "format_version": FORMAT_VERSION,
            **_settings_of(encoder),
            "shift_module": len(encoder.split.modules) if encoder.shift else None,
        }
    (path / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (path / "README.md").write_text(model_card(encoder, run), encoding="utf-8")


def payload_of(encoder: SiameseEncoder) -> dict[str, Any]:
    """Return all of an encoder but its weights: plain values, and bytes as tensors."""
    model, lora = encoder.model, lora_settings(encoder.model)
    settings = _settings_of(encoder)  # first: asking for names of weights shares them out again
    with tempfile.TemporaryDirectory() as folder:
        weights = _write_without_weights(model, Path(folder))
        files = {
            str(file.relative_to(folder)): torch.frombuffer(bytearray(content), dtype=torch.uint8)
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file() and (content := file.read_bytes())
        }
    return {
        "format_version": FORMAT_VERSION,
        "encoder": settings,
        "files": files,
        "weights": weights,
        "lora": None if lora is None else asdict(lora),
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint, weights-only, and check that this version can use it.

    Raises:
        CheckpointError: If it is damaged, not ours, or of a newer format.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"Expected a checkpoint in {str(path)!r}, but reading it failed with "
            f"{type(error).__name__}: {first} Use another checkpoint of that run."
        ) from error
    payload = checkpoint.get("xsiam") if isinstance(checkpoint, dict) else None
    if payload is None or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"Expected a checkpoint written by xsiam in {str(path)!r}, but it carries no encoder."
        )
    check_format(payload.get("format_version"), str(path))
    return dict(checkpoint)


def check_format(version: Any, where: str) -> None:
    """Raise CheckpointError where a format is newer than this version reads."""
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"Expected format {FORMAT_VERSION} or older in {where!r}, but it has format "
            f"{version!r}. Install a newer xsiam."
        )


def _shift_module(encoder: SiameseEncoder) -> nn.Module:
    """Return the module that subtracts the shift, or stands for it."""
    if not encoder.reference.length_free:
        return ReferenceShift(encoder.reference.name)
    with torch.no_grad(), evaluation_mode(encoder):
        shift = encoder.shift_of(encoder._probe_features())
    assert shift is not None
    size = shift.shape[1]
    return Dense(
        size,
        size,
        activation_function=nn.Identity(),
        init_weight=torch.eye(size, dtype=shift.dtype, device=shift.device),
        init_bias=-shift[0].clone(),
    )


def _assemble(
    encoder: SiameseEncoder, modules: list[nn.Module], similarity: str
) -> SentenceTransformer:
    own = encoder.model
    return SentenceTransformer(
        modules=modules,
        device=str(encoder.device),
        prompts={name: prompt or "" for name, prompt in own.prompts.items()},
        default_prompt_name=own.default_prompt_name,
        similarity_fn_name=similarity,  # type: ignore[arg-type]
        truncate_dim=own.truncate_dim,
        local_files_only=True,
    )


def _settings_of(encoder: SiameseEncoder) -> dict[str, Any]:
    return {
        "similarity": encoder.similarity,
        "shift": encoder.shift,
        "reference": encoder.reference.name,
        "reference_state": encoder.reference.state(encoder.split, encoder._probe_features()),
        "normalize": encoder.normalize,
        "trained_on": encoder.trained_on,
    }


def _saved_reference(
    settings: Mapping[str, Any], *, verified: bool = True
) -> AbstractReference | None:
    """Return the reference that was saved with a model, or None where its name says all.

    With ``verified`` a vector is refused later where the weights are not those it was saved with.
    """
    state = settings.get("reference_state")
    if not state:
        return None
    if not verified:
        state = {**state, "embedding": None}
    return REFERENCES[settings["reference"]].from_state(state)


def _read_settings(path: str) -> dict[str, Any]:
    """Read the settings beside an exported model; empty for any other folder or a hub name."""
    file = Path(path) / SETTINGS_FILE
    settings: dict[str, Any] = read_json(file, dict) or {}
    if settings:
        check_format(settings.get("format_version"), str(file))
    return settings


def _take_out_shift(model: SentenceTransformer, settings: dict[str, Any]) -> dict[str, Any]:
    """Remove the exported shift from the modules, to be computed live, if it is still ours."""
    index = settings.get("shift_module")
    if index is None:
        return settings
    module = model[index]
    if isinstance(module, ReferenceShift):
        del model[index]
        return settings
    if isinstance(module, Dense) and _is_fold_of(model, index, settings):
        del model[index]
        return settings
    warnings.warn(
        "The folded reference shift of this model is no longer its own: module "
        f"{index} does not cancel the embedding of the {settings['reference']!r} reference, "
        "since the model was trained further elsewhere. It is treated as a model without a shift; "
        "set `model.shift=true` for a new one.",
        UserWarning,
        stacklevel=4,
    )
    return {**settings, "shift": False, "reference_state": None}  # a state is of one model only


def _is_fold_of(model: SentenceTransformer, index: int, settings: Mapping[str, Any]) -> bool:
    """Whether module ``index`` adds −e(r) and nothing else: identity weight and ẽ(r) ≈ 0."""
    dense: Any = model[index]
    weight, bias = dense.linear.weight, dense.linear.bias
    if weight.shape[0] != weight.shape[1] or bias is None:
        return False
    body = nn.Sequential(*list(model.children())[:index])
    plain = SentenceTransformer(
        modules=list(body), device=str(weight.device), local_files_only=True
    )
    # Whether the weights are still those of a saved vector is what is found out right here.
    reference = _saved_reference(settings, verified=False) or settings["reference"]
    encoder = SiameseEncoder(plain, similarity="dot", shift=True, reference=reference)
    with torch.no_grad(), evaluation_mode(encoder):
        features = encoder._probe_features()
        shift = encoder.shift_of(features)
        assert shift is not None
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        scale = torch.maximum(shift[0].norm(), encoder.split.embed(features)[0].norm())
        left = dense.linear(shift[0]).norm() / scale
    return bool(torch.equal(weight, identity) and left <= _FOLD_TOLERANCE)


def _load_checkpoint(
    path: Path, loading: Mapping[str, Any]
) -> tuple[SentenceTransformer, dict[str, Any]]:
    """Rebuild the SentenceTransformer of a checkpoint from the files and weights inside it."""
    checkpoint = read_checkpoint(path)
    payload = checkpoint["xsiam"]
    state = {
        name.removeprefix(_STATE_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_STATE_PREFIX)
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for name, content in payload["files"].items():
            _write_inside(root, name, bytes(content.numpy()))
        for place, prefix in payload["weights"].items():
            _write_weights(root / place, without_lora(state), prefix)
        model = load_sentence_transformer(ResolvedModel(str(root), "folder"), **loading)
    lora = payload.get("lora")
    if lora:
        check_peft()
    try:
        if lora:
            inject_lora(model, LoraSettings(**lora))
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"Expected {str(path)!r} to hold the weights of its own model, but {error}"
        ) from error
    merge_adapters(model)
    return model, dict(payload["encoder"])


def _write_inside(root: Path, name: str, content: bytes) -> None:
    """Write a file of a checkpoint, only inside ``root``."""
    target = (root / name).resolve()
    if root not in target.parents:
        raise CheckpointError(
            f"Expected the files of a checkpoint to stay inside their folder, but got {name!r}."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def _write_weights(folder: Path, state: Mapping[str, Tensor], prefix: str) -> None:
    tensors = {
        name.removeprefix(prefix): tensor.clone().contiguous()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _write_without_weights(model: SentenceTransformer, folder: Path) -> dict[str, str]:
    """Write a SentenceTransformer folder without weights; return where which weights belong."""
    entries, weights = [], {}
    for index, (name, module) in enumerate(model.named_children()):
        assert isinstance(module, Module)
        place = "" if index == 0 else f"{index}_{type(module).__name__}"
        (folder / place).mkdir(exist_ok=True)
        prefix = f"{name}."
        if isinstance(module, Transformer):
            module.auto_model.config.save_pretrained(folder / place)
            module.processor.save_pretrained(folder / place)
            module.save_config(str(folder / place))
            prefix = f"{name}.model."
        else:
            module.save_config(str(folder / place))
        if any(key.startswith(prefix) for key in model.state_dict()):
            weights[place] = prefix
        kind = f"{type(module).__module__}.{type(module).__name__}"
        entries.append({"idx": index, "name": name, "path": place, "type": kind})
    for file in folder.rglob("*"):
        if file.suffix in _WEIGHT_SUFFIXES:
            file.unlink()
    config = {
        "model_type": "SentenceTransformer",
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
        "similarity_fn_name": model.similarity_fn_name,
        "truncate_dim": model.truncate_dim,
    }
    (folder / "modules.json").write_text(json.dumps(entries), encoding="utf-8")
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config), encoding="utf-8")
    return weights
