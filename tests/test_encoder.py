"""Scores are sentence-transformers' own; shifts depend on a text alone; caches notice changes."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import ARCHITECTURES, REFERENCE_NAMES, TEXTS, tiny_model, tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from torch import nn

from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError, ModelError, TruncationWarning

PARITY = 1e-5  # worst measured 5e-7
BATCH = 1e-12  # relative to the norm, in float64; worst measured 3e-15

PROMPTS = {"query": "query : ", "document": "passage : ", "plain": ""}


def dense(activation: nn.Module, size: int = 24) -> Dense:
    torch.manual_seed(5)
    return Dense(32, size, activation_function=activation)


MODELS = {
    "mean": lambda: tiny_model(),
    "cls": lambda: tiny_model(pooling="cls"),
    "dense_tanh": lambda: tiny_model(extra=[dense(nn.Tanh())]),
    "normalize": lambda: tiny_model(extra=[Normalize()]),
    "inner_normalize": lambda: tiny_model(extra=[Normalize(), dense(nn.Identity())]),
    "dot_normalize": lambda: tiny_model(extra=[Normalize()], similarity_fn_name="dot"),
    "dot": lambda: tiny_model(similarity_fn_name="dot"),
    "truncated": lambda: tiny_model(extra=[Normalize()], truncate_dim=16),
    "truncated_dot": lambda: tiny_model(
        extra=[Normalize()], truncate_dim=16, similarity_fn_name="dot"
    ),
    "prompts": lambda: tiny_model(prompts=PROMPTS),
    "prompts_not_pooled": lambda: tiny_model(prompts=PROMPTS, include_prompt=False),
    "default_prompt": lambda: tiny_model(prompts=PROMPTS, default_prompt_name="query"),
}


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> SentenceTransformer:
    return MODELS[request.param]()


def own_scores(model: SentenceTransformer, role_a: str | None, role_b: str | None) -> torch.Tensor:
    encode = {None: model.encode, "query": model.encode_query, "document": model.encode_document}
    a = encode[role_a](list(TEXTS[:2]), convert_to_tensor=True)
    b = encode[role_b](list(TEXTS[2:]), convert_to_tensor=True)
    return model.similarity_pairwise(a, b)


@pytest.mark.parametrize("roles", [(None, None), ("query", "document")])
def test_unshifted_scores_are_the_models_own(model: SentenceTransformer, roles) -> None:
    encoder = SiameseEncoder(model, shift=False, reference="pad")
    encoder.check_parity()
    ours = encoder.score(TEXTS[:2], TEXTS[2:], *roles)
    assert (ours - own_scores(model, *roles)).abs().max() <= PARITY * ours.abs().max()


def test_unshifted_embeddings_are_the_models_own(model: SentenceTransformer) -> None:
    ours = SiameseEncoder(model, shift=False, reference="pad").encode(TEXTS)
    theirs = model.encode(list(TEXTS), convert_to_tensor=True)
    assert (ours - theirs).abs().max() <= PARITY * theirs.abs().max()


@pytest.mark.parametrize("reference", REFERENCE_NAMES)
def test_an_embedding_depends_on_no_other_text(model: SentenceTransformer, reference: str) -> None:
    encoder = SiameseEncoder(model.double(), reference=reference)
    words = [
        "the",
        "dog",
        "cat",
        "runs",
        "in",
        "a",
        "big",
        "house",
        "and",
        "sleeps",
        "not",
        "by",
        "garden",
    ]
    texts = [
        " ".join(words[i % 13] for i in range(start, start + 1 + start % 20)) for start in range(63)
    ]
    alone = encoder.encode(TEXTS[0])
    batched = encoder.encode([*texts, TEXTS[0]], batch_size=64)[-1:]
    assert (alone - batched).norm() <= BATCH * alone.norm()
    features = encoder.preprocess([TEXTS[0]])
    padding = {
        key: nn.functional.pad(value, (0, 9), value=int(key == "special_tokens_mask"))
        for key, value in features.items()
        if isinstance(value, torch.Tensor) and value.ndim == 2
    }
    encoder.eval()
    with torch.no_grad():
        padded = encoder({**features, **padding})
    assert (alone - padded).norm() <= BATCH * alone.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reference", REFERENCE_NAMES)
def test_the_reference_itself_embeds_to_zero(architecture: str, reference: str) -> None:
    encoder = SiameseEncoder(tiny_model(architecture), reference=reference)
    features = encoder.preprocess([TEXTS[0]])
    encoder.eval()
    with torch.no_grad():
        hidden = encoder.reference.hidden(encoder.split, features, 0)
        at_reference = encoder.split.tail(features, 0, hidden) - encoder.shift_of(features)
        text = encoder.split.embed(features)
    assert at_reference.norm() <= 1e-5 * text.norm()
    assert (encoder.encode(TEXTS[0]) - text).norm() > 1e-2 * text.norm()


def test_each_text_is_shifted_by_a_reference_of_its_own_length() -> None:
    encoder = SiameseEncoder(tiny_model().double(), reference="pad")
    features = encoder.preprocess(TEXTS)
    encoder.eval()
    with torch.no_grad():
        shift = encoder.shift_of(features)
    lengths = features["attention_mask"].sum(1)
    for row, length in enumerate(lengths.tolist()):
        ids = torch.tensor([[2, *[0] * (length - 2), 3]])
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            expected = encoder.split.embed(alone)[0]
        assert (shift[row] - expected).norm() <= BATCH * expected.norm()
    assert (shift[0] - shift[2]).norm() > 1e-3  # lengths differ, and so do the references


def test_training_shift_has_gradients_and_no_dropout() -> None:
    encoder = SiameseEncoder(tiny_model(dropout=0.5), reference="uniform").train()
    features = encoder.preprocess(TEXTS)
    torch.manual_seed(0)
    first = encoder.shift_of(features)
    second = encoder.shift_of(features)
    assert torch.equal(first, second)
    assert first.requires_grad
    assert all(module.training for module in encoder.model.modules())
    assert not torch.equal(encoder(features), encoder(features))  # the texts do have dropout


CHANGES = {
    "optimizer": lambda p: (
        torch.optim.SGD([p], 0.5).step() if p.grad is not None else p.data.add_(1)
    ),
    "data_in_place": lambda p: p.data.mul_(-1),
    "data_replaced": lambda p: setattr(p, "data", p.data.clone() * 2),
    "permuted": lambda p: p.data.copy_(p.data.flip(0)),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("reference", REFERENCE_NAMES)
def test_the_reference_cache_notices_changed_weights(change: str, reference: str) -> None:
    model = tiny_model()
    encoder = SiameseEncoder(model, reference=reference)
    encoder.encode(TEXTS)
    fingerprint = encoder.model_fingerprint
    parameter = model[0].auto_model.encoder.layer[1].output.dense.weight
    CHANGES[change](parameter)
    fresh = SiameseEncoder(model, reference=reference)
    assert (encoder.encode(TEXTS) - fresh.encode(TEXTS)).abs().max() < 1e-6
    assert encoder.model_fingerprint != fingerprint


@pytest.mark.parametrize("piece", [100, 2**17])
def test_one_changed_number_is_noticed_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Weights are looked at in pieces; this one holds 1536 numbers."""
    monkeypatch.setattr("xsiam.weights._PIECE", piece)
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    numbers = encoder.model[0].auto_model.encoder.layer[1].output.dense.weight.data.view(-1)
    known = encoder.split.weights.key()
    assert encoder.split.weights.key() == known
    for place in (0, 99, 100, 1499, len(numbers) - 1):
        numbers[place] += 0.01
        changed = encoder.split.weights.key()
        assert changed != known, place
        known = changed


