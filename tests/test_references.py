"""References: least squares in closed form, what a fitted vector keeps, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, TEXT_A, TEXT_B, TEXTS, WORDS, tiny_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling

from xsiam import PairAttributor, SiameseEncoder
from xsiam.errors import CheckpointError, ConvergenceWarning, InputError, ModelError
from xsiam.references import (
    FittedReference,
    MeanReference,
    TextReference,
    VectorReference,
    fit_reference,
    fitted,
    get_reference,
)
from xsiam.references.descent import minimise_in_ball
from xsiam.references.fitted import FitOptions
from xsiam.split import evaluation_mode

CORPUS = [" ".join(WORDS[i : i + n]) for n in (2, 4, 7) for i in range(0, 20, 3)]


def relative_size(encoder: SiameseEncoder) -> float:
    """|e(r)| over the mean |e(text)|."""
    with torch.no_grad(), evaluation_mode(encoder):
        features = encoder.preprocess(TEXTS)
        sizes = encoder.split.embed(features).norm(dim=1)
        return float(
            (encoder.reference.embedding(encoder.split, features).norm(dim=1)).max() / sizes.mean()
        )


# -- searches -----------------------------------------------------------------------------------


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    """[S, 2] to [S]."""
    return (10 * (x[:, 1] - x[:, 0] ** 2)) ** 2 + (1 - x[:, 0]) ** 2


def test_a_minimum_within_the_ball_is_found() -> None:
    start = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    values: list[float] = []
    found = minimise_in_ball(rosenbrock, start, 10.0, 100, on_step=values.append, target=1e-16)
    assert (found.x - 1).abs().max() < 1e-6
    assert (found.is_settled, found.at_bound) == (True, False)
    assert values == sorted(values, reverse=True)
    short = minimise_in_ball(rosenbrock, start, 10.0, 12)
    assert not short.is_settled
    assert minimise_in_ball(rosenbrock, start, 10.0, 12, negligible=10.0).is_settled
    assert short.value > found.value


def test_searches_from_several_starts_are_their_own() -> None:
    """As if each were alone, however many are evaluated together."""
    starts = torch.tensor([[-1.2, 1.0], [3.0, -4.0], [0.5, 0.5]], dtype=torch.float64)
    alone = [minimise_in_ball(rosenbrock, start[None], 10.0, 9) for start in starts]
    together = minimise_in_ball(rosenbrock, starts, 10.0, 9)
    best = min(alone, key=lambda found: found.value)
    assert len({found.value for found in alone}) == 3
    assert torch.allclose(together.x, best.x, rtol=1e-12)
    # after a first look only the best of them goes on, with the curvature that it has learned
    evaluated = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        evaluated.append(len(x))
        return rosenbrock(x)

    first = [minimise_in_ball(rosenbrock, start[None], 10.0, 4).value for start in starts]
    (kept,) = [start for start, value in zip(starts, first, strict=True) if value == min(first)]
    found = minimise_in_ball(counted, starts, 10.0, 30, first_look=4)
    assert set(evaluated) == {1, 3}
    own = minimise_in_ball(rosenbrock, kept[None], 10.0, 30)
    assert torch.allclose(found.x, own.x, rtol=1e-12)


def test_a_search_ends_where_nothing_lowers_the_value() -> None:
    at_minimum = torch.ones(1, 2, dtype=torch.float64)
    found = minimise_in_ball(rosenbrock, at_minimum, 10.0, 50)
    assert (found.iterations <= 1, found.is_settled, found.value) == (True, True, 0.0)
    stuck = minimise_in_ball(lambda x: 1 + x.square().sum(1), 0 * at_minimum + 1e-30, 10.0, 50)
    assert stuck.iterations < 50
    assert stuck.is_settled


def test_steps_to_where_the_function_is_not_finite_are_shortened() -> None:
    def barrier(x: torch.Tensor) -> torch.Tensor:
        return 10 + (x.square() - x[:, :1].log()).sum(1)  # NaN left of 0

    start = torch.tensor([[1e-3, 2.0]], dtype=torch.float64)
    found = minimise_in_ball(barrier, start, 10.0, 60)
    assert found.x.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_a_minimum_on_the_sphere_is_that_of_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    b = 5 * torch.randn(6, generator=generator, dtype=torch.float64)
    found = minimise_in_ball(
        lambda x: (x @ a.T - b).square().sum(1), torch.ones(1, 4, dtype=a.dtype) / 10, 0.5, 100
    )
    low, high = 0.0, 1e4  # the multiplier at which ridge regression has that norm
    for _ in range(200):
        middle = (low + high) / 2
        ridge = torch.linalg.solve(a.T @ a + middle * torch.eye(4, dtype=a.dtype), a.T @ b)
        low, high = (middle, high) if ridge.norm() > 0.5 else (low, middle)
    assert found.at_bound
    assert found.is_settled
    assert (found.x - ridge).norm() < 1e-4


# -- the fitted reference -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fitted_vector_has_a_smaller_embedding(architecture: str) -> None:
    model = tiny_model(architecture)
    encoder = SiameseEncoder(model, reference="fitted")
    report = encoder.reference.report
    uniform = SiameseEncoder(model, reference="uniform")
    assert report.residual < report.start_residual
    assert relative_size(encoder) < relative_size(uniform)
    assert report.norm <= 1 + 1e-9
    assert report.score_difference is None  # unknown without texts
    with torch.no_grad(), evaluation_mode(encoder):
        features = encoder.preprocess(TEXTS[:1])
        shift = encoder.shift_of(features)[0]
        assert float(shift.norm()) == pytest.approx(report.residual, rel=1e-4)


def test_no_step_within_the_bound_lowers_it_much() -> None:
    """In float64: along the gradient and along random directions, whatever the size of the step."""
    encoder = SiameseEncoder(tiny_model("distilbert").double(), shift=False, reference="pad")
    reference = fit_reference(encoder)
    assert reference.report.converged
    features = encoder.preprocess(TEXTS[:1])
    length = features["input_ids"].shape[1]

    def size(c: torch.Tensor) -> torch.Tensor:
        return encoder.split.tail(features, 0, c.expand(1, length, -1)).norm()

    encoder.eval()
    c = reference.c.clone().requires_grad_()
    value = size(c)
    assert value.item() == pytest.approx(reference.report.residual, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, c)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(20, len(c), generator=generator, dtype=torch.float64)
    radius = c.detach().norm() / reference.report.norm  # what it may be
    with torch.no_grad():
        for direction in [-gradient, *directions]:
            for step in 10.0 ** torch.arange(-6, 0):
                moved = c + step * radius * direction / direction.norm()
                moved = moved * (radius / moved.norm()).clamp_max(1.0)
                assert size(moved) >= 0.98 * value


def test_a_seed_gives_one_vector() -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    one, two = fit_reference(encoder, seed=3), fit_reference(encoder, seed=3)
    assert torch.equal(one.c, two.c)
    assert one.label == two.label != fit_reference(encoder, max_norm=0.5).label


def test_weights_are_not_touched() -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    before = encoder.model_fingerprint
    fit_reference(encoder, CORPUS)
    assert encoder.model_fingerprint == before
    assert all(p.grad is None for p in encoder.parameters())


def test_texts_make_scores_be_kept() -> None:
    plain = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    without, with_texts = fit_reference(plain), fit_reference(plain, CORPUS)

    def change(reference) -> float:
        exact = SiameseEncoder(plain.model, reference=reference)
        n = len(CORPUS)
        pairs = [(i, j) for i in range(n) for j in range(i)]
        a, b = ([CORPUS[pair[side]] for pair in pairs] for side in (0, 1))
        return float((exact.score(a, b) - plain.score(a, b)).pow(2).mean().sqrt())

    assert change(with_texts) < 0.9 * change(without)
    assert with_texts.report.score_difference == pytest.approx(change(with_texts), rel=1e-3)
    assert with_texts.report.n_texts == len(set(CORPUS))


@pytest.mark.parametrize("similarity", ["cos", "dot"])
def test_its_shift_makes_an_exact_model_without_training(similarity: str) -> None:
    # Searches end elsewhere on other processors, with other floors of float32 along the paths.
    encoder = SiameseEncoder(tiny_model().double(), reference="fitted", similarity=similarity)
    norms = encoder.encode([TEXT_A, TEXT_B]).norm(dim=1)
    size = float(norms.prod()) if similarity == "dot" else 1.0
    for layer in (0, 2):
        result = PairAttributor(encoder, layer, tolerance=2e-5).attribute(TEXT_A, TEXT_B)
        assert result.converged
        assert abs(result.main_effects_a).max() == 0
        missing = (result.completeness_error_a + result.completeness_error_b) * size
        difference = abs(float(result.matrix.sum()) - result.score)
        assert difference <= missing + 1e-6 * size
        assert difference <= 1e-4 * float(result.matrix.abs().sum())
        assert result.reference == encoder.reference.label


def test_without_shift_the_intercept_is_smaller() -> None:
    def intercept(reference: str) -> float:
        encoder = SiameseEncoder(tiny_model(), shift=False, reference=reference)
        return PairAttributor(encoder, 1).attribute(TEXT_A, TEXT_B).intercept

    assert 0 < intercept("fitted") < intercept("uniform")


# -- fitted once --------------------------------------------------------------------------------


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the fits."""
    own, calls = fitted.fit_vector, []

    def counted(*args, **options):
        calls.append(1)
        return own(*args, **options)

    monkeypatch.setattr(fitted, "fit_vector", counted)
    return calls


