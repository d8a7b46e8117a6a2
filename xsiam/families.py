"""How the tail of an encoder is linearised: by hand for post-norm families, else by PyTorch.

To add a family of post-norm blocks, add a row to ``_PARTS``: the class name of its block and the
paths of nine parts. Anything unusual (adapters, quantised weights, hooks, a pooling that is not
linear) makes :func:`post_norm_lineariser` say why not; then the model's own forward is
differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from xsiam.jacobian import AutodiffLinearisation, Linearisation
from xsiam.one_token import is_cheaper
from xsiam.postnorm import Head, PostNormBlock, PostNormLinearisation
from xsiam.split import Features, SplitModel

_BERT = (
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "attention.output.LayerNorm"),
    *("intermediate.dense", "intermediate.intermediate_act_fn"),
    *("output.dense", "output.LayerNorm"),
)
_MPNET = (
    *("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    *("attention.attn.o", "attention.LayerNorm"),
    *_BERT[5:],
)
_DISTILBERT = (
    *("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    *("attention.out_lin", "sa_layer_norm"),
    *("ffn.lin1", "ffn.activation", "ffn.lin2", "output_layer_norm"),
)
_ALBERT = tuple(
    f"albert_layers.0.{part}"
    for part in (
        *("attention.query", "attention.key", "attention.value"),
        *("attention.dense", "attention.LayerNorm"),
        *("ffn", "activation", "ffn_output", "full_layer_layer_norm"),
    )
)
_PARTS: dict[str, tuple[str, ...]] = {
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "XLMRobertaLayer": _BERT,
    "CamembertLayer": _BERT,
    "ElectraLayer": _BERT,
    "MPNetLayer": _MPNET,
    "TransformerBlock": _DISTILBERT,
    "AlbertLayerGroup": _ALBERT,
}
_LINEAR_POOLINGS = ("mean", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")


class Lineariser(Protocol):
    """Linearises an encoder's tail at points of texts of one length, and knows what that takes."""

    def __call__(self, features: Features, points: Tensor) -> Linearisation:
        """Linearise at hidden states [n, S, D]."""

    def floats_per_tangent(self, length: int) -> int:
        """Estimate the numbers that one tangent of one node takes at the peak."""

    def floats_per_cotangent(self, length: int) -> int:
        """Estimate the numbers that one cotangent of one node takes at the peak."""

    def floats_per_point(self, length: int) -> int:
        """Estimate the numbers that one linearised point keeps."""

    def is_factored(self, length: int) -> bool:
        """Whether no tangent exists per position, which makes tangents cheap."""


