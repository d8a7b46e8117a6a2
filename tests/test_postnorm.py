"""Derivatives by hand against differentiating the model's own forward, the slow twin."""

from __future__ import annotations

import pytest
import torch
from models import ARCHITECTURES, TEXT_A, TEXT_B, tiny_model
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import LayerNorm

from xsiam import PairAttributor, SiameseEncoder
from xsiam.attention import AttentionPoint
from xsiam.families import AutodiffLineariser, PostNormLineariser, post_norm_lineariser
from xsiam.jacobian import exact_numerics
from xsiam.one_token import is_cheaper
from xsiam.postnorm import PostNormBlock

FLOAT64 = 1e-11  # worst measured 2e-12 (ALBERT, layer 0), beside entries of up to 24
POOLINGS = ("mean", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")


def both(model, layer: int, truncate_dim: int | None = None, n: int = 2):
    """Return both linearisations at random points of two texts of one length, and directions."""
    encoder = SiameseEncoder(model.double(), shift=False, reference="pad").eval()
    features = encoder.preprocess([TEXT_A] * n)
    with exact_numerics(torch.device("cpu")):
        hidden = encoder.split.capture(features, layer)
        points = hidden * torch.tensor([1.0, 0.7], dtype=torch.float64)[:n, None, None]
        by_hand = post_norm_lineariser(encoder.split, layer, truncate_dim)
        assert isinstance(by_hand, PostNormLineariser), by_hand
        slow = AutodiffLineariser(encoder.split, layer, truncate_dim)
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
        return by_hand(features, points), slow(features, points), directions


def block() -> PostNormBlock:
    """Return a block of MiniLM's sizes."""
    linear, norm = torch.nn.Linear(384, 384), torch.nn.LayerNorm(384)
    up, down = torch.nn.Linear(384, 1536), torch.nn.Linear(1536, 384)
    return PostNormBlock(linear, linear, linear, linear, norm, up, torch.nn.GELU(), down, norm, 12)


def assert_equal(fast, slow, directions) -> None:
    tokens = torch.tensor([0, 2, directions.shape[1] - 1])
    with exact_numerics(torch.device("cpu")):
        embedding, total = slow.total(directions)
        generator = torch.Generator().manual_seed(1)
        shape = (len(embedding), 3, embedding.shape[1])
        cotangents = torch.randn(shape, generator=generator, dtype=torch.float64)
        for ours, theirs in (
            (fast.total(directions)[0], embedding),
            (fast.total(directions)[1], total),
            (fast.push_tokens(directions, tokens), slow.push_tokens(directions, tokens)),
            (fast.pull(cotangents), slow.pull(cotangents)),
            (fast.pull_tokens(cotangents, directions), slow.pull_tokens(cotangents, directions)),
        ):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < FLOAT64 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_at_every_layer(architecture: str, layer: int) -> None:
    assert_equal(*both(tiny_model(architecture), layer))


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_linear_pooling(pooling: str, layer: int) -> None:
    assert_equal(*both(tiny_model("mpnet", pooling=pooling), layer))


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "weightedmean"])
@pytest.mark.parametrize("architecture", ["mpnet", "albert"])
def test_both_ways_through_a_block_from_tokens_to_the_pooling(
    architecture: str, pooling: str, factored: bool, monkeypatch
) -> None:
    calls = []

    def choose(block, n_rows: int, n_tokens: int) -> bool:
        calls.append((n_rows, n_tokens))
        return factored

    monkeypatch.setattr("xsiam.postnorm.is_cheaper", choose)
    fast, slow, directions = both(tiny_model(architecture, pooling=pooling), 2)
    assert_equal(fast, slow, directions)
    length = directions.shape[1]
    assert calls == [(1 if pooling == "cls" else length, length)]