def test_a_model_is_fitted_when_it_is_explained_and_only_once(fits, tmp_path: Path) -> None:
    models = [tiny_model(), tiny_model(), tiny_model(seed=1)]
    plain, again, another = [
        SiameseEncoder(m, shift=False, reference=FittedReference(cache=tmp_path)) for m in models
    ]
    plain.score(TEXT_A, TEXT_B)
    assert not fits
    first = PairAttributor(plain, 1).attribute(TEXT_A, TEXT_B)
    assert len(fits) == 1
    second = PairAttributor(again, 1).attribute(TEXT_A, TEXT_B)  # read from disk
    assert len(fits) == 1
    assert torch.equal(first.matrix, second.matrix)
    assert first.reference == second.reference
    assert again.reference.report == plain.reference.report
    PairAttributor(another, 1).attribute(TEXT_A, TEXT_B)
    assert len(fits) == 2
    assert another.reference_label != plain.reference_label


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_search_shows_its_progress_in_a_terminal_only(
    is_terminal: bool, tmp_path: Path, monkeypatch
) -> None:
    shown, search = [], fitted.fit_vector

    def noted(*arguments, progress: bool, **options) -> FittedReference:
        shown.append(progress)
        return search(*arguments, **options)

    monkeypatch.setattr(fitted, "fit_vector", noted)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    SiameseEncoder(tiny_model(), reference=FittedReference(cache=tmp_path))
    assert shown == [is_terminal]


