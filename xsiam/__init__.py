"""Siamese text encoders whose score decomposes exactly into token pairs.

Train, monitor, evaluate and explain them. The public names below are loaded when they are first
used, so that ``import xsiam`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xsiam.attribution import PairAttributor
    from xsiam.callbacks import AttributionMonitor
    from xsiam.data import PairDataModule
    from xsiam.encoder import SiameseEncoder
    from xsiam.errors import (
        CheckpointError,
        ConvergenceWarning,
        InputError,
        ModelError,
        ProcessError,
        TruncationWarning,
    )
    from xsiam.index import TokenVectorIndex
    from xsiam.module import SiameseModule
    from xsiam.ranking import RankingExplanation, explain_ranking
    from xsiam.ranking_report import RankingReport, report_rankings
    from xsiam.result import PairAttribution
    from xsiam.spans import SpanAttribution, sentence_spans
    from xsiam.windows import LongAttribution, WindowedAttributor

__version__ = "0.1.0"

__all__ = [
    "AttributionMonitor",
    "CheckpointError",
    "ConvergenceWarning",
    "InputError",
    "LongAttribution",
    "ModelError",
    "PairAttribution",
    "PairAttributor",
    "PairDataModule",
    "ProcessError",
    "RankingExplanation",
    "RankingReport",
    "SiameseEncoder",
    "SiameseModule",
    "SpanAttribution",
    "TokenVectorIndex",
    "TruncationWarning",
    "WindowedAttributor",
    "__version__",
    "explain_ranking",
    "report_rankings",
    "sentence_spans",
]

_MODULES = {
    "AttributionMonitor": "callbacks",
    "CheckpointError": "errors",
    "ConvergenceWarning": "errors",
    "InputError": "errors",
    "LongAttribution": "windows",
    "ModelError": "errors",
    "PairAttribution": "result",
    "PairAttributor": "attribution",
    "PairDataModule": "data",
    "ProcessError": "errors",
    "RankingExplanation": "ranking",
    "RankingReport": "ranking_report",
    "SiameseEncoder": "encoder",
    "SiameseModule": "module",
    "SpanAttribution": "spans",
    "TokenVectorIndex": "index",
    "TruncationWarning": "errors",
    "WindowedAttributor": "windows",
    "explain_ranking": "ranking",
    "report_rankings": "ranking_report",
    "sentence_spans": "spans",
}


def __getattr__(name: str) -> Any:
    """Return a public name, importing the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})
