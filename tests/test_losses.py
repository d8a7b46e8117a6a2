"""Objectives and their registry, held against closed forms and sentence-transformers' losses."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import cos_sim, dot_score, pairwise_dot_score

from xsiam.config import ObjectiveConfig
from xsiam.errors import InputError
from xsiam.losses import (
    OBJECTIVES,
    AbstractObjective,
    EmbeddedBatch,
    Matryoshka,
    get_objective,
    matryoshka_of,
    register_objective,
)
from xsiam.losses.base import options_of
from xsiam.losses.repeats import repeats_of_anchors, repeats_of_positives

A = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
B = torch.tensor([[4.0, 3.0], [0.0, 1.0], [0.0, 5.0]], dtype=torch.float64)
LABELS = torch.tensor([0.5, 0.25, 1.0])

TOLERANCE = 1e-12  # measured: 2e-15 relative, float64


def random_batch(n: int, columns: int, seed: int = 0, **more: Any) -> EmbeddedBatch:
    generator = torch.Generator().manual_seed(seed)
    a, b, *negatives = (
        torch.randn(n, 5, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2 + columns)
    )
    return EmbeddedBatch(a, b, tuple(negatives), **more)


def columns_of(batch: EmbeddedBatch) -> list[torch.Tensor]:
    return [batch.a, batch.b, *batch.negatives]


def assert_same_loss_and_gradients(
    batch: EmbeddedBatch, ours: torch.Tensor, expected: torch.Tensor
) -> None:
    columns = columns_of(batch)
    torch.testing.assert_close(ours, expected, rtol=TOLERANCE, atol=0)
    gradients = torch.autograd.grad(ours, columns)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected, columns), rtol=TOLERANCE, atol=TOLERANCE
    )


# ---------------------------------------------------------------- every objective


def complete(name: str, batch: EmbeddedBatch) -> EmbeddedBatch:
    """Return the batch with what that objective needs and nothing more."""
    kind = OBJECTIVES[name]
    return EmbeddedBatch(
        batch.a,
        batch.b,
        () if kind.negatives == "forbidden" else batch.negatives,
        torch.linspace(0.1, 0.9, len(batch.a)) if kind.needs_label else None,
        teacher=teacher_of(len(batch.a)) if kind.needs_teacher else None,
    )


def teacher_of(n: int, similarity: str = "cos") -> torch.Tensor:
    """Return a teacher's embeddings of n pairs, of another dimension than ours."""
    generator = torch.Generator().manual_seed(n)
    vectors = torch.randn(n, 2, 7, generator=generator)
    return torch.nn.functional.normalize(vectors, dim=-1) if similarity == "cos" else vectors


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_differentiable_and_states_its_needs(name: str, similarity: str) -> None:
    objective = get_objective(name, similarity)
    assert (objective.name, objective.similarity) == (name, similarity)
    low, high = objective.label_range
    assert low < high
    batch = complete(name, random_batch(4, 2))
    loss = objective(batch)
    assert loss.shape == ()
    gradients = torch.autograd.grad(loss, columns_of(batch))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not OBJECTIVES[name].in_batch])
def test_objectives_without_comparison_are_means_over_pairs(name: str) -> None:
    batch = complete(name, random_batch(3, 2))
    twice = EmbeddedBatch(
        torch.cat([batch.a] * 2),
        torch.cat([batch.b] * 2),
        tuple(torch.cat([texts] * 2) for texts in batch.negatives),
        None if batch.labels is None else torch.cat([batch.labels] * 2),
    )
    objective = get_objective(name)
    assert objective(twice).item() == pytest.approx(objective(batch).item(), rel=TOLERANCE)


def test_every_option_of_a_registered_objective_has_a_key() -> None:
    options = {option for kind in OBJECTIVES.values() for option in options_of(kind)}
    assert options == set(vars(ObjectiveConfig())) - {"name", "chunk_size", "dims", "dim_weights"}


