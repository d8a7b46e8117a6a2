"""What the figures of faithfulness mean for someone who uses attributions, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xsiam.analysis.statistics import Finding

__all__ = ["in_words"]

_OURS = "attribution"
_CLOSE = 0.7  # of a rank correlation: half of the variance of ranks in common


def in_words(
    verdicts: Mapping[tuple[str, str], Finding],
    comparison: Sequence[Mapping[str, Any]],
    correlations: Sequence[Mapping[str, Any]],
) -> str:
    """Return a paragraph whose sentences are chosen by the verdicts.

    Args:
        verdicts: The finding by baseline ("random", "gradient_times_input", "leave_one_out") and
            protocol: attribution's area of deletion minus the baseline's, claimed to be below 0.
        comparison: Rows of that table: areas and costs by protocol and baseline.
        correlations: Rows of the table of interactions.
    """
    return " ".join(
        [
            _random(_by_verdict(verdicts, "random")),
            _other(verdicts, comparison, "leave_one_out", "leave-one-out interactions"),
            _other(verdicts, comparison, "gradient_times_input", "gradient × input"),
            _best(comparison),
            _interactions(correlations),
        ]
    )


def _by_verdict(verdicts: Mapping[tuple[str, str], Finding], name: str) -> dict[str, list[str]]:
    """Return the protocols of each verdict on a baseline."""
    found: dict[str, list[str]] = {"confirmed": [], "contradicted": [], "undecided": []}
    for (baseline, protocol), finding in verdicts.items():
        if baseline == name:
            found[finding.verdict].append(protocol)
    return found


def _random(found: Mapping[str, Sequence[str]]) -> str:
    better, worse, open_ = found["confirmed"], found["contradicted"], found["undecided"]
    if better and not worse and not open_:
        return (
            "For a user: the token pairs with the largest attributions matter to the score, since "
            "taking them out lowers it more than taking out random ones, whatever stands for an "
            f"absent token ({_listed(better)})."
        )
    if better:
        return (
            "For a user: whether the token pairs with the largest attributions matter to the score "
            "more than random ones depends on what stands for an absent token: they do with "
            f"{_listed(better)}, which was not shown with {_listed([*worse, *open_])}."
        )
    if worse:
        return (
            "For a user: do not take large attributions for what the score would lose. Taking "
            f"random pairs out lowers it more with {_listed(worse)}."
        )
    return (
        "For a user: on these pairs it is not shown that taking out the token pairs with the "
        "largest attributions lowers the score more than taking out random ones."
    )


def _other(
    verdicts: Mapping[tuple[str, str], Finding],
    comparison: Sequence[Mapping[str, Any]],
    name: str,
    called: str,
) -> str:
    """Say which of attribution and another method is the better order, and at which cost."""
    found = _by_verdict(verdicts, name)
    sizes = {
        protocol: abs(finding.interval.estimate)
        for (baseline, protocol), finding in verdicts.items()
        if baseline == name
    }
    parts = []
    if found["confirmed"]:
        parts.append(f"attribution is the better order with {_sized(found['confirmed'], sizes)}")
    if found["contradicted"]:
        parts.append(f"{called} are the better order with {_sized(found['contradicted'], sizes)}")
    if found["undecided"]:
        parts.append(f"no difference is shown with {_listed(found['undecided'])}")
    cost = "a pair takes " + " and ".join(
        f"{_seconds(comparison, method):.2g} s by {word}"
        for method, word in ((_OURS, "attribution"), (name, called))
    )
    text = f"Against {called}, " + ", ".join(parts) + f"; {cost}."
    if found["contradicted"] and not found["confirmed"]:
        text += (
            f" Whoever only asks what the score does when tokens go is better served by {called}; "
            "what they do not give is a split that sums to the score."
        )
    return text


def _best(comparison: Sequence[Mapping[str, Any]]) -> str:
    """Name the method of the smallest area of deletion of each protocol."""
    parts = []
    for protocol in dict.fromkeys(row["protocol"] for row in comparison):
        rows = [row for row in comparison if row["protocol"] == protocol]
        best = min(rows, key=lambda row: row["deletion"])
        ours = next(row for row in rows if row["baseline"] == _OURS)
        part = f"`{best['baseline']}` with {protocol} ({best['deletion']:.3f}"
        parts.append(part + (")" if best is ours else f"; attribution {ours['deletion']:.3f})"))
    return f"The smallest score is left by {_listed(parts)}."


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


def _sized(protocols: Sequence[str], sizes: Mapping[str, float]) -> str:
    return _listed([f"{protocol} (by {sizes[protocol]:.3f} of score)" for protocol in protocols])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
