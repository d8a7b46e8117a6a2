"""Texts with tokens absent: by protocol, with shifts, roles and prompts, and what is refused."""

from __future__ import annotations

import pytest
import torch
from models import TEXT_A, TEXT_B, WORDS, tiny_model

from xsiam import PairAttributor, SiameseEncoder
from xsiam.errors import InputError
from xsiam.perturbation import (
    Absence,
    embed_without,
    interactions,
    mean_state,
    pair_order,
    protocols_of,
    score_matrix,
    scores_without,
)
from xsiam.result import own_places
from xsiam.split import evaluation_mode

WORDS_A = TEXT_A.split()
TOLERANCE = 1e-9  # float64, other batches


def encoder_of(**options: object) -> SiameseEncoder:
    settings: dict[str, object] = {"shift": True, "reference": "pad", "similarity": "cos"}
    return SiameseEncoder(tiny_model().double(), **(settings | options))  # type: ignore[arg-type]


def holed(words: list[str], gone: set[int], protocol: str) -> str:
    """Return the text without some words, the first of which is token 1."""
    mask = ["[MASK]"] if protocol == "mask" else []
    return " ".join(w for k, word in enumerate(words, 1) for w in (mask if k in gone else [word]))


@pytest.mark.parametrize("protocol", ["mask", "drop"])
@pytest.mark.parametrize("similarity", ["cos", "dot"])
def test_shifted_embeddings_are_those_of_the_changed_texts(protocol: str, similarity: str) -> None:
    encoder = encoder_of(similarity=similarity)
    sets = [set(), {2}, {1, 5, 6}, {2}, {1, 2, 3, 4, 5}]
    found = embed_without(encoder, TEXT_A, sets, Absence(protocol))
    expected = encoder.encode([holed(WORDS_A, gone, protocol) for gone in sets])
    if similarity == "cos":
        ours = found.embedding / found.norm[:, None]
        assert torch.allclose(ours, torch.nn.functional.normalize(expected, dim=1), atol=TOLERANCE)
    else:
        assert torch.allclose(found.embedding, expected, atol=TOLERANCE)
        assert torch.equal(found.norm, torch.ones_like(found.norm))


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_mean_states_are_put_in_at_their_layer(layer: int) -> None:
    encoder = encoder_of()
    state = mean_state(encoder, [TEXT_A, TEXT_B], layer)
    gone = [1, 4]
    found = embed_without(encoder, TEXT_A, [gone], Absence("mean", layer, state))
    with torch.no_grad(), evaluation_mode(encoder):
        features = encoder.preprocess([TEXT_A])
        hidden = encoder.split.capture(features, layer).clone()
        hidden[0, gone] = state
        expected = encoder.split.tail(features, layer, hidden) - encoder.shift_of(features)
    assert torch.allclose(found.embedding, expected, atol=TOLERANCE)


def test_scores_of_unchanged_texts_are_the_model_s() -> None:
    encoder = encoder_of()
    result = PairAttributor(encoder, 2).attribute(TEXT_A, TEXT_B)
    state = mean_state(encoder, [TEXT_A], 2)
    for protocol in protocols_of(encoder):
        absence = Absence(protocol, 2, state)
        (score,) = scores_without(encoder, result, [[]], [[]], absence).tolist()
        assert score == pytest.approx(result.score, abs=TOLERANCE)


def test_texts_of_many_batches_are_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of()
    sets = [{k} for k in range(1, 11)]
    for protocol in ("mask", "drop"):
        whole = embed_without(encoder, TEXT_A, sets, Absence(protocol)).embedding
        with monkeypatch.context() as patch:
            patch.setattr("xsiam.perturbation._TOKENS_AT_ONCE", 30)
            parts = embed_without(encoder, TEXT_A, sets, Absence(protocol)).embedding
        assert torch.allclose(whole, parts, atol=TOLERANCE)


