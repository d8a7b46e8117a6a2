"""How few pairs of tokens carry a score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from xsiam.analysis.base import (
    MODEL,
    AbstractAnalysis,
    AnalysisResult,
    Needs,
    ResultTable,
    VectorRequest,
    register_analysis,
)
from xsiam.analysis.context import Context
from xsiam.analysis.matrices import own_entries
from xsiam.analysis.statistics import SMALLEST_SAMPLE, judge, ratio_of_sums
from xsiam.result import PairAttribution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Shares of the token pairs whose contribution is tabulated."""

ORDERS = ("absolute", "signed")
TOKENS = ("all", "own")

_FEW, _MOST = 0.05, 0.5  # "few token pairs carry most of the score": 5 % carry over half of it


def carried(result: PairAttribution, order: str, tokens: str = "all") -> np.ndarray:
    """Return what the strongest pairs sum to, one figure for each of `SHARES`, [9] float64.

    Args:
        result: The attribution of one pair of texts.
        order: "absolute": largest |A_ij| first (P1); "signed": largest A_ij first.
        tokens: "all" token pairs, or those of the texts' "own" tokens, which are neither special
            nor of a prompt.

    Returns:
        Sums in units of the score; a share counts as many pairs as reach it, at least one. Zeros
        where a text has no token of its own.
    """
    matrix = own_entries(result) if tokens == "own" else result.matrix.double()
    flat = matrix.flatten()
    if not len(flat):
        return np.zeros(len(SHARES))
    key = flat.abs() if order == "absolute" else flat
    sums = flat[key.argsort(descending=True, stable=True)].cumsum(0)
    places = [max(1, int(np.ceil(share * len(flat) - 1e-9))) - 1 for share in SHARES]
    return sums[places].numpy()


@register_analysis
class Concentration(AbstractAnalysis):
    """Share of the scores that the strongest token pairs carry (PROTOCOLS 8, P1).

    Shares are ratios of sums over text pairs, Σ top / Σ all: a ratio in each text pair would be
    unbounded where a score is near zero.
    """

    name = "concentration"
    question = "How few token pairs carry the scores, and how many entries are negative?"
    source = "P1"
    version = 2
    needs = Needs(min_pairs=SMALLEST_SAMPLE)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for the sampled pairs at every layer."""
        return context.pair_requests()

    def run(self, context: Context) -> AnalysisResult:
        """Sum sorted entries at every layer."""
        curves: list[dict[str, Any]] = []
        negatives: list[dict[str, Any]] = []
        findings, metrics = [], {}
        for layer in context.layers:
            results = context.pair_attributions(MODEL, layer)
            shares = context.interval([r.negative_share for r in results])
            negatives.append({"layer": layer, **shares.row()})
            metrics[f"layer_{layer}/negative_share"] = shares.estimate
            for tokens in TOKENS:
                for order in ORDERS:
                    sums = np.stack([carried(r, order, tokens) for r in results])
                    for column, share in enumerate(SHARES):
                        found = context.interval(
                            [sums[:, column], sums[:, -1]], ratio_of_sums, paired=True
                        )
                        where = {"layer": layer, "tokens": tokens, "order": order}
                        curves.append({**where, "share_of_pairs": share, **found.row()})
                        if (tokens, order, share) == ("all", "absolute", _FEW):
                            metrics[f"layer_{layer}/top_5_percent"] = found.estimate
                            findings.append(
                                judge(
                                    "Few token pairs carry most of the score",
                                    f"share that the top {_FEW:.0%} of pairs carry, layer {layer}",
                                    found,
                                    source="P1",
                                    above=_MOST,
                                )
                            )
        return AnalysisResult(
            tables={
                "carried": ResultTable(
                    [r for r in curves if r["share_of_pairs"] in (0.01, _FEW, 0.2)],
                    "share of the scores that the strongest token pairs carry, by absolute or by "
                    "signed value, over all tokens or the texts' own",
                    shown=True,
                ),
                "negative": ResultTable(
                    negatives, "share of negative entries, mean over text pairs", shown=True
                ),
                "curves": ResultTable(curves, "as `carried`, for all shares of pairs"),
            },
            metrics=metrics,
            findings=findings,
        )

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw the share carried against the share of pairs."""
        from xsiam.plots import curves_figure

        rows = [r for r in result.tables["curves"].rows if r["tokens"] == "all"]
        lines = {
            f"layer {layer}, {order}": [
                (r["share_of_pairs"], r["estimate"], r["low"], r["high"])
                for r in rows
                if (r["layer"], r["order"]) == (layer, order)
            ]
            for layer in dict.fromkeys(r["layer"] for r in rows)
            for order in ORDERS
        }
        return {"carried": curves_figure(lines, "share of token pairs", "share of the score")}
