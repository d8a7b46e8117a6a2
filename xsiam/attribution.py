"""Attribute the score of text pairs to pairs of their tokens."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from xsiam.combination import Settings, combine
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning, InputError, ModelError
from xsiam.integration import Integrated, integrate_adaptive, integrate_fixed
from xsiam.jacobian import exact_numerics, feature_derivatives
from xsiam.memory import default_budget, parse_bytes
from xsiam.paths import PathGroup
from xsiam.quadrature import Rule, fixed_rule
from xsiam.reading import ReadText, TokenVectors, read_text, stack_features
from xsiam.result import PairAttribution, TokenPair
from xsiam.split import evaluation_mode
from xsiam.texts import Truncations, check_pairs, check_texts

__all__ = ["FeatureAttribution", "PairAttribution", "PairAttributor", "TokenPair", "TokenVectors"]

_TEXTS_PER_GROUP = 64
_SUPPORTED_ATTENTION = (None, "sdpa", "eager")


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
        encoder: The model; it is not changed. Half precision weights are copied to float32.
        layer: 0 … L: where the path from reference to text lives.
        tolerance: Bound on the errors, relative to |Δ|; fixed rules report against it.
        quadrature: "adaptive", "riemann" (published), "midpoint" or "gauss_legendre".
        n_nodes: Nodes of a fixed rule.
        max_nodes: Most nodes per text of the adaptive rule.
        memory_budget: Bytes, or a string such as "2GB", that an evaluation may take beyond the
            model. It changes how work is cut up, never the numbers. None takes a share of what is
            free.
        time_budget: Seconds for one call of :meth:`attribute`, after which nothing is refined.

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
    ) -> None:
        encoder.check_layer(layer)
        self.layer = layer
        self.tolerance = _positive("tolerance", tolerance)
        self.quadrature = quadrature
        self.rule = _rule(quadrature, n_nodes)
        self.max_nodes = int(_positive("max_nodes", max_nodes))
        self.time_budget = None if time_budget is None else _positive("time_budget", time_budget)
        self._memory_budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.encoder = encoder
        if encoder.dtype not in (torch.float32, torch.float64):
            self.encoder = copy.deepcopy(encoder).float()
        _check_attention(self.encoder)
        self.encoder.check_parity()

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
        keys = [(text, role_a) for text in list_a] + [(text, role_b) for text in list_b]
        distinct = list(dict.fromkeys(keys))
        known = dict(zip(distinct, self._integrate(distinct, progress), strict=True))
        _warn_unconverged(list(known.values()), self)
        settings = self.settings
        results = [
            combine(known[text_a, role_a], known[text_b, role_b], settings)
            for text_a, text_b in zip(list_a, list_b, strict=True)
        ]
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
        distinct = list(dict.fromkeys(texts))
        keys = [(text, role) for text in distinct]
        known = dict(zip(distinct, self._integrate(keys, progress), strict=True))
        _warn_unconverged(list(known.values()), self)
        return [known[text] for text in texts]

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

        Memory: P·D² numbers for the result (P = 10, D = 768, float32: 24 MB), and D tangents at a
        time for each distinct token. Nodes are a fixed Gauss-Legendre rule of ``n_nodes``.

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
            left = {i: self._feature_vectors(text["a"], i, rule) for i, _ in token_pairs}
            right = {j: self._feature_vectors(text["b"], j, rule) for _, j in token_pairs}
        normaliser = text["a"].norm * text["b"].norm
        matrices = [left[i].T @ right[j] / normaliser for i, j in token_pairs]
        return FeatureAttribution(
            tuple((i, j) for i, j in token_pairs), torch.stack(matrices).to(self.encoder.dtype)
        )

    # -- inside ---------------------------------------------------------------------------------

    def _integrate(
        self, keys: Sequence[tuple[str, str | None]], progress: bool
    ) -> list[TokenVectors]:
        """Integrate texts: those of one length together, in groups of bounded size."""
        deadline = None if self.time_budget is None else time.monotonic() + self.time_budget
        results: dict[int, TokenVectors] = {}
        with self._numerics(), Truncations(self.encoder) as truncations:
            reads = [read_text(self.encoder, text, role, truncations) for text, role in keys]
            groups: dict[Any, list[int]] = {}
            for i, read in enumerate(reads):
                groups.setdefault(read.shape_key, []).append(i)
            chunks = [
                members[k : k + _TEXTS_PER_GROUP]
                for members in groups.values()
                for k in range(0, len(members), _TEXTS_PER_GROUP)
            ]
            for chunk in _tracked(chunks, len(keys), progress):
                some = [reads[i] for i in chunk]
                for i, read, path in zip(chunk, some, self._paths(some, deadline), strict=True):
                    results[i] = self._finish(read, path)
        return [results[i] for i in range(len(keys))]

    def _paths(self, reads: Sequence[ReadText], deadline: float | None) -> list[Integrated]:
        group = self._group(reads)
        if self.rule is not None:
            return integrate_fixed(group, self.rule, self.tolerance)
        return integrate_adaptive(group, self.tolerance, self.max_nodes, deadline)

    def _group(self, reads: Sequence[ReadText]) -> PathGroup:
        features = stack_features([read.features for read in reads])
        split, reference = self.encoder.split, self.encoder.reference
        hidden = split.capture(features, self.layer)
        start = reference.hidden(split, features, self.layer)
        for name, states in (("texts", hidden), ("references", start)):
            finite = torch.isfinite(states).flatten(1).all(dim=1)
            if not finite.all():
                bad = reads[int((~finite).nonzero()[0])]
                raise ModelError(
                    f"Expected finite hidden states, but those of the {name} at layer {self.layer} "
                    f"are not for {bad.text!r}. Check the model's weights."
                )
        return PathGroup(
            split=split,
            features=features,
            layer=self.layer,
            start=start,
            direction=hidden - start,
            budget=self._memory_budget or default_budget(self.encoder.device),
            truncate_dim=self.encoder.model.truncate_dim,
        )

    def _finish(self, read: ReadText, path: Integrated) -> TokenVectors:
        reference = path.reference_embedding
        return TokenVectors(
            text=read.text,
            role=read.role,
            vectors=path.vectors,
            delta=path.delta,
            reference_embedding=reference if read.shift is None else reference - read.shift,
            norm=read.norm,
            embedding=read.embedding,
            completeness_error=path.completeness_error,
            token_error=path.token_error,
            converged=path.converged,
            n_nodes=path.n_nodes,
            tokens=read.tokens,
            offsets=read.offsets,
            special_mask=read.special_mask,
            prompt_mask=read.prompt_mask,
        )

    def _feature_vectors(self, read: ReadText, token: int, rule: Rule) -> Tensor:
        """Integrate the derivative of every feature of one token, [K, D] float64."""
        group = self._group([read])
        total: Tensor | None = None
        for node, weight in zip(rule.nodes, rule.weights, strict=True):
            row = torch.zeros(1, dtype=torch.long)
            points = group._points(row, node[None])
            derivative = feature_derivatives(group._tail(row), points, group.direction, token)
            part = derivative[:, 0].T.double().cpu() * weight
            total = part if total is None else total + part
        assert total is not None
        return total

    @contextmanager
    def _numerics(self) -> Iterator[None]:
        with exact_numerics(self.encoder.device), evaluation_mode(self.encoder):
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


def _check_attention(encoder: SiameseEncoder) -> None:
    """Raise ModelError for attention kernels that have no forward derivative."""
    kernel = getattr(encoder.split.model.config, "_attn_implementation", None)
    if kernel not in _SUPPORTED_ATTENTION:
        raise ModelError(
            f"Expected attention 'sdpa' or 'eager', but {encoder.split.name} runs {kernel!r}, "
            "which has no forward derivative. Load it with "
            '`model_kwargs={"attn_implementation": "sdpa"}`.'
        )


def _warn_unconverged(texts: Sequence[TokenVectors], attributor: PairAttributor) -> None:
    missed = [text for text in texts if not text.converged]
    if not missed:
        return
    worst = max(max(t.completeness_error, t.token_error) for t in missed)
    remedy = (
        "Raise `attribution.max_nodes` or the time budget, or take a higher layer."
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


def _tracked(chunks: Sequence[list[int]], total: int, progress: bool) -> Any:
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
