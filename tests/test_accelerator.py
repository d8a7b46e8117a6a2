"""Everything that computes, on a GPU, held against the processor in float64 or the same run there.

Skipped where there is no GPU; run with `pytest -m gpu`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import HEADS
from models import ARCHITECTURES, MORE_ARCHITECTURES, TEXT_A, TEXT_B, TEXTS, tiny_model
from sentence_transformers.base.modules import Dense
from test_evaluation import evaluate
from test_evaluation import inputs as inputs  # a fixture
from test_training import train, write_pairs

from xsiam import PairAttributor, SiameseEncoder
from xsiam.errors import ConvergenceWarning
from xsiam.index import TokenVectorIndex
from xsiam.modes import MODES
from xsiam.paths import PathGroup
from xsiam.references import NeutralReference, neutral
from xsiam.windows import WindowedAttributor

DEVICE = "cuda"
pytestmark = pytest.mark.gpu
# Entries relative to the largest: kernels of both machines differ by rounding only.
FLOAT64, FLOAT32, FLOAT32_INSIDE = 1e-10, 2e-4, 2e-3
FORCED = tuple(mode for mode in MODES if mode != "auto")
PAIRS = [(TEXT_A, TEXT_B), ("dog", TEXTS[3]), (TEXTS[3], "dog"), (TEXT_B, TEXTS[3])]
FIXED = {"quadrature": "gauss_legendre", "n_nodes": 6}


def encoder_of(device: str, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = tiny_model(options.pop("architecture", "bert"), **options.pop("model", {}))
    settings = {"shift": False, "reference": "pad"} | options
    return SiameseEncoder(model, **settings).to(device=device, dtype=dtype)


def results_of(encoder: SiameseEncoder, layer: int, **options: Any) -> Any:
    texts_a, texts_b = (list(texts) for texts in zip(*PAIRS, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return PairAttributor(encoder, layer, **options).attribute(texts_a, texts_b)


def vectors_of(attributor: PairAttributor, texts: list[str]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return attributor.token_vectors(texts)


def assert_same(ours: Any, others: Any, tolerance: float) -> None:
    for one, other in zip(ours, others, strict=True):
        for name in ("matrix", "main_effects_a", "main_effects_b"):
            found, expected = getattr(one, name), getattr(other, name)
            scale = float(other.matrix.abs().max())
            assert float((found - expected).abs().max()) <= tolerance * scale, name
        assert one.score == pytest.approx(other.score, abs=tolerance)
        assert one.tokens_a == other.tokens_a


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_matrices_are_those_of_the_processor(architecture: str, layer: int) -> None:
    """By a fixed rule, so that both take the same nodes."""
    mine, other = (
        results_of(encoder_of(device, architecture=architecture), layer, **FIXED)
        for device in (DEVICE, "cpu")
    )
    is_mixed = architecture.startswith(("qwen", "t5", "modernbert"))  # float32 inside
    assert_same(mine, other, FLOAT32_INSIDE if is_mixed else FLOAT64)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("mode", FORCED)
def test_every_mode_is_that_of_the_processor(mode: str, shift: bool) -> None:
    for layer in (0, 2):
        mine, other = (
            results_of(encoder_of(device, shift=shift), layer, mode=mode, **FIXED)
            for device in (DEVICE, "cpu")
        )
        assert_same(mine, other, FLOAT64)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("architecture", ["bert", "mpnet"])
def test_float32_meets_its_tolerance(architecture: str, layer: int) -> None:
    exact = results_of(encoder_of("cpu", architecture=architecture), layer, tolerance=1e-5)
    encoder = encoder_of(DEVICE, architecture=architecture, dtype=torch.float32)
    found = results_of(encoder, layer, tolerance=1e-3)
    for one in found:
        assert one.converged
        assert one.completeness_error <= 1e-3
        assert abs(float(one.bordered().sum()) + one.residual - one.score) < 1e-4
    assert_same(found, exact, 2e-2)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_tf32_of_the_session_does_not_reach_exact_numbers(precision: str) -> None:
    encoder = encoder_of(DEVICE, dtype=torch.float32)
    expected = results_of(encoder_of("cpu"), 1, **FIXED)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert_same(results_of(encoder, 1, **FIXED), expected, FLOAT32)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_rounded_factors_are_counted_in_the_errors() -> None:
    encoder = encoder_of(DEVICE, dtype=torch.float32)
    attributor = PairAttributor(encoder, 1, tolerance=1e-2)
    vectors = attributor.token_vectors(list(TEXTS))
    truth = PairAttributor(encoder_of("cpu"), 1, tolerance=1e-6).token_vectors(list(TEXTS))
    for one, other in zip(vectors, truth, strict=True):
        assert one.converged
        size = float(other.delta.norm())
        error = float((one.vectors - other.vectors).norm(dim=0).max()) / size
        assert error <= 3 * max(one.token_error, 1e-6)


def test_bfloat16_shows_its_error() -> None:
    exact = results_of(encoder_of("cpu"), 2, tolerance=1e-6)
    found = results_of(encoder_of(DEVICE, dtype=torch.bfloat16), 2, tolerance=1e-3)
    for one, other in zip(found, exact, strict=True):
        assert one.completeness_error > 1e-5
        assert float((one.matrix - other.matrix).abs().max()) <= 0.3


def test_memory_stays_within_the_budget() -> None:
    """Of all that evaluations hold beyond the model; results on the device are small."""
    shape = {"model": {"seed": 1}}
    words = " ".join(["the small dog chases a cat in the garden"] * 6)
    encoder = encoder_of(DEVICE, dtype=torch.float32, **shape)
    texts = [f"{words} {end}" for end in ("dog", "cat", "kitten", "house")]
    peaks, vectors = {}, {}
    for budget in (2 * 2**20, 16 * 2**20):
        attributor = PairAttributor(encoder, 0, memory_budget=budget, **FIXED)
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        vectors[budget] = vectors_of(attributor, texts)
        peaks[budget] = torch.cuda.max_memory_allocated() - base
    few, many = peaks.values()
    assert few < many <= 16 * 2**20 + 8 * 2**20
    for one, other in zip(*vectors.values(), strict=True):
        difference = (one.vectors - other.vectors).abs().max()
        assert float(difference) <= FLOAT32 * float(other.vectors.abs().max())


def test_memory_that_runs_out_halves_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own error, from an allocator that was given little."""
    encoder = encoder_of(DEVICE, dtype=torch.float32)
    words = " ".join(["the small dog chases a cat in the garden"] * 6)
    expected = vectors_of(PairAttributor(encoder, 0, **FIXED), [words])[0].vectors
    own, seen = PathGroup._derivatives, []

    def derivatives(self: PathGroup, rows: Any, alphas: Any, at_once: int, rounded: bool) -> Any:
        try:
            if at_once * len(rows) > 8:
                torch.empty(2**50, dtype=torch.uint8, device=self.start.device)
        except torch.OutOfMemoryError as error:
            seen.append(str(error))
            raise
        return own(self, rows, alphas, at_once, rounded)

    monkeypatch.setattr(PathGroup, "_derivatives", derivatives)
    found = vectors_of(PairAttributor(encoder, 0, **FIXED), [words])[0].vectors
    assert seen
    assert float((found - expected).abs().max()) <= FLOAT32 * float(expected.abs().max())


