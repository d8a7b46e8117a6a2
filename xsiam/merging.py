"""Join the token vectors of a text's windows into those of the whole text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from xsiam.encoder import SiameseEncoder
from xsiam.reading import TokenVectors
from xsiam.split import evaluation_mode, features_to

_NOISE = 1e-6  # |Δ| below this share of the embeddings is float noise: errors are then absolute


def merge_windows(
    encoder: SiameseEncoder,
    parts: Sequence[TokenVectors],
    weights: Sequence[float],
    starts: Sequence[int],
    tolerance: float,
) -> TokenVectors:
    """Return the token vectors of ẽ(text) = Σ_w ω_w ẽ(window_w).

    Tokens of equal character spans are one token with the sum of its shares ω_w G_w. The
    completeness error is that of the sums; the token error is the upper bound
    max_t Σ_{w ∋ t} ω_w error_w |Δ_w| / |Δ|.

    Args:
        encoder: The model, which says what pooled vectors are divided by.
        parts: The windows of one text.
        weights: ω of each window.
        starts: The character of the text that each window starts at.
        tolerance: What the errors are held against.

    Returns:
        Token vectors of the text; ``text`` is that of the first window.
    """
    places = _places(parts, starts)
    size = 1 + max(max(rows) for rows in places)
    vectors = parts[0].vectors.new_zeros(len(parts[0].delta), size)
    errors = torch.zeros(size, dtype=torch.float64)
    tokens, offsets = [""] * size, [(0, 0)] * size
    special, prompt = [False] * size, [False] * size
    for part, weight, start, rows in zip(parts, weights, starts, places, strict=True):
        vectors.index_add_(1, torch.tensor(rows), weight * part.vectors)
        errors[rows] += weight * _absolute_token_error(part)
        for t, row in enumerate(rows):
            tokens[row], offsets[row] = part.tokens[t], part.offsets[t]
            special[row], prompt[row] = part.special_mask[t], part.prompt_mask[t]
            if not (special[row] or prompt[row]):
                offsets[row] = (part.offsets[t][0] + start, part.offsets[t][1] + start)
    delta = _weighted([part.delta for part in parts], weights)
    reference = _weighted([part.reference_embedding for part in parts], weights)
    embedding = _weighted([part.embedding for part in parts], weights)
    scale = float(delta.norm())
    if scale <= _NOISE * max(float(reference.norm()), float(embedding.norm())):
        scale = 1.0
    completeness = float((vectors.sum(dim=1) - delta).norm()) / scale
    token_error = float(errors.max()) / scale
    return dataclasses.replace(
        parts[0],
        vectors=vectors,
        delta=delta,
        reference_embedding=reference,
        norm=_pooled_norm(encoder, parts, weights, embedding),
        embedding=embedding,
        completeness_error=completeness,
        token_error=token_error,
        converged=completeness <= tolerance and token_error <= tolerance,
        n_nodes=sum(part.n_nodes for part in parts),
        tokens=tuple(tokens),
        offsets=tuple(offsets),
        special_mask=tuple(special),
        prompt_mask=tuple(prompt),
    )


def _places(parts: Sequence[TokenVectors], starts: Sequence[int]) -> list[list[int]]:
    """Return, for each window, the token of the text that each of its tokens is.

    Several tokens of one window can share a span (bytes of one character); the first of them is the
    first of them in every window. Special and prompt tokens are tokens of their own.
    """
    known: dict[tuple[int, int, int], int] = {}
    size = 0
    places = []
    for part, shift in zip(parts, starts, strict=True):
        seen: Counter[tuple[int, int]] = Counter()
        rows = []
        for span, special, prompt in zip(
            part.offsets, part.special_mask, part.prompt_mask, strict=True
        ):
            row = size
            if not (special or prompt):
                row = known.setdefault((span[0] + shift, span[1] + shift, seen[span]), size)
                seen[span] += 1
            rows.append(row)
            size = max(size, row + 1)
        places.append(rows)
    return places


def _absolute_token_error(part: TokenVectors) -> float:
    """Return the estimated error of a token vector; without an estimate it is infinite."""
    if part.token_error == float("inf"):
        return part.token_error
    return part.token_error * float(part.delta.norm())


def _weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    stacked = torch.stack(list(values))
    return torch.tensor(weights, dtype=stacked.dtype) @ stacked


def _pooled_norm(
    encoder: SiameseEncoder,
    parts: Sequence[TokenVectors],
    weights: Sequence[float],
    embedding: Tensor,
) -> float:
    """Return what the model's similarity divides a pooled embedding by."""
    if encoder.similarity != "cos" and not encoder.normalize:
        return 1.0
    if encoder.similarity == "cos" or encoder.model.truncate_dim is None:
        return float(embedding.norm())
    # sentence-transformers truncates behind the Normalize: the norm is that of all dimensions.
    full = []
    with torch.no_grad(), evaluation_mode(encoder):
        for part in parts:
            features = encoder.preprocess([part.text], part.role)
            features.pop("offset_mapping", None)
            features = features_to(features, encoder.device)
            shift = encoder.shift_of(features)
            whole = encoder.split.embed(features)
            full.append((whole if shift is None else whole - shift)[0].double().cpu())
    return float(_weighted(full, weights).norm())
