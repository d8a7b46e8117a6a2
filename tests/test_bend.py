"""The bend of attribution paths, and training that keeps them straight."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from models import TEXT_A, TEXTS, tiny_model
from torch import Tensor

from xsiam.bend import BendTerm, bend
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.module import SiameseModule
from xsiam.split import evaluation_mode

PLACES = torch.tensor([0.1, 0.5, 0.7, 0.9])


@pytest.fixture(params=["uniform", "pad"])
def encoder(request: pytest.FixtureRequest) -> SiameseEncoder:
    """Return an encoder in float64, in training mode with dropout."""
    return SiameseEncoder(tiny_model(dropout=0.2).double(), reference=request.param).train()


def by_hand(encoder: SiameseEncoder, text: str, layer: int, alpha: float) -> float:
    """The slow twin: a text alone, three forwards."""
    split, features = encoder.split, encoder.preprocess([text])
    with torch.no_grad(), evaluation_mode(encoder):
        reference = encoder.reference.hidden(split, features, layer)
        hidden = split.capture(features, layer)
        low, middle, high = (
            split.tail(features, layer, reference + a * (hidden - reference))
            for a in (0.0, alpha, 1.0)
        )
    off = middle - ((1 - alpha) * low + alpha * high)
    return float((off**2).sum() / ((high - low) ** 2).sum())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_texts_of_several_lengths_have_the_bend_that_each_has_alone(
    encoder: SiameseEncoder, layer: int
) -> None:
    found = bend(encoder, encoder.preprocess(TEXTS), layer, PLACES)
    expected = [
        by_hand(encoder, text, layer, float(alpha))
        for text, alpha in zip(TEXTS, PLACES, strict=True)
    ]
    assert found.detach().tolist() == pytest.approx(expected, rel=1e-9)
    assert min(expected) > 1e-5


def test_a_path_through_nothing_but_mean_pooling_is_straight(encoder: SiameseEncoder) -> None:
    found = bend(encoder, encoder.preprocess(TEXTS), encoder.n_layers, PLACES)
    assert float(found.detach().max()) < 1e-20


@pytest.mark.parametrize("place", [0.0, 1.0])
def test_both_ends_are_on_the_chord(encoder: SiameseEncoder, place: float) -> None:
    found = bend(encoder, encoder.preprocess(TEXTS), 0, torch.full((4,), place))
    assert float(found.detach().max()) < 1e-20


def test_the_gradient_is_that_of_differences() -> None:
    encoder = SiameseEncoder(tiny_model().double(), reference="uniform")
    weight = encoder.split.blocks[1].attention.self.query.weight
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    features = encoder.preprocess(TEXTS)

    def total() -> Tensor:
        return bend(encoder, features, 0, PLACES).sum()

    (gradient,) = torch.autograd.grad(total(), weight)
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * step * direction
            values.append(float(total().detach()))
            weight -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(("n_texts", "sizes"), [(1, [1]), (3, [2, 1]), (8, [4, 4]), (99, [4, 4])])
def test_a_term_looks_at_so_many_texts_of_both_columns(
    encoder: SiameseEncoder, monkeypatch: pytest.MonkeyPatch, n_texts: int, sizes: Sequence[int]
) -> None:
    seen: list[int] = []

    def spy(_: SiameseEncoder, features: dict[str, Tensor], layer: int, alpha: Tensor) -> Tensor:
        seen.append(len(features["input_ids"]))
        assert 0 <= layer < encoder.n_layers
        return alpha

    monkeypatch.setattr("xsiam.bend.bend", spy)
    columns = [encoder.preprocess(TEXTS), encoder.preprocess(TEXTS[::-1])]
    assert 0 < float(BendTerm(1.0, None, n_texts)(encoder, columns)) < 1
    assert seen == sizes


def test_training_straightens_paths() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="uniform").train()
    features, term = encoder.preprocess(TEXTS), BendTerm(1.0, layer=0)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    torch.manual_seed(0)
    with torch.no_grad():
        before = bend(encoder, features, 0, PLACES).mean()
    for _ in range(20):
        optimizer.zero_grad()
        term(encoder, [features, features]).backward()
        optimizer.step()
    with torch.no_grad():
        assert bend(encoder, features, 0, PLACES).mean() < before / 2


def test_a_text_that_is_its_own_reference_has_no_bend() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    features = encoder.preprocess([" ".join(["[PAD]"] * 3)])
    found = bend(encoder, features, 0, torch.tensor([0.5]))
    assert found.detach().tolist() == [0.0]


@pytest.mark.parametrize(
    ("weight", "n_texts", "match"),
    [
        (-1.0, 8, r"`weight` to be a finite number above 0, but got -1.0. Set `bend.weight`"),
        (float("inf"), 8, r"`weight`.*but got inf"),
        (0.1, 0, r"`n_texts` to be 1 or more, but got 0. Set `bend.n_texts`"),
    ],
)
def test_terms_out_of_range_are_refused(weight: float, n_texts: int, match: str) -> None:
    encoder = SiameseEncoder(tiny_model(), reference="uniform")
    with pytest.raises(InputError, match=match):
        SiameseModule(encoder, bend_weight=weight, bend_texts=n_texts)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (3, r"`layer` to be between 0 and 2.*but got 3. Set `bend.layer`"),
        (-1, r"`layer` to be between 0 and 2.*but got -1"),
    ],
)
def test_layers_without_blocks_above_are_refused(layer: int, match: str) -> None:
    encoder = SiameseEncoder(tiny_model(), reference="uniform")
    with pytest.raises(InputError, match=match):
        SiameseModule(encoder, bend_weight=0.1, bend_layer=layer)


def test_states_that_are_solved_for_are_refused() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="neutral", shift=False)
    with pytest.raises(InputError, match=r"'neutral' is made for weights that stay.*bend.weight=0"):
        SiameseModule(encoder, bend_weight=0.1)
    assert encoder.encode(TEXT_A).shape == (1, 32)