def test_an_index_is_that_of_the_processor(tmp_path: Path) -> None:
    matrices = {}
    for device in (DEVICE, "cpu"):
        attributor = PairAttributor(encoder_of(device), 2, **FIXED)
        built = TokenVectorIndex.build(attributor, list(TEXTS), tmp_path / device, shard_size=3)
        matrices[device] = [r.matrix for r in built.explain("a cat sleeps", [0, 1, 2, 3])]
    for ours, other in zip(*matrices.values(), strict=True):
        assert float((ours - other).abs().max()) <= 1e-6 * float(other.abs().max())


def test_windows_are_those_of_the_processor() -> None:
    text = " ".join(["the small dog chases a cat in the garden ."] * 4)
    found = []
    for device in (DEVICE, "cpu"):
        attributor = PairAttributor(encoder_of(device), 2, tolerance=1e-5)
        found.append(WindowedAttributor(attributor, window=20, overlap=4).attribute(text, TEXT_B))
    assert float((found[0].attribution.matrix - found[1].attribution.matrix).abs().max()) <= 1e-4
    assert found[0].score == pytest.approx(found[1].score, abs=FLOAT64)


@pytest.mark.parametrize("reference", ["mask", "uniform", "fitted"])
def test_references_shift_as_on_the_processor(reference: str) -> None:
    scores = {}
    for device in (DEVICE, "cpu"):
        with warnings.catch_warnings():  # a random model may have no small e(c)
            warnings.simplefilter("ignore", ConvergenceWarning)
            encoder = encoder_of(device, shift=True, reference=reference)
        scores[device] = encoder.score([TEXT_A, "dog"], [TEXT_B, TEXTS[3]])
        report = results_of(encoder, 1, **FIXED)[0]
        assert abs(float(report.matrix.sum()) + report.residual - report.score) < 1e-6
    if reference != "fitted":  # rounding leads fits elsewhere
        assert torch.allclose(scores[DEVICE].cpu(), scores["cpu"].cpu(), atol=1e-8)