@pytest.mark.parametrize(
    ("name", "batch", "match"),
    [
        ("mse_cosine", EmbeddedBatch(A, B), r"objective 'mse_cosine'.*`data.column_label`"),
        ("cosent", EmbeddedBatch(A, B), r"objective 'cosent'.*`data.column_label`"),
        ("triplet", EmbeddedBatch(A, B), r"objective 'triplet'.*`data.columns_negative`"),
        ("contrastive", EmbeddedBatch(A[:1], B[:1]), r"'contrastive'.*got 1. Set `data.batch_s"),
        ("cosent", EmbeddedBatch(A[:1], B[:1], (), LABELS[:1]), r"'cosent'.*but got 1"),
        ("distillation", EmbeddedBatch(A, B, (), LABELS), r"'distillation'.*Give .* `teacher`"),
    ],
)
def test_missing_parts_of_a_batch_are_refused(name: str, batch: EmbeddedBatch, match: str) -> None:
    with pytest.raises(InputError, match=match):
        get_objective(name)(batch)


def test_one_pair_with_a_negative_has_a_contrastive_loss() -> None:
    loss = get_objective("contrastive", temperature=1.0)(EmbeddedBatch(A[:1], B[:1], (A[1:2],)))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.6 - 0.96)), rel=TOLERANCE)


# ---------------------------------------------------------------- labelled


@pytest.mark.parametrize(
    ("name", "scores"), [("mse_cosine", [0.96, 0.0, 1.0]), ("mse_dot", [24.0, 0.0, 10.0])]
)
def test_squared_errors_by_hand(name: str, scores: list[float]) -> None:
    expected = sum((s - y) ** 2 for s, y in zip(scores, LABELS.tolist(), strict=True)) / 3
    loss = get_objective(name)(EmbeddedBatch(A, B, (), LABELS))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_label_ranges() -> None:
    assert get_objective("mse_cosine").label_range == (0.0, 1.0)
    assert get_objective("mse_dot").label_range == (-math.inf, math.inf)
    assert get_objective("cosent").label_range == (-math.inf, math.inf)


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_cosent_is_the_sum_over_pairs_in_the_wrong_order(similarity: str, scale: float) -> None:
    labels = torch.tensor([0.2, 0.9, 0.2, 0.5, 7.0], dtype=torch.float64)  # a tie, a large one
    batch = random_batch(5, 0, labels=labels)
    scores = torch.nn.functional.cosine_similarity(batch.a, batch.b)
    if similarity == "dot":
        scores = pairwise_dot_score(batch.a, batch.b)
    pairs = [(i, j) for i, j in itertools.product(range(5), repeat=2) if labels[i] > labels[j]]
    terms = [scores.new_zeros(()), *(scale * (scores[j] - scores[i]) for i, j in pairs)]
    expected = torch.logsumexp(torch.stack(terms), dim=0)
    ours = get_objective("cosent", similarity, scale=scale)(batch)
    assert_same_loss_and_gradients(batch, ours, expected)


# ---------------------------------------------------------------- triplet


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("margin", [0.1, 5.0])
def test_triplet_is_that_of_sentence_transformers(distance: str, margin: float) -> None:
    batch = random_batch(9, 2)
    metric = vars(theirs.TripletDistanceMetric)[distance.upper()]
    loss: Any = theirs.TripletLoss(None, metric, margin)  # type: ignore[arg-type]
    expected = [
        loss.compute_loss_from_embeddings([batch.a, batch.b, negative], None)
        for negative in batch.negatives
    ]
    ours = get_objective("triplet", distance=distance, margin=margin)(batch)
    assert_same_loss_and_gradients(batch, ours, (expected[0] + expected[1]) / 2)


def test_triplet_of_equal_texts_has_a_finite_gradient() -> None:
    a = A.clone().requires_grad_()
    get_objective("triplet", distance="euclidean")(EmbeddedBatch(a, a.detach(), (B,))).backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


# ---------------------------------------------------------------- contrastive


