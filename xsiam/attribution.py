"""Attribute the score of text pairs to pairs of their tokens."""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from xsiam.combination import Products, Settings, combine
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning, InputError
from xsiam.integrator import TextIntegrator, batches
from xsiam.memory import parse_bytes
from xsiam.modes import check_mode, pulled_sides
from xsiam.quadrature import Rule, fixed_rule
from xsiam.reading import AttributedText, ReadText, TokenVectors, read_text
from xsiam.result import PairAttribution, TokenPair
from xsiam.texts import Truncations, check_pairs, check_texts
from xsiam.vector_cache import TextKey, VectorCache

__all__ = ["FeatureAttribution", "PairAttribution", "PairAttributor", "TokenPair", "TokenVectors"]


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
        matmul_precision: "auto" lets float32 products of tangents round their factors where the
            tolerance leaves room for it (from 3e-3 on) and the machine gains by it, bfloat16 on
            processors with such units, TF32 on GPUs; that is measured, and counted in every
            reported error. "highest" never does.
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
        matmul_precision: str = "auto",
        cache_size: str | int = "256MB",
    ) -> None:
        encoder.check_layer(layer)
        self.layer = layer
        self.tolerance = _positive("tolerance", tolerance)
        self.quadrature = quadrature
        self.rule = _rule(quadrature, n_nodes)
        self.max_nodes = int(_positive("max_nodes", max_nodes))
        self.time_budget = None if time_budget is None else _positive("time_budget", time_budget)
        self.mode = check_mode(mode)
        self.matmul_precision = _one_of("matmul_precision", matmul_precision, ("auto", "highest"))
        self.token_errors = token_errors
        self.encoder = encoder
        if dtype is None:
            dtype = torch.promote_types(encoder.dtype, torch.float32)
        if encoder.dtype != dtype:
            self.encoder = copy.deepcopy(encoder).to(dtype)
        self.encoder.check_parity()
        self._cache = VectorCache(parse_bytes(cache_size))
        self.integrator = TextIntegrator(
            self.encoder,
            layer,
            rule=self.rule,
            tolerance=self.tolerance,
            max_nodes=self.max_nodes,
            memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
            mode=self.mode,
            matmul_precision=self.matmul_precision,
        )

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
            reference=self.encoder.reference_label,
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
        with self.integrator.numerics():
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
        with self.integrator.numerics(), Truncations(self.encoder) as truncations:
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
            left, norm_a = self.integrator.feature_vectors(
                text["a"], [i for i, _ in token_pairs], rule
            )
            right, norm_b = self.integrator.feature_vectors(
                text["b"], [j for _, j in token_pairs], rule
            )
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
        with self.integrator.numerics():
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
                pulled = self.integrator.pull(reads[pair[side]], known[pair[1 - side]], deadline)
                texts.append(pulled[0])
                results.append(_combine_pulled(*pulled, known[pair[1 - side]], side, settings))
        _warn_unconverged(texts, self)
        return results

    def _read(self, keys: Sequence[TextKey]) -> dict[TextKey, ReadText]:
        """Read distinct texts, and check that the longest fits the memory budget."""
        with Truncations(self.encoder) as truncations:
            reads = {key: read_text(self.encoder, *key, truncations) for key in dict.fromkeys(keys)}
        if reads:
            self.integrator.check_budget(max(reads.values(), key=lambda read: len(read.tokens)))
        return reads

    def _integrate(
        self, reads: Mapping[TextKey, ReadText], deadline: float | None, progress: bool
    ) -> dict[TextKey, TokenVectors]:
        """Integrate texts: those of one length together, a bounded number of texts at once."""
        fingerprint = self.encoder.model_fingerprint
        results = self._cache.take(fingerprint, reads)
        missing = {key: read for key, read in reads.items() if key not in results}
        self.integrator.make_ready(list(missing.values()), progress)
        chunks = batches(missing)
        for chunk in _tracked(chunks, len(reads) - len(results), progress):
            groups = [[reads[key] for key in group] for group in chunk]
            vectors = self.integrator.integrate(groups, deadline)
            for key, text in zip(itertools.chain(*chunk), vectors, strict=True):
                results[key] = text
                if text.converged or deadline is None:
                    self._cache.put(fingerprint, key, text)
        return results

    def _deadline(self) -> float | None:
        return None if self.time_budget is None else time.monotonic() + self.time_budget


def _rule(quadrature: str, n_nodes: int | None) -> Rule | None:
    if quadrature != "adaptive":
        return fixed_rule(quadrature, n_nodes)
    if n_nodes is not None:
        raise InputError(
            f"Expected no `n_nodes` with the adaptive quadrature, but got {n_nodes}. Set "
            "`attribution.quadrature` to a fixed rule, or `attribution.max_nodes`."
        )
    return None


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise InputError(
            f"Expected `{name}` to be one of {choices}, but got {value!r}. Set "
            f"`attribution.{name}`."
        )
    return value


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


def _tracked(chunks: Sequence[Sequence[Sequence[TextKey]]], total: int, progress: bool) -> Any:
    """Yield batches, with a progress bar that counts texts."""
    if not progress:
        yield from chunks
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("attributing texts", total=total)
        for chunk in chunks:
            yield chunk
            bar.advance(task, sum(len(group) for group in chunk))
