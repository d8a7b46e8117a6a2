"""Matrices against the slow twin, identities, additivity of the score, budgets and bad input."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import ARCHITECTURES, REFERENCE_NAMES, TEXT_A, TEXT_B, TEXTS, tiny_model
from problems import slow_token_vectors
from sentence_transformers.base.modules import Dense, Normalize
from torch import nn

from xsiam.attribution import PairAttributor
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, ConvergenceWarning, InputError, ModelError
from xsiam.memory import parse_bytes
from xsiam.quadrature import FIXED_RULES, fixed_rule
from xsiam.result import PairAttribution
from xsiam.split import evaluation_mode

TWIN = 1e-11  # float64, of the largest entry; worst measured 3e-14
ADDS_UP = 1e-11  # float64, in units of the score; worst measured 2e-14
SINGLE = 2e-5  # float32, of the largest entry; worst measured 3e-6
LAYERS = range(4)


def encoder_of(architecture: str = "bert", **kwargs) -> SiameseEncoder:
    options = {k: kwargs.pop(k) for k in ("shift", "reference", "similarity") if k in kwargs}
    return SiameseEncoder(
        tiny_model(architecture, **kwargs).double(), **{"reference": "pad"} | options
    )


def fixed(encoder: SiameseEncoder, layer: int, n_nodes: int = 4, **kwargs) -> PairAttributor:
    return PairAttributor(encoder, layer, quadrature="gauss_legendre", n_nodes=n_nodes, **kwargs)


@pytest.mark.filterwarnings("ignore::xsiam.errors.ConvergenceWarning")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", LAYERS)
def test_matrix_equals_the_slow_twin(architecture: str, layer: int) -> None:
    encoder = encoder_of(architecture, similarity="dot", shift=False)
    ours = fixed(encoder, layer).attribute(TEXT_A, TEXT_B)
    rule = fixed_rule("gauss_legendre", 4)
    vectors = []
    with evaluation_mode(encoder):
        for text in (TEXT_A, TEXT_B):
            features = encoder.preprocess([text])
            with torch.no_grad():
                hidden = encoder.split.capture(features, layer)
                start = encoder.reference.hidden(encoder.split, features, layer)

            def tail(states: torch.Tensor, features=features) -> torch.Tensor:
                return encoder.split.tail(features, layer, states)

            vectors.append(slow_token_vectors(tail, hidden[0], start[0], rule.nodes, rule.weights))
    slow = vectors[0].T @ vectors[1]
    assert (ours.matrix - slow).abs().max() <= TWIN * slow.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_split_is_consistent_at_every_layer(architecture: str) -> None:
    encoder = encoder_of(architecture)
    features = encoder.preprocess([TEXT_A])
    with evaluation_mode(encoder), torch.no_grad():
        embedding = encoder.split.embed(features)
        for layer in range(encoder.n_layers + 1):
            hidden = encoder.split.capture(features, layer)
            assert (encoder.split.tail(features, layer, hidden) - embedding).abs().max() < 1e-12
            other = encoder.split.tail(features, layer, hidden * 1.1)
            assert (other - embedding).abs().max() > 1e-6  # what is put in does matter


HEADS = {
    "cos": lambda: tiny_model(),
    "dot": lambda: tiny_model(similarity_fn_name="dot"),
    "dot_normalize": lambda: tiny_model(extra=[Normalize()], similarity_fn_name="dot"),
    "truncated_cos": lambda: tiny_model(extra=[Normalize()], truncate_dim=16),
    "truncated_dot": lambda: tiny_model(
        extra=[Normalize()], truncate_dim=16, similarity_fn_name="dot"
    ),
    "dense": lambda: tiny_model(extra=[Dense(32, 24, activation_function=nn.Tanh())]),
    "cls": lambda: tiny_model(pooling="cls"),
    "prompt": lambda: tiny_model(
        prompts={"query": "query : ", "document": "passage : "}, include_prompt=False
    ),
}


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("reference", REFERENCE_NAMES)
def test_the_models_own_score_adds_up(head: str, shift: bool, reference: str) -> None:
    torch.manual_seed(0)
    encoder = SiameseEncoder(HEADS[head]().double(), shift=shift, reference=reference)
    attributor = PairAttributor(encoder, 2, tolerance=1e-9)
    result = attributor.attribute(TEXT_A, TEXT_B, "query", "document")
    own = encoder.score(TEXT_A, TEXT_B, "query", "document").item()
    assert result.score == pytest.approx(own, abs=1e-12)
    assert abs(result.residual) < 1e-8
    assert float(result.bordered().sum()) == pytest.approx(own - result.residual, abs=ADDS_UP)
    assert abs(result.convergence_delta) < 1e-8
    main = result.main_effects_a.abs().max() + result.main_effects_b.abs().max()
    if shift:  # the matrix alone is the score
        assert main + abs(result.intercept) < 1e-9
        assert float(result.matrix.sum()) == pytest.approx(own, abs=1e-8)
    else:
        assert main > 1e-3
        assert abs(result.intercept) > 1e-3


@pytest.mark.parametrize("layer", range(3))
def test_float64_converges_and_one_node_does_not(layer: int) -> None:
    encoder = encoder_of()
    result = PairAttributor(encoder, layer, tolerance=1e-10).attribute(TEXT_A, TEXT_B)
    assert result.converged
    assert result.completeness_error < 1e-10
    assert result.dtype == "float64"
    with pytest.warns(ConvergenceWarning, match=r"2 of 2 texts .* 1\.0e-10 at layer"):
        coarse = fixed(encoder, layer, 1, tolerance=1e-10).attribute(TEXT_A, TEXT_B)
    assert coarse.completeness_error > 1e-2
    assert not coarse.converged
    assert coarse.token_error == float("inf")


@pytest.mark.parametrize("architecture", ["bert", "albert"])
def test_reported_errors_are_honest(architecture: str) -> None:
    encoder = encoder_of(architecture)
    truth = PairAttributor(encoder, 0, tolerance=1e-9).token_vectors(TEXTS)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-5):
        ours = PairAttributor(encoder, 0, tolerance=tolerance).token_vectors(TEXTS)
        for exact, estimate in zip(truth, ours, strict=True):
            scale = exact.delta.norm()
            error = (estimate.vectors - exact.vectors).norm(dim=0).max() / scale
            total = (estimate.vectors.sum(1) - exact.delta).norm() / scale
            assert estimate.completeness_error == pytest.approx(float(total), rel=1e-3, abs=1e-9)
            assert error <= 3 * max(estimate.token_error, estimate.completeness_error)
            assert estimate.converged
            assert max(estimate.token_error, estimate.completeness_error) <= tolerance


def test_a_smaller_tolerance_costs_more_nodes() -> None:
    encoder = encoder_of()
    nodes = [
        PairAttributor(encoder, 0, tolerance=t).attribute(TEXT_A, TEXT_B).n_nodes
        for t in (1e-1, 1e-4, 1e-8)
    ]
    assert nodes == sorted(nodes)
    assert nodes[0] < nodes[2]


def test_the_last_layer_is_linear_and_costs_two_nodes() -> None:
    result = PairAttributor(encoder_of(), 3).attribute(TEXT_A, TEXT_B)
    assert result.n_nodes == 2
    assert result.completeness_error < 1e-13


def test_budgets_stop_refinement_and_say_so() -> None:
    encoder = encoder_of()
    with pytest.warns(ConvergenceWarning, match="attribution.max_nodes"):
        result = PairAttributor(encoder, 0, tolerance=1e-9, max_nodes=30).attribute(TEXT_A, TEXT_B)
    assert not result.converged
    assert result.n_nodes <= 30
    with pytest.warns(ConvergenceWarning, match="time budget"):
        result = PairAttributor(encoder, 0, tolerance=1e-9, time_budget=1e-9).attribute(
            TEXT_A, TEXT_B
        )
    assert not result.converged
    assert result.completeness_error > 1e-9


@pytest.mark.filterwarnings("ignore::xsiam.errors.ConvergenceWarning")
@pytest.mark.parametrize("quadrature", ["adaptive", *sorted(FIXED_RULES)])
def test_memory_budget_never_changes_the_numbers(quadrature: str) -> None:
    encoder = encoder_of()
    n_nodes = None if quadrature == "adaptive" else 5
    results = [
        PairAttributor(
            encoder, 2, quadrature=quadrature, n_nodes=n_nodes, memory_budget=budget
        ).attribute("a dog runs", "the cat sleeps")
        for budget in ("45KB", "100KB", "1GB")
    ]
    for result in results[1:]:
        assert (result.matrix - results[0].matrix).abs().max() < 1e-13
        assert result.n_nodes == results[0].n_nodes


def test_a_budget_below_one_tangent_is_refused_with_what_would_do() -> None:
    attributor = PairAttributor(encoder_of(), 2, memory_budget="1KB")
    with pytest.raises(InputError, match=r"\(5 tokens\), which takes about .* kB .* but got 1 kB"):
        attributor.attribute("a dog runs", "the cat sleeps")


def test_pairs_do_not_depend_on_each_other() -> None:
    encoder = encoder_of()
    attributor = PairAttributor(encoder, 1)
    together = attributor.attribute(list(TEXTS), list(TEXTS[::-1]))
    assert [r.text_b for r in together] == list(TEXTS[::-1])
    for result in together:
        alone = attributor.attribute(result.text_a, result.text_b)
        assert (alone.matrix - result.matrix).abs().max() < 1e-12
        assert alone.n_nodes == result.n_nodes
        swapped = attributor.attribute(result.text_b, result.text_a)
        assert (swapped.matrix.T - result.matrix).abs().max() < 1e-12


def test_each_distinct_text_is_integrated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attributor = PairAttributor(encoder_of(), 2)
    attributor.attribute("the kitten", "a small red dog")
    seen: list[int] = []
    states = attributor.integrator.states
    monkeypatch.setattr(
        attributor.integrator,
        "states",
        lambda groups: seen.extend(map(len, groups)) or states(groups),
    )
    attributor.attribute([TEXT_A, TEXT_A, TEXT_B], [TEXT_B, TEXT_A, TEXT_B])
    assert sum(seen) == 2


def test_a_text_equal_to_its_reference_attributes_nothing() -> None:
    encoder = encoder_of(shift=False)
    pads = " ".join(["[PAD]"] * 4)
    result = PairAttributor(encoder, 1).attribute(pads, TEXT_B)
    assert result.matrix.abs().max() < 1e-12
    assert result.completeness_error_a < 1e-12
    assert result.converged_a


def test_float32_agrees_with_float64() -> None:
    exact = PairAttributor(encoder_of(), 1, tolerance=1e-9).attribute(TEXT_A, TEXT_B)
    single = SiameseEncoder(tiny_model(), reference="pad")
    result = PairAttributor(single, 1, tolerance=1e-5).attribute(TEXT_A, TEXT_B)
    assert result.matrix.dtype == torch.float32
    assert (result.matrix - exact.matrix).abs().max() <= SINGLE * exact.matrix.abs().max()


def test_half_precision_weights_are_attributed_in_float32() -> None:
    encoder = SiameseEncoder(tiny_model().bfloat16(), shift=False, reference="pad")
    result = PairAttributor(encoder, 2).attribute(TEXT_A, TEXT_B)
    assert result.dtype == "float32"
    assert encoder.dtype == torch.bfloat16
    assert abs(result.residual) < 1e-3


def test_features_sum_to_the_entry() -> None:
    encoder = encoder_of()
    result = PairAttributor(encoder, 1, tolerance=1e-9).attribute(TEXT_A, TEXT_B)
    features = PairAttributor(encoder, 1).attribute_features(
        TEXT_A, TEXT_B, [(1, 2), (3, 4)], n_nodes=96
    )
    assert features.matrices.shape == (2, 32, 32)
    for (i, j), matrix in zip(features.pairs, features.matrices, strict=True):
        assert float(matrix.sum()) == pytest.approx(float(result.matrix[i, j]), abs=1e-8)
    with pytest.raises(InputError, match=r"but got \(0, 99\)"):
        PairAttributor(encoder, 1).attribute_features(TEXT_A, TEXT_B, [(0, 99)])


def test_works_in_inference_mode_and_leaves_no_trace() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad").train()
    attributor = PairAttributor(encoder, 1)
    state = torch.get_rng_state()
    outside = attributor.attribute(TEXT_A, TEXT_B)
    with torch.inference_mode():
        inside = attributor.attribute(TEXT_A, TEXT_B)
    assert torch.equal(outside.matrix, inside.matrix)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in encoder.modules())
    assert all(p.grad is None for p in encoder.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in encoder.modules())
    assert not any("forward" in vars(m) for m in encoder.split.blocks)


def test_prompts_are_tokens_of_their_own() -> None:
    model = tiny_model(prompts={"query": "query : ", "document": ""})
    encoder = SiameseEncoder(model, reference="pad")
    result = PairAttributor(encoder, 2).attribute("dog runs", "cat", "query", "document")
    assert result.tokens_a == ("[CLS]", "query", ":", "dog", "runs", "[SEP]")
    assert result.prompt_mask_a == (False, True, True, False, False, False)
    assert result.special_mask_a == (True, False, False, False, False, True)
    assert result.offsets_a == ((0, 0), (0, 0), (0, 0), (0, 3), (4, 8), (0, 0))
    assert result.prompt_mask_b == (False,) * 3


def test_results_round_trip(tmp_path) -> None:
    result = PairAttributor(encoder_of(), 2).attribute(TEXT_A, TEXT_B)
    result.save(tmp_path / "r.safetensors")
    loaded = PairAttribution.load(tmp_path / "r.safetensors")
    assert loaded.to_dict() == result.to_dict()
    assert type(loaded.offsets_a[1]) is tuple
    strongest = loaded.top_pairs(3)
    assert abs(strongest[0].value) == pytest.approx(float(result.matrix.abs().max()))
    assert result.matrix[strongest[2].i, strongest[2].j] == strongest[2].value
    assert loaded.tokens_a[strongest[0].i] == strongest[0].token_a
    (tmp_path / "bad").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="bad, but"):
        PairAttribution.load(tmp_path / "bad")


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0, -1e-3, float("nan"), True, "1e-3"])
def test_bad_tolerance(tolerance) -> None:
    with pytest.raises(InputError, match=rf"got {tolerance!r}. Set `attribution.tolerance`"):
        PairAttributor(encoder_of(), 1, tolerance=tolerance)


def test_bad_arguments() -> None:
    encoder = encoder_of()
    with pytest.raises(InputError, match="between 0 and 3 for BertModel, but got 9"):
        PairAttributor(encoder, 9)
    with pytest.raises(InputError, match="adaptive quadrature, but got 5"):
        PairAttributor(encoder, 1, n_nodes=5)
    with pytest.raises(InputError, match=r"got 'lots'\. Set `attribution.memory_budget`"):
        PairAttributor(encoder, 1, memory_budget="lots")
    attributor = PairAttributor(encoder, 1)
    with pytest.raises(InputError, match=r"row 0 is ' '"):
        attributor.attribute(" ", "dog")
    with pytest.raises(InputError, match="got 'nobody'"):
        attributor.attribute("dog", "cat", "nobody")


def test_sizes() -> None:
    assert parse_bytes("2GB") == 2 * 10**9
    assert parse_bytes("1.5 MiB") == 3 * 2**19
    assert parse_bytes(7) == 7
    for bad in ("0", "-1GB", "2 parsecs", True):
        with pytest.raises(InputError, match=f"got {bad!r}"):
            parse_bytes(bad)


def test_hidden_states_that_are_not_finite_are_named() -> None:
    encoder = encoder_of()
    attributor = PairAttributor(encoder, 1)
    with torch.no_grad():
        encoder.model[0].auto_model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layer 1 \(from block 0\) are not for 'the small dog"):
        attributor.attribute(TEXT_A, TEXT_B)


def test_attention_without_forward_derivatives_is_refused() -> None:
    encoder = encoder_of()
    encoder.split.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="runs 'flash_attention_2'"):
        PairAttributor(encoder, 1)


def test_no_stray_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        PairAttributor(SiameseEncoder(tiny_model(), reference="pad"), 2).attribute(TEXT_A, TEXT_B)
