"""Attribute the score of text pairs to pairs of their tokens."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from xsiam.encoder import SiameseEncoder, _Truncations, check_pairs, check_texts
from xsiam.errors import ConvergenceWarning, InputError, ModelError
from xsiam.integration import Integrated, PathGroup, integrate_adaptive, integrate_fixed
from xsiam.jacobian import exact_numerics, feature_derivatives
from xsiam.memory import default_budget, parse_bytes
from xsiam.quadrature import Rule, fixed_rule
from xsiam.result import PairAttribution, TokenPair
from xsiam.split import Features, evaluation_mode, features_to

__all__ = ["FeatureAttribution", "PairAttribution", "PairAttributor", "TokenPair", "TokenVectors"]

_TEXTS_PER_GROUP = 64
_SUPPORTED_ATTENTION = (None, "sdpa", "eager")


@dataclass(frozen=True)
class TokenVectors:
    """What attribution needs to know of one text; it depends on no other text.

    Attributes:
        text: The text, without prompt.
        role: Its role.
        vectors: Token vectors G, [K, S] float64: Σ_s G[:, s] = ẽ(a) − ẽ(r_a).
        delta: Δ, [K] float64.
        reference_embedding: ẽ(r), [K] float64: zero for a shifted model.
        norm: What the model divides by.
        embedding: ẽ(a) by the model's ordinary forward, [K] float64.
        completeness_error: |Σ_s G[:, s] − Δ| / |Δ|.
        token_error: Estimated largest error of one token vector, relative to |Δ|.
        converged: Whether the tolerance was met.
        n_nodes: Nodes at which token derivatives were evaluated.
        tokens: Tokens, prompt and special tokens included.
        offsets: Character spans in the text; (0, 0) for prompt and special tokens.
        special_mask: Which tokens the tokenizer added.
        prompt_mask: Which tokens belong to the prompt.
    """

    text: str
    role: str | None
    vectors: Tensor
    delta: Tensor
    reference_embedding: Tensor
    norm: float
    embedding: Tensor
    completeness_error: float
    token_error: float
    converged: bool
    n_nodes: int
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    special_mask: tuple[bool, ...]
    prompt_mask: tuple[bool, ...]


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
        memory_budget: Bytes, or a string such as "2GB", that an evaluation may take beyond the model.
            It changes how work is cut up, never the numbers. None takes a share of what is free.
        time_budget: Seconds for one call of :meth:`attribute`, after which nothing is refined.

    Raises:
        InputError: If an argument does not meet its constraint.
        ModelError: If the model's own scores cannot be reproduced, with the reason.

    References:
        Moeller et al. (EMNLP 2023), the integrated-Jacobian attribution; Moeller et al. (EACL 2024),
        its approximate form. Forward mode, adaptive nodes and main effects are ours.
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
    def attribute(
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
        fingerprint = self.encoder.model_fingerprint
        results = [
            self._combine(known[text_a, role_a], known[text_b, role_b], fingerprint)
            for text_a, text_b in zip(list_a, list_b, strict=True)
        ]
        return results[0] if single else results

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
        with self._numerics():
            text = {"a": self._read(text_a, role_a), "b": self._read(text_b, role_b)}
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
        with self._numerics(), _Truncations(self.encoder) as truncations:
            reads = [self._read(text, role, truncations) for text, role in keys]
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

    def _paths(self, reads: Sequence[_Read], deadline: float | None) -> list[Integrated]:
        group = self._group(reads)
        if self.rule is not None:
            return integrate_fixed(group, self.rule, self.tolerance)
        return integrate_adaptive(group, self.tolerance, self.max_nodes, deadline)

    def _group(self, reads: Sequence[_Read]) -> PathGroup:
        features = _stack([read.features for read in reads])
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

    def _read(
        self, text: str, role: str | None, truncations: _Truncations | None = None
    ) -> _Read:
        """Tokenise one text and embed it by the model's ordinary forward."""
        encoder = self.encoder
        features = encoder._preprocess([text], role, truncations or _Truncations(encoder))
        prompt = encoder.prompt_of(role)[0] or ""
        read = _describe(encoder, text, role, prompt, features)
        features = features_to(features, encoder.device)
        features.pop("offset_mapping", None)
        parts = encoder.parts(features)
        shift = encoder.shift_of(features)
        if shift is not None:
            shift = shift[0, : encoder.model.truncate_dim].double().cpu()
        return _Read(
            **read,
            features=features,
            embedding=parts.embedding[0].double().cpu(),
            norm=float(parts.norm[0]),
            shift=shift,
        )

    def _finish(self, read: _Read, path: Integrated) -> TokenVectors:
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

    def _combine(self, a: TokenVectors, b: TokenVectors, fingerprint: str) -> PairAttribution:
        """Join two texts' token vectors: DESIGN of the identity is in the class docstring."""
        normaliser = a.norm * b.norm
        matrix = a.vectors.T @ b.vectors / normaliser
        main_a = a.vectors.T @ b.reference_embedding / normaliser
        main_b = b.vectors.T @ a.reference_embedding / normaliser
        intercept = float(a.reference_embedding @ b.reference_embedding) / normaliser
        score = float(a.embedding @ b.embedding) / normaliser
        attributed = float(a.delta @ b.delta) / normaliser
        explained = float(matrix.sum() + main_a.sum() + main_b.sum()) + intercept
        dtype = self.encoder.dtype
        sides = {"_a": a, "_b": b}
        per_text = {
            f"{name}{suffix}": getattr(text, name)
            for suffix, text in sides.items()
            for name in ("completeness_error", "token_error", "converged", "n_nodes",
                         "tokens", "offsets", "special_mask", "prompt_mask", "text")
        }  # fmt: skip
        return PairAttribution(
            matrix=matrix.to(dtype),
            main_effects_a=main_a.to(dtype),
            main_effects_b=main_b.to(dtype),
            intercept=intercept,
            residual=score - explained,
            score=score,
            attributed_score=attributed,
            convergence_delta=float(matrix.sum()) - attributed,
            completeness_error=max(a.completeness_error, b.completeness_error),
            token_error=max(a.token_error, b.token_error),
            converged=a.converged and b.converged,
            n_nodes=max(a.n_nodes, b.n_nodes),
            layer=self.layer,
            reference=self.encoder.reference.name,
            quadrature=self.quadrature,
            tolerance=self.tolerance,
            similarity=self.encoder.similarity,
            shift=self.encoder.shift,
            dtype=str(dtype).removeprefix("torch."),
            model_fingerprint=fingerprint,
            **per_text,
        )

    def _feature_vectors(self, read: _Read, token: int, rule: Rule) -> Tensor:
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

    def _numerics(self) -> Any:
        from contextlib import ExitStack

        stack = ExitStack()
        stack.enter_context(exact_numerics(self.encoder.device))
        stack.enter_context(evaluation_mode(self.encoder))
        return stack


