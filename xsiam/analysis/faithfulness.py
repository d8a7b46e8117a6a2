"""Do the pairs that a method ranks first matter to the score? Deletion, insertion, interactions."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from xsiam.analysis.base import (
    MODEL,
    AbstractAnalysis,
    AnalysisResult,
    Needs,
    NotApplicableError,
    VectorRequest,
    register_analysis,
)
from xsiam.analysis.baselines import (
    BASELINES,
    BaselineMatrix,
    PairCase,
    explain,
)
from xsiam.analysis.context import Context
from xsiam.analysis.faithfulness_report import (
    LEAVE_ONE_OUT,
    MEASURES,
    SHARES,
    TIMED_PAIRS,
    Measured,
    Report,
)
from xsiam.analysis.matrices import centred, correlation
from xsiam.analysis.statistics import SMALLEST_SAMPLE
from xsiam.attribution import PairAttributor
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning
from xsiam.perturbation import (
    Absence,
    Roles,
    mean_state,
    pair_order,
    protocols_of,
    scores_without,
)
from xsiam.result import PairAttribution, own_places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WARM_UP = "A child throws a ball over the fence."


def removal_curves(
    encoder: SiameseEncoder,
    result: PairAttribution,
    matrices: Mapping[str, Tensor],
    absence: Absence,
    roles: Roles = (None, None),
) -> dict[str, dict[str, np.ndarray]]:
    """Return scores as pairs of tokens are taken out, and as they are put in, by each method.

    Taking out the pair (i, j) makes token i of text a and token j of text b absent. Pairs go by
    falling value, each the strongest of the tokens still there (`xsiam.perturbation.pair_order`),
    so that k pairs are k tokens of each text in every method. With m own tokens of the shorter
    text, a share s is k = max(1, round(s (m − 1))) pairs: one pair to all but one. Deletion: these
    are absent. Insertion: all own tokens are absent but those of these pairs.

    Args:
        encoder: The model.
        result: The attribution of the pair, which says what its tokens are.
        matrices: Values of pairs of own tokens by method, [n_a, n_b].
        absence: What absent means.
        roles: Roles of the texts.

    Returns:
        By measure and method, scores at `SHARES`, [5] float64.

    Raises:
        ValueError: If a text has fewer than two tokens of its own.
    """
    own_a, own_b = own_places(result)
    most = min(len(own_a), len(own_b)) - 1
    if most < 1:
        raise ValueError(f"Expected two own tokens or more, but got {len(own_a)}, {len(own_b)}.")
    steps = [max(1, math.floor(share * most + 0.5)) for share in SHARES]
    gone: tuple[list[set[int]], list[set[int]]] = ([], [])
    for matrix in matrices.values():
        order = pair_order(matrix, most)
        for k in steps:
            for side, own in enumerate((own_a, own_b)):
                taken = {own[pair[side]] for pair in order[:k]}
                gone[side].extend([taken, set(own) - taken])
    scores = scores_without(encoder, result, *gone, absence, roles).cpu().numpy()
    parts = scores.reshape(len(matrices), len(steps), len(MEASURES))
    return {
        measure: {name: parts[n, :, m] for n, name in enumerate(matrices)}
        for m, measure in enumerate(MEASURES)
    }


@register_analysis
class Faithfulness(AbstractAnalysis):
    """Deletion and insertion of token pairs, against baselines (PROTOCOLS 9; ours).

    At the highest layer, on `analysis.n_costly_pairs` pairs. An area is the mean score over
    `SHARES`, in units of the score: a small one of deletion, a large one of insertion say that the
    pairs ranked first matter. `leave_one_out` uses what stands for absent in the protocol that it
    is measured by; `shapley` always the mask token (the mean state where a model has none).

    Neither measure is neutral. Two tokens that do not interact end two matches when they are taken
    out, two that do end one, so that random pairs fare well in deletion. Two texts of the same few
    words score high whatever else they said, so that pairs of equal words fare well in insertion.
    """

    name = "faithfulness"
    question = "Do the token pairs that attribution ranks first matter to the score?"
    source = "ours"
    needs = Needs(packages={"shapiq": "pip install shapiq"}, min_pairs=SMALLEST_SAMPLE)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for the costly pairs at the highest layer."""
        some = context.costly_pairs()
        return context.requests((MODEL,), some.texts_a, some.texts_b, context.layers[:1])

    def run(self, context: Context) -> AnalysisResult:
        """Rank the token pairs by every method, and take them out by every protocol."""
        layer = context.layers[0]
        some = context.costly_pairs()
        results = context.attributions(MODEL, layer, some.texts_a, some.texts_b)
        long_enough = [r for r in results if min(map(len, own_places(r))) > 1]
        if len(long_enough) < SMALLEST_SAMPLE:
            raise NotApplicableError(
                f"it needs {SMALLEST_SAMPLE} pairs of texts with two tokens or more, but of "
                f"{len(results)} there are n = {len(long_enough)}"
            )
        encoder = context.attributor(MODEL, layer).encoder
        with encoder.weights_held():  # looked at once, not for every text
            measured = _measure(context, encoder, layer, long_enough)
        seconds = _attribution_seconds(context, encoder, layer, long_enough)
        report = Report(context, layer, measured, protocols_of(encoder), seconds)
        return report.result(len(results) - len(long_enough))

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw curves by protocol and measure, and differences of deletion with intervals."""
        from xsiam.plots import curves_figure, intervals_figure

        rows = result.tables["curves"].rows
        figures = {}
        for protocol in dict.fromkeys(row["protocol"] for row in rows):
            for measure in MEASURES:
                lines: dict[str, list[tuple[float, float, float, float]]] = {}
                for row in rows:
                    if (row["protocol"], row["measure"]) == (protocol, measure):
                        point = (row["share"], row["estimate"], row["low"], row["high"])
                        lines.setdefault(row["baseline"], []).append(point)
                label = "taken out" if measure == "deletion" else "put in"
                figures[f"{measure}_{protocol}"] = curves_figure(
                    lines, f"share of pairs {label} ({protocol})", "score"
                )
        for measure, better in (("deletion", "below"), ("insertion", "above")):
            bars = {
                f"{row['protocol']}: {row['baseline']}": (row["estimate"], row["low"], row["high"])
                for row in result.tables["differences"].rows
                if row["measure"] == measure
            }
            label = f"{measure}: attribution minus … ({better} 0: attribution is better)"
            figures[f"differences_{measure}"] = intervals_figure(bars, label)
        return figures


def _measure(
    context: Context, encoder: SiameseEncoder, layer: int, results: Sequence[PairAttribution]
) -> Measured:
    sides = zip((context.pairs.texts_a, context.pairs.texts_b), context.roles, strict=True)
    states = [mean_state(encoder, [*dict.fromkeys(texts)], layer, role) for texts, role in sides]
    state = (states[0] + states[1]) / 2
    absences = [Absence(protocol, layer, state) for protocol in protocols_of(encoder)]
    # What a coalition of no tokens needs, and "drop" has not.
    whole = next(absence for absence in absences if absence.protocol != "drop")
    measured = Measured()
    for number, result in enumerate(results):
        case = PairCase(encoder, result, whole, context.roles, context.settings.seed + number)
        common: dict[str, BaselineMatrix] = {}
        for name in BASELINES:
            try:
                if name != LEAVE_ONE_OUT:
                    common[name] = explain(name, case)
            except NotApplicableError:
                measured.too_long += 1
        for absence in absences:
            own = PairCase(encoder, result, absence, context.roles, case.seed)
            known = common | {LEAVE_ONE_OUT: explain(LEAVE_ONE_OUT, own)}
            _measure_pair(measured, number, own, known)
    return measured


def _measure_pair(
    measured: Measured, number: int, case: PairCase, known: Mapping[str, BaselineMatrix]
) -> None:
    protocol = case.absence.protocol
    matrices = {name: found.matrix for name, found in known.items()}
    curves = removal_curves(case.encoder, case.result, matrices, case.absence, case.roles)
    truth = matrices[LEAVE_ONE_OUT]
    for name, found in known.items():
        for measure in MEASURES:
            place = measured.curves.setdefault((protocol, measure, name), {})
            place[number] = curves[measure][name]
        for kind, change in (("raw", lambda m: m), ("centred", centred)):
            values = measured.interactions.setdefault((protocol, kind, name), {})
            values[number] = correlation(change(found.matrix), change(truth))
        measured.costs.setdefault((protocol, name), []).append(found)


def _attribution_seconds(
    context: Context, encoder: SiameseEncoder, layer: int, results: Sequence[PairAttribution]
) -> float:
    """Return the median seconds of attributing a pair, of a few, with nothing known before."""
    settings = {**context.attributor_settings, "cache_size": 1}
    attributor = PairAttributor(encoder, layer, **settings)
    seconds = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # noted where they were integrated
        attributor.attribute(_WARM_UP, _WARM_UP)
        for result in results[:TIMED_PAIRS]:
            start = time.perf_counter()
            attributor.attribute(result.text_a, result.text_b, *context.roles)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
