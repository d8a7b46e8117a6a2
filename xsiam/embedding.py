"""Embeddings of many texts, each in its role."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xsiam.encoder import SiameseEncoder
from xsiam.split import evaluation_mode, features_to
from xsiam.texts import Truncations

TextInRole = tuple[str, str | None]
"""A text, and the role that it is embedded in."""


def embed_texts(
    encoder: SiameseEncoder,
    keys: Sequence[TextInRole],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[TextInRole, Tensor]:
    """Embed texts in batches of one role and of similar lengths.

    Args:
        encoder: What embeds, on its own device.
        keys: The texts in their roles, all different.
        batch_size: Texts in a batch.
        progress: Whether to show a progress bar.

    Returns:
        The embedding of each, [K], on the CPU and in float32 or more.

    Warns:
        TruncationWarning: If texts are longer than the model's window, once for all of them.
    """
    from rich.progress import track

    batches = []
    for role in dict.fromkeys(role for _, role in keys):
        texts = sorted((text for text, r in keys if r == role), key=len, reverse=True)
        batches += [(texts[i : i + batch_size], role) for i in range(0, len(texts), batch_size)]
    embeddings: dict[TextInRole, Tensor] = {}
    with (
        torch.no_grad(),
        evaluation_mode(encoder),
        encoder.weights_held(),
        Truncations(encoder) as truncations,
    ):
        for texts, role in track(batches, "embedding texts", disable=not progress):
            features = encoder.preprocess_with(truncations, texts, role)
            rows = encoder(features_to(features, encoder.device)).cpu()
            rows = rows if rows.dtype == torch.float64 else rows.float()
            embeddings |= {(text, role): row for text, row in zip(texts, rows, strict=True)}
    return embeddings