def test_the_reference_cache_is_used() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    calls = []
    embed = encoder.reference.embed_rows
    encoder.reference.embed_rows = lambda *args: calls.append(1) or embed(*args)
    encoder.encode(TEXTS)
    encoder.encode(TEXTS)
    assert len(calls) == 1


def test_modes_are_left_as_they_were() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad").train()
    encoder.model[0].auto_model.encoder.layer[0].eval()
    before = [module.training for module in encoder.modules()]
    encoder.encode(TEXTS)
    encoder.freeze_unused_parameters()
    assert [module.training for module in encoder.modules()] == before


def test_unused_parameters_are_frozen_and_used_ones_are_not() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    frozen = encoder.freeze_unused_parameters()
    assert frozen
    assert all("pooler" in name for name in frozen)
    encoder.train()(encoder.preprocess(TEXTS)).sum().backward()
    trained = [n for n, p in encoder.named_parameters() if p.requires_grad]
    assert [n for n in trained if dict(encoder.named_parameters())[n].grad is None] == []


def test_truncation_warns_with_the_number_of_tokens() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    long = " ".join(["dog"] * 100)
    with pytest.warns(TruncationWarning, match="1 of 2 texts are longer .* 64 tokens; up to 38 "):
        encoder.encode([long, "dog"])
    with pytest.warns(TruncationWarning):
        encoder.preprocess([long])
    with warnings.catch_warnings():  # the same length again, in training: said once
        warnings.simplefilter("error")
        encoder.preprocess([long])
    fits = " ".join(["dog"] * 62)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(fits)


