"""One block from tokens to the pooled vector, without a tangent per row and token.

Where the layer of the path is right below the last block, a tangent enters through ONE token and
leaves through a weighted sum over rows. Between them stands little that knows both row i and token
t: contexts move by α (v_h(t) − c_h(i)) + β dv_h(t) (:class:`xsiam.attention.ContextTangents`), with
α and β scalars of a head, row and token; norms and the activation only scale what stands at a row.
Hence vectors of tokens and of rows are projected, 3·S of them instead of S², and pairs of a row and
a token are thin matrix products. The result is the same sum in another order.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from xsiam.attention import AttentionPoint, ContextTangents
from xsiam.block import PostNormBlock, by_head, merged, pull_through, push_through
from xsiam.feed_forward import FeedForwardPoint
from xsiam.linear import linear


def is_cheaper(block: PostNormBlock, n_rows: int, n_tokens: int) -> bool:
    """Whether :class:`OneTokenBlock` takes less time than a tangent per row and token does.

    Estimated in multiplications of one point. Tokens are projected twice; rows too, and pulled back
    once more for the normalised points; then every head has its own 2 T + R vectors.
    """
    width, inner, n_heads = block.up.in_features, block.up.out_features, block.n_heads
    pairs, per_head = n_rows * n_tokens, 2 * n_tokens + n_rows
    projected = (per_head + 2 * n_rows) * width
    among_heads = n_heads * (per_head * _HANDLED + 3 * pairs * _THIN)
    return inner * (projected + among_heads) < pairs * width * (width + inner)


class OneTokenBlock:
    """A block whose tangents touch one token below it and are pooled above it.

    With y(i, t) the tangent behind the attention, û the point that Norm₁ normalised, σ its standard
    deviation and P the projection that removes the mean, Norm₁ gives

        n(i, t) = γ₁/σ_i ⊙ (P y(i, t) − û_i s(i, t) / D),   s(i, t) = û_i · y(i, t),

    and :meth:`FeedForwardPoint.pool` needs Σ_i ρ_i n(i, t), Σ_i ρ_i slope_i ⊙ Up n(i, t) and the
    scalars ŵ_i · dw(i, t) = a_i · y(i, t), where a_i is ``along`` pulled back through Norm₁.

    Args:
        attention: The block's attention at the points.
        feed_forward: The rest of the block there.
        pooling: Weights of the rows, [n, R].
    """

    def __init__(
        self, attention: AttentionPoint, feed_forward: FeedForwardPoint, pooling: Tensor
    ) -> None:
        self.attention, self.feed_forward = attention, feed_forward
        self.block, norm_1 = attention.block, feed_forward.norm_1
        self.shares_weight = pooling[..., None] * feed_forward.norm_2.inverse  # ρ, [n, R, 1]
        self.weights = self.shares_weight * norm_1.inverse  # ρ/σ
        self.inner_weights = self.weights * feed_forward.slope  # [n, R, I]
        self.unit = norm_1.unit  # û
        self.unit_inner = self.inner_weights * _up(self.block, self.unit)
        along = norm_1.pull_(feed_forward.along[:, :, None].clone())[:, :, 0]
        self.read = torch.stack([self.unit, along], dim=1)  # what is multiplied with y: û, a
        n, _, n_rows, _ = self.read.shape
        heads = by_head(pull_through(self.block.out, self.read).flatten(1, 2), self.block.n_heads)
        self.read_heads = heads.view(n, self.block.n_heads, 2 * n_rows, -1)  # Woᵀ û, Woᵀ a

    def push_tokens(self, directions: Tensor, tokens: Tensor) -> Tensor:
        """Push ``directions`` [n, S, D] at one of ``tokens`` [T] at a time to [n, T, D]."""
        moves = self.attention.context_tangents(directions, tokens)
        own = push_through(self.block.out, moves.own) + moves.residual  # [n, M, D]
        unit_shares, along_shares = self._products(moves, own)
        unit_shares /= -self.unit.shape[-1]
        total = self._sum_hidden(moves, own)
        total += (unit_shares * self.weights).mT @ self.unit
        total -= total.mean(-1, keepdim=True)
        total *= self.block.norm_1.weight
        inner = self._sum_inner(moves, own)
        inner.baddbmm_(unit_shares.mT, self.unit_inner)
        return self.feed_forward.pool(total, inner, along_shares * self.shares_weight)

    def _products(self, moves: ContextTangents, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return û_i · y(i, t) and a_i · y(i, t), each [n, R, T], from products among heads."""
        n, n_heads, n_rows, n_tokens = moves.alpha.shape
        rows = self.read_heads.view(n, n_heads, 2, n_rows, -1)
        shape = (n, n_heads, 2, n_rows, n_tokens)
        values = (self.read_heads @ moves.values.mT).view(shape)
        values -= (rows * moves.contexts[:, :, None]).sum(-1, keepdim=True)
        changes = (self.read_heads @ moves.value_tangents.mT).view(shape)
        products = values.mul_(moves.alpha[:, :, None])
        products = products.addcmul_(changes, moves.beta[:, :, None]).sum(1)  # [n, 2, R, T]
        products[:, :, moves.at_row, moves.at_token] += (
            self.read[:, :, moves.at_row] * own[:, None]
        ).sum(-1)
        return products[:, 0], products[:, 1]

    def _sum_hidden(self, moves: ContextTangents, own: Tensor) -> Tensor:
        """Return Σ_i ρ_i/σ_i y(i, t), [n, T, D]: contexts are summed before ``out``."""
        weights = self.weights[:, None]
        alpha = moves.alpha * weights
        contexts = moves.values * alpha.sum(2)[..., None]
        contexts += moves.value_tangents * (moves.beta * weights).sum(2)[..., None]
        contexts -= alpha.mT @ moves.contexts
        total = push_through(self.block.out, merged(contexts))
        return total.index_add_(1, moves.at_token, own * self.weights[:, moves.at_row])

    def _sum_inner(self, moves: ContextTangents, own: Tensor) -> Tensor:
        """Return Σ_i ρ_i/σ_i slope_i ⊙ Up γ₁ ⊙ P y(i, t), [n, T, I], head by head.

        With M_h = Up diag(γ₁) P Wo_h and q_i = ρ_i/σ_i slope_i, a head's part is
        M_h v_h(t) ⊙ Σ_i α q_i + M_h dv_h(t) ⊙ Σ_i β q_i − Σ_i α q_i ⊙ M_h c_h(i).
        """
        n_tokens = moves.alpha.shape[3]
        weights = self.inner_weights
        total: Tensor = weights.new_zeros(len(weights), n_tokens, weights.shape[2])
        total.index_add_(1, moves.at_token, _up(self.block, own) * weights[:, moves.at_row])
        vectors = torch.cat([moves.values, moves.value_tangents, moves.contexts], dim=2)
        scalars = torch.cat([moves.alpha, moves.beta], dim=3).mT  # [n, H, 2T, R]
        for head, projection in enumerate(_composed(self.block)):
            projected = linear(vectors[:, head], projection)  # [n, 2T + R, I]
            summed = torch.bmm(scalars[:, head], weights)
            total.addcmul_(projected[:, :n_tokens], summed[:, :n_tokens])
            total.addcmul_(projected[:, n_tokens : 2 * n_tokens], summed[:, n_tokens:])
            contexts = projected[:, 2 * n_tokens :].mul_(weights)
            total.baddbmm_(scalars[:, head, :n_tokens], contexts, alpha=-1.0)
        return total


