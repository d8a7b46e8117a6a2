"""How far the attributions of separately tuned models agree, text pair by text pair."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xsiam.analysis.base import (
    CONTROL,
    MODEL,
    UNSHIFTED,
    UNSHIFTED_CONTROL,
    AbstractAnalysis,
    AnalysisResult,
    Needs,
    NotApplicableError,
    ResultTable,
    VectorRequest,
    register_analysis,
)
from xsiam.analysis.comparison import (
    estimate_row,
    pearson_along,
    score_bins,
    spearman_along,
    top_overlap,
)
from xsiam.analysis.context import Context
from xsiam.analysis.matrices import own_entries
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Finding, judge
from xsiam.analysis.unmodified import (
    NEUTRAL,
    UNMODIFIED_NAMES,
    label,
    layers_note,
    layers_of,
    reference_sizes,
)
from xsiam.encoder import SiameseEncoder
from xsiam.errors import TruncationWarning
from xsiam.reading import read_text
from xsiam.references.neutral import LIMIT
from xsiam.result import PairAttribution
from xsiam.texts import Truncations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHERS = (UNSHIFTED, CONTROL, UNSHIFTED_CONTROL, *UNMODIFIED_NAMES)
TOKENS = ("own", "all")
TOP_SHARES = (0.05, 0.1)
STATISTICS = ("spearman", "pearson", *(f"top_{share:.0%}".replace("%", "") for share in TOP_SHARES))
N_BINS = 5

Values = dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Two models whose attributions are compared.

    Attributes:
        first: Name of one.
        second: Name of the other.
        kind: What they are: "approximate against exact", or two of a kind.
    """

    first: str
    second: str
    kind: str

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{label(self.second)} with {label(self.first)}"


COMPARISONS = (
    Comparison(MODEL, UNSHIFTED, "approximate against exact"),
    Comparison(MODEL, CONTROL, "two exact"),
    Comparison(UNSHIFTED, UNSHIFTED_CONTROL, "two approximate"),
    *(Comparison(MODEL, name, "unmodified against exact") for name in UNMODIFIED_NAMES),
)


def agreement(first: PairAttribution, second: PairAttribution, tokens: str) -> Values:
    """Compare the pair matrices of two models of one text pair.

    Args:
        first: One attribution.
        second: The other, of the same texts and tokens.
        tokens: "all", or those of the texts' "own": neither special nor of a prompt.

    Returns:
        By the names of `STATISTICS`: correlations of the flattened matrices, and the overlap
        (Jaccard) of their entries of largest absolute value. All None where a matrix is constant,
        as one of a single entry is, or empty.
    """
    left, right = (_entries(result, tokens) for result in (first, second))
    if not left.size or np.ptp(left) == 0 or np.ptp(right) == 0:
        return dict.fromkeys(STATISTICS)
    values = [float(spearman_along(left, right)), float(pearson_along(left, right))]
    values += [top_overlap(left, right, share) for share in TOP_SHARES]
    return dict(zip(STATISTICS, values, strict=True))


def other_tokens(
    first: SiameseEncoder,
    second: SiameseEncoder,
    sides: Sequence[Sequence[str]],
    roles: Sequence[str | None],
) -> int:
    """Return how many texts two models read as different tokens."""
    different = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # said when the texts were scored
        with Truncations(first) as one, Truncations(second) as two:
            for texts, role in zip(sides, roles, strict=True):
                for text in dict.fromkeys(texts):
                    read = (read_text(first, text, role, one), read_text(second, text, role, two))
                    different += read[0].tokens != read[1].tokens
    return different