@pytest.mark.parametrize("contracted", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("architecture", ["mpnet", "bert"])
def test_both_ways_to_attention_logits(
    architecture: str, pooling: str, contracted: bool, monkeypatch
) -> None:
    calls = []

    def choose(self, n_tangents: int) -> bool:
        calls.append(n_tangents)
        return contracted

    monkeypatch.setattr(AttentionPoint, "_contracts", choose)
    assert_equal(*both(tiny_model(architecture, pooling=pooling), 0))
    assert 3 in calls


def test_logits_are_contracted_in_short_texts() -> None:
    def contracts(length: int, n_tangents: int) -> bool:
        return AttentionPoint(block(), torch.zeros(1, length, 384), None)._contracts(n_tangents)

    assert contracts(12, 12)
    assert not contracts(32, 32)  # 12 heads of 32 keys: as many products as hidden dimensions
    assert not contracts(12, 1)


def test_weights_that_changed_are_composed_again(monkeypatch) -> None:
    monkeypatch.setattr("xsiam.postnorm.is_cheaper", lambda *args: True)
    model = tiny_model()
    fast, slow, directions = both(model, 2)
    tokens = torch.arange(3)
    with exact_numerics(torch.device("cpu")):
        before = fast.push_tokens(directions, tokens)
    model[0].auto_model.encoder.layer[2].attention.output.dense.weight.data *= 1.5
    fast, slow, directions = both(model, 2)
    assert_equal(fast, slow, directions)
    with exact_numerics(torch.device("cpu")):
        after = fast.push_tokens(directions, tokens)
    assert (after - before).abs().max() > 0.01


def test_composed_weights_follow_the_precision(monkeypatch) -> None:
    monkeypatch.setattr("xsiam.postnorm.is_cheaper", lambda *args: True)
    model, tokens = tiny_model(), torch.arange(3)
    fast, _, directions = both(model, 2)
    with exact_numerics(torch.device("cpu")):
        double = fast.push_tokens(directions, tokens)
        encoder = SiameseEncoder(model.float(), shift=False, reference="pad").eval()
        features = encoder.preprocess([TEXT_A] * 2)
        points = encoder.split.capture(features, 2) * torch.tensor([1.0, 0.7])[:, None, None]
        lineariser = post_norm_lineariser(encoder.split, 2)
        assert isinstance(lineariser, PostNormLineariser)
        single = lineariser(features, points).push_tokens(directions.float(), tokens)
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 1e-4 * double.abs().max()


def test_factors_pay_for_many_rows_and_tokens() -> None:
    assert is_cheaper(block(), 16, 16)
    assert not is_cheaper(block(), 4, 4)
    assert not is_cheaper(block(), 1, 128)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_modules_behind_the_pooling_and_truncation(pooling: str) -> None:
    extra = [Dense(32, 16), LayerNorm(16)]
    assert_equal(*both(tiny_model(pooling=pooling, extra=extra), 1, truncate_dim=9))


def test_what_is_not_a_plain_block_is_differentiated_by_pytorch() -> None:
    def reason(model, layer: int = 1) -> str:
        found = post_norm_lineariser(
            SiameseEncoder(model, shift=False, reference="pad").split, layer
        )
        assert isinstance(found, str)
        return found

    assert "weighted sum" in reason(tiny_model(pooling="max"))
    assert "above the last hidden state" in reason(tiny_model(), 3)
    model = tiny_model()
    layer = model[0].auto_model.encoder.layer[1]

    class Adapter(torch.nn.Linear):
        pass

    layer.attention.self.query.__class__ = Adapter
    assert "is a Adapter, not a plain Linear" in reason(model)
    hooked = tiny_model()
    part = hooked[0].auto_model.encoder.layer[2].output.dense
    part.register_forward_hook(lambda *args: None)
    assert "hooks" in reason(hooked)


def test_a_formula_of_another_model_is_noticed(monkeypatch) -> None:
    encoder = SiameseEncoder(tiny_model().double(), shift=False, reference="pad")
    slow = PairAttributor(encoder, 1, quadrature="gauss_legendre", n_nodes=3)
    assert slow.integrator.is_hand_written
    forward = type(encoder.split.blocks[2]).forward
    monkeypatch.setattr(
        type(encoder.split.blocks[2]),
        "forward",
        lambda self, hidden, *args, **kwargs: 1.1 * forward(self, hidden, *args, **kwargs),
    )
    changed = PairAttributor(encoder, 1, tolerance=1e-6)
    assert not changed.integrator.is_hand_written
    result = changed.attribute(TEXT_A, TEXT_B)
    assert result.converged
    assert abs(result.residual) < 1e-5
