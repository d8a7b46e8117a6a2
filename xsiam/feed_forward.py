"""The two norms and the projections between them, forward and back, up to the pooling."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import jvp

from xsiam.block import PostNormBlock, project, pull_through, push_through, unflatten


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


class FeedForwardPoint:
    """The norm behind the attention, the two projections and the last norm, at a point y."""

    def __init__(self, block: PostNormBlock, y: Tensor, rows: Tensor | None) -> None:
        self.block = block
        self.norm_1 = NormPoint(block.norm_1, y, rows)
        inner = project(block.up, self.norm_1.output)
        active, slope, *_ = jvp(block.activation, (inner,), (torch.ones_like(inner),))
        self.norm_2 = NormPoint(
            block.norm_2, self.norm_1.output + project(block.down, active), rows
        )
        self.output = self.norm_2.output
        self.slope = slope if rows is None else slope[:, rows]

    def push(self, tangents: Tensor) -> Tensor:
        """Push [n, S, T, D] through, in place."""
        tangents = self.norm_1.push_(tangents)
        inner = push_through(self.block.up, tangents, stays_rounded=True)
        inner.mul_(self.slope[:, :, None].to(inner.dtype))
        tangents += push_through(self.block.down, inner)
        return self.norm_2.push_(tangents)

    def pull(self, cotangents: Tensor) -> Tensor:
        """Pull [n, S, C, D] back, in place."""
        block = self.block
        cotangents = self.norm_2.pull_(cotangents)
        inner = pull_through(block.down, cotangents, stays_rounded=True)
        inner.mul_(self.slope[:, :, None].to(inner.dtype))
        cotangents += pull_through(block.up, inner)
        return self.norm_1.pull_(cotangents)

    def push_pooled(self, tangents: Tensor, pooling: Tensor) -> Tensor:
        """Push [n, R, T, D] to its sum [n, T, D] over positions with weights ``pooling`` [n, R]."""
        block, n_tangents = self.block, tangents.shape[2]
        tangents = self.norm_1.push_(tangents)
        weights = pooling[..., None] * self.norm_2.inverse  # [n, R, 1]
        shares = (tangents @ self.along[..., None])[..., 0]
        inner = push_through(block.up, tangents, stays_rounded=True)
        inner.mul_((self.slope * weights)[:, :, None].to(inner.dtype))
        total = unflatten(weights.mT @ tangents.flatten(2), 2, (n_tangents, -1))[:, 0]
        return self.pool(total, inner.sum(1, dtype=total.dtype), shares * weights)

    @cached_property
    def along(self) -> Tensor:
        """What tangents n behind Norm₁ are multiplied with for ŵ · dw, [n, R, D].

        dw = n + Down (slope ⊙ Up n) is the tangent before Norm₂ and ŵ its normalised point.
        """
        unit = self.norm_2.unit
        back = pull_through(self.block.down, unit).mul_(self.slope)
        return pull_through(self.block.up, back).add_(unit)

    def pool(self, total: Tensor, inner: Tensor, shares: Tensor) -> Tensor:
        """Apply ``Down`` and Norm₂ to sums over positions instead of to every position.

        With weights ρ = pooling / σ₂, the pooled derivative of Norm₂ is
        γ₂ ⊙ (m − mean(m) − Σ_i ρ_i ŵ_i (ŵ_i · dw_i) / D) with m = Σ_i ρ_i dw_i.

        Args:
            total: Σ_i ρ_i n_i, [n, T, D].
            inner: Σ_i ρ_i slope_i ⊙ Up n_i, [n, T, I].
            shares: ρ_i (ŵ_i · dw_i), [n, R, T].
        """
        norm = self.norm_2
        total = total + push_through(self.block.down, inner)
        total -= total.mean(-1, keepdim=True)
        total -= shares.mT @ norm.unit / total.shape[-1]
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
        inner = pull_through(block.down, centred)[:, None]
        inner = inner - shares * pull_through(block.down, norm.unit)[:, :, None]
        inner.mul_(weights * self.slope[:, :, None])
        pulled += pull_through(block.up, inner)
        return self.norm_1.pull_(pulled)
