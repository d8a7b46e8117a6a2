"""One picture of a reference study: what cancels, agreement with a tuned model, faithfulness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Row = dict[str, Any]
_RESAMPLES = 2000


def draw(layers: Mapping[int, Mapping[str, Row]], file: Path) -> bool:
    """Draw a line of panels, of what was measured, for each layer that has rows; say if one has.

    Args:
        layers: For each layer, the row of each reference.
        file: The picture.
    """
    shown = {layer: rows for layer, rows in layers.items() if rows}
    if not shown:
        return False
    every = [row for rows in shown.values() for row in rows.values()]
    panels = [_sizes]
    panels += [_agreement] if any("agreement" in row for row in every) else []
    panels += [_faithfulness] if any("faithfulness" in row for row in every) else []
    size = len(shown), len(panels)
    figure, axes = plt.subplots(
        *size, figsize=(5 * size[1], 4 * size[0]), squeeze=False, layout="constrained"
    )
    for line, (layer, rows) in zip(axes, shown.items(), strict=True):
        for axis, panel in zip(line, panels, strict=True):
            panel(axis, layer, rows)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return True


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of the values that are there, with its 95 % bootstrap interval."""
    found = np.array(values, dtype=float)
    found = found[~np.isnan(found)]
    means = np.random.default_rng(0).choice(found, (_RESAMPLES, len(found))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(found.mean()), float(low), float(high)


def _sizes(axis: Any, layer: int, rows: Mapping[str, Row]) -> None:
    kinds = {
        "main effects": lambda row: np.abs(row["main_effects"]),
        "intercept": lambda row: np.abs(row["intercept"]),
        "|sum of pairs − score|": lambda row: np.abs(
            np.subtract(row["sum_of_pairs"], row["score"])
        ),
    }
    _bars(axis, rows, {name: [of(row) for row in rows.values()] for name, of in kinds.items()})
    axis.set(title=f"layer {layer}: beside the pairs, mean of absolute values", ylabel="score")


def _agreement(axis: Any, layer: int, rows: Mapping[str, Row]) -> None:
    known = {name: row for name, row in rows.items() if "agreement" in row}
    _bars(axis, known, {"": [row["agreement"] for row in known.values()]})
    axis.set(title=f"layer {layer}: agreement with a tuned exact model", ylabel="Spearman")


def _faithfulness(axis: Any, layer: int, rows: Mapping[str, Row]) -> None:
    known = {name: row for name, row in rows.items() if "faithfulness" in row}
    protocols = next(iter(known.values()))["faithfulness"] if known else {}
    series = {
        f"{protocol}, {kind}": [row["faithfulness"][protocol][kind] for row in known.values()]
        for protocol in protocols
        for kind in ("raw", "centred")
    }
    _bars(axis, known, series)
    axis.set(title=f"layer {layer}: with leave-one-out interactions", ylabel="Spearman")


def _bars(axis: Any, rows: Mapping[str, Row], series: Mapping[str, Sequence[Any]]) -> None:
    places, width = np.arange(len(rows)), 0.8 / max(1, len(series))
    for number, (label, columns) in enumerate(series.items()):
        means = np.array([interval(values) for values in columns]).reshape(-1, 3)
        errors = np.abs(means[:, 1:].T - means[:, 0])
        where = places + (number - (len(series) - 1) / 2) * width
        axis.bar(where, means[:, 0], width, yerr=errors, label=label or None, capsize=2)
    axis.set_xticks(places, list(rows), rotation=30, ha="right")
    axis.grid(alpha=0.3, axis="y")
    if any(series):
        axis.margins(y=0.3)  # room above the bars
        axis.legend(fontsize="small", ncols=3, loc="upper center")
