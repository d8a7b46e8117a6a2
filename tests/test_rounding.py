"""Rounded factors of matrix products: used where the tolerance leaves room, counted in errors.

Machines differ in whether they round at all, so that rounding is imitated here; the real one is
held to the same promise where there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import TEXTS, tiny_model
from test_honesty import assert_flags, assert_honest, errors, random_texts

from xsiam import PairAttributor, SiameseEncoder
from xsiam.errors import InputError
from xsiam.linear import RoundedWeights, rounded_weights_kept
from xsiam.paths import PathGroup, Rounding

BFLOAT16_LIKE = 3e-3
LOOSE = 3e-2
PROBE = "A dog runs after the kitten."  # the text that rounding is measured on


@pytest.fixture
def imitate(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[PathGroup], float]], list[int]]:
    """Let rounded token derivatives be off by a share of their norms, and note their lengths."""
    own = PathGroup._derivatives
    calls: list[int] = []

    def replace(share: Callable[[PathGroup], float]) -> list[int]:
        def derivatives(self, rows, alphas, at_once, rounded):
            exact = own(self, rows, alphas, at_once, False)
            calls.extend([self.length] * rounded)
            if not rounded:
                return exact
            noise = torch.randn(exact.shape, dtype=exact.dtype, generator=generator)
            noise /= exact.shape[1] ** 0.5
            return exact + share(self) * exact.norm(dim=1, keepdim=True) * noise

        generator = torch.Generator().manual_seed(0)
        monkeypatch.setattr(PathGroup, "_derivatives", derivatives)
        return calls

    return replace


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_errors_count_the_rounding(imitate, layer: int) -> None:
    calls = imitate(lambda group: BFLOAT16_LIKE)
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    rows = errors(encoder, layer, random_texts(6), tolerance=LOOSE)
    assert any(calls)
    assert_honest(rows)
    assert_flags(rows, LOOSE, 1.0)
    floor = min(max(row[0], row[2]) for row in rows)
    assert floor > BFLOAT16_LIKE / 10  # no error below what rounding does


def length_of(encoder: SiameseEncoder, text: str) -> int:
    return len(encoder.preprocess([text])["input_ids"][0])


def test_rounding_that_a_tolerance_has_no_room_for_is_not_tried(imitate) -> None:
    lengths = imitate(lambda group: BFLOAT16_LIKE)
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    texts = [text for text in TEXTS if length_of(encoder, text) != length_of(encoder, PROBE)]
    for options in ({}, {"tolerance": LOOSE, "matmul_precision": "highest"}):
        PairAttributor(encoder, 1, **options).token_vectors(texts)
        assert not lengths
    imitate(lambda group: 4 * BFLOAT16_LIKE)
    PairAttributor(encoder, 1, tolerance=5e-3).token_vectors(texts)
    assert set(lengths) == {length_of(encoder, PROBE)}  # which shows too much


@pytest.mark.parametrize(("of_points", "of_tangents"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_points_are_exact_where_there_is_room_for_rounded_tangents_only(
    imitate, of_points: float, of_tangents: float
) -> None:
    """The shares are what each is off by beside what it always is."""

    def share(group: PathGroup) -> float:
        assert group.rounding is not None
        return BFLOAT16_LIKE + (of_points if group.rounding.of_points else of_tangents)

    imitate(share)
    attributor = PairAttributor(
        SiameseEncoder(tiny_model(), shift=False, reference="pad"), 1, tolerance=LOOSE
    )
    with attributor.integrator.numerics():
        rounding = attributor.integrator._rounding
    if of_tangents:
        assert rounding is None
    else:
        assert rounding.of_points == (of_points == 0)
        assert BFLOAT16_LIKE / 10 < rounding.moves < LOOSE / 2


def test_a_text_that_rounding_spoils_is_integrated_without(imitate) -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    n_probe = length_of(encoder, PROBE)
    imitate(lambda group: BFLOAT16_LIKE if group.length == n_probe else 0.3)
    texts = [text for text in TEXTS if length_of(encoder, text) != n_probe]
    attributor = PairAttributor(encoder, 1, tolerance=LOOSE)
    spoilt = attributor.token_vectors(texts)
    first_rules = attributor.integrator._first_rules
    options = {"tolerance": LOOSE, "matmul_precision": "highest"}
    exact = PairAttributor(encoder, 1, **options).token_vectors(texts)
    n_first = [first_rules.of(length_of(encoder, text)).n_nodes for text in texts]
    for one, other, first in zip(spoilt, exact, n_first, strict=True):
        assert one.converged
        assert (one.vectors - other.vectors).abs().max() <= LOOSE * float(other.delta.norm())
        # What was spent in vain is counted: rounded it always is, exactly only where the rule that
        # is tried first is too little.
        assert one.n_nodes > first
        assert one.n_nodes > other.n_nodes or other.n_nodes > first
    assert any(other.n_nodes == first for other, first in zip(exact, n_first, strict=True))


@pytest.fixture
def rounds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xsiam.linear._HAS_PRODUCTS", True)


def test_rounded_weights_are_kept_until_the_weights_change(rounds_here) -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    options = {"tolerance": LOOSE, "cache_size": 1}
    attributor = PairAttributor(encoder, 1, **options)
    attributor.token_vectors(TEXTS)
    kept = attributor.integrator._rounded_weights()
    n_bytes = kept.nbytes
    assert n_bytes > 0
    attributor.token_vectors(TEXTS)
    assert attributor.integrator._rounded_weights() is kept
    assert kept.nbytes == n_bytes
    encoder.model[0].auto_model.encoder.layer[2].output.dense.weight.data.mul_(1.5)
    changed = attributor.token_vectors(TEXTS)
    assert attributor.integrator._rounded_weights() is not kept
    for one, other in zip(
        changed, PairAttributor(encoder, 1, **options).token_vectors(TEXTS), strict=True
    ):
        assert (one.vectors - other.vectors).abs().max() <= LOOSE * float(other.delta.norm())


def test_room_for_rounded_weights_is_taken_off_the_budget(rounds_here) -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    integrator = PairAttributor(encoder, 1).integrator
    with integrator.numerics(), rounded_weights_kept(RoundedWeights(60_000)):
        probe = [integrator._read_probe(PROBE)]
        group = integrator._group(probe, integrator.states([probe])[0])

        def fitting(budget: int, rounding: Rounding | None) -> tuple[int, int]:
            group.budget, group.rounding = budget, rounding
            return group._fitting(group.length, False)

        rounding = Rounding(1e-3, of_points=True)
        assert fitting(160_000, rounding) == fitting(100_000, None) != fitting(160_000, None)


def test_what_the_machine_rounds_is_honest() -> None:
    """With bfloat16 or TF32 units this is their rounding, without them none."""
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    rows = errors(encoder, 1, random_texts(12), tolerance=LOOSE)
    assert_honest(rows)
    assert_flags(rows, LOOSE, 1.0)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"`matmul_precision` to be one of .* but got 'high'"):
        PairAttributor(SiameseEncoder(tiny_model(), reference="pad"), 1, matmul_precision="high")
