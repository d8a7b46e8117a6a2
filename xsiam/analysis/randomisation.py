"""Do attributions follow the weights? They must change when weights are made random."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xsiam.analysis.base import (
    MODEL,
    AbstractAnalysis,
    AnalysisResult,
    Needs,
    NotApplicableError,
    ResultTable,
    VectorRequest,
    register_analysis,
)
from xsiam.analysis.context import Context
from xsiam.analysis.matrices import centred, correlation, own_entries
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Interval, judge
from xsiam.attribution import PairAttributor
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning
from xsiam.result import PairAttribution, own_places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENTRIES = ("all", "double-centred", "different tokens")
"""Which entries of two matrices are correlated: those of all pairs of own tokens, the same without
main effects, or those of two different tokens (equal ones have alike states by any weights)."""

MOST_DEPTHS = 6
"""Depths of randomisation among the blocks; a deeper model is randomised in larger steps."""

_FOLLOWS = 0.3  # a rank correlation that is usually called weak: less than a tenth of the variance
_MAX_NODES = 512  # random weights may be hard to integrate, and ranks do not need it


def cascade(encoder: SiameseEncoder, seed: int) -> Iterator[tuple[int, SiameseEncoder]]:
    """Yield a copy of an encoder with more and more weights random, from the top block down.

    The values of every weight tensor are shuffled within it: sizes, and how values are
    distributed, stay what training made them. The reference stays as well. The last copy has all
    weights random, those of the embedding module and of modules behind the pooling too.

    Args:
        encoder: The model, which is not changed.
        seed: Of the shuffling.

    Yields:
        The number of blocks whose weights are random, or one more where all weights are, and the
        copy, which changes when the next is asked for.
    """
    copied = copy.deepcopy(encoder)
    copied.eval()
    generator = torch.Generator().manual_seed(seed)
    blocks = list(reversed(copied.split.blocks))
    done: set[int] = set()
    steps = depths(len(blocks))
    for before, depth in zip([0, *steps], steps, strict=False):
        for block in blocks[before:depth]:
            _shuffle(block, generator, done)
        yield depth, copied
    _shuffle(copied.model, generator, done)
    yield len(blocks) + 1, copied


def depths(n_blocks: int) -> list[int]:
    """Return the numbers of blocks that are randomised one after the other, all of them last."""
    n = min(MOST_DEPTHS, n_blocks)
    return [math.ceil(n_blocks * step / n) for step in range(1, n + 1)]


def similarities(one: PairAttribution, other: PairAttribution) -> dict[str, float]:
    """Return Spearman's correlation of two matrices of a pair, by `ENTRIES`, nan if undefined."""
    a, b = own_entries(one), own_entries(other)
    rows, columns = own_places(one)
    differ = torch.tensor(
        [[one.tokens_a[i] != one.tokens_b[j] for j in columns] for i in rows], dtype=torch.bool
    ).reshape(a.shape)
    pairs: tuple[tuple[Tensor, Tensor], ...] = (
        (a, b),
        (centred(a), centred(b)),
        (a[differ], b[differ]),
    )
    return {name: correlation(*pair) for name, pair in zip(ENTRIES, pairs, strict=True)}


