"""What a score becomes when tokens are absent: texts with holes, interactions, pairs taken out.

What stands for "absent" decides what is found, so there are three protocols: ``mask`` puts the mask
token in a token's place, ``drop`` takes the token out, and ``mean`` puts a mean hidden state in
place of its hidden state at a layer. They are questions of their own, beside attribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xsiam.encoder import Parts, SiameseEncoder
from xsiam.errors import InputError
from xsiam.linear import FastLinear
from xsiam.result import PairAttribution, own_places
from xsiam.split import Features, evaluation_mode, features_to, select_rows

__all__ = [
    "PROTOCOLS",
    "Absence",
    "embed_without",
    "interactions",
    "mean_state",
    "pair_order",
    "protocols_of",
    "score_matrix",
    "scores_without",
]

PROTOCOLS = ("mask", "drop", "mean")
"""What "absent" can mean."""

Roles = tuple[str | None, str | None]
_TOKENS_AT_ONCE = 4096
_LEAST_NORM = 1e-8  # that of `torch.nn.functional.cosine_similarity`, which gives 0 there


@dataclass(frozen=True)
class Absence:
    """What it means that a token is absent.

    Attributes:
        protocol: "mask": the mask token is in its place. "drop": it is taken out, and the text is
            shorter. "mean": ``state`` is in place of its hidden state at ``layer``.
        layer: The layer of "mean".
        state: The state of "mean", [D].

    Raises:
        InputError: If the protocol is unknown, or "mean" has no state.
    """

    protocol: str
    layer: int = 0
    state: Tensor | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise InputError(
                f"Expected `protocol` to be among {PROTOCOLS}, but got {self.protocol!r}."
            )
        if self.protocol == "mean" and self.state is None:
            raise InputError("Expected `state` for the protocol 'mean', but got None.")


def protocols_of(encoder: SiameseEncoder) -> tuple[str, ...]:
    """Return the protocols that a model allows: "mask" needs a mask token."""
    has_mask = encoder.tokenizer.mask_token_id is not None
    return PROTOCOLS if has_mask else tuple(p for p in PROTOCOLS if p != "mask")


def mean_state(
    encoder: SiameseEncoder, texts: Sequence[str], layer: int, role: str | None = None
) -> Tensor:
    """Return the mean hidden state at a layer over all tokens but the special ones, [D]."""
    states = []
    with torch.no_grad(), evaluation_mode(encoder):
        for start in range(0, len(texts), 64):
            some = encoder.preprocess(texts[start : start + 64], role)
            features = features_to(some, encoder.device)
            own = features["attention_mask"].bool() & ~features["special_tokens_mask"].bool()
            states.append(encoder.split.capture(features, layer)[own])
    return torch.cat(states).mean(0)


def embed_without(
    encoder: SiameseEncoder,
    text: str,
    absences: Sequence[Iterable[int]],
    absence: Absence,
    role: str | None = None,
) -> Parts:
    """Embed a text with some of its positions absent, for each of several sets of them.

    Equal sets are embedded once. With a shift, a text with tokens masked or averaged keeps the
    reference of its length, one with tokens dropped has that of its new length.

    Args:
        encoder: The model.
        text: The text, without prompt.
        absences: n sets of positions; an empty one stands for the whole text.
        absence: What absent means.
        role: Role of the text.

    Returns:
        ẽ [n, K] and the norms that the model divides by [n].

    Raises:
        InputError: If a position lies outside of the text, no token is left where tokens are
            dropped, or the model has no mask token.
    """
    wanted = [frozenset(places) for places in absences]
    distinct = list(dict.fromkeys(wanted))
    with torch.no_grad(), evaluation_mode(encoder), encoder.weights_held(), FastLinear():
        features = features_to(encoder.preprocess([text], role), encoder.device)
        features.pop("offset_mapping", None)
        _check(encoder, features, distinct, absence.protocol)
        at_once = max(1, _TOKENS_AT_ONCE // features["input_ids"].shape[1])
        embedded: dict[frozenset[int], Tensor] = {}
        for group in _groups(distinct, by_size=absence.protocol == "drop"):
            for start in range(0, len(group), at_once):
                some = group[start : start + at_once]
                embedded |= zip(some, _embed(encoder, features, some, absence), strict=True)
        if not wanted:
            return encoder.parts_of(encoder.split.embed(features)[:0])
        return encoder.parts_of(torch.stack([embedded[places] for places in wanted]))


def score_matrix(encoder: SiameseEncoder, a: Parts, b: Parts) -> Tensor:
    """Return the scores of all pairs of embeddings, [n_a, n_b] float64."""
    return a.embedding.double() @ b.embedding.double().mT / (_norms(a)[:, None] * _norms(b))


def scores_without(
    encoder: SiameseEncoder,
    result: PairAttribution,
    absences_a: Sequence[Iterable[int]],
    absences_b: Sequence[Iterable[int]],
    absence: Absence,
    roles: Roles = (None, None),
) -> Tensor:
    """Return the scores with the k-th set of positions absent in each text, [n] float64."""
    a = embed_without(encoder, result.text_a, absences_a, absence, roles[0])
    b = embed_without(encoder, result.text_b, absences_b, absence, roles[1])
    return (a.embedding.double() * b.embedding.double()).sum(1) / (_norms(a) * _norms(b))


def interactions(
    encoder: SiameseEncoder,
    result: PairAttribution,
    absence: Absence,
    roles: Roles = (None, None),
) -> Tensor:
    """Return the leave-one-out interactions of all pairs of own tokens, [n_a, n_b] float64.

    f(a, b) − f(a∖i, b) − f(a, b∖j) + f(a∖i, b∖j), in units of the score: n_a + n_b + 2 texts are
    embedded. For a dot product that is (ẽ(a) − ẽ(a∖i))·(ẽ(b) − ẽ(b∖j)).
    """
    places_a, places_b = own_places(result)
    a = embed_without(encoder, result.text_a, [[], *([i] for i in places_a)], absence, roles[0])
    b = embed_without(encoder, result.text_b, [[], *([j] for j in places_b)], absence, roles[1])
    scores = score_matrix(encoder, a, b).cpu()  # where the matrices of attributions are
    return scores[:1, :1] - scores[1:, :1] - scores[:1, 1:] + scores[1:, 1:]


def pair_order(matrix: Tensor, n_pairs: int) -> list[tuple[int, int]]:
    """Return the strongest pairs, each the largest entry of the rows and columns still there.

    So k pairs hold k tokens of each text, whatever the matrix: orders of different methods are
    compared at equal numbers of tokens. Of equal entries the first is taken.

    Args:
        matrix: Entries of own tokens, [n_a, n_b]; by signed value.
        n_pairs: How many, at most min(n_a, n_b).
    """
    left = matrix.detach().clone().double()
    order = []
    for _ in range(min(n_pairs, *left.shape)):
        i, j = divmod(int(left.argmax()), left.shape[1])
        left[i], left[:, j] = -torch.inf, -torch.inf
        order.append((i, j))
    return order


def _norms(parts: Parts) -> Tensor:
    """Return norms that can be divided by: a text of no words may have an embedding of zero."""
    return parts.norm.double().clamp_min(_LEAST_NORM)


def _check(
    encoder: SiameseEncoder, features: Features, absences: Sequence[frozenset[int]], protocol: str
) -> None:
    length = features["input_ids"].shape[1]
    for places in absences:
        if places and not 0 <= min(places) <= max(places) < length:
            raise InputError(
                f"Expected positions below {length}, the tokens of the text, but got "
                f"{sorted(places)}."
            )
        if protocol == "drop" and len(places) == length:
            raise InputError(
                f"Expected one of {length} tokens to be left, but all are to be dropped: nothing "
                "would be embedded. Take the protocol 'mask' or 'mean'."
            )
    if protocol == "mask" and encoder.tokenizer.mask_token_id is None:
        raise InputError(
            f"Expected a tokenizer with a mask token for the protocol 'mask', but "
            f"{type(encoder.tokenizer).__name__} has none. Take 'drop' or 'mean'."
        )


def _groups(
    absences: Sequence[frozenset[int]], *, by_size: bool
) -> Iterable[Sequence[frozenset[int]]]:
    """Group sets whose texts are of one length, so that none is padded."""
    groups: dict[int, list[frozenset[int]]] = {}
    for places in absences:
        groups.setdefault(len(places) if by_size else 0, []).append(places)
    return groups.values()


def _embed(
    encoder: SiameseEncoder,
    features: Features,
    absences: Sequence[frozenset[int]],
    absence: Absence,
) -> Tensor:
    """Embed one text with sets of positions absent, shifted, not truncated: [n, K]."""
    split = encoder.split
    rows = torch.zeros(len(absences), dtype=torch.long, device=encoder.device)
    many = select_rows(features, rows)
    gone = torch.zeros_like(many["input_ids"], dtype=torch.bool)
    for row, places in enumerate(absences):
        gone[row, sorted(places)] = True
    if absence.protocol == "mask":
        mask_id = encoder.tokenizer.mask_token_id
        many["input_ids"] = many["input_ids"].masked_fill(gone, mask_id)
    if absence.protocol == "drop":
        shape = gone.shape
        many = {
            key: value[~gone].reshape(len(absences), -1, *value.shape[2:])
            if isinstance(value, Tensor) and value.shape[:2] == shape
            else value
            for key, value in many.items()
        }
    if absence.protocol == "mean":
        assert absence.state is not None
        hidden = split.capture(features, absence.layer)[rows]
        state = absence.state.to(hidden)
        embedding = split.tail(many, absence.layer, torch.where(gone[..., None], state, hidden))
    else:
        embedding = split.embed(many)
    shift = encoder.shift_of(many)
    return embedding if shift is None else embedding - shift
