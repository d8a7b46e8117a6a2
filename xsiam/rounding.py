"""How much of an embedding is floating point rounding: measured, since models amplify it.

The embedding output of a text is perturbed by one unit in the last place, and how far its embedding
moves is a sample of what rounding does: one more forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xsiam.split import Features, SplitModel

# Rounding happens in every layer, not only below the first, and one sample is not the worst case:
# over 153 texts and layers of random encoders of high curvature, true errors at the float32 floor
# were up to six times the sample.
_SAFETY = 3.0


def perturbed(hidden: Tensor) -> Tensor:
    """Move every number [m, S, D] by one unit in the last place, with fixed random signs."""
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, hidden.shape[1:], generator=generator) - 1
    return hidden * (1 + torch.finfo(hidden.dtype).eps * signs.to(hidden))


def rounding_noise(
    split: SplitModel, features: Features, layer: int, hidden: Tensor, moved: Tensor
) -> Tensor:
    """Return how far rounding may move the embeddings of texts, [m] float64 (ours).

    Args:
        split: The model.
        features: Features of m texts of one length, tensors [m, S].
        layer: A layer that the model can be cut at.
        hidden: Its hidden states, [m, S, D].
        moved: Its hidden states when the embedding output is :func:`perturbed`, [m, S, D].
    """
    both = split.tail(repeated(features, 2), layer, torch.cat([hidden, moved]))
    own, other = both.chunk(2)
    noise: Tensor = _SAFETY * (other - own).norm(dim=1).double().cpu()
    return noise


def repeated(features: Features, times: int) -> Features:
    """Repeat a batch of features: [times · m, S]."""
    return {
        key: value.repeat(times, *[1] * (value.ndim - 1))
        if isinstance(value, Tensor) and value.ndim
        else value
        for key, value in features.items()
    }
