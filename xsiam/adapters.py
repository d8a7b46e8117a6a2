"""Low-rank adapters (LoRA), by peft: added to an encoder, saved with it, merged into its weights.

peft puts adapter layers in the place of Linear modules and trains nothing else. Everything but
training sees plain weights: what is loaded has its adapters merged, and so has what is exported or
attributed. `merged_adapters` is how: it puts plain modules with the merged weights in the place of
adapter layers for a while, and then the very same layers back, so that training goes on with the
same bits.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xsiam.errors import InputError, ModelError
from xsiam.split import evaluation_mode

if TYPE_CHECKING:
    from xsiam.encoder import SiameseEncoder

__all__ = [
    "LoraSettings",
    "add_lora",
    "check_peft",
    "has_adapters",
    "inject_lora",
    "lora_settings",
    "merge_adapters",
    "merged_adapters",
    "without_lora",
]

ALL_LINEAR = "all-linear"
"""Name that stands for every Linear module."""

_ADAPTER = "default"  # peft's name of the only adapter
_TARGETS = (nn.Linear, Conv1D)
# What a rebuilt configuration may differ in: the origin of the model, the spelling of targets.
_FREE = ("base_model_name_or_path", "inference_mode", "target_modules")


@dataclass(frozen=True)
class LoraSettings:
    """What LoRA layers are made of, in plain values for checkpoints.

    Attributes:
        r: Rank.
        alpha: Scale: B A is multiplied by alpha / r.
        dropout: Of the input of A, in training.
        target_modules: Names of modules of the transformer, or ends of them.
    """

    r: int
    alpha: float
    dropout: float
    target_modules: list[str]


def check_peft() -> None:
    """Raise InputError, with the command that installs it, where peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            "Expected peft for LoRA adapters, but it is not installed. "
            'Install it with `pip install "xsiam[peft]"`.'
        )


def add_lora(
    encoder: SiameseEncoder,
    *,
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
) -> LoraSettings:
    """Put LoRA layers into an encoder and freeze all else; its embeddings do not change yet.

    A Linear with weight W then computes with W + alpha / r · B A, where A is [r, in] and random, B
    is [out, r] and 0. Dense modules after the pooling and everything else stay as they are.

    Args:
        encoder: The encoder, whose model is changed in place.
        r: Rank, 1 or more.
        alpha: Scale, above 0.
        dropout: Of the input of A in training, 0 up to but not including 1.
        target_modules: Names of Linear modules of the transformer ("query"; the end of the full
            name is enough), or "all-linear"; None takes peft's for the architecture, and
            "all-linear" where peft knows none.

    Returns:
        The settings, with the targets that were found.

    Raises:
        InputError: If peft is missing, a number is out of its range, or a name is that of no Linear
            module or only of ones that embeddings do not depend on.
        ModelError: If the model has adapters already.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), section 4.1.
    """
    check_peft()
    if has_adapters(encoder.model):
        raise ModelError(
            "Expected a model without adapters to add LoRA to, but it has some. "
            "Merge them with `xsiam.adapters.merge_adapters(encoder.model)`."
        )
    for name, value, constraint, holds in (
        ("r", r, "1 or more", r >= 1),
        ("alpha", alpha, "above 0", alpha > 0),
        ("dropout", dropout, "from 0 up to but not including 1", 0 <= dropout < 1),
    ):
        if not holds:
            raise InputError(
                f"Expected `{name}` to be {constraint}, but got {value}. Set `lora.{name}`."
            )
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    targets = _targets(encoder.model.transformers_model, wanted)
    inject_lora(encoder.model, LoraSettings(r, alpha, dropout, targets))
    for module in encoder.split.modules[1:]:
        module.requires_grad_(False)
    _check_used(encoder, targets)
    settings = lora_settings(encoder.model)
    assert settings is not None
    return settings


def inject_lora(model: SentenceTransformer, settings: LoraSettings) -> None:
    """Put LoRA layers into a model's transformer, as settings say that were checked before."""
    model.add_adapter(_config(settings))


def has_adapters(model: SentenceTransformer) -> bool:
    """Whether a model's transformer has adapters that act, or could."""
    return bool(getattr(model.transformers_model, "_hf_peft_config_loaded", False))


def lora_settings(model: SentenceTransformer) -> LoraSettings | None:
    """Return a model's LoRA settings, None where it has no adapters.

    Raises:
        ModelError: If it has adapters that `add_lora` does not make: a checkpoint could not hold
            them.
    """
    if not has_adapters(model):
        return None
    configs: dict[str, Any] = model.transformers_model.peft_config  # type: ignore[union-attr]
    found = configs.get(_ADAPTER)
    if len(configs) == 1 and getattr(found, "peft_type", None) == "LORA":
        assert found is not None
        targets = found.target_modules
        targets = [targets] if isinstance(targets, str) else sorted(targets)
        settings = LoraSettings(found.r, found.lora_alpha, found.lora_dropout, targets)
        ours, theirs = (config.to_dict() for config in (_config(settings), found))
        if all(ours[key] == theirs[key] for key in ours if key not in _FREE):
            return settings
    raise ModelError(
        f"Expected adapters made by `xsiam.adapters.add_lora`, but got {sorted(configs)} of other "
        "kinds or options, which checkpoints cannot hold. Merge them with "
        "`xsiam.adapters.merge_adapters(encoder.model)`, or add LoRA through `lora.enabled=true`."
    )


