"""Contexts of tiny random models, for the tests of analyses that compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models import tiny_model

from xsiam.analysis import Context, get_analysis
from xsiam.analysis.base import AnalysisResult
from xsiam.analysis.storage import check_result
from xsiam.config import AnalysisConfig, AnalysisModels
from xsiam.encoder import SiameseEncoder
from xsiam.pairs import PairDataset

PAIRS = [
    ("the small dog chases a cat in the garden .", "a cat is chased by the dog outside .", 0.9),
    ("dog", "cat", 0.2),
    ("the big house", "the small house", 0.4),
    ("a kitten sleeps in the yard", "a cat sleeps outside", 0.7),
    ("a dog runs and a cat sleeps", "the red garden", 0.0),
    ("the dog is not in the yard", "the dog is in the yard", 0.3),
    ("a red house", "a cat runs on the big house", 0.1),
]


def encoder(seed: int = 0, *, shift: bool = False, **options: Any) -> SiameseEncoder:
    """Return a tiny encoder from `pad`."""
    settings = {"similarity": "cos", "reference": "pad"} | options
    return SiameseEncoder(tiny_model(seed=seed), shift=shift, **settings)


def context_of(
    folder: Path,
    model: SiameseEncoder,
    others: Mapping[str, SiameseEncoder | Exception] | None = None,
    *,
    layers: Sequence[int] = (2, 1),
    pairs: Sequence[tuple[str, str, float]] = PAIRS,
    attributor: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Context:
    """Return a context.

    Args:
        folder: Where token vectors are kept.
        model: The evaluated model.
        others: Models by name, a name with a reference included, or the error of loading them.
        layers: Layers.
        pairs: First text, second text and label.
        attributor: Arguments of `PairAttributor` beside the least.
        settings: Of the analyses.
    """
    others = others or {}

    def load(checkpoint: str, reference: str | None) -> SiameseEncoder:
        found = others.get(f"{checkpoint}/{reference}", others.get(checkpoint))
        if isinstance(found, Exception):
            raise found
        assert found is not None
        return found

    kinds = {name.partition("/")[0] for name in others}
    return Context(
        settings=AnalysisConfig(
            models=AnalysisModels(**{kind: kind for kind in kinds}), n_resamples=200, **settings
        ),
        encoder=model,
        pairs=PairDataset(*(list(column) for column in zip(*pairs, strict=True))),
        layers=tuple(layers),
        folder=folder,
        attributor_settings={
            "tolerance": 1e-3,
            "max_nodes": 1024,
            "memory_budget": None,
            **(attributor or {}),
        },
        load=load,
    )


def answered(name: str, context: Context) -> AnalysisResult:
    """Run an analysis on what it asks for, and check its result as a report would."""
    analysis = get_analysis(name)
    requests = list(analysis.requests(context))
    context.prepare(requests, 0, 1)
    context.open(requests)
    result = analysis.run(context)
    check_result(result)
    for figure in analysis.plot(result).values():
        figure.canvas.draw()
    return result
