"""What is planted is found; each baseline is what its definition says, computed another way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import planted_encoder
import pytest
import torch
from models import TEXT_A, TEXT_B, tiny_model
from planted_encoder import TEXTS, VECTORS, exact_matrix, planted_model, planted_places, states

from xsiam import PairAttributor, SiameseEncoder
from xsiam.analysis import Context, NotApplicableError, get_analysis
from xsiam.analysis.base import AnalysisResult
from xsiam.analysis.baselines import BASELINES, PairCase, baseline, explain, shapley_budget
from xsiam.analysis.faithfulness_report import SHARES
from xsiam.analysis.faithfulness_words import in_words
from xsiam.analysis.ground_truth import planted_table, precision_at_planted
from xsiam.analysis.statistics import Finding, Interval
from xsiam.config import AnalysisConfig
from xsiam.pairs import PairDataset
from xsiam.perturbation import Absence
from xsiam.split import evaluation_mode, features_to

SCORE_TOLERANCE = 1e-6
SHAPLEY_TOLERANCE = 1e-4  # shapiq holds empty and full coalition by a large weight, not exactly


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SiameseEncoder:
    model = planted_model(tmp_path_factory.mktemp("planted")).double()
    return SiameseEncoder(model, shift=True, reference="pad", similarity="cos")


@pytest.fixture(scope="module")
def cases(encoder: SiameseEncoder) -> list[PairCase]:
    attributor = PairAttributor(encoder, 0, tolerance=1e-8)
    results = attributor.attribute(*map(list, zip(*TEXTS, strict=True)))
    return [PairCase(encoder, r, Absence("mask"), seed=k) for k, r in enumerate(results)]


def context_of(
    encoder: SiameseEncoder, pairs: Any, folder: Path, n_resamples: int = 100, **settings: Any
) -> Context:
    texts_a, texts_b = map(list, zip(*pairs, strict=True))
    return Context(
        settings=AnalysisConfig(n_resamples=n_resamples, **settings),
        encoder=encoder,
        pairs=PairDataset(texts_a, texts_b),
        layers=(0,),
        folder=folder,
        attributor_settings={"tolerance": 1e-4},
        load=lambda *_: pytest.fail("no other model is needed"),
    )


def analyse(name: str, encoder: SiameseEncoder, pairs: Any, folder: Path) -> AnalysisResult:
    """Run one analysis at layer 0."""
    context = context_of(encoder, pairs, folder)
    analysis = get_analysis(name)
    requests = list(analysis.requests(context))
    context.prepare(requests, 0, 1)
    context.open(requests)
    return analysis.run(context)


# -- ground truth --------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_matrices_of_the_planted_model_are_the_closed_form(
    encoder: SiameseEncoder, layer: int
) -> None:
    attributor = PairAttributor(encoder, layer, tolerance=1e-8)
    for text_a, text_b in TEXTS:
        result = attributor.attribute(text_a, text_b)
        exact = exact_matrix(text_a, text_b)
        assert np.abs(result.matrix.numpy() - exact).max() < 1e-6
        assert result.score == pytest.approx(exact.sum(), abs=1e-9)
        strongest = {(pair.i, pair.j) for pair in result.top_pairs(len(planted_encoder.PLANTED))}
        assert strongest == set(planted_places(text_a, text_b))


def test_planted_model_is_not_linear_so_that_one_node_does_not_do(cases: list[PairCase]) -> None:
    one_node = explain("one_node", cases[0]).matrix
    ours = explain("attribution", cases[0]).matrix
    assert (one_node - ours).abs().max() > 0.1 * ours.max()


def test_table_of_planted_pairs_has_every_baseline(cases: list[PairCase]) -> None:
    table = planted_table(cases, [planted_places(*texts) for texts in TEXTS])
    found = {row["baseline"]: row["precision"] for row in table.rows}
    assert list(found) == list(BASELINES)
    assert found["attribution"] == found["last_layer"] == 1.0
    # Masks are nothing in this model: leaving tokens out asks what attribution answers.
    assert found["leave_one_out"] == found["shapley"] == 1.0
    # Large gradients of the weak pairs win, which fill two of three places.
    assert found["gradient_times_input"] == found["one_node"] == pytest.approx(1 / 3)
    # Five pairs point the same way: three places for them, of which three are planted.
    assert found["embedding_cosine"] == pytest.approx(3 / 5)
    assert found["random"] < 0.5
    assert {row["n"] for row in table.rows} == {len(TEXTS)}


def test_precision_shares_places_among_ties() -> None:
    matrix = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    assert precision_at_planted(matrix, [(0, 0)]) == 1.0
    assert precision_at_planted(matrix, [(0, 1)]) == 0.0
    assert precision_at_planted(matrix, [(0, 0), (1, 1)]) == pytest.approx((1 + 1 / 3) / 2)
    with pytest.raises(ValueError, match="one planted pair or more"):
        precision_at_planted(matrix, [])


def test_special_tokens_cannot_be_planted(cases: list[PairCase]) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\) are not"):
        planted_table(cases[:1], [[(0, 1)]])


def test_concentration_of_the_planted_model_is_the_closed_form(
    encoder: SiameseEncoder, tmp_path: Path
) -> None:
    result = analyse("concentration", encoder, TEXTS, tmp_path)
    tops, totals = [], []
    for texts in TEXTS:
        entries = np.sort(np.abs(exact_matrix(*texts)).flatten())[::-1]
        tops.append(entries[: int(np.ceil(0.05 * len(entries)))].sum())
        totals.append(entries.sum())
    found = result.metrics["layer_0/top_5_percent"]
    assert found == pytest.approx(sum(tops) / sum(totals), abs=1e-4)
    (finding,) = result.findings
    assert finding.verdict == "confirmed"


def left_scores(text_a: str, text_b: str, measure: str) -> float:
    """Return the area of an order by the exact matrix: words that are gone are zero vectors."""
    a, b = states(text_a), states(text_b)
    entries = a @ b.T
    n, order = min(len(a), len(b)), []
    while len(order) < n - 1:
        free = [
            (entries[i, j], -i, -j)
            for i, j in itertools.product(range(len(a)), range(len(b)))
            if all(i != p and j != q for p, q in order)
        ]
        _, i, j = max(free)
        order.append((-i, -j))
    scores = []
    for share in SHARES:
        taken = order[: max(1, int(share * (n - 1) + 0.5))]
        sides = []
        for side, whole in enumerate((a, b)):
            rows = [pair[side] for pair in taken]
            kept = np.delete(whole, rows, axis=0) if measure == "deletion" else whole[rows]
            sides.append(kept.sum(0))
        norms = np.linalg.norm(sides[0]) * np.linalg.norm(sides[1])
        scores.append(sides[0] @ sides[1] / norms)
    return float(np.mean(scores))


def test_faithfulness_of_the_planted_model_is_the_closed_form(
    encoder: SiameseEncoder, tmp_path: Path
) -> None:
    result = analyse("faithfulness", encoder, TEXTS, tmp_path)
    for measure in ("deletion", "insertion"):
        expected = np.mean([left_scores(*texts, measure) for texts in TEXTS])
        assert result.metrics[f"layer_0/mask/{measure}"] == pytest.approx(expected, abs=1e-6)
    verdicts = {
        finding.quantity.split(", layer")[0]: finding.verdict for finding in result.findings
    }

    def verdict(measure: str, name: str) -> str:
        return verdicts[f"area of {measure}, attribution minus {name}, protocol mask"]

    assert verdict("insertion", "random") == "confirmed"
    assert verdict("deletion", "gradient_times_input") == "confirmed"
    # Words that do not belong together end two matches when they go: this is no measure here.
    assert verdict("deletion", "random") == "undecided"
    for measure in ("deletion", "insertion"):
        assert verdict(measure, "leave_one_out") != "confirmed"  # as good
    rows = {(r["protocol"], r["baseline"]): r for r in result.tables["comparison"].rows}
    assert rows["mask", "attribution"]["deletion_difference"] is None
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["mask", "random"]["texts"] == 0
    assert "They do by insertion/mask (by" in result.notes[0]
    drawn = get_analysis("faithfulness").plot(result)
    assert {"differences_deletion", "deletion_mask", "insertion_mean"} <= set(drawn)


# -- what each baseline is --------------------


@pytest.fixture(scope="module")
def case() -> PairCase:
    """A random model without a shift, so that inputs and differences are not the same."""
    encoder = SiameseEncoder(tiny_model().double(), shift=False, reference="pad", similarity="cos")
    result = PairAttributor(encoder, 1).attribute(TEXT_A, TEXT_B)
    return PairCase(encoder, result, Absence("mask"), seed=3)


def sides(case: PairCase, layer: int) -> list[tuple[Any, torch.Tensor]]:
    encoder, found = case.encoder, []
    for text in (case.result.text_a, case.result.text_b):
        features = features_to(encoder.preprocess([text]), encoder.device)
        features.pop("offset_mapping")
        with torch.no_grad(), evaluation_mode(encoder):
            found.append((features, encoder.split.capture(features, layer)))
    return found


def bilinear(
    case: PairCase, layer: int, direction: Callable[[Any, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the matrix from full Jacobians by reverse mode."""
    encoder, vectors, norms = case.encoder, [], []
    with evaluation_mode(encoder):
        for features, hidden in sides(case, layer):

            def tail(states: torch.Tensor, features: Any = features) -> torch.Tensor:
                return encoder.split.tail(features, layer, states)[0]

            jacobian = torch.autograd.functional.jacobian(tail, hidden)[:, 0]
            vectors.append((jacobian * direction(features, hidden)[0]).sum(-1)[:, 1:-1])
            norms.append(tail(hidden).norm())
    return (vectors[0].T @ vectors[1] / (norms[0] * norms[1])).detach()


