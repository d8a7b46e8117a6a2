"""The summary of all analyses in Markdown: findings first, then each analysis with its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xsiam.analysis.base import get_analysis
from xsiam.analysis.statistics import Finding
from xsiam.analysis.storage import Outcome

__all__ = ["FOLDER", "markdown_table", "summary_of"]

FOLDER = "analysis"
"""Folder of all analyses, beside the summary."""


def summary_of(outcomes: Sequence[Outcome], facts: Mapping[str, Any], notes: Sequence[str]) -> str:
    """Return the summary.

    Args:
        outcomes: In the order of the report.
        facts: Lines of the head: command, model, data, machine.
        notes: What concerns all analyses.
    """
    lines = ["# Evaluation", ""]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    lines += ["", "Intervals are percentile bootstrap intervals over independent observations.", ""]
    lines += [f"* {note}" for note in notes]
    found = [(o.name, f) for o in outcomes if o.result for f in o.result.findings]
    if found:
        lines += ["", "## Findings", "", _findings(found)]
    missing = [o for o in outcomes if o.status != "finished"]
    if missing:
        lines += ["", "## Not answered", ""]
        lines += [f"* `{o.name}` {o.status}: {o.reason}" for o in missing]
    for outcome in outcomes:
        lines += _section(outcome)
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal columns as a Markdown table; None is a dash."""
    if not rows:
        return "(no rows)\n"
    columns = list(rows[0])
    numeric = [all(isinstance(r[c], int | float | None) for r in rows) for c in columns]
    head = [
        "| " + " | ".join(c.replace("_", " ") for c in columns) + " |",
        "|" + "|".join("--:" if n else "---" for n in numeric) + "|",
    ]
    body = ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join([*head, *body]) + "\n"


def _findings(found: Sequence[tuple[str, Finding]]) -> str:
    rows = [
        {
            "claim": finding.claim,
            "source": finding.source,
            "verdict": finding.verdict,
            "what was estimated": finding.quantity,
            "estimate": f"{finding.interval.estimate:.3f} "
            f"[{finding.interval.low:.3f}, {finding.interval.high:.3f}]",
            "against": f"{finding.threshold:g}",
            "n": finding.interval.n,
            "analysis": f"`{name}`",
        }
        for name, finding in found
    ]
    return markdown_table(rows)


def _section(outcome: Outcome) -> list[str]:
    if outcome.result is None:
        return []
    analysis = get_analysis(outcome.name)
    said = f"Protocol: {analysis.source}. {outcome.seconds:.0f} s beside the integration."
    lines = ["", f"## {outcome.name}", "", analysis.question, "", said, ""]
    lines += [f"* {note}" for note in outcome.result.notes]
    for name, table in outcome.result.tables.items():
        if table.shown:
            lines += ["", f"**{name.replace('_', ' ')}**: {table.caption}", ""]
            lines += [markdown_table(table.rows)]
        else:
            lines += ["", f"`{FOLDER}/{outcome.name}/{name}.parquet`, `.csv`: {table.caption}"]
    folder = f"{FOLDER}/{outcome.name}"
    lines += [f"\n![{outcome.name}]({folder}/{figure})" for figure in outcome.figures]
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        small = value != 0 and abs(value) < 1e-3
        return f"{value:.1e}" if small else f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value).replace("|", "\\|")
