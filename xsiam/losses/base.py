"""What an objective is, what it is given, and the registry of all of them.

To add an objective, subclass :class:`AbstractObjective`, decorate it with ``@register_objective``
and choose it with ``objective.name``; nothing else in the library needs to know. One that has
options is a frozen dataclass, whose fields are the options.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from xsiam.errors import InputError


@dataclass(frozen=True)
class EmbeddedBatch:
    """The embeddings of a batch of pairs, of one process or gathered from all of them.

    Attributes:
        a: Embeddings of the first texts (anchors), [n, K].
        b: Embeddings of the second texts (positives), [n, K].
        negatives: Embeddings of the negatives of each pair, one [n, K] a column.
        labels: Gold scores, [n].
        text_ids: Numbers that are equal for equal texts: a, b and the negatives of each pair,
            [n, 2 + columns].
        own: Rows that this process has embedded; None for all.
        n_processes: Number of processes whose rows are here.
        teacher: A teacher's embeddings of a and b, [n, 2, K'], whose products are its scores.
    """

    a: Tensor
    b: Tensor
    negatives: tuple[Tensor, ...] = ()
    labels: Tensor | None = None
    text_ids: Tensor | None = None
    own: slice | None = None
    n_processes: int = 1
    teacher: Tensor | None = None

    @property
    def rows(self) -> slice:
        """The rows that this process has embedded."""
        return slice(0, len(self.a)) if self.own is None else self.own


@dataclass(frozen=True)
class AbstractObjective(ABC):
    """A loss on the embeddings of a batch of pairs.

    An objective is called with an `EmbeddedBatch` and returns one differentiable number. On one
    process that is the mean over the pairs of the batch, or for a loss that ranks the whole batch
    (``cosent``) its loss. An objective with ``in_batch`` is given the gathered batch on every
    process, and returns a number whose mean over the processes is the loss of the gathered batch:
    distributed training averages gradients.

    Attributes:
        name: The registered name, value of ``objective.name``.
        needs_label: Whether every training pair must have a label. Where False, none may have one,
            but for an objective with a teacher, which leaves labels unread.
        needs_teacher: Whether batches must hold a teacher's embeddings (`xsiam.teacher`). One
            column of texts then makes pairs.
        label_range: Lowest and highest label that the objective can take, both included.
        negatives: Whether columns of hard negatives are "required", "optional" or "forbidden".
        in_batch: Whether pairs of a batch are compared with each other.
        similarity: What the encoder scores by, "cos" or "dot". Objectives that are not tied to one
            of them use it.

    Raises:
        InputError: If an option does not meet its constraint.
    """

    name: ClassVar[str]
    needs_label: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    label_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    negatives: ClassVar[Literal["required", "optional", "forbidden"]] = "forbidden"
    in_batch: ClassVar[bool] = False

    similarity: str = "cos"

    @abstractmethod
    def loss(self, batch: EmbeddedBatch) -> Tensor:
        """Return the loss of a batch that has all that is needed, a scalar."""

    def figures(self, batch: EmbeddedBatch) -> dict[str, Tensor]:
        """Return counts to log beside the loss, by name; they are summed over the processes."""
        return {}

    def __call__(self, batch: EmbeddedBatch) -> Tensor:
        """Return the loss of a batch, a scalar.

        Raises:
            InputError: If the batch lacks labels, negatives or pairs to compare with.
        """
        problem = self.problem_with(batch)
        if problem is not None:
            raise InputError(problem)
        return self.loss(batch)

    def problem_with(self, batch: EmbeddedBatch) -> str | None:
        """Return why a batch has no loss, or None where it has one."""
        if self.needs_label and batch.labels is None:
            return (
                f"Expected labels for objective {self.name!r}, but the pairs have none. "
                "Set `data.column_label` or another `objective.name`."
            )
        if self.negatives == "required" and not batch.negatives:
            return (
                f"Expected negatives for objective {self.name!r}, but the pairs have none. "
                "Set `data.columns_negative` or another `objective.name`."
            )
        if self.in_batch and len(batch.a) < 2 and not batch.negatives:
            return (
                f"Expected 2 pairs or more for objective {self.name!r}, which compares the pairs "
                f"of a batch, but got {len(batch.a)}. Set `data.batch_size`."
            )
        return None


OBJECTIVES: dict[str, type[AbstractObjective]] = {}
"""Every registered objective by name."""


def register_objective(objective: type[AbstractObjective]) -> type[AbstractObjective]:
    """Register a class under its ``name``; names are unique."""
    if objective.name in OBJECTIVES:
        raise InputError(f"Expected a new objective name, but {objective.name!r} is registered.")
    OBJECTIVES[objective.name] = objective
    return objective


def get_objective(name: str, similarity: str = "cos", **options: Any) -> AbstractObjective:
    """Return the objective that is registered under ``name``.

    Args:
        name: Registered name.
        similarity: What the encoder scores by, "cos" or "dot".
        options: Options of that objective; None stands for its default.

    Raises:
        InputError: If there is no such objective, it has no such option, or an option does not meet
            its constraint.
    """
    if name not in OBJECTIVES:
        close = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"Expected an objective out of {', '.join(OBJECTIVES)}, but got {name!r}.{hint} "
            "Set `objective.name`."
        )
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in options_of(OBJECTIVES[name]):
            raise InputError(_inapplicable(name, option, value))
    return OBJECTIVES[name](similarity, **given)


def options_of(objective: type[AbstractObjective]) -> tuple[str, ...]:
    """Return the names of the options of an objective."""
    names = (field.name for field in dataclasses.fields(objective))
    return tuple(option for option in names if option != "similarity")


def check_positive(name: str, value: float) -> None:
    """Raise InputError where an option is not a finite number above 0."""
    if not 0 < value < math.inf:
        raise InputError(
            f"Expected `{name}` to be a finite number above 0, but got {value}. "
            f"Set `objective.{name}`."
        )


def _inapplicable(name: str, option: str, value: Any) -> str:
    """Return the message for an option that an objective does not have."""
    own = ", ".join(options_of(OBJECTIVES[name])) or "none"
    others = [other for other, kind in OBJECTIVES.items() if option in options_of(kind)]
    hint = f" It is an option of {', '.join(others)}." if others else ""
    return (
        f"Expected an option of objective {name!r} ({own}), but got {option}={value!r}.{hint} "
        f"Leave `objective.{option}` out, or set another `objective.name`."
    )
