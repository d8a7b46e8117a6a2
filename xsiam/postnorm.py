"""Derivatives of BERT-like encoders by hand: less arithmetic than differentiating their forward.

BERT, RoBERTa, XLM-R, MPNet, DistilBERT, ALBERT and ELECTRA share one block, with its norms behind
the residuals::

    y = x + Attention(x) Woᵀ,   z = Norm₁(y),   x' = Norm₂(z + act(z Upᵀ) Downᵀ)

Written out, its tangents cost less than a forward each:

* at the layer of the path a tangent touches ONE token, so queries, keys and values of all tangents
  are those of one text, and the attention logits change in one row and one column;
* after the last block a pooling reads a weighted sum over positions. Norm₂ is linear in a tangent,
  so the sum is taken BEFORE ``Down``, and positions that pooling does not read are never computed;
* a norm's derivative is a projection, two thin matrix products instead of a chain of passes.

The reverse direction uses the same three facts transposed. :mod:`xsiam.jacobian` differentiates any
model's own forward and is the slow twin that tests hold this module to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from xsiam.linear import linear

Head = Callable[[Tensor], Tensor]  # pooled vectors [m, D] -> embeddings [m, K]


@dataclass(frozen=True)
class PostNormBlock:
    """The parts of one block.

    Attributes:
        query: Projection to queries; likewise ``key``, ``value`` and, back again, ``out``.
        norm_1: The norm behind the attention.
        up: Projection to the inner width; ``down`` back again.
        activation: Between ``up`` and ``down``, elementwise.
        norm_2: The norm that ends the block.
        n_heads: Attention heads H.
        bias: Added to the attention logits, [H, S, S], or None.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    norm_1: nn.LayerNorm
    up: nn.Linear
    activation: Callable[[Tensor], Tensor]
    down: nn.Linear
    norm_2: nn.LayerNorm
    n_heads: int
    bias: Tensor | None = None

    @property
    def scale(self) -> float:
        """What attention logits are multiplied by."""
        return float((self.query.out_features // self.n_heads) ** -0.5)


class NormPoint:
    """A LayerNorm at a point y [n, S, D]: its derivative is a projection, then a scale.

    Args:
        norm: The layer.
        y: The point.
        rows: Positions whose derivative is needed, [R], or None for all.
    """

    def __init__(self, norm: nn.LayerNorm, y: Tensor, rows: Tensor | None) -> None:
        width = y.shape[-1]
        output, mean, inverse = torch.native_layer_norm(
            y, [width], norm.weight, norm.bias, norm.eps
        )
        self.output = output  # [n, S, D], of every position
        if rows is not None:
            y, mean, inverse = y[:, rows], mean[:, rows], inverse[:, rows]
        unit = (y - mean).mul_(inverse)
        basis = torch.stack([torch.ones_like(unit), unit], dim=2)
        self.unit = basis[:, :, 1]
        self.weight = norm.weight
        self.inverse = inverse  # [n, R, 1]
        self.gain = inverse * norm.weight
        self._basis = basis.flatten(0, 1)  # [n·R, 2, D]

    def push_(self, tangents: Tensor) -> Tensor:
        """Push [n, R, T, D] forward, in place."""
        return self._project_(tangents).mul_(self.gain[:, :, None])

    def pull_(self, cotangents: Tensor) -> Tensor:
        """Pull [n, R, C, D] back, in place."""
        return self._project_(cotangents.mul_(self.gain[:, :, None]))

    def _project_(self, vectors: Tensor) -> Tensor:
        """Remove the mean and the component along the normalised point."""
        rows = vectors.view(-1, *vectors.shape[2:])
        shares = torch.bmm(rows, self._basis.mT)
        rows.baddbmm_(shares, self._basis, alpha=-1.0 / vectors.shape[-1])
        return vectors


class AttentionPoint:
    """Attention with its residual at a point x [n, S, D], for some of its output rows.

    Args:
        block: Its weights.
        x: The point.
        rows: Output positions that are needed, [R], or None for all.
    """

    def __init__(self, block: PostNormBlock, x: Tensor, rows: Tensor | None) -> None:
        self.block, self.rows = block, rows
        self.length = x.shape[1]
        self.query = _heads(_linear(block.query, x), block.n_heads) * block.scale  # [n, H, S, d]
        self.key = _heads(_linear(block.key, x), block.n_heads)
        self.value = _heads(_linear(block.value, x), block.n_heads)
        logits = self.query @ self.key.mT
        if block.bias is not None:
            logits = logits + block.bias
        self.probabilities = logits.softmax(dim=-1)  # [n, H, S, S]
        self.context = self.probabilities @ self.value
        self.output = x + _linear(block.out, _merged(self.context))
        if rows is not None:
            self.query, self.context = self.query[:, :, rows], self.context[:, :, rows]
            self.probabilities = self.probabilities[:, :, rows]

    def push(self, tangents: Tensor) -> Tensor:
        """Push tangents [n, S, T, D], dense over positions, to [n, R, T, D]."""
        block, n_heads = self.block, self.block.n_heads
        read = tangents if self.rows is None else tangents[:, self.rows]
        logits = self._by_query(_matmul(block.key, tangents))  # [n·H, R, T, S]
        queries = _rows_first(_matmul(block.query, read) * block.scale, n_heads)
        logits.view(len(logits), -1, self.length).baddbmm_(queries, self.key.flatten(0, 1).mT)
        del queries
        self._through_softmax_(logits)
        values = _rows_first(_matmul(block.value, tangents), n_heads)
        n_tangents = tangents.shape[2]
        context = torch.bmm(
            self.probabilities.flatten(0, 1),
            _unflatten(values, 1, (self.length, n_tangents)).flatten(2),
        )
        del values
        context = _unflatten(context, 2, (n_tangents, -1)).flatten(1, 2)
        context.baddbmm_(logits.flatten(1, 2), self.value.flatten(0, 1))
        merged = _positions_first(context, n_heads, n_tangents)
        return _matmul(block.out, merged).add_(read)

    def push_tokens(self, directions: Tensor, tokens: Tensor) -> Tensor:
        """Push tangents that are ``directions`` [n, S, D] at one of ``tokens`` [T] each.

        A token's key changes one column of the logits, its query one row: with p its column of the
        probabilities and e its change of the logits, row i of the context moves by
        p_i e_i (v − c_i) + p_i dv.
        """
        block, n_heads = self.block, self.block.n_heads
        moved = directions[:, tokens]  # [n, T, D]
        queries = _heads(_matmul(block.query, moved), n_heads) * block.scale  # [n, H, T, d]
        keys, values = (_heads(_matmul(p, moved), n_heads) for p in (block.key, block.value))
        columns = self.probabilities[..., tokens]  # [n, H, R, T]
        changes = (self.query @ keys.mT) * columns
        context = (
            _by_position(self.value[:, :, tokens])[:, None] - _by_position(self.context)[:, :, None]
        )
        context *= changes.permute(0, 2, 3, 1)[..., None]  # [n, R, T, H, d]
        context.addcmul_(columns.permute(0, 2, 3, 1)[..., None], _by_position(values)[:, None])
        at_row, at_token = self._own_rows(tokens)
        rows = self.probabilities[:, :, at_row]  # [n, H, M, S]
        logits = queries[:, :, at_token] @ self.key.mT
        logits = rows * (logits - (rows * logits).sum(-1, keepdim=True))
        context[:, at_row, at_token] += _by_position(logits @ self.value)
        pushed = _matmul(block.out, context.flatten(3))
        pushed[:, at_row, at_token] += moved[:, at_token]
        return pushed

    def pull(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents [n, R, C, D] back to [n, S, C, D]."""
        block = self.block
        queries, keys, values = self._pull_to_heads(cotangents)
        n, _, n_cotangents, width = cotangents.shape
        pulled = torch.zeros(
            n, self.length, n_cotangents, width, dtype=keys.dtype, device=keys.device
        )
        for projection, part in ((block.key, keys), (block.value, values)):
            pulled += _pulled(projection, part)
        own = _pulled(block.query, queries).add_(cotangents)
        if self.rows is None:
            return pulled.add_(own)
        pulled[:, self.rows] += own
        return pulled

    def pull_tokens(self, cotangents: Tensor, directions: Tensor) -> Tensor:
        """Pull cotangents [n, R, C, D] back to tokens along ``directions`` [n, S, D]: [n, C, S].

        The inner product with a direction is taken among queries, keys and values, so that nothing
        is projected back to the hidden width.
        """
        block = self.block
        queries, keys, values = self._pull_to_heads(cotangents)
        read = directions if self.rows is None else directions[:, self.rows]
        own = cotangents @ read[..., None]
        own += queries @ (_matmul(block.query, read))[..., None]
        pulled = keys @ _matmul(block.key, directions)[..., None]
        pulled += values @ _matmul(block.value, directions)[..., None]  # [n, S, C, 1]
        if self.rows is None:
            pulled += own
        else:
            pulled[:, self.rows] += own
        return pulled[..., 0].transpose(1, 2)

    def _pull_to_heads(self, cotangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pull [n, R, C, D] back to queries [n, R, C, D], keys and values [n, S, C, D]."""
        block, n_heads, n_cotangents = self.block, self.block.n_heads, cotangents.shape[2]
        contexts = _rows_first(_pulled(block.out, cotangents), n_heads)
        by_row = _unflatten(contexts, 1, (-1, n_cotangents)).flatten(2)
        values = torch.bmm(self.probabilities.flatten(0, 1).mT, by_row)
        values = _unflatten(values, 2, (n_cotangents, -1)).flatten(1, 2)
        logits = torch.bmm(contexts, self.value.flatten(0, 1).mT)
        logits = _unflatten(logits, 1, (-1, n_cotangents))
        self._through_softmax_(logits)
        queries = torch.bmm(logits.flatten(1, 2), self.key.flatten(0, 1)) * block.scale
        keys = torch.bmm(logits.flatten(2).mT, self.query.flatten(0, 1))  # [n·H, C·S, d]
        keys = _unflatten(_unflatten(keys, 0, (-1, n_heads)), 2, (n_cotangents, self.length))
        return (
            _positions_first(queries, n_heads, n_cotangents),
            keys.permute(0, 3, 2, 1, 4).flatten(3),
            _positions_first(values, n_heads, n_cotangents),
        )

    def _by_query(self, keys: Tensor) -> Tensor:
        """Multiply every query with the keys' tangents [n, S, T, D]: [n·H, R, T, S]."""
        n_heads, n_tangents = self.block.n_heads, keys.shape[2]
        keys = _unflatten(keys, 3, (n_heads, -1)).permute(0, 3, 2, 1, 4).flatten(0, 1).flatten(1, 2)
        logits = torch.bmm(self.query.flatten(0, 1), keys.mT)
        return _unflatten(logits, 2, (n_tangents, self.length))

    def _through_softmax_(self, logits: Tensor) -> None:
        """Apply the derivative of softmax, which is symmetric, to [n·H, R, T, S] in place."""
        probabilities = self.probabilities.flatten(0, 1)[:, :, None]
        logits.mul_(probabilities)
        logits.addcmul_(probabilities, logits.sum(-1, keepdim=True), value=-1.0)

    def _own_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return where output rows and tokens are the same position."""
        positions = torch.arange(self.length, device=tokens.device)
        rows = positions if self.rows is None else self.rows
        at_row, at_token = (rows[:, None] == tokens).nonzero(as_tuple=True)
        return at_row, at_token


class FeedForwardPoint:
    """The norm behind the attention, the two projections and the last norm, at a point y."""

    def __init__(self, block: PostNormBlock, y: Tensor, rows: Tensor | None) -> None:
        self.block = block
        self.norm_1 = NormPoint(block.norm_1, y, rows)
        inner = _linear(block.up, self.norm_1.output)
        active, slope, *_ = jvp(block.activation, (inner,), (torch.ones_like(inner),))
        self.norm_2 = NormPoint(
            block.norm_2, self.norm_1.output + _linear(block.down, active), rows
        )
        self.output = self.norm_2.output
        self.slope = slope if rows is None else slope[:, rows]

    def push(self, tangents: Tensor) -> Tensor:
        """Push [n, S, T, D] through, in place."""
        tangents = self.norm_1.push_(tangents)
        inner = _matmul(self.block.up, tangents).mul_(self.slope[:, :, None])
        tangents += _matmul(self.block.down, inner)
        return self.norm_2.push_(tangents)

    def pull(self, cotangents: Tensor) -> Tensor:
        """Pull [n, S, C, D] back, in place."""
        block = self.block
        cotangents = self.norm_2.pull_(cotangents)
        inner = _pulled(block.down, cotangents).mul_(self.slope[:, :, None])
        cotangents += _pulled(block.up, inner)
        return self.norm_1.pull_(cotangents)

    def push_pooled(self, tangents: Tensor, pooling: Tensor) -> Tensor:
        """Push [n, R, T, D] to its sum [n, T, D] over positions with weights ``pooling`` [n, R].

        With ρ = pooling · (1/σ₂) and ŵ the normalised point, the sum over positions of Norm₂'s
        derivative is γ₂ (m − mean(m) − Σ_s ρ_s ŵ_s (ŵ_s · dw_s) / D), m = Σ_s ρ_s dw_s; both parts
        need ``Down`` once, not once per position.
        """
        block, norm = self.block, self.norm_2
        tangents = self.norm_1.push_(tangents)
        weights = (pooling[..., None] * norm.inverse)[:, None, :, 0]  # [n, 1, R]
        back = _pulled(block.down, norm.unit) * self.slope
        along = norm.unit + _pulled(block.up, back)
        shares = tangents @ along[..., None]  # [n, R, T, 1]: ŵ · dw
        inner = _matmul(block.up, tangents)
        inner.mul_((self.slope * weights[:, 0, :, None])[:, :, None])
        n_tangents = tangents.shape[2]
        total = _unflatten((weights @ tangents.flatten(2)), 2, (n_tangents, -1))[:, 0]
        total = total + _matmul(block.down, inner.sum(1))
        total -= total.mean(-1, keepdim=True)
        scaled = (shares[..., 0] * weights.mT).transpose(1, 2)  # [n, T, R]
        total -= scaled @ norm.unit / total.shape[-1]
        return total * norm.weight

    def pull_pooled(self, cotangents: Tensor, pooling: Tensor) -> Tensor:
        """Pull [n, C, D] of the pooled vector back to [n, R, C, D]: the transpose of the above."""
        block, norm = self.block, self.norm_2
        width = cotangents.shape[-1]
        weights = (pooling[..., None] * norm.inverse)[:, :, None]  # [n, R, 1, 1]
        scaled = cotangents.contiguous() * norm.weight
        centred = scaled - scaled.mean(-1, keepdim=True)
        shares = (norm.unit @ scaled.mT)[..., None] / width  # [n, R, C, 1]
        pulled = (centred[:, None] - shares * norm.unit[:, :, None]).mul_(weights)
        inner = _pulled(block.down, centred)[:, None]
        inner = inner - shares * _pulled(block.down, norm.unit)[:, :, None]
        inner.mul_(weights * self.slope[:, :, None])
        pulled += _pulled(block.up, inner)
        return self.norm_1.pull_(pulled)


class PostNormLinearisation:
    """A stack of blocks, a linear pooling and a head, linearised at points x [n, S, D].

    Args:
        blocks: The blocks from the layer of the path to the top, at least one.
        points: Where to linearise, [n, S, D].
        pooling: Weights of the positions, [n, S].
        head: From pooled vectors to embeddings.
    """

    def __init__(
        self, blocks: Sequence[PostNormBlock], points: Tensor, pooling: Tensor, head: Head | None
    ) -> None:
        read = (pooling != 0).any(0)
        rows = None if bool(read.all()) else read.nonzero()[:, 0]
        self.pooling = pooling if rows is None else pooling[:, rows]
        self.attentions: list[AttentionPoint] = []
        self.feed_forwards: list[FeedForwardPoint] = []
        hidden = points
        for number, block in enumerate(blocks, 1):
            needed = rows if number == len(blocks) else None
            attention = AttentionPoint(block, hidden, needed)
            feed_forward = FeedForwardPoint(block, attention.output, needed)
            hidden = feed_forward.output
            self.attentions.append(attention)
            self.feed_forwards.append(feed_forward)
        self.pooled = (pooling[:, None] @ hidden)[:, 0]
        self.head = head
        self._embedding = self.pooled if head is None else head(self.pooled)

    @property
    def embedding(self) -> Tensor:
        """The embeddings at the points, [n, K]."""
        return self._embedding

    def total(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings and their derivatives along ``directions`` [n, S, D], each [n, K]."""
        pushed = self._push_rest(self.attentions[0].push(directions[:, :, None].contiguous()))
        return self.embedding, pushed[:, 0]

    def push_tokens(self, directions: Tensor, tokens: Tensor) -> Tensor:
        """Push the direction [n, S, D] of one token [T] at a time to [n, T, K]."""
        return self._push_rest(self.attentions[0].push_tokens(directions, tokens))

    def pull_tokens(self, cotangents: Tensor, directions: Tensor) -> Tensor:
        """Pull [n, C, K] back to tokens along ``directions`` [n, S, D]: [n, C, S]."""
        pulled = self._pull_to_first(cotangents)
        return self.attentions[0].pull_tokens(pulled, directions)

    def pull(self, cotangents: Tensor) -> Tensor:
        """Pull [n, C, K] back to hidden states, [n, C, S, D]."""
        return self.attentions[0].pull(self._pull_to_first(cotangents)).transpose(1, 2)

    def _push_rest(self, tangents: Tensor) -> Tensor:
        for attention, feed_forward in zip(self.attentions[1:], self.feed_forwards, strict=False):
            tangents = attention.push(feed_forward.push(tangents))
        pooled = self.feed_forwards[-1].push_pooled(tangents, self.pooling)
        return pooled if self.head is None else self._through_head(pooled)

    def _pull_to_first(self, cotangents: Tensor) -> Tensor:
        if self.head is not None:
            back = vjp(self.head, self.pooled)[1]
            cotangents = vmap(lambda c: back(c)[0], in_dims=1, out_dims=1)(cotangents)
        pulled = self.feed_forwards[-1].pull_pooled(cotangents, self.pooling)
        for attention, feed_forward in zip(
            self.attentions[:0:-1], self.feed_forwards[-2::-1], strict=True
        ):
            pulled = feed_forward.pull(attention.pull(pulled))
        return pulled

    def _through_head(self, tangents: Tensor) -> Tensor:
        assert self.head is not None
        head, pooled = self.head, self.pooled
        pushed: Tensor = vmap(
            lambda tangent: jvp(head, (pooled,), (tangent,))[1], in_dims=1, out_dims=1
        )(tangents)
        return pushed


def _unflatten(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    split: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return split


def _linear(projection: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, projection.weight, projection.bias)


def _matmul(projection: nn.Linear, tangents: Tensor) -> Tensor:
    """Project tangents: the bias has no derivative."""
    return linear(tangents, projection.weight)


def _pulled(projection: nn.Linear, cotangents: Tensor) -> Tensor:
    """Pull cotangents back through a projection: [..., out] to [..., in]."""
    return linear(cotangents, projection.weight.mT)


def _heads(x: Tensor, n_heads: int) -> Tensor:
    """[n, S, D] to [n, H, S, d]."""
    return _unflatten(x, 2, (n_heads, -1)).transpose(1, 2).contiguous()


def _merged(heads: Tensor) -> Tensor:
    """[n, H, S, d] to [n, S, D]."""
    return heads.transpose(1, 2).flatten(2)


def _by_position(heads: Tensor) -> Tensor:
    """[n, H, S, d] to [n, S, H, d]."""
    return heads.transpose(1, 2)


def _rows_first(tangents: Tensor, n_heads: int) -> Tensor:
    """[n, S, T, D] to [n·H, S·T, d]."""
    heads = _unflatten(tangents, 3, (n_heads, -1)).permute(0, 3, 1, 2, 4)
    return heads.flatten(2, 3).flatten(0, 1)


def _positions_first(heads: Tensor, n_heads: int, n_tangents: int) -> Tensor:
    """[n·H, S·T, d] to [n, S, T, D], contiguous."""
    heads = _unflatten(_unflatten(heads, 0, (-1, n_heads)), 2, (-1, n_tangents))
    return heads.permute(0, 2, 3, 1, 4).flatten(3)
