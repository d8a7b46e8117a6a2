"""Attributions with entries that a test chooses, and a context that hands them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from xsiam.analysis import Context
from xsiam.config import AnalysisConfig
from xsiam.pairs import PairDataset
from xsiam.result import PairAttribution

Span = tuple[int, int]


def planted(
    text_a: str,
    text_b: str,
    matrix: Tensor,
    offsets_a: Sequence[Span],
    offsets_b: Sequence[Span],
    *,
    prompts: tuple[int, int] = (0, 0),
    **fields: Any,
) -> PairAttribution:
    """Return an attribution with that matrix; tokens of no width are special.

    Args:
        text_a: First text.
        text_b: Second text.
        matrix: Entries, [S_a, S_b].
        offsets_a: Character spans of the tokens of text a, (0, 0) for special ones.
        offsets_b: The same of text b.
        prompts: How many tokens behind the first belong to a prompt.
        fields: Replace others, such as main effects.
    """
    values: dict[str, Any] = {
        "main_effects_a": torch.zeros(len(offsets_a)),
        "main_effects_b": torch.zeros(len(offsets_b)),
        "intercept": 0.0,
        "residual": 0.0,
        "attributed_score": float(matrix.sum()),
        "convergence_delta": 0.0,
        **dict.fromkeys(("completeness_error", "token_error"), 0.0),
        **{f"{name}_{x}": 0.0 for name in ("completeness_error", "token_error") for x in "ab"},
        **dict.fromkeys(("converged", "converged_a", "converged_b"), True),
        **dict.fromkeys(("n_nodes", "n_nodes_a", "n_nodes_b"), 1),
        "layer": 1,
        "reference": "pad",
        "quadrature": "adaptive",
        "tolerance": 1e-3,
        "similarity": "cos",
        "shift": True,
        "dtype": "float32",
        "model_fingerprint": "planted",
        **fields,
    }
    total = matrix.double().sum() + sum(values[f"main_effects_{x}"].double().sum() for x in "ab")
    values.setdefault("score", float(total) + values["intercept"] + values["residual"])
    for side, text, offsets, n in (
        ("a", text_a, offsets_a, prompts[0]),
        ("b", text_b, offsets_b, prompts[1]),
    ):
        prompt = [0 < i <= n for i in range(len(offsets))]
        values[f"tokens_{side}"] = tuple(text[s:e] or "[S]" for s, e in offsets)
        values[f"offsets_{side}"] = tuple(offsets)
        values[f"prompt_mask_{side}"] = tuple(prompt)
        values[f"special_mask_{side}"] = tuple(
            s == e and not p for (s, e), p in zip(offsets, prompt, strict=True)
        )
    return PairAttribution(text_a=text_a, text_b=text_b, matrix=matrix, **values)


class PlantedContext(Context):
    """A context whose attributions are given, by layer, in the order of the pairs."""

    results: dict[int, list[PairAttribution]]

    def pair_attributions(self, model: str, layer: int) -> list[PairAttribution]:
        return self.results[layer]


def context_of(
    results: dict[int, list[PairAttribution]],
    *,
    shift: bool = True,
    parser: Any = None,
    **settings: Any,
) -> PlantedContext:
    """Return a context of these attributions, with few resamples, and a parser if one is loaded."""
    first = next(iter(results.values()))
    encoder: Any = SimpleNamespace(shift=shift)

    def load(name: str, reference: str | None) -> Any:
        raise AssertionError(name)

    context = PlantedContext(
        settings=AnalysisConfig(**{"n_resamples": 200, **settings}),
        encoder=encoder,
        pairs=PairDataset([r.text_a for r in first], [r.text_b for r in first]),
        layers=tuple(results),
        folder=Path("nowhere"),
        attributor_settings={},
        load=load,
    )
    context.results = results
    if parser is not None:
        context.parser = parser
    return context
