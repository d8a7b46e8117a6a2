"""Other ways to give every pair of tokens a value, beside attribution: one interface, with costs.

A baseline maps a pair of texts to a matrix over the texts' own tokens, [n_a, n_b] float64, without
special and prompt tokens. To add one, decorate a function of a `PairCase` with `@baseline(name)`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xsiam.analysis.base import NotApplicableError
from xsiam.analysis.matrices import own_entries
from xsiam.encoder import SiameseEncoder
from xsiam.families import AutodiffLineariser
from xsiam.jacobian import exact_numerics
from xsiam.perturbation import (
    Absence,
    Roles,
    embed_without,
    interactions,
    score_matrix,
)
from xsiam.result import PairAttribution, own_places
from xsiam.split import evaluation_mode, features_to

__all__ = [
    "ATTRIBUTION",
    "BASELINES",
    "MOST_PLAYERS",
    "BaselineMatrix",
    "PairCase",
    "baseline",
    "explain",
    "shapley_budget",
]

ATTRIBUTION = "attribution"
"""What our own matrix is called among the baselines."""

MOST_PLAYERS = 32
"""Own tokens of both texts together, up to which Shapley interactions are estimated."""

_TANGENTS_AT_ONCE = 32


@dataclass(frozen=True)
class PairCase:
    """A pair of texts as baselines see it.

    Attributes:
        encoder: The model.
        result: Our attribution of the pair, which also says what its tokens and its layer are.
        absence: What an absent token is, for baselines that leave tokens out.
        roles: Roles of the texts.
        seed: Of what is drawn.
    """

    encoder: SiameseEncoder
    result: PairAttribution
    absence: Absence
    roles: Roles = (None, None)
    seed: int = 0


@dataclass(frozen=True)
class BaselineMatrix:
    """What a baseline says of a pair, and what that took.

    Attributes:
        matrix: Values of pairs of own tokens, [n_a, n_b] float64.
        forwards: Texts that went through the model.
        derivatives: Derivatives for one token at one point, each about the cost of a text.
        seconds: Wall-clock time; None for our attribution, which was made before.
    """

    matrix: Tensor
    forwards: int
    derivatives: int
    seconds: float | None


Values = tuple[Tensor, int, int]  # the matrix, texts that went through, derivatives
Function = Callable[[PairCase], Values]

BASELINES: dict[str, Function] = {}
"""Functions by name, in the order of tables."""


def baseline(name: str) -> Callable[[Function], Function]:
    """Enter a function into the registry of baselines.

    Raises:
        ValueError: If the name is taken by another function.
    """

    def register(function: Function) -> Function:
        taken = BASELINES.get(name)
        if taken is not None and taken.__qualname__ != function.__qualname__:
            raise ValueError(f"Expected a new name, but {name!r} is {taken.__qualname__}.")
        BASELINES[name] = function
        return function

    return register


def explain(name: str, case: PairCase) -> BaselineMatrix:
    """Return the matrix of a baseline, with its cost.

    Raises:
        NotApplicableError: If the baseline cannot say anything of this pair or model.
    """
    start = time.perf_counter()
    matrix, forwards, derivatives = BASELINES[name](case)
    seconds = None if name == ATTRIBUTION else time.perf_counter() - start
    return BaselineMatrix(matrix, forwards, derivatives, seconds)


@baseline(ATTRIBUTION)
def _attribution(case: PairCase) -> Values:
    """A = G_aᵀ G_b / n, ours: token derivatives at every node, beside the search for nodes."""
    result = case.result
    derivatives = result.n_nodes_a * len(result.tokens_a) + result.n_nodes_b * len(result.tokens_b)
    return own_entries(result), 4, derivatives  # both texts and both references


@baseline("one_node")
def _one_node(case: PairCase) -> Values:
    """The integrand of attribution at the text alone: G_s = J_s(h) (h_s − r_s) in place of ∫."""
    return _differentiated(case, case.result.layer, from_reference=True)


@baseline("gradient_times_input")
def _gradient_times_input(case: PairCase) -> Values:
    """Gradient × input on both sides: Σ_k (Σ_d ∂ẽ_k/∂h_id h_id) (Σ_d ∂ẽ_k/∂h_jd h_jd) / n.

    The input is the hidden states h at the layer that was attributed, not their difference from a
    reference.
    """
    return _differentiated(case, case.result.layer, from_reference=False)


@baseline("last_layer")
def _last_layer(case: PairCase) -> Values:
    """Token decomposition at the last layer L: products of what each token adds to the embedding.

    For mean pooling, h_i·h_j / (S_a S_b n) of the last hidden states; in a model with a shift of
    h − r, so that all pairs sum to the score in both kinds. Dense modules behind the pooling are
    linearised at the text: the sum is the score where they are linear and have no bias.
    """
    return _differentiated(case, case.encoder.n_layers, from_reference=case.encoder.shift)


@baseline("embedding_cosine")
def _embedding_cosine(case: PairCase) -> Values:
    """Cosine of the states that enter block 0, word vectors with what positions add to them."""
    units = []
    for text, role, places in _sides(case):
        features = features_to(case.encoder.preprocess([text], role), case.encoder.device)
        with torch.no_grad(), evaluation_mode(case.encoder):
            states = case.encoder.split.capture(features, 0)[0, places].double()
        units.append(torch.nn.functional.normalize(states, dim=1))
    return (units[0] @ units[1].mT).cpu(), 2, 0


@baseline("leave_one_out")
def _leave_one_out(case: PairCase) -> Values:
    """Interaction of two tokens: the score with both, less with either absent, plus with neither.

    See :func:`xsiam.perturbation.interactions`.
    """
    places_a, places_b = own_places(case.result)
    found = interactions(case.encoder, case.result, case.absence, case.roles)
    return found.cpu(), len(places_a) + len(places_b) + 2, 0


@baseline("shapley")
def _shapley(case: PairCase) -> Values:
    """Faithful Shapley interactions of order 2 of a token of each text, by shapiq's regression.

    Players are the own tokens of both texts, the value of a coalition is the score with all others
    absent. `shapley_budget` coalitions are drawn, of which each text's distinct ones are embedded.

    References:
        Tsai, Yeh and Ravikumar, "Faith-Shap: The Faithful Shapley Interaction Index" (JMLR 2023).
    """
    from shapiq.approximator import RegressionFSII

    places_a, places_b = own_places(case.result)
    n_a, n = len(places_a), len(places_a) + len(places_b)
    if n > MOST_PLAYERS:
        raise NotApplicableError(f"{n} tokens are more than the {MOST_PLAYERS} of Shapley values")
    if case.absence.protocol == "drop":
        raise NotApplicableError("a text whose tokens are all dropped has no score")
    used = 0

    def game(coalitions: Any) -> Any:
        nonlocal used
        gone = ~np.asarray(coalitions, dtype=bool)
        rows, back = zip(
            *(
                np.unique(part, axis=0, return_inverse=True)
                for part in (gone[:, :n_a], gone[:, n_a:])
            ),
            strict=True,
        )
        parts = [
            embed_without(
                case.encoder, text, [np.array(places)[row] for row in some], case.absence, role
            )
            for (text, role, places), some in zip(_sides(case), rows, strict=True)
        ]
        used += sum(map(len, rows))
        scores = score_matrix(case.encoder, *parts).cpu().numpy()
        return scores[back[0], back[1]]

    approximator = RegressionFSII(n, 2, random_state=case.seed)
    with warnings.catch_warnings():
        # Few players have fewer coalitions than the budget allows: nothing is lost.
        warnings.filterwarnings("ignore", message="Not all budget is required")
        values = approximator.approximate(shapley_budget(n), game)
    matrix = [[values[i, n_a + j] for j in range(n - n_a)] for i in range(n_a)]
    return torch.tensor(matrix, dtype=torch.float64), used, 0


@baseline("random")
def _random(case: PairCase) -> Values:
    """Uniform random values, one draw for a seed."""
    sizes = [len(places) for places in own_places(case.result)]
    generator = torch.Generator().manual_seed(case.seed)
    return torch.rand(*sizes, generator=generator, dtype=torch.float64), 0, 0


def shapley_budget(n_players: int) -> int:
    """Return the coalitions that are scored: twice the unknowns of order 0 to 2, or all there are.

    The unknowns are 1 + n + n (n − 1) / 2 for n players.
    """
    unknowns = 1 + n_players + n_players * (n_players - 1) // 2
    return int(min(2 * unknowns, 2**n_players))


def _sides(case: PairCase) -> list[tuple[str, str | None, list[int]]]:
    """Return text, role and positions of own tokens of both sides."""
    places_a, places_b = own_places(case.result)
    return [
        (case.result.text_a, case.roles[0], places_a),
        (case.result.text_b, case.roles[1], places_b),
    ]


def _differentiated(case: PairCase, layer: int, *, from_reference: bool) -> Values:
    """Multiply derivatives of both embeddings along their tokens' states, or along δ."""
    encoder, vectors, norms, derivatives = case.encoder, [], [], 0
    for text, role, places in _sides(case):
        with (
            exact_numerics(encoder.device),
            evaluation_mode(encoder),
            encoder.weights_held(),
        ):
            features = features_to(encoder.preprocess([text], role), encoder.device)
            features.pop("offset_mapping", None)
            hidden = encoder.split.capture(features, layer)
            direction = hidden
            if from_reference:
                direction = hidden - encoder.reference.hidden(encoder.split, features, layer)
            norms.append(encoder.parts(features).norm.double())
            vectors.append(_pushed(encoder, layer, features, hidden, direction, places).double())
        derivatives += len(places)
    matrix = vectors[0] @ vectors[1].mT / (norms[0] * norms[1])
    return matrix.cpu(), 2 * (2 + from_reference), derivatives


def _pushed(
    encoder: SiameseEncoder,
    layer: int,
    features: dict[str, Any],
    hidden: Tensor,
    direction: Tensor,
    places: Sequence[int],
) -> Tensor:
    """Return the embedding's derivative along each token's direction, [n, K]."""
    lineariser = AutodiffLineariser(encoder.split, layer, encoder.model.truncate_dim)
    linearised = lineariser(features, hidden)
    chunks = torch.split(torch.tensor(places, device=hidden.device), _TANGENTS_AT_ONCE)
    return torch.cat([linearised.push_tokens(direction, some)[0] for some in chunks])
