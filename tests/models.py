"""Tiny random encoders of the real architectures, at an init with real curvature.

At the usual init of 0.02 a random block is almost the identity and a one-node rule passes every
test; here weights are scaled up, and tests assert that a one-node rule fails.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

WORDS = [
    *(
        "a",
        "the",
        "dog",
        "cat",
        "kitten",
        "runs",
        "sleeps",
        "chases",
        "chased",
        "in",
        "on",
        "under",
    ),
    *(
        "yard",
        "garden",
        "house",
        "small",
        "big",
        "red",
        "and",
        "is",
        "not",
        "by",
        "outside",
        "after",
    ),
    *(".", ",", "query", ":", "passage"),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT_A = "the small dog chases a cat in the garden ."
TEXT_B = "a cat is chased by the dog outside ."
TEXTS = (TEXT_A, TEXT_B, "dog", "the big red house is not in the yard and the kitten sleeps")
REFERENCE_NAMES = ("mask", "pad", "uniform", "unk")
"""References that need nothing but a model; test_references.py has the tests of all."""
_QWEN_VOCABULARY = 400


def tokenizer(*, pad: bool = True, template: str = "[CLS] $A [SEP]") -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer that marks texts as ``template`` says."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        pad_token="[PAD]" if pad else None,
        model_max_length=64,
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that ends texts and does not begin them, as T5's do."""
    return tokenizer(template="$A [SEP]")


def qwen_tokenizer(*, ends: bool = False) -> Qwen2Tokenizer:
    """Return Qwen's own class with merges learnt from our words; it pads on the left.

    Those of Qwen2 add no tokens, those of Qwen3 embedders end a text, with the pad token.
    """
    end = "<|endoftext|>"
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = ByteLevel.alphabet()
    core.train_from_iterator(
        [" ".join(WORDS), *WORDS] * 2,
        BpeTrainer(
            vocab_size=_QWEN_VOCABULARY,
            initial_alphabet=alphabet,
            special_tokens=[end],
            show_progress=False,
        ),
    )
    learnt = json.loads(core.to_str())["model"]
    result = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        padding_side="left",
        model_max_length=64,
    )
    if ends:
        result.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, result.eos_token_id)]
        )
    return result


SHAPE = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "initializer_range": 0.5,
}


class Family(NamedTuple):
    """One architecture: its real classes, the tiny shape, and its kind of tokenizer."""

    model: type
    config: type
    shape: dict[str, Any]
    dropout: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    tokenizer: Callable[[], PreTrainedTokenizerBase] = tokenizer
    pooling: str = "mean"


