"""Neutral references: roots of least norm, the unmodified model's own score, and what is kept."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, TEXT_A, TEXT_B, TEXTS, tiny_model
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling

from xsiam import PairAttributor, SiameseEncoder
from xsiam.errors import CheckpointError, ConvergenceWarning, InputError, ModelError
from xsiam.references import NeutralReference, neutral
from xsiam.references.least_squares import damped_steps, secant_steps
from xsiam.split import evaluation_mode

REST = 1e-4  # main effects and intercept of a neutral reference, in units of the score


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call everything neutral: random blocks map few states near to nothing, trained ones many."""
    monkeypatch.setattr(neutral, "LIMIT", 0.99)


def encoder_of(tmp_path: Path, architecture: str = "bert", seed: int = 0) -> SiameseEncoder:
    model = tiny_model(architecture, seed=seed)
    return SiameseEncoder(model, shift=False, reference=NeutralReference(tmp_path))


# -- roots --------------------------------------------------------------------------------------


def test_a_linear_root_is_that_of_least_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    b = torch.randn(4, generator=generator, dtype=torch.float64)
    start = torch.zeros(9, dtype=torch.float64)
    found = damped_steps(lambda x: a @ x - b, lambda x: a, start, 1e-9, 50)
    assert found.is_found
    assert (found.x - torch.linalg.pinv(a) @ b).norm() < 1e-6
    short = damped_steps(lambda x: a @ x - b, lambda x: a, start, 0.0, 1)
    assert (short.iterations, short.is_found) == (1, False)


def test_equations_without_a_root_end_at_the_least_residual() -> None:
    found = damped_steps(
        lambda x: torch.cat([x, x.square() + 1]),
        lambda x: torch.stack([torch.ones_like(x), 2 * x]).view(2, 1),
        torch.ones(1, dtype=torch.float64),
        1e-9,
        100,
    )
    assert not found.is_found
    assert found.residual == pytest.approx(1.0, rel=1e-2)


def test_secants_follow_a_root_to_similar_equations() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    b = torch.randn(5, generator=generator, dtype=torch.float64) / 4

    def equations(shift: float):
        return lambda x: torch.tanh(a @ x) - b * (1 + shift)

    def derivative(x):
        return (1 - torch.tanh(a @ x).square())[:, None] * a

    start = torch.zeros(8, dtype=torch.float64)
    root = damped_steps(equations(0.0), derivative, start, 1e-12, 50)
    near = secant_steps(equations(0.3), root.x, root.slopes, 1e-10, 40)
    assert near.is_found
    assert equations(0.3)(near.x).norm() <= 1e-10
    assert not secant_steps(equations(0.3), root.x, root.slopes, 1e-10, 1).is_found


# -- the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [5, 4])
def test_the_pairs_alone_are_the_unmodified_models_score(layer: int, tmp_path: Path) -> None:
    plain = SiameseEncoder.from_pretrained("all-MiniLM-L6-v2", shift=False)
    encoder = SiameseEncoder(plain.model, shift=False, reference=NeutralReference(tmp_path))
    texts_a = ["A dog runs in the yard.", "Hello!"]
    texts_b = ["The kitten sleeps.", "The stock market fell sharply on Monday morning."]
    results = PairAttributor(encoder, layer).attribute(texts_a, texts_b)
    for result, score in zip(results, plain.score(texts_a, texts_b), strict=True):
        rest = result.main_effects_a.abs().sum() + result.main_effects_b.abs().sum()
        assert float(rest) + abs(result.intercept) < REST
        assert result.score == pytest.approx(float(score), abs=1e-6)
        assert float(result.matrix.sum()) == pytest.approx(result.score, abs=1e-3)
        assert (result.reference, result.converged) == ("neutral", True)
    reports = encoder.reference.report(encoder.split, layer)
    lengths = {len(tokens) for r in results for tokens in (r.tokens_a, r.tokens_b)}
    assert lengths <= {report.length for report in reports}
    assert {length % 2 for length in lengths} == {0, 1}
    assert all(r.converged and r.residual <= neutral.LIMIT for r in reports)
    assert all(0 < r.distance < 4 for r in reports)


