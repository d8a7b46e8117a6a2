"""Tables, findings and notes of faithfulness, from what was measured of each text pair."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xsiam.analysis.base import AnalysisResult, ResultTable
from xsiam.analysis.baselines import ATTRIBUTION, BASELINES, MOST_PLAYERS, BaselineMatrix
from xsiam.analysis.context import Context
from xsiam.analysis.faithfulness_words import in_words
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Finding, Interval, judge

__all__ = ["LEAVE_ONE_OUT", "MEASURES", "SHARES", "TIMED_PAIRS", "Measured", "Report"]

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the pairs that are taken out or put in: 1 is all but one."""

MEASURES = ("deletion", "insertion")

LEAVE_ONE_OUT = "leave_one_out"
TIMED_PAIRS = 5
"""Pairs that are attributed anew to see how long it takes."""

_CLAIMED = {
    "random": "a random order",
    "gradient_times_input": "gradient × input",
    LEAVE_ONE_OUT: "leave-one-out interactions",
}
_CLAIMS = {
    "deletion": ("Taking token pairs out by attribution lowers scores more than by {}", "below"),
    "insertion": ("Token pairs put in by attribution score higher than by {}", "above"),
}


@dataclass
class Measured:
    """Values of text pairs, by number, for each method."""

    curves: dict[tuple[str, str, str], dict[int, np.ndarray]] = field(default_factory=dict)
    interactions: dict[tuple[str, str, str], dict[int, float]] = field(default_factory=dict)
    costs: dict[tuple[str, str], list[BaselineMatrix]] = field(default_factory=dict)
    too_long: int = 0

    def paired(self, protocol: str, measure: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return areas of attribution and of a method, over the pairs that both have."""
        ours = self.curves[protocol, measure, ATTRIBUTION]
        theirs = self.curves[protocol, measure, name]
        return (
            np.array([ours[number].mean() for number in theirs]),
            np.array([curve.mean() for curve in theirs.values()]),
        )


@dataclass(frozen=True)
class Report:
    """Tables, findings and notes of what was measured."""

    context: Context
    layer: int
    measured: Measured
    protocols: tuple[str, ...]
    seconds: float

    def result(self, n_short: int) -> AnalysisResult:
        """Return the result; ``n_short`` pairs were left out as too short."""
        names = [name for name in BASELINES if self._n(name) >= SMALLEST_SAMPLE]
        areas, curves, differences = [], [], {}
        for protocol in self.protocols:
            for measure in MEASURES:
                for name in names:
                    where = {"layer": self.layer, "protocol": protocol, "measure": measure}
                    stacked = np.stack([*self._curves(protocol, measure, name).values()])
                    area = self.context.interval(stacked.mean(1))
                    areas.append({**where, "baseline": name, **area.row()})
                    for column, share in enumerate(SHARES):
                        point = self.context.interval(stacked[:, column])
                        curves.append({**where, "baseline": name, "share": share, **point.row()})
                    if name != ATTRIBUTION:
                        ours, theirs = self.measured.paired(protocol, measure, name)
                        found = self.context.interval(ours - theirs)
                        differences[protocol, measure, name] = found
        correlations, undefined = self._correlations(names)
        comparison = self._comparison(names, areas, differences)
        findings = self._findings(differences)
        return AnalysisResult(
            tables={
                "comparison": ResultTable(
                    comparison,
                    "areas of deletion (lower is better) and insertion (higher is better): mean "
                    "score over the shares of pairs, in units of the score; `difference`: that of "
                    "attribution minus that of the baseline, with its interval, over n text pairs "
                    "that both have; cost of a text pair: median seconds, mean number of texts "
                    "through the model, and of derivatives for one token at one point",
                    shown=True,
                ),
                "interactions": ResultTable(
                    correlations,
                    "Spearman's correlation with leave-one-out interactions of the same protocol "
                    "within a text pair, mean over text pairs; centred: both double-centred, "
                    "which takes main effects out",
                    shown=True,
                ),
                "differences": ResultTable(
                    [
                        {
                            "layer": self.layer,
                            "protocol": protocol,
                            "measure": measure,
                            "baseline": name,
                            **found.row(),
                        }
                        for (protocol, measure, name), found in differences.items()
                    ],
                    "area of attribution minus that of each baseline, mean over text pairs",
                ),
                "areas": ResultTable(areas, "areas, mean over text pairs, with intervals"),
                "curves": ResultTable(curves, "scores at each share, mean over text pairs"),
            },
            metrics=self._metrics(areas, correlations, differences),
            findings=[*findings.values()],
            notes=self._notes(n_short, undefined, names, comparison, findings, correlations),
        )

    def _curves(self, protocol: str, measure: str, name: str) -> dict[int, np.ndarray]:
        return self.measured.curves.get((protocol, measure, name), {})

    def _n(self, name: str) -> int:
        return len(self._curves(self.protocols[0], MEASURES[0], name))

    def _comparison(
        self,
        names: Sequence[str],
        areas: Sequence[Mapping[str, Any]],
        differences: Mapping[tuple[str, str, str], Interval],
    ) -> list[dict[str, Any]]:
        known = {(r["protocol"], r["measure"], r["baseline"]): r["estimate"] for r in areas}
        rows = []
        for protocol in self.protocols:
            for name in names:
                costs = self.measured.costs[protocol, name]
                times = [cost.seconds for cost in costs if cost.seconds is not None]
                row: dict[str, Any] = {"layer": self.layer, "protocol": protocol}
                row |= {"baseline": name, "n": len(costs)}
                for measure in MEASURES:
                    found = differences.get((protocol, measure, name))
                    row[measure] = known[protocol, measure, name]
                    row[f"{measure}_difference"] = None if found is None else found.estimate
                    row[f"{measure}_low"] = None if found is None else found.low
                    row[f"{measure}_high"] = None if found is None else found.high
                row["seconds"] = statistics.median(times) if times else self.seconds
                row["texts"] = statistics.fmean(cost.forwards for cost in costs)
                row["derivatives"] = statistics.fmean(cost.derivatives for cost in costs)
                rows.append(row)
        return rows

    def _correlations(self, names: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
        rows, undefined = [], 0
        for protocol in self.protocols:
            for name in (n for n in names if n != LEAVE_ONE_OUT):
                row = {"layer": self.layer, "protocol": protocol, "baseline": name}
                for kind in ("raw", "centred"):
                    values = [*self.measured.interactions[protocol, kind, name].values()]
                    defined = [value for value in values if not math.isnan(value)]
                    undefined += len(values) - len(defined)
                    found = None
                    if len(defined) >= SMALLEST_SAMPLE:
                        found = self.context.interval(defined)
                    row[kind] = None if found is None else found.estimate
                    row[f"{kind}_low"] = None if found is None else found.low
                    row[f"{kind}_high"] = None if found is None else found.high
                    row[f"{kind}_n"] = len(defined)
                rows.append(row)
        return rows, undefined

    def _findings(
        self, differences: Mapping[tuple[str, str, str], Interval]
    ) -> dict[tuple[str, str, str], Finding]:
        """Hold differences against 0, by baseline, measure and protocol: either may be better."""
        findings = {}
        for name, claimed in _CLAIMED.items():
            for measure, (claim, side) in _CLAIMS.items():
                for protocol in self.protocols:
                    findings[name, measure, protocol] = judge(
                        claim.format(claimed),
                        f"area of {measure}, attribution minus {name}, protocol {protocol}, layer "
                        f"{self.layer}, in units of the score",
                        differences[protocol, measure, name],
                        source="ours",
                        **{side: 0.0},
                    )
        return findings

    def _metrics(
        self,
        areas: Sequence[Mapping[str, Any]],
        correlations: Sequence[Mapping[str, Any]],
        differences: Mapping[tuple[str, str, str], Interval],
    ) -> dict[str, float]:
        metrics = {
            f"layer_{self.layer}/{row['protocol']}/{row['measure']}": row["estimate"]
            for row in areas
            if row["baseline"] == ATTRIBUTION
        }
        for (protocol, measure, name), found in differences.items():
            key = f"layer_{self.layer}/{protocol}/{measure}_minus_{name}"
            metrics[key] = found.estimate
        for row in correlations:
            for kind in ("raw", "centred"):
                if row["baseline"] == ATTRIBUTION and row[kind] is not None:
                    key = f"layer_{self.layer}/{row['protocol']}/interactions_{kind}"
                    metrics[key] = row[kind]
        return metrics

    def _notes(
        self,
        n_short: int,
        undefined: int,
        names: Sequence[str],
        comparison: Sequence[Mapping[str, Any]],
        findings: Mapping[tuple[str, str, str], Finding],
        correlations: Sequence[Mapping[str, Any]],
    ) -> list[str]:
        notes = [
            in_words(findings, comparison, correlations),
            "Neither measure is neutral: two tokens that do not belong together end two matches "
            "when they are taken out, two that do end one, which favours random pairs in deletion; "
            "two texts of the same few words score high, which favours pairs of equal words in "
            "insertion.",
            f"{self._n(ATTRIBUTION)} text pairs at layer {self.layer}; `mean` is the mean state of "
            "the sample's tokens at that layer.",
            f"Seconds are of one pair at a time on this machine; those of attribution of "
            f"{TIMED_PAIRS} pairs at most, integrated anew.",
        ]
        if n_short:
            notes.append(f"{n_short} pairs with a text of fewer than two tokens were left out.")
        if self.measured.too_long:
            notes.append(
                f"`shapley` has no figure for {self.measured.too_long} pairs of more than "
                f"{MOST_PLAYERS} tokens, where the coalitions would be too many."
            )
        for name in BASELINES:
            if name not in names:
                notes.append(
                    f"`{name}` is not compared: it has {self._n(name)} pairs, and an interval "
                    f"needs {SMALLEST_SAMPLE}."
                )
        if undefined:
            notes.append(
                f"{undefined} correlations within a text pair were undefined, since all entries "
                "were equal or fewer than three, and are left out."
            )
        return notes