@register_analysis
class Randomisation(AbstractAnalysis):
    """Rank correlation of matrices with those of models whose weights are random (PROTOCOLS 9).

    At the highest layer, on `analysis.n_costly_pairs` pairs: the model-randomisation test, in its
    cascading form.

    References:
        Adebayo et al., "Sanity Checks for Saliency Maps" (NeurIPS 2018), section 3.
    """

    name = "randomisation"
    question = "Do attributions change when the weights of the model are made random?"
    source = "ours"
    needs = Needs(min_pairs=SMALLEST_SAMPLE)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for the costly pairs at the highest layer."""
        some = context.costly_pairs()
        return context.requests((MODEL,), some.texts_a, some.texts_b, context.layers[:1])

    def run(self, context: Context) -> AnalysisResult:
        """Attribute the pairs by every random model, and compare."""
        layer = context.layers[0]
        some = context.costly_pairs()
        results = [
            result
            for result in context.attributions(MODEL, layer, some.texts_a, some.texts_b)
            if min(map(len, own_places(result))) > 0
        ]
        encoder = context.attributor(MODEL, layer).encoder
        fingerprint = encoder.model_fingerprint
        final: Interval | int = 0
        rows: list[dict[str, Any]] = []
        notes, metrics = _left_out(len(some) - len(results)), {}
        for depth, random in cascade(encoder, context.settings.seed):
            name = _called(depth, len(encoder.split.blocks))
            others, missed = _attributed(context, random, layer, results)
            values = [similarities(*pair) for pair in zip(results, others, strict=True)]
            found = {entries: _interval(context, values, entries) for entries in ENTRIES}
            where = {"layer": layer, "depth": depth, "random": name}
            rows += [{**where, "entries": entries, **_row(found[entries])} for entries in ENTRIES]
            final = found[ENTRIES[0]]
            if isinstance(final, int):
                raise NotApplicableError(
                    f"the correlation of two matrices is defined for n = {final} of {len(values)} "
                    f"pairs, and an interval needs {SMALLEST_SAMPLE}"
                )
            metrics[f"layer_{layer}/depth_{depth}"] = final.estimate
            if missed:
                notes.append(
                    f"{missed} of {2 * len(others)} texts did not meet the tolerance with random "
                    f"weights ({name}); their best token vectors are compared."
                )
        if encoder.model_fingerprint != fingerprint:
            raise RuntimeError("Expected the model to stay as it is, but its weights have changed.")
        assert isinstance(final, Interval)
        finding = judge(
            "Attributions follow the weights: their order does not survive random ones",
            f"Spearman's correlation of entries with those of all weights shuffled, layer {layer}",
            final,
            source="ours",
            below=_FOLLOWS,
        )
        return AnalysisResult(
            tables={
                "correlations": ResultTable(
                    rows,
                    "Spearman's correlation within a text pair between the matrix of the model and "
                    "of a copy whose weights are shuffled from the top block down, mean over text "
                    "pairs; n of them where it is defined",
                    shown=True,
                )
            },
            metrics={**metrics, f"layer_{layer}/all_weights": final.estimate},
            findings=[finding],
            notes=notes,
        )

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw correlations against the depth of randomisation."""
        from xsiam.plots import curves_figure

        lines = {
            entries: [
                (row["depth"], row["estimate"], row["low"], row["high"])
                for row in result.tables["correlations"].rows
                if row["entries"] == entries and row["estimate"] is not None
            ]
            for entries in ENTRIES
        }
        label = "blocks with random weights, from the top; last: all weights"
        return {"correlations": curves_figure(lines, label, "correlation with the model's")}


def _shuffle(module: nn.Module, generator: torch.Generator, done: set[int]) -> None:
    """Shuffle the values of each weight of a module, but for those that are done."""
    with torch.no_grad():
        for parameter in module.parameters():
            if id(parameter) not in done and parameter.is_floating_point():
                order = torch.randperm(parameter.numel(), generator=generator)
                flat = parameter.flatten()[order.to(parameter.device)]
                parameter.copy_(flat.view_as(parameter))
                done.add(id(parameter))


def _attributed(
    context: Context, encoder: SiameseEncoder, layer: int, results: Sequence[PairAttribution]
) -> tuple[list[PairAttribution], int]:
    """Attribute the same pairs by another model; return also how many texts did not converge."""
    settings = dict(context.attributor_settings)
    settings["max_nodes"] = min(settings.get("max_nodes", _MAX_NODES), _MAX_NODES)
    attributor = PairAttributor(encoder, layer, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
        found = attributor.attribute(
            [r.text_a for r in results], [r.text_b for r in results], *context.roles
        )
    return found, sum((not r.converged_a) + (not r.converged_b) for r in found)


def _interval(
    context: Context, values: Sequence[Mapping[str, float]], entries: str
) -> Interval | int:
    """Return the interval over pairs where it is defined; how many they are where too few."""
    defined = [v[entries] for v in values if not math.isnan(v[entries])]
    return len(defined) if len(defined) < SMALLEST_SAMPLE else context.interval(defined)


def _row(found: Interval | int) -> dict[str, float | int | None]:
    """Return the columns of a table; an estimate of too few pairs is None."""
    if isinstance(found, int):
        return {"estimate": None, "low": None, "high": None, "n": found}
    return dict(found.row())


def _called(depth: int, n_blocks: int) -> str:
    if depth > n_blocks:
        return "all weights"
    return "top block" if depth == 1 else f"top {depth} blocks"


def _left_out(n: int) -> list[str]:
    return [f"{n} pairs with a text without tokens of its own were left out."] if n else []