def test_other_choices_are_other_vectors(tmp_path: Path, monkeypatch) -> None:
    first = SiameseEncoder(tiny_model(), reference=FittedReference(cache=tmp_path))
    monkeypatch.setattr(fitted, "FitOptions", lambda: FitOptions(max_norm=0.5))
    shorter = SiameseEncoder(tiny_model(), reference=FittedReference(cache=tmp_path))
    assert first.reference.report.max_norm == 1.0
    assert shorter.reference.report.norm <= 0.5 + 1e-9


def test_a_damaged_file_of_fitted_vectors_is_refused(tmp_path: Path) -> None:
    SiameseEncoder(tiny_model(), reference=FittedReference(cache=tmp_path))
    (file,) = (tmp_path / "references").iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"Expected solved references in .* Delete .*"):
        SiameseEncoder(tiny_model(), reference=FittedReference(cache=tmp_path))


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "references").write_text("a file, not a folder")
    with pytest.warns(UserWarning, match=r"kept in memory only. Set `\$XSIAM_CACHE`"):
        encoder = SiameseEncoder(tiny_model(), reference=FittedReference(cache=tmp_path))
    assert encoder.reference.c is not None


def test_models_start_from_fitted(tmp_path: Path) -> None:
    tiny_model().save(str(tmp_path))
    for shift in (False, True):
        assert SiameseEncoder.from_pretrained(tmp_path, shift=shift).reference.name == "fitted"
        assert SiameseEncoder(tiny_model(), shift=shift).reference.name == "fitted"
    named = SiameseEncoder.from_pretrained(tmp_path, shift=False, reference="mask")
    assert named.reference.name == "mask"
    model = tiny_model()
    model[1] = Pooling(32, "mean_sqrt_len_tokens")
    with pytest.warns(UserWarning, match=r"'pad' is taken instead of 'fitted': .* it differs by"):
        other = SiameseEncoder(model, shift=False)
    assert other.reference.name == "pad"


