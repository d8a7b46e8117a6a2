"""Integrate the token vectors of texts, of one encoder at one layer, a batch at a time.

A text depends on no other: :mod:`xsiam.attribution` joins two of them to a pair, keeps what is
known across calls and says what did not converge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError, ModelError
from xsiam.families import AutodiffLineariser, Lineariser, post_norm_lineariser
from xsiam.first_rules import FirstRules, first_rules
from xsiam.integration import (
    Integrated,
    Pulled,
    Summed,
    integrate_adaptive,
    integrate_fixed,
    integrate_pulled,
    integrate_totals,
    roundings_of,
)
from xsiam.jacobian import exact_numerics
from xsiam.linear import RoundedWeights, rounded_weights_kept
from xsiam.memory import default_budget, format_bytes
from xsiam.modes import is_reverse
from xsiam.panels import FIRST_ORDER, gauss
from xsiam.paths import PathGroup, Rounding
from xsiam.quadrature import Rule
from xsiam.reading import AttributedText, ReadText, TokenVectors, read_text, stack_features
from xsiam.split import evaluation_mode, features_to
from xsiam.states import KnownReferences, TextStates, text_states
from xsiam.texts import Truncations
from xsiam.vector_cache import TextKey

_FEATURES_AT_ONCE = 64
_SHARE_OF_WEIGHTS = 8  # of the memory budget: weights that are kept rounded
_TEXTS_AT_ONCE = 64
# Below this tolerance rounded factors are out of the question: bfloat16 moves token vectors of
# MiniLM and MPNet by 1e-3 to 6e-3 of |Δ|, TF32 by a quarter of that.
_LEAST_ROUNDED_TOLERANCE = 3e-3
# What was measured on one text is taken so many times for others, and may be this share of the
# tolerance; a machine that rounds nothing moves less than the least.
_ROUNDING_SAFETY, _ROUNDING_SHARE, _LEAST_ROUNDING = 1.5, 0.5, 1e-5
_PROBE_TEXT = "A dog runs after the kitten."
# What one text alone needs is too little for many others. They have the same number of tokens for
# most tokenizers, and are then planned together.
_PROBE_TEXTS = (
    _PROBE_TEXT,
    "The stock market fell on Monday.",
    "Two men play guitar at night.",
    "What is the capital of France?",
    "She did not like the book.",
    "Heavy rain closed the school today.",
)
_SAME_EMBEDDING = 1e-4  # float32 noise is below 1e-6, another formula far above
_READ = ("text", "role", "tokens", "offsets", "special_mask", "prompt_mask")
_INTEGRATED = ("delta", "completeness_error", "converged", "n_nodes")


class TextIntegrator:
    """Integrates texts of one encoder at one layer.

    Args:
        encoder: The model, in the type to compute in; its own scores must have been reproduced.
        layer: 0 … L.
        rule: A fixed rule, or None for the adaptive one.
        tolerance: Bound on the errors of a text, relative to |Δ|.
        max_nodes: Most nodes per text of the adaptive rule.
        memory_budget: Bytes that an evaluation may take beyond the model, or None.
        mode: As of :class:`xsiam.PairAttributor`.
        matmul_precision: Likewise.
    """

    def __init__(
        self,
        encoder: SiameseEncoder,
        layer: int,
        *,
        rule: Rule | None,
        tolerance: float,
        max_nodes: int,
        memory_budget: int | None,
        mode: str,
        matmul_precision: str = "highest",
    ) -> None:
        self.encoder = encoder
        self.layer = layer
        self.rule = rule
        self.tolerance = tolerance
        self.max_nodes = max_nodes
        self.memory_budget = memory_budget
        self.mode = mode
        self.matmul_precision = matmul_precision
        self._references = KnownReferences()
        self._rounded: tuple[str, RoundedWeights] | None = None
        self.is_hand_written = self._reproduces_embeddings()

    @contextmanager
    def numerics(self) -> Iterator[None]:
        """Within this context the model is in evaluation mode, its weights and kernels are held."""
        with (
            exact_numerics(self.encoder.device),
            evaluation_mode(self.encoder),
            self.encoder.weights_held(),
            rounded_weights_kept(self._rounded_weights()),
        ):
            yield

    def integrate(
        self, groups: Sequence[Sequence[ReadText]], deadline: float | None
    ) -> list[TokenVectors]:
        """Return the token vectors of groups of texts, each of one length, one after the other."""
        vectors = []
        for reads, states in zip(groups, self.states(groups), strict=True):
            paths = self._paths(self._group(reads, states), deadline)
            vectors += [
                TokenVectors(
                    **self._facts(read, states, number, path),
                    token_error=path.token_error,
                    vectors=path.vectors,
                )
                for number, (read, path) in enumerate(zip(reads, paths, strict=True))
            ]
        return vectors

    def pull(
        self, read: ReadText, other: TokenVectors, deadline: float | None
    ) -> tuple[AttributedText, Tensor]:
        """Pull the other text's token vectors and reference through one text.

        Returns:
            What is known of the text, and the inner products [S_other + 1, S]: with the other
            text's token vectors, and last with ẽ(r) of it.
        """
        cotangents = torch.cat([other.vectors.T, other.reference_embedding[None]])
        (states,) = self.states([[read]])
        pulled = integrate_pulled(
            self._group([read], states),
            cotangents,
            self.rule,
            self.tolerance,
            self.max_nodes,
            deadline,
            self._first_rules.of(len(read.tokens)) if self.rule is None else None,
        )
        facts = self._facts(read, states, 0, pulled) | {"token_error": float("nan")}
        return AttributedText(**facts), pulled.products

    def totals(
        self, reads: Sequence[ReadText], rules: Sequence[Rule]
    ) -> list[list[tuple[AttributedText, Tensor]]]:
        """Return the sums of token vectors by fixed rules, for texts of one length.

        Returns:
            For every text, and every rule: what is known of the text, with the completeness error
            of that rule, and Σ_s G[:, s], [K]. The token error is nan, for no token is told apart.
        """
        (states,) = self.states([reads])
        summed = integrate_totals(self._group(reads, states), rules, self.tolerance)
        return [
            [
                (
                    AttributedText(
                        **self._facts(read, states, number, path), token_error=float("nan")
                    ),
                    path.total,
                )
                for path in paths
            ]
            for number, (read, paths) in enumerate(zip(reads, summed, strict=True))
        ]

    def feature_vectors(
        self, read: ReadText, tokens: Sequence[int], rule: Rule
    ) -> tuple[Tensor, float]:
        """Integrate the derivatives of every feature of some tokens by reverse mode.

        Returns:
            [T, K, D], and the norm that the model divides by.
        """
        (states,) = self.states([[read]])
        group = self._group([read], states)
        n_dimensions = self.encoder.embedding_dim
        unit = torch.eye(n_dimensions, dtype=group.start.dtype, device=group.start.device)
        where = torch.tensor(tokens, device=group.start.device)
        total: Tensor | None = None
        for node, weight in zip(rule.nodes, rule.weights, strict=True):
            linearised = group.at(torch.zeros(1, dtype=torch.long), node[None])
            parts = [
                linearised.pull(some[None])[0][:, where]
                for some in torch.split(unit, _FEATURES_AT_ONCE)
            ]
            pulled = torch.cat(parts) * group.direction[0, where]  # [K, T, D]
            part = pulled.transpose(0, 1).double().cpu() * weight
            total = part if total is None else total + part
        assert total is not None
        embedding = states.embedding
        if self.encoder.shift:
            embedding = embedding - states.reference_embedding
        return total, float(self.encoder.parts_of(embedding).norm[0])

    def check_budget(self, read: ReadText) -> None:
        """Raise InputError where not even one tangent of one node fits the memory budget."""
        budget = self.memory_budget
        if budget is None:
            return
        length, lineariser = len(read.tokens), self._lineariser
        numbers = lineariser.floats_per_point(length) + lineariser.floats_per_tangent(length)
        needed = numbers * torch.finfo(self.encoder.dtype).bits // 8
        if needed > budget:
            raise InputError(
                f"Expected `memory_budget` to hold one tangent of the longest text ({length} "
                f"tokens), which takes about {format_bytes(needed)} at layer {self.layer}, but got "
                f"{format_bytes(budget)}. Set `attribution.memory_budget` to at least that, take a "
                "higher layer, or shorten the text."
            )

    def make_ready(self, reads: Sequence[ReadText], progress: bool) -> None:
        """Let the reference make what texts of these shapes need, all at once."""
        shapes = {read.shape_key: read.features for read in reads}
        self.encoder.reference.make_ready(
            self.encoder.split, self.layer, list(shapes.values()), progress=progress
        )

    def states(self, groups: Sequence[Sequence[ReadText]]) -> list[TextStates]:
        """Run texts, in groups of one length each and equal in all else, through the model.

        Raises:
            ModelError: Where a number is not finite.
        """
        known = None
        if self.is_hand_written:
            known = self._references.of(self.encoder.model_fingerprint)
        found = text_states(
            self.encoder.split,
            self.encoder.reference,
            self.layer,
            [stack_features([read.features for read in reads]) for reads in groups],
            known=known,
        )
        for reads, states in zip(groups, found, strict=True):
            self._check_finite(reads, states)
        return found

    # -- inside ---------------------------------------------------------------------------------

    def _check_finite(self, reads: Sequence[ReadText], states: TextStates) -> None:
        split = self.encoder.split
        both = {
            "texts": (states.hidden, states.embedding),
            "references": (states.start, states.reference_embedding),
        }
        for name, (hidden, embedding) in both.items():
            finite = hidden.isfinite().flatten(1).all(dim=1) & embedding.isfinite().all(dim=1)
            if not finite.all():
                bad = reads[int((~finite).nonzero()[0])]
                split.check_finite(bad.features, [bad.text])
                raise ModelError(
                    f"Expected finite hidden states, but those of the {name} at layer {self.layer} "
                    f"are not for {bad.text!r}. Check the model's weights."
                )

    def _paths(self, group: PathGroup, deadline: float | None) -> list[Integrated]:
        if self.rule is not None:
            return integrate_fixed(group, self.rule, self.tolerance)
        first = self._first_rules.of(group.length)
        group.rounding = self._rounding
        return integrate_adaptive(group, self.tolerance, self.max_nodes, deadline, first)

    @cached_property
    def _first_rules(self) -> FirstRules:
        """The nodes that do for texts of ours, the same whatever was integrated before."""
        groups: dict[Any, list[ReadText]] = {}
        for text in _PROBE_TEXTS:
            read = self._read_probe(text)
            groups.setdefault(read.shape_key, []).append(read)
        reads = list(groups.values())
        paths = [self._group(*both) for both in zip(reads, self.states(reads), strict=True)]
        return first_rules(paths, self.tolerance, self.max_nodes)

    @cached_property
    def _rounding(self) -> Rounding | None:
        """How factors are rounded, where the tolerance leaves room for what that moves."""
        if self.matmul_precision == "highest" or self.encoder.dtype != torch.float32:
            return None
        if self.tolerance < _LEAST_ROUNDED_TOLERANCE:
            return None
        probe = [self._read_probe(_PROBE_TEXT)]
        group = self._group(probe, self.states([probe])[0])
        rule = self._first_rules.of(group.length) or gauss(FIRST_ORDER)
        for rounding in roundings_of(group, rule):
            if rounding.moves <= _LEAST_ROUNDING:
                break
            if _ROUNDING_SAFETY * rounding.moves <= _ROUNDING_SHARE * self.tolerance:
                return replace(rounding, moves=_ROUNDING_SAFETY * rounding.moves)
        return None

    def _rounded_weights(self) -> RoundedWeights:
        """Return what is kept of these very weights from call to call."""
        fingerprint = self.encoder.model_fingerprint
        if self._rounded is None or self._rounded[0] != fingerprint:
            self._rounded = fingerprint, RoundedWeights(self._budget // _SHARE_OF_WEIGHTS)
        return self._rounded[1]

    def _read_probe(self, text: str) -> ReadText:
        """Tokenise a text of ours."""
        return read_text(self.encoder, text, None, Truncations(self.encoder))

    @property
    def _budget(self) -> int:
        return self.memory_budget or default_budget(self.encoder.device)

    @property
    def _lineariser(self) -> Lineariser:
        split, truncate_dim = self.encoder.split, self.encoder.model.truncate_dim
        if self.is_hand_written:
            found = post_norm_lineariser(split, self.layer, truncate_dim)
            if not isinstance(found, str):
                return found
        return AutodiffLineariser(split, self.layer, truncate_dim)

    def _reproduces_embeddings(self) -> bool:
        """Whether derivatives by hand belong to this very model: their embeddings must be its own.

        What cannot be checked so, its derivatives, shows in the completeness error of every text.
        """
        found = post_norm_lineariser(
            self.encoder.split, self.layer, self.encoder.model.truncate_dim
        )
        if isinstance(found, str):
            return False
        with self.numerics():
            features = features_to(
                self.encoder.preprocess_with(Truncations(self.encoder), [_PROBE_TEXT], None),
                self.encoder.device,
            )
            hidden = self.encoder.split.capture(features, self.layer)
            own = self.encoder.split.embed(features)[:, : self.encoder.model.truncate_dim]
            ours = found(features, hidden).total(hidden)[0]
        return bool((ours - own).norm() <= _SAME_EMBEDDING * own.norm())

    def _group(self, reads: Sequence[ReadText], states: TextStates) -> PathGroup:
        kept = slice(self.encoder.model.truncate_dim)
        return PathGroup(
            lineariser=self._lineariser,
            features=stack_features([read.features for read in reads]),
            start=states.start,
            direction=states.hidden - states.start,
            start_embeddings=states.reference_embedding[:, kept].double().cpu(),
            end_embeddings=states.embedding[:, kept].double().cpu(),
            budget=self._budget,
            noise=states.noise,
            moved=states.moved,
            reverse=is_reverse(
                self.mode,
                states.start.shape[1],
                self.encoder.embedding_dim,
                factored=self._lineariser.is_factored(states.start.shape[1]),
            ),
        )

    def _facts(
        self, read: ReadText, states: TextStates, number: int, path: Integrated | Pulled | Summed
    ) -> dict[str, Any]:
        """Return what a result says of a text, the ``number``-th of some states."""
        facts = {name: getattr(read, name) for name in _READ}
        facts |= {name: getattr(path, name) for name in _INTEGRATED}
        embedding = states.embedding[[number]]
        reference = path.reference_embedding
        if self.encoder.shift:
            embedding = embedding - states.reference_embedding[[number]]
            reference = torch.zeros_like(reference)
        parts = self.encoder.parts_of(embedding)
        return facts | {
            "norm": float(parts.norm[0]),
            "embedding": parts.embedding[0].double().cpu(),
            "reference_embedding": reference,
        }


def batches(reads: Mapping[TextKey, ReadText]) -> list[list[list[TextKey]]]:
    """Put texts into batches: groups of one length each, of texts that are equal in all else."""
    groups: dict[Any, list[TextKey]] = {}
    for key, read in reads.items():
        groups.setdefault(read.shape_key, []).append(key)
    found: list[list[list[TextKey]]] = []
    room, kind = 0, None
    for (_, plain), members in groups.items():
        for first in range(0, len(members), _TEXTS_AT_ONCE):
            some = members[first : first + _TEXTS_AT_ONCE]
            if len(some) > room or plain != kind:
                found.append([])
                room, kind = _TEXTS_AT_ONCE, plain
            found[-1].append(some)
            room -= len(some)
    return found
