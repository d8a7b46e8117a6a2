"""Every architecture: cuts at each layer, derivatives, completeness, references, refusals."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import (
    ARCHITECTURES,
    MORE_ARCHITECTURES,
    SHAPE,
    TEXT_B,
    TEXTS,
    Family,
    qwen_tokenizer,
    tiny_model,
)
from models import FAMILIES as FAMILY
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import CNN, LSTM, WeightedLayerPooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    BartConfig,
    BartModel,
    BertForMaskedLM,
    FNetConfig,
    FNetModel,
    GptOssConfig,
    GptOssModel,
    LongformerConfig,
    LongformerModel,
    XLNetConfig,
    XLNetModel,
)

from xsiam.attribution import PairAttributor, TokenVectors
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning, ModelError
from xsiam.jacobian import exact_numerics, token_derivatives
from xsiam.split import SplitModel, evaluation_mode

EVERY = ARCHITECTURES + MORE_ARCHITECTURES
KINKED = ("t5_relu",)
SMOOTH = tuple(name for name in EVERY if name not in KINKED)
CAUSAL = ("qwen2", "qwen3")
# These compute norms or rotations in float32 whatever the weights are.
FLOAT32_INSIDE = ("modernbert", "t5_relu", "t5_gated_gelu", *CAUSAL)

EXACT = 1e-11  # float64, relative; worst measured 2.2e-14
FLOOR = 2e-6  # the same with float32 inside, completeness included; worst measured 3.8e-7
COMPLETE = 1e-8  # float64, smooth; worst measured 1.5e-10
KINKS = 1e-3  # completeness error with kinks (ReLU, max pooling); worst measured 1.5e-4
HONEST = 3  # true error over reported error, at most
SHORT = "a cat sleeps"


class Float64Throughout(TorchFunctionMode):
    """Leave float64 as it is where a model would compute in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.to, Tensor.float) and args[0].dtype == torch.float64:
            targets = (*args[1:], *kwargs.values())
            if func is Tensor.float or torch.float32 in targets:
                return args[0]
        return func(*args, **kwargs)


@functools.cache
def encoder_of(architecture: str, pooling: str | None = None, **options: Any) -> SiameseEncoder:
    """Return a shared float64 encoder, which no test may change."""
    options = {"reference": "pad"} | options
    return SiameseEncoder(tiny_model(architecture, pooling=pooling).double(), **options)


def vectors_of(encoder: SiameseEncoder, layer: int, text: str = SHORT, **kwargs) -> TokenVectors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return PairAttributor(encoder, layer, **kwargs).token_vectors([text])[0]


def relative(difference: Tensor, scale: Tensor) -> float:
    return float(difference.norm() / scale.norm())


# -- cuts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", EVERY)
def test_the_tail_from_every_layer_gives_the_embedding(architecture: str) -> None:
    encoder = encoder_of(architecture)
    features = encoder.preprocess(TEXTS)
    on_the_left = bool((features["attention_mask"][:, 0] == 0).any())
    assert on_the_left == (architecture in CAUSAL)
    with evaluation_mode(encoder), torch.no_grad():
        embedding = encoder.split.embed(features)
        for layer in range(encoder.n_layers + 1):
            hidden = encoder.split.capture(features, layer)
            assert hidden.shape[:2] == features["input_ids"].shape
            assert torch.equal(encoder.split.tail(features, layer, hidden), embedding)
            other = encoder.split.tail(features, layer, hidden * 1.1)
            # RMSNorm divides a common factor out, but for what the residuals add below it.
            assert relative(other - embedding, embedding) > 1e-4
        alone = torch.cat([encoder.split.embed(encoder.preprocess([text])) for text in TEXTS])
    limit = FLOOR if architecture in FLOAT32_INSIDE else EXACT
    assert relative(alone - embedding, embedding) < limit


@pytest.mark.parametrize("architecture", EVERY)
def test_blocks_below_a_cut_are_stepped_over(architecture: str) -> None:
    encoder = encoder_of(architecture)
    split = encoder.split
    features = encoder.preprocess([SHORT])
    split.check_layer(2)  # runs a short text the first time
    ran: list[int] = []
    norms = {
        id(b): next(m for m in b.modules() if "Norm" in type(m).__name__) for b in split.blocks
    }
    handles = [norms[id(b)].register_forward_hook(lambda *_: ran.append(1)) for b in split.blocks]
    try:
        with evaluation_mode(encoder), torch.no_grad():
            hidden = split.capture(features, 2)
            ran.clear()
            split.tail(features, 2, hidden)
    finally:
        for handle in handles:
            handle.remove()
    # T5's first block computes the position bias of all others.
    assert len(ran) == (2 if architecture.startswith("t5") else 1)


