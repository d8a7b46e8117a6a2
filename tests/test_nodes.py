"""Rational curves, mapped rules, and the plan that chooses nodes with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import TEXT_A, TEXT_B, tiny_model

from xsiam import PairAttributor, SiameseEncoder
from xsiam.curves import Piece, PiecewiseCurve, rational_curve
from xsiam.first_rules import FirstRules, first_rules
from xsiam.integration import integrate_adaptive
from xsiam.nodes import FEWEST_SAMPLES
from xsiam.panels import gauss
from xsiam.quadrature import Rule, gauss_legendre, sinh_map, sinh_mapped

CENTRE, WIDTH = 0.37, 0.02


def peak(points: np.ndarray) -> np.ndarray:
    """A curve in R^3 with poles at CENTRE ± i WIDTH, [m, 3]."""
    x = np.asarray(points)[:, None]
    return np.concatenate(
        [1 / ((x - CENTRE) ** 2 + WIDTH**2), x / ((x - CENTRE) ** 2 + WIDTH**2), 1 + x], axis=1
    )


def peak_integral() -> np.ndarray:
    """Its integral over [0, 1] in closed form."""
    angle = (np.arctan((1 - CENTRE) / WIDTH) + np.arctan(CENTRE / WIDTH)) / WIDTH
    half_log = 0.5 * np.log(((1 - CENTRE) ** 2 + WIDTH**2) / (CENTRE**2 + WIDTH**2))
    return np.array([angle, half_log + CENTRE * angle, 1.5])


def peak_error(rule: Rule) -> float:
    """The error of a rule on it, relative to its size."""
    difference = rule.weights.numpy() @ peak(rule.nodes.numpy()) - peak_integral()
    return float(np.linalg.norm(difference) / np.linalg.norm(peak_integral()))


def test_a_rational_curve_follows_a_peak_that_polynomials_miss() -> None:
    points = gauss_legendre(12).nodes.numpy()
    exact = peak_integral()
    curve = rational_curve(points, peak(points), exact, 1e-10)
    samples = curve(points)
    assert np.allclose(samples @ samples.T, peak(points) @ peak(points).T, rtol=1e-6)
    wanted = np.linalg.norm(exact)
    # its integral is taken by a dense fixed rule, which has an error of its own
    assert np.linalg.norm(curve.integral()) == pytest.approx(wanted, rel=1e-4)
    polynomial = gauss_legendre(12).weights.numpy() @ peak(points)
    assert np.linalg.norm(polynomial - exact) > 0.1 * wanted


def test_pieces_follow_a_curve_through_the_samples_of_their_rules() -> None:
    """Plain on one part, in the variable of a mapped rule on the part that holds the peak."""
    parts = [
        (0.0, 0.25, gauss_legendre(16)),
        (0.25, 0.5, sinh_mapped(gauss_legendre(40), 4 * (CENTRE - 0.25), 4 * WIDTH)),
        (0.5, 1.0, gauss_legendre(20)),
    ]
    curve = PiecewiseCurve(
        [
            Piece(left, right, rule, peak(left + (right - left) * rule.nodes.numpy()))
            for left, right, rule in parts
        ]
    )
    points = np.array([0.0, 0.1, 0.25, 0.3, CENTRE, 0.44, 0.5, 0.8, 1.0])
    assert np.allclose(curve(points), peak(points), rtol=1e-6, atol=1e-6)
    assert curve.integral() == pytest.approx(peak_integral(), rel=1e-6)
    at_nodes = 0.25 + 0.25 * parts[1][2].nodes.numpy()
    assert np.allclose(curve(at_nodes), peak(at_nodes), rtol=1e-12)  # where it was sampled


def test_a_constant_curve_needs_one_support_point() -> None:
    points = np.linspace(0.1, 0.9, 5)
    curve = rational_curve(points, np.full((5, 4), 2.0), np.full(4, 2.0), 1e-12)
    assert len(curve.support) == 1
    assert np.linalg.norm(curve(np.array([0.0, 1.0])), axis=1) == pytest.approx([4.0, 4.0])


@pytest.mark.parametrize("centre", [-0.1, 0.0, 0.37, 1.0])
@pytest.mark.parametrize("width", [0.03, 2.0])
def test_the_map_covers_the_path_with_its_own_slope(centre: float, width: float) -> None:
    u = np.linspace(0, 1, 11)
    alpha, slope = sinh_map(u, centre, width)
    assert alpha[[0, -1]] == pytest.approx([0.0, 1.0], abs=1e-12)
    assert (np.diff(alpha) > 0).all()
    step = 1e-6
    numeric = (sinh_map(u + step, centre, width)[0] - sinh_map(u - step, centre, width)[0]) / 2
    assert slope == pytest.approx(numeric / step, rel=1e-5)


def test_mapped_nodes_integrate_a_peak_with_a_fraction_of_the_nodes() -> None:
    mapped = sinh_mapped(gauss_legendre(16), CENTRE, WIDTH)
    assert peak_error(mapped) < 1e-5
    assert peak_error(gauss_legendre(64)) > 1e-3
    embedded = Rule(mapped.nodes, mapped.embedded_weights)
    assert peak_error(embedded) > peak_error(mapped)


class Peaked:
    """Paths of one text whose token derivatives have a narrow peak, as far as plans look."""

    size, reverse, rounding = 1, False, None
    start = torch.zeros(1, 1, 2, dtype=torch.float64)
    noise = torch.zeros(1, dtype=torch.float64)

    def __init__(self, length: int) -> None:
        self.length = length
        self.shares = torch.linspace(0.5, 1.5, length, dtype=torch.float64) / length
        self.start_embeddings = torch.zeros(1, 3, dtype=torch.float64)
        self.end_embeddings = torch.from_numpy(peak_integral())[None]
        self.n_sampled = self.n_evaluated = 0

    def totals(self, rows, alphas):
        self.n_sampled += len(alphas)
        return None, torch.from_numpy(peak(alphas.numpy()))

    def embed(self, rows, alphas):
        half = 2 * gauss_legendre(200).nodes.numpy()  # panels of 0 … α, by brute force
        weights = 2 * gauss_legendre(200).weights.numpy()
        return torch.stack(
            [
                torch.from_numpy(weights @ peak(alpha * half / 2)) * alpha / 2
                for alpha in alphas.numpy()
            ]
        )

    def token_sums(self, rows, alphas, weights, panels, rounded=False):
        self.n_evaluated += len(alphas)
        values = torch.from_numpy(peak(alphas.numpy()))[..., None] * self.shares  # [n, 3, S]
        n_panels = int(panels.max()) + 1
        one_hot = torch.nn.functional.one_hot(panels, n_panels).double()
        return torch.einsum("wn,np,nks->wpks", weights, one_hot, values), values.sum(2)


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("first", [None, gauss_legendre(4), gauss_legendre(12)])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
def test_a_peak_is_planned_on_few_samples(length: int, first, tolerance: float) -> None:
    group = Peaked(length)
    (result,) = integrate_adaptive(group, tolerance, 4096, first=first)  # type: ignore[arg-type]
    assert result.converged
    exact = group.end_embeddings[0, :, None] * group.shares
    scale = float(group.end_embeddings.norm())
    assert result.completeness_error <= tolerance
    assert float((result.vectors - exact).norm(dim=0).max()) <= tolerance * scale
    assert group.n_evaluated == result.n_nodes <= 60
    assert group.n_sampled <= 200


class Steep(Peaked):
    """The same at a peak so narrow that points known to float32 do not tell embeddings apart."""

    start = torch.zeros(1, 1, 2, dtype=torch.float32)
    centre = 0.3237

    def __init__(self, length: int, width: float) -> None:
        super().__init__(length)
        self.width = width
        self.end_embeddings = torch.from_numpy(self.antiderivative(np.ones(1)))

    def antiderivative(self, points: np.ndarray) -> np.ndarray:
        turn = [np.arctan((x - self.centre) / self.width) for x in (points, np.zeros(1))]
        return np.stack([(turn[0] - turn[1]) / np.pi, points, points**2 / 2], axis=1)

    def derivative(self, points: np.ndarray) -> np.ndarray:
        height = self.width / ((points - self.centre) ** 2 + self.width**2) / np.pi
        return np.stack([height, np.ones_like(points), points], axis=1)

    def perturbed(self) -> Steep:
        return self

    def jittered(self, alphas: torch.Tensor) -> np.ndarray:
        points = alphas.numpy()
        return points + 0.5 * torch.finfo(torch.float32).eps * np.sin(1e9 * points)

    def totals(self, rows, alphas):
        self.n_sampled += len(alphas)
        return None, torch.from_numpy(self.derivative(self.jittered(alphas)))

    def embed(self, rows, alphas):
        return torch.from_numpy(self.antiderivative(self.jittered(alphas)))

    def token_sums(self, rows, alphas, weights, panels, rounded=False):
        self.n_evaluated += len(alphas)
        values = torch.from_numpy(self.derivative(self.jittered(alphas)))[..., None] * self.shares
        one_hot = torch.nn.functional.one_hot(panels, int(panels.max()) + 1).double()
        return torch.einsum("wn,np,nks->wpks", weights, one_hot, values), values.sum(2)


@pytest.mark.parametrize(
    ("width", "tolerance", "can_converge"),
    [(1e-4, 1e-3, True), (1e-5, 3e-3, True), (1e-5, 5e-4, False)],
)
def test_refinement_ends_where_rounding_hides_a_sharp_turn(
    width: float, tolerance: float, can_converge: bool
) -> None:
    group = Steep(9, width)
    (result,) = integrate_adaptive(group, tolerance, 4096)  # type: ignore[arg-type]
    exact = group.end_embeddings[0, :, None] * group.shares
    scale = float(group.end_embeddings.norm())
    assert result.n_nodes <= 400
    assert group.n_sampled <= 2000
    assert float((result.vectors - exact).norm(dim=0).max()) <= 3 * scale * result.token_error
    assert result.converged == can_converge


def test_paths_begin_with_a_rule_that_does_for_the_peak_of_ours() -> None:
    groups = [Peaked(9), Peaked(9)]
    rule = first_rules(groups, 1e-3, 4096).of(9)  # type: ignore[arg-type]
    assert 8 < rule.n_nodes <= 24
    assert peak_error(rule) <= 1e-3
    assert all(group.n_sampled <= 200 and group.n_evaluated == 0 for group in groups)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_paths_begin_with_room_for_texts_that_err_more_than_ours(tolerance: float) -> None:
    """A node more costs less than what misses, so that a rule just good enough is not taken."""
    rule = first_rules([Peaked(9)], tolerance, 4096).of(9)  # type: ignore[arg-type]
    assert peak_error(rule) <= tolerance / 3


def test_what_a_path_begins_with_depends_on_what_samples_cost() -> None:
    """Samples of a short text cost much, so that it is not planned on its own; of a long one not.

    With a tenth of the chance to miss, 48 nodes for everybody cost what 30 and 100 samples do.
    """
    many, few = gauss_legendre(48), gauss_legendre(20)
    rules = FirstRules([(few, 1.0), (many, 0.1)], n_sampled=100, n_planned=30)
    assert rules.of(8) is many
    assert rules.of(512) is None
    cheap = FirstRules([(few, 0.01), (many, 0.0)], n_sampled=100, n_planned=30)
    assert {cheap.of(length) for length in (4, 16, 64, 512)} == {few}
    assert FirstRules().of(8) is None


class OnAccelerator(Peaked):
    """The same where evaluating takes less time than choosing rules."""

    start = torch.zeros(1, 1, 2, dtype=torch.float64, device="meta")


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
def test_accelerators_take_a_rule_that_hardly_any_text_misses(tolerance: float) -> None:
    """It has more nodes, and texts of the usual length are evaluated at once, without samples."""
    plain = first_rules([Peaked(40)], tolerance, 4096).of(40)  # type: ignore[arg-type]
    rule = first_rules([OnAccelerator(40)], tolerance, 4096).of(40)  # type: ignore[arg-type]
    assert rule.n_nodes >= plain.n_nodes
    assert peak_error(rule) <= tolerance / 5
    found = {}
    for kind in (Peaked, OnAccelerator):
        group = kind(40)
        (result,) = integrate_adaptive(group, tolerance, 4096, first=rule)  # type: ignore[arg-type]
        assert result.converged
        found[kind] = group.n_sampled
    assert found[Peaked] > found[OnAccelerator] == 0
    group = OnAccelerator(40)
    integrate_adaptive(group, tolerance, 4096, first=None)  # type: ignore[arg-type]
    assert group.n_sampled > 0


class TwoTurns(OnAccelerator):
    """Turns at two places, too sharp for one rule."""

    width, centres = 0.004, (0.2, 0.7)

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.end_embeddings = torch.from_numpy(self.antiderivative(np.ones(1)))

    def antiderivative(self, points: np.ndarray) -> np.ndarray:
        turns = [
            np.arctan((points - c) / self.width) - np.arctan(-c / self.width) for c in self.centres
        ]
        return np.stack([*turns, points], axis=1)

    def derivative(self, points: np.ndarray) -> np.ndarray:
        turns = [self.width / ((points - c) ** 2 + self.width**2) for c in self.centres]
        return np.stack([*turns, np.ones_like(points)], axis=1)

    def totals(self, rows, alphas):
        self.n_sampled += len(alphas)
        return None, torch.from_numpy(self.derivative(alphas.numpy()))

    def embed(self, rows, alphas):
        return torch.from_numpy(self.antiderivative(alphas.numpy()))

    def token_sums(self, rows, alphas, weights, panels, rounded=False):
        self.n_evaluated += len(alphas)
        values = torch.from_numpy(self.derivative(alphas.numpy()))[..., None] * self.shares
        one_hot = torch.nn.functional.one_hot(panels, int(panels.max()) + 1).double()
        return torch.einsum("wn,np,nks->wpks", weights, one_hot, values), values.sum(2)


def test_accelerators_take_panels_where_no_rule_does_for_a_whole_path() -> None:
    rule = first_rules([TwoTurns(40)], 1e-4, 4096).of(40)  # type: ignore[arg-type]
    plain = first_rules([TwoTurns(40)], 1e-4, 40).of(40)  # type: ignore[arg-type]  # no room
    assert plain is None
    assert rule.n_nodes > 40
    assert (rule.nodes.diff() > 0).all()
    assert float(rule.weights.sum()) == pytest.approx(1, abs=1e-12)
    group = TwoTurns(40)
    (result,) = integrate_adaptive(group, 1e-4, 4096, first=rule)  # type: ignore[arg-type]
    exact = group.end_embeddings[0, :, None] * group.shares
    error = float((result.vectors - exact).norm(dim=0).max() / group.end_embeddings.norm())
    assert result.converged
    assert (result.n_nodes, group.n_sampled) == (rule.n_nodes, 0)
    assert error <= 3 * result.token_error


def test_what_a_first_rule_sampled_is_not_sampled_again() -> None:
    class Recording(Peaked):
        def totals(self, rows, alphas):
            self.sampled = {*getattr(self, "sampled", ()), *alphas.tolist()}
            return super().totals(rows, alphas)

    group, first = Recording(5), gauss_legendre(4)
    (result,) = integrate_adaptive(group, 1e-3, 4096, first=first)  # type: ignore[arg-type]
    assert result.converged
    assert result.n_nodes > first.n_nodes
    assert group.sampled
    assert not group.sampled & set(first.nodes.tolist())


def test_texts_that_are_not_planned_count() -> None:
    """They are sampled where the planned ones were, and what their paths ask for is heard."""
    alike = [Steep(9, 0.1) for _ in range(6)]
    rule = first_rules(alike, 1e-3, 4096).of(9)  # type: ignore[arg-type]
    assert 0 < alike[-1].n_sampled < alike[0].n_sampled
    others = [Steep(9, 0.1) for _ in range(3)] + [Steep(9, 0.05) for _ in range(3)]
    longer = first_rules(others, 1e-3, 4096).of(9)  # type: ignore[arg-type]
    assert longer.n_nodes > rule.n_nodes
    for chosen, width in ((rule, 0.1), (longer, 0.05)):
        (result,) = integrate_adaptive(Steep(9, width), 1e-3, 4096, first=chosen)  # type: ignore[arg-type]
        assert result.converged
        assert result.n_nodes == chosen.n_nodes


def test_a_first_rule_that_a_text_may_miss_leaves_samples_enough_to_plan_it() -> None:
    """Five nodes would do for this path, to the tolerance."""
    group = Steep(9, 0.2)
    exact = group.end_embeddings[0]
    few = gauss(FEWEST_SAMPLES - 1)
    error = few.weights @ torch.from_numpy(group.derivative(few.nodes.numpy())) - exact
    assert error.norm() <= 0.1 * exact.norm()
    rule = first_rules([group] * 3, 0.1, 4096).of(9)  # type: ignore[arg-type]
    assert rule.n_nodes == FEWEST_SAMPLES


def test_a_path_without_a_first_rule_is_planned_before_its_tokens_are_evaluated() -> None:
    group = Steep(9, 1e-3)
    (result,) = integrate_adaptive(group, 1e-3, 4096, first=None)  # type: ignore[arg-type]
    assert result.converged
    assert group.n_evaluated == result.n_nodes
    at_once = Steep(9, 1e-3)
    (wasteful,) = integrate_adaptive(at_once, 1e-3, 4096, first=gauss(8))  # type: ignore[arg-type]
    assert wasteful.n_nodes > result.n_nodes


@pytest.mark.parametrize("max_nodes", [64, 4096])
def test_turns_too_steep_for_one_rule_are_not_probed_to_their_end(max_nodes: int) -> None:
    groups = [Steep(9, 1e-5) for _ in range(3)]
    rule = first_rules(groups, 1e-3, max_nodes).of(9)  # type: ignore[arg-type]
    assert rule is None
    assert groups[0].n_sampled <= 200
    assert [group.n_sampled for group in groups[1:]] == [0, 0]


@pytest.mark.parametrize("moved", [0.0, 1e-3])
def test_noise_of_tokens_that_cancels_in_the_sum_is_reported(moved: float) -> None:
    class Rounded(Peaked):
        noise = torch.full((1,), 1e-5, dtype=torch.float64)

        def perturbed(self):
            other = Rounded(self.length)
            other.shares[0] += moved
            other.shares[1] -= moved  # no embedding moves
            return other

    group = Rounded(5)
    (result,) = integrate_adaptive(group, 1e-8, 4096)  # type: ignore[arg-type]
    typical = float(torch.from_numpy(peak(gauss_legendre(5).nodes.numpy())).norm(dim=1).median())
    scale = float(group.end_embeddings.norm())
    if moved:
        assert result.token_error * scale >= moved * typical
    else:
        assert result.token_error * scale <= 1e-4


def test_plans_do_not_depend_on_what_was_attributed_before() -> None:
    encoder = SiameseEncoder(tiny_model().double(), shift=False, reference="pad")
    fresh = PairAttributor(encoder, 0, cache_size=1)
    used = PairAttributor(encoder, 0, cache_size=1)
    used.token_vectors(["the kitten", "a small red dog is in the house", TEXT_B])
    ours, theirs = fresh.token_vectors([TEXT_A])[0], used.token_vectors([TEXT_A])[0]
    assert torch.equal(ours.vectors, theirs.vectors)
    assert ours.n_nodes == theirs.n_nodes
