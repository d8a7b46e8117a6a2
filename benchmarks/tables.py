"""Results as Markdown: what follows from rows together, and one table for each section."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from cases import SECTIONS
from results import Results

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
_MEGABYTE = 1e6


def derived_rows(results: Results) -> list[Row]:
    """Return copies of all rows with what only several rows together say.

    Added are ``times_published`` and ``times_retrivex`` (their seconds divided by this row's, for
    the same model and layer; of the published variants the faster one counts), ``times_compared``
    and ``difference`` (seconds of the row it is compared with divided by its own; the largest
    difference of an entry, relative to the largest entry), ``pairs_per_second`` and
    ``share_of_peak``.
    """
    return [row | _derived(row, results) for row in results.rows.values()]


def _derived(row: Row, results: Results) -> Row:
    if row["status"] != "ok":
        return {}
    added: Row = {"pairs_per_second": row.get("pairs", 1) / row["seconds"]}
    for name in ("published", "retrivex"):
        other = _fastest(row, name, results)
        if other is not None and row["section"] in ("published", "peers"):
            added[f"times_{name}"] = other / row["seconds"]
    key = row["settings"].get("compare_with")
    compared = results.rows.get(key) if key else None
    if compared is not None and compared["status"] == "ok":
        added["times_compared"] = compared["seconds"] / row["seconds"]
        added["difference"] = _difference(_matrix(row, results), results.matrix(key))
    if "flops" in row:
        speed = row["flops"] / row["seconds"]
        added |= {"speed": speed, "share_of_peak": speed / row["peak_flops"]}
    if "time" in row:
        added |= {f"time_{kind}": share for kind, share in row["time"].items()}
        added["share_within"] = added["share_of_peak"] / row["time"]["products"]
    return added


def _fastest(row: Row, name: str, results: Results) -> float | None:
    """Seconds of the published procedure or of a peer on the same layer.

    A peer counts at its own default number of nodes where that was run, else at the one that was.
    """
    found = [
        (other["settings"].get("default", True), other["seconds"])
        for other in results.rows.values()
        if other["status"] == "ok"
        and other["section"] in ("published", "peers")
        and (other["model"], other["layer"]) == (row["model"], row["layer"])
        and other["method"].startswith(name)
    ]
    by_default = any(is_default for is_default, _ in found)
    return min((seconds for own, seconds in found if own == by_default), default=None)


def _matrix(row: Row, results: Results) -> np.ndarray[Any, Any] | None:
    key = next(key for key, other in results.rows.items() if other is row)
    return results.matrix(key)


def _difference(
    matrix: np.ndarray[Any, Any] | None, other: np.ndarray[Any, Any] | None
) -> float | None:
    if matrix is None or other is None or matrix.shape != other.shape:
        return None
    return float(np.abs(matrix - other).max() / np.abs(other).max())


def markdown(results: Results, picture: str | None = None) -> str:
    """Return the report: command, machine, models, and a table for each section."""
    rows = derived_rows(results)
    parts = ["# Attribution benchmark\n", _head(results)]
    if picture is not None:
        parts.append(f"![times, errors and scaling]({picture})\n")
    for section in SECTIONS:
        chosen = [row for row in rows if row["section"] == section]
        if chosen:
            parts += [_TITLES[section], table(chosen, _COLUMNS[section])]
    failed = [row for row in rows if row["status"] != "ok"]
    if failed:
        parts += ["## What did not run\n", table(failed, _FAILED)]
    return "\n".join(parts)


def _head(results: Results) -> str:
    machine = results.machine
    lines = ["```", *results.commands, "```", ""]
    lines.append(
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['device']}; {machine['system']}, Python {machine['python']}, torch "
        f"{machine['torch']}; float32 matrix products measured at "
        f"{machine['peak_flops'] / 1e9:.0f} GFLOP/s.\n"
    )
    lines.append(f"Models: {', '.join(results.models)}.\n")
    lines.append(
        "Seconds are the median of repeated calls, memory is the peak above the loaded model. "
        "Errors are the larger of both texts', of many pairs the largest. The difference of "
        "entries is relative to the largest entry.\n"
    )
    return "\n".join(lines)


def table(rows: Iterable[Row], columns: Iterable[Column]) -> str:
    """Return rows as a Markdown table."""
    columns = list(columns)
    lines = [
        "| " + " | ".join(name for name, _ in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lines += ["| " + " | ".join(show(row) for _, show in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _plain(name: str, form: str = "{}", scale: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        if value is None:
            return "–"
        if isinstance(value, str):
            return value.replace("|", "\\|")
        return form.format(value * scale if scale != 1.0 else value)

    return show


def _status(row: Row) -> str:
    return "" if row["status"] == "ok" else row["status"]


def _budget(row: Row) -> str:
    return str(row["settings"]["memory_budget"])


_MODEL: tuple[Column, ...] = (("model", _plain("model")), ("layer", _plain("layer")))
_CASE: Column = ("case", _plain("title"))
_METHOD: Column = ("method", _plain("method"))
_SECONDS: Column = ("seconds", _plain("seconds", "{:.3g}"))
_MEMORY: Column = ("peak MB", _plain("peak_bytes", "{:.0f}", 1 / _MEGABYTE))
_NODES: Column = ("nodes", _plain("n_nodes", "{:g}"))
_MOST_NODES: Column = ("most nodes", _plain("n_nodes_max", "{:g}"))
_ERROR: Column = ("completeness error", _plain("completeness_error", "{:.1e}"))
_TOKEN: Column = ("token error (estimate)", _plain("token_error", "{:.1e}"))
_CONVERGED: Column = ("converged", _plain("converged", "{:.0%}"))
_DIFFERENCE: Column = ("difference of entries", _plain("difference", "{:.1e}"))
_PER_SECOND: Column = ("pairs a second", _plain("pairs_per_second", "{:.3g}"))
_TIMES: tuple[Column, ...] = (
    ("published ÷ this", _plain("times_published", "{:.3g}")),
    ("retrivex ÷ this", _plain("times_retrivex", "{:.3g}")),
)
_END: Column = ("", _status)

_HELD = (*_MODEL, _METHOD, _CASE, _SECONDS, *_TIMES, _MEMORY, _NODES, _ERROR, _TOKEN)
_COLUMNS: dict[str, tuple[Column, ...]] = {
    "published": (*_HELD, _DIFFERENCE, _CONVERGED, _END),
    "peers": (
        *_HELD,
        ("score", _plain("score", "{:.4f}")),
        ("its parts", _plain("score_explained", "{:.4f}")),
        ("matrix sums to", _plain("matrix_sum", "{:.4f}")),
        _DIFFERENCE,
        _END,
    ),
    "memory": (
        *_MODEL,
        _CASE,
        ("budget", _budget),
        _MEMORY,
        _SECONDS,
        _NODES,
        _ERROR,
        _DIFFERENCE,
        _CONVERGED,
        _END,
    ),
    "peak": (
        *_MODEL,
        _CASE,
        _SECONDS,
        _PER_SECOND,
        ("GFLOP", _plain("flops", "{:.0f}", 1e-9)),
        ("GFLOP/s", _plain("speed", "{:.0f}", 1e-9)),
        ("peak GFLOP/s", _plain("peak_flops", "{:.0f}", 1e-9)),
        ("share", _plain("share_of_peak", "{:.0%}")),
        ("time in products", _plain("time_products", "{:.0%}")),
        ("copies", _plain("time_copies", "{:.0%}")),
        ("element-wise", _plain("time_elementwise", "{:.0%}")),
        ("share within products", _plain("share_within", "{:.0%}")),
        _END,
    ),
    "length": (*_MODEL, _METHOD, _CASE, _SECONDS, _MEMORY, _NODES, _ERROR, _CONVERGED, _END),
    "pairs": (
        *_MODEL,
        _CASE,
        _SECONDS,
        _PER_SECOND,
        _MEMORY,
        _MOST_NODES,
        _ERROR,
        _CONVERGED,
        _END,
    ),
    "layers": (
        *_MODEL,
        _CASE,
        _SECONDS,
        _PER_SECOND,
        _NODES,
        _MOST_NODES,
        _ERROR,
        _TOKEN,
        _CONVERGED,
        _END,
    ),
    "query": (
        *_MODEL,
        _CASE,
        _SECONDS,
        ("forward ÷ this", _plain("times_compared", "{:.3g}")),
        _MEMORY,
        _ERROR,
        _DIFFERENCE,
        _END,
    ),
    "precision": (*_MODEL, _CASE, _SECONDS, _PER_SECOND, _ERROR, _DIFFERENCE, _CONVERGED, _END),
}
_FAILED = (("section", _plain("section")), *_MODEL, _METHOD, _CASE, ("why", _plain("note")))
_TITLES = {
    "published": "## Against the published procedure\n\n"
    "One pair, the same score (own-length reference shift, cosine). Differences are taken from "
    "xsiam at its tightest tolerance.\n",
    "peers": "## Against other packages\n\n"
    "One pair, each package in its own environment. *its parts*: what the package's own "
    "similarities (of the texts, with and between references) say that its matrix explains. "
    "retrivex differentiates through the model's Normalize, so its matrix is one of another "
    "quantity; xplainsim divides those similarities by norms that its matrix does not use. Neither "
    "has a reference shift, so xsiam runs without one too. The reference code (xsbert) has it and "
    "is compared, entry by entry, with the published procedure above.\n",
    "memory": "## Memory of long texts\n",
    "peak": "## Share of the machine's matrix product speed\n\n"
    "Operations of all matrix products of a call, over its seconds; where its time goes, from a "
    "profiled call; and the share of the machine's speed within the products alone. Right below "
    "the last block (layer L - 1) derivatives run in factors: fewer operations, thinner ones.\n",
    "length": "## Scaling with length\n\nTwo texts of that many tokens.\n",
    "pairs": "## Scaling with the number of pairs\n",
    "layers": "## Scaling with the layer\n",
    "query": "## A short query against long documents\n",
    "precision": "## Floating point types\n",
}
