"""What of a score the pair matrix leaves to main effects and intercept, and what that decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xsiam.analysis.base import (
    MODEL,
    UNMODIFIED,
    UNSHIFTED,
    AbstractAnalysis,
    AnalysisResult,
    Needs,
    ResultTable,
    VectorRequest,
    register_analysis,
)
from xsiam.analysis.comparison import (
    DiscordantShare,
    estimate_row,
    maximal_score,
    score_bins,
    spearman_along,
)
from xsiam.analysis.context import Context
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Finding, judge
from xsiam.analysis.unmodified import (
    UNMODIFIED_NAMES,
    label,
    layers_note,
    layers_of,
    reference_sizes,
)
from xsiam.reading import TokenVectors
from xsiam.references.neutral import LIMIT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHERS = (UNSHIFTED, *UNMODIFIED_NAMES)
FITTED = UNMODIFIED_NAMES[1]
THRESHOLDS = (0.1, 0.2, 0.5)
"""Distances of score and sum of pairs, in units of the maximal score, beyond which it is unsafe."""

TERMS = (
    *("score", "sum_of_pairs", "main_effects_a", "main_effects_b", "intercept"),
    *("f_a_reference", "f_reference_b", "score_minus_pairs", "score_minus_attributed"),
)
DRAWN = ("sum_of_pairs", "main_effects_a", "main_effects_b", "intercept", "score_minus_pairs")
QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
N_HISTOGRAM, N_BINS = 20, 5

SUM_TOO_LARGE = "sum_too_large"

_SOME = 0.01  # "occur": in more than one pair of a hundred
_NOISE = 1e-5  # of the maximal score: sums that float32 puts above it are not above it

Array = NDArray[np.float64]


def terms_of(a: TokenVectors, b: TokenVectors) -> dict[str, float]:
    """Split the score of a pair, every term by its definition, in units of its maximal score.

    Returns:
        By the names of `TERMS`: score; Σ_ij A_ij; Σ_i m_a[i]; Σ_j m_b[j]; c = f(r, r);
        f(a, r_b) = ẽ(a)·ẽ(r_b) / n; f(r_a, b); score minus Σ_ij A_ij; and score minus attributed
        score, Δ_a·Δ_b / n. All share one normaliser n, so that they add up; divided by
        |ẽ(a)||ẽ(b)| / n, which is 1 of cosines.
    """
    sum_a, sum_b = a.vectors.sum(1), b.vectors.sum(1)
    products = {
        "score": a.embedding @ b.embedding,
        "sum_of_pairs": sum_a @ sum_b,
        "main_effects_a": sum_a @ b.reference_embedding,
        "main_effects_b": sum_b @ a.reference_embedding,
        "intercept": a.reference_embedding @ b.reference_embedding,
        "f_a_reference": a.embedding @ b.reference_embedding,
        "f_reference_b": a.reference_embedding @ b.embedding,
    }
    unit = maximal_score(a, b) * a.norm * b.norm
    terms = {name: float(value) / unit for name, value in products.items()}
    attributed = float(a.delta @ b.delta) / unit
    terms["score_minus_pairs"] = terms["score"] - terms["sum_of_pairs"]
    terms["score_minus_attributed"] = terms["score"] - attributed
    return terms


@register_analysis
class ReferenceTerms(AbstractAnalysis):
    """Reference terms of models with and without a shift (PROTOCOLS, P2's third question)."""

    name = "reference_terms"
    question = "How much of a score is not in the pair matrix, and does that decide rankings?"
    source = "P2"
    needs = Needs(optional=OTHERS, min_pairs=SMALLEST_SAMPLE)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for the sampled pairs, of every model that is given."""
        names = (MODEL, *context.available(OTHERS)[0])
        return [r for n in names for r in context.pair_requests([n], layers_of(context, n))]

    def run(self, context: Context) -> AnalysisResult:
        """Split the scores of all pairs."""
        others, notes = context.available(OTHERS)
        names = [MODEL, *others]
        notes += layers_note(context, names)
        split = {
            (name, layer): _split(context, name, layer)
            for name in names
            for layer in layers_of(context, name)
        }
        figures = [
            {"model": label(name), "layer": layer, "figure": figure, **row}
            for (name, layer), terms in split.items()
            for figure, row in {**_shares(context, terms), **_rankings(context, terms)}.items()
        ]
        undefined = sum(row["estimate"] is None for row in figures)
        if undefined:
            notes.append(
                f"{undefined} figures of rankings are undefined, as scores or sums are constant."
            )
        return AnalysisResult(
            tables={
                "models": ResultTable(
                    _wide(figures),
                    "unsafe: share of text pairs whose |score − Σ pairs| exceeds a threshold, in "
                    "units of the maximal score |ẽ(a)||ẽ(b)|/n, which is 1 of cosines; sum too "
                    "large: share whose Σ pairs exceeds it; spearman: of Σ pairs with the scores; "
                    "discordant: share of the orderings of two text pairs by score that Σ pairs "
                    "turns round",
                    shown=True,
                ),
                "figures": ResultTable(figures, "as `models`, with intervals"),
                "references": ResultTable(
                    [_reference_row(context, *key) for key in split],
                    f"size of the reference's embedding, |ẽ(r)| / |ẽ(text)| over texts; neutral: "
                    f"share of texts with at most {LIMIT:g}; converged: share of texts that met "
                    "the tolerance",
                    shown=True,
                ),
                "terms": ResultTable(
                    [
                        {"model": label(name), "layer": layer, "term": term, **summary(values)}
                        for (name, layer), terms in split.items()
                        for term, values in terms.items()
                    ],
                    "distribution of every term over text pairs, in units of the maximal score: "
                    "f_a_reference is f(a, r_b), f_reference_b f(r_a, b), intercept f(r_a, r_b)",
                ),
                "histograms": ResultTable(
                    [
                        {"model": label(name), "layer": layer, "term": term, **row}
                        for (name, layer), terms in split.items()
                        for term, values in terms.items()
                        for row in histogram(values)
                    ],
                    "the same as counts of text pairs between two values",
                ),
                "score_bins": ResultTable(
                    [
                        {"model": label(name), "layer": layer, "bin": bin_name, "term": term, **row}
                        for (name, layer), terms in split.items()
                        for bin_name, members in score_bins(terms["score"], N_BINS)
                        for term, values in terms.items()
                        for row in [estimate_row(context, values[members].tolist())]
                    ],
                    "mean of every term by bin of the model's own score, of about equally many "
                    "text pairs each",
                ),
            },
            metrics={
                f"layer_{r['layer']}/{r['model']}/{r['figure']}": r["estimate"]
                for r in figures
                if r["estimate"] is not None
            },
            findings=_findings(context, names, split),
            notes=notes,
        )

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw the terms at the highest layer, and how often what is left out is unsafe."""
        from xsiam.plots import intervals_figure

        rows = result.tables["terms"].rows
        top = max(r["layer"] for r in rows)
        terms = {
            f"{r['model']}: {r['term'].replace('_', ' ')}": (r["median"], r["q05"], r["q95"])
            for r in rows
            if r["layer"] == top and r["term"] in DRAWN
        }
        shares = {
            f"{r['model']}: {r['figure'].replace('_', ' ')}": (r["estimate"], r["low"], r["high"])
            for r in result.tables["figures"].rows
            if r["layer"] == top and r["figure"] in (*map(unsafe, THRESHOLDS), SUM_TOO_LARGE)
        }
        return {
            "terms": intervals_figure(terms, f"median, 5 % to 95 % of text pairs, layer {top}"),
            "shares": intervals_figure(shares, f"share of text pairs, layer {top}"),
        }


def summary(values: Array) -> dict[str, float | int]:
    """Return mean, standard deviation (n − 1), quantiles and number of values."""
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)),
        **{name: float(np.quantile(values, share)) for name, share in QUANTILES.items()},
        "n": len(values),
    }


