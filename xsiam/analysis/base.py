"""What an analysis is: what it needs, how it is run, what it returns, how it is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from xsiam.errors import InputError
from xsiam.tables import suggest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from xsiam.analysis.context import Context
    from xsiam.analysis.statistics import Finding

__all__ = [
    "ANALYSES",
    "AbstractAnalysis",
    "AnalysisResult",
    "Needs",
    "NotApplicableError",
    "ResultTable",
    "VectorRequest",
    "get_analysis",
    "register_analysis",
]

Row = Mapping[str, Any]

MODEL = "model"
"""The model that is evaluated, ``checkpoint``."""
CONTROL = "control"
"""A model tuned like it from another seed."""
UNSHIFTED = "unshifted"
"""A model tuned like it without a shift; its attributions start from `pad`, as published."""
UNSHIFTED_CONTROL = "unshifted_control"
"""The same from another seed."""
UNMODIFIED = "unmodified"
"""The model before any tuning. ``unmodified/pad``, ``unmodified/fitted`` and ``unmodified/neutral``
are the same weights with attributions from these references; the name alone means `pad`."""
MITIGATED = "mitigated"
"""A model tuned on negation and antonym pairs of the bundled training split."""


class NotApplicableError(Exception):
    """An analysis cannot say anything here; the message is the reason, for the summary."""


@dataclass(frozen=True)
class Needs:
    """What an analysis cannot do without; where it is missing the analysis is skipped.

    Attributes:
        models: Names of models, of those above.
        optional: Names of models that it compares with where they are given.
        shift: Whether the model has to have a reference shift.
        labels: Whether the pairs have to have labels.
        parser: Whether texts are parsed with spaCy.
        probes: Whether the probes of ``analysis.probes`` are read.
        packages: Importable packages beyond xsiam's own, with what brings them:
            ``{"ot": "pip install pot"}``.
        min_pairs: Fewest pairs.
    """

    models: tuple[str, ...] = (MODEL,)
    optional: tuple[str, ...] = ()
    shift: bool = False
    labels: bool = False
    parser: bool = False
    probes: bool = False
    packages: Mapping[str, str] = field(default_factory=dict)
    min_pairs: int = 1


@dataclass(frozen=True)
class VectorRequest:
    """Texts whose token vectors an analysis reads.

    Attributes:
        model: Name of a model.
        layer: The layer.
        texts: The texts, in any order, repetitions allowed; all in the role ``role``.
        role: Their role.
    """

    model: str
    layer: int
    texts: tuple[str, ...]
    role: str | None = None


@dataclass(frozen=True)
class ResultTable:
    """A tidy table: one observation or estimate a row, the same columns in every row.

    Attributes:
        rows: The rows. Undefined values are None, never NaN.
        caption: What a row is, what the columns mean, their units.
        shown: Whether it is small enough for the summary, and holds no text of the data.
    """

    rows: Sequence[Row]
    caption: str
    shown: bool = False


@dataclass(frozen=True)
class AnalysisResult:
    """What an analysis found.

    Attributes:
        tables: By name.
        metrics: Flat figures for `results.json`; the analysis's name is put before each key.
        findings: Claims that were made beforehand, and what became of them.
        notes: What a reader must know: what was left out and how often, what did not converge.
    """

    tables: Mapping[str, ResultTable]
    metrics: Mapping[str, float] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    notes: Sequence[str] = ()


class AbstractAnalysis(ABC):
    """One question to a model, and how it is answered.

    Subclasses set the class attributes and register themselves by `register_analysis`. They have no
    state: everything is in the context, so that they run in any order and in any process.

    Attributes:
        name: What the configuration calls it.
        question: What it answers, in one sentence.
        source: Where the protocol is from: "P1", "P2" or "ours".
        version: Raised when its numbers change, so that earlier results are not reused.
        needs: What it cannot do without.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    source: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[Needs] = Needs()

    def models(self, context: Context) -> tuple[str, ...]:
        """Return the names of the models it uses: those it needs, and those it can have besides."""
        return (*self.needs.models, *context.available(self.needs.optional)[0])

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Return the texts whose token vectors `run` reads.

        They are integrated before, of all analyses together, each text once, shared out over
        processes, and kept on disk. By default none.
        """
        return ()

    @abstractmethod
    def run(self, context: Context) -> AnalysisResult:
        """Answer the question.

        Raises:
            NotApplicableError: If the pairs or models do not allow it, with the reason.
        """

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw the result, from its tables alone; figures by name. By default none."""
        return {}


ANALYSES: dict[str, type[AbstractAnalysis]] = {}
"""Analyses by name."""

ORDER = (
    *("performance", "accuracy", "agreement", "reference_terms", "concentration", "syntax"),
    *("negation", "adjectives", "lexical_bias", "mitigation", "alignment", "faithfulness"),
    *("randomisation", "retrieval"),
)
"""The order in which analyses run and are reported; others come after these."""


def register_analysis(cls: type[AbstractAnalysis]) -> type[AbstractAnalysis]:
    """Enter a class into the registry under its name.

    Raises:
        ValueError: If the name is taken by another class.
    """
    taken = ANALYSES.get(cls.name)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
        raise ValueError(f"Expected a new name, but {cls.name!r} is {taken.__qualname__}.")
    ANALYSES[cls.name] = cls
    return cls


def names_in_order() -> list[str]:
    """Return the names of all analyses as they are reported."""
    known = {name: place for place, name in enumerate(ORDER)}
    return sorted(ANALYSES, key=lambda name: known.get(name, len(known)))


def get_analysis(name: str) -> AbstractAnalysis:
    """Return the analysis of a name.

    Raises:
        InputError: If there is none.
    """
    if name not in ANALYSES:
        raise InputError(
            f"Expected `analysis.names` to be among {', '.join(ANALYSES)}, or 'all', but got "
            f"{name!r}.{suggest(name, ANALYSES)} Set `analysis.names`."
        )
    return ANALYSES[name]()