# -- bad input ----------------------------------------------------------------------------------


def test_bad_texts_name_the_row() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    with pytest.raises(InputError, match=r"row 1 is '  '"):
        encoder.encode(["dog", "  "])
    with pytest.raises(InputError, match=r"row 0 is None \(NoneType\)"):
        encoder.score([None], ["dog"])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"got 2 and 1"):
        encoder.score(["dog", "cat"], ["dog"])


def test_unknown_names_are_listed() -> None:
    encoder = SiameseEncoder(tiny_model(prompts=PROMPTS), reference="pad")
    with pytest.raises(
        InputError, match=r"\['query', 'document', 'plain'\] or None, but got 'qury'"
    ):
        encoder.encode("dog", role="qury")
    with pytest.raises(InputError, match=r"'pad', .*'uniform', .*\], but got 'zero'"):
        SiameseEncoder(tiny_model(), reference="zero")
    with pytest.raises(InputError, match=r"'cos' or 'dot', but got 'euclid'"):
        SiameseEncoder(tiny_model(), similarity="euclid", reference="pad")
    for layer in (4, -1, True, 1.5):
        with pytest.raises(InputError, match=rf"between 0 and 3 for BertModel, but got {layer}"):
            encoder.check_layer(layer)  # type: ignore[arg-type]


def test_a_tokenizer_without_pad_token_is_refused() -> None:
    model = tiny_model()
    model[0].processor = tokenizer(pad=False)
    with pytest.raises(ModelError, match=r"none\. Set `tokenizer\.pad_token`"):
        SiameseEncoder(model, reference="pad")


def test_models_without_a_split_score_are_refused() -> None:
    with pytest.raises(ModelError, match="function is 'euclidean'"):
        SiameseEncoder(tiny_model(similarity_fn_name="euclidean"), reference="pad")
    static = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer().backend_tokenizer, embedding_dim=8)], device="cpu"
    )
    with pytest.raises(ModelError, match="but it is StaticEmbedding"):
        SiameseEncoder(static, reference="pad")
    inner = tiny_model()
    router = Router.for_query_document([inner[0], inner[1]], [inner[0], inner[1]])
    with pytest.raises(ModelError, match="but it is Router"):
        SiameseEncoder(SentenceTransformer(modules=[router], device="cpu"), reference="pad")


def test_uniform_is_refused_where_it_depends_on_the_length() -> None:
    model = tiny_model(pooling="mean_sqrt_len_tokens")
    with pytest.raises(
        ModelError, match=r"lengths \(1, 2, 5, 17, 64\) it differs by [0-9.]+e[+-]0"
    ):
        SiameseEncoder(model, reference="uniform")
    SiameseEncoder(model, reference="pad")


def test_hidden_work_in_encode_is_noticed() -> None:
    model = tiny_model()
    encoder = SiameseEncoder(model, shift=False, reference="pad")
    own = model.encode
    model.encode = lambda *args, **kwargs: own(*args, **kwargs) * 2
    with pytest.raises(ModelError, match=r"differ by 5\.0e-01"):
        encoder.check_parity()


def test_pooling_is_the_models_own() -> None:
    poolings = [m for m in tiny_model(pooling="max") if isinstance(m, Pooling)]
    assert poolings[0].pooling_mode == "max"
    encoder = SiameseEncoder(tiny_model(pooling="max"), shift=False, reference="pad")
    encoder.check_parity()