def _up(block: PostNormBlock, y: Tensor) -> Tensor:
    """Return Up γ₁ ⊙ P y: what of a tangent behind the attention arrives behind ``Up``."""
    return push_through(block.up, (y - y.mean(-1, keepdim=True)) * block.norm_1.weight)


def _composed(block: PostNormBlock) -> Tensor:
    """Return the matrices Up diag(γ₁) P Wo_h of all heads, [H, I, d], kept while they hold.

    They hold as long as they have the same product with a random vector.
    """
    width, n_heads = block.out.in_features, block.n_heads
    probe = torch.randn(1, width, generator=torch.Generator().manual_seed(width))
    check = _up(block, push_through(block.out, probe.to(block.out.weight)))
    known = _COMPOSED.get(block.up, {}).get((check.dtype, check.device))
    if known is not None and torch.equal(known[0], check):
        return known[1]
    unit = torch.eye(width, dtype=check.dtype, device=check.device)
    matrix = _up(block, push_through(block.out, unit))  # its transpose, [D, I]
    heads = matrix.view(n_heads, width // n_heads, -1).mT.contiguous().detach()
    _COMPOSED[block.up] = {(check.dtype, check.device): (check.detach(), heads)}
    return heads


_Kept = dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]]
_COMPOSED: WeakKeyDictionary[nn.Linear, _Kept] = WeakKeyDictionary()
# What a multiplication in a thin product takes, and writing and reading a number: measured on an
# AVX-512 processor, in multiplications of a large product.
_THIN, _HANDLED = 3, 48
