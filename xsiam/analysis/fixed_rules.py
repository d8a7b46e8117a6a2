"""What fixed rules leave over of a score, measured at a fraction of what attributions cost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xsiam.attribution import PairAttributor
from xsiam.combination import Products, Settings, combine
from xsiam.errors import TruncationWarning
from xsiam.integrator import batches
from xsiam.quadrature import Rule
from xsiam.reading import AttributedText, read_text
from xsiam.texts import Truncations, check_pairs
from xsiam.vector_cache import TextKey

__all__ = ["RuleErrors", "fixed_rule_errors"]

Summed = tuple[AttributedText, Tensor]


@dataclass(frozen=True)
class RuleErrors:
    """The errors that a fixed rule makes on one pair.

    Attributes:
        n_nodes: Nodes of the rule.
        completeness_error_a: |Σ_s G[:, s] − Δ| / |Δ| of text a.
        completeness_error_b: The same of text b.
        residual: Score minus the sum of pairs, main effects and intercept.
    """

    n_nodes: int
    completeness_error_a: float
    completeness_error_b: float
    residual: float


def fixed_rule_errors(
    attributor: PairAttributor,
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    rules: Sequence[Rule],
    roles: tuple[str | None, str | None] = (None, None),
) -> list[list[RuleErrors]]:
    """Return the errors that fixed rules make on pairs, without their token vectors.

    Both errors speak of sums over the tokens only, and the sum of all token vectors takes one
    tangent a node instead of one a token. They are those that a `PairAttributor` with such a rule
    reports, up to float error.

    Args:
        attributor: Whose model, layer and reference they are for; its own rule plays no part.
        texts_a: First texts of n pairs.
        texts_b: Second texts.
        rules: The rules; nodes that they share are evaluated once.
        roles: Roles of both sides.

    Returns:
        For every pair the errors of every rule.

    Raises:
        InputError: If a text is empty or no string, or a role is unknown.
    """
    check_pairs(texts_a, texts_b)
    pairs = [((a, roles[0]), (b, roles[1])) for a, b in zip(texts_a, texts_b, strict=True)]
    with attributor.integrator.numerics():
        sums = dict(_summed(attributor, [key for pair in pairs for key in pair], rules))
        settings = attributor.settings
    return [
        [_errors(left, right, settings) for left, right in zip(sums[a], sums[b], strict=True)]
        for a, b in pairs
    ]


def _summed(
    attributor: PairAttributor, keys: Sequence[TextKey], rules: Sequence[Rule]
) -> Iterator[tuple[TextKey, list[Summed]]]:
    encoder, integrator = attributor.encoder, attributor.integrator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # said when the texts were scored
        with Truncations(encoder) as truncations:
            reads = {key: read_text(encoder, *key, truncations) for key in dict.fromkeys(keys)}
    integrator.make_ready(list(reads.values()), progress=False)
    for group in (group for batch in batches(reads) for group in batch):
        yield from zip(group, integrator.totals([reads[k] for k in group], rules), strict=True)


def _errors(left: Summed, right: Summed, settings: Settings) -> RuleErrors:
    (a, sum_a), (b, sum_b) = left, right
    known = Products(
        pairs=torch.dot(sum_a, sum_b)[None, None],
        main_a=torch.dot(sum_a, b.reference_embedding)[None],
        main_b=torch.dot(sum_b, a.reference_embedding)[None],
    )
    residual = combine(a, b, settings, known).residual
    return RuleErrors(a.n_nodes, a.completeness_error, b.completeness_error, residual)