def test_local_layers_are_local() -> None:
    split = encoder_of("modernbert").split
    features = encoder_of("modernbert").preprocess([TEXTS[0]])

    def reach(layer: int) -> int:
        """Return how many tokens change at ``layer + 1`` with the first token at ``layer``."""
        with evaluation_mode(split.model), torch.no_grad():
            own = split.capture(features, layer)
            changed = own.clone()
            changed[:, 0] = changed[:, 0].flip(-1)  # norms would take a constant out again
            states = []
            for hidden in (own, changed):
                with split._intercepted(layer, hidden, watch=(None, states.append)):
                    split.transformer(dict(features))
            after = [s for number, s in enumerate(states) if number % split.n_layers == layer + 1]
        return int(((after[0] - after[1]).abs().amax(-1) > 0).sum())

    assert reach(0) == features["input_ids"].shape[1]
    assert reach(1) == 3


@pytest.mark.parametrize("architecture", ["albert", "deberta_v3", "t5_relu"])
def test_a_split_can_be_copied_and_sent(architecture: str) -> None:
    encoder = encoder_of(architecture)
    features = encoder.preprocess([SHORT])
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        with evaluation_mode(encoder), evaluation_mode(other), torch.no_grad():
            hidden = encoder.split.capture(features, 2)
            assert torch.equal(
                other.split.tail(features, 2, hidden), encoder.split.tail(features, 2, hidden)
            )
        assert not {id(b) for b in other.split.blocks} & {id(b) for b in encoder.split.blocks}


# -- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "throughout"),
    [*((name, True) for name in EVERY), *((name, False) for name in FLOAT32_INSIDE)],
)
def test_forward_mode_equals_reverse_mode(architecture: str, throughout: bool) -> None:
    encoder = encoder_of(architecture)
    features = encoder.preprocess([TEXT_B])
    tokens = torch.arange(features["input_ids"].shape[1])
    for layer in range(encoder.n_layers + 1):

        def tail(hidden: Tensor, layer: int = layer) -> Tensor:
            return encoder.split.tail(features, layer, hidden)

        with Float64Throughout() if throughout else nullcontext(), evaluation_mode(encoder):
            with exact_numerics(torch.device("cpu")):
                hidden = encoder.split.capture(features, layer)
                delta = hidden - encoder.reference.hidden(encoder.split, features, layer)
                forward = token_derivatives(tail, hidden, delta, tokens)[:, 0]
            jacobian = torch.autograd.functional.jacobian(tail, hidden, vectorize=True)[0, :, 0]
            reverse = (jacobian * delta[0]).sum(-1).T
        limit = EXACT if throughout else FLOOR
        assert relative(forward - reverse, reverse) < limit, layer


# -- completeness -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("architecture", SMOOTH)
def test_smooth_models_are_complete_in_float64(architecture: str, layer: int) -> None:
    encoder = encoder_of(architecture)
    with Float64Throughout():
        text = vectors_of(encoder, layer, tolerance=COMPLETE)
        coarse = vectors_of(encoder, layer, quadrature="gauss_legendre", n_nodes=1)
    assert text.converged
    assert text.completeness_error < COMPLETE
    assert float((text.vectors.sum(1) - text.delta).norm() / text.delta.norm()) < COMPLETE
    if layer < encoder.n_layers:  # the init has real curvature
        assert coarse.completeness_error > 0.1
        assert not coarse.converged


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("architecture", [a for a in FLOAT32_INSIDE if a not in KINKED])
def test_models_with_float32_inside_reach_their_floor(architecture: str, layer: int) -> None:
    encoder = encoder_of(architecture)
    text = vectors_of(encoder, layer, tolerance=1e-4)
    assert text.converged
    assert max(text.completeness_error, text.token_error) <= 1e-4
    best = vectors_of(encoder, layer, tolerance=1e-12, max_nodes=1200 if layer == 0 else 300)
    assert best.completeness_error < FLOOR
    assert not best.converged  # the floor is not taken for convergence


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("architecture", [*KINKED, "bert"])
def test_kinks_are_integrated_and_reported_honestly(architecture: str, layer: int) -> None:
    encoder = encoder_of(architecture, pooling=None if architecture in KINKED else "max")
    text = vectors_of(encoder, layer, tolerance=1e-3, max_nodes=1500)
    truth = vectors_of(encoder, layer, quadrature="midpoint", n_nodes=3000)
    reported = max(text.completeness_error, text.token_error)
    error = float((text.vectors - truth.vectors).norm(dim=0).max() / truth.delta.norm())
    assert text.completeness_error <= KINKS
    assert text.converged == (reported <= 1e-3)
    assert error <= HONEST * reported + truth.completeness_error


