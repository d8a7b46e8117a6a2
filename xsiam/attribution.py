"""Attribute the score of text pairs to pairs of their tokens."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from xsiam.combination import Products, Settings, combine
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning, InputError, ModelError
from xsiam.families import AutodiffLineariser, Lineariser, post_norm_lineariser
from xsiam.integration import (
    Integrated,
    Pulled,
    first_rule,
    integrate_adaptive,
    integrate_fixed,
    integrate_pulled,
)
from xsiam.jacobian import exact_numerics
from xsiam.memory import default_budget, format_bytes, parse_bytes
from xsiam.modes import check_mode, is_reverse, pulled_sides
from xsiam.paths import PathGroup
from xsiam.quadrature import Rule, fixed_rule
from xsiam.reading import AttributedText, ReadText, TokenVectors, read_text, stack_features
from xsiam.result import PairAttribution, TokenPair
from xsiam.split import evaluation_mode, features_to
from xsiam.states import TextStates, text_states
from xsiam.texts import Truncations, check_pairs, check_texts
from xsiam.vector_cache import TextKey, VectorCache

__all__ = ["FeatureAttribution", "PairAttribution", "PairAttributor", "TokenPair", "TokenVectors"]

_TEXTS_PER_GROUP = 64
_FEATURES_AT_ONCE = 64
_PROBE_TEXT = "A dog runs after the kitten."
_SAME_EMBEDDING = 1e-4  # float32 noise is below 1e-6, another formula far above
_READ = ("text", "role", "tokens", "offsets", "special_mask", "prompt_mask")
_INTEGRATED = ("delta", "completeness_error", "converged", "n_nodes")


@dataclass(frozen=True)
class FeatureAttribution:
    """Feature-level attributions of chosen token pairs.

    Attributes:
        pairs: The token positions (i, j).
        matrices: [P, D, D] in units of the score; the entries of one matrix sum to A[i, j].
    """

    pairs: tuple[tuple[int, int], ...]
    matrices: Tensor


class PairAttributor:
    """Split the scores of an encoder over pairs of tokens.

    Token vectors are integrated Jacobians times δ, computed in forward mode: one tangent per token
    instead of one reverse pass per embedding dimension. By default the nodes are chosen so that the
    completeness error and the estimated token error of every text meet ``tolerance``.

    Args:
        encoder: The model; it is not changed.
        layer: 0 … L: where the path from reference to text lives.
        tolerance: Bound on the errors, relative to |Δ|; fixed rules report against it.
        quadrature: "adaptive", "riemann" (published), "midpoint" or "gauss_legendre".
        n_nodes: Nodes of a fixed rule.
        max_nodes: Most nodes per text of the adaptive rule.
        memory_budget: Bytes, or a string such as "2GB", that an evaluation may take beyond the
            model. It changes how work is cut up, never the numbers. None takes a share of what is
            free.
        time_budget: Seconds for one call of :meth:`attribute`, after which nothing is refined.
        mode: How derivatives are taken: "forward" (a tangent per token), "reverse" (a cotangent
            per embedding dimension), "mixed" (forward for the shorter text of a pair, one cotangent
            per token of it through the longer one) or "auto", the cheapest. It never changes the
            numbers beyond float error.
        token_errors: Whether every text's token error must be estimated. Only without it does
            "auto" take the mixed mode, which has none for the longer text (it is nan there).
        dtype: What to compute in. None is the encoder's, or float32 for half precision weights;
            bfloat16 shows its error in the completeness error.
        cache_size: Bytes of token vectors that are kept across calls, until the weights change.

    Raises:
        InputError: If an argument does not meet its constraint.
        ModelError: If the model's own scores cannot be reproduced, with the reason.

    References:
        Moeller et al. (EMNLP 2023), the integrated-Jacobian attribution; Moeller et al. (EACL
        2024), its approximate form. Forward mode, adaptive nodes and main effects are ours.
    """

    def __init__(
        self,
        encoder: SiameseEncoder,
        layer: int,
        *,
        tolerance: float = 1e-3,
        quadrature: str = "adaptive",
        n_nodes: int | None = None,
        max_nodes: int = 4096,
        memory_budget: str | int | None = None,
        time_budget: float | None = None,
        mode: str = "auto",
        token_errors: bool = True,
        dtype: torch.dtype | None = None,
        cache_size: str | int = "256MB",
    ) -> None:
        encoder.check_layer(layer)
        self.layer = layer
        self.tolerance = _positive("tolerance", tolerance)
        self.quadrature = quadrature
        self.rule = _rule(quadrature, n_nodes)
        self.max_nodes = int(_positive("max_nodes", max_nodes))
        self.time_budget = None if time_budget is None else _positive("time_budget", time_budget)
        self._memory_budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.mode = check_mode(mode)
        self.token_errors = token_errors
        self.encoder = encoder
        if dtype is None:
            dtype = torch.promote_types(encoder.dtype, torch.float32)
        if encoder.dtype != dtype:
            self.encoder = copy.deepcopy(encoder).to(dtype)
        self.encoder.check_parity()
        self._cache = VectorCache(parse_bytes(cache_size))
        self._hand_written = self._reproduces_embeddings()
        self._first: Rule | None = None

    @overload
    def attribute(  # type: ignore[overload-overlap]  # a str is a sequence of str as well
        self,
        texts_a: str,
        texts_b: str,
        role_a: str | None = None,
        role_b: str | None = None,
        *,
        progress: bool = False,
    ) -> PairAttribution: ...

    @overload
    def attribute(
        self,
        texts_a: Sequence[str],
        texts_b: Sequence[str],
        role_a: str | None = None,
        role_b: str | None = None,
        *,
        progress: bool = False,
    ) -> list[PairAttribution]: ...

    def attribute(
        self,
        texts_a: str | Sequence[str],
        texts_b: str | Sequence[str],
        role_a: str | None = None,
        role_b: str | None = None,
        *,
        progress: bool = False,
    ) -> PairAttribution | list[PairAttribution]:
        """Attribute the scores of pairs; each distinct text is integrated once.

        Args:
            texts_a: One text, or the first texts of n pairs.
            texts_b: One text, or the second texts of n pairs.
            role_a: Role of the first texts (None, "query", "document" or a prompt name).
            role_b: Role of the second texts.
            progress: Whether to show a progress bar.

        Returns:
            One result for two strings, else a list in the order of the pairs.

        Raises:
            InputError: If a text is empty or no string, or a role is unknown.
            ModelError: If hidden states are not finite.

        Warns:
            ConvergenceWarning: If a text did not meet the tolerance; its best result is kept.
            TruncationWarning: If a text is longer than the model's window.
        """
        single = isinstance(texts_a, str) and isinstance(texts_b, str)
        list_a = [texts_a] if isinstance(texts_a, str) else list(texts_a)
        list_b = [texts_b] if isinstance(texts_b, str) else list(texts_b)
        check_pairs(list_a, list_b)
        pairs = [((a, role_a), (b, role_b)) for a, b in zip(list_a, list_b, strict=True)]
        results = self._attribute_pairs(pairs, progress)
        return results[0] if single else results

    @property
    def settings(self) -> Settings:
        """What results of this attributor have in common."""
        return Settings(
            layer=self.layer,
            reference=self.encoder.reference.name,
            quadrature=self.quadrature,
            tolerance=self.tolerance,
            similarity=self.encoder.similarity,
            shift=self.encoder.shift,
            dtype=str(self.encoder.dtype).removeprefix("torch."),
            model_fingerprint=self.encoder.model_fingerprint,
        )

    def token_vectors(
        self, texts: Sequence[str], role: str | None = None, *, progress: bool = False
    ) -> list[TokenVectors]:
        """Integrate the token vectors of texts; they depend on one text only."""
        check_texts(texts)
        keys = [(text, role) for text in dict.fromkeys(texts)]
        with self._numerics():
            reads = self._read(keys)
            known = self._integrate(reads, self._deadline(), progress)
        _warn_unconverged(list(known.values()), self)
        return [known[text, role] for text in texts]

    def attribute_features(
        self,
        text_a: str,
        text_b: str,
        token_pairs: Sequence[tuple[int, int]],
        role_a: str | None = None,
        role_b: str | None = None,
        *,
        n_nodes: int = 32,
    ) -> FeatureAttribution:
        """Split chosen entries of the matrix over pairs of hidden features.

        Reverse mode: K cotangents give every feature of every token. Memory: P·D² numbers for the
        result (P = 10, D = 768, float32: 24 MB) and as many K·D. Nodes are a fixed Gauss-Legendre
        rule of ``n_nodes``.

        Returns:
            [P, D, D] whose entry (d, e) is the share of feature d of token i with feature e of
            token j; a matrix sums to A[i, j] up to quadrature.

        Raises:
            InputError: If a token position is out of range.
        """
        check_pairs([text_a], [text_b])
        with self._numerics(), Truncations(self.encoder) as truncations:
            text = {
                "a": read_text(self.encoder, text_a, role_a, truncations),
                "b": read_text(self.encoder, text_b, role_b, truncations),
            }
            sizes = {side: len(read.tokens) for side, read in text.items()}
            for i, j in token_pairs:
                if not (0 <= i < sizes["a"] and 0 <= j < sizes["b"]):
                    raise InputError(
                        f"Expected token positions below {(sizes['a'], sizes['b'])}, "
                        f"but got {(i, j)}. Set `token_pairs`."
                    )
            rule = fixed_rule("gauss_legendre", n_nodes)
            left, norm_a = self._feature_vectors(text["a"], [i for i, _ in token_pairs], rule)
            right, norm_b = self._feature_vectors(text["b"], [j for _, j in token_pairs], rule)
        normaliser = norm_a * norm_b
        matrices = [a.T @ b / normaliser for a, b in zip(left, right, strict=True)]
        return FeatureAttribution(
            tuple((i, j) for i, j in token_pairs), torch.stack(matrices).to(self.encoder.dtype)
        )

    # -- inside ---------------------------------------------------------------------------------

    def _attribute_pairs(
        self, pairs: Sequence[tuple[TextKey, TextKey]], progress: bool
    ) -> list[PairAttribution]:
        deadline = self._deadline()
        with self._numerics():
            settings = self.settings
            reads = self._read([key for side in zip(*pairs, strict=True) for key in side])
            sides = pulled_sides(
                pairs,
                {key: len(read.tokens) for key, read in reads.items()},
                mode=self.mode,
                n_dimensions=self.encoder.embedding_dim,
                token_errors=self.token_errors,
                cached=self._cache.keys(settings.model_fingerprint),
            )
            needed = dict.fromkeys(
                key
                for pair, side in zip(pairs, sides, strict=True)
                for number, key in enumerate(pair)
                if number != side
            )
            known = self._integrate({key: reads[key] for key in needed}, deadline, progress)
            results, texts = [], list[AttributedText](known.values())
            for pair, side in zip(pairs, sides, strict=True):
                if side is None:
                    results.append(combine(known[pair[0]], known[pair[1]], settings))
                    continue
                pulled = self._pull(reads[pair[side]], known[pair[1 - side]], deadline)
                texts.append(pulled[0])
                results.append(_combine_pulled(*pulled, known[pair[1 - side]], side, settings))
        _warn_unconverged(texts, self)
        return results

    def _read(self, keys: Sequence[TextKey]) -> dict[TextKey, ReadText]:
        """Read distinct texts, and check that the longest fits the memory budget."""
        with Truncations(self.encoder) as truncations:
            reads = {key: read_text(self.encoder, *key, truncations) for key in dict.fromkeys(keys)}
        if self._memory_budget is not None:
            longest = max(reads.values(), key=lambda read: len(read.tokens))
            self._check_budget(longest, self._memory_budget)
        return reads

    def _check_budget(self, read: ReadText, budget: int) -> None:
        """Raise InputError where not even one tangent of one node fits the budget."""
        length, lineariser = len(read.tokens), self._lineariser()
        numbers = lineariser.floats_per_point(length) + lineariser.floats_per_tangent(length)
        needed = numbers * torch.finfo(self.encoder.dtype).bits // 8
        if needed > budget:
            raise InputError(
                f"Expected `memory_budget` to hold one tangent of the longest text ({length} "
                f"tokens), which takes about {format_bytes(needed)} at layer {self.layer}, but got "
                f"{format_bytes(budget)}. Set `attribution.memory_budget` to at least that, take a "
                "higher layer, or shorten the text."
            )

    def _integrate(
        self, reads: Mapping[TextKey, ReadText], deadline: float | None, progress: bool
    ) -> dict[TextKey, TokenVectors]:
        """Integrate texts: those of one length together, in groups of bounded size."""
        fingerprint = self.encoder.model_fingerprint
        results = self._cache.take(fingerprint, reads)
        groups: dict[Any, list[TextKey]] = {}
        for key, read in reads.items():
            if key not in results:
                groups.setdefault(read.shape_key, []).append(key)
        chunks = [
            members[k : k + _TEXTS_PER_GROUP]
            for members in groups.values()
            for k in range(0, len(members), _TEXTS_PER_GROUP)
        ]
        for chunk in _tracked(chunks, len(reads) - len(results), progress):
            some = [reads[key] for key in chunk]
            states = self._states(some)
            paths = self._paths(some, states, deadline)
            for number, (key, path) in enumerate(zip(chunk, paths, strict=True)):
                results[key] = TokenVectors(
                    **self._facts(some[number], states, number, path),
                    token_error=path.token_error,
                    vectors=path.vectors,
                )
                if path.converged or deadline is None:
                    self._cache.put(fingerprint, key, results[key])
        return results

    def _paths(
        self, reads: Sequence[ReadText], states: TextStates, deadline: float | None
    ) -> list[Integrated]:
        group = self._group(reads, states)
        if self.rule is not None:
            return integrate_fixed(group, self.rule, self.tolerance)
        first = self._first_rule()
        return integrate_adaptive(group, self.tolerance, self.max_nodes, deadline, first)

    def _first_rule(self) -> Rule:
        """Return the nodes that a text of ours needs, the same whatever was attributed before."""
        if self._first is None:
            read = read_text(self.encoder, _PROBE_TEXT, None, Truncations(self.encoder))
            group = self._group([read], self._states([read]))
            self._first = first_rule(group, self.tolerance, self.max_nodes)
        return self._first

    def _pull(
        self, read: ReadText, other: TokenVectors, deadline: float | None
    ) -> tuple[AttributedText, Tensor]:
        """Pull the other text's token vectors and reference through one text.

        Returns:
            What is known of the text, and the inner products [S_other + 1, S]: with the other
            text's token vectors, and last with ẽ(r) of it.
        """
        cotangents = torch.cat([other.vectors.T, other.reference_embedding[None]])
        states = self._states([read])
        pulled = integrate_pulled(
            self._group([read], states),
            cotangents,
            self.rule,
            self.tolerance,
            self.max_nodes,
            deadline,
            self._first_rule() if self.rule is None else None,
        )
        facts = self._facts(read, states, 0, pulled) | {"token_error": float("nan")}
        return AttributedText(**facts), pulled.products

    def _lineariser(self) -> Lineariser:
        split, truncate_dim = self.encoder.split, self.encoder.model.truncate_dim
        if self._hand_written:
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
        with self._numerics():
            features = features_to(
                self.encoder.preprocess_with(Truncations(self.encoder), [_PROBE_TEXT], None),
                self.encoder.device,
            )
            hidden = self.encoder.split.capture(features, self.layer)
            own = self.encoder.split.embed(features)[:, : self.encoder.model.truncate_dim]
            ours = found(features, hidden).total(hidden)[0]
        return bool((ours - own).norm() <= _SAME_EMBEDDING * own.norm())

    def _states(self, reads: Sequence[ReadText]) -> TextStates:
        """Run texts of one length through the model; raise ModelError where that is not finite."""
        split = self.encoder.split
        states = text_states(
            split,
            self.encoder.reference,
            self.layer,
            stack_features([read.features for read in reads]),
            together=self._hand_written,
        )
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
        return states

    def _group(self, reads: Sequence[ReadText], states: TextStates) -> PathGroup:
        kept = slice(self.encoder.model.truncate_dim)
        return PathGroup(
            lineariser=self._lineariser(),
            features=stack_features([read.features for read in reads]),
            start=states.start,
            direction=states.hidden - states.start,
            start_embeddings=states.reference_embedding[:, kept].double().cpu(),
            end_embeddings=states.embedding[:, kept].double().cpu(),
            budget=self._memory_budget or default_budget(self.encoder.device),
            noise=states.noise,
            reverse=is_reverse(self.mode, states.start.shape[1], self.encoder.embedding_dim),
        )

    def _facts(
        self, read: ReadText, states: TextStates, number: int, path: Integrated | Pulled
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

    def _deadline(self) -> float | None:
        return None if self.time_budget is None else time.monotonic() + self.time_budget

    def _feature_vectors(
        self, read: ReadText, tokens: Sequence[int], rule: Rule
    ) -> tuple[Tensor, float]:
        """Integrate the derivatives of every feature of some tokens by reverse mode.

        Returns:
            [T, K, D], and the norm that the model divides by.
        """
        states = self._states([read])
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

    @contextmanager
    def _numerics(self) -> Iterator[None]:
        with (
            exact_numerics(self.encoder.device),
            evaluation_mode(self.encoder),
            self.encoder.weights_held(),
        ):
            yield


def _rule(quadrature: str, n_nodes: int | None) -> Rule | None:
    if quadrature != "adaptive":
        return fixed_rule(quadrature, n_nodes)
    if n_nodes is not None:
        raise InputError(
            f"Expected no `n_nodes` with the adaptive quadrature, but got {n_nodes}. Set "
            "`attribution.quadrature` to a fixed rule, or `attribution.max_nodes`."
        )
    return None


def _positive(name: str, value: float) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < float("inf")
    ):
        raise InputError(
            f"Expected `{name}` to be a positive number, but got {value!r}. "
            f"Set `attribution.{name}`."
        )
    return value


def _combine_pulled(
    pulled: AttributedText, products: Tensor, other: TokenVectors, side: int, settings: Settings
) -> PairAttribution:
    """Join a text that was pulled through (side 0 or 1 of the pair) with the other one."""
    pairs, main = products[:-1], products[-1]  # [S_other, S], [S]
    main_other = other.vectors.T @ pulled.reference_embedding
    if side == 0:
        return combine(pulled, other, settings, Products(pairs.T, main, main_other))
    return combine(other, pulled, settings, Products(pairs, main_other, main))


def _warn_unconverged(texts: Sequence[AttributedText], attributor: PairAttributor) -> None:
    missed = [text for text in texts if not text.converged]
    if not missed:
        return
    worst = max(float(np.fmax(t.completeness_error, t.token_error)) for t in missed)
    remedy = (
        "Raise `attribution.max_nodes` or the time budget, or take a higher layer; where float "
        "rounding is the limit, compute with `dtype=torch.float64`."
        if attributor.rule is None
        else 'Raise `attribution.n_nodes`, or set `attribution.quadrature="adaptive"`.'
    )
    warnings.warn(
        f"{len(missed)} of {len(texts)} texts did not meet the tolerance "
        f"{attributor.tolerance:.1e} at layer {attributor.layer}: the largest error is "
        f"{worst:.1e}. {remedy}",
        ConvergenceWarning,
        stacklevel=3,
    )


def _tracked(chunks: Sequence[Sequence[TextKey]], total: int, progress: bool) -> Any:
    """Yield chunks, with a progress bar that counts texts."""
    if not progress:
        yield from chunks
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("attributing texts", total=total)
        for chunk in chunks:
            yield chunk
            bar.advance(task, len(chunk))
