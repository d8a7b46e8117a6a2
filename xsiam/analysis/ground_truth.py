"""Do methods find what was planted? For encoders that are built so that the answer is known."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from torch import Tensor

from xsiam.analysis.base import NotApplicableError, ResultTable
from xsiam.analysis.baselines import BASELINES, BaselineMatrix, PairCase, explain
from xsiam.result import own_places

__all__ = ["planted_table", "precision_at_planted"]

_TIED = 1e-9  # of the largest absolute value


def precision_at_planted(matrix: Tensor, planted: Collection[tuple[int, int]]) -> float:
    """Return the share of the k planted pairs among the k largest entries, by signed value.

    Where entries tie for the last places it is what a random choice among them gives on average.

    Args:
        matrix: Values of pairs, [n_a, n_b].
        planted: k distinct pairs (i, j).

    Raises:
        ValueError: If no pair is planted.
    """
    pairs = set(planted)
    if not pairs:
        raise ValueError("Expected one planted pair or more, but got none.")
    k, width = len(pairs), matrix.shape[1]
    flat = matrix.double().flatten()
    tied = _TIED * float(flat.abs().max())
    last = float(flat.sort(descending=True).values[k - 1])
    above = {divmod(n, width) for n in (flat > last + tied).nonzero()[:, 0].tolist()}
    equal = {divmod(n, width) for n in ((flat - last).abs() <= tied).nonzero()[:, 0].tolist()}
    hits = len(above & pairs) + (k - len(above)) * len(equal & pairs) / len(equal)
    return hits / k


def planted_table(
    cases: Sequence[PairCase], planted: Sequence[Collection[tuple[int, int]]]
) -> ResultTable:
    """Return how many planted token pairs each method finds, attribution and every baseline.

    Args:
        cases: Pairs of texts with their attributions, of an encoder of which the truth is known.
        planted: For each, the positions (i, j) of the tokens that were made to interact, special
            tokens counted, as in ``result.tokens_a``.

    Returns:
        A row for each method: mean precision at k for k planted pairs, None where it cannot say
        anything of any pair, of how many pairs, and the mean cost.

    Raises:
        ValueError: If a planted token is none of the text's own.
    """
    rows = []
    wanted = [_among_own(case, pairs) for case, pairs in zip(cases, planted, strict=True)]
    for name in BASELINES:
        found: list[BaselineMatrix] = []
        precisions = []
        for case, pairs in zip(cases, wanted, strict=True):
            try:
                found.append(explain(name, case))
            except NotApplicableError:
                continue
            precisions.append(precision_at_planted(found[-1].matrix, pairs))
        rows.append(
            {
                "baseline": name,
                "precision": statistics.fmean(precisions) if found else None,
                "n": len(found),
                "texts": statistics.fmean(f.forwards for f in found) if found else None,
                "derivatives": statistics.fmean(f.derivatives for f in found) if found else None,
            }
        )
    return ResultTable(
        rows,
        "share of the planted token pairs among as many largest values, mean over n text pairs; "
        "mean number of texts through the model and of derivatives for one token at one point",
        shown=True,
    )


def _among_own(case: PairCase, pairs: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
    """Return pairs of positions as pairs of numbers among the own tokens."""
    own_a, own_b = own_places(case.result)
    for i, j in pairs:
        if i not in own_a or j not in own_b:
            raise ValueError(f"Expected own tokens to be planted, but ({i}, {j}) are not.")
    return {(own_a.index(i), own_b.index(j)) for i, j in pairs}
