"""Evaluate embeddings and derivatives along attribution paths, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from xsiam.families import Lineariser
from xsiam.jacobian import Linearisation
from xsiam.linear import room_for_weights, rounded_products
from xsiam.memory import is_out_of_memory, release_cached, working_set
from xsiam.split import Features, select_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Rounding:
    """How matrix products may round their factors.

    Attributes:
        moves: How far that moves token vectors and their sum, relative to |Δ|.
        of_points: Whether also those of the model's own forward do, not only those of tangents.
    """

    moves: float
    of_points: bool


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
        moved: Hidden states of the texts as rounding may have moved them, [m, S, D].
        reverse: Whether token derivatives are pulled back from the embedding's K dimensions
            instead of pushed forward from S tokens.
        rounding: How factors of matrix products are rounded where that may be tried, else None.
    """

    lineariser: Lineariser
    features: Features
    start: Tensor
    direction: Tensor
    start_embeddings: Tensor
    end_embeddings: Tensor
    budget: int
    noise: Tensor
    moved: Tensor
    reverse: bool = False
    rounding: Rounding | None = None

    @property
    def size(self) -> int:
        """m, the number of texts."""
        return len(self.start)

    @property
    def length(self) -> int:
        """S, the tokens of every text."""
        return self.start.shape[1]

    def perturbed(self) -> PathGroup:
        """Return the paths to where rounding may have moved the texts."""
        return replace(self, direction=self.moved - self.start)

    def embed(self, rows: Tensor, alphas: Tensor) -> Tensor:
        """Return the embeddings at (text, α) pairs, [n, K] float64 on the CPU."""

        def evaluate(part: slice, _: int) -> Tensor:
            return _exact(self.at(rows[part], alphas[part]).embedding)

        return torch.cat([result for _, result in self._in_parts(len(rows), 1, evaluate)]).cpu()

    def totals(self, rows: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings and total derivatives at (text, α) pairs, each [n, K] float64."""

        def evaluate(part: slice, _: int) -> tuple[Tensor, Tensor]:
            embedding, derivative = self.at(rows[part], alphas[part]).total(
                self.direction[rows[part]]
            )
            return _exact(embedding), _exact(derivative)

        parts = [result for _, result in self._in_parts(len(rows), 1, evaluate)]
        return torch.cat([p[0] for p in parts]).cpu(), torch.cat([p[1] for p in parts]).cpu()

    def token_sums(
        self,
        rows: Tensor,
        alphas: Tensor,
        weights: Tensor,
        panels: Tensor,
        *,
        rounded: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return weighted sums of token derivatives per panel, and the total derivative at nodes.

        Args:
            rows: Text of each node, [n].
            alphas: Position of each node, [n] float64.
            weights: W weights of each node, [W, n] float64.
            panels: Panel of each node, [n], numbered from 0.
            rounded: Whether factors of matrix products are rounded, as ``rounding`` says.

        Returns:
            [W, P, K, S] and [n, K], float64 on the CPU.
        """
        n_vectors = self.start_embeddings.shape[1] if self.reverse else self.length

        def evaluate(part: slice, at_once: int) -> Tensor:
            return self._derivatives(rows[part], alphas[part], at_once, rounded)

        sums: Tensor | None = None
        totals = []
        for part, values in self._in_parts(len(rows), n_vectors, evaluate, self.reverse):
            if sums is None:
                shape = (len(weights), int(panels.max()) + 1, *values.shape[1:])
                sums = torch.zeros(shape, dtype=torch.float64, device=values.device)
            numbers = panels[part].to(values.device)
            for number, weight in enumerate(weights[:, part].to(values.device)):
                sums[number].index_add_(0, numbers, values * weight[:, None, None])
            totals.append(values.sum(2))
        assert sums is not None
        return sums.cpu(), torch.cat(totals).cpu()

    def pulled_sums(
        self, rows: Tensor, alphas: Tensor, weights: Tensor, cotangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what cotangents of one path make of its token derivatives, and their whole.

        Args:
            rows: Text of each node, [n], the same one.
            alphas: Position of each node, [n] float64.
            weights: Weight of each node, [n] float64.
            cotangents: C directions of embedding space, [C, K].

        Returns:
            Weighted sums over nodes, float64 on the CPU: inner products [C, S] of the cotangents
            with the token derivatives, and the total derivative [K].
        """

        def evaluate(part: slice, at_once: int) -> tuple[Tensor, Tensor]:
            linearised, direction = self.at(rows[part], alphas[part]), self.direction[rows[part]]
            pulled = [
                linearised.pull_tokens(some.expand(len(direction), -1, -1), direction)
                for some in torch.split(cotangents, at_once)
            ]
            total = linearised.total(direction)[1]
            return torch.cat(pulled, dim=1).cpu().double(), total.cpu().double()

        products, totals = [], []
        for part, (pulled, total) in self._in_parts(len(rows), len(cotangents), evaluate, True):
            products.append(torch.einsum("n,ncs->cs", weights[part], pulled))
            totals.append(weights[part] @ total)
        return torch.stack(products).sum(0), torch.stack(totals).sum(0)

    def at(self, rows: Tensor, alphas: Tensor) -> Linearisation:
        """Linearise at (text, α) pairs."""
        features = select_rows(self.features, rows.to(self.start.device))
        points = self.start[rows] + alphas.to(self.start)[:, None, None] * self.direction[rows]
        return self.lineariser(features, points)

    def _derivatives(self, rows: Tensor, alphas: Tensor, at_once: int, rounded: bool) -> Tensor:
        """Return the token derivatives at some nodes, [n, K, S] float64."""
        parts, direction = [], self.direction[rows]
        of_points = rounded and self.rounding is not None and self.rounding.of_points
        with rounded_products() if of_points else nullcontext():
            linearised = self.at(rows, alphas)
        with rounded_products() if rounded else nullcontext():
            if not self.reverse:
                every = torch.arange(self.length, device=self.start.device)
                for tokens in torch.split(every, at_once):
                    pushed = linearised.push_tokens(direction, tokens)
                    parts.append(_exact(pushed.transpose(1, 2)))
                return torch.cat(parts, dim=2)
            n_dimensions = self.start_embeddings.shape[1]
            unit = torch.eye(n_dimensions, dtype=self.start.dtype, device=self.start.device)
            for some in torch.split(unit.expand(len(direction), -1, -1), at_once, dim=1):
                parts.append(_exact(linearised.pull_tokens(some, direction)))
            return torch.cat(parts, dim=1)

    def _in_parts(
        self,
        n_points: int,
        n_vectors: int,
        evaluate: Callable[[slice, int], T],
        pulled: bool = False,
    ) -> list[tuple[slice, T]]:
        """Evaluate points in parts that fit the budget; smaller ones where memory runs out.

        ``evaluate`` takes a part of the points and how many vectors (tangents or cotangents) of
        each point fit at once; ``pulled`` says that they are cotangents.
        """
        results: list[tuple[slice, T]] = []
        first = 0
        while first < n_points:
            at_once, n_together = self._fitting(n_vectors, pulled)
            part = slice(first, min(first + n_together, n_points))
            try:
                results.append((part, evaluate(part, at_once)))
            except (RuntimeError, MemoryError) as error:
                smallest = part.stop - part.start == 1 and at_once == 1
                if smallest or not is_out_of_memory(error):
                    raise
                release_cached(self.start.device)
                self.budget = self._bytes(at_once, part.stop - part.start, pulled) // 2
                continue
            first = part.stop
        return results

    def _fitting(self, n_vectors: int, pulled: bool) -> tuple[int, int]:
        """Return how many vectors of a point, and how many points, fit the budget together."""
        one, none = self._bytes(1, 1, pulled), self._bytes(0, 1, pulled)
        reserved = room_for_weights() if self.rounding is not None else 0
        room = working_set(self.start.device, self.budget - reserved, one)
        at_once = max(1, min(n_vectors, (room - none) // max(1, one - none)))
        return at_once, max(1, room // self._bytes(at_once, 1, pulled))

    def _bytes(self, n_vectors: int, n_points: int, pulled: bool) -> int:
        """Estimate the bytes that an evaluation takes at its peak."""
        per_vector = (
            self.lineariser.floats_per_cotangent(self.length)
            if pulled
            else self.lineariser.floats_per_tangent(self.length)
        )
        numbers = self.lineariser.floats_per_point(self.length) + n_vectors * per_vector
        return n_points * self.start.element_size() * numbers


def _exact(x: Tensor) -> Tensor:
    """Return float64, on the CPU where the device has no such numbers."""
    return x.cpu().double() if x.device.type == "mps" else x.double()
