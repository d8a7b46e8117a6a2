"""How deep in an encoder a parameter sits: what is frozen, and how fast each layer learns.

Depths are those of layers in the rest of the library. Depth 0 are the embeddings and all else that
the blocks are fed with (MPNet's and DeBERTa's tables of relative positions are outside the blocks),
depth l + 1 is block l of L, and depth L + 1 is what comes after the blocks: a last norm, Dense
modules. So the hidden states that enter layer l follow from the parameters of depth 0 … l. T5 keeps
its table of relative positions, which all blocks read, in block 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.split import evaluation_mode, features_to

__all__ = ["check_depths", "freeze_lower_layers", "parameter_depths", "parameter_groups"]

_PROBE = "a b"  # any text: which parameters embeddings depend on follows from no word


def parameter_depths(encoder: SiameseEncoder) -> dict[str, int]:
    """Return the depth of every trainable parameter by its name in the encoder, 0 … L + 1.

    What no embedding depends on (a pooler) and is in no block has depth 0.

    Raises:
        InputError: If a block, or a parameter of one, is shared by several layers.
    """
    _check_own_blocks(encoder, "optimizer.layer_decay", "null")
    return _depths(encoder)


def check_depths(
    encoder: SiameseEncoder, freeze_layers: int = 0, layer_decay: float | None = None
) -> None:
    """Check that layers can be frozen, and learn at rates of their own.

    Args:
        encoder: The encoder, before anything is frozen.
        freeze_layers: See `freeze_lower_layers`.
        layer_decay: See `parameter_groups`.

    Raises:
        InputError: If a value does not meet its constraint, nothing is left to train, or a block is
            shared by several layers.
    """
    layers, name = encoder.n_layers, encoder.split.name
    if isinstance(freeze_layers, bool) or not 0 <= freeze_layers <= layers:
        raise InputError(
            f"Expected `freeze_layers` to be between 0 and {layers} for {name}, but got "
            f"{freeze_layers}. Set `model.freeze_layers`."
        )
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise InputError(
            f"Expected `layer_decay` to be above 0 and at most 1, but got {layer_decay}. "
            "Set `optimizer.layer_decay`."
        )
    if layer_decay is not None:
        _check_own_blocks(encoder, "optimizer.layer_decay", "null")
    if freeze_layers:
        _check_own_blocks(encoder, "model.freeze_layers", "0")
        if max(_depths(encoder).values(), default=0) <= freeze_layers:
            raise InputError(
                f"Expected `freeze_layers` to leave something to train, but got {freeze_layers} "
                f"and {name} has nothing to train after its {layers} blocks. "
                "Set `model.freeze_layers`."
            )


def freeze_lower_layers(encoder: SiameseEncoder, n_layers: int) -> list[str]:
    """Freeze the embeddings and the first blocks, and return the names of what is frozen.

    The hidden states at layer ``n_layers`` then stay what they are, up to dropout, which stays on.

    Args:
        encoder: The encoder, which `check_depths` has accepted.
        n_layers: Number of blocks to freeze, 1 … L; 0 freezes nothing, not even the embeddings.
    """
    if n_layers == 0:
        return []
    frozen = [name for name, depth in _depths(encoder).items() if depth <= n_layers]
    parameters = dict(encoder.named_parameters())
    for name in frozen:
        parameters[name].requires_grad = False
    return frozen


def parameter_groups(
    encoder: SiameseEncoder,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float | None = None,
    depths: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Return the groups of an optimiser: every trainable parameter in exactly one of them.

    Weight matrices decay, vectors (biases, LayerNorm) do not. With a decay d of the rate over the
    layers, block l learns at d^(L − 1 − l) times the highest rate, embeddings at d^L times, and
    what comes after the blocks at the highest.

    Args:
        encoder: The encoder, with what is not trained frozen.
        learning_rate: The highest rate.
        weight_decay: Of weight matrices.
        layer_decay: d, above 0 and at most 1; None gives all of them one rate, in two groups.
        depths: What `parameter_depths` returned; None asks it now, which takes whole weights.

    Returns:
        Groups with "params", "weight_decay", "lr" and "name".

    Raises:
        InputError: If a block is shared by several layers and there is a decay over them.

    References:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (ACL 2018),
        section 3.2, discriminative fine-tuning; Clark et al., "ELECTRA" (ICLR 2020), appendix B,
        layerwise learning-rate decay. There the top block is already one step below the head.
    """
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    if layer_decay is None:
        return _by_decay(list(trained.values()), learning_rate, weight_decay, "")
    depths = parameter_depths(encoder) if depths is None else depths
    groups: list[dict[str, Any]] = []
    for depth in sorted({depths[name] for name in trained}):
        rate = learning_rate * layer_decay ** max(0, encoder.n_layers - depth)
        own = [p for name, p in trained.items() if depths[name] == depth]
        prefix = f"{_place(depth, encoder.n_layers)}_"
        groups += [g for g in _by_decay(own, rate, weight_decay, prefix) if g["params"]]
    return groups


