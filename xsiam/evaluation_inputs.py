"""What an evaluation is made of: device, model, layers, pairs and analyses, loaded and checked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from xsiam.accuracy import sample_pairs
from xsiam.analysis import Context, Plan
from xsiam.analysis.summary import FOLDER
from xsiam.attribution import PairAttributor
from xsiam.checks import check_accelerator
from xsiam.config import DataConfig, EvaluateConfig
from xsiam.data import PairDataModule
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.layer_store import attributor_settings
from xsiam.losses import get_objective
from xsiam.pairs import PairDataset
from xsiam.pretrained import records_shift
from xsiam.tables import BUNDLED

__all__ = [
    "build_encoder",
    "evaluation_device",
    "layers_to_attribute",
    "load_test_pairs",
    "plan_analyses",
]


def evaluation_device(config: EvaluateConfig) -> torch.device:
    """Return the device of an evaluation, which is one process on one device."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    kind = config.accelerator.lower()
    names = {
        "auto": "cuda" if cuda else "cpu",
        "cpu": "cpu",
        "gpu": "mps" if mps and not cuda else "cuda",
        "cuda": "cuda",
        "mps": "mps",
    }
    if kind not in names:
        raise InputError(
            f"Expected `accelerator` to be one of {', '.join(names)}, but got "
            f"{config.accelerator!r}. Set `accelerator`."
        )
    check_accelerator(config.accelerator, "accelerator")
    if config.devices not in (1, "auto"):
        raise InputError(
            "Expected `devices` to be 1, since an evaluation runs in one process, but got "
            f"{config.devices!r}. Set `devices=1`."
        )
    return torch.device(names[kind])


def build_encoder(
    config: EvaluateConfig, checkpoint: str, device: torch.device, **replaced: Any
) -> SiameseEncoder:
    """Load a model with what the configuration, and the caller, replace of its settings."""
    settings = asdict(config.model) | replaced
    roles = [settings.pop(name) for name in ("role_a", "role_b")]
    prompt = settings.pop("prompt")
    named = {} if prompt is None else {"default": prompt}
    encoder = SiameseEncoder.from_pretrained(
        checkpoint,
        **settings,
        prompts=named or None,
        default_prompt_name="default" if named else None,
        device=device,
    )
    for role in roles:
        encoder.check_role(role)
    return encoder


def plan_analyses(
    config: EvaluateConfig,
    output: Path,
    encoder: SiameseEncoder,
    pairs: PairDataset,
    layers: Sequence[int],
    device: torch.device,
) -> Plan | None:
    """Return the analyses that are wanted, with all that they need checked; None without any."""
    wanted = config.analysis
    if not wanted.names:
        return None
    chosen = list(wanted.layers or layers)
    if not chosen:
        raise InputError(
            "Expected layers for the analyses, but `attribution.enabled` is false and "
            "`analysis.layers` names none. Set `analysis.layers`."
        )
    for layer in chosen:
        encoder.check_layer(layer, key="analysis.layers")

    def load(checkpoint: str, reference: str | None) -> SiameseEncoder:
        # What records no shift was not made by a run of ours: it is compared as it is.
        shift = None if records_shift(checkpoint) else False
        own = {"shift": shift, "reference": reference, "similarity": encoder.similarity}
        return build_encoder(config, checkpoint, device, **own)

    context = Context(
        settings=wanted,
        encoder=encoder,
        pairs=pairs.select(sample_pairs(len(pairs), wanted.n_pairs, wanted.seed)),
        layers=tuple(sorted(set(chosen), reverse=True)),
        folder=output / FOLDER / "token_vectors",
        attributor_settings=attributor_settings(config.attribution),
        load=load,
        roles=(config.model.role_a, config.model.role_b),
        progress=config.progress_bar and sys.stdout.isatty(),
    )
    return Plan(wanted.names, context, output / FOLDER)


def layers_to_attribute(
    config: EvaluateConfig, encoder: SiameseEncoder, notes: list[str]
) -> list[int]:
    """Return the layers to attribute at, all of them checked, with the settings to do it by."""
    if not config.attribution.enabled:
        return []
    layers = list(config.attribution.layers)
    if not layers:
        layers = [max(encoder.n_layers - 1, 0)]
        notes.append(
            f"No layer was given: attributions are at layer {layers[0]}, the input of the last "
            "block. Set `attribution.layers` for others."
        )
    for layer in layers:
        encoder.check_layer(layer, key="attribution.layers")
    # Refuses what it cannot do, before anything is scored.
    PairAttributor(encoder, layers[0], **attributor_settings(config.attribution))
    return layers


def load_test_pairs(
    config: EvaluateConfig, encoder: SiameseEncoder, notes: list[str]
) -> PairDataset:
    """Return the test pairs, all of them read and checked; without any the bundled ones."""
    data = config.data
    sources = (data.train, data.validation, data.test, data.name)
    if all(source is None for source in sources):
        data = replace(data, name=BUNDLED)
        notes.append(
            "No pairs were given: these are the bundled test pairs. Set `data.test` for others."
        )
    return _data_module(data, config, encoder).pairs("test")


def _data_module(
    data: DataConfig, config: EvaluateConfig, encoder: SiameseEncoder
) -> PairDataModule:
    # The labels that training would take for this similarity: the same file, the same check.
    objective = get_objective("mse_cosine" if encoder.similarity == "cos" else "mse_dot")
    return PairDataModule(
        encoder.preprocess,
        **asdict(data),
        seed=config.seed,
        role_a=config.model.role_a,
        role_b=config.model.role_b,
        needs_label=False,
        negatives="unused",
        expected_range=objective.label_range,
    )


# -- files and table ------------------------------------------------------------------------------