_DISTILBERT = {
    "vocab_size": SHAPE["vocab_size"],
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 66,
    "initializer_range": 0.5,
}
_IDS = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
_IDS |= {"bos_token_id": 2, "eos_token_id": 3}
_DEBERTA_V3 = {  # as in microsoft/deberta-v3-base, with buckets that short texts leave
    **SHAPE,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 6,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pad_token_id": 0,
}
_MODERNBERT = {  # blocks 0 and 2 see all tokens, block 1 two on either side
    **SHAPE,
    **_IDS,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "local_attention": 4,
    "initializer_cutoff_factor": 3.0,
}
_T5 = {
    "vocab_size": SHAPE["vocab_size"],
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "initializer_factor": 1.5,
    "pad_token_id": 0,
    "eos_token_id": 3,
}
_QWEN = {
    **SHAPE,
    "vocab_size": _QWEN_VOCABULARY,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES = {
    "bert": Family(BertModel, BertConfig, SHAPE),
    "roberta": Family(RobertaModel, RobertaConfig, {**SHAPE, "pad_token_id": 0}),
    "mpnet": Family(MPNetModel, MPNetConfig, {**SHAPE, "pad_token_id": 0}),
    "distilbert": Family(
        DistilBertModel, DistilBertConfig, _DISTILBERT, ("dropout", "attention_dropout")
    ),
    "albert": Family(AlbertModel, AlbertConfig, {**SHAPE, "embedding_size": 16}),
    "electra": Family(ElectraModel, ElectraConfig, {**SHAPE, "embedding_size": 16}),
    "xlm_roberta": Family(XLMRobertaModel, XLMRobertaConfig, {**SHAPE, "pad_token_id": 0}),
    "deberta_v3": Family(DebertaV2Model, DebertaV2Config, _DEBERTA_V3),
    "modernbert": Family(
        ModernBertModel,
        ModernBertConfig,
        _MODERNBERT,
        ("embedding_dropout", "attention_dropout", "mlp_dropout"),
    ),
    "t5_relu": Family(
        *(T5EncoderModel, T5Config, {**_T5, "feed_forward_proj": "relu"}),
        *(("dropout_rate",), t5_tokenizer),
    ),
    "t5_gated_gelu": Family(
        *(T5EncoderModel, T5Config, {**_T5, "feed_forward_proj": "gated-gelu"}),
        *(("dropout_rate",), t5_tokenizer),
    ),
    "qwen2": Family(
        *(Qwen2Model, Qwen2Config, _QWEN, ("attention_dropout",)), qwen_tokenizer, "lasttoken"
    ),
    "qwen3": Family(
        *(Qwen3Model, Qwen3Config, _QWEN, ("attention_dropout",)),
        *(functools.partial(qwen_tokenizer, ends=True), "lasttoken"),
    ),
}
ARCHITECTURES = ("bert", "roberta", "mpnet", "distilbert", "albert", "electra")
"""Smooth encoders that are float64 throughout, for the tests of every part."""
MORE_ARCHITECTURES = tuple(name for name in FAMILIES if name not in ARCHITECTURES)
"""The others: test_architectures.py has the tests of all."""


def tiny_model(
    architecture: str | Family = "bert",
    *,
    pooling: str | None = None,
    extra: list[torch.nn.Module] | None = None,
    seed: int = 0,
    include_prompt: bool = True,
    dropout: float = 0.1,
    **options: Any,
) -> SentenceTransformer:
    """Return a random SentenceTransformer of that architecture with three layers of width 32.

    Args:
        architecture: One of ``ARCHITECTURES`` or ``MORE_ARCHITECTURES``, or another family.
        pooling: Pooling mode; None is the architecture's usual one.
        extra: Modules after the pooling.
        seed: Of the weights.
        include_prompt: Whether prompt tokens are pooled.
        dropout: Of hidden states and attention.
        options: For the SentenceTransformer (prompts, similarity_fn_name, truncate_dim, …).
    """
    if isinstance(architecture, Family):
        family, state = architecture, _random_state(architecture, seed)
    else:
        family, state = FAMILIES[architecture], _state(architecture, seed)
    with tempfile.TemporaryDirectory() as folder:
        _write_folder(family, state, dropout, folder)
        transformer = Transformer(folder)
    head = Pooling(32, pooling or family.pooling, include_prompt=include_prompt)
    return SentenceTransformer(modules=[transformer, head, *(extra or [])], device="cpu", **options)


def tiny_folder(path: Path, **kwargs: Any) -> Path:
    """Save a tiny model as a sentence-transformers folder and return it."""
    tiny_model(**kwargs).save(str(path), create_model_card=False)
    return path


@functools.cache
def _state(architecture: str, seed: int) -> dict[str, torch.Tensor]:
    return _random_state(FAMILIES[architecture], seed)


def _random_state(family: Family, seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family.model(family.config(**family.shape))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases and norms, which start at 0 and 1
                torch.nn.init.normal_(parameter, 1.0 if "weight" in name else 0.0, 0.3)
        return dict(model.state_dict())


def _write_folder(
    family: Family, state: dict[str, torch.Tensor], dropout: float, folder: str
) -> None:
    model = family.model(family.config(**family.shape, **dict.fromkeys(family.dropout, dropout)))
    model.load_state_dict(state)
    model.save_pretrained(folder)
    family.tokenizer().save_pretrained(folder)