def _by_decay(
    parameters: list[nn.Parameter], rate: float, weight_decay: float, prefix: str
) -> list[dict[str, Any]]:
    """Return weights with decay, and vectors (biases, LayerNorm) without."""
    kinds = {
        "decayed": ([p for p in parameters if p.ndim > 1], weight_decay),
        "not_decayed": ([p for p in parameters if p.ndim <= 1], 0.0),
    }
    return [
        {"params": own, "weight_decay": decay, "lr": rate, "name": prefix + kind}
        for kind, (own, decay) in kinds.items()
    ]


def _place(depth: int, n_layers: int) -> str:
    if depth == 0:
        return "embeddings"
    return "after_blocks" if depth > n_layers else f"block_{depth - 1}"


def _check_own_blocks(encoder: SiameseEncoder, key: str, off: str) -> None:
    """Raise InputError where a layer has no parameters that are its alone."""
    split = encoder.split
    owners = [id(parameter) for block in split.blocks for parameter in block.parameters()]
    if len(split.blocks) < split.n_layers or len(set(owners)) < len(owners):
        raise InputError(
            f"Expected a block of its own for every layer, but the {split.n_layers} layers of "
            f"{split.name} share parameters ({len(split.blocks)} different blocks): one layer "
            f"cannot be trained otherwise than another. Set `{key}={off}`."
        )


def _depths(encoder: SiameseEncoder) -> dict[str, int]:
    blocks = encoder.split.blocks
    in_blocks = {id(p): depth for depth, b in enumerate(blocks, start=1) for p in b.parameters()}
    named = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    after = _after_blocks(encoder, [p for p in named.values() if id(p) not in in_blocks])
    top = dict.fromkeys(after, encoder.n_layers + 1)
    return {name: in_blocks.get(id(p), top.get(id(p), 0)) for name, p in named.items()}


def _after_blocks(encoder: SiameseEncoder, parameters: list[nn.Parameter]) -> set[int]:
    """Return the ids of parameters that still matter where the last block's output is given."""
    handle = encoder.split.calls[-1].register_forward_hook(_detached)
    try:
        with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(encoder):
            features = features_to(encoder.preprocess([_PROBE]), encoder.device)
            embedding = encoder.split.embed(features)
    finally:
        handle.remove()
    if not embedding.requires_grad or not parameters:
        return set()
    gradients = torch.autograd.grad(embedding.sum(), parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return {id(p) for p, gradient in pairs if gradient is not None}


def _detached(module: nn.Module, args: Any, output: Any) -> Any:
    """Cut the graph behind a block, whose output is a tensor or a tuple with some."""
    if isinstance(output, tuple):
        return tuple(part.detach() if isinstance(part, Tensor) else part for part in output)
    return output.detach()