@dataclass(frozen=True)
class _Read:
    """One text as the model reads it."""

    text: str
    role: str | None
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    special_mask: tuple[bool, ...]
    prompt_mask: tuple[bool, ...]
    features: Features
    embedding: Tensor
    norm: float
    shift: Tensor | None

    @property
    def shape_key(self) -> Any:
        """Texts with equal keys can share a batch."""
        plain = {k: str(v) for k, v in self.features.items() if not isinstance(v, Tensor)}
        return len(self.tokens), tuple(sorted(plain.items()))


def _describe(
    encoder: SiameseEncoder, text: str, role: str | None, prompt: str, features: Features
) -> dict[str, Any]:
    """Name the tokens of one text and place them in it."""
    tokens = encoder.split_tokenizer.convert_ids_to_tokens(features["input_ids"][0].tolist())
    special = [bool(flag) for flag in features["special_tokens_mask"][0].tolist()]
    if "offset_mapping" in features:
        spans = features["offset_mapping"][0].tolist()
    else:
        spans = [[0, 0]] * len(tokens)
    before = len(prompt)
    in_prompt = [
        before > 0 and not s and end <= before and end > 0
        for (_, end), s in zip(spans, special, strict=True)
    ]
    offsets = [
        (0, 0) if s or p else (max(0, start - before), max(0, end - before))
        for (start, end), s, p in zip(spans, special, in_prompt, strict=True)
    ]
    return {
        "text": text,
        "role": role,
        "tokens": tuple(tokens),
        "offsets": tuple(offsets),
        "special_mask": tuple(special),
        "prompt_mask": tuple(in_prompt),
    }


def _stack(features: Sequence[Features]) -> Features:
    """Join features of single texts of one length into one batch."""
    first = features[0]
    return {
        key: torch.cat([f[key] for f in features])
        if isinstance(value, Tensor) and value.ndim
        else value
        for key, value in first.items()
    }


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
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
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
            f"Expected attention 'sdpa' or 'eager', but {encoder.split.name} runs {kernel!r}, which "
            'has no forward derivative. Load it with `model_kwargs={"attn_implementation": "sdpa"}`.'
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
