"""Tiny random encoders of the real architectures, at an init with real curvature.

At the usual init of 0.02 a random block is almost the identity and a one-node rule passes every
test; here weights are scaled up, and tests assert that a one-node rule fails.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
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

_SHAPE = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "initializer_range": 0.5,
}
_CONFIGS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (BertModel, BertConfig, _SHAPE),
    "roberta": (RobertaModel, RobertaConfig, {**_SHAPE, "pad_token_id": 0}),
    "mpnet": (MPNetModel, MPNetConfig, {**_SHAPE, "pad_token_id": 0}),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig,
        {
            "vocab_size": _SHAPE["vocab_size"],
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 66,
            "initializer_range": 0.5,
        },
    ),
    "albert": (AlbertModel, AlbertConfig, {**_SHAPE, "embedding_size": 16}),
    "electra": (ElectraModel, ElectraConfig, {**_SHAPE, "embedding_size": 16}),
}
ARCHITECTURES = tuple(_CONFIGS)


def tokenizer(*, pad: bool = True) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer that adds [CLS] and [SEP]."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
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


def tiny_model(
    architecture: str = "bert",
    *,
    pooling: str = "mean",
    extra: list[torch.nn.Module] | None = None,
    seed: int = 0,
    include_prompt: bool = True,
    dropout: float = 0.1,
    **options: Any,
) -> SentenceTransformer:
    """Return a random SentenceTransformer of that architecture with three layers of width 32.

    Args:
        architecture: One of ``ARCHITECTURES``.
        pooling: Pooling mode.
        extra: Modules after the pooling.
        seed: Of the weights.
        include_prompt: Whether prompt tokens are pooled.
        dropout: Of hidden states and attention.
        options: For the SentenceTransformer (prompts, similarity_fn_name, truncate_dim, …).
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_folder(architecture, seed, dropout, folder)
        transformer = Transformer(folder)
    modules = [transformer, Pooling(32, pooling, include_prompt=include_prompt), *(extra or [])]
    return SentenceTransformer(modules=modules, device="cpu", **options)


def tiny_folder(path: Path, **kwargs: Any) -> Path:
    """Save a tiny model as a sentence-transformers folder and return it."""
    tiny_model(**kwargs).save(str(path), create_model_card=False)
    return path


@functools.cache
def _state(architecture: str, seed: int) -> dict[str, torch.Tensor]:
    model_class, config_class, shape = _CONFIGS[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**shape))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases and norms, which start at 0 and 1
                torch.nn.init.normal_(parameter, 1.0 if "weight" in name else 0.0, 0.3)
        return dict(model.state_dict())


def _write_folder(architecture: str, seed: int, dropout: float, folder: str) -> None:
    model_class, config_class, shape = _CONFIGS[architecture]
    rates = {"dropout": dropout, "attention_dropout": dropout}
    if architecture != "distilbert":
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = model_class(config_class(**shape, **rates))
    model.load_state_dict(_state(architecture, seed))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
