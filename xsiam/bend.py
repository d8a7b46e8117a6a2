"""How far an attribution path is from a straight line in embedding space, as a training term."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.split import Features, evaluation_mode, select_rows, trim

__all__ = ["BendTerm", "bend"]


def bend(encoder: SiameseEncoder, features: Features, layer: int, alpha: Tensor) -> Tensor:
    """Return how far points of attribution paths are from the chord, relative to its length.

    The path of a text is g(α) = f(r + α (a − r)), with a and r the hidden states of the text and of
    its reference at the layer, and f what follows. Its bend at α is
    |g(α) − g(0) − α (g(1) − g(0))|² / |g(1) − g(0)|²: nothing for all α where attribution takes one
    node. It does not change with the length of embeddings, nor with a constant shift.

    Args:
        encoder: The encoder, with a shift or without; it is evaluated without dropout.
        features: A batch of features, tensors [n, S]; texts may be of different lengths.
        layer: Where the paths live, 0 … L − 1.
        alpha: A place on each path, [n], between 0 and 1.

    Returns:
        The bends, [n], differentiable.

    References:
        Ours.
    """
    split, reference = encoder.split, encoder.reference
    start, low = reference.states(split, features, layer)
    with evaluation_mode(encoder.model):
        hidden, high = split.through(features, layer)
        points = torch.lerp(start, hidden, alpha.to(hidden)[:, None, None])
        middle = split.tail(features, layer, points)
    # In float32 or more, whatever the precision of training.
    low, middle, high = (e if e.dtype == torch.float64 else e.float() for e in (low, middle, high))
    chord = high - low
    off = middle - low - alpha.to(chord)[:, None] * chord
    # A text that is its own reference has no path, and no bend.
    whole = chord.square().sum(dim=1).clamp_min(torch.finfo(chord.dtype).tiny)
    return off.square().sum(dim=1) / whole


@dataclass(frozen=True)
class BendTerm:
    """A term of the loss that keeps attribution paths straight, so that they take fewer nodes.

    In every step it is the mean bend (see :func:`bend`) of a few texts, each at a random place of
    its path at a layer.

    Args:
        weight: What the mean bend is multiplied by before it is added to the loss; above 0.
        layer: Where the paths live; None draws a layer for every step.
        n_texts: Most texts of a batch that are looked at. Each is embedded twice more.

    Raises:
        InputError: If an argument does not meet its constraint.
    """

    weight: float
    layer: int | None = None
    n_texts: int = 8

    def __post_init__(self) -> None:
        _check("weight", "a finite number above 0", self.weight, 0 < self.weight < math.inf)
        _check("n_texts", "1 or more", self.n_texts, self.n_texts >= 1)

    def check(self, encoder: SiameseEncoder) -> None:
        """Raise InputError or ModelError where the encoder has no such paths."""
        highest = encoder.n_layers - 1
        if self.layer is not None and not 0 <= self.layer <= highest:
            raise InputError(
                f"Expected `layer` to be between 0 and {highest}, above which paths are nearly "
                f"straight, but got {self.layer}. Set `bend.layer`."
            )
        if encoder.reference.is_layered:
            raise InputError(
                "Expected a reference whose states come from the embedding output, but "
                f"{encoder.reference.name!r} is made for weights that stay. Set `bend.weight=0`."
            )
        for layer in range(encoder.n_layers) if self.layer is None else [self.layer]:
            encoder.split.check_layer(layer, key="bend.layer")

    def __call__(self, encoder: SiameseEncoder, columns: list[Features]) -> Tensor:
        """Return the mean bend of texts drawn from columns of features, a scalar."""
        layer = self.layer
        if layer is None:
            layer = int(torch.randint(encoder.n_layers, ()))
        found = []
        for number, features in enumerate(columns):
            # As many of each column, the first ones one more where that does not come out even.
            wanted = (self.n_texts + len(columns) - 1 - number) // len(columns)
            if wanted:
                n_texts, device = features["input_ids"].shape[0], features["input_ids"].device
                rows = torch.randperm(n_texts)[:wanted].to(device)
                alpha = torch.rand(len(rows)).to(device)
                found.append(bend(encoder, trim(select_rows(features, rows)), layer, alpha))
        return torch.cat(found).mean()


def _check(name: str, expected: str, value: float, holds: bool) -> None:
    if not holds:
        raise InputError(f"Expected `{name}` to be {expected}, but got {value}. Set `bend.{name}`.")
