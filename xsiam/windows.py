"""Texts beyond a model's window: the score of pooled overlapping windows, token by token."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from torch import Tensor

from xsiam.attribution import PairAttributor
from xsiam.combination import combine
from xsiam.cutting import Span, WindowCutter, Windows
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, ConvergenceWarning, InputError, TruncationWarning
from xsiam.merging import merge_windows
from xsiam.reading import TokenVectors
from xsiam.result import PairAttribution, read_result, write_result
from xsiam.texts import check_pairs, check_texts

POOLINGS = ("tokens", "mean")


@dataclass(frozen=True, eq=False)
class LongAttribution:
    """The attribution of a score over windows, beside the score of the truncated texts.

    ``attribution.score`` is NOT the model's own score of the texts, which knows only what fits its
    window and is reported as ``truncated_score``. It is the model's similarity of pooled windows:
    ẽ(text) = Σ_w ω_w ẽ(window_w), pooled before any Normalize.

    Attributes:
        attribution: The split of the pooled score; offsets are those of the whole texts, special
            and prompt tokens are there once per window.
        truncated_score: The model's own score, of the texts cut at its limit.
        pooling: "tokens" or "mean": how windows were weighted.
        window: The most tokens of a window, or None where the model has no limit.
        overlap: Tokens, or the share of a window, that neighbours were asked to share.
        windows_a: Character spans of the windows of text a.
        windows_b: The same of text b.
        weights_a: ω of each window of text a; they sum to 1.
        weights_b: The same of text b.
        split_words_a: How many cuts of text a fall inside a word that is longer than a window.
        split_words_b: The same of text b.
    """

    attribution: PairAttribution
    truncated_score: float
    pooling: str
    window: int | None
    overlap: int | float
    windows_a: tuple[Span, ...]
    windows_b: tuple[Span, ...]
    weights_a: tuple[float, ...]
    weights_b: tuple[float, ...]
    split_words_a: int
    split_words_b: int

    @property
    def score(self) -> float:
        """The score that is explained: of the pooled windows."""
        return self.attribution.score

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, which ``PairAttribution.load`` reads as well."""
        write_result(self.attribution, path, extra={name: getattr(self, name) for name in _FACTS})

    @classmethod
    def load(cls, path: str | Path) -> LongAttribution:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is damaged, not ours, of a newer format, or holds an
                attribution without windows.
        """
        attribution, facts = read_result(path)
        if "windows_a" not in facts:
            raise CheckpointError(
                f"Expected an attribution over windows in {path}, but it has none. Read it with "
                "`PairAttribution.load`."
            )
        for side in ("_a", "_b"):
            facts[f"windows{side}"] = tuple(tuple(span) for span in facts[f"windows{side}"])
            facts[f"weights{side}"] = tuple(facts[f"weights{side}"])
        return cls(attribution=attribution, **facts)


_FACTS = tuple(f.name for f in dataclasses.fields(LongAttribution) if f.name != "attribution")


@dataclass(frozen=True)
class _Document:
    """One text: its pooled token vectors and how it was cut."""

    vectors: TokenVectors
    windows: Windows
    weights: tuple[float, ...]


class WindowedAttributor:
    """Attribute scores of texts of any length, over overlapping windows.

    A text that fits is one window and its result is that of the attributor. A longer one is cut
    between words (:class:`xsiam.cutting.WindowCutter`), each window is an ordinary text with its
    own prompt, special tokens and reference, and the score explained is that of the pooled
    embedding ẽ(text) = Σ_w ω_w ẽ(window_w):

    * cosine: the cosine of pooled vectors; with ``truncate_dim`` of the truncated ones;
    * dot: their dot product;
    * dot behind a Normalize: their dot product over the norms of the POOLED vectors, with
      ``truncate_dim`` those before truncation. Windows are pooled before the Normalize, so this is
      not the mean of their normalised embeddings: a window of longer ẽ weighs more.

    Everything is linear in the windows: token vectors of the text are ω_w G_w, and a token in two
    windows has the sum of both shares. A word near a cut may be tokenised differently in two
    windows; only tokens of exactly equal character spans are merged. The reference embedding is
    Σ_w ω_w ẽ(r_w). Completeness error is that of the merged vectors. The token error is an upper
    bound from those estimated for the windows: the largest Σ_w ω_w error_w |Δ_w| / |Δ| of a token.
    ``converged`` holds these two against the tolerance: windows whose Δ cancel can fail it though
    each meets it. ``n_nodes`` of a text is the sum over its windows.

    Args:
        attributor: Integrates the windows. Its time budget holds for the texts of one role.
        overlap: Tokens that neighbouring windows share, or a share of the room for text (a float
            below 1).
        pooling: "tokens" weighs windows by their tokens of text (without prompt and special
            tokens; those in an overlap count in both), "mean" equally.
        window: The most tokens of a window, prompt and special tokens included; None is the
            model's limit.

    Raises:
        InputError: If an argument does not meet its constraint.
    """

    def __init__(
        self,
        attributor: PairAttributor,
        *,
        overlap: int | float = 64,
        pooling: str = "tokens",
        window: int | None = None,
    ) -> None:
        self.attributor = attributor
        self.encoder = attributor.encoder
        if pooling not in POOLINGS:
            raise InputError(
                f"Expected `pooling` to be one of {list(POOLINGS)}, but got {pooling!r}."
            )
        self.pooling = pooling
        self.window = _checked_window(window, self.encoder)
        self.overlap = _checked_overlap(overlap, self.window)

    @overload
    def attribute(  # type: ignore[overload-overlap]  # a str is a sequence of str as well
        self,
        texts_a: str,
        texts_b: str,
        role_a: str | None = None,
        role_b: str | None = None,
        *,
        progress: bool = False,
    ) -> LongAttribution: ...

    @overload
    def attribute(
        self,
        texts_a: Sequence[str],
        texts_b: Sequence[str],
        role_a: str | None = None,
        role_b: str | None = None,
        *,
        progress: bool = False,
    ) -> list[LongAttribution]: ...

    def attribute(
        self,
        texts_a: str | Sequence[str],
        texts_b: str | Sequence[str],
        role_a: str | None = None,
        role_b: str | None = None,
        *,
        progress: bool = False,
    ) -> LongAttribution | list[LongAttribution]:
        """Attribute the scores of pairs; each distinct window is integrated once.

        Args:
            texts_a: One text, or the first texts of n pairs.
            texts_b: One text, or the second texts of n pairs.
            role_a: Role of the first texts (None, "query", "document" or a prompt name).
            role_b: Role of the second texts.
            progress: Whether to show a progress bar.

        Returns:
            One result for two strings, else a list in the order of the pairs.

        Raises:
            InputError: If a text is empty or no string, a role is unknown, or a window has no room.
            ModelError: If a text is too long and the tokenizer gives no offsets.

        Warns:
            ConvergenceWarning: If a text did not meet the tolerance; its best result is kept.
        """
        single = isinstance(texts_a, str) and isinstance(texts_b, str)
        list_a = [texts_a] if isinstance(texts_a, str) else list(texts_a)
        list_b = [texts_b] if isinstance(texts_b, str) else list(texts_b)
        check_pairs(list_a, list_b)
        keys = [(text, role_a) for text in list_a] + [(text, role_b) for text in list_b]
        documents = self._documents(keys, progress)
        _warn_unconverged([d.vectors for d in documents.values()], self.attributor)
        own = self._truncated_embeddings(documents)
        results = [
            self._result(
                documents[text_a, role_a],
                documents[text_b, role_b],
                self.encoder.similarity_of(own[text_a, role_a], own[text_b, role_b]),
            )
            for text_a, text_b in zip(list_a, list_b, strict=True)
        ]
        return results[0] if single else results

    def token_vectors(
        self, texts: Sequence[str], role: str | None = None, *, progress: bool = False
    ) -> list[TokenVectors]:
        """Return the token vectors of pooled windows; they depend on one text only.

        Raises:
            InputError: If a text is empty or no string, the role is unknown, or a window has no
                room.
            ModelError: If a text is too long and the tokenizer gives no offsets.

        Warns:
            ConvergenceWarning: If a text did not meet the tolerance.
        """
        check_texts(texts)
        documents = self._documents([(text, role) for text in texts], progress)
        _warn_unconverged([d.vectors for d in documents.values()], self.attributor)
        return [documents[text, role].vectors for text in texts]

    # -- inside ---------------------------------------------------------------------------------

    def _documents(
        self, keys: Iterable[tuple[str, str | None]], progress: bool
    ) -> dict[tuple[str, str | None], _Document]:
        """Cut, integrate and pool each distinct text: the windows of one role together."""
        roles: dict[str | None, list[str]] = {}
        for text, role in dict.fromkeys(keys):
            roles.setdefault(role, []).append(text)
        for role in roles:
            self.encoder.check_role(role)
        documents: dict[tuple[str, str | None], _Document] = {}
        for role, texts in roles.items():
            cuts = [self._cut(text, role) for text in texts]
            pieces = [
                [text[start:end] for start, end in cut.spans]
                for text, cut in zip(texts, cuts, strict=True)
            ]
            flat = [piece for some in pieces for piece in some]
            with warnings.catch_warnings():
                # Whole texts are held against the tolerance below, and reported.
                warnings.simplefilter("ignore", ConvergenceWarning)
                vectors = iter(self.attributor.token_vectors(flat, role, progress=progress))
            for text, cut, some in zip(texts, cuts, pieces, strict=True):
                parts = [next(vectors) for _ in some]
                documents[text, role] = self._pooled(text, cut, parts)
        return documents

    def _cut(self, text: str, role: str | None) -> Windows:
        if self.window is None:
            return Windows(((0, len(text)),))
        prompt = self.encoder.prompt_of(role)[0] or ""
        return WindowCutter(self.encoder.tokenizer, prompt, self.window, self.overlap).cut(text)

    def _pooled(self, text: str, cut: Windows, parts: Sequence[TokenVectors]) -> _Document:
        if cut.spans == ((0, len(text)),):
            return _Document(parts[0], cut, (1.0,))
        sizes = [
            sum(not (s or p) for s, p in zip(part.special_mask, part.prompt_mask, strict=True))
            if self.pooling == "tokens"
            else 1
            for part in parts
        ]
        weights = tuple(size / sum(sizes) for size in sizes)
        starts = [start for start, _ in cut.spans]
        tolerance = self.attributor.settings.tolerance
        merged = merge_windows(self.encoder, parts, weights, starts, tolerance)
        return _Document(dataclasses.replace(merged, text=text), cut, weights)

    def _truncated_embeddings(
        self, keys: Iterable[tuple[str, str | None]]
    ) -> dict[tuple[str, str | None], Tensor]:
        """Return the model's own embeddings [1, K] of the texts, cut at its limit."""
        roles: dict[str | None, list[str]] = {}
        for text, role in keys:
            roles.setdefault(role, []).append(text)
        embeddings: dict[tuple[str, str | None], Tensor] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # the result says so by its name
            for role, texts in roles.items():
                rows = self.encoder.encode(texts, role)
                for text, row in zip(texts, rows, strict=True):
                    embeddings[text, role] = row[None]
        return embeddings

    def _result(self, a: _Document, b: _Document, truncated: Tensor) -> LongAttribution:
        return LongAttribution(
            attribution=combine(a.vectors, b.vectors, self.attributor.settings),
            truncated_score=float(truncated),
            pooling=self.pooling,
            window=self.window,
            overlap=self.overlap,
            windows_a=a.windows.spans,
            windows_b=b.windows.spans,
            weights_a=a.weights,
            weights_b=b.weights,
            split_words_a=a.windows.split_words,
            split_words_b=b.windows.split_words,
        )