@pytest.mark.parametrize("columns", [0, 1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_contrastive_is_that_of_sentence_transformers(
    columns: int, symmetric: bool, similarity: str, temperature: float
) -> None:
    batch = random_batch(6, columns)
    loss: Any = theirs.MultipleNegativesRankingLoss(
        None,  # type: ignore[arg-type]
        scale=1 / temperature,
        similarity_fct=cos_sim if similarity == "cos" else dot_score,
        directions=("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",),
        partition_mode="per_direction",
    )
    expected = loss.compute_loss_from_embeddings(columns_of(batch), None)
    objective = get_objective(
        "contrastive", similarity, temperature=temperature, symmetric=symmetric
    )
    assert_same_loss_and_gradients(batch, objective(batch), expected)


def test_numbers_of_texts_that_all_differ_change_nothing() -> None:
    ids = torch.randperm(18).view(6, 3) - 9
    batch, numbered = random_batch(6, 1), random_batch(6, 1, text_ids=ids)
    objective = get_objective("contrastive", symmetric=True)
    assert objective(batch).item() == objective(numbered).item()
    assert objective.figures(batch)["masked_negatives"].item() == 0
    assert objective.figures(numbered)["masked_negatives"].item() == 0


def slow_repeats(ids: list[list[int]], anchors: bool) -> torch.Tensor:
    """Return the marks by their definition, for texts one at a time."""
    pairs = {(row[0], row[1]) for row in ids}
    n = len(ids)
    order = range(1, len(ids[0])) if anchors else [0]
    candidates = [(row, ids[row][column]) for column in order for row in range(n)]
    marks = torch.zeros(n, len(candidates), dtype=torch.bool)
    for i, row in enumerate(ids):
        own = row[0] if anchors else row[1]
        for c, (_, text) in enumerate(candidates):
            pair = (own, text) if anchors else (text, own)
            marks[i, c] = c != i and (text == own or pair in pairs)
    return marks


@pytest.mark.parametrize("seed", range(20))
def test_repeats_are_found_by_their_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xsiam.losses.repeats._ROWS", 3)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-6, 7, (7, 2 + seed % 3), generator=generator)
    every = slice(0, 7)
    for found, anchors in ((repeats_of_anchors, True), (repeats_of_positives, False)):
        expected = slow_repeats(ids.tolist(), anchors)
        marks = found(ids, every)
        assert marks is not None
        assert expected.any()
        assert torch.equal(marks, expected)
        part = found(ids, slice(2, 5))
        assert part is not None
        assert torch.equal(part, expected[2:5])


@pytest.mark.parametrize("symmetric", [False, True])
def test_masked_candidates_are_out_of_the_sum_and_counted(symmetric: bool) -> None:
    # Pair 1 has the positive of pair 0, pair 2 the anchor of pair 0, one negative is a positive.
    ids = torch.tensor([[0, 10, 20], [1, 10, 21], [0, 12, 10], [3, 13, 23]])
    batch = random_batch(4, 1, text_ids=ids)
    forward, backward = slow_repeats(ids.tolist(), True), slow_repeats(ids.tolist(), False)
    assert (forward.sum(), backward.sum()) == (8, 5)  # counted by hand
    scores = cos_sim(batch.a, torch.cat([batch.b, batch.negatives[0]])) / 0.5
    terms = []
    for i in range(4):
        kept = [scores[i, c] for c in range(8) if not forward[i, c]]
        terms.append(torch.logsumexp(torch.stack(kept), 0) - scores[i, i])
    if symmetric:
        for i in range(4):
            kept = [scores[j, i] for j in range(4) if not backward[i, j]]
            terms.append(torch.logsumexp(torch.stack(kept), 0) - scores[i, i])
    objective = get_objective("contrastive", temperature=0.5, symmetric=symmetric)
    assert_same_loss_and_gradients(batch, objective(batch), torch.stack(terms).mean())
    count = objective.figures(batch)["masked_negatives"].item()
    assert count == 8 + (5 if symmetric else 0)


def test_a_batch_of_one_pair_repeated_has_no_loss_left() -> None:
    batch = random_batch(3, 0, text_ids=torch.tensor([[4, 5]] * 3))
    assert get_objective("contrastive")(batch).item() == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_shares_of_the_processes_average_to_the_loss_of_all(symmetric: bool) -> None:
    ids = torch.randint(0, 9, (7, 3), generator=torch.Generator().manual_seed(3))
    batch = random_batch(7, 1, text_ids=ids)
    objective = get_objective("contrastive", symmetric=symmetric)
    parts = [
        EmbeddedBatch(batch.a, batch.b, batch.negatives, None, ids, own, 3)
        for own in (slice(0, 2), slice(2, 3), slice(3, 7))
    ]
    mean = torch.stack([objective(part) for part in parts]).mean()
    assert_same_loss_and_gradients(batch, mean, objective(batch))
    counts = [objective.figures(part)["masked_negatives"].item() for part in parts]
    assert sum(counts) == objective.figures(batch)["masked_negatives"].item() > 0


# ---------------------------------------------------------------- distillation


def slow_distillation(batch: EmbeddedBatch, similarity: str) -> torch.Tensor:
    """Return the loss by its definition, one pair of texts at a time."""
    assert batch.teacher is not None
    ours = [text for pair in zip(batch.a, batch.b, strict=True) for text in pair]
    theirs = batch.teacher.double().flatten(0, 1)

    def error(x: int, y: int) -> torch.Tensor:
        score = torch.dot(ours[x], ours[y])
        if similarity == "cos":
            score = score / (ours[x].norm() * ours[y].norm())
        return (score - torch.dot(theirs[x], theirs[y])).square()

    every = [error(x, y) for x, y in itertools.combinations(range(len(ours)), 2)]
    pairs = [error(2 * i, 2 * i + 1) for i in range(len(batch.a))]
    return (torch.stack(every).mean() + torch.stack(pairs).mean()) / 2


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_distillation_is_its_definition(similarity: str, n: int) -> None:
    batch = random_batch(n, 0, teacher=teacher_of(n, similarity))
    expected = slow_distillation(batch, similarity)
    assert_same_loss_and_gradients(
        batch, get_objective("distillation", similarity)(batch), expected
    )


def test_distillation_by_hand() -> None:
    """Pairs score 24 and 0, the other texts 3 and 3 (of one side), 4 and 4; the teacher's are 1."""
    batch = EmbeddedBatch(A[:2], B[:2], teacher=torch.ones(2, 2, 1))
    expected = ((23**2 + 1 + 2 * 2**2 + 2 * 3**2) / 6 + (23**2 + 1) / 2) / 2
    assert get_objective("distillation", "dot")(batch).item() == pytest.approx(expected)


@pytest.mark.parametrize("similarity", ["cos", "dot"])
def test_scores_of_the_teacher_in_other_dimensions_have_no_loss(similarity: str) -> None:
    batch = random_batch(4, 0)
    turned = torch.linalg.qr(torch.randn(9, 5, dtype=torch.float64)).Q.T
    vectors = torch.stack([batch.a, batch.b], dim=1).detach() @ turned
    if similarity == "cos":
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    batch = EmbeddedBatch(batch.a, batch.b, teacher=vectors)
    assert get_objective("distillation", similarity)(batch).item() < 1e-24  # measured: 3e-30


@pytest.mark.parametrize("similarity", ["cos", "dot"])
def test_shares_of_distillation_average_to_the_loss_of_all(similarity: str) -> None:
    batch = random_batch(7, 0, teacher=teacher_of(7, similarity))
    objective = get_objective("distillation", similarity)
    parts = [
        EmbeddedBatch(batch.a, batch.b, own=own, n_processes=3, teacher=batch.teacher)
        for own in (slice(0, 2), slice(2, 3), slice(3, 7))
    ]
    mean = torch.stack([objective(part) for part in parts]).mean()
    assert_same_loss_and_gradients(batch, mean, slow_distillation(batch, similarity))


# ---------------------------------------------------------------- matryoshka


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_matryoshka_is_the_sum_of_the_losses_of_cut_embeddings(name: str, similarity: str) -> None:
    objective = get_objective(name, similarity)
    whole = complete(name, random_batch(4, 2))
    expected = []
    for dim, weight in ((5, 1.0), (2, 0.25), (3, 2.0)):
        a, b, *negatives = (vectors[:, :dim].clone() for vectors in columns_of(whole))
        part = EmbeddedBatch(a, b, tuple(negatives), whole.labels, teacher=whole.teacher)
        expected.append(weight * objective(part))
    ours = Matryoshka([5, 2, 3], [1.0, 0.25, 2.0]).loss(objective, whole)
    assert_same_loss_and_gradients(whole, ours, torch.stack(expected).sum())
    assert Matryoshka([5]).loss(objective, whole).item() == objective(whole).item()


def test_matryoshka_by_hand() -> None:
    """Cosines are 0.96, 0, 1 with two dimensions and 1, 0, 0 with one, where vectors of 0 are."""
    batch = EmbeddedBatch(A, B, (), torch.zeros(3))
    expected = 2 * (0.96**2 + 1) / 3 + 3 * 1 / 3
    loss = Matryoshka([2, 1], [2.0, 3.0]).loss(get_objective("mse_cosine"), batch)
    assert loss.item() == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("dims", "weights", "match"),
    [
        ([], None, r"`dims` to be different.*but got \[\]. Set `objective.dims`"),
        ([8, 8], None, r"`dims` to be different.*but got \[8, 8\]"),
        ([8, 0], None, r"`dims` to be different.*but got \[8, 0\]"),
        (
            [8, 4],
            [1.0],
            r"`dim_weights` to be 2 positive.*got \[1.0\]. Set `objective.dim_weights`",
        ),
        ([8, 4], [1.0, 0.0], r"`dim_weights` to be 2 positive numbers.*but got \[1.0, 0.0\]"),
        ([8, 4], [1.0, math.nan], r"`dim_weights`.*but got \[1.0, nan\]"),
        (
            None,
            [1.0],
            r"`dims` for `dim_weights`, but got \[1.0\] without any. Set `objective.dims`",
        ),
    ],
)
def test_wrong_dimensions_are_refused(
    dims: list[int] | None, weights: list[float] | None, match: str
) -> None:
    with pytest.raises(InputError, match=match):
        matryoshka_of(dims, weights)


def test_dimensions_are_those_of_the_embedding() -> None:
    Matryoshka([4, 8]).check(8)
    match = r"at most 8 dimensions as its largest, but got \[9, 8\]. Set `objective.dims`"
    with pytest.raises(InputError, match=match):
        Matryoshka([9, 8]).check(8)
    match = r"the whole embedding of 8 dimensions.*got \[4, 2\].*`model.truncate_dim`"
    with pytest.raises(InputError, match=match):
        Matryoshka([4, 2]).check(8)


# ---------------------------------------------------------------- registry


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"got 'mse_dots'. Did you mean 'mse_dot'\?"):
        get_objective("mse_dots")


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        (
            "mse_cosine",
            {"temperature": 0.1},
            r"'mse_cosine' \(none\), but got temperature=0.1. It is an option of contrastive. "
            r"Leave `objective.temperature` out",
        ),
        (
            "contrastive",
            {"margin": 1.0},
            r"\(temperature, symmetric\), but got margin=1.0.*triplet",
        ),
        ("triplet", {"scale": 2.0}, r"\(margin, distance\), but got scale=2.0.*cosent"),
        ("cosent", {"temprature": 2.0}, r"\(scale\), but got temprature=2.0. Leave"),
        ("contrastive", {"temperature": 0.0}, r"above 0, but got 0.0. Set `objective.temperature`"),
        ("contrastive", {"temperature": math.nan}, r"above 0, but got nan"),
        ("cosent", {"scale": -1.0}, r"`scale`.*but got -1.0. Set `objective.scale`"),
        ("triplet", {"margin": math.inf}, r"`margin`.*but got inf. Set `objective.margin`"),
        ("triplet", {"distance": "dot"}, r"cosine, euclidean, but got 'dot'. Set `objective.dist"),
    ],
)
def test_wrong_option_names_value_constraint_and_key(
    name: str, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        get_objective(name, **options)


def test_an_option_that_is_none_is_the_default() -> None:
    assert get_objective("triplet", scale=None, margin=None) == get_objective("triplet")


def test_another_objective_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xsiam.losses.base.OBJECTIVES", dict(OBJECTIVES))

    @register_objective
    class Distance(AbstractObjective):
        name = "distance"
        needs_label = False

        def loss(self, batch: EmbeddedBatch) -> torch.Tensor:
            return (batch.a - batch.b).norm(dim=-1).mean()

    assert isinstance(get_objective("distance"), Distance)
    with pytest.raises(InputError, match="'distance' is registered"):
        register_objective(Distance)
    assert inspect.isabstract(AbstractObjective)
