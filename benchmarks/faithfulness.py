"""Does a pair matrix say what leaving tokens out does? Interactions and deletion, of one model.

What stands for "absent" decides, so there are three protocols: ``mask`` puts the mask token in a
token's place, ``drop`` takes the token out, and ``mean`` puts the mean state of a corpus in place
of its hidden state at the layer that was attributed.

The interaction of tokens i and j is f(a, b) − f(a∖i, b) − f(a, b∖j) + f(a∖i, b∖j) (leave-one-out).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xsiam import PairAttribution, SiameseEncoder
from xsiam.metrics import spearman
from xsiam.split import evaluation_mode, features_to, select_rows

PROTOCOLS = ("mask", "drop", "mean")
DELETED = 5  # token pairs that are taken out one after the other


def mean_state(encoder: SiameseEncoder, texts: Sequence[str], layer: int) -> Tensor:
    """Return the mean hidden state at a layer over the texts' own tokens, [D]."""
    states = []
    with torch.no_grad(), evaluation_mode(encoder):
        for start in range(0, len(texts), 64):
            features = features_to(encoder.preprocess(texts[start : start + 64]), encoder.device)
            own = features["attention_mask"].bool() & ~features["special_tokens_mask"].bool()
            states.append(encoder.split.capture(features, layer)[own])
    return torch.cat(states).mean(0)


def interactions(
    encoder: SiameseEncoder, result: PairAttribution, protocol: str, absent: Tensor
) -> Tensor:
    """Return the leave-one-out interactions of all pairs of own tokens, [n_a, n_b]."""
    sides = []
    for text, special in (
        (result.text_a, result.special_mask_a),
        (result.text_b, result.special_mask_b),
    ):
        places = (~torch.tensor(special)).nonzero()[:, 0]
        one_less = [places[i : i + 1] for i in range(len(places))]
        sides.append(_embedded(encoder, text, one_less, protocol, result.layer, absent))
    (whole_a, less_a), (whole_b, less_b) = sides
    score = _scores(encoder, whole_a, whole_b)
    return (
        score
        - _scores(encoder, less_a, whole_b)
        - _scores(encoder, whole_a, less_b)
        + _scores(encoder, less_a, less_b)
    )


def deletion(
    encoder: SiameseEncoder, result: PairAttribution, matrix: Tensor, protocol: str, absent: Tensor
) -> float:
    """Return the mean score that is left as pairs are taken out by falling entries.

    Both tokens of a pair are absent once it is taken out. It is in units of the score, since ratios
    to a score near zero say nothing: the lower, the more the pairs mattered. The score alone where
    a text has one token, which is never taken out.

    Args:
        encoder: The model.
        result: Of the pair.
        matrix: Entries of own tokens that give the order, [n_a, n_b].
        protocol: What absent means.
        absent: The state of ``mean``.
    """
    own_a, own_b = (
        (~torch.tensor(mask)).nonzero()[:, 0]
        for mask in (result.special_mask_a, result.special_mask_b)
    )
    left = matrix.clone().double()
    gone_a: list[int] = []
    gone_b: list[int] = []
    steps_a, steps_b = [], []
    for _ in range(min(DELETED, len(own_a) - 1, len(own_b) - 1)):
        i, j = divmod(int(left.argmax()), left.shape[1])
        left[i], left[:, j] = -torch.inf, -torch.inf
        gone_a.append(int(own_a[i]))
        gone_b.append(int(own_b[j]))
        steps_a.append(torch.tensor(gone_a))
        steps_b.append(torch.tensor(gone_b))
    whole_a, less_a = _embedded(encoder, result.text_a, steps_a, protocol, result.layer, absent)
    whole_b, less_b = _embedded(encoder, result.text_b, steps_b, protocol, result.layer, absent)
    kept = _scores(encoder, less_a, less_b).diagonal()
    return float(kept.mean() if len(kept) else _scores(encoder, whole_a, whole_b))


def centred(matrix: Tensor) -> Tensor:
    """Remove means of rows and columns: what is left has no main effects."""
    if min(matrix.shape) == 1:
        return torch.zeros_like(matrix)  # exactly: there is nothing but rounding to correlate
    return matrix - matrix.mean(0, keepdim=True) - matrix.mean(1, keepdim=True) + matrix.mean()


def correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's correlation of two matrices, nan where it is undefined.

    It is with fewer than three entries, or where all of a matrix are equal: a matrix of one row
    that is double-centred, say.
    """
    if one.numel() < 3 or any(bool(torch.all(m == m.flatten()[0])) for m in (one, other)):
        return float("nan")
    return float(spearman(one.flatten(), other.flatten()))


def _embedded(
    encoder: SiameseEncoder,
    text: str,
    absences: Sequence[Tensor],
    protocol: str,
    layer: int,
    absent: Tensor,
) -> tuple[Tensor, Tensor]:
    """Embed a text, [1, K], and the text without some of its positions each time, [n, K]."""
    split = encoder.split
    with torch.no_grad(), evaluation_mode(encoder):
        features = features_to(encoder.preprocess([text]), encoder.device)
        features.pop("offset_mapping", None)
        whole = split.embed(features)
        if not absences:
            return whole, whole[:0]
        rows = torch.zeros(len(absences), dtype=torch.long, device=encoder.device)
        many = select_rows(features, rows)
        if protocol == "mean":
            hidden = split.capture(features, layer)[rows].clone()
            for row, places in enumerate(absences):
                hidden[row, places] = absent
            return whole, split.tail(many, layer, hidden)
        if protocol == "mask":
            ids = many["input_ids"].clone()
            for row, places in enumerate(absences):
                ids[row, places] = encoder.tokenizer.mask_token_id
            return whole, split.embed({**many, "input_ids": ids})
        parts = []
        for places in absences:
            kept = torch.ones(features["input_ids"].shape[1], dtype=torch.bool)
            kept[places] = False
            parts.append(
                split.embed(
                    {
                        key: value[:, kept]
                        if isinstance(value, Tensor) and value.ndim == 2
                        else value
                        for key, value in features.items()
                    }
                )
            )
        return whole, torch.cat(parts)


def _scores(encoder: SiameseEncoder, a: Tensor, b: Tensor) -> Tensor:
    """Return the scores of all pairs, [n_a, n_b] float64."""
    a, b = a.double(), b.double()
    if encoder.similarity == "cos" or encoder.normalize:
        a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    return a @ b.mT