# -- saved and loaded ---------------------------------------------------------------------------


REFERENCES = {
    "fitted": lambda encoder: fit_reference(encoder),
    "mean": lambda encoder: MeanReference.of(encoder, CORPUS),
    "text": lambda encoder: TextReference("the dog runs"),
}


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("shift", [True, False])
def test_references_are_saved_with_a_model(kind: str, shift: bool, tmp_path: Path) -> None:
    model = tiny_model(extra=[Normalize()])
    reference = REFERENCES[kind](SiameseEncoder(model, shift=False, reference="pad"))
    encoder = SiameseEncoder(model, shift=shift, reference=reference)
    encoder.save_pretrained(tmp_path / "export")
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    payload = {"xsiam": encoder.checkpoint_payload(), "state_dict": state}
    torch.save(payload, tmp_path / "x.ckpt")
    for path in (tmp_path / "export", tmp_path / "x.ckpt"):
        loaded = SiameseEncoder.from_pretrained(path)
        assert (loaded.shift, loaded.reference.label) == (shift, reference.label)
        assert (loaded.encode(TEXTS) - encoder.encode(TEXTS)).abs().max() < 1e-6
    if kind == "fitted":
        assert loaded.reference.report == reference.report
        double = SiameseEncoder.from_pretrained(tmp_path / "export", dtype=torch.float64)
        assert double.reference.label == reference.label