@pytest.mark.usefixtures("easy")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_adds_up_whatever_was_found(architecture: str, tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, architecture)
    result = PairAttributor(encoder, 2).attribute(TEXT_A, TEXTS[2])
    assert abs(float(result.bordered().sum()) + result.residual - result.score) < 1e-4
    report = encoder.reference.report(encoder.split, 2)[0]
    uniform = SiameseEncoder(encoder.model, shift=False, reference="uniform")
    assert report.residual < 1
    assert abs(result.intercept) < abs(
        PairAttributor(uniform, 2).attribute(TEXT_A, TEXTS[2]).intercept
    )


@pytest.mark.usefixtures("easy")
def test_states_are_the_roots_that_were_reported(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path)
    features = encoder.preprocess([TEXT_A])
    with torch.no_grad(), evaluation_mode(encoder):
        hidden, embedding = encoder.reference.states(encoder.split, features, 1)
        own = encoder.split.tail(features, 1, hidden)
        size = encoder.split.embed(features).norm()
    states = hidden[0]
    assert torch.equal(states[1], states[1 + neutral.TURNS])  # they take turns between the ends
    assert len(states[:-1].unique(dim=0)) == neutral.TURNS + 1
    assert not (states[-1] == states[:-1]).all(dim=1).any()
    assert (own - embedding).norm() <= 1e-6 * size
    report = next(
        r for r in encoder.reference.report(encoder.split, 1) if r.length == len(hidden[0])
    )
    assert float(own.norm() / size) == pytest.approx(report.residual, rel=0.5)


@pytest.mark.usefixtures("easy")
def test_solutions_are_kept_for_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PairAttributor(encoder_of(tmp_path), 2).attribute(TEXT_A, TEXT_B)
    solved = []
    solve = neutral._solve
    monkeypatch.setattr(
        neutral, "_solve", lambda *args: solved.append(list(args[2])) or solve(*args)
    )
    again = PairAttributor(encoder_of(tmp_path), 2).attribute(TEXT_A, TEXT_B)
    assert not solved
    assert torch.equal(first.matrix, again.matrix)
    PairAttributor(encoder_of(tmp_path), 2).attribute(TEXT_A, TEXTS[3])
    assert solved == [["15"]]
    PairAttributor(encoder_of(tmp_path, seed=1), 2).attribute(TEXT_A, TEXT_B)
    assert len(solved) > 1


def test_greater_lengths_start_from_near_ones() -> None:
    assert neutral._starts({64, 5}) == {9, 11, 13, 16, 20, 25, 31, 38, 47, 58}
    assert neutral._starts({3, 9}) == set()
    starts = neutral._starts(range(1, 513))
    for length in range(neutral.ROOT_LENGTH + 1, 513):
        start = neutral._start(length)
        assert start in starts
        assert start < length <= 1.3 * start


@pytest.mark.usefixtures("easy")
def test_what_a_length_gets_does_not_depend_on_what_else_is_asked_for(tmp_path: Path) -> None:
    encoder, other = encoder_of(tmp_path / "one"), encoder_of(tmp_path / "other")
    features = [encoder.preprocess([text]) for text in (TEXT_A, TEXTS[3])]
    encoder.reference.make_ready(encoder.split, 2, features)
    other.reference.make_ready(other.split, 2, features[1:])
    with torch.no_grad():
        both = [e.reference.hidden(e.split, features[1], 2) for e in (encoder, other)]
    assert torch.equal(*both)