def test_prompts_are_no_words_of_a_text_and_stay() -> None:
    model = tiny_model(prompts={"query": "query : "}).double()
    encoder = SiameseEncoder(model, shift=True, reference="pad", similarity="cos")
    result = PairAttributor(encoder, 2).attribute("dog runs", "cat", "query", None)
    assert own_places(result) == ([3, 4], [1])
    found = interactions(encoder, result, Absence("mask"), ("query", None))
    assert found.shape == (2, 1)
    scores = encoder.score(
        ["dog runs", "[MASK] runs", "dog runs", "[MASK] runs"],
        ["cat", "cat", "[MASK]", "[MASK]"],
        "query",
    ).tolist()
    assert float(found[0, 0]) == pytest.approx(
        scores[0] - scores[1] - scores[2] + scores[3], abs=TOLERANCE
    )


def test_interactions_of_a_dot_product_are_products_of_differences() -> None:
    encoder = encoder_of(similarity="dot")
    result = PairAttributor(encoder, 2).attribute("dog runs", "a cat")
    found = interactions(encoder, result, Absence("drop"))
    a = encoder.encode(["dog runs", "runs", "dog"])
    b = encoder.encode(["a cat", "cat", "a"])
    assert torch.allclose(found, (a[0] - a[1:]) @ (b[0] - b[1:]).T, atol=TOLERANCE)


def test_scores_of_empty_embeddings_are_zero_as_in_pytorch() -> None:
    encoder = encoder_of(reference="mask")  # whose shift is a text of masks
    everything = range(1, 1 + len(WORDS_A))
    nothing = embed_without(encoder, TEXT_A, [everything], Absence("mask"))
    whole = embed_without(encoder, TEXT_B, [[]], Absence("mask"))
    assert float(nothing.norm) < TOLERANCE
    assert float(score_matrix(encoder, nothing, whole)) == pytest.approx(0.0, abs=1e-6)


def test_pairs_are_taken_by_falling_value_without_their_rows_and_columns() -> None:
    matrix = torch.tensor([[5.0, 4.0, 0.0], [4.5, -1.0, 3.0]])
    assert pair_order(matrix, 2) == [(0, 0), (1, 2)]
    assert pair_order(matrix, 1) == [(0, 0)]
    assert pair_order(matrix, 9) == [(0, 0), (1, 2)]
    assert pair_order(-matrix, 2) == [(1, 1), (0, 2)]


def test_matrices_are_left_as_they_are() -> None:
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    pair_order(matrix, 2)
    assert torch.equal(matrix, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_what_cannot_be_absent_is_refused() -> None:
    encoder = encoder_of()
    length = len(WORDS_A) + 2
    with pytest.raises(InputError, match=rf"positions below {length}.*got \[{length}\]"):
        embed_without(encoder, TEXT_A, [[length]], Absence("mask"))
    with pytest.raises(InputError, match=f"one of {length} tokens to be left"):
        embed_without(encoder, TEXT_A, [range(length)], Absence("drop"))
    with pytest.raises(InputError, match=r"among \('mask', 'drop', 'mean'\), but got 'gone'"):
        Absence("gone")
    with pytest.raises(InputError, match="`state` for the protocol 'mean'"):
        Absence("mean", 2)


def test_models_without_a_mask_token_have_the_other_protocols() -> None:
    encoder = SiameseEncoder(
        tiny_model("qwen2").double(), shift=False, reference="pad", similarity="cos"
    )
    assert encoder.tokenizer.mask_token_id is None
    assert protocols_of(encoder) == ("drop", "mean")
    with pytest.raises(InputError, match=r"has none\. Take 'drop' or 'mean'"):
        embed_without(encoder, WORDS[2], [[0]], Absence("mask"))
    text = "dog runs in"
    features = encoder.preprocess([text])
    kept = features["input_ids"].shape[1] - 1
    found = embed_without(encoder, text, [[kept]], Absence("drop"))
    shorter = encoder.tokenizer.decode(features["input_ids"][0, :kept])
    assert encoder.preprocess([shorter])["input_ids"].shape[1] == kept
    expected = encoder.encode([shorter])
    ours = found.embedding / found.norm[:, None]
    assert torch.allclose(ours, torch.nn.functional.normalize(expected, dim=1), atol=1e-6)
