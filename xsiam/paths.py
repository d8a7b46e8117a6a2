"""Evaluate embeddings and derivatives along attribution paths, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xsiam.jacobian import token_derivatives, total_derivative
from xsiam.split import Features, SplitModel, select_rows


@dataclass
class PathGroup:
    """The attribution paths of m texts of one length S, at one layer.

    Attributes:
        split: The model, cut into head and tail.
        features: Features of the texts, tensors [m, S].
        layer: Where the paths live.
        start: Hidden states of the references, [m, S, D].
        direction: δ, hidden states of the texts minus the references', [m, S, D].
        budget: Bytes that one evaluation may take beyond the model.
        truncate_dim: Embedding dimensions that count, None for all.
    """

    split: SplitModel
    features: Features
    layer: int
    start: Tensor
    direction: Tensor
    budget: int
    truncate_dim: int | None = None

    @property
    def size(self) -> int:
        """m, the number of texts."""
        return len(self.start)

    def embed(self, alpha: float) -> Tensor:
        """Return the embeddings at x(α) of every text, [m, K] float64 on the CPU."""
        rows = torch.arange(self.size)
        at = torch.full((self.size,), alpha, dtype=torch.float64)
        step = self._rows_per_call(1)
        parts = [self._tail(rows[i : i + step])(self._points(rows[i : i + step], at[i : i + step]))
                 for i in range(0, self.size, step)]  # fmt: skip
        return torch.cat(parts).cpu().double()

    def totals(self, rows: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings and total derivatives at (text, α) pairs, each [n, K] float64."""
        step = self._rows_per_call(2)
        embeddings, derivatives = [], []
        for i in range(0, len(rows), step):
            some, at = rows[i : i + step], alphas[i : i + step]
            embedding, derivative = total_derivative(
                self._tail(some), self._points(some, at), self.direction[some]
            )
            embeddings.append(embedding.cpu().double())
            derivatives.append(derivative.cpu().double())
        return torch.cat(embeddings), torch.cat(derivatives)

    def token_sums(self, rows: Tensor, alphas: Tensor, weights: Tensor, panels: Tensor) -> Tensor:
        """Return weighted sums of token derivatives per panel.

        Args:
            rows: Text of each node, [n].
            alphas: Position of each node, [n] float64.
            weights: W weights of each node, [W, n] float64.
            panels: Panel of each node, [n], numbered from 0.

        Returns:
            [W, P, K, S] float64 on the CPU.
        """
        length = self.start.shape[1]
        n_panels = int(panels.max()) + 1
        tokens_per_call = max(1, min(length, self._rows_per_call(1) - 1))
        step = self._rows_per_call(tokens_per_call + 1)
        sums: Tensor | None = None
        for i in range(0, len(rows), step):
            some, at = rows[i : i + step], alphas[i : i + step]
            tail, points = self._tail(some), self._points(some, at)
            for first in range(0, length, tokens_per_call):
                tokens = torch.arange(first, min(first + tokens_per_call, length))
                derivative = token_derivatives(
                    tail, points, self.direction[some], tokens.to(points.device)
                )
                values = derivative.permute(1, 2, 0).cpu().double()  # [n, K, T]
                if sums is None:
                    shape = (len(weights), n_panels, values.shape[1], length)
                    sums = torch.zeros(shape, dtype=torch.float64)
                for number, weight in enumerate(weights[:, i : i + step]):
                    part = sums[number, :, :, first : first + len(tokens)]
                    part.index_add_(0, panels[i : i + step], values * weight[:, None, None])
        assert sums is not None
        return sums

    def _points(self, rows: Tensor, alphas: Tensor) -> Tensor:
        alphas = alphas.to(self.start)[:, None, None]
        return self.start[rows] + alphas * self.direction[rows]

    def _tail(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        features = select_rows(self.features, rows.to(self.start.device))

        def tail(hidden: Tensor) -> Tensor:
            return self.split.tail(features, self.layer, hidden)[:, : self.truncate_dim]

        return tail

    def _rows_per_call(self, tangents: int) -> int:
        """Return how many rows of ``tangents`` tangents each fit the budget."""
        return max(1, self.budget // (self.bytes_per_tangent() * tangents))

    def bytes_per_tangent(self) -> int:
        """Estimate the bytes that one tangent of one node takes at the peak of a forward."""
        _, length, width = self.start.shape
        config = self.split.model.config
        inner = getattr(config, "intermediate_size", None) or 4 * width
        heads = getattr(config, "num_attention_heads", None) or max(1, width // 64)
        per_token = 8 * width + 4 * inner + 3 * heads * length
        return int(self.start.element_size() * length * per_token)