def histogram(values: Array) -> list[dict[str, float | int]]:
    """Return counts between equally distant values, from the least to the greatest."""
    counts, edges = np.histogram(values, bins=N_HISTOGRAM)
    return [
        {"low": float(low), "high": float(high), "pairs": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def _split(context: Context, name: str, layer: int) -> dict[str, Array]:
    """Return the terms of all pairs, by name."""
    found = [terms_of(a, b) for a, b in context.pair_vectors(name, layer)]
    return {term: np.array([terms[term] for terms in found]) for term in TERMS}


def unsafe(threshold: float) -> str:
    """Return the name of the share of pairs above a threshold."""
    return f"unsafe_{threshold:g}"


def flags_of(terms: Mapping[str, Array]) -> dict[str, Array]:
    """Return, as 0 and 1, which pairs are unsafe by threshold and which sums exceed any score."""
    left_out = np.abs(terms["score_minus_pairs"])
    flags = {unsafe(limit): left_out > limit for limit in THRESHOLDS}
    flags[SUM_TOO_LARGE] = terms["sum_of_pairs"] > 1 + _NOISE
    return {name: values.astype(np.float64) for name, values in flags.items()}


def _shares(context: Context, terms: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    return {name: context.interval(flags).row() for name, flags in flags_of(terms).items()}


def _rankings(context: Context, terms: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    scores, sums = terms["score"], terms["sum_of_pairs"]
    if np.ptp(scores) == 0 or np.ptp(sums) == 0:
        nothing = {"estimate": None, "low": None, "high": None, "n": len(scores)}
        return {"spearman": nothing, "discordant": nothing}
    numbers = np.arange(len(scores))
    return {
        "spearman": context.interval([scores, sums], spearman_along, paired=True).row(),
        "discordant": context.interval(numbers, DiscordantShare(scores, sums)).row(),
    }


def _wide(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a model and layer."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in figures:
        key = row["model"], row["layer"]
        wide = found.setdefault(key, {"model": key[0], "layer": key[1]})
        wide[row["figure"]] = row["estimate"]
        wide["n"] = row["n"]
    return [{**{k: v for k, v in row.items() if k != "n"}, "n": row["n"]} for row in found.values()]


def _reference_row(context: Context, name: str, layer: int) -> dict[str, Any]:
    sizes = reference_sizes(context, name, layer)
    texts = {
        (t.text, t.role): t.converged for pair in context.pair_vectors(name, layer) for t in pair
    }
    return {
        "model": label(name),
        "layer": layer,
        "reference": context.model(name).reference_label,
        "size_median": float(np.median(sizes)),
        "size_max": float(sizes.max()),
        "neutral": float((sizes <= LIMIT).mean()),
        "converged": float(np.mean(list(texts.values()))),
        "n_texts": len(sizes),
    }


def _findings(
    context: Context, names: Sequence[str], split: Mapping[tuple[str, int], Mapping[str, Array]]
) -> list[Finding]:
    """Judge at the highest layer: sums hang on the layer by what quadrature leaves over alone."""
    layer = context.layers[0]
    flags = {name: flags_of(split[name, layer]) for name in names if (name, layer) in split}
    findings = [
        judge(
            "Sums of approximate attributions exceed the maximal score",
            f"share of pairs of `{label(name)}` whose sum does, layer {layer}",
            context.interval(flags[name][SUM_TOO_LARGE]),
            source="P2",
            above=_SOME,
        )
        for name in (UNSHIFTED, UNMODIFIED)
        if name in flags
    ]
    first = unsafe(THRESHOLDS[0])
    what = f"|score − Σ pairs| > {THRESHOLDS[0]:g}"
    if context.encoder.shift:
        findings.append(
            judge(
                "The sum of pairs of an exact model is its score",
                f"share of pairs of `{MODEL}` with {what}, layer {layer}",
                context.interval(flags[MODEL][first]),
                source="P1",
                below=_SOME,
            )
        )
    if FITTED in flags and UNMODIFIED in flags:
        findings.append(
            judge(
                "From the fitted reference fewer matrices of the unmodified model are unsafe",
                f"share of pairs with {what}, `{FITTED}` minus `{label(UNMODIFIED)}`, layer "
                f"{layer}",
                context.interval(flags[FITTED][first] - flags[UNMODIFIED][first]),
                source="ours",
                below=0.0,
            )
        )
    return findings
