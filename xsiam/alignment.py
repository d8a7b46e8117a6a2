"""Which words matched which: a sparse alignment of two texts from their attribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xsiam.errors import InputError
from xsiam.result import PairAttribution, own_places
from xsiam.spans import SpanAttribution
from xsiam.tables import suggest

__all__ = ["Alignment", "Link", "align"]

Matrix = NDArray[np.float64]

_UNITS = ("words", "tokens")
_NO_MASS = 1e-9  # of all mass: what the solver leaves by rounding, about 1e-17, is no link


class Link(NamedTuple):
    """Two units that matched.

    Attributes:
        i: Number of the unit of text a.
        j: Number of the unit of text b.
        text_a: What stands there in text a.
        text_b: The same of text b.
        weight: Share of all mass that is moved between them, of 1; with "mutual_best" all links
            weigh the same.
        entry: Attribution of the two units, in units of the score.
    """

    i: int
    j: int
    text_a: str
    text_b: str
    weight: float
    entry: float


@dataclass(frozen=True)
class Alignment:
    """Links between the units (words, tokens, spans) of two texts.

    Attributes:
        method: "transport" or "mutual_best".
        links: The links, the largest entry first.
        units_a: Texts of the units of text a, in the order of their numbers.
        units_b: The same of text b.
        covered: What the entries of the links sum to, in units of the score.
        positive: What all positive entries between units sum to.
        total: What all entries between units sum to.
        rest: Pairs that involve a special token, a prompt, or what else is no unit.
        main_effects: All main effects and the intercept, zero for a model with a reference shift.
        residual: What quadrature left over.
        score: total + rest + main_effects + residual.
    """

    method: str
    links: tuple[Link, ...]
    units_a: tuple[str, ...]
    units_b: tuple[str, ...]
    covered: float
    positive: float
    total: float
    rest: float
    main_effects: float
    residual: float
    score: float

    @property
    def unmatched_a(self) -> tuple[int, ...]:
        """Numbers of the units of text a without a link."""
        return tuple(sorted(set(range(len(self.units_a))) - {link.i for link in self.links}))

    @property
    def unmatched_b(self) -> tuple[int, ...]:
        """Numbers of the units of text b without a link."""
        return tuple(sorted(set(range(len(self.units_b))) - {link.j for link in self.links}))

    @property
    def share_of_score(self) -> float | None:
        """What is covered by the score; None for a score of zero.

        It can exceed 1, since what is not linked can be negative, and says little for a model
        without a shift, whose pairs alone do not sum to the score.
        """
        return self.covered / self.score if self.score else None

    @property
    def share_of_positive(self) -> float | None:
        """What is covered by all that is positive, in [0, 1]; None where nothing is positive."""
        return self.covered / self.positive if self.positive else None

    def pairs(self) -> frozenset[tuple[int, int]]:
        """Return the numbers that are linked."""
        return frozenset((link.i, link.j) for link in self.links)

    def agreement(self, other: Alignment) -> float | None:
        """Return the F1 of two alignments, 2·|both| / (|one| + |other|); None if both are empty.

        Raises:
            InputError: If they are of other units.
        """
        if (self.units_a, self.units_b) != (other.units_a, other.units_b):
            raise InputError(
                "Expected alignments of the same units, but their texts or units differ. Align "
                "both from one attribution, with the same `units`."
            )
        links = len(self.links) + len(other.links)
        return 2 * len(self.pairs() & other.pairs()) / links if links else None

    def __str__(self) -> str:
        left = max((len(link.text_a) for link in self.links), default=0)
        right = max((len(link.text_b) for link in self.links), default=0)
        lines = [
            f"{link.text_a:>{left}} – {link.text_b:<{right}}  {link.entry:+.4f}  "
            f"({link.weight:.0%} of the mass)"
            for link in self.links
        ]
        share = self.share_of_score
        lines.append(
            f"{len(self.links)} links carry {self.covered:.4f} of the score {self.score:.4f}"
            + ("" if share is None else f" ({share:.0%})")
        )
        lines.append(
            f"not linked {self.total - self.covered:+.4f}, special tokens {self.rest:+.4f}, "
            f"main effects {self.main_effects:+.4f}, residual {self.residual:+.1e}"
        )
        for name, units, numbers in (
            ("a", self.units_a, self.unmatched_a),
            ("b", self.units_b, self.unmatched_b),
        ):
            lines.append(f"without a link in {name}: {' '.join(units[n] for n in numbers) or '–'}")
        return "\n".join(lines)


def align(
    attribution: PairAttribution | SpanAttribution,
    *,
    method: str = "transport",
    masses: str = "attribution",
    min_entry: float = 0.05,
    units: str | None = None,
) -> Alignment:
    """Align two texts: say which units matched which (ours).

    Links have a gain, g_ij = A_ij where that is positive and at least ``min_entry`` of the largest
    entry, else 0. Without a gain there is no link.

    * "transport": partial optimal transport. The plan W ≥ 0 maximises Σ_ij W_ij g_ij under
      Σ_j W_ij ≤ p_i and Σ_i W_ij ≤ q_j, where both masses p and q sum to 1; W_ij is the weight of a
      link. Mass that would gain nothing is no link, so that units can be left out. The plan is
      exact, without entropy, and a vertex of the polytope, so that it has fewer than n_a + n_b
      links; a unit can have several ("took off" – "left"). With masses "uniform" (p_i = 1/n_a,
      q_j = 1/n_b) and equal numbers of units it is the best one-to-one assignment. With
      "attribution" a unit's mass is its part of the gains (p_i ∝ Σ_j g_ij, q_j ∝ Σ_i g_ij), so that
      units that matter can have more links.
    * "mutual_best": i and j are linked if g_ij is the largest of its row and of its column, the
      first of equal ones. One link a unit at most.

    Args:
        attribution: The attribution of a pair; or sums over words or spans, whose units are then
            these.
        method: "transport" or "mutual_best".
        masses: "attribution" or "uniform"; "mutual_best" has none.
        min_entry: Smallest entry that makes a link, as a share of the largest, from 0 to 1.
        units: "words" (of :func:`xsiam.spans.word_spans`, the default) or "tokens", without special
            tokens and prompt; to be left out with sums, also for words of another tokenizer.

    Raises:
        InputError: If a name is unknown, ``min_entry`` is out of range, ``units`` is given with
            sums, an entry is not finite, or POT, which solves the transport, is not installed.

    Note:
        An alignment leaves things out by design: how much is in ``share_of_score``, and the
        attribution itself has the rest.
    """
    if method not in _METHODS:
        raise InputError(
            f"Expected `method` to be among {', '.join(_METHODS)}, but got {method!r}."
            f"{suggest(method, _METHODS)}"
        )
    if masses not in _MASSES:
        raise InputError(
            f"Expected `masses` to be among {', '.join(_MASSES)}, but got {masses!r}."
            f"{suggest(masses, _MASSES)}"
        )
    if not 0 <= min_entry <= 1:
        raise InputError(f"Expected `min_entry` to be between 0 and 1, but got {min_entry}.")
    units_a, units_b, entries = _entries(attribution, units)
    bad = int((~np.isfinite(entries)).sum())
    if bad:
        raise InputError(
            f"Expected finite entries, but {bad} of {entries.size} of the attribution are not. "
            "Check the weights of the model."
        )
    gain = np.clip(entries, 0.0, None)
    weights = _METHODS[method](
        np.where(gain >= min_entry * gain.max(initial=0.0), gain, 0.0), masses
    )
    order = sorted(zip(*np.nonzero(weights), strict=True), key=lambda ij: -entries[ij])
    links = tuple(
        Link(int(i), int(j), units_a[i], units_b[j], float(weights[i, j]), float(entries[i, j]))
        for i, j in order
    )
    main_effects = attribution.main_effects_a.double().sum() + (
        attribution.main_effects_b.double().sum()
    )
    total = float(entries.sum())
    return Alignment(
        method=method,
        links=links,
        units_a=tuple(units_a),
        units_b=tuple(units_b),
        covered=sum((link.entry for link in links), 0.0),
        positive=float(gain.sum()),
        total=total,
        rest=float(attribution.matrix.double().sum()) - total,
        main_effects=float(main_effects) + attribution.intercept,
        residual=attribution.residual,
        score=attribution.score,
    )


def transport_plan(gain: Matrix, masses: str = "attribution") -> Matrix:
    """Return the plan of partial optimal transport, [n_a, n_b]: see :func:`align`."""
    if find_spec("ot") is None:
        raise InputError(
            "Expected POT for optimal transport, but it is not installed. Install it with "
            '`pip install "xsiam[analysis]"`, or take `method="mutual_best"`.'
        )
    if not gain.any():
        return np.zeros_like(gain)
    import ot

    p, q = _MASSES[masses](gain)
    # Both masses sum to 1 and no gain is negative, so moving all of it gains as much as moving the
    # best part of it: what is moved at no gain is then dropped.
    plan = ot.emd(p, q, 1.0 - gain / gain.max())
    return np.where((gain > 0) & (plan > _NO_MASS), plan, 0.0)


def mutual_best(gain: Matrix, masses: str = "attribution") -> Matrix:
    """Return which entries are the largest of their row and column, as equal weights."""
    best = np.zeros_like(gain)
    if gain.any():
        for i, j in enumerate(gain.argmax(axis=1)):
            best[i, j] = gain[i, j] > 0 and gain[:, j].argmax() == i
        best /= best.sum()
    return best


def _uniform(gain: Matrix) -> tuple[Matrix, Matrix]:
    n_a, n_b = gain.shape
    return np.full(n_a, 1 / n_a), np.full(n_b, 1 / n_b)


def _attributed(gain: Matrix) -> tuple[Matrix, Matrix]:
    return gain.sum(axis=1) / gain.sum(), gain.sum(axis=0) / gain.sum()


_METHODS: Mapping[str, Callable[[Matrix, str], Matrix]] = {
    "transport": transport_plan,
    "mutual_best": mutual_best,
}
_MASSES: Mapping[str, Callable[[Matrix], tuple[Matrix, Matrix]]] = {
    "attribution": _attributed,
    "uniform": _uniform,
}


def _entries(
    attribution: PairAttribution | SpanAttribution, units: str | None
) -> tuple[Sequence[str], Sequence[str], Matrix]:
    """Return the texts of the units and the entries between them."""
    if isinstance(attribution, SpanAttribution):
        if units is not None:
            raise InputError(
                f"Expected no `units` with sums over spans, which are the units, but got {units!r}."
                " Leave it out, or give the attribution of the pair itself."
            )
        matrix = attribution.matrix[:-1, :-1].numpy()
        return attribution.span_texts_a, attribution.span_texts_b, matrix
    if units not in (None, *_UNITS):
        raise InputError(
            f"Expected `units` to be among {', '.join(_UNITS)}, but got {units!r}. For other units "
            "give sums: `align(result.sum_spans(spans_a, spans_b))`."
        )
    if units != "tokens":
        return _entries(attribution.sum_words(), None)
    rows, columns = own_places(attribution)
    return (
        [attribution.tokens_a[i] for i in rows],
        [attribution.tokens_b[j] for j in columns],
        attribution.matrix[rows][:, columns].double().numpy(),
    )
