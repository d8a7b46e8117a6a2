"""An encoder whose attributions are known: a real BertModel whose blocks act on tokens one by one.

Attention adds nothing, norms are the identity, and the feed-forward part is elementwise, so that
the last hidden state of a token is ψ(x) = x + GAIN tanh(SLOPE x) of its word's vector x. Then, at
every layer, the integrated Jacobian of a token takes exactly ψ(x) − ψ(0) to the embedding, and

    A_ij = ψ(x_i)·ψ(x_j) / (S_a S_b n)

for the texts' own words, nothing for special tokens. Words are alike by what `VECTORS` says: pairs
of words on one axis interact, all others are orthogonal. ψ saturates: the gradient of a strong word
is small, that of a weak one large, so that gradients alone take the weak pairs for the strong.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from models import SPECIAL, WORDS, tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import BertConfig, BertModel

SLOPE, GAIN = 3.0, 5.0
STRONG, WEAK, ALONE = 1.0, 0.125, 0.375  # exact in float32
PLANTED = (("dog", "cat"), ("runs", "chases"), ("yard", "garden"))
"""Words that interact strongly, of text a and of text b."""
DISTRACTING = (("small", "big"), ("red", "house"))
"""Words that interact weakly where gradients are large."""
_LINKED = {word for pair in (*PLANTED, *DISTRACTING) for word in pair}
WIDTH = len(PLANTED) + len(DISTRACTING) + len(WORDS) - len(_LINKED)


def _vectors() -> dict[str, np.ndarray]:
    axes = np.eye(WIDTH)
    vectors: dict[str, np.ndarray] = {}
    for axis, pair in enumerate((*PLANTED, *DISTRACTING)):
        size = STRONG if pair in PLANTED else WEAK
        vectors |= dict.fromkeys(pair, size * axes[axis])
    rest = [word for word in WORDS if word not in vectors]
    return vectors | {word: ALONE * axes[-1 - k] for k, word in enumerate(rest)}


VECTORS = _vectors()
"""Vectors of words, those of special tokens are zero."""

TEXTS = (
    ("the small dog runs in yard red", "a big cat chases under garden house"),
    ("red dog in the yard runs small", "house big garden under a cat chases"),
    ("dog runs the yard in red small .", "cat chases garden by a big house"),
    ("small the yard and dog runs red", "a garden by cat outside chases big house"),
    ("yard red dog the in runs small", "chases a cat garden house under big ,"),
    ("in the red small yard dog runs", "a house big under garden chases cat"),
)
"""Pairs of texts, each of which holds every pair of words once."""


def psi(x: np.ndarray) -> np.ndarray:
    """Return the last hidden state of a word's vector."""
    return x + GAIN * np.tanh(SLOPE * x)


def states(text: str) -> np.ndarray:
    """Return the last hidden states of a text's own words, [n, D]."""
    return np.stack([psi(VECTORS[word]) for word in text.split()])


def exact_matrix(text_a: str, text_b: str) -> np.ndarray:
    """Return the attribution matrix of the cosine, special tokens included, [S_a, S_b]."""
    a, b = states(text_a), states(text_b)
    norms = np.linalg.norm(a.sum(0)) * np.linalg.norm(b.sum(0))  # the lengths cancel
    return np.pad(a @ b.T / norms, 1)


def planted_places(text_a: str, text_b: str) -> list[tuple[int, int]]:
    """Return the positions of the planted words, behind the first special token."""
    a, b = text_a.split(), text_b.split()
    return [(1 + a.index(one), 1 + b.index(other)) for one, other in PLANTED]


def planted_model(folder: Path) -> SentenceTransformer:
    """Return the model; the folder takes the files that it is made from."""
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        hidden_act="tanh",
        max_position_embeddings=66,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    transformer = Transformer(str(folder))
    bert = transformer.auto_model
    block = bert.encoder.layer[0]
    bert.embeddings.LayerNorm = nn.Identity()
    block.attention.output.LayerNorm = nn.Identity()
    block.output.LayerNorm = nn.Identity()
    with torch.no_grad():
        for module in (block, bert.embeddings):
            for parameter in module.parameters():
                parameter.zero_()
        block.intermediate.dense.weight.copy_(SLOPE * torch.eye(WIDTH))
        block.output.dense.weight.copy_(GAIN * torch.eye(WIDTH))
        for word, vector in VECTORS.items():
            row = len(SPECIAL) + WORDS.index(word)
            bert.embeddings.word_embeddings.weight[row] = torch.tensor(vector)
    return SentenceTransformer(modules=[transformer, Pooling(WIDTH, "mean")], device="cpu")
