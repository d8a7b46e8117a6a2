"""The published procedure, written from the papers' description and nothing else.

For each text the integrated Jacobian of its embedding with respect to the hidden states at a layer
is a right-endpoint Riemann sum over N nodes of the straight path from the reference to the text;
every row of a Jacobian is one reverse pass, so K of them make one for an embedding of K dimensions.
The product of both texts' Jacobians, over all pairs of (token, feature), is weighted by both ways
δ, summed to tokens and divided by the norms.

References:
    Moeller et al., "An Attribution Method for Siamese Encoders" (EMNLP 2023).
    Moeller et al., "Approximate Attributions for Off-the-Shelf Siamese Transformers" (EACL 2024).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.base.modules import Normalize
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xsiam import SiameseEncoder

VARIANTS = ("loop", "batched")
Tail = Callable[[Tensor], Tensor]  # hidden states [n, S, D] -> embeddings [n, K]


@dataclass(frozen=True)
class Published:
    """What the procedure gives for one pair.

    Attributes:
        matrix: [S_a, S_b] in units of the score.
        completeness_error_a: |Σ_s G[:, s] − Δ| / |Δ| of the first text.
        completeness_error_b: The same of the second text.
        score: Similarity of the two embeddings.
    """

    matrix: Tensor
    completeness_error_a: float
    completeness_error_b: float
    score: float

    @property
    def completeness_error(self) -> float:
        """The larger of both texts' errors."""
        return max(self.completeness_error_a, self.completeness_error_b)


@dataclass(frozen=True)
class _Side:
    """One text: its Jacobian [K, S·D], its way δ [S·D], its length, and its embeddings [K]."""

    jacobian: Tensor
    way: Tensor
    length: int
    embedding: Tensor
    reference_embedding: Tensor

    @property
    def completeness_error(self) -> float:
        """|J δ − Δ| / |Δ|, summed in float64."""
        change = self.embedding.double() - self.reference_embedding.double()
        found = self.jacobian.double() @ self.way.double()
        return float((found - change).norm() / change.norm())


def published_attribution(
    encoder: SiameseEncoder,
    text_a: str,
    text_b: str,
    layer: int,
    n_nodes: int,
    *,
    variant: str = "loop",
    chunk: int = 8,
) -> Published:
    """Attribute the score of one pair by K reverse passes a text.

    Args:
        encoder: The model; with a shift, embeddings are taken minus the reference's.
        text_a: First text.
        text_b: Second text.
        layer: 0 … L - 1.
        n_nodes: N, nodes of the right-endpoint Riemann sum.
        variant: "loop" for one cotangent after the other, "batched" for ``chunk`` at a time.
        chunk: Cotangents in one batched reverse pass.

    Raises:
        ValueError: If ``variant`` or ``layer`` is none of those.
    """
    if variant not in VARIANTS:
        raise ValueError(f"Expected `variant` to be one of {VARIANTS}, but got {variant!r}.")
    with _frozen(encoder.model), _attention_of(variant):
        size = 1 if variant == "loop" else chunk
        side_a = _side(encoder, text_a, layer, n_nodes, size)
        side_b = _side(encoder, text_b, layer, n_nodes, size)
        return _product(encoder, side_a, side_b)


def _product(encoder: SiameseEncoder, side_a: _Side, side_b: _Side) -> Published:
    """Multiply out all pairs of (token, feature), then sum to tokens."""
    shifted = encoder.shift
    a = side_a.embedding - side_a.reference_embedding if shifted else side_a.embedding
    b = side_b.embedding - side_b.reference_embedding if shifted else side_b.embedding
    divides = encoder.similarity == "cos" or encoder.normalize
    normaliser = float(a.norm() * b.norm()) if divides else 1.0
    product = side_a.jacobian.T @ side_b.jacobian
    product *= side_a.way[:, None]
    product *= side_b.way[None, :]
    features = len(side_a.way) // side_a.length
    tokens = product.view(side_a.length, features, side_b.length, features).sum((1, 3))
    return Published(
        tokens / normaliser,
        side_a.completeness_error,
        side_b.completeness_error,
        float(a @ b) / normaliser,
    )


