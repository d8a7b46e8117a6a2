"""Several models beside each other: performance, agreement, reference terms."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from comparing import PAIRS, answered, context_of, encoder
from models import tiny_folder, tiny_model

from xsiam.analysis import NotApplicableError, get_analysis
from xsiam.analysis.agreement import _possible, agreement, other_tokens
from xsiam.analysis.base import AnalysisResult
from xsiam.analysis.comparison import (
    DiscordantShare,
    estimate_row,
    pearson_along,
    score_bins,
    spearman_along,
    top_overlap,
)
from xsiam.analysis.reference_terms import flags_of, histogram, summary, terms_of
from xsiam.analysis.runner import Plan, _check_needs
from xsiam.analysis.storage import settings_hash
from xsiam.analysis.unmodified import layers_note, layers_of
from xsiam.attribution import PairAttributor
from xsiam.config import EvaluateConfig, load_config
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError, ModelError
from xsiam.evaluation import run_evaluation
from xsiam.result import PairAttribution

EXACT = 1e-12
SAME = 1e-5  # float32
TEXTS_A, TEXTS_B, LABELS = (list(column) for column in zip(*PAIRS, strict=True))


def rows_of(result: AnalysisResult, table: str, **wanted: Any) -> list[Any]:
    """Return the rows of a table that hold some values."""
    return [row for row in result.tables[table].rows if all(row[k] == v for k, v in wanted.items())]


# -- statistics ---------------------------------------------------------------------------------


def test_correlations_are_scipys_along_any_axis() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 6, (4, 3, 20)).astype(float)  # with ties
    y = generator.normal(size=(4, 3, 20))
    for ours, theirs in (
        (spearman_along, scipy.stats.spearmanr),
        (pearson_along, scipy.stats.pearsonr),
    ):
        expected = [[theirs(x[i, j], y[i, j])[0] for j in range(3)] for i in range(4)]
        assert ours(x, y) == pytest.approx(np.array(expected), abs=EXACT)
        moved = ours(np.moveaxis(x, -1, 0), np.moveaxis(y, -1, 0), axis=0)
        assert moved == pytest.approx(np.array(expected), abs=EXACT)


@pytest.mark.parametrize("correlation", [pearson_along, spearman_along])
def test_correlation_with_a_constant_is_undefined(correlation: Any) -> None:
    found = correlation([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1]], [[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    assert np.isfinite(found[0])
    assert np.isnan(found[1])


def test_correlation_of_tiny_values_does_not_underflow() -> None:
    assert pearson_along([1e-200, 2e-200, 4e-200], [1.0, 2.0, 4.0]) == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.1, 0.0), (0.2, 1 / 3), (0.3, 0.5), (1.0, 1.0), (0.001, 0.0)],
)
def test_overlap_by_hand(share: float, expected: float) -> None:
    """Top entries by absolute value: 9 8 7 … at places 0 1 2 … against places 1 0→4th …"""
    x = np.array([[-9, 8, 7, 6, 5], [4, 3, 2, 1, 0]], float)
    y = np.array([[1, -9, 8, 0, 2], [3, 4, 5, 6, 7]], float)
    # Places of the largest: x 0 1 2, y 1 2 9: {0} and {1}; {0, 1} and {1, 2}; {0, 1, 2}, {1, 2, 9}.
    assert top_overlap(x, y, share) == pytest.approx(expected)


def test_discordant_orderings_are_counted() -> None:
    """Against every pair of observations looked at in turn, also of resamples."""
    generator = np.random.default_rng(1)
    x = generator.integers(0, 5, 12).astype(float)
    y = generator.integers(0, 8, 12).astype(float)
    resamples = generator.integers(0, 12, (5, 12))

    def slow(rows: Any) -> float:
        wrong, ordered = 0.0, 0
        for i in rows:
            for k in rows:
                if x[i] < x[k]:
                    ordered += 1
                    wrong += 0.5 if y[i] == y[k] else float(y[i] > y[k])
        return wrong / ordered

    share = DiscordantShare(x, y)
    assert share(resamples) == pytest.approx([slow(rows) for rows in resamples], abs=EXACT)
    assert share(np.arange(12)) == pytest.approx(slow(range(12)), abs=EXACT)
    untied = np.argsort(generator.normal(size=9)).astype(float)
    tau = scipy.stats.kendalltau(np.arange(9), untied)[0]
    found = DiscordantShare(np.arange(9), untied)(np.arange(9))
    assert found == pytest.approx((1 - tau) / 2, abs=EXACT)


def test_bins_hold_equally_many_in_order() -> None:
    scores = np.random.default_rng(0).permutation(50) / 50
    bins = score_bins(scores, 5)
    assert [len(members) for _, members in bins] == [10] * 5
    assert [sorted(scores[m])[0] for _, m in bins] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert bins[0][0] == "1: 0.00 to 0.18"
    assert len(score_bins(scores[:12], 5)) == 2  # five pairs a bin at least
    ((_, members),) = score_bins(np.ones(50), 5)
    assert len(members) == 50


def test_undefined_values_are_counted_and_left_out(tmp_path: Path) -> None:
    context = context_of(tmp_path, encoder())
    row = estimate_row(context, [0.0, None, 1.0, 2.0, 3.0, None, 4.0])
    assert (row["estimate"], row["n"], row["undefined"]) == (2.0, 5, 2)
    assert row["low"] < 2 < row["high"]
    few = estimate_row(context, [0.0, None, 1.0])
    assert few == {"estimate": None, "low": None, "high": None, "n": 2, "undefined": 1}


# -- performance --------------------------------------------------------------------------------


def test_performance_is_that_of_the_models_own_scores(tmp_path: Path) -> None:
    models = {"model": encoder(shift=True), "unshifted": encoder(1), "unmodified": encoder(2)}
    others = {name: model for name, model in models.items() if name != "model"}
    result = answered("performance", context_of(tmp_path, models["model"], others))
    rows = {}
    for name, model in models.items():
        a, b = (model.encode(texts).double() for texts in (TEXTS_A, TEXTS_B))
        scores = {"cosine": torch.cosine_similarity(a, b), "dot": (a * b).sum(1)}
        for kind, values in scores.items():
            for correlation, function in (
                ("spearman", scipy.stats.spearmanr),
                ("pearson", scipy.stats.pearsonr),
            ):
                where = {"model": name, "scores": kind, "correlation": correlation}
                (row,) = rows_of(result, "correlations", **where)
                expected = function(values, LABELS)[0]
                assert row["estimate"] == pytest.approx(expected, abs=SAME)
                assert row["low"] <= row["estimate"] <= row["high"]
                assert result.metrics[f"{name}/{correlation}_{kind}"] == row["estimate"]
                rows[name, kind, correlation] = row["estimate"]
    assert len(result.tables["correlations"].rows) == len(rows) == 12
    for row in result.tables["differences"].rows:
        key = row["scores"], row["correlation"]
        expected = rows["model", *key] - rows[row["minus"], *key]
        assert row["estimate"] == pytest.approx(expected, abs=EXACT)
    assert len(result.tables["differences"].rows) == 8
    assert [f.threshold for f in result.findings] == [-0.01, -0.01]
    missing = [note for note in result.notes if "left out" in note]
    assert len(missing) == 2
    assert "`control` is left out: it needs the checkpoint `analysis.models.control`" in missing[0]


def test_a_model_loses_nothing_against_itself(tmp_path: Path) -> None:
    others = {"unmodified": encoder()}  # planted: the very same model
    result = answered("performance", context_of(tmp_path, encoder(), others))
    rows = result.tables["differences"].rows
    assert len(rows) == 4
    assert {row[name] for row in rows for name in ("estimate", "low", "high")} == {0.0}


def test_a_model_without_shift_makes_no_claim_about_exactness(tmp_path: Path) -> None:
    result = answered("performance", context_of(tmp_path, encoder(), {"unmodified": encoder(1)}))
    assert result.findings == []


def test_constant_scores_and_labels_have_no_correlation(tmp_path: Path) -> None:
    pairs = [(text, text, label) for text, _, label in PAIRS]  # every cosine is 1
    others = {"unmodified": encoder(1)}
    # In float64 cosines of a text with itself still differ in the last place.
    normalised = [(a, a, y) for a, _, y in [("dog", "dog", i / 7) for i in range(7)]]
    result = answered(
        "performance", context_of(tmp_path, encoder(shift=True), others, pairs=normalised)
    )
    assert all(row["estimate"] is None for row in result.tables["correlations"].rows)
    assert all(row["estimate"] is None for row in result.tables["differences"].rows)
    assert result.metrics == {}
    assert "`model` (cosine) are undefined: all 7 scores are equal" in result.notes[-5]
    constant = [(a, b, 0.5) for a, b, _ in pairs]
    with pytest.raises(NotApplicableError, match=r"all n = 7 labels are equal to 0\.5"):
        answered("performance", context_of(tmp_path, encoder(), pairs=constant))


# -- agreement ----------------------------------------------------------------------------------


def attribution(matrix: Any, special: Any = ((), ())) -> PairAttribution:
    """Return an attribution with a matrix; tokens at some places are special."""
    matrix = torch.tensor(matrix, dtype=torch.float32)
    one = PairAttributor(encoder(), 3).attribute("dog", "cat")
    masks = [
        tuple(place in places for place in range(size))
        for places, size in zip(special, matrix.shape, strict=True)
    ]
    return dataclasses.replace(
        one,
        matrix=matrix,
        special_mask_a=masks[0],
        special_mask_b=masks[1],
        prompt_mask_a=(False,) * len(masks[0]),
        prompt_mask_b=(False,) * len(masks[1]),
    )


def test_agreement_by_hand() -> None:
    """Own tokens: rows 1 and 2, columns 0 and 1, ranks 1 2 3 4 against 2 1 3 4: ρ = 0.8."""
    first = attribution([[9, 9, 9], [1, 2, 9], [3, 4, 9]], ({0}, {2}))
    second = attribution([[0, 1, -9], [0.2, 0.1, 5], [0.3, 0.4, 7]], ({0}, {2}))
    own = agreement(first, second, "own")
    assert own["spearman"] == pytest.approx(0.8)
    assert own["pearson"] == pytest.approx(
        scipy.stats.pearsonr([1, 2, 3, 4], [0.2, 0.1, 0.3, 0.4])[0], abs=1e-6
    )
    assert own["top_5"] == own["top_10"] == 1  # the largest of four
    assert agreement(first, second, "all")["spearman"] != own["spearman"]
    # Of nine, a tenth is the first of the equal nines, against the nine below zero.
    assert agreement(first, second, "all")["top_10"] == 0


def test_agreement_is_undefined_without_variation_or_tokens() -> None:
    constant, other = attribution([[1, 1], [1, 1]]), attribution([[1, 2], [3, 4]])
    values = agreement(constant, other, "own")
    assert set(values.values()) == {None}
    empty = attribution([[1, 2]], ({0}, set()))
    assert set(agreement(empty, empty, "own").values()) == {None}


def test_prompt_tokens_are_not_a_texts_own() -> None:
    first = attribution([[7, 1], [2, 3]])
    prompted = dataclasses.replace(first, prompt_mask_a=(True, False))
    assert agreement(prompted, first, "all")["spearman"] == pytest.approx(1)
    with pytest.raises(ValueError, match="one size"):
        top_overlap(prompted.matrix[1:], first.matrix, 0.1)
    assert agreement(prompted, prompted, "own")["spearman"] == pytest.approx(1)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> AnalysisResult:
    """Return the agreement of a model with itself as control, and with others."""
    others = {
        "control": encoder(shift=True),  # planted: the same model
        "unshifted": encoder(),  # planted: the same weights and reference, not shifted
        "unmodified/pad": encoder(1),
        "unmodified/fitted": ModelError("Expected e(r) to hang on no length."),
        "unmodified/neutral": ModelError("Expected fewer dimensions."),
    }
    context = context_of(tmp_path_factory.mktemp("vectors"), encoder(shift=True), others)
    return answered("agreement", context)


def test_a_model_agrees_with_itself(compared: AnalysisResult) -> None:
    rows = rows_of(compared, "pairs", comparison="control with model")
    assert len(rows) == 2 * 2 * len(PAIRS)
    statistics = ("spearman", "pearson", "top_5", "top_10")
    for row in rows:
        one_entry = row["pair"] == 1 and row["tokens"] == "own"  # "dog" and "cat"
        expected = [None] * 4 if one_entry else pytest.approx([1] * 4, abs=EXACT)
        assert [row[name] for name in statistics] == expected


def test_within_one_set_of_weights_matrices_differ_by_a_scalar(compared: AnalysisResult) -> None:
    """What the note of equal weights says: agreement is 1 by construction."""
    for row in rows_of(compared, "pairs", comparison="unshifted with model", tokens="all"):
        assert row["pearson"] == pytest.approx(1, abs=1e-6)
        assert row["spearman"] > 0.99  # entries near zero change places by quadrature
    assert sum("unshifted with model: both have the same weights" in n for n in compared.notes) == 1
    assert not any("pad with model: both" in note for note in compared.notes)


def test_other_weights_agree_less_and_by_the_matrices(compared: AnalysisResult) -> None:
    texts = PAIRS[0][:2]
    shifted = PairAttributor(encoder(shift=True), 2, max_nodes=1024).attribute(*texts)
    other = PairAttributor(encoder(1), 2, max_nodes=1024).attribute(*texts)
    name = "unmodified/pad with model"
    (row,) = rows_of(compared, "pairs", comparison=name, layer=2, pair=0, tokens="own")
    own = (shifted.matrix[1:-1, 1:-1], other.matrix[1:-1, 1:-1])
    expected = scipy.stats.spearmanr(*(matrix.flatten() for matrix in own))[0]
    assert row["spearman"] == pytest.approx(expected, abs=1e-3)
    assert abs(row["spearman"]) < 0.9
    (row,) = rows_of(compared, "pairs", comparison=name, layer=2, pair=0, tokens="all")
    expected = scipy.stats.pearsonr(shifted.matrix.flatten(), other.matrix.flatten())[0]
    assert row["pearson"] == pytest.approx(expected, abs=1e-3)
    assert 0 < row["completeness_error"] <= 1e-3
    pairs = rows_of(compared, "pairs", comparison=name, layer=2, tokens="own")
    (estimate,) = rows_of(
        compared, "intervals", comparison=name, layer=2, tokens="own", statistic="spearman"
    )
    known = [r["spearman"] for r in pairs if r["pair"] != 1]
    assert estimate["estimate"] == pytest.approx(np.mean(known))
    assert (estimate["n"], estimate["undefined"]) == (len(PAIRS) - 1, 1)


def test_what_cannot_be_compared_is_named(compared: AnalysisResult) -> None:
    notes = " ".join(compared.notes)
    assert "`unshifted_control` is left out: it needs the checkpoint" in notes
    assert "`unmodified/fitted` is left out: `fitted` does not do for it: Expected e(r)" in notes
    assert {row["comparison"] for row in compared.tables["layers"].rows} == {
        "control with model",
        "unshifted with model",
        "unmodified/pad with model",
    }


def test_other_references_are_named(tmp_path: Path) -> None:
    """Two models that differ by the reference as well do not differ by tuning alone."""
    others = {"control": encoder(1, shift=True, reference="uniform"), "unshifted": encoder(2)}
    context = context_of(tmp_path, encoder(shift=True), others)
    _, notes = _possible(context)
    said = [note for note in notes if "paths start from" in note]
    assert len(said) == 1
    assert "control with model: paths start from `uniform` and `pad`" in said[0]


def test_findings_of_agreement(compared: AnalysisResult) -> None:
    by_claim: dict[str, list[Any]] = {}
    for finding in compared.findings:
        by_claim.setdefault(finding.claim, []).append(finding)
    deep, less = by_claim.values()
    assert [f.source for f in deep] == ["P2", "P2"]
    rows = {
        layer: rows_of(
            compared, "pairs", comparison="unmodified/pad with model", layer=layer, tokens="own"
        )
        for layer in (2, 1)
    }
    expected = np.mean(
        [
            a["spearman"] - b["spearman"]
            for a, b in zip(*rows.values(), strict=True)
            if a["pair"] != 1  # undefined
        ]
    )
    assert deep[1].interval.estimate == pytest.approx(expected)
    assert len(less) == 2  # a layer each
    assert all(abs(finding.interval.estimate) < 0.01 for finding in less)  # both are the model


def test_agreement_by_score(compared: AnalysisResult) -> None:
    rows = rows_of(compared, "score_bins", comparison="control with model", layer=2)
    assert [(row["n"], row["undefined"]) for row in rows] == [(6, 1)]  # too few for two bins
    assert rows[0]["estimate"] == pytest.approx(1)


def test_models_that_read_other_tokens_are_refused(tmp_path: Path) -> None:
    t5 = SiameseEncoder(tiny_model("t5_gated_gelu"), similarity="cos", shift=True, reference="pad")
    model = encoder(shift=True)
    assert other_tokens(model, t5, [["dog", "dog", "cat"], ["cat", "a cat"]], [None, None]) == 4
    assert other_tokens(model, encoder(1), [["dog"], ["cat"]], [None, None]) == 0
    context = context_of(tmp_path, model, {"control": t5})
    with pytest.raises(NotApplicableError, match=r"`control` .* 14 of the sample's texts as other"):
        list(get_analysis("agreement").requests(context))


@pytest.mark.parametrize(
    ("name", "shift", "message"),
    [
        ("control", False, r"`analysis\.models\.control` .* with a .* 'control', .* without"),
        ("unshifted", True, r"`analysis\.models\.unshifted` .* without a .* 'unshifted', .* with"),
        ("unmodified", True, r"`analysis\.models\.unmodified` .* without a"),
    ],
)
def test_models_of_the_wrong_kind_are_refused(
    tmp_path: Path, name: str, shift: bool, message: str
) -> None:
    context = context_of(tmp_path, encoder(shift=True), {name: encoder(1, shift=shift)})
    with pytest.raises(InputError, match=message):
        Plan(["performance"], context, tmp_path / "out")


def test_agreement_needs_another_model(tmp_path: Path) -> None:
    plan = Plan(["agreement"], context_of(tmp_path, encoder(shift=True)), tmp_path / "out")
    assert plan.outcomes["agreement"].status == "skipped"
    assert "no other model" in str(plan.outcomes["agreement"].reason)


# -- models that may be given -------------------------------------------------------------------


def test_results_hang_on_the_models_they_are_compared_with(tmp_path: Path) -> None:
    """Else another control would be taken for the one of an earlier run."""
    analysis = get_analysis("performance")
    digests = {
        settings_hash(analysis, context_of(tmp_path, encoder(shift=True), others))
        for others in (
            {},
            {"control": encoder(1, shift=True)},
            {"control": encoder(2, shift=True)},
            {"unmodified": encoder(2)},
        )
    }
    assert len(digests) == 4


def test_a_given_model_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    context = context_of(tmp_path, encoder(), {"unmodified": ModelError("Expected modules.")})
    with pytest.raises(ModelError, match=r"Expected modules\."):
        context.available(["control", "unmodified"])


def test_layers_are_checked_of_models_that_are_compared(tmp_path: Path) -> None:
    context = context_of(tmp_path, encoder(), {"unmodified": encoder(1)}, layers=(2,))
    context.layers = (9,)
    with pytest.raises(InputError, match=r"got 9.*analysis\.layers"):
        _check_needs(get_analysis("reference_terms"), context)


# -- reference terms ----------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cos", "dot"])
def test_terms_add_up_and_are_products_of_embeddings(similarity: str) -> None:
    model = encoder(similarity=similarity)
    attributor = PairAttributor(model, 2, max_nodes=1024)
    a, b = attributor.token_vectors(list(PAIRS[0][:2]))
    result = attributor.attribute(*PAIRS[0][:2])
    unit = 1.0 if similarity == "cos" else float(a.embedding.norm() * b.embedding.norm())
    terms = terms_of(a, b)
    for name, value in {
        "score": result.score,
        "sum_of_pairs": float(result.matrix.sum()),
        "main_effects_a": float(result.main_effects_a.sum()),
        "main_effects_b": float(result.main_effects_b.sum()),
        "intercept": result.intercept,
        "score_minus_pairs": result.score - float(result.matrix.sum()),
        "score_minus_attributed": result.score - result.attributed_score,
    }.items():
        assert terms[name] == pytest.approx(value / unit, abs=SAME), name
    # Where quadrature has converged: f(a, r) = Σ m_a + c.
    from_sums = terms["main_effects_a"] + terms["intercept"]
    assert terms["f_a_reference"] == pytest.approx(from_sums, abs=5e-3)
    texts, reference = model.encode([PAIRS[0][0]])[0].double(), b.reference_embedding
    cosine = float(texts @ reference) / float(texts.norm() * b.embedding.norm())
    assert terms["f_a_reference"] == pytest.approx(cosine, abs=SAME)
    assert abs(terms["intercept"]) > 0.1


def test_shares_quantiles_and_counts_by_hand() -> None:
    terms = {
        "score_minus_pairs": np.array([0.05, -0.15, 0.1, 0.3, -0.7]),
        "sum_of_pairs": np.array([0.5, 1.0, 1.0000001, 1.2, -3.0]),
    }
    flags = {name: values.mean() for name, values in flags_of(terms).items()}
    assert flags == {
        "unsafe_0.1": pytest.approx(0.6),
        "unsafe_0.2": pytest.approx(0.4),
        "unsafe_0.5": pytest.approx(0.2),
        "sum_too_large": pytest.approx(0.2),
    }
    found = summary(np.arange(101.0))
    assert found == pytest.approx(
        {
            "mean": 50,
            "sd": 29.3001706,
            "q05": 5,
            "q25": 25,
            "median": 50,
            "q75": 75,
            "q95": 95,
            "n": 101,
        }
    )
    bins = histogram(np.arange(101.0))
    assert sum(row["pairs"] for row in bins) == 101
    assert (bins[0]["low"], bins[0]["high"], bins[-1]["high"]) == (0, 5, 100)
    assert [row["pairs"] for row in bins] == [5] * 19 + [6]


@pytest.fixture(scope="module")
def terms(tmp_path_factory: pytest.TempPathFactory) -> AnalysisResult:
    """Return the reference terms of a shifted model and of an unmodified one, three references."""
    others = {
        "unmodified/pad": encoder(1),
        "unmodified/fitted": encoder(1, reference="uniform"),  # fitting random weights takes long
        "unmodified/neutral": encoder(1, reference="neutral"),
    }
    folder = tmp_path_factory.mktemp("vectors")
    return answered(
        "reference_terms", context_of(folder, encoder(shift=True), others, layers=(2, 0))
    )


def test_a_shifted_model_has_no_reference_terms(terms: AnalysisResult) -> None:
    for row in rows_of(terms, "terms", model="model"):
        if row["term"] in ("main_effects_a", "main_effects_b", "intercept", "f_a_reference"):
            assert (row["mean"], row["sd"]) == (0, 0)
    for row in rows_of(terms, "models", model="model"):
        assert row["unsafe_0.1"] == row["sum_too_large"] == 0
        assert row["discordant"] < 0.1  # nothing but what quadrature left over
    assert {row["size_max"] for row in rows_of(terms, "references", model="model")} == {0.0}
    exact = next(f for f in terms.findings if f.source == "P1")
    assert exact.verdict == "confirmed"


def test_an_unmodified_model_has_them_by_reference(terms: AnalysisResult) -> None:
    model = encoder(1)
    results = PairAttributor(model, 2, max_nodes=1024).attribute(TEXTS_A, TEXTS_B)
    left_out = np.array([r.score - float(r.matrix.sum()) for r in results])
    (row,) = rows_of(terms, "models", model="unmodified/pad", layer=2)
    assert row["unsafe_0.5"] == pytest.approx((np.abs(left_out) > 0.5).mean())
    sums, scores = [float(r.matrix.sum()) for r in results], [r.score for r in results]
    assert row["sum_too_large"] == pytest.approx(np.mean([s > 1 for s in sums]))
    assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(sums, scores)[0], abs=0.05)
    where = {"model": "unmodified/pad", "layer": 2, "term": "score_minus_pairs"}
    (found,) = rows_of(terms, "terms", **where)
    assert found["mean"] == pytest.approx(left_out.mean(), abs=1e-3)
    assert sum(r["pairs"] for r in rows_of(terms, "histograms", **where)) == len(PAIRS)
    assert rows_of(terms, "score_bins", **where)[0]["estimate"] == pytest.approx(
        left_out.mean(), abs=1e-3
    )
    assert row["unsafe_0.1"] > 0


def test_neutral_references_say_whether_they_were_found(tmp_path: Path) -> None:
    """Behind all blocks a root is easy; random blocks map few states to nothing."""
    model = encoder(1, reference="neutral")
    others = {"unmodified/pad": encoder(1), "unmodified/neutral": model}
    others["unmodified/fitted"] = encoder(1, reference="uniform")
    loose = {"tolerance": 1e-2}
    context = context_of(tmp_path, encoder(shift=True), others, layers=(3, 2), attributor=loose)
    result = answered("reference_terms", context)
    name = "unmodified/neutral"
    assert [row["layer"] for row in rows_of(result, "models", model=name)] == [3, 2]
    found, missed = rows_of(result, "references", model=name)
    assert found["reference"] == "neutral"
    assert (found["neutral"], missed["neutral"]) == (1, 0)
    assert rows_of(result, "models", model=name, layer=3)[0]["unsafe_0.1"] == 0
    worst = max(report.residual for report in model.reference.report(model.split, 2))
    assert missed["size_max"] == pytest.approx(worst, rel=0.3)  # of other texts
    agreed = answered("agreement", context)
    (note,) = (note for note in agreed.notes if "at layer 2: |e(r)|" in note)
    assert "for 0 of 14 texts" in note
    (note,) = (note for note in agreed.notes if "at layer 3: |e(r)|" in note)
    assert "for 14 of 14 texts" in note


def test_neutral_references_are_not_looked_for_far_below(tmp_path: Path) -> None:
    others = {"unmodified": encoder(1), "unmodified/neutral": encoder(1, reference="neutral")}
    context = context_of(tmp_path, encoder(), others, layers=(3, 1, 0))
    assert layers_of(context, "unmodified/neutral") == (3, 1)
    assert layers_of(context, "unmodified") == (3, 1, 0)
    (note,) = layers_note(context, list(others))
    assert "from layer 1 on" in note
    assert layers_note(context, ["unmodified"]) == []


def test_findings_of_reference_terms(terms: AnalysisResult) -> None:
    claims = {finding.claim: finding for finding in terms.findings}
    exceed = claims["Sums of approximate attributions exceed the maximal score"]
    assert (exceed.source, exceed.threshold) == ("P2", 0.01)
    fitted = claims["From the fitted reference fewer matrices of the unmodified model are unsafe"]
    shares = [
        rows_of(terms, "models", model=name, layer=2)[0]["unsafe_0.1"]
        for name in ("unmodified/fitted", "unmodified/pad")
    ]
    assert fitted.interval.estimate == pytest.approx(shares[0] - shares[1])


def test_rankings_of_constant_scores_are_undefined(tmp_path: Path) -> None:
    pairs = [("dog", "cat", i / 7) for i in range(7)]
    result = answered("reference_terms", context_of(tmp_path, encoder(), pairs=pairs, layers=(2,)))
    (row,) = result.tables["models"].rows
    assert row["spearman"] is row["discordant"] is None
    assert any("2 figures of rankings are undefined" in note for note in result.notes)


# -- loading ------------------------------------------------------------------------------------


def test_plain_models_are_compared_without_a_shift(tmp_path: Path) -> None:
    """A plain model gets a shift where it is the evaluated one, and none where it is unmodified."""
    inputs = tiny_folder(tmp_path / "plain")
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sentence1", "sentence2", "score"), *PAIRS])
    config = load_config(
        EvaluateConfig,
        [],
        [
            f"checkpoint={inputs}",
            "model.shift=true",
            "model.reference=pad",
            f"data.test={tmp_path / 'pairs.csv'}",
            "attribution.enabled=false",
            "analysis.layers=[3]",
            "analysis.names=[performance]",
            "analysis.n_resamples=100",
            f"analysis.models.unmodified={inputs}",
            "accelerator=cpu",
            f"output_dir={tmp_path / 'out'}",
        ],
    )
    result = run_evaluation(config)
    assert result is not None
    pairs = torch.tensor(LABELS)
    for name, shift in (("model", True), ("unmodified", False)):
        own = encoder(shift=shift)
        expected = scipy.stats.pearsonr(own.score(TEXTS_A, TEXTS_B), pairs)[0]
        found = result.metrics[f"analysis/performance/{name}/pearson_cosine"]
        assert found == pytest.approx(expected, abs=SAME)
