"""The result of attributing one pair: a frozen object with the errors inside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xsiam.errors import CheckpointError
from xsiam.spans import Span, SpanAttribution, sum_spans, word_spans

FORMAT_VERSION = 1
_TENSORS = ("matrix", "main_effects_a", "main_effects_b")


class TokenPair(NamedTuple):
    """One entry of an attribution matrix with the tokens it belongs to."""

    i: int
    j: int
    token_a: str
    token_b: str
    value: float


@dataclass(frozen=True, eq=False)
class PairAttribution:
    """The score of two texts, split over their tokens.

    ``score = matrix.sum() + main_effects_a.sum() + main_effects_b.sum() + intercept + residual``.
    For a model with a reference shift the main effects and the intercept vanish and the matrix
    alone sums to the score. An entry at layer l belongs to the contextualised positions that enter
    block l, not to "the word alone"; layer 0 is closest to the word.

    Attributes:
        text_a: The first text, without prompt.
        text_b: The second text.
        matrix: A = G_aᵀ G_b / n, [S_a, S_b], in units of the score.
        main_effects_a: G_aᵀ ẽ(r_b) / n, [S_a].
        main_effects_b: G_bᵀ ẽ(r_a) / n, [S_b].
        intercept: ẽ(r_a)·ẽ(r_b) / n.
        residual: What quadrature left over: score minus all terms above.
        score: The model's own score of the pair.
        attributed_score: Δ_a·Δ_b / n, what the matrix sums to at convergence.
        convergence_delta: matrix.sum() − attributed_score (signed, as in Captum).
        completeness_error: |Σ_s G[:, s] − Δ| / |Δ| of the worse text.
        completeness_error_a: The same of text a.
        completeness_error_b: The same of text b.
        token_error: Estimated largest error of one token vector relative to |Δ|, of the worse text.
        token_error_a: The same of text a.
        token_error_b: The same of text b.
        converged: Whether both texts met the tolerance.
        converged_a: The same of text a.
        converged_b: The same of text b.
        n_nodes: Nodes at which token derivatives were evaluated, of the text with more.
        n_nodes_a: The same of text a.
        n_nodes_b: The same of text b.
        tokens_a: Tokens of text a, prompt and special tokens included.
        tokens_b: Tokens of text b.
        offsets_a: Character span of each token in text a; (0, 0) for prompt and special tokens.
        offsets_b: The same for text b.
        special_mask_a: Which tokens the tokenizer added.
        special_mask_b: The same for text b.
        prompt_mask_a: Which tokens belong to the prompt.
        prompt_mask_b: The same for text b.
        layer: The layer l.
        reference: Registered name of the reference.
        quadrature: "adaptive" or the name of the fixed rule.
        tolerance: The tolerance that ``converged`` speaks of.
        similarity: "cos" or "dot".
        shift: Whether the model subtracts its reference embedding.
        dtype: Floating point type of the computation.
        model_fingerprint: Names the set of weights.
    """

    text_a: str
    text_b: str
    matrix: Tensor
    main_effects_a: Tensor
    main_effects_b: Tensor
    intercept: float
    residual: float
    score: float
    attributed_score: float
    convergence_delta: float
    completeness_error: float
    completeness_error_a: float
    completeness_error_b: float
    token_error: float
    token_error_a: float
    token_error_b: float
    converged: bool
    converged_a: bool
    converged_b: bool
    n_nodes: int
    n_nodes_a: int
    n_nodes_b: int
    tokens_a: tuple[str, ...]
    tokens_b: tuple[str, ...]
    offsets_a: tuple[tuple[int, int], ...]
    offsets_b: tuple[tuple[int, int], ...]
    special_mask_a: tuple[bool, ...]
    special_mask_b: tuple[bool, ...]
    prompt_mask_a: tuple[bool, ...]
    prompt_mask_b: tuple[bool, ...]
    layer: int
    reference: str
    quadrature: str
    tolerance: float
    similarity: str
    shift: bool
    dtype: str
    model_fingerprint: str

    @property
    def negative_share(self) -> float:
        """The share of negative entries of the matrix."""
        return float((self.matrix < 0).double().mean())

    def bordered(self) -> Tensor:
        """Return the matrix with main effects and intercept, [S_a + 1, S_b + 1].

        The last column holds the main effects of text a, the last row those of text b, the corner
        the intercept; all entries sum to ``score − residual``.
        """
        right = torch.cat([self.main_effects_a, self.matrix.new_tensor([self.intercept])])
        top = torch.cat([self.matrix, self.main_effects_b[None]])
        return torch.cat([top, right[:, None]], dim=1)

    def top_pairs(self, k: int = 20) -> list[TokenPair]:
        """Return the ``k`` entries of largest absolute value, strongest first."""
        flat = self.matrix.flatten()
        columns = self.matrix.shape[1]
        order = flat.abs().sort(descending=True, stable=True).indices[:k].tolist()
        return [
            TokenPair(
                n // columns,
                n % columns,
                self.tokens_a[n // columns],
                self.tokens_b[n % columns],
                float(flat[n]),
            )
            for n in order
        ]

    def sum_spans(self, spans_a: Sequence[Span], spans_b: Sequence[Span]) -> SpanAttribution:
        """Sum the attribution over spans of characters, such as sentences.

        A token belongs to the span that holds its first character (white space aside; a token of
        white space alone belongs to what comes behind it). Special tokens, prompt and tokens in no
        span are the rest, the last row and column, so that all sums together are the score's split.
        What does not fit, such as a token that reaches into a second span, is listed in
        ``places_a`` and ``places_b``.

        Args:
            spans_a: (start, end) in characters of text a, in any order; for sentences,
                :func:`xsiam.spans.sentence_spans`.
            spans_b: The same for text b.

        Raises:
            InputError: If a span lies outside of its text, is empty, or overlaps another.
        """
        return sum_spans(self, spans_a, spans_b)

    def sum_words(
        self, words_a: Sequence[Span] | None = None, words_b: Sequence[Span] | None = None
    ) -> SpanAttribution:
        """Merge sub-word pieces: sum the attribution over words.

        The same as :meth:`sum_spans` over words. For the published figure, the mean of a word's
        block of pieces, call :meth:`xsiam.spans.SpanAttribution.means` on what is returned.

        Args:
            words_a: (start, end) in characters of text a, such as those of spaCy's tokens; None
                takes :func:`xsiam.spans.word_spans`.
            words_b: The same for text b.

        Raises:
            InputError: If a span lies outside of its text, is empty, or overlaps another, or if the
                model's tokenizer gives no offsets.

        Example:
            >>> words = result.sum_words()  # doctest: +SKIP
            >>> words.top_spans(3)  # doctest: +SKIP
        """
        return self.sum_spans(
            word_spans(self.text_a) if words_a is None else words_a,
            word_spans(self.text_b) if words_b is None else words_b,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain values; tensors become nested lists."""
        return {
            f.name: value.tolist() if isinstance(value, Tensor) else value
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) is not None
        }

    def to_html(self) -> str:
        """Return the bordered matrix with score and errors as an HTML fragment, texts escaped."""
        from xsiam.page import render_html

        return render_html(self)

    def _repr_html_(self) -> str:
        """Show the matrix in a notebook."""
        return self.to_html()

    def save(self, path: str | Path) -> None:
        """Write the result to one safetensors file."""
        write_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> PairAttribution:
        """Read a result that :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is damaged, not ours, or of a newer format.
        """
        return read_result(path)[0]


