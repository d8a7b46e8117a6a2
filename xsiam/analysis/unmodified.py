"""The unmodified model under several references: their names, layers and sizes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xsiam.analysis.base import UNMODIFIED
from xsiam.analysis.context import Context
from xsiam.encoder import SiameseEncoder

__all__ = ["UNMODIFIED_NAMES", "label", "layers_of", "reference_sizes"]

NEUTRAL = f"{UNMODIFIED}/neutral"
UNMODIFIED_NAMES = (UNMODIFIED, f"{UNMODIFIED}/fitted", NEUTRAL)
"""The model from `pad`, as published, and from two references that are looked for."""


def label(name: str) -> str:
    """Return the name of a model for tables, which says the reference of the unmodified one."""
    return f"{UNMODIFIED}/pad" if name == UNMODIFIED else name


def lowest_neutral_layer(encoder: SiameseEncoder) -> int:
    """Return the lowest layer at which the `neutral` reference is looked for: half way down.

    Far below, roots are hard to find and take long.
    """
    return encoder.n_layers // 2


def layers_of(context: Context, name: str) -> tuple[int, ...]:
    """Return the layers that are analysed of a model, the highest first."""
    if name != NEUTRAL:
        return context.layers
    lowest = lowest_neutral_layer(context.model(name))
    return tuple(layer for layer in context.layers if layer >= lowest)


def layers_note(context: Context, names: tuple[str, ...] | list[str]) -> list[str]:
    """Return a line that says which layers are left out, where any are."""
    if NEUTRAL not in names or layers_of(context, NEUTRAL) == context.layers:
        return []
    lowest = lowest_neutral_layer(context.model(NEUTRAL))
    return [f"`{NEUTRAL}` is looked for from layer {lowest} on, half way down the model."]


def reference_sizes(context: Context, name: str, layer: int) -> NDArray[np.float64]:
    """Return |ẽ(r)| / |ẽ(text)| of the distinct texts of the sample, [n].

    Zero says that the pair matrix alone is the score: exactly so of a shifted model.
    """
    sizes = {
        (text.text, text.role): float(text.reference_embedding.norm() / text.embedding.norm())
        for pair in context.pair_vectors(name, layer)
        for text in pair
    }
    return np.array(list(sizes.values()))