@dataclass(frozen=True)
class AutodiffLineariser:
    """Linearises any encoder by differentiating its own forward.

    Attributes:
        split: The model.
        layer: Where the paths live.
        truncate_dim: Embedding dimensions that count, None for all.
    """

    split: SplitModel
    layer: int
    truncate_dim: int | None

    def __call__(self, features: Features, points: Tensor) -> Linearisation:
        """Linearise at hidden states [n, S, D]."""

        def tail(hidden: Tensor) -> Tensor:
            return self.split.tail(features, self.layer, hidden)[:, : self.truncate_dim]

        return AutodiffLinearisation(tail, points)

    def floats_per_tangent(self, length: int) -> int:
        """Estimate the numbers that one tangent of one node takes at the peak."""
        config = self.split.model.config
        width = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * width
        heads = getattr(config, "num_attention_heads", None) or max(1, width // 64)
        return int(length * (8 * width + 4 * inner + 3 * heads * length))

    def floats_per_cotangent(self, length: int) -> int:
        """Estimate the numbers that one cotangent of one node takes at the peak."""
        return self.floats_per_tangent(length)

    def floats_per_point(self, length: int) -> int:
        """Estimate the numbers that one linearised point keeps: no more than a tangent."""
        return self.floats_per_tangent(length)

    def is_factored(self, length: int) -> bool:
        """Whether no tangent exists per position: never."""
        return False


@dataclass(frozen=True)
class PostNormLineariser:
    """Linearises the tail of a post-norm encoder from one layer on.

    Attributes:
        split: The model.
        layer: Where the paths live.
        blocks: The blocks from there to the top.
        truncate_dim: Embedding dimensions that count, None for all.
    """

    split: SplitModel
    layer: int
    blocks: tuple[PostNormBlock, ...]
    truncate_dim: int | None

    def __call__(self, features: Features, points: Tensor) -> PostNormLinearisation:
        """Linearise at hidden states [n, S, D] of texts of one length without padding."""
        length = points.shape[1]
        bias = _position_bias(self.split, points[:1])
        blocks = [replace(block, bias=bias) for block in self.blocks]
        pooling = _pooling_weights(self.split.modules[1], features, length, points)
        return PostNormLinearisation(blocks, points, pooling, self._head())

    def floats_per_tangent(self, length: int) -> int:
        """Estimate the numbers that one tangent of one node takes at the peak."""
        block = self.blocks[0]
        width, inner = block.query.in_features, block.up.out_features
        if self.is_factored(length):
            return 5 * inner + 14 * width + 10 * block.n_heads * length
        return self.floats_per_cotangent(length)

    def floats_per_cotangent(self, length: int) -> int:
        """Estimate the numbers that one cotangent of one node takes at the peak."""
        block = self.blocks[0]
        width, inner = block.query.in_features, block.up.out_features
        attention = 8 * width + 3 * block.n_heads * length
        return int(length * max(attention, 3 * width + 2 * inner))

    def floats_per_point(self, length: int) -> int:
        """Estimate the numbers that one linearised point keeps."""
        block = self.blocks[0]
        width, inner = block.query.in_features, block.up.out_features
        per_token = 16 * width + inner + block.n_heads * length
        transient = 2 * inner + 2 * block.n_heads * length
        if self.is_factored(length):
            transient += 3 * inner + 8 * width
        return length * (len(self.blocks) * per_token + transient)

    def is_factored(self, length: int) -> bool:
        """Whether no tangent exists per position; where pooling reads one row, it is as small."""
        return len(self.blocks) == 1 and is_cheaper(self.blocks[0], length, length)

    def _head(self) -> Head | None:
        rest, truncate_dim = self.split.modules[2:], self.truncate_dim
        if not rest and truncate_dim is None:
            return None

        def head(pooled: Tensor) -> Tensor:
            features: dict[str, Any] = {"sentence_embedding": pooled}
            for module in rest:
                features = module(features)
            embedding: Tensor = features["sentence_embedding"]
            return embedding[:, :truncate_dim]

        return head


def post_norm_lineariser(
    split: SplitModel, layer: int, truncate_dim: int | None = None
) -> PostNormLineariser | str:
    """Return the lineariser of a post-norm encoder, or why there is none."""
    name = type(split.calls[0]).__name__
    if name not in _PARTS:
        return f"blocks of class {name} are not among {sorted(_PARTS)}"
    if layer == split.n_layers:
        return "there is no block above the last hidden state"
    config = split.model.config
    if getattr(config, "is_decoder", False) or getattr(config, "inner_group_num", 1) != 1:
        return "the blocks attend causally or come in groups"
    pooling = split.modules[1] if len(split.modules) > 1 else None
    if not isinstance(pooling, Pooling) or pooling.pooling_mode not in _LINEAR_POOLINGS:
        return "the pooling is not a weighted sum over positions"
    heads = int(config.num_attention_heads)
    blocks = []
    for block in split.calls[layer:]:
        parts = [block.get_submodule(path) for path in _PARTS[name]]
        if reason := _unusual(parts):
            return reason
        blocks.append(PostNormBlock(*parts, n_heads=heads))  # type: ignore[arg-type, misc]
    return PostNormLineariser(split, layer, tuple(blocks), truncate_dim)


def _unusual(parts: Sequence[nn.Module]) -> str | None:
    """Return why parts are not what a plain block has, or None."""
    expected = {4: nn.LayerNorm, 6: nn.Module, 8: nn.LayerNorm}
    for number, part in enumerate(parts):
        wanted = expected.get(number, nn.Linear)
        if wanted is not nn.Module and type(part) is not wanted:
            return f"a part of a block is a {type(part).__name__}, not a plain {wanted.__name__}"
        if part._forward_hooks or part._forward_pre_hooks:
            return "hooks sit on parts of a block"
    return None


def _position_bias(split: SplitModel, hidden: Tensor) -> Tensor | None:
    """Return what MPNet adds to its attention logits, [H, S, S], else None."""
    compute = getattr(getattr(split.model, "encoder", None), "compute_position_bias", None)
    if compute is None:
        return None
    bias: Tensor = compute(hidden)[0]
    return bias


def _pooling_weights(pooling: nn.Module, features: Features, length: int, points: Tensor) -> Tensor:
    """Return the weights [n, S] of a linear pooling: what it makes of the unit vectors."""
    unit = torch.eye(length, dtype=points.dtype, device=points.device)
    pooled: Tensor = pooling({**features, "token_embeddings": unit.expand(len(points), -1, -1)})[
        "sentence_embedding"
    ]
    return pooled