def own_places(result: PairAttribution) -> tuple[list[int], list[int]]:
    """Return the positions of each text's own tokens, without special and prompt tokens."""
    masks = (
        (result.special_mask_a, result.prompt_mask_a),
        (result.special_mask_b, result.prompt_mask_b),
    )
    places = [[k for k, m in enumerate(zip(*both, strict=True)) if not any(m)] for both in masks]
    return places[0], places[1]


def write_result(
    result: PairAttribution, path: str | Path, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a result and further plain facts to one safetensors file."""
    plain = {
        f.name: getattr(result, f.name)
        for f in dataclasses.fields(result)
        if f.name not in _TENSORS
    }
    metadata = {"format_version": str(FORMAT_VERSION), "xsiam": json.dumps(plain)}
    if extra is not None:
        metadata["extra"] = json.dumps(extra)
    tensors = {name: getattr(result, name).contiguous() for name in _TENSORS}
    save_file(tensors, str(path), metadata=metadata)


def read_result(path: str | Path) -> tuple[PairAttribution, dict[str, Any]]:
    """Read a result and its further facts, empty where there are none.

    Raises:
        CheckpointError: If the file is damaged, not ours, or of a newer format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"Expected a saved attribution in {path}, but {error}.") from error
    if "xsiam" not in metadata:
        raise CheckpointError(f"Expected a saved attribution in {path}, but it holds none.")
    if int(metadata["format_version"]) > FORMAT_VERSION:
        raise CheckpointError(
            f"Expected format {FORMAT_VERSION} or older in {path}, but it has format "
            f"{metadata['format_version']}. Install a newer xsiam."
        )
    plain = json.loads(metadata["xsiam"])
    names = [f.name for f in dataclasses.fields(PairAttribution)]
    for name in (name for name in names if name.startswith("offsets")):
        plain[name] = [tuple(span) for span in plain[name]]
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()
    }
    return PairAttribution(**values, **tensors), json.loads(metadata.get("extra", "{}"))
