"""The fast float32 product: the same numbers, and out of the way of derivatives."""

from __future__ import annotations

import pytest
import torch
from models import TEXT_A, TEXT_B, tiny_model
from torch import nn

from xsiam import SiameseEncoder
from xsiam import linear as module
from xsiam.block import PostNormBlock
from xsiam.feed_forward import FeedForwardPoint
from xsiam.linear import (
    FastLinear,
    RoundedWeights,
    linear,
    rounded_products,
    rounded_weights_kept,
)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 4, 7), (0, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_it_is_a_linear_layer(shape: tuple[int, ...], bias: bool, transposed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    weight = torch.randn(7, 6).mT if transposed else torch.randn(6, 7)
    offset = torch.randn(6) if bias else None
    wanted = nn.functional.linear(
        x.double(), weight.double(), None if offset is None else offset.double()
    )
    assert torch.allclose(linear(x, weight, offset).double(), wanted, atol=1e-5)


def test_strided_rows_and_float64_are_taken() -> None:
    x, weight = torch.randn(5, 4, 7).transpose(0, 1), torch.randn(6, 7)
    assert torch.allclose(linear(x, weight), x @ weight.mT, atol=1e-5)
    assert torch.equal(
        linear(x.double(), weight.double()), nn.functional.linear(x.double(), weight.double())
    )


def test_a_models_forward_keeps_its_numbers() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad").eval()
    features = encoder.preprocess([TEXT_A, TEXT_B])
    with torch.no_grad():
        own = encoder.split.embed(features)
        with FastLinear():
            fast = encoder.split.embed(features)
    assert torch.allclose(own, fast, atol=1e-5)


def test_gradients_pass_by() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(2, 4, requires_grad=True)
    with FastLinear():
        layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(2, 4))


@pytest.fixture
def rounds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ONEDNN", module._ONEDNN or torch.ops.mkldnn._linear_pointwise)
    monkeypatch.setattr(module, "_ROUNDS_HERE", True)
    monkeypatch.setattr(module, "_HAS_PRODUCTS", True)


def test_factors_are_rounded_to_bfloat16_where_that_is_done_here(rounds_here) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 64, generator=generator), torch.randn(40, 64, generator=generator)
    exact = x.double() @ weight.double().mT
    factors = x.bfloat16().double() @ weight.bfloat16().double().mT
    with rounded_products():
        rounded = linear(x, weight)
        few = linear(x[:8], weight)
        left = module._ONEDNN(x[:8], weight, None, "none", [], "")  # which may round, too
    assert torch.equal(few, left)
    if not torch.cpu._is_amx_tile_supported():
        assert torch.allclose(few.double(), exact[:8], atol=1e-4)
    assert rounded.dtype == torch.float32
    # The product is that of rounded factors, itself rounded: half a unit of 8 bits.
    assert torch.allclose(rounded.double(), factors, rtol=2**-8, atol=1e-4)
    assert (rounded - exact).norm() > 1e-3 * exact.norm()
    assert torch.allclose(linear(x, weight).double(), exact, atol=1e-4)


def test_what_stays_rounded_is_the_factor_of_the_next_product(rounds_here) -> None:
    generator = torch.Generator().manual_seed(0)
    x, first, second = (
        torch.randn(size, generator=generator) for size in ((300, 64), (40, 64), (50, 40))
    )
    with rounded_products():
        inner = linear(x, first, stays_rounded=True)
        assert torch.equal(linear(inner, second), linear(linear(x, first), second))
        few = linear(x[:8], first, stays_rounded=True)
    assert inner.dtype == torch.bfloat16
    with pytest.raises(RuntimeError):  # other types that differ are a mistake, not to be rounded
        linear(x.double(), first)
    assert few.dtype == linear(x, first, stays_rounded=True).dtype == torch.float32


@pytest.mark.parametrize("way", ["push", "push_pooled", "pull"])
def test_a_feed_forward_part_is_rounded_as_a_whole(rounds_here, way: str) -> None:
    """Its tangents stay rounded between the projections, and move by what rounding does."""
    torch.manual_seed(0)
    linears = [nn.Linear(32, 32), nn.Linear(32, 128), nn.Linear(128, 32)]
    square, up, down = (layer.requires_grad_(False) for layer in linears)
    norms = (nn.LayerNorm(32).requires_grad_(False), nn.LayerNorm(32).requires_grad_(False))
    block = PostNormBlock(
        square, square, square, square, norms[0], up, nn.GELU(), down, norms[1], n_heads=4
    )
    point = FeedForwardPoint(block, torch.randn(4, 10, 32), None)
    tangents = torch.randn(4, 10, 10, 32)

    def pushed() -> torch.Tensor:
        if way == "push_pooled":
            return point.push_pooled(tangents.clone(), torch.full((4, 10), 0.1))
        return getattr(point, way)(tangents.clone())

    exact = pushed()
    with rounded_products():
        rounded = pushed()
    assert rounded.dtype == torch.float32
    # Five factors and results of 8 bits, each off by half a unit at most.
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 5 * 2**-9


def test_weights_of_a_model_are_rounded_once_and_used_either_way(rounds_here) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, generator=generator)
    weight = nn.Parameter(torch.randn(40, 64, generator=generator)).requires_grad_(False)
    exact = x @ weight.mT
    kept = RoundedWeights(10_000)
    with rounded_products(), rounded_weights_kept(kept):
        rounded, again = linear(x, weight), linear(x, weight)
        back = linear(rounded, weight, transposed=True)
        assert kept.nbytes == 2 * weight.numel()  # one copy for both ways
        linear(x, weight.detach().clone())  # no parameter: another may be there at the next call
    assert kept.nbytes == 2 * weight.numel()
    assert torch.equal(rounded, again)
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 2**-8
    assert 1e-4 < (back - exact @ weight).norm() / (exact @ weight).norm() < 2 * 2**-8


def test_weights_that_do_not_fit_are_not_kept(rounds_here) -> None:
    weights = [nn.Parameter(torch.randn(8, 8)).requires_grad_(False) for _ in range(3)]
    x = torch.randn(300, 8)
    kept = RoundedWeights(300)
    with rounded_products(), rounded_weights_kept(kept):
        products = [linear(x, weight) for weight in weights]
    assert kept.nbytes == 256  # two of them
    for weight, product in zip(weights, products, strict=True):
        factors = x.bfloat16().float() @ weight.bfloat16().float().mT
        assert torch.allclose(product, factors, rtol=2**-8, atol=1e-3)


def test_exact_products_keep_nothing(rounds_here) -> None:
    weight = nn.Parameter(torch.randn(8, 8)).requires_grad_(False)
    kept = RoundedWeights(300)
    with rounded_weights_kept(kept):
        product = linear(torch.randn(300, 8), weight)
    assert kept.nbytes == 0
    assert product.dtype == torch.float32