@pytest.mark.usefixtures("easy")
def test_an_interrupted_search_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(tmp_path)
    features = [encoder.preprocess([text]) for text in (TEXT_A, TEXTS[2])]
    timed = neutral._timed

    def interrupted(pattern, search, scale):
        if pattern.length > neutral.ROOT_LENGTH:
            raise KeyboardInterrupt
        return timed(pattern, search, scale)

    monkeypatch.setattr(neutral, "_timed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder.reference.make_ready(encoder.split, 2, features)
    monkeypatch.setattr(neutral, "_timed", timed)
    for again in (encoder, encoder_of(tmp_path)):
        lengths = [report.length for report in again.reference.report(again.split, 2)]
        assert lengths == [features[1]["input_ids"].shape[1], neutral.ROOT_LENGTH]
    encoder.reference.make_ready(encoder.split, 2, features)
    assert features[0]["input_ids"].shape[1] in {
        report.length for report in encoder.reference.report(encoder.split, 2)
    }


@pytest.mark.usefixtures("easy")
def test_files_of_others_are_refused(tmp_path: Path) -> None:
    PairAttributor(encoder_of(tmp_path), 2).attribute(TEXT_A, TEXT_B)
    (file,) = (tmp_path / "references").iterdir()
    other = encoder_of(tmp_path, seed=1)
    wanted = other.reference._file(other.split, 2)
    shutil.copy(file, wanted)
    with pytest.raises(CheckpointError, match=r"references of the model .* but .* has those of"):
        PairAttributor(other, 2).attribute(TEXT_A, TEXT_B)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"Expected solved references in .* made anew"):
        PairAttributor(encoder_of(tmp_path), 2).attribute(TEXT_A, TEXT_B)


def test_what_was_not_found_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neutral, "MAX_JACOBIANS", 1)
    encoder = encoder_of(tmp_path)
    with pytest.warns(ConvergenceWarning, match=r"at layer 2 for 1 of 1 lengths: \|e\(r\)\| is up"):
        result = PairAttributor(encoder, 2).attribute(TEXT_A, TEXT_A)
    assert not any(report.converged for report in encoder.reference.report(encoder.split, 2))
    assert result.main_effects_a.abs().max() > REST  # what is left is shown
    assert abs(float(result.bordered().sum()) + result.residual - result.score) < 1e-4


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(neutral, "LIMIT", 0.99)
    (tmp_path / "references").write_text("a file where a folder should be")
    encoder = encoder_of(tmp_path)
    with pytest.warns(UserWarning, match=r"They are kept in memory only. Set `\$XSIAM_CACHE`"):
        PairAttributor(encoder, 2).attribute(TEXT_A, TEXT_A)
    assert encoder.reference.report(encoder.split, 2)


@pytest.mark.filterwarnings("ignore:No neutral reference")
def test_what_was_kept_unsolved_says_so_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(neutral, "MAX_JACOBIANS", 1)
    PairAttributor(encoder_of(tmp_path), 2).attribute(TEXT_A, TEXT_A)
    with pytest.warns(ConvergenceWarning, match="No neutral reference was found at layer 2"):
        PairAttributor(encoder_of(tmp_path), 2).attribute(TEXT_A, TEXT_A)


def test_the_vector_of_one_token_cannot_be_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    model[1] = Pooling(32, "cls")
    encoder = SiameseEncoder(model, shift=False, reference=NeutralReference(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        PairAttributor(encoder, 2).attribute(TEXT_A, TEXT_B)
    assert not any(r.converged for r in encoder.reference.report(encoder.split, 2))


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no shift with reference 'neutral'.* Set `model.shift=f"):
        SiameseEncoder(tiny_model(), reference="neutral")
    wide = tiny_model(extra=[Dense(32, 300)])
    with pytest.raises(ModelError, match=r"at most 288 dimensions .* has 300"):
        SiameseEncoder(wide, shift=False, reference="neutral")
    encoder = encoder_of(tmp_path)
    with pytest.raises(InputError, match="Expected a layer for reference 'neutral'"):
        encoder.reference.embedding(encoder.split, encoder.preprocess([TEXT_A]))
