"""Correlations: exact, honest about what is undefined, and over any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from xsiam.errors import InputError
from xsiam.metrics import Anisotropy, PairCorrelation, PairMean, pearson, spearman, undefined_reason

# Against scipy, float64: 2e-16 was the worst of 200 draws.
SCIPY = 1e-12


def draw(n: int, seed: int, ties: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    y = x + torch.randn(n, generator=generator, dtype=torch.float64)
    return ((x * 2).round(), (y * 2).round()) if ties else (x, y)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [2, 3, 7, 200])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(spearman, stats.spearmanr), (pearson, stats.pearsonr)]
)
def test_equal_to_scipy(
    ours: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[..., tuple[float, float]],
    n: int,
    ties: bool,
) -> None:
    compared = 0
    for seed in range(20):
        x, y = draw(n, seed, ties)
        if undefined_reason(x, y) is None:
            value = ours(x, y)
            assert value.dtype == torch.float64
            assert value.item() == pytest.approx(theirs(x.numpy(), y.numpy())[0], abs=SCIPY)
            compared += 1
    assert compared >= 5


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_pearson_survives_extreme_scales(scale: float) -> None:
    x, y = draw(20, 0, ties=False)
    assert pearson(x * scale, y).item() == pytest.approx(pearson(x, y).item(), abs=SCIPY)


@pytest.mark.parametrize(
    ("scores", "labels", "reason"),
    [
        ([], [], "needs 2 pairs or more, but there are 0"),
        ([0.5], [0.5], "needs 2 pairs or more, but there are 1"),
        ([0.25, 0.25, 0.25], [0.1, 0.2, 0.3], "all 3 scores are equal to 0.25"),
        ([0.1, 0.2], [0.75, 0.75], "all 2 labels are equal to 0.75"),
        ([math.nan, 0.2, math.inf], [0.1, 0.2, 0.3], "2 of 3 scores are not finite"),
    ],
)
def test_undefined_is_said_plainly(scores: list[float], labels: list[float], reason: str) -> None:
    x, y = torch.tensor(scores), torch.tensor(labels)
    assert reason in str(undefined_reason(x, y))
    for function in (spearman, pearson):
        with pytest.raises(InputError, match=reason):
            function(x, y)


def test_shapes_must_fit() -> None:
    with pytest.raises(InputError, match=r"shapes \(3,\) and \(2,\)"):
        spearman(torch.ones(3), torch.ones(2))


def test_metric_does_not_depend_on_batches_order_or_repeats() -> None:
    x, y = (values.float() for values in draw(23, 1, ties=False))
    metric = PairCorrelation()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    for rows in [*order.split(5), order[:4]]:  # the last batch repeats rows, as samplers do
        metric.update(x[rows], y[rows], rows)
    result = metric.compute()
    assert result.n_pairs == 23
    assert result.undefined is None
    assert result.spearman is not None
    assert result.pearson is not None
    assert result.spearman.item() == pytest.approx(spearman(x, y).item(), abs=SCIPY)
    assert result.pearson.item() == pytest.approx(pearson(x, y).item(), abs=SCIPY)
    metric.reset()
    assert not metric.update_called


def test_metric_says_why_it_is_undefined() -> None:
    metric = PairCorrelation()
    metric.update(torch.ones(3), torch.arange(3.0), torch.arange(3))
    assert metric.compute() == (None, None, "all 3 scores are equal to 1", 3)


def test_mean_weighs_batches_by_their_pairs_and_keeps_nan() -> None:
    metric = PairMean()
    metric.update(torch.tensor(1.0), 1)
    metric.update(torch.tensor(4.0), 2)
    assert metric.compute().item() == 3.0
    metric.update(torch.tensor(math.nan), 1)
    assert metric.compute().isnan()


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_anisotropy_is_the_mean_over_all_pairs(offset: float) -> None:
    generator = torch.Generator().manual_seed(4)
    vectors = torch.randn(60, 8, generator=generator) + offset
    metric = Anisotropy(8)
    for batch in vectors.split(7):
        metric.update(batch)
    units = torch.nn.functional.normalize(vectors.double(), dim=1)
    cosines = (units @ units.T)[~torch.eye(60, dtype=torch.bool)]
    # 2e-8 was the worst.
    assert metric.compute().item() == pytest.approx(cosines.mean().item(), abs=1e-6)


def test_anisotropy_in_closed_form() -> None:
    same, opposite, axes = Anisotropy(3), Anisotropy(3), Anisotropy(3)
    same.update(torch.ones(50, 3) * torch.arange(1, 51)[:, None])
    opposite.update(torch.tensor([[1.0, 0, 0], [-2.0, 0, 0]]))
    axes.update(torch.eye(3))
    found = [metric.compute().item() for metric in (same, opposite, axes)]
    assert found == pytest.approx([1.0, -1.0, 0.0], abs=1e-6)
    axes.update(torch.tensor([[math.nan, 0, 0]]))
    assert axes.compute().isnan()


def test_two_processes_add_up_their_embeddings() -> None:
    vectors = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) + 1
    alone, first, second = Anisotropy(4), Anisotropy(4), Anisotropy(4)
    for metric, rows in ((alone, vectors), (first, vectors[::2]), (second, vectors[1::2])):
        metric.update(rows)
    answers = iter([second.total, second.squares, second.n_embeddings])
    first.distributed_available_fn = lambda: True
    first.dist_sync_fn = lambda tensor, group: [tensor, next(answers)]
    assert first.compute().item() == pytest.approx(alone.compute().item(), abs=1e-6)


def test_two_processes_gather_scores() -> None:
    """The second process has seen pair 0 again, as a sampler that fills up would have it."""
    x, y = (values.float() for values in draw(7, 2, ties=True))
    own, others = torch.arange(7)[::2], torch.tensor([1, 3, 5, 0])
    metric, mean = PairCorrelation(), PairMean()
    metric.update(x[own], y[own], own)
    mean.update(torch.tensor(1.0), 3)
    for gathered, values in (
        (metric, [x[others], y[others], others]),
        (mean, [torch.tensor(4.0), torch.tensor(1.0)]),
    ):
        answers = iter(values)
        gathered.distributed_available_fn = lambda: True
        gathered.dist_sync_fn = lambda tensor, group, answers=answers: [tensor, next(answers)]
    result = metric.compute()
    assert (result.undefined, result.n_pairs) == (None, 7)
    assert result.spearman is not None
    assert result.spearman.item() == pytest.approx(spearman(x, y).item(), abs=SCIPY)
    assert mean.compute().item() == pytest.approx((3 * 1 + 4) / 4)
