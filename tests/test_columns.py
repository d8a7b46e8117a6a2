"""Columns embedded together, and activations computed again: the same numbers for less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TEXTS, tiny_model

from xsiam.encoder import SiameseEncoder
from xsiam.references import ReferenceRows
from xsiam.split import join_features

EQUAL = 1e-4  # of gradients, relative to the largest; measured: 2e-5 (ALBERT), else 3e-6
RECOMPUTED = 1e-6  # as above; measured: 0
ARCHITECTURES = ("bert", "mpnet", "albert", "t5_gated_gelu", "modernbert", "qwen3")
COLUMNS = (list(TEXTS[:2]), list(TEXTS[2:]), ["cat", "the kitten sleeps ."])

Gradients = dict[str, torch.Tensor]


def gradients(encoder: SiameseEncoder, embed: Callable[[], list[torch.Tensor]]) -> Gradients:
    """Return the gradients of a function of all embeddings, with dropout by one seed."""
    encoder.train()
    encoder.zero_grad()
    torch.manual_seed(0)
    torch.cat(embed()).sin().sum().backward()
    named = dict(encoder.named_parameters())
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def difference(ours: Gradients, theirs: Gradients) -> float:
    """Return the largest difference, relative to the largest gradient."""
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max().item() for gradient in theirs.values())
    assert scale > 0
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours) / scale


@pytest.mark.parametrize("reference", ["pad", "uniform", None])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_columns_are_embedded_as_each_alone(architecture: str, reference: str | None) -> None:
    model = tiny_model(architecture, dropout=0.0)
    encoder = SiameseEncoder(model, reference=reference or "pad", shift=reference is not None)
    columns = [encoder.preprocess(texts) for texts in COLUMNS]
    for chunk_size, recompute in ((None, False), (1, False), (1, True)):

        def together(chunk_size: Any = chunk_size, recompute: bool = recompute) -> Any:
            return encoder.embed_columns(columns, chunk_size, recompute=recompute)

        def alone() -> Any:
            return [encoder(features) for features in columns]

        for a, b in zip(together(), alone(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        error = difference(gradients(encoder, together), gradients(encoder, alone))
        assert error < EQUAL, (chunk_size, recompute)
    encoder.eval()
    with torch.no_grad():
        for a, features in zip(encoder.embed_columns(columns), columns, strict=True):
            torch.testing.assert_close(a, encoder(features))


def test_a_length_is_embedded_once_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    columns = [encoder.preprocess(texts) for texts in COLUMNS]
    seen: list[torch.Tensor] = []
    inner = encoder.reference.embed_rows

    def embed_rows(split: Any, rows: ReferenceRows) -> torch.Tensor:
        seen.append(rows.features["attention_mask"].sum(dim=1))
        return inner(split, rows)

    monkeypatch.setattr(encoder.reference, "embed_rows", embed_rows)
    encoder.embed_columns(columns)
    lengths = torch.cat([features["attention_mask"].sum(dim=1) for features in columns])
    (found,) = seen
    assert sorted(found.tolist()) == lengths.unique().tolist()
    assert len(found) < len(lengths)  # or the test shows nothing


def test_passes_take_texts_of_similar_length(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    columns = [encoder.preprocess(texts) for texts in COLUMNS]
    shapes: list[tuple[int, ...]] = []
    inner = encoder.split.embed

    def embed(features: Any) -> torch.Tensor:
        shapes.append(tuple(features["input_ids"].shape))
        return inner(features)

    monkeypatch.setattr(encoder.split, "embed", embed)
    encoder.embed_columns(columns)
    lengths = sorted(int(n) for c in columns for n in c["attention_mask"].sum(dim=1))
    assert shapes == [(2, lengths[1]), (2, lengths[3]), (2, lengths[5])]
    assert sum(n * width for n, width in shapes) < sum(c["input_ids"].numel() for c in columns)


def test_columns_with_prompts_of_their_own_are_not_joined() -> None:
    model = tiny_model(prompts={"query": "query: ", "document": ""}, include_prompt=False)
    encoder = SiameseEncoder(model, reference="pad").eval()
    columns = [encoder.preprocess(COLUMNS[0], "query"), encoder.preprocess(COLUMNS[1], "document")]
    assert join_features(columns) is None
    for a, features in zip(encoder.embed_columns(columns), columns, strict=True):
        torch.testing.assert_close(a, encoder(features))


def test_joined_columns_hold_every_text_and_padding() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    columns = [encoder.preprocess(texts) for texts in COLUMNS]
    joined = join_features(columns)
    assert joined is not None
    start = 0
    for features in columns:
        n, length = features["input_ids"].shape
        tensors = {k: v for k, v in features.items() if isinstance(v, torch.Tensor)}
        assert joined.keys() == features.keys()
        for key, values in tensors.items():
            rows = joined[key][start : start + n]
            assert torch.equal(rows[:, :length], values), key
            assert not rows[:, length:].any(), key
        start += n
    assert start == len(joined["input_ids"])


# ---------------------------------------------------------------- computing again


@pytest.mark.parametrize("reference", ["pad", "uniform"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputed_activations_have_the_same_gradients(
    architecture: str, dropout: float, reference: str
) -> None:
    encoder = SiameseEncoder(tiny_model(architecture, dropout=dropout), reference=reference)
    columns = [encoder.preprocess(texts) for texts in COLUMNS]
    kept, recomputed = (
        gradients(
            encoder, lambda recompute=recompute: encoder.embed_columns(columns, recompute=recompute)
        )
        for recompute in (False, True)
    )
    assert difference(recomputed, kept) < RECOMPUTED
    assert all("forward" not in vars(block) for block in encoder.split.blocks)


def test_other_dropout_has_other_gradients() -> None:
    """The test above would see it."""
    encoder = SiameseEncoder(tiny_model(dropout=0.3), reference="pad")
    columns = [encoder.preprocess(texts) for texts in COLUMNS]

    def later() -> list[torch.Tensor]:
        torch.rand(1)
        return encoder.embed_columns(columns)

    first = gradients(encoder, lambda: encoder.embed_columns(columns))
    assert difference(gradients(encoder, later), first) > 0.01


@pytest.mark.parametrize("reference", ["pad", None])
def test_recomputed_activations_are_not_kept(reference: str | None) -> None:
    encoder = SiameseEncoder(
        tiny_model(dropout=0.1), reference=reference or "pad", shift=reference is not None
    ).train()
    columns = [encoder.preprocess([text] * 8) for text in TEXTS]

    def kept(recompute: bool) -> int:
        """Return how many bytes of activations a forward keeps for the backward pass."""
        own = {p.data_ptr() for p in encoder.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alive = encoder.embed_columns(columns, recompute=recompute)
        assert alive
        return sum(sizes.values())

    assert kept(True) < kept(False) / 3  # measured: 0.2


def test_padding_needs_no_gradient_of_a_whole_table() -> None:
    """Its row has none, whichever way the vector is made."""
    encoder = SiameseEncoder(tiny_model(dropout=0.0), reference="uniform")
    columns = [encoder.preprocess(texts) for texts in COLUMNS]
    ours = gradients(encoder, lambda: encoder.embed_columns(columns))
    table = encoder.split.model.embeddings.word_embeddings
    single = encoder.preprocess(["dog"])
    with encoder.split.without_padding_gradients():
        assert table(single["input_ids"]).requires_grad
        assert not table(torch.full((1, 1), table.padding_idx)).requires_grad
    table.padding_idx, padding = None, table.padding_idx
    theirs = gradients(encoder, lambda: encoder.embed_columns(columns))
    name = next(name for name, p in encoder.named_parameters() if p is table.weight)
    theirs[name][padding] = 0.0
    assert difference(ours, theirs) < RECOMPUTED
