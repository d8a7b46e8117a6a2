"""One picture of a run: error against time, and scaling with length, pairs and layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from results import Results
from tables import derived_rows

Row = dict[str, Any]


def draw(results: Results, file: Path) -> bool:
    """Draw the panels that have rows; say whether there was one."""
    rows = [row for row in derived_rows(results) if row["status"] == "ok"]
    panels = [panel for panel in _PANELS if panel(None, rows)]
    if not panels:
        return False
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.2), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        panel(axis, rows)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return True


def _errors(axis: Any, rows: Sequence[Row]) -> bool:
    """Completeness error against seconds, one colour for each model and layer."""
    chosen = [r for r in rows if r["section"] in ("published", "peers")]
    if axis is None or not chosen:
        return bool(chosen)
    places = sorted({(r["model"], r["layer"]) for r in chosen}, key=str)
    markers = {"published": "s", "retrivex": "^", "xplainsim": "v", "xsbert": "D", "xsiam": "o"}
    used: set[str] = set()
    for row in chosen:
        name = row["method"].split(",")[0]
        colour = f"C{places.index((row['model'], row['layer'])) % 10}"
        axis.scatter(
            row["seconds"],
            max(row["completeness_error"], 1e-9),
            marker=markers[name],
            color=colour,
            label=name if name not in used else None,
        )
        used.add(name)
    for place in places:
        colour = f"C{places.index(place) % 10}"
        axis.plot([], [], color=colour, label=f"{place[0]}, layer {place[1]}")
    _finish(axis, "error against time, one pair", "seconds", "completeness error")
    axis.set_xscale("log")
    return True


def _length(axis: Any, rows: Sequence[Row]) -> bool:
    chosen = [r for r in rows if r["section"] == "length"]
    if axis is None or not chosen:
        return bool(chosen)
    for method in dict.fromkeys(r["method"] for r in chosen):
        points = sorted(
            (r["settings"]["texts"]["tokens_a"], r["seconds"])
            for r in chosen
            if r["method"] == method
        )
        axis.plot(*zip(*points, strict=True), marker="o", label=method)
    _finish(axis, "two texts of growing length", "tokens", "seconds")
    axis.set_xscale("log", base=2)
    return True


def _pairs(axis: Any, rows: Sequence[Row]) -> bool:
    chosen = sorted((r["pairs"], r["seconds"]) for r in rows if r["section"] == "pairs")
    if axis is None or not chosen:
        return bool(chosen)
    axis.plot(*zip(*chosen, strict=True), marker="o", label="xsiam")
    _finish(axis, "pairs of one call", "pairs", "seconds")
    axis.set_xscale("log")
    return True


def _layers(axis: Any, rows: Sequence[Row]) -> bool:
    chosen = [r for r in rows if r["section"] == "layers"]
    if axis is None or not chosen:
        return bool(chosen)
    for model in dict.fromkeys(r["model"] for r in chosen):
        points = sorted(
            (r["layer"], r["seconds"] / r["pairs"]) for r in chosen if r["model"] == model
        )
        axis.plot(*zip(*points, strict=True), marker="o", label=model)
    _finish(axis, "every layer", "layer", "seconds a pair")
    return True


def _finish(axis: Any, title: str, x: str, y: str) -> None:
    axis.set(title=title, xlabel=x, ylabel=y, yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


_PANELS = (_errors, _length, _pairs, _layers)