def test_the_folded_model_needs_nothing_of_ours(tmp_path: Path) -> None:
    encoder = SiameseEncoder(tiny_model(extra=[Normalize()]), reference="fitted")
    encoder.save_pretrained(tmp_path)
    kinds = [entry["type"] for entry in json.loads((tmp_path / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
    theirs = SentenceTransformer(str(tmp_path)).encode(list(TEXTS), convert_to_tensor=True)
    assert (theirs - encoder.encode(TEXTS)).abs().max() < 1e-6


def test_a_fold_that_was_trained_elsewhere_is_noticed(tmp_path: Path) -> None:
    SiameseEncoder(tiny_model(), reference="fitted").save_pretrained(tmp_path / "a")
    model = SentenceTransformer(str(tmp_path / "a"))
    with torch.no_grad():
        model[0].auto_model.encoder.layer[0].output.dense.weight.mul_(1.1)
    model.save(str(tmp_path / "b"), create_model_card=False)
    (tmp_path / "b" / "xsiam.json").write_bytes((tmp_path / "a" / "xsiam.json").read_bytes())
    with pytest.warns(UserWarning, match="no longer its own"):
        loaded = SiameseEncoder.from_pretrained(tmp_path / "b")
    assert not loaded.shift


def test_a_vector_of_another_model_is_refused() -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    reference = fit_reference(encoder)
    state = reference.state(encoder.split, encoder.preprocess(["dog"]))
    saved = FittedReference.from_state(json.loads(json.dumps(state)))
    assert SiameseEncoder(tiny_model(), reference=saved).reference.label == reference.label
    SiameseEncoder(tiny_model().double(), reference=saved)  # the same weights
    with pytest.raises(ModelError, match=r"differs by .* the weights are others. Fit it again"):
        SiameseEncoder(tiny_model(seed=1), reference=saved)
    narrow = VectorReference(torch.ones(16))
    with pytest.raises(ModelError, match="with the 32 dimensions of BertModel, but got 16"):
        SiameseEncoder(tiny_model(), reference=narrow)


# -- others -------------------------------------------------------------------------------------


def test_a_mean_is_that_of_the_texts_own_tokens() -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    rows = []
    with torch.no_grad(), evaluation_mode(encoder):
        for text in CORPUS:
            features = encoder.preprocess([text])
            rows.append(encoder.split.capture(features, 0)[0, 1:-1])
    expected = torch.cat(rows).double().mean(0)
    found = MeanReference.of(encoder, CORPUS, batch_size=5)
    assert (found.c - expected).abs().max() < 1e-6


def test_a_users_text_fills_other_lengths() -> None:
    encoder = SiameseEncoder(tiny_model(), reference=TextReference("dog runs"))
    features = encoder.preprocess(["a", "the cat sleeps in a house"])
    rows = encoder.reference.rows(encoder.split, features)
    ids = rows.features["input_ids"][rows.inverse]
    tokens = [encoder.tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    assert tokens[0][:3] == ["[CLS]", "dog", "[SEP]"]
    assert tokens[1] == ["[CLS]", *["dog", "runs"] * 3, "[SEP]"]
    assert set(tokens[0][3:]) == {"[PAD]"}


@pytest.mark.parametrize("name", ["mask", "unk"])
def test_special_tokens_fill_texts(name: str) -> None:
    encoder = SiameseEncoder(tiny_model(), reference=name)
    rows = encoder.reference.rows(encoder.split, encoder.preprocess(["the cat"]))
    tokens = encoder.tokenizer.convert_ids_to_tokens(rows.features["input_ids"][0].tolist())
    assert tokens == ["[CLS]", *[f"[{name.upper()}]"] * 2, "[SEP]"]


# -- bad input ----------------------------------------------------------------------------------


def test_wrong_references_are_named() -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    for name in ("max_norm", "n_starts", "max_iterations"):
        with pytest.raises(InputError, match=f"Expected `{name}` to be positive, but got 0"):
            fit_reference(encoder, **{name: 0})
    with pytest.raises(InputError, match="at least two different texts, but got 1"):
        fit_reference(encoder, ["dog", "dog"])
    with pytest.raises(InputError, match="row 1 is ''"):
        fit_reference(encoder, ["dog", ""])
    with pytest.raises(InputError, match=r'Pass `reference=TextReference\("…"\)`'):
        get_reference("text")
    with pytest.raises(InputError, match=r"MeanReference\.of\(encoder, texts\)"):
        SiameseEncoder(tiny_model(), reference="mean")
    with pytest.raises(InputError, match="entries that are not finite"):
        VectorReference(torch.tensor([1.0, float("nan")]))
    model = tiny_model()
    model[0].tokenizer.mask_token = None
    with pytest.raises(ModelError, match="with a mask token for reference 'mask'"):
        SiameseEncoder(model, reference="mask")


def test_a_model_of_other_lengths_is_refused_before_the_fit() -> None:
    model = tiny_model()
    model[1] = Pooling(32, "mean_sqrt_len_tokens")
    with pytest.raises(ModelError, match=r"the same for every length, but .* it differs by"):
        fit_reference(SiameseEncoder(model, shift=False, reference="pad"))


def test_a_fit_that_was_cut_short_says_so() -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    with pytest.warns(ConvergenceWarning, match="had not settled after 1 iterations"):
        reference = fit_reference(encoder, max_iterations=1)
    assert not reference.report.converged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        longer = fit_reference(encoder)
    assert longer.report.residual < reference.report.residual


def test_a_dense_behind_the_pooling_is_part_of_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = Dense(32, 16)
    encoder = SiameseEncoder(tiny_model(extra=[dense]), reference="fitted")
    assert encoder.reference.report.residual < encoder.reference.report.start_residual
    result = PairAttributor(encoder, 2, tolerance=1e-4).attribute(TEXT_A, TEXT_B)
    assert result.converged