@pytest.mark.parametrize("architecture", MORE_ARCHITECTURES)
def test_float32_meets_the_default_tolerance(architecture: str) -> None:
    encoder = SiameseEncoder(tiny_model(architecture), reference="pad")
    result = PairAttributor(encoder, 2, tolerance=1e-2).attribute(SHORT, "the dog runs")
    assert result.converged
    assert result.dtype == "float32"
    assert result.score == pytest.approx(float(encoder.score(SHORT, "the dog runs")), abs=1e-5)
    assert abs(result.residual) < 1e-2


# -- references ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["pad", "uniform"])
@pytest.mark.parametrize("architecture", EVERY)
def test_paths_start_at_the_reference_at_every_layer(architecture: str, reference: str) -> None:
    encoder = encoder_of(architecture, reference=reference)
    features = encoder.preprocess([TEXT_B])
    limit = FLOOR if architecture in FLOAT32_INSIDE else EXACT
    with evaluation_mode(encoder), torch.no_grad():
        text = encoder.split.embed(features)
        embedding = encoder.reference.embedding(encoder.split, features)
        assert relative(embedding - text, text) > 0.1
        for layer in range(encoder.n_layers + 1):
            hidden = encoder.reference.hidden(encoder.split, features, layer)
            assert hidden.shape[:2] == features["input_ids"].shape
            again = encoder.split.tail(features, layer, hidden)
            assert relative(again - embedding, text) < limit, layer


@pytest.mark.parametrize("architecture", CAUSAL)
def test_decoders_without_special_tokens_have_one_reference(architecture: str) -> None:
    """PADs alone: no position differs from another, so ``pad`` is ``uniform`` at any length.

    Qwen3 embedders end a text with a token that is also the pad token.
    """
    encoder = encoder_of(architecture)
    features = encoder.preprocess(TEXTS)
    rows = encoder.reference.rows(encoder.split, features)
    pad = encoder.tokenizer.pad_token_id
    assert (rows.features["input_ids"] == pad).all()
    assert torch.equal(rows.features["attention_mask"][rows.inverse], features["attention_mask"])
    uniform = encoder_of(architecture, reference="uniform")
    with evaluation_mode(encoder), torch.no_grad():
        ours = encoder.reference.embedding(encoder.split, features)
        theirs = uniform.reference.embedding(uniform.split, features)
    assert relative(ours - theirs, theirs) < FLOOR


def test_a_decoder_without_pad_token_is_refused() -> None:
    model = tiny_model("qwen2")
    model[0].tokenizer.pad_token = None
    with pytest.raises(ModelError, match=r"but Qwen2Tokenizer has none. Set `tokenizer.pad_token`"):
        SiameseEncoder(model, reference="pad")


