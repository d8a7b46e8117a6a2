"""What the figures of faithfulness mean for someone who uses attributions, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xsiam.analysis.statistics import Finding

__all__ = ["in_words"]

_OURS = "attribution"
_CLOSE = 0.7  # of a rank correlation: half of the variance of ranks in common


def in_words(
    findings: Mapping[tuple[str, str, str], Finding],
    comparison: Sequence[Mapping[str, Any]],
    correlations: Sequence[Mapping[str, Any]],
) -> str:
    """Return a paragraph whose sentences are chosen by the verdicts.

    Args:
        findings: By baseline ("random", "gradient_times_input", "leave_one_out"), measure
            ("deletion", "insertion") and protocol: that attribution is the better order.
        comparison: Rows of that table: areas and costs by protocol and baseline.
        correlations: Rows of the table of interactions.
    """
    return " ".join(
        [
            _random(findings),
            _other(findings, comparison, "leave_one_out", "leave-one-out interactions"),
            _other(findings, comparison, "gradient_times_input", "gradient × input"),
            _best(comparison),
            _interactions(correlations),
        ]
    )


def _by_verdict(
    findings: Mapping[tuple[str, str, str], Finding], name: str
) -> dict[str, list[str]]:
    """Return what gave each verdict on a baseline, in words with sizes."""
    found: dict[str, list[str]] = {"confirmed": [], "contradicted": [], "undecided": []}
    for (baseline, measure, protocol), finding in findings.items():
        if baseline == name:
            size = abs(finding.interval.estimate)
            by = "less than 0.001" if size < 1e-3 else f"{size:.3f}"
            is_open = finding.verdict == "undecided"
            text = f"{measure}/{protocol}" + ("" if is_open else f" (by {by})")
            found[finding.verdict].append(text)
    return found


def _random(findings: Mapping[tuple[str, str, str], Finding]) -> str:
    found = _by_verdict(findings, "random")
    better, worse, open_ = found["confirmed"], found["contradicted"], found["undecided"]
    if better and not worse and not open_:
        return (
            "For a user: the token pairs with the largest attributions matter to the score more "
            "than random ones, whether they are taken out or put in and whatever stands for an "
            f"absent token: {_listed(better)}."
        )
    if better:
        text = (
            "For a user: that the token pairs with the largest attributions matter to the score "
            "more than random ones depends on how one asks. They do by " + _listed(better)
        )
        text += f"; random ones do more by {_listed(worse)}" if worse else ""
        return text + (f"; no difference is shown by {_listed(open_)}." if open_ else ".")
    if worse:
        return (
            "For a user: do not take large attributions for what the score hangs on. Random pairs "
            f"matter more by {_listed(worse)}, and attribution is better by no measure."
        )
    return (
        "For a user: on these pairs it is not shown, by any measure, that the token pairs with the "
        "largest attributions matter to the score more than random ones."
    )


def _other(
    findings: Mapping[tuple[str, str, str], Finding],
    comparison: Sequence[Mapping[str, Any]],
    name: str,
    called: str,
) -> str:
    """Say which of attribution and another method is the better order, and at which cost."""
    found = _by_verdict(findings, name)
    parts = []
    if found["confirmed"]:
        parts.append(f"attribution is the better order by {_listed(found['confirmed'])}")
    if found["contradicted"]:
        parts.append(f"attribution is the worse order by {_listed(found['contradicted'])}")
    if found["undecided"]:
        parts.append(f"no difference is shown by {_listed(found['undecided'])}")
    cost = "a pair takes " + " and ".join(
        f"{_seconds(comparison, method):.2g} s by {word}"
        for method, word in ((_OURS, "attribution"), (name, called))
    )
    text = f"Against {called}, {', '.join(parts)}; {cost}."
    if found["contradicted"] and not found["confirmed"]:
        text += (
            f" Who only asks what the score does when tokens go is better served by {called}; what "
            "attribution has beyond that is a split that sums to the score."
        )
    return text


def _best(comparison: Sequence[Mapping[str, Any]]) -> str:
    """Name the method of the best area of each measure and protocol."""
    sentences = []
    for measure, choose, said in (
        ("deletion", min, "The smallest scores are left by"),
        ("insertion", max, "The largest are put in by"),
    ):
        parts = []
        for protocol in dict.fromkeys(row["protocol"] for row in comparison):
            rows = [row for row in comparison if row["protocol"] == protocol]
            best = choose(rows, key=lambda row: row[measure])
            ours = next(row for row in rows if row["baseline"] == _OURS)
            other = "" if best is ours else f"; attribution {ours[measure]:.3f}"
            parts.append(f"`{best['baseline']}` with {protocol} ({best[measure]:.3f}{other})")
        sentences.append(f"{said} {_listed(parts)}.")
    return " ".join(sentences)


def _interactions(correlations: Sequence[Mapping[str, Any]]) -> str:
    """Say how matrices go with what leaving single tokens out does."""
    ours = [
        row
        for row in correlations
        if row["baseline"] == _OURS and row["raw"] is not None and row["centred"] is not None
    ]
    parts = [
        f"{row['raw']:.2f} with {row['protocol']} ({row['centred']:.2f} without main effects)"
        for row in ours
    ]
    if not parts:
        return "How entries go with leave-one-out interactions is undefined on these pairs."
    text = f"Entries correlate with leave-one-out interactions by {_listed(parts)}"
    if all(row["raw"] < _CLOSE for row in ours):
        return f"{text}: an entry does not tell how the score changes when its tokens go."
    if all(row["raw"] >= _CLOSE for row in ours):
        return f"{text}: entries go closely with how the score changes when their tokens go."
    return f"{text}: whether entries tell how the score changes depends on what absent means."


def _seconds(comparison: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(next(row["seconds"] for row in comparison if row["baseline"] == name))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
