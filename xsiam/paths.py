"""Evaluate embeddings and derivatives along attribution paths, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from xsiam.families import Lineariser
from xsiam.jacobian import Linearisation
from xsiam.memory import is_out_of_memory, release_cached, working_set
from xsiam.split import Features, select_rows

T = TypeVar("T")


@dataclass
class PathGroup:
    """The attribution paths of m texts of one length S, at one layer.

    Attributes:
        lineariser: Makes derivatives of the model's tail from that layer on.
        features: Features of the texts, tensors [m, S].
        start: Hidden states of the references, [m, S, D].
        direction: δ, hidden states of the texts minus the references', [m, S, D].
        start_embeddings: e(r), truncated, not shifted, [m, K] float64 on the CPU.
        end_embeddings: e(a), likewise.
        budget: Bytes that one evaluation may take beyond the model; halved for good where the
            machine runs out of memory below it.
        noise: How far rounding may move the embedding of each text, [m] float64.
        reverse: Whether token derivatives are pulled back from the embedding's K dimensions
            instead of pushed forward from S tokens.
    """

    lineariser: Lineariser
    features: Features
    start: Tensor
    direction: Tensor
    start_embeddings: Tensor
    end_embeddings: Tensor
    budget: int
    noise: Tensor
    reverse: bool = False

    @property
    def size(self) -> int:
        """m, the number of texts."""
        return len(self.start)

    @property
    def length(self) -> int:
        """S, the tokens of every text."""
        return self.start.shape[1]

    def embed(self, rows: Tensor, alphas: Tensor) -> Tensor:
        """Return the embeddings at (text, α) pairs, [n, K] float64 on the CPU."""

        def evaluate(part: slice, _: int) -> Tensor:
            return self.at(rows[part], alphas[part]).embedding.cpu().double()

        return torch.cat([result for _, result in self._in_parts(len(rows), 1, evaluate)])

    def totals(self, rows: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings and total derivatives at (text, α) pairs, each [n, K] float64."""

        def evaluate(part: slice, _: int) -> tuple[Tensor, Tensor]:
            embedding, derivative = self.at(rows[part], alphas[part]).total(
                self.direction[rows[part]]
            )
            return embedding.cpu().double(), derivative.cpu().double()

        parts = [result for _, result in self._in_parts(len(rows), 1, evaluate)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def token_sums(
        self,
        rows: Tensor,
        alphas: Tensor,
        weights: Tensor,
        panels: Tensor,
        cotangents: Tensor | None = None,
    ) -> Tensor:
        """Return weighted sums of token derivatives per panel.

        Args:
            rows: Text of each node, [n].
            alphas: Position of each node, [n] float64.
            weights: W weights of each node, [W, n] float64.
            panels: Panel of each node, [n], numbered from 0.
            cotangents: C directions of embedding space for each text, [m, C, K]: their inner
                products with the token derivatives are summed instead.

        Returns:
            [W, P, K, S] float64 on the CPU, or [W, P, C, S] with cotangents.
        """
        if cotangents is None and self.reverse:
            n_dimensions = self.start_embeddings.shape[1]
            unit = torch.eye(n_dimensions, dtype=self.start.dtype, device=self.start.device)
            cotangents = unit.expand(self.size, -1, -1)
        n_vectors = self.length if cotangents is None else cotangents.shape[1]

        def evaluate(part: slice, at_once: int) -> Tensor:
            return self._derivatives(rows[part], alphas[part], at_once, cotangents)

        sums: Tensor | None = None
        for part, values in self._in_parts(len(rows), n_vectors, evaluate):
            if sums is None:
                shape = (len(weights), int(panels.max()) + 1, *values.shape[1:])
                sums = torch.zeros(shape, dtype=torch.float64)
            for number, weight in enumerate(weights[:, part]):
                sums[number].index_add_(0, panels[part], values * weight[:, None, None])
        assert sums is not None
        return sums

    def at(self, rows: Tensor, alphas: Tensor) -> Linearisation:
        """Linearise at (text, α) pairs."""
        features = select_rows(self.features, rows.to(self.start.device))
        points = self.start[rows] + alphas.to(self.start)[:, None, None] * self.direction[rows]
        return self.lineariser(features, points)

    def _derivatives(
        self, rows: Tensor, alphas: Tensor, at_once: int, cotangents: Tensor | None
    ) -> Tensor:
        """Return the token derivatives at some nodes, [n, K or C, S] float64 on the CPU."""
        linearised, direction = self.at(rows, alphas), self.direction[rows]
        parts = []
        if cotangents is None:
            for tokens in torch.split(torch.arange(self.length, device=self.start.device), at_once):
                pushed = linearised.push_tokens(direction, tokens)
                parts.append(pushed.transpose(1, 2).cpu().double())
            return torch.cat(parts, dim=2)
        for some in torch.split(cotangents[rows], at_once, dim=1):
            parts.append(linearised.pull_tokens(some, direction).cpu().double())
        return torch.cat(parts, dim=1)

    def _in_parts(
        self, n_points: int, n_vectors: int, evaluate: Callable[[slice, int], T]
    ) -> list[tuple[slice, T]]:
        """Evaluate points in parts that fit the budget; smaller ones where memory runs out.

        ``evaluate`` takes a part of the points and how many vectors (tangents or cotangents) of
        each point fit at once.
        """
        results: list[tuple[slice, T]] = []
        first = 0
        while first < n_points:
            at_once, n_together = self._fitting(n_vectors)
            part = slice(first, min(first + n_together, n_points))
            try:
                results.append((part, evaluate(part, at_once)))
            except (RuntimeError, MemoryError) as error:
                smallest = part.stop - part.start == 1 and at_once == 1
                if smallest or not is_out_of_memory(error):
                    raise
                release_cached(self.start.device)
                self.budget = self._bytes(at_once, part.stop - part.start) // 2
                continue
            first = part.stop
        return results

    def _fitting(self, n_vectors: int) -> tuple[int, int]:
        """Return how many vectors of a point, and how many points, fit the budget together."""
        room = working_set(self.start.device, self.budget, self._bytes(1, 1))
        at_once = (room - self._bytes(0, 1)) // max(1, self._bytes(1, 1) - self._bytes(0, 1))
        at_once = max(1, min(n_vectors, at_once))
        return at_once, max(1, room // self._bytes(at_once, 1))

    def _bytes(self, n_vectors: int, n_points: int) -> int:
        """Estimate the bytes that an evaluation takes at its peak."""
        return (
            n_points
            * self.start.element_size()
            * (
                self.lineariser.floats_per_point(self.length)
                + n_vectors * self.lineariser.floats_per_tangent(self.length)
            )
        )