@register_analysis
class Agreement(AbstractAnalysis):
    """Agreement of approximate and exact attributions, and of two of a kind (PROTOCOLS, P2's 2).

    Within one set of weights the exact and the approximate matrix from one reference differ by a
    scalar only, so that models are to be tuned separately.
    """

    name = "agreement"
    question = "Do approximate attributions agree with exact ones, and at which layers?"
    source = "P2"
    needs = Needs(shift=True, optional=OTHERS, min_pairs=SMALLEST_SAMPLE)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for the sampled pairs, of every model that something can be compared with."""
        names = dict.fromkeys(n for c in _possible(context)[0] for n in (c.first, c.second))
        return [r for n in names for r in context.pair_requests([n], layers_of(context, n))]

    def run(self, context: Context) -> AnalysisResult:
        """Compare matrices text pair by text pair, and average over them."""
        comparisons, notes = _possible(context)
        notes += layers_note(context, [c.second for c in comparisons])
        rows = [
            row
            for comparison in comparisons
            for layer in layers_of(context, comparison.second)
            for row in _pair_rows(context, comparison, layer)
        ]
        estimates = _estimates(context, rows)
        undefined = sum(row["spearman"] is None for row in rows)
        if undefined:
            notes.append(
                f"{undefined} of {len(rows)} comparisons of two matrices are undefined (one is "
                "constant, of a single entry, or empty without special tokens); they are left out, "
                "and counted in `intervals`."
            )
        if NEUTRAL in [c.second for c in comparisons]:
            notes += [_neutral_note(context, layer) for layer in layers_of(context, NEUTRAL)]
        return AnalysisResult(
            tables={
                "layers": ResultTable(
                    _wide(rows, estimates),
                    "agreement of pair matrices over the texts' own tokens, mean over text pairs: "
                    "Spearman with interval, Pearson, overlap (Jaccard) of the top 5 % and 10 % of "
                    "entries by absolute value; largest completeness error and share of pairs that "
                    "converged with both models",
                    shown=True,
                ),
                "intervals": ResultTable(
                    estimates, "as `layers`, with intervals, and with special and prompt tokens"
                ),
                "score_bins": ResultTable(
                    _binned(context, rows),
                    f"Spearman over the texts' own tokens, mean over the text pairs of a bin of "
                    f"the score of `{MODEL}`; bins hold about equally many pairs",
                ),
                "pairs": ResultTable(
                    rows, "a row a text pair (its place in the sample), comparison and layer"
                ),
            },
            metrics={
                f"layer_{r['layer']}/{r['comparison'].replace(' ', '_')}/{r['statistic']}": value
                for r in estimates
                if r["tokens"] == "own" and (value := r["estimate"]) is not None
            },
            findings=_findings(context, comparisons, rows),
            notes=notes,
        )

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw Spearman's correlation against the layer, and against the score."""
        from xsiam.plots import curves_figure, intervals_figure

        rows = [
            r
            for r in result.tables["intervals"].rows
            if (r["tokens"], r["statistic"]) == ("own", "spearman") and r["estimate"] is not None
        ]
        lines = {
            name: sorted(
                (r["layer"], r["estimate"], r["low"], r["high"])
                for r in rows
                if r["comparison"] == name
            )
            for name in dict.fromkeys(r["comparison"] for r in rows)
        }
        binned = [r for r in result.tables["score_bins"].rows if r["estimate"] is not None]
        top = max((r["layer"] for r in binned), default=None)
        bars = {
            f"{r['comparison']}, score {r['bin']}": (r["estimate"], r["low"], r["high"])
            for r in binned
            if r["layer"] == top
        }
        figures = {}
        if lines:
            figure = curves_figure(lines, "layer", "Spearman over token pairs")
            figure.axes[0].set_xticks(sorted({r["layer"] for r in rows}))
            figures["layers"] = figure
        if bars:
            figures["scores"] = intervals_figure(
                bars, f"Spearman over token pairs, layer {top}", at=None
            )
        return figures


def _possible(context: Context) -> tuple[list[Comparison], list[str]]:
    """Return the comparisons that can be made, and why others cannot.

    Raises:
        NotApplicableError: If none can.
    """
    given, reasons = context.available(OTHERS)
    problems: dict[str, str | None] = {}
    sides = (context.pairs.texts_a, context.pairs.texts_b)
    for name in given:
        problems[name] = _problem(context, name, sides)
        if problems[name]:
            reasons.append(f"`{label(name)}` is left out: {problems[name]}.")
    usable = {MODEL, *(name for name in given if problems[name] is None)}
    found = [c for c in COMPARISONS if {c.first, c.second} <= usable]
    if not found:
        raise NotApplicableError("it has no other model to compare with. " + " ".join(reasons))
    for comparison in found:
        pair = [context.model(name) for name in (comparison.first, comparison.second)]
        if pair[0].model_fingerprint == pair[1].model_fingerprint:
            reasons.append(
                f"{comparison.name}: both have the same weights, so that they agree by "
                "construction where they start from the same reference."
            )
        labels = [encoder.reference_label for encoder in pair]
        if labels[0] != labels[1]:
            reasons.append(
                f"{comparison.name}: paths start from `{labels[1]}` and `{labels[0]}`, which is "
                "part of what they differ by."
            )
    return found, reasons


def _problem(context: Context, name: str, sides: Sequence[Sequence[str]]) -> str | None:
    """Return why a model that is given cannot be compared, None where it can."""
    encoder = context.model(name)
    if encoder.n_layers != context.encoder.n_layers:
        return f"it has {encoder.n_layers} layers and `{MODEL}` {context.encoder.n_layers}"
    different = other_tokens(context.encoder, encoder, sides, context.roles)
    if different:
        return f"it reads {different} of the sample's texts as other tokens than `{MODEL}` does"
    return None