SINKS = Family(
    GptOssModel,
    GptOssConfig,
    {
        **FAMILY["qwen2"].shape,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    ("attention_dropout",),
    qwen_tokenizer,
    "lasttoken",
)
FOURIER = Family(
    FNetModel,
    FNetConfig,
    {**{k: v for k, v in SHAPE.items() if k != "num_attention_heads"}, "pad_token_id": 0},
    ("hidden_dropout_prob",),
)
CONVOLUTION = FAMILY["deberta_v3"]._replace(
    shape={**FAMILY["deberta_v3"].shape, "conv_kernel_size": 3}
)


@pytest.mark.parametrize("family", [SINKS, FOURIER], ids=["sinks", "fourier"])
def test_uniform_is_refused_where_tokens_mix_otherwise(family: Family) -> None:
    model = tiny_model(family)
    match = rf"differs by \d\.\de[+-]\d\d \(limit 1e-04\): {family.model.__name__} or its pooling"
    with pytest.raises(ModelError, match=match):
        SiameseEncoder(model, reference="uniform")
    encoder = SiameseEncoder(model, reference="pad", shift=False)
    encoder.check_parity()
    encoder.check_layer(1)


# -- the model's own score ----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", EVERY)
def test_scores_are_the_models_own(architecture: str) -> None:
    encoder_of(architecture).check_parity()
    encoder = SiameseEncoder(tiny_model(architecture), shift=False, reference="pad")
    encoder.check_parity()
    ours, theirs = encoder.encode(TEXTS), encoder.model.encode(list(TEXTS), convert_to_tensor=True)
    assert relative(ours - theirs, theirs) < FLOOR


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen2", "qwen3"])
def test_prompts_are_tokens_of_their_own(architecture: str, include_prompt: bool) -> None:
    prompts = {"query": "query :", "document": ""}
    model = tiny_model(architecture, prompts=prompts, include_prompt=include_prompt)
    encoder = SiameseEncoder(model.double(), reference="pad")
    attributor = PairAttributor(encoder, 2, tolerance=1e-4)
    result = attributor.attribute(" dog runs", SHORT, "query", "document")
    tokens = [encoder.tokenizer.convert_tokens_to_string([t]).strip() for t in result.tokens_a]
    of_prompt = [token for token, own in zip(tokens, result.prompt_mask_a, strict=True) if own]
    assert "".join(of_prompt) == "query:"
    start = next(i for i, token in enumerate(tokens) if token == "dog")
    assert not any(result.prompt_mask_a[start:])
    span = result.offsets_a[start]
    assert " dog runs"[slice(*span)].strip() == "dog"
    assert not any(result.prompt_mask_b)
    assert any(result.special_mask_a) == (architecture != "qwen2")
    own = float(encoder.score(" dog runs", SHORT, "query", "document"))
    assert result.score == pytest.approx(own, abs=FLOOR)
    assert float(result.matrix.sum()) + result.residual == pytest.approx(own, abs=FLOOR)
    assert abs(result.residual) < 1e-3


# -- what cannot be attributed ------------------------------------------------------------------


HEADS = {
    "WeightedLayerPooling": lambda: WeightedLayerPooling(32, num_hidden_layers=3),
    "CNN": lambda: CNN(32, out_channels=8),
    "LSTM": lambda: LSTM(32, hidden_dim=8),
}


@pytest.mark.parametrize("head", sorted(HEADS))
def test_heads_that_are_not_supported_are_refused(head: str) -> None:
    first, pooling = tiny_model()
    model = SentenceTransformer(modules=[first, HEADS[head](), pooling], device="cpu")
    with pytest.raises(ModelError, match=f"after the Transformer, but got {head}, which is not"):
        SiameseEncoder(model, reference="pad")


def test_sparse_encoders_are_refused(tmp_path) -> None:
    inner = tiny_model()
    BertForMaskedLM(inner[0].auto_model.config).save_pretrained(tmp_path)
    inner[0].tokenizer.save_pretrained(tmp_path)
    transformer = Transformer(str(tmp_path), transformer_task="fill-mask")
    sparse = SparseEncoder(modules=[transformer, SpladePooling()], device="cpu")
    with pytest.raises(ModelError, match="but got SpladePooling, which is not supported"):
        SiameseEncoder(sparse, reference="pad")


REFUSED = {
    "XLNet": (
        Family(
            XLNetModel,
            XLNetConfig,
            {
                "vocab_size": SHAPE["vocab_size"],
                "d_model": 32,
                "n_layer": 3,
                "n_head": 4,
                "d_inner": 48,
            },
            ("dropout",),
        ),
        r"one hidden state per token .* of XLNetModel, .*\[1, 6, 'D'\] .* gets \[6, 1, 32\]",
    ),
    "Longformer": (
        Family(
            LongformerModel,
            LongformerConfig,
            {**SHAPE, "attention_window": 8, "pad_token_id": 0},
        ),
        r"of LongformerModel, .*\[1, 6, 'D'\] .* block 0 gets \[1, 8, 32\]",
    ),
    "BART": (
        Family(
            BartModel,
            BartConfig,
            {
                "vocab_size": SHAPE["vocab_size"],
                "d_model": 32,
                "encoder_layers": 3,
                "decoder_layers": 3,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "max_position_embeddings": 66,
                "pad_token_id": 0,
                "decoder_start_token_id": 2,
            },
            ("dropout",),
        ),
        "an encoder or a decoder, but BartModel is both",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_without_states_of_tokens_are_refused(name: str) -> None:
    family, match = REFUSED[name]
    with pytest.raises(ModelError, match=match):
        SiameseEncoder(tiny_model(family), shift=False, reference="pad")


def test_a_layer_that_is_no_cut_is_refused_and_others_are_not() -> None:
    """DeBERTa-v2's convolution reads the embedded text beside the first block."""
    encoder = SiameseEncoder(tiny_model(CONVOLUTION).double(), reference="pad")
    match = r"states at layer 0, but DebertaV2Model also .* \d\.\de-\d\d .* `attribution.layers`"
    with pytest.raises(ModelError, match=match):
        encoder.check_layer(0, key="attribution.layers")
    with pytest.raises(ModelError, match="at layer 0, but DebertaV2Model also reads"):
        PairAttributor(encoder, 0)
    text = vectors_of(encoder, 1, tolerance=COMPLETE)
    assert text.converged
    with pytest.raises(ModelError, match="at layer 0, but DebertaV2Model also reads"):
        SiameseEncoder(encoder.model, reference="uniform")


def test_blocks_that_read_lower_layers_are_refused() -> None:
    """A skip connection from the embedding module past a cut."""
    model = tiny_model()
    bert = model[0].auto_model
    embedded: list[Tensor] = []
    bert.embeddings.register_forward_hook(lambda *args: embedded.append(args[-1]))
    bert.encoder.layer[2].register_forward_hook(lambda *args: args[-1] + embedded[-1])
    encoder = SiameseEncoder(model, reference="pad")
    with pytest.raises(ModelError, match=r"at layer 2, but BertModel also reads .* by \d\.\de[-+]"):
        PairAttributor(encoder, 2)
    encoder.check_layer(3)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen2"])
def test_flash_attention_is_refused(architecture: str) -> None:
    encoder = SiameseEncoder(tiny_model(architecture), reference="pad")
    encoder.split.model.config._attn_implementation = "flash_attention_2"
    match = f"{encoder.split.name} runs 'flash_attention_2', which has no forward derivative"
    with pytest.raises(ModelError, match=match):
        PairAttributor(encoder, 1)
    with pytest.raises(ModelError, match=match):
        encoder.check_layer(1, key="attribution.layers")


# -- numbers that are not finite ----------------------------------------------------------------


def broken(model: SentenceTransformer, layer: int, value: float) -> SentenceTransformer:
    """Put a value into a norm that makes the hidden states at ``layer``."""
    transformer = model[0].auto_model
    norms = [m for m in transformer.modules() if "Norm" in type(m).__name__]
    with torch.no_grad():
        {0: norms[0], 1: norms[2], 2: norms[4], 3: norms[6]}[layer].weight[3] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", range(4))
def test_the_first_layer_that_is_not_finite_is_named(layer: int, value: float) -> None:
    source = ["the embedding module", "block 0", "block 1", "block 2 or a norm after it"][layer]
    match = rf"BertModel, but the hidden states at layer {layer} \(from {source}\) are not for '"
    model = broken(tiny_model(), layer, value)
    with pytest.raises(ModelError, match=match):
        SiameseEncoder(model, reference="pad")
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    features = encoder.preprocess(["a dog", "the cat sleeps"])
    encoder.split.check_finite(features)
    broken(encoder.model, layer, value)
    with pytest.raises(ModelError, match=match + "a dog'"):
        encoder.split.check_finite(features, ["a dog", "the cat sleeps"])


@pytest.mark.parametrize("architecture", EVERY)
def test_the_text_that_is_not_finite_is_named(architecture: str) -> None:
    encoder = SiameseEncoder(tiny_model(architecture), reference="pad")
    word = encoder.tokenizer(" kitten", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        encoder.split.model.get_input_embeddings().weight[word] = float("nan")
    features = encoder.preprocess(TEXTS)  # padded: what padding holds is nobody's business
    match = "states at layer 0 .* are not for 'the big red house is not in the yard and the kitten"
    with pytest.raises(ModelError, match=match):
        encoder.split.check_finite(features, TEXTS)
    with pytest.raises(ModelError, match=match):
        encoder.split.check_finite(features)


def test_heads_that_are_not_finite_are_named() -> None:
    head = Dense(32, 8, activation_function=nn.Identity())
    with torch.no_grad():
        head.linear.weight[0, 0] = float("nan")
    with pytest.raises(
        ModelError, match=r"the embeddings \(from pooling and what follows it\) are"
    ):
        SiameseEncoder(tiny_model(extra=[head]), reference="pad")


def test_every_tuple_has_its_pattern() -> None:
    """What blocks return beside hidden states: nothing, None, what they were given, or new work."""
    patterns = {
        name: [(call.bare, call.rest, call.can_skip) for call in encoder_of(name).split._calls]
        for name in ("bert", "deberta_v3", "mpnet", "t5_relu")
    }
    assert patterns["bert"] == [(True, (), True)] * 3
    assert patterns["deberta_v3"] == [(False, (None,), True)] * 3
    assert patterns["mpnet"] == [(False, (), True)] * 3
    assert patterns["t5_relu"][0] == (False, (), False)
    assert patterns["t5_relu"][1:] == [(False, (2, None), True)] * 2
    assert isinstance(encoder_of("bert").split, SplitModel)
