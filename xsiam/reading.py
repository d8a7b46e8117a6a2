"""One text as a model reads it, and the token vectors that attribution derives from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xsiam.encoder import SiameseEncoder
from xsiam.split import Features, features_to
from xsiam.texts import Truncations


@dataclass(frozen=True, kw_only=True)
class AttributedText:
    """What attribution knows of one text beside its token vectors.

    Attributes:
        text: The text, without prompt.
        role: Its role.
        delta: Δ, [K] float64.
        reference_embedding: ẽ(r), [K] float64: zero for a shifted model.
        norm: What the model divides by.
        embedding: ẽ(a) by the model's ordinary forward, [K] float64.
        completeness_error: |Σ_s G[:, s] − Δ| / |Δ|.
        token_error: Estimated largest error of one token vector, relative to |Δ|; nan where the
            mode gives none.
        converged: Whether the tolerance was met.
        n_nodes: Nodes at which token derivatives were evaluated.
        tokens: Tokens, prompt and special tokens included.
        offsets: Character spans in the text; (0, 0) for prompt and special tokens.
        special_mask: Which tokens the tokenizer added.
        prompt_mask: Which tokens belong to the prompt.
    """

    text: str
    role: str | None
    delta: Tensor
    reference_embedding: Tensor
    norm: float
    embedding: Tensor
    completeness_error: float
    token_error: float
    converged: bool
    n_nodes: int
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    special_mask: tuple[bool, ...]
    prompt_mask: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class TokenVectors(AttributedText):
    """Token vectors of one text, with all that attribution needs; they depend on no other text.

    Attributes:
        vectors: Token vectors G, [K, S] float64: Σ_s G[:, s] = ẽ(a) − ẽ(r_a).
    """

    vectors: Tensor


@dataclass(frozen=True)
class ReadText:
    """One text as the model reads it."""

    text: str
    role: str | None
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    special_mask: tuple[bool, ...]
    prompt_mask: tuple[bool, ...]
    features: Features

    @property
    def shape_key(self) -> Any:
        """Texts with equal keys can share a batch."""
        plain = {k: str(v) for k, v in self.features.items() if not isinstance(v, Tensor)}
        return len(self.tokens), tuple(sorted(plain.items()))


def _describe(
    encoder: SiameseEncoder, text: str, role: str | None, prompt: str, features: Features
) -> dict[str, Any]:
    """Name the tokens of one text and place them in it."""
    tokens = encoder.tokenizer.convert_ids_to_tokens(features["input_ids"][0].tolist())
    special = [bool(flag) for flag in features["special_tokens_mask"][0].tolist()]
    if "offset_mapping" in features:
        spans = features["offset_mapping"][0].tolist()
    else:
        spans = [[0, 0]] * len(tokens)
    before = len(prompt)
    in_prompt = [
        before > 0 and not s and end <= before and end > 0
        for (_, end), s in zip(spans, special, strict=True)
    ]
    offsets = [
        (0, 0) if s or p else (max(0, start - before), max(0, end - before))
        for (start, end), s, p in zip(spans, special, in_prompt, strict=True)
    ]
    return {
        "text": text,
        "role": role,
        "tokens": tuple(tokens),
        "offsets": tuple(offsets),
        "special_mask": tuple(special),
        "prompt_mask": tuple(in_prompt),
    }


def stack_features(features: Sequence[Features]) -> Features:
    """Join features of single texts of one length into one batch."""
    first = features[0]
    return {
        key: torch.cat([f[key] for f in features])
        if isinstance(value, Tensor) and value.ndim
        else value
        for key, value in first.items()
    }


def read_text(
    encoder: SiameseEncoder, text: str, role: str | None, truncations: Truncations
) -> ReadText:
    """Tokenise one text as the model does."""
    features = encoder.preprocess_with(truncations, [text], role)
    prompt = encoder.prompt_of(role)[0] or ""
    described = _describe(encoder, text, role, prompt, features)
    features = features_to(features, encoder.device)
    features.pop("offset_mapping", None)
    return ReadText(**described, features=features)
