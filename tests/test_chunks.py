"""Embedding in chunks: the same gradients and random numbers, in less memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from models import TEXTS, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from xsiam.chunks import embed_in_chunks
from xsiam.encoder import SiameseEncoder
from xsiam.split import features_to, select_rows

FLOAT64 = 1e-12  # measured: 7e-15
FLOAT32_INSIDE = 1e-6  # measured: 1.5e-7, norms of Qwen
MANY = [*TEXTS, "a kitten sleeps", "the dog runs in the yard .", "red house"]


def gradients(encoder: SiameseEncoder, embeddings: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of a loss that ties all embeddings together."""
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    loss = torch.logsumexp((embeddings @ embeddings.T).flatten(), dim=0)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def largest_difference(ours: list[Any], theirs: list[Any]) -> float:
    """Return the largest difference, relative to the largest gradient."""
    assert [gradient is None for gradient in ours] == [gradient is None for gradient in theirs]
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None]
    scale = max(b.abs().max().item() for _, b in pairs)
    assert scale > 0
    return max((a - b).abs().max().item() for a, b in pairs) / scale


def in_a_row(encoder: SiameseEncoder, features: Any, chunk_size: int) -> torch.Tensor:
    """Embed chunks one after the other and keep everything."""
    rows = torch.split(torch.arange(len(MANY), device=encoder.device), chunk_size)
    return torch.cat([encoder(select_rows(features, chunk)) for chunk in rows])


@pytest.mark.parametrize("reference", ["pad", "uniform"])
@pytest.mark.parametrize("architecture", ["bert", "mpnet", "qwen3"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 20])
def test_gradients_are_those_of_the_whole_batch(
    architecture: str, reference: str, chunk_size: int
) -> None:
    encoder = SiameseEncoder(tiny_model(architecture, dropout=0.0), reference=reference).double()
    encoder.train()
    features = encoder.preprocess(MANY)
    expected = gradients(encoder, encoder(features))
    ours = gradients(encoder, embed_in_chunks(encoder, features, chunk_size))
    error = largest_difference(ours, expected)
    assert error < (FLOAT32_INSIDE if architecture == "qwen3" else FLOAT64), error


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_dropout_is_the_same_in_both_passes(chunk_size: int, device: str) -> None:
    encoder = SiameseEncoder(tiny_model(dropout=0.3), reference="pad").train().to(device)
    features = features_to(encoder.preprocess(MANY), encoder.device)
    torch.manual_seed(5)
    kept = in_a_row(encoder, features, chunk_size)
    expected, after = gradients(encoder, kept), torch.rand(3, device=device)
    torch.manual_seed(5)
    ours = embed_in_chunks(encoder, features, chunk_size)
    assert torch.equal(ours, kept)
    found = gradients(encoder, ours)
    assert torch.equal(torch.rand(3, device=device), after)  # recomputing leaves no trace
    assert largest_difference(found, expected) == 0
    torch.manual_seed(6)
    other = gradients(encoder, embed_in_chunks(encoder, features, chunk_size))
    assert largest_difference(other, expected) > 1e-3


def test_lower_precision_is_the_same_in_both_passes() -> None:
    encoder = SiameseEncoder(tiny_model(dropout=0.3), reference="uniform").train()
    features = encoder.preprocess(MANY)
    found = []
    for embed in (in_a_row, embed_in_chunks):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = embed(encoder, features, 2)
        found.append(gradients(encoder, embeddings.float()))
    assert largest_difference(found[0], found[1]) == 0


class Memory(TorchDispatchMode):
    """Follow the bytes of all tensors that are alive and were made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        for tensor in made:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        self._known.add(storage)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.now -= size


def peak(chunk_size: int | None) -> int:
    """Return the most bytes held in a forward and backward pass over 64 texts."""
    encoder = SiameseEncoder(tiny_model(), reference="uniform").train()
    features = encoder.preprocess([TEXTS[3]] * 64)
    with Memory() as memory:
        if chunk_size is None:
            embeddings = encoder(features)
        else:
            embeddings = embed_in_chunks(encoder, features, chunk_size)
        gradients(encoder, embeddings)
    return memory.most


def test_memory_is_that_of_one_chunk() -> None:
    whole, eighth, single = peak(None), peak(8), peak(1)
    # Measured: 7.6 MB, 1.2 MB and 0.4 MB; an eighth of the texts at a time, then one.
    assert eighth < whole / 4
    assert single < eighth / 2