def _warn_unconverged(texts: Sequence[TokenVectors], attributor: PairAttributor) -> None:
    missed = [text for text in texts if not text.converged]
    if not missed:
        return
    worst = max(max(text.completeness_error, text.token_error) for text in missed)
    settings = attributor.settings
    remedy = (
        "Raise `max_nodes` or the time budget, take a higher layer, or lower the attributor's "
        "tolerance: errors of windows add up."
        if settings.quadrature == "adaptive"
        else 'Raise `n_nodes`, or set `quadrature="adaptive"`.'
    )
    warnings.warn(
        f"{len(missed)} of {len(texts)} texts did not meet the tolerance {settings.tolerance:.1e} "
        f"over their windows at layer {settings.layer}: the largest error is {worst:.1e}. {remedy}",
        ConvergenceWarning,
        stacklevel=3,
    )


def _checked_window(window: int | None, encoder: SiameseEncoder) -> int | None:
    limit = encoder.max_length
    if window is None:
        return limit
    special = encoder.tokenizer.num_special_tokens_to_add()
    if isinstance(window, bool) or not isinstance(window, int) or window <= special:
        raise InputError(
            f"Expected `window` to be a number of tokens above {special}, the number of special "
            f"tokens, but got {window!r}."
        )
    if limit is not None and window > limit:
        raise InputError(
            f"Expected `window` to be at most {limit}, the model's limit, but got {window}. Set "
            "`model.max_length` if the model allows more."
        )
    return window


def _checked_overlap(overlap: int | float, window: int | None) -> int | float:
    number = isinstance(overlap, int | float) and not isinstance(overlap, bool)
    limit = 1 if isinstance(overlap, float) else window
    if not number or overlap < 0 or (limit is not None and overlap >= limit):
        raise InputError(
            f"Expected `overlap` to be a number of tokens from 0 to below the window of {window}, "
            f"or a fraction from 0 to below 1, but got {overlap!r}. Set `overlap=0.25`, say."
        )
    return overlap
