"""What attribution needs of texts before anything is differentiated: states and embeddings.

One forward of the model's own modules gives, for every text, its reference and the text perturbed
by rounding, the hidden states at a layer and the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xsiam.linear import FastLinear
from xsiam.references import AbstractReference
from xsiam.split import Features, SplitModel, select_rows

_TOKENS_AT_ONCE = 4096
# Rounding happens in every layer, not only below the first, and one sample is not the worst case:
# over 153 texts and layers of random encoders of high curvature, true errors at the float32 floor
# were up to six times the sample.
_NOISE_SAFETY = 4.0


@dataclass(frozen=True)
class TextStates:
    """Hidden states and embeddings of m texts of one length S and of their references.

    Attributes:
        hidden: Hidden states of the texts at the layer, [m, S, D].
        start: Those of the references, [m, S, D].
        embedding: e(a), without shift or truncation, [m, K].
        reference_embedding: e(r), [m, K].
        noise: How far rounding may move e(a): the embedding output is perturbed by one unit in the
            last place, and four times how far the embedding moves is taken (ours), [m] float64.
    """

    hidden: Tensor
    start: Tensor
    embedding: Tensor
    reference_embedding: Tensor
    noise: Tensor


def text_states(
    split: SplitModel,
    reference: AbstractReference,
    layer: int,
    features: Features,
    *,
    together: bool,
) -> TextStates:
    """Run texts, references and perturbed texts through the model.

    Args:
        split: The model.
        reference: Where the paths start.
        layer: A layer that the model can be cut at.
        features: Features of m texts of one length, tensors [m, S].
        together: Whether the blocks read nothing but hidden states and mask, so that all three go
            through them in one batch.
    """
    n_texts, length = features["input_ids"].shape
    at_once = max(1, _TOKENS_AT_ONCE // (3 * length))
    run = _together if together else _apart
    device = features["input_ids"].device
    with FastLinear():
        parts = [
            run(split, reference, layer, select_rows(features, rows))
            for rows in torch.split(torch.arange(n_texts, device=device), at_once)
        ]
    texts, references, moved = (
        tuple(torch.cat(tensors) for tensors in zip(*(part[k] for part in parts), strict=True))
        for k in range(3)
    )
    noise = _NOISE_SAFETY * (moved[1] - texts[1]).norm(dim=1).double().cpu()
    return TextStates(texts[0], references[0], texts[1], references[1], noise)


def perturbed(hidden: Tensor) -> Tensor:
    """Move every number [m, S, D] by one unit in the last place, with fixed random signs."""
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, hidden.shape[1:], generator=generator) - 1
    return hidden * (1 + torch.finfo(hidden.dtype).eps * signs.to(hidden))


_Both = tuple[Tensor, Tensor]  # hidden states [m, S, D] and embeddings [m, K]


def _together(
    split: SplitModel, reference: AbstractReference, layer: int, features: Features
) -> tuple[_Both, _Both, _Both]:
    first = split.capture(features, 0)
    states = torch.cat([first, reference.hidden(split, features, 0), perturbed(first)])
    hidden, embedding = split.through(_repeated(features, 3), layer, start=states)
    texts, references, moved = zip(hidden.chunk(3), embedding.chunk(3), strict=True)
    return texts, references, moved


def _apart(
    split: SplitModel, reference: AbstractReference, layer: int, features: Features
) -> tuple[_Both, _Both, _Both]:
    moved = perturbed(split.capture(features, 0))
    return (
        split.through(features, layer),
        reference.states(split, features, layer),
        split.through(features, layer, start=moved),
    )


def _repeated(features: Features, times: int) -> Features:
    """Repeat a batch of features: [times · m, S]."""
    return {
        key: value.repeat(times, *[1] * (value.ndim - 1))
        if isinstance(value, Tensor) and value.ndim
        else value
        for key, value in features.items()
    }
