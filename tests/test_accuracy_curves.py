"""Accuracy: errors of fixed rules without token vectors, bounds, curves against nodes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import PAIRS, answered, context_of, encoder

from xsiam.analysis import accuracy
from xsiam.analysis.accuracy import N_NODES, largest_share, residual_bound
from xsiam.analysis.base import AnalysisResult
from xsiam.analysis.fixed_rules import fixed_rule_errors
from xsiam.attribution import PairAttributor
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning, InputError
from xsiam.quadrature import fixed_rule

SAME = 2e-5  # float32: other batches, sums in another order
LAYERS = (3, 2, 0)


def test_errors_without_token_vectors_are_those_of_attributions() -> None:
    """The slow twin: the published rule with all its token vectors."""
    model = encoder(reference="pad")
    texts_a, texts_b = ([pair[side] for pair in PAIRS[:4]] for side in (0, 1))
    rules = [fixed_rule("riemann", 4), fixed_rule("riemann", 10), fixed_rule("gauss_legendre", 3)]
    found = fixed_rule_errors(PairAttributor(model, 1), texts_a, texts_b, rules)
    largest = 0.0
    for number, rule in enumerate(rules):
        name = "riemann" if number < 2 else "gauss_legendre"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            slow = PairAttributor(model, 1, quadrature=name, n_nodes=rule.n_nodes)
            results = slow.attribute(texts_a, texts_b)
        for errors, result in zip((pair[number] for pair in found), results, strict=True):
            assert errors.n_nodes == result.n_nodes == rule.n_nodes
            for key in ("completeness_error_a", "completeness_error_b", "residual"):
                assert getattr(errors, key) == pytest.approx(getattr(result, key), abs=SAME)
            largest = max(largest, abs(result.residual))
    assert largest > 1e-2  # the rules leave something to be compared


def test_errors_of_fixed_rules_in_roles_and_with_dot() -> None:
    model = SiameseEncoder(encoder().model, similarity="dot", shift=True, reference="uniform")
    model.model.prompts = {"query": "query : ", "document": ""}
    roles = ("query", None)
    (found,) = fixed_rule_errors(
        PairAttributor(model, 2), ["dog"], ["a cat"], [fixed_rule("riemann", 5)], roles
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        slow = PairAttributor(model, 2, quadrature="riemann", n_nodes=5)
        result = slow.attribute("dog", "a cat", *roles)
    assert found[0].residual == pytest.approx(result.residual, rel=1e-4)
    assert abs(result.residual) > 1e-3


def test_texts_that_are_none_are_refused() -> None:
    attributor = PairAttributor(encoder(), 2)
    with pytest.raises(InputError, match="row 1 is ' '"):
        fixed_rule_errors(attributor, ["dog", " "], ["cat", "cat"], [fixed_rule("riemann", 2)])


@pytest.mark.parametrize("shift", [True, False])
def test_bound_holds_and_is_reached_within_its_order(shift: bool) -> None:
    """Of a rule of few nodes, whose residuals are far above float noise."""
    model = encoder(shift=shift)
    attributor = PairAttributor(model, 1, quadrature="riemann", n_nodes=6)
    texts_a, texts_b = ([pair[side] for pair in PAIRS] for side in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        results = attributor.attribute(texts_a, texts_b)
        sides = [attributor.token_vectors(texts) for texts in (texts_a, texts_b)]
    shares = [
        abs(result.residual) / residual_bound(a, b)
        for result, a, b in zip(results, *sides, strict=True)
    ]
    assert 0.01 < max(shares) <= 1


def test_bound_by_hand() -> None:
    """Two vectors of length 3 and 4 that are wrong by a tenth and a half of |Δ|."""
    (a, b) = PairAttributor(encoder(), 3).token_vectors(["dog", "cat"])
    changes = [(a, 3.0, 0.1, 2.0, 5.0), (b, 4.0, 0.5, 1.0, 7.0)]
    for text, embedding, error, delta, norm in changes:
        for name, value in (("embedding", embedding), ("delta", delta)):
            vector = torch.zeros_like(getattr(text, name))
            vector[0] = value
            object.__setattr__(text, name, vector)
        object.__setattr__(text, "completeness_error", error)
        object.__setattr__(text, "norm", norm)
    assert residual_bound(a, b) == pytest.approx((0.2 * 4 + 0.5 * 3 + 0.2 * 0.5) / 35)


def test_share_of_the_bound_leaves_float_noise_out() -> None:
    residuals = np.array([1e-9, 2e-4, 1e-5])
    assert largest_share(residuals, np.array([1e-10, 1e-3, 1e-4]), np.ones(3)) == pytest.approx(0.2)
    assert largest_share(residuals, np.array([1e-10, 1e-8, 0.0]), np.ones(3)) is None
    # A dot product of thousands has float noise of another size.
    assert largest_share(residuals, np.array([1e-10, 1e-3, 1e-4]), np.full(3, 1e4)) is None


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> AnalysisResult:
    """Return the analysis of a shifted model at three layers."""
    folder = tmp_path_factory.mktemp("vectors")
    return answered("accuracy", context_of(folder, encoder(shift=True), layers=LAYERS))


def test_every_layer_has_errors_that_met_the_tolerance(result: AnalysisResult) -> None:
    rows = {row["layer"]: row for row in result.tables["errors"].rows}
    assert tuple(rows) == LAYERS
    for row in rows.values():
        assert row["converged"] == 1
        assert row["completeness_error_max"] <= 1e-3
        assert row["low"] <= row["completeness_error"] <= row["high"]
        assert row["nodes_median"] <= row["nodes_p95"] <= row["nodes_max"]
        assert row["seconds_per_text"] > 0
        assert (row["n_pairs"], row["n_texts"]) == (len(PAIRS), 14)
        assert row["residual_abs_max"] < 2.1e-3  # what two errors of 1e-3 allow of a cosine
    assert rows[3]["nodes_median"] < rows[0]["nodes_median"]  # pooling alone is linear


def test_errors_are_those_of_the_attributions(tmp_path: Path) -> None:
    context = context_of(tmp_path, encoder(shift=True), layers=(1,))
    (row,) = answered("accuracy", context).tables["errors"].rows
    texts_a, texts_b = ([pair[side] for pair in PAIRS] for side in (0, 1))
    results = PairAttributor(encoder(shift=True), 1, max_nodes=1024).attribute(texts_a, texts_b)
    nodes = {r.text_a: r.n_nodes_a for r in results} | {r.text_b: r.n_nodes_b for r in results}
    assert row["nodes_median"] == np.median(list(nodes.values()))
    assert row["nodes_max"] == max(nodes.values())
    errors = [r.completeness_error for r in results]
    assert row["completeness_error"] == pytest.approx(np.mean(errors), abs=SAME)
    residuals = [abs(r.residual) for r in results]
    assert row["residual_abs_mean"] == pytest.approx(np.mean(residuals), abs=SAME)


def test_curves_fall_with_nodes_where_the_integrand_is_smooth(result: AnalysisResult) -> None:
    rows = [r for r in result.tables["curves"].rows if r["error"] == "completeness"]
    for layer in (2, 0):
        curve = [r["estimate"] for r in rows if (r["layer"], r["rule"]) == (layer, "riemann")]
        assert len(curve) == len(N_NODES)
        assert curve[-1] < curve[0] / 10  # order one: 40 times the nodes
        (own,) = (r for r in rows if (r["layer"], r["rule"]) == (layer, "adaptive"))
        assert own["estimate"] < 1e-3 < curve[0]
    published = result.tables["published"].rows
    assert len(published) == len(LAYERS) * (len(N_NODES) + 1)
    row = next(r for r in published if r["nodes"] == 50)
    curve_row = next(
        r
        for r in result.tables["curves"].rows
        if (r["error"], r["nodes"], r["layer"]) == ("attribution", 50, row["layer"])
    )
    assert (row["mean"], row["sd"]) == (curve_row["estimate"], curve_row["sd"])


def test_findings_follow_from_the_errors(result: AnalysisResult) -> None:
    claims = [finding.claim for finding in result.findings]
    assert claims.count("More nodes lower the attribution error") == len(LAYERS)
    deep = next(f for f in result.findings if f.claim == "Deep layers need fewer nodes")
    assert deep.verdict == "confirmed"  # the last hidden state is only pooled: one node is exact
    ours = [f for f in result.findings if f.source == "ours"]
    assert [f.verdict for f in ours[1:]] == ["confirmed"] * 2


def test_fixed_rules_as_configured_are_compared_with_nothing(tmp_path: Path) -> None:
    """What is adaptive elsewhere is then itself fixed; it must not pass for adaptive."""
    settings = {"quadrature": "riemann", "n_nodes": 10}
    context = context_of(tmp_path, encoder(shift=True), layers=(2,), attributor=settings)
    found = answered("accuracy", context)
    assert all(finding.source == "P1" for finding in found.findings)
    own = found.tables["curves"].rows[-1]
    assert (own["rule"], own["nodes"]) == ("riemann", 10)
    assert found.tables["errors"].rows[0]["converged"] < 1


def test_curves_are_of_a_subset_that_the_notes_state(tmp_path: Path) -> None:
    context = context_of(tmp_path, encoder(shift=True), layers=(3,), n_costly_pairs=6)
    found = answered("accuracy", context)
    assert {row["n"] for row in found.tables["curves"].rows} == {6}
    assert "n = 7 pairs" in found.notes[0]
    assert "n = 6 of" in found.notes[0]


def test_time_is_taken_of_texts_that_no_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that took nothing would be the time of a look-up."""
    seen: list[int] = []
    original = PairAttributor.token_vectors

    def spy(self: PairAttributor, texts: list[str], role: str | None = None) -> object:
        seen.append(len(set(texts) & {key[0] for key in self._cache.keys(fingerprint)}))
        return original(self, texts, role)

    monkeypatch.setattr(accuracy.PairAttributor, "token_vectors", spy)
    context = context_of(tmp_path, encoder(shift=True), layers=(2,))
    fingerprint = context.encoder.model_fingerprint
    requests = list(context.pair_requests())
    context.prepare(requests, 0, 1)
    context.open(requests)
    seen.clear()
    accuracy._seconds_per_text(context, 2, context.pairs)
    assert seen == [0, 0]  # a text of ours to warm up, then the texts