def without_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the model below the LoRA layers, under the names of a plain model."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" not in name
    }


def merge_adapters(model: SentenceTransformer) -> None:
    """Merge adapters into a model's weights for good; all of them can be trained then.

    Does nothing to a model without adapters.
    """
    if not has_adapters(model):
        return
    for parent, name, plain in _merged_modules(model):
        setattr(parent, name, plain)
    _forget_adapters(model.transformers_model)
    for parameter in model.parameters():
        parameter.requires_grad = True


@contextmanager
def merged_adapters(model: SentenceTransformer) -> Iterator[None]:
    """Within this context a model has plain modules with the merged weights.

    Adapter layers are put back afterwards, untouched. Does nothing to a model without adapters.
    """
    if not has_adapters(model):
        yield
        return
    transformer: Any = model.transformers_model
    swaps = [(p, name, getattr(p, name), plain) for p, name, plain in _merged_modules(model)]
    configs = transformer.peft_config
    try:
        for parent, name, _, plain in swaps:
            setattr(parent, name, plain)
        _forget_adapters(transformer)
        yield
    finally:
        for parent, name, layer, _ in swaps:
            setattr(parent, name, layer)
        transformer.peft_config = configs
        transformer._hf_peft_config_loaded = True


# -- inside -------------------------------------------------------------------------------------


def _config(settings: LoraSettings) -> Any:
    """Return peft's configuration; its targets are a set of names."""
    from peft import LoraConfig

    options: dict[str, Any] = {
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": settings.target_modules,
    }
    return LoraConfig(**options)


def _targets(transformer: Any, wanted: Sequence[str] | None) -> list[str]:
    """Return the names to give to peft, each of which some Linear module has.

    Raises:
        InputError: If a name is that of no Linear module.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    modules = dict(transformer.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, _TARGETS)]
    if wanted is None:
        wanted = KNOWN.get(transformer.config.model_type) or [ALL_LINEAR]
    if [name.lower() for name in wanted] == [ALL_LINEAR]:
        return linear
    for target in wanted:
        matched = [name for name in modules if f".{name}".endswith(f".{target}") and target]
        other = [name for name in matched if name not in linear]
        if matched and not other:
            continue
        kind = f"a {type(modules[other[0]]).__name__}" if other else "in no module"
        names = sorted({name.rpartition(".")[2] for name in linear})
        raise InputError(
            f"Expected `target_modules` to be names of Linear modules of "
            f"{type(transformer).__name__} ({', '.join(names)}), their full names such as "
            f"{linear[0]!r}, or {ALL_LINEAR!r}, but got {target!r}, which is {kind}. "
            "Set `lora.target_modules`."
        )
    return sorted(set(wanted))


def _check_used(encoder: SiameseEncoder, targets: Sequence[str]) -> None:
    """Raise InputError where embeddings depend on no adapter, as with a pooler."""
    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(encoder):
        if not encoder(encoder._probe_features()).requires_grad:
            raise InputError(
                f"Expected `target_modules` that embeddings depend on, but got {list(targets)}, "
                "which they do not. Set `lora.target_modules`."
            )


def _merged_modules(model: SentenceTransformer) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return, for every adapter layer, its parent, its name there, and a merged plain module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    transformer: Any = model.transformers_model
    plain: dict[int, nn.Module] = {}
    found = []
    with torch.inference_mode(False), torch.no_grad():
        for path, layer in list(transformer.named_modules(remove_duplicate=False)):
            if isinstance(layer, BaseTunerLayer):
                if id(layer) not in plain:
                    plain[id(layer)] = _merged(layer)
                parent, _, name = path.rpartition(".")
                found.append((transformer.get_submodule(parent), name, plain[id(layer)]))
    return found


def _merged(layer: Any) -> nn.Module:
    """Return the base layer with the active adapters added to its weight; the layer stays."""
    base: nn.Module
    if layer.disable_adapters:
        base = copy.deepcopy(layer.get_base_layer())
    else:
        copied = copy.deepcopy(layer)
        copied.merge()
        base = copied.get_base_layer()
    return base.train(layer.training)


def _forget_adapters(transformer: Any) -> None:
    """Let transformers take the model for one without adapters."""
    transformer._hf_peft_config_loaded = False
    del transformer.peft_config
