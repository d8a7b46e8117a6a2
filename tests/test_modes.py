"""Three modes, one answer; the planner, caches, and memory that runs out."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from models import TEXT_A, TEXT_B, TEXTS, tiny_model

from xsiam import PairAttributor, SiameseEncoder
from xsiam.errors import InputError
from xsiam.memory import is_out_of_memory
from xsiam.modes import MODES, is_reverse, pulled_sides
from xsiam.paths import PathGroup

FLOAT64 = 1e-11
FORCED = tuple(mode for mode in MODES if mode != "auto")


def attributed(mode: str, *, model=None, texts=(TEXT_A, TEXT_B), layer: int = 1, **options):
    encoder = SiameseEncoder(
        (model or tiny_model()).double(), shift=options.pop("shift", False), reference="pad"
    )
    rule = {"quadrature": "gauss_legendre", "n_nodes": 6}
    options = (rule if "tolerance" not in options else {}) | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PairAttributor(encoder, layer, mode=mode, **options).attribute(*texts)


@pytest.mark.parametrize("texts", [(TEXT_A, TEXT_B), ("dog", TEXTS[3]), (TEXTS[3], "dog")])
@pytest.mark.parametrize(("shift", "pooling"), [(True, "mean"), (False, "mean"), (False, "max")])
@pytest.mark.parametrize("mode", ["reverse", "mixed"])
def test_every_mode_gives_the_same_numbers(mode: str, texts, shift: bool, pooling: str) -> None:
    options = {"texts": texts, "shift": shift}
    forward = attributed("forward", model=tiny_model(pooling=pooling), **options)
    other = attributed(mode, model=tiny_model(pooling=pooling), **options)
    for name in ("matrix", "main_effects_a", "main_effects_b"):
        assert (getattr(forward, name) - getattr(other, name)).abs().max() < FLOAT64
    for name in ("intercept", "residual", "score", "attributed_score", "convergence_delta"):
        assert getattr(forward, name) == pytest.approx(getattr(other, name), abs=FLOAT64)
    for name in ("completeness_error_a", "completeness_error_b", "n_nodes_a", "n_nodes_b"):
        assert getattr(forward, name) == pytest.approx(getattr(other, name), abs=FLOAT64)


@pytest.mark.parametrize("mode", FORCED)
def test_every_mode_meets_a_tolerance(mode: str) -> None:
    result = attributed(mode, tolerance=1e-6, texts=("dog", TEXTS[3]))
    assert result.converged
    assert result.completeness_error <= 1e-6
    assert abs(result.residual) < 1e-5
    assert math.isnan(result.token_error_b) == (mode == "mixed")
    assert math.isnan(result.token_error) == (mode == "mixed")
    assert result.token_error_a <= 1e-6


def test_features_of_a_token_pair_sum_to_its_entry() -> None:
    encoder = SiameseEncoder(tiny_model(pooling="cls").double(), reference="pad")
    options = {"quadrature": "gauss_legendre", "n_nodes": 16}
    matrix = PairAttributor(encoder, 1, **options).attribute(TEXT_A, TEXT_B, progress=False).matrix
    pairs = [(2, 3), (0, 1), (2, 1)]
    features = PairAttributor(encoder, 1).attribute_features(TEXT_A, TEXT_B, pairs, n_nodes=16)
    assert features.matrices.shape == (3, 32, 32)
    for (i, j), entries in zip(pairs, features.matrices, strict=True):
        assert float(entries.sum()) == pytest.approx(float(matrix[i, j]), abs=FLOAT64)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"but got 'backward'. Set `mode`"):
        PairAttributor(SiameseEncoder(tiny_model(), reference="pad"), 1, mode="backward")


def test_the_planner_pulls_through_long_texts_that_serve_one_pair() -> None:
    lengths = {"query": 10, "a": 300, "b": 300, "c": 12}
    pairs = [("query", "a"), ("b", "query"), ("query", "c")]
    plan = {"lengths": lengths, "n_dimensions": 384}
    assert pulled_sides(pairs, mode="auto", token_errors=False, **plan) == [1, 0, None]
    assert pulled_sides(pairs, mode="auto", token_errors=True, **plan) == [None] * 3
    assert pulled_sides(pairs, mode="mixed", token_errors=True, **plan) == [1, 0, 1]
    cached = pulled_sides(pairs, mode="auto", token_errors=False, cached=["a"], **plan)
    assert cached == [None, 0, None]
    twice = pulled_sides([*pairs, ("c", "a")], mode="auto", token_errors=False, **plan)
    assert twice == [None, 0, None, None]
    assert [is_reverse("auto", length, 384) for length in (12, 512, 1024)] == [False, False, True]
    assert not is_reverse("auto", 1024, 384, factored=True)


def test_token_vectors_are_kept_until_the_weights_change(monkeypatch) -> None:
    encoder = SiameseEncoder(tiny_model().double(), reference="pad")
    attributor = PairAttributor(encoder, 1)
    evaluated = []
    sums = PathGroup.token_sums
    monkeypatch.setattr(
        PathGroup,
        "token_sums",
        lambda self, *args, **options: (evaluated.append(self.size), sums(self, *args, **options))[
            1
        ],
    )
    first = attributor.attribute(TEXT_A, TEXT_B)
    n_first = len(evaluated)
    again = attributor.attribute(TEXT_B, TEXT_A)
    assert len(evaluated) == n_first > 0
    assert (first.matrix - again.matrix.T).abs().max() < FLOAT64
    with torch.no_grad():
        encoder.model[0].auto_model.encoder.layer[2].output.dense.weight.mul_(1.5)
    changed = attributor.attribute(TEXT_A, TEXT_B)
    assert len(evaluated) > n_first
    assert changed.model_fingerprint != first.model_fingerprint
    assert (changed.matrix - first.matrix).abs().max() > 1e-3


def test_a_small_cache_drops_the_oldest(monkeypatch) -> None:
    attributor = PairAttributor(
        SiameseEncoder(tiny_model().double(), reference="pad"), 1, cache_size="5KB"
    )
    for text in TEXTS:
        attributor.token_vectors([text])
    kept = attributor._cache.keys(attributor.encoder.model_fingerprint)
    assert 0 < len(kept) < len(TEXTS)


class Crowded:
    """An evaluation that runs out of memory above some number of points or vectors."""

    def __init__(self, limit: int, error: Exception) -> None:
        self.limit, self.error, self.refused = limit, error, 0
        self.original = PathGroup._derivatives

    def __call__(self, group, rows, alphas, at_once, cotangents):
        if len(rows) * at_once > self.limit:
            self.refused += 1
            raise self.error
        return self.original(group, rows, alphas, at_once, cotangents)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"),
    ],
)
def test_evaluations_are_halved_where_memory_runs_out(monkeypatch, error: Exception) -> None:
    expected = attributed("forward")
    crowded = Crowded(7, error)
    monkeypatch.setattr(PathGroup, "_derivatives", lambda *args: crowded(*args))
    result = attributed("forward")
    assert crowded.refused > 0
    assert (result.matrix - expected.matrix).abs().max() < FLOAT64


def test_other_errors_and_hopeless_cases_are_raised(monkeypatch) -> None:
    crowded = Crowded(0, MemoryError("nothing left"))
    monkeypatch.setattr(PathGroup, "_derivatives", lambda *args: crowded(*args))
    with pytest.raises(MemoryError, match="nothing left"):
        attributed("forward")
    assert crowded.refused < 40
    crowded.error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        attributed("forward")
    assert not is_out_of_memory(crowded.error)


def test_bfloat16_shows_its_error() -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    exact = PairAttributor(encoder, 2, dtype=torch.float64, tolerance=1e-6)
    assert exact.attribute(TEXT_A, TEXT_B).completeness_error <= 1e-6
    rule = {"quadrature": "gauss_legendre", "n_nodes": 8}
    rough = PairAttributor(encoder, 2, dtype=torch.bfloat16, **rule)
    with pytest.warns(match="did not meet the tolerance"):
        result = rough.attribute(TEXT_A, TEXT_B)
    assert result.dtype == "bfloat16"
    assert result.matrix.dtype == torch.float32
    assert 1e-3 < result.completeness_error < 0.2
    assert not result.converged
    assert encoder.dtype == torch.float32
