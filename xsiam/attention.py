"""Attention with its residual: tangents forward, cotangents back, by the written-out formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xsiam.block import (
    PostNormBlock,
    batched_linear,
    by_head,
    by_position,
    merged,
    positions_first,
    project,
    pull_through,
    push_through,
    rows_first,
    unflatten,
)
from xsiam.linear import linear

# Contracting must take this share of the multiplications: they are in smaller matrices.
_WORTH_IT = 0.75


@dataclass(frozen=True)
class ContextTangents:
    """How the heads' contexts c_h move as one of T tokens moves, kept in factors.

    The key of token t changes one column of the logits: row i of head h moves by
    α (v_h(t) − c_h(i)) + β dv_h(t), with β = p_h(i, t) and α = p_h(i, t) dlogit_h(i, t). Its query
    changes the logits of its own row, which therefore moves further.

    Attributes:
        alpha: [n, H, R, T].
        beta: [n, H, R, T].
        values: v_h(t), [n, H, T, d].
        value_tangents: dv_h(t), [n, H, T, d].
        contexts: c_h(i), [n, H, R, d].
        at_row: Where row and token are one position, the row's number, [M].
        at_token: The token's number there, [M].
        own: By how much the context moves further there, [n, M, D].
        residual: The token's own tangent there, which the residual adds behind ``out``, [n, M, D].
    """

    alpha: Tensor
    beta: Tensor
    values: Tensor
    value_tangents: Tensor
    contexts: Tensor
    at_row: Tensor
    at_token: Tensor
    own: Tensor
    residual: Tensor


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
        self.query = by_head(project(block.query, x), block.n_heads) * block.scale  # [n, H, S, d]
        self.key = by_head(project(block.key, x), block.n_heads)
        self.value = by_head(project(block.value, x), block.n_heads)
        logits = self.query @ self.key.mT
        if block.bias is not None:
            logits = logits + block.bias
        self.probabilities = logits.softmax(dim=-1)  # [n, H, S, S]
        self.context = self.probabilities @ self.value
        self.output = x + project(block.out, merged(self.context))
        if rows is not None:
            self.query, self.context = self.query[:, :, rows], self.context[:, :, rows]
            self.probabilities = self.probabilities[:, :, rows]

    def push(self, tangents: Tensor) -> Tensor:
        """Push tangents [n, S, T, D], dense over positions, to [n, R, T, D]."""
        block, n_heads = self.block, self.block.n_heads
        read = tangents if self.rows is None else tangents[:, self.rows]
        if self._contracts(tangents.shape[2]):
            logits = self._contracted_logits(tangents, read)  # [n·H, R, T, S]
        else:
            logits = self._projected_logits(tangents, read)
        self._through_softmax_(logits)
        values = rows_first(push_through(block.value, tangents), n_heads)
        n_tangents = tangents.shape[2]
        context = torch.bmm(
            self.probabilities.flatten(0, 1),
            unflatten(values, 1, (self.length, n_tangents)).flatten(2),
        )
        del values
        context = unflatten(context, 2, (n_tangents, -1)).flatten(1, 2)
        context.baddbmm_(logits.flatten(1, 2), self.value.flatten(0, 1))
        context = positions_first(context, n_heads, n_tangents)
        return push_through(block.out, context).add_(read)

    def push_tokens(self, directions: Tensor, tokens: Tensor) -> Tensor:
        """Push ``directions`` [n, S, D] at one of ``tokens`` [T] at a time to [n, R, T, D]."""
        moves = self.context_tangents(directions, tokens)
        context = by_position(moves.values)[:, None] - by_position(moves.contexts)[:, :, None]
        context *= moves.alpha.permute(0, 2, 3, 1)[..., None]  # [n, R, T, H, d]
        beta = moves.beta.permute(0, 2, 3, 1)[..., None]
        context.addcmul_(beta, by_position(moves.value_tangents)[:, None])
        context = context.flatten(3)
        context[:, moves.at_row, moves.at_token] += moves.own
        pushed = push_through(self.block.out, context)
        pushed[:, moves.at_row, moves.at_token] += moves.residual
        return pushed

    def context_tangents(self, directions: Tensor, tokens: Tensor) -> ContextTangents:
        """Return how contexts move as ``directions`` [n, S, D] moves one of ``tokens`` [T]."""
        block, n_heads = self.block, self.block.n_heads
        moved = directions[:, tokens]  # [n, T, D]
        queries, keys, values = (
            by_head(push_through(projection, moved), n_heads)
            for projection in (block.query, block.key, block.value)
        )
        beta = self.probabilities[..., tokens]
        at_row, at_token = self._own_rows(tokens)
        rows = self.probabilities[:, :, at_row]  # [n, H, M, S]
        logits = (queries[:, :, at_token] * block.scale) @ self.key.mT
        logits = rows * (logits - (rows * logits).sum(-1, keepdim=True))
        return ContextTangents(
            alpha=(self.query @ keys.mT) * beta,
            beta=beta,
            values=self.value[:, :, tokens],
            value_tangents=values,
            contexts=self.context,
            at_row=at_row,
            at_token=at_token,
            own=merged(logits @ self.value),
            residual=moved[:, at_token],
        )

    def pull(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents [n, R, C, D] back to [n, S, C, D]."""
        block = self.block
        queries, keys, values = self._pull_to_heads(cotangents)
        n, _, n_cotangents, width = cotangents.shape
        pulled = torch.zeros(
            n, self.length, n_cotangents, width, dtype=keys.dtype, device=keys.device
        )
        for projection, part in ((block.key, keys), (block.value, values)):
            pulled += pull_through(projection, part)
        own = pull_through(block.query, queries).add_(cotangents)
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
        own += queries @ (push_through(block.query, read))[..., None]
        pulled = keys @ push_through(block.key, directions)[..., None]
        pulled += values @ push_through(block.value, directions)[..., None]  # [n, S, C, 1]
        if self.rows is None:
            pulled += own
        else:
            pulled[:, self.rows] += own
        return pulled[..., 0].transpose(1, 2)

    def _pull_to_heads(self, cotangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pull [n, R, C, D] back to queries [n, R, C, D], keys and values [n, S, C, D]."""
        block, n_heads, n_cotangents = self.block, self.block.n_heads, cotangents.shape[2]
        contexts = rows_first(pull_through(block.out, cotangents), n_heads)
        by_row = unflatten(contexts, 1, (-1, n_cotangents)).flatten(2)
        values = torch.bmm(self.probabilities.flatten(0, 1).mT, by_row)
        values = unflatten(values, 2, (n_cotangents, -1)).flatten(1, 2)
        logits = torch.bmm(contexts, self.value.flatten(0, 1).mT)
        logits = unflatten(logits, 1, (-1, n_cotangents))
        self._through_softmax_(logits)
        queries = torch.bmm(logits.flatten(1, 2), self.key.flatten(0, 1)) * block.scale
        keys = torch.bmm(logits.flatten(2).mT, self.query.flatten(0, 1))  # [n·H, C·S, d]
        keys = unflatten(unflatten(keys, 0, (-1, n_heads)), 2, (n_cotangents, self.length))
        return (
            positions_first(queries, n_heads, n_cotangents),
            keys.permute(0, 3, 2, 1, 4).flatten(3),
            positions_first(values, n_heads, n_cotangents),
        )

    def _contracts(self, n_tangents: int) -> bool:
        """Whether logits by contraction take so few multiplications that it pays."""
        n_heads, n_rows, width = self.block.n_heads, self.query.shape[2], self.block.key.in_features
        n_positions = self.length + n_rows
        contracted = 2 * n_heads * self.length * n_rows * n_tangents + n_positions * width
        return contracted < _WORTH_IT * n_positions * n_tangents * width

    def _projected_logits(self, tangents: Tensor, read: Tensor) -> Tensor:
        """Push to logits [n·H, R, T, S] by q_h(i) · Wk_h dx(j) + Wq_h dx(i) · k_h(j)."""
        block, n_heads, n_tangents = self.block, self.block.n_heads, tangents.shape[2]
        keys = unflatten(push_through(block.key, tangents), 3, (n_heads, -1))
        keys = keys.permute(0, 3, 2, 1, 4).flatten(0, 1).flatten(1, 2)  # [n·H, T·S, d]
        logits = torch.bmm(self.query.flatten(0, 1), keys.mT)
        queries = rows_first(push_through(block.query, read) * block.scale, n_heads)
        logits.view(len(logits), -1, self.length).baddbmm_(queries, self.key.flatten(0, 1).mT)
        return unflatten(logits, 2, (n_tangents, self.length))

    def _contracted_logits(self, tangents: Tensor, read: Tensor) -> Tensor:
        """Push to logits [n·H, R, T, S] by Wk_hᵀ q_h(i) · dx(j) + Wq_hᵀ k_h(j) · dx(i).

        A position of a tangent takes 2 H S products instead of 2 D: fewer in short texts.
        """
        by_key = self._contracted(tangents, self.block.key, self.query)  # [n, S, T, H, R]
        by_query = self._contracted(read, self.block.query, self.key * self.block.scale)
        logits = by_query.permute(0, 3, 1, 2, 4).contiguous()
        return logits.add_(by_key.permute(0, 3, 4, 2, 1)).flatten(0, 1)

    def _contracted(self, tangents: Tensor, projection: nn.Linear, others: Tensor) -> Tensor:
        """Multiply tangents [n, P, T, D] with W_hᵀ o_h for ``others`` o [n, H, Q, d].

        Returns:
            [n, P, T, H, Q].
        """
        _, n_heads, n_others, size = others.shape
        weights = projection.weight.view(n_heads, size, -1)
        pulled = torch.stack(
            [linear(others[:, head], weights[head].mT) for head in range(n_heads)], dim=1
        )
        products = batched_linear(tangents.flatten(1, 2), pulled.flatten(1, 2))
        return products.view(*tangents.shape[:3], n_heads, n_others)

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