def _entries(result: PairAttribution, tokens: str) -> NDArray[np.float64]:
    matrix = own_entries(result) if tokens == "own" else result.matrix.double()
    return matrix.flatten().numpy()


def _pair_rows(context: Context, comparison: Comparison, layer: int) -> list[dict[str, Any]]:
    first, second = (
        context.pair_attributions(name, layer) for name in (comparison.first, comparison.second)
    )
    return [
        {
            "comparison": comparison.name,
            "layer": layer,
            "tokens": tokens,
            "pair": number,
            **agreement(one, two, tokens),
            "completeness_error": max(one.completeness_error, two.completeness_error),
            "converged": one.converged and two.converged,
        }
        for tokens in TOKENS
        for number, (one, two) in enumerate(zip(first, second, strict=True))
    ]


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, str], list[Any]]:
    groups: dict[tuple[str, int, str], list[Any]] = {}
    for row in rows:
        groups.setdefault((row["comparison"], row["layer"], row["tokens"]), []).append(row)
    return groups


def _estimates(context: Context, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "comparison": name,
            "layer": layer,
            "tokens": tokens,
            "statistic": statistic,
            **estimate_row(context, [row[statistic] for row in group]),
        }
        for (name, layer, tokens), group in _groups(rows).items()
        for statistic in STATISTICS
    ]


def _wide(
    rows: Sequence[Mapping[str, Any]], estimates: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return one row a comparison and layer, of the texts' own tokens."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in estimates:
        if row["tokens"] != "own":
            continue
        wide = found.setdefault((row["comparison"], row["layer"]), {})
        if row["statistic"] == "spearman":
            wide |= {name: row[name] for name in ("comparison", "layer")}
            wide |= {"spearman": row["estimate"], "low": row["low"], "high": row["high"]}
            wide["n"] = row["n"]
        else:
            wide[row["statistic"]] = row["estimate"]
    for (name, layer, tokens), group in _groups(rows).items():
        if tokens == "own":
            errors = [row["completeness_error"] for row in group]
            converged = [row["converged"] for row in group]
            found[name, layer]["completeness_error_max"] = max(errors)
            found[name, layer]["converged"] = float(np.mean(converged))
    return list(found.values())


def _binned(context: Context, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    scores = [r.score for r in context.pair_attributions(MODEL, context.layers[0])]
    return [
        {
            "comparison": name,
            "layer": layer,
            "bin": bin_name,
            **estimate_row(context, [group[i]["spearman"] for i in members]),
        }
        for (name, layer, tokens), group in _groups(rows).items()
        if tokens == "own"
        for bin_name, members in score_bins(scores, N_BINS)
    ]


def _findings(
    context: Context, comparisons: Sequence[Comparison], rows: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    by_name = {c.second: c.name for c in comparisons}
    values = {
        (name, layer): [row["spearman"] for row in group]
        for (name, layer, tokens), group in _groups(rows).items()
        if tokens == "own"
    }
    findings = []
    top, bottom = context.layers[0], context.layers[-1]
    for other in (UNSHIFTED, UNMODIFIED_NAMES[0]):
        if other in by_name and top != bottom:
            name = by_name[other]
            differences = _differences(values[name, top], values[name, bottom])
            if len(differences) >= SMALLEST_SAMPLE:
                findings.append(
                    judge(
                        "Approximate attributions agree with exact ones more in deep layers than "
                        "in shallow ones",
                        f"Spearman of {name}, layer {top} minus layer {bottom}",
                        context.interval(differences),
                        source="P2",
                        above=0.0,
                    )
                )
    if UNSHIFTED in by_name and CONTROL in by_name:
        for layer in context.layers:
            differences = _differences(
                values[by_name[UNSHIFTED], layer], values[by_name[CONTROL], layer]
            )
            if len(differences) >= SMALLEST_SAMPLE:
                findings.append(
                    judge(
                        "Approximate attributions agree with exact ones less than two exact "
                        "models do",
                        f"Spearman of {by_name[UNSHIFTED]} minus {by_name[CONTROL]}, layer {layer}",
                        context.interval(differences),
                        source="ours",
                        below=0.0,
                    )
                )
    return findings


def _differences(left: Sequence[float | None], right: Sequence[float | None]) -> list[float]:
    return [one - two for one, two in zip(left, right, strict=True) if None not in (one, two)]  # type: ignore[operator]


def _neutral_note(context: Context, layer: int) -> str:
    sizes = reference_sizes(context, NEUTRAL, layer)
    return (
        f"`{NEUTRAL}` at layer {layer}: |e(r)| is within {LIMIT:g} of |e(text)| for "
        f"{int((sizes <= LIMIT).sum())} of {len(sizes)} texts, at most {sizes.max():.1e}."
    )
