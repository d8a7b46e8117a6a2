"""How much of a score is left as the strongest pairs are taken out, for the study of references."""

from __future__ import annotations

from torch import Tensor

from xsiam import PairAttribution, SiameseEncoder
from xsiam.perturbation import Absence, pair_order, scores_without
from xsiam.result import own_places

DELETED = 5  # token pairs that are taken out one after the other


def deletion(
    encoder: SiameseEncoder, result: PairAttribution, matrix: Tensor, absence: Absence
) -> float:
    """Return the mean score that is left as pairs are taken out by falling entries.

    Both tokens of a pair are absent once it is taken out. It is in units of the score, since ratios
    to a score near zero say nothing: the lower, the more the pairs mattered. The score alone where
    a text has one token, which is never taken out.

    Args:
        encoder: The model.
        result: Of the pair.
        matrix: Entries of own tokens that give the order, [n_a, n_b].
        absence: What absent means.
    """
    own_a, own_b = own_places(result)
    order = pair_order(matrix, min(DELETED, len(own_a) - 1, len(own_b) - 1))
    steps = range(1, len(order) + 1) if order else [0]
    without_a = [[own_a[i] for i, _ in order[:k]] for k in steps]
    without_b = [[own_b[j] for _, j in order[:k]] for k in steps]
    return float(scores_without(encoder, result, without_a, without_b, absence).mean())
