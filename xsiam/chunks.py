"""Embedding of large batches a few texts at a time, with the same gradients in less memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xsiam.split import Features, select_rows


def embed_in_chunks(
    embed: Callable[[Features], Tensor], features: Features, chunk_size: int
) -> Tensor:
    """Embed a batch a chunk at a time, and keep nothing but the embeddings for the backward pass.

    Each chunk is embedded without keeping activations, and again with them when its gradient is
    due; at any moment the activations of one chunk are in memory. Dropout is the same both times.
    Gradients are those of embedding the chunks in a row: without dropout those of the whole batch,
    up to rounding. The price is a second forward pass.

    Args:
        embed: Embeds a batch of features, [n, K].
        features: Features of n texts, tensors [n, …].
        chunk_size: Most texts to embed at once.

    Returns:
        The embeddings, [n, K], differentiable.

    References:
        Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
        (RepL4NLP 2021): gradient caching. Here the second pass is a recomputation inside the one
        backward pass, so that nothing else of the training changes.
    """
    rows = torch.arange(len(features["input_ids"]), device=features["input_ids"].device)
    chunks = [
        checkpoint(embed, select_rows(features, chunk), use_reentrant=False)
        for chunk in torch.split(rows, chunk_size)
    ]
    return torch.cat(chunks)