def _side(encoder: SiameseEncoder, text: str, layer: int, n_nodes: int, chunk: int) -> _Side:
    ids, reference_ids = _ids(encoder, text)
    block = _block(encoder.model, layer)
    pair = torch.cat([ids, reference_ids])
    with torch.no_grad():
        embeddings, states = _embed(encoder, pair, block)
    hidden, reference = states[0], states[1]
    way = hidden - reference

    def tail(points: Tensor) -> Tensor:
        return _embed(encoder, ids.expand(len(points), -1), block, points)[0]

    fractions = torch.arange(1, n_nodes + 1, dtype=way.dtype, device=way.device) / n_nodes
    points = reference + fractions[:, None, None] * way
    jacobian = integrated_jacobian(tail, points, chunk)
    return _Side(jacobian.flatten(1), way.flatten(), ids.shape[1], embeddings[0], embeddings[1])


def integrated_jacobian(tail: Tail, points: Tensor, chunk: int) -> Tensor:
    """Average the Jacobians at all points by reverse passes of ``chunk`` rows each.

    Args:
        tail: Maps hidden states [n, S, D] to embeddings [n, K].
        points: The N nodes, [N, S, D].
        chunk: Rows of one reverse pass; 1 is the plain loop.

    Returns:
        [K, S, D].
    """
    points = points.detach().requires_grad_()
    embeddings = tail(points)
    n_nodes, n_rows = embeddings.shape
    identity = torch.eye(n_rows, dtype=embeddings.dtype, device=embeddings.device)
    jacobian = points.new_empty(n_rows, *points.shape[1:])
    for first in range(0, n_rows, chunk):
        rows = identity[first : first + chunk]
        batched = chunk > 1
        cotangents = rows[:, None].expand(-1, n_nodes, -1) if batched else rows.expand(n_nodes, -1)
        (gradient,) = torch.autograd.grad(
            embeddings,
            points,
            grad_outputs=cotangents,
            retain_graph=first + chunk < n_rows,
            is_grads_batched=batched,
        )
        jacobian[first : first + chunk] = gradient.mean(dim=1 if batched else 0)
    return jacobian.detach()


def _ids(encoder: SiameseEncoder, text: str) -> tuple[Tensor, Tensor]:
    """Return the ids of a text and of its reference: all but special tokens are PAD, [1, S]."""
    tokenizer: Any = encoder.model.tokenizer
    tokens = tokenizer(
        [text],
        truncation=True,
        max_length=encoder.max_length,
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    ids = tokens["input_ids"].to(encoder.device)
    special = tokens["special_tokens_mask"].bool().to(encoder.device)
    return ids, torch.where(special, ids, tokenizer.pad_token_id)


def _block(model: Any, layer: int) -> nn.Module:
    """Return the block whose input is the features: entry ``layer`` of the model's stack."""
    transformer = model[0].auto_model
    depth = transformer.config.num_hidden_layers
    if not 0 <= layer < depth:
        raise ValueError(f"Expected `layer` to be between 0 and {depth - 1}, but got {layer}.")
    stacks = (m for m in transformer.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    stack = next(stacks, None)
    if stack is None:
        raise ValueError(f"Expected a stack of {depth} blocks in {type(transformer).__name__}.")
    return stack[layer]


def _embed(
    encoder: SiameseEncoder, ids: Tensor, block: nn.Module, replacement: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Embed ids and return the states that enter ``block``, or with others put in there.

    Returns:
        Embeddings [n, K] before a trailing Normalize, and the states [n, S, D].
    """
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        seen.append(args[0] if args else kwargs["hidden_states"])
        if replacement is None:
            return None
        if args:
            return (replacement, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replacement}

    features: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    modules = list(encoder.model.children())
    if isinstance(modules[-1], Normalize):
        modules = modules[:-1]
    try:
        for module in modules:
            features = module(features)
    finally:
        handle.remove()
    return features["sentence_embedding"], seen[0]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no graph for weights, whose derivatives nobody asks for."""
    training = model.training
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)
        for parameter in parameters:
            parameter.requires_grad_()


@contextmanager
def _attention_of(variant: str) -> Iterator[None]:
    """Batched reverse passes have no rule for fused attention and would fall back to loops."""
    if variant == "loop":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")  # no silent fallback
        yield
