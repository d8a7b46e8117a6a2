"""Training objectives, and what each of them needs of the data.

To add an objective, subclass :class:`AbstractObjective`, decorate it with ``@register_objective``
and choose it with ``objective.name``; nothing else in the library needs to know.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from xsiam.errors import InputError

__all__ = ["OBJECTIVES", "AbstractObjective", "get_objective", "register_objective"]


class AbstractObjective(ABC):
    """A loss on the embeddings of a batch of pairs.

    An objective is called with two batches of embeddings [n, K] and, where it needs them, labels
    [n], and returns one number: the mean over the pairs of the batch, differentiable.

    Attributes:
        name: The registered name, value of ``objective.name``.
        needs_label: Whether every training pair must have a label. Where False, none may have one.
        label_range: Lowest and highest label that the objective can take, both included.
    """

    name: ClassVar[str]
    needs_label: ClassVar[bool] = True
    label_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @abstractmethod
    def __call__(
        self, embeddings_a: Tensor, embeddings_b: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return the mean loss of the pairs, a scalar.

        Args:
            embeddings_a: Embeddings of the first texts, [n, K].
            embeddings_b: Embeddings of the second texts, [n, K].
            labels: Gold scores, [n]; required where ``needs_label``.

        Raises:
            InputError: If labels are needed and not given.
        """


OBJECTIVES: dict[str, type[AbstractObjective]] = {}
"""Every registered objective by name."""


def register_objective(objective: type[AbstractObjective]) -> type[AbstractObjective]:
    """Register a class under its ``name``; names are unique."""
    if objective.name in OBJECTIVES:
        raise InputError(f"Expected a new objective name, but {objective.name!r} is registered.")
    OBJECTIVES[objective.name] = objective
    return objective


def get_objective(name: str) -> AbstractObjective:
    """Return the objective that is registered under ``name``.

    Raises:
        InputError: If there is none.
    """
    if name not in OBJECTIVES:
        close = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"Expected an objective out of {', '.join(OBJECTIVES)}, but got {name!r}.{hint} "
            "Set `objective.name`."
        )
    return OBJECTIVES[name]()


@register_objective
class MSECosine(AbstractObjective):
    """Mean squared error between cosine similarity and label, the published objective.

    References:
        The training recipe of the reference code of Moeller et al. (EMNLP 2023), where a label is
        the STS score divided by 5.
    """

    name = "mse_cosine"

    def __call__(
        self, embeddings_a: Tensor, embeddings_b: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return mean((cos(a, b) − label)²)."""
        scores = torch.nn.functional.cosine_similarity(embeddings_a, embeddings_b, dim=-1)
        return _squared_error(self.name, scores, labels)


@register_objective
class MSEDot(AbstractObjective):
    """Mean squared error between dot product and label; any finite label will do."""

    name = "mse_dot"
    label_range = (-math.inf, math.inf)

    def __call__(
        self, embeddings_a: Tensor, embeddings_b: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return mean((a·b − label)²)."""
        return _squared_error(self.name, (embeddings_a * embeddings_b).sum(dim=-1), labels)


def _squared_error(name: str, scores: Tensor, labels: Tensor | None) -> Tensor:
    """Return the mean squared difference of scores and labels, both [n]."""
    if labels is None:
        raise InputError(
            f"Expected labels for objective {name!r}, but the pairs have none. "
            "Set `data.column_label` or another `objective.name`."
        )
    return torch.nn.functional.mse_loss(scores, labels.to(scores.dtype))