def test_gradient_times_input_is_by_full_jacobians(case: PairCase) -> None:
    expected = bilinear(case, 1, lambda features, hidden: hidden)
    found = explain("gradient_times_input", case)
    assert torch.allclose(found.matrix, expected, rtol=0, atol=1e-10)
    assert found.derivatives == sum(expected.shape)
    assert found.seconds > 0


def test_one_node_goes_along_the_difference_from_the_reference(case: PairCase) -> None:
    encoder = case.encoder

    def difference(features: Any, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return hidden - encoder.reference.hidden(encoder.split, features, 1)

    found = explain("one_node", case).matrix
    assert torch.allclose(found, bilinear(case, 1, difference), rtol=0, atol=1e-10)
    ours = explain("attribution", case).matrix
    assert torch.equal(ours, case.result.matrix[1:-1, 1:-1].double())
    assert (found - ours).abs().max() > 1e-2  # the model is curved


@pytest.mark.parametrize("shift", [False, True])
def test_last_layer_is_products_of_pooled_states(shift: bool) -> None:
    encoder = SiameseEncoder(tiny_model().double(), shift=shift, reference="pad", similarity="cos")
    result = PairAttributor(encoder, 2).attribute(TEXT_A, TEXT_B)
    pair = PairCase(encoder, result, Absence("mask"))
    vectors = []
    for features, hidden in sides(pair, 3):
        if shift:
            with torch.no_grad(), evaluation_mode(encoder):
                hidden = hidden - encoder.reference.hidden(encoder.split, features, 3)
        vectors.append(hidden[0] / hidden.shape[1])
    norms = [vector.sum(0).norm() for vector in vectors]
    expected = vectors[0] @ vectors[1].T / (norms[0] * norms[1])
    assert float(expected.sum()) == pytest.approx(result.score, abs=1e-9)
    found = explain("last_layer", pair).matrix
    assert torch.allclose(found, expected[1:-1, 1:-1], rtol=0, atol=1e-10)


def test_embedding_cosine_is_of_states_at_layer_0(case: PairCase) -> None:
    (_, a), (_, b) = sides(case, 0)
    expected = torch.nn.functional.cosine_similarity(a[0, 1:-1, None], b[0, None, 1:-1], dim=-1)
    assert torch.allclose(explain("embedding_cosine", case).matrix, expected, atol=1e-10)


def test_leave_one_out_is_differences_of_scores(case: PairCase) -> None:
    a, b = TEXT_A.split(), TEXT_B.split()
    hole_a, hole_b = (
        " ".join("[MASK]" if k == place else word for k, word in enumerate(words))
        for words, place in ((a, 2), (b, 4))
    )
    whole, less_a, less_b, less = case.encoder.score(
        [TEXT_A, hole_a, TEXT_A, hole_a], [TEXT_B, TEXT_B, hole_b, hole_b]
    ).tolist()
    found = explain("leave_one_out", case)
    assert float(found.matrix[2, 4]) == pytest.approx(whole - less_a - less_b + less, abs=1e-9)
    assert found.forwards == len(a) + len(b) + 2


def exact_interactions(values: dict[tuple[bool, ...], float], n: int) -> np.ndarray:
    """Return faithful Shapley interactions of order 2 of a game, by their least squares problem.

    The weights of coalitions are (n − 2)! (|S| − 1)! … proportional to 1 / (C(n, s) s (n − s)), and
    the empty and the full coalition are exact (Tsai et al. 2023, theorem 13).
    """
    terms = [(), *((i,) for i in range(n)), *itertools.combinations(range(n), 2)]
    design, target, weights = [], [], []
    for coalition, value in values.items():
        size = sum(coalition)
        design.append([float(all(coalition[i] for i in term)) for term in terms])
        target.append(value)
        inner = 0 < size < n
        count = len([c for c in values if sum(c) == size])
        weights.append(1 / (count * size * (n - size)) if inner else 1e8)
    root = np.sqrt(weights)
    solution = np.linalg.lstsq(np.array(design) * root[:, None], np.array(target) * root)[0]
    matrix = np.zeros((n, n))
    for term, value in zip(terms, solution, strict=True):
        if len(term) == 2:
            matrix[term] = value
    return matrix


def test_shapley_of_few_tokens_is_exact() -> None:
    encoder = SiameseEncoder(tiny_model().double(), shift=False, reference="pad", similarity="cos")
    a, b = ["small", "dog"], ["cat", "in", "house"]
    result = PairAttributor(encoder, 2).attribute(" ".join(a), " ".join(b))
    coalitions = list(itertools.product([False, True], repeat=5))
    scores = encoder.score(
        [" ".join(w if c else "[MASK]" for w, c in zip(a, x[:2], strict=True)) for x in coalitions],
        [" ".join(w if c else "[MASK]" for w, c in zip(b, x[2:], strict=True)) for x in coalitions],
    )
    values = dict(zip(coalitions, scores.tolist(), strict=True))
    expected = exact_interactions(values, 5)[:2, 2:]
    found = explain("shapley", PairCase(encoder, result, Absence("mask")))
    assert shapley_budget(5) == 2**5  # all of them
    assert found.forwards == 2**2 + 2**3
    assert np.abs(found.matrix.numpy() - expected).max() < SHAPLEY_TOLERANCE


def test_shapley_refuses_what_it_cannot_afford_or_define(case: PairCase) -> None:
    text = " ".join(["dog"] * 20)
    result = PairAttributor(case.encoder, 3).attribute(text, text)
    with pytest.raises(NotApplicableError, match="40 tokens are more than the 32"):
        explain("shapley", PairCase(case.encoder, result, Absence("mask")))
    with pytest.raises(NotApplicableError, match="all dropped"):
        explain("shapley", PairCase(case.encoder, case.result, Absence("drop")))


def test_random_values_are_those_of_their_seed(case: PairCase) -> None:
    first, again = (explain("random", case).matrix for _ in range(2))
    other = explain("random", PairCase(case.encoder, case.result, case.absence, seed=4)).matrix
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_names_of_baselines_are_taken_once() -> None:
    with pytest.raises(ValueError, match="'random' is _random"):
        baseline("random")(lambda case: (torch.zeros(1, 1), 0, 0))


# -- the analysis --------------------


def test_pairs_that_cannot_be_measured_are_counted(encoder: SiameseEncoder, tmp_path: Path) -> None:
    long = " ".join([*VECTORS][:17])
    pairs = [*TEXTS, ("dog", "cat"), (long, long)]
    result = analyse("faithfulness", encoder, pairs, tmp_path)
    notes = " ".join(result.notes)
    assert "1 pairs with a text of fewer than two tokens were left out" in notes
    assert "`shapley` has no figure for 1 pairs of more than 32 tokens" in notes
    counts = {r["baseline"]: r["n"] for r in result.tables["comparison"].rows}
    assert (counts["attribution"], counts["shapley"]) == (7, 6)
    with pytest.raises(NotApplicableError, match="of 5 there are n = 4"):
        analyse("faithfulness", encoder, [*TEXTS[:4], ("dog", "cat")], tmp_path)


def test_costly_pairs_are_a_sample_of_the_sample(encoder: SiameseEncoder, tmp_path: Path) -> None:
    some = context_of(encoder, TEXTS, tmp_path, n_costly_pairs=4).costly_pairs()
    pairs = list(zip(some.texts_a, some.texts_b, strict=True))
    assert len(set(pairs)) == 4
    assert set(pairs) <= set(TEXTS)
    assert pairs != [*TEXTS[:4]]  # rows of a file are often sorted by where they are from
    everything = context_of(encoder, TEXTS, tmp_path, n_costly_pairs=50).costly_pairs()
    assert everything.texts_a == [a for a, _ in TEXTS]


# -- words --------------------------------------------------------------------------------------


def said(verdict: str, estimate: float, best: str = "attribution") -> str:
    """Return the paragraph where all findings have one verdict."""
    found = Interval(estimate, estimate - 0.01, estimate + 0.01, 9)
    findings = {
        (name, measure, "mask"): Finding("", "ours", cast("Any", verdict), "", found, 0.0)
        for name in ("random", "leave_one_out", "gradient_times_input")
        for measure in ("deletion", "insertion")
    }
    names = ("attribution", "random", "leave_one_out", "gradient_times_input")
    rows = [
        {
            "protocol": "mask",
            "baseline": name,
            "seconds": 1.5,
            "deletion": 0.2 if name == best else 0.5,
            "insertion": 0.9 if name == best else 0.5,
        }
        for name in names
    ]
    entries = {"protocol": "mask", "baseline": "attribution", "raw": 0.8, "centred": 0.9}
    return in_words(findings, rows, [entries])


def test_words_follow_the_verdicts() -> None:
    better = said("confirmed", 0.05)
    assert "matter to the score more than random ones, whether they are taken out" in better
    assert "attribution is the better order by deletion/mask (by 0.050)" in better
    assert "better served" not in better
    assert "The smallest scores are left by `attribution` with mask (0.200)." in better
    worse = said("contradicted", -0.05, best="leave_one_out")
    assert "do not take large attributions for what the score hangs on" in worse
    assert "is better served by leave-one-out interactions" in worse
    assert "by `leave_one_out` with mask (0.200; attribution 0.500)" in worse
    open_ = said("undecided", 0.0)
    assert "it is not shown, by any measure" in open_
    assert "no difference is shown by deletion/mask and insertion/mask" in open_
    assert "entries go closely with how the score changes" in open_