def test_neutral_references_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neutral, "LIMIT", 0.99)  # random blocks map few states near to nothing
    reports = {}
    for device in (DEVICE, "cpu"):
        encoder = encoder_of(device, reference=NeutralReference(tmp_path / device))
        result = PairAttributor(encoder, 2).attribute(TEXT_A, TEXTS[2])
        assert abs(float(result.bordered().sum()) + result.residual - result.score) < 1e-4
        reports[device] = encoder.reference.report(encoder.split, 2)[0]
    assert reports[DEVICE].residual == pytest.approx(reports["cpu"].residual, rel=0.5)


def test_heads_and_dense_are_those_of_the_processor() -> None:
    for name in HEADS:
        ours, other = HEADS[name]().to(DEVICE), HEADS[name]()
        assert_same(results_of(ours, 2, **FIXED), results_of(other, 2, **FIXED), FLOAT64)
    torch.manual_seed(0)
    dense = Dense(32, 16)
    ours, other = (
        results_of(encoder_of(device, model={"extra": [dense]}), 1, **FIXED)
        for device in (DEVICE, "cpu")
    )
    assert_same(ours, other, FLOAT64)


@pytest.mark.parametrize(
    "more",
    [
        ["model.reference=uniform", "trainer.precision=32-true"],
        ["data.length_bucketing=true", "objective.chunk_size=4"],
        ["bend.weight=0.1"],
    ],
    ids=["plain", "chunks", "bend"],
)
def test_training_runs_and_goes_on(inputs: Path, tmp_path: Path, more: list[str]) -> None:
    for seed, (name, n) in enumerate({"train": 45, "validation": 23, "test": 21}.items()):
        write_pairs(inputs / f"{name}.csv", n, seed)
    given = ["trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "attribution.layers=[2]"]
    first = train(inputs, tmp_path / "run", *given, *more)
    converged = [v for k, v in first.metrics.items() if k.endswith("layer_2/converged_fraction")]
    assert converged
    assert set(converged) == {1.0}
    assert any("spearman" in key for key in first.metrics)
    more = [*more, "trainer.max_epochs=3", f"resume={first.last_checkpoint}"]
    resumed = train(inputs, tmp_path / "run", *given, *more)
    best = SiameseEncoder.from_pretrained(resumed.best_checkpoint, device=DEVICE)
    assert best.device.type == DEVICE


def test_an_evaluation_is_that_of_the_processor(inputs: Path, tmp_path: Path) -> None:
    found = {}
    for accelerator in ("gpu", "cpu"):
        more = [f"accelerator={accelerator}", "model.reference=uniform"]
        result = evaluate(inputs, tmp_path / accelerator, *more)
        found[accelerator] = result.metrics
    keys = [key for key in found["cpu"] if "spearman" in key or "pearson" in key]
    assert len(keys) == 4
    for key in keys:
        assert found["gpu"][key] == pytest.approx(found["cpu"][key], abs=1e-3), key
