"""Attributions and rankings as console tables, coloured."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from xsiam.result import PairAttribution

if TYPE_CHECKING:
    from xsiam.ranking import RankingExplanation

MEANING = (
    "An entry belongs to the two contextualised positions that enter block {layer}, "
    "not to the words alone."
)
_PLAIN_WIDTH = 100  # columns of a table that goes to a file or a pipe
_CELL = 6  # characters of a value: "-0.123"
_NAME = 14  # console cells of a token, at most; a Chinese character takes two


def render_attribution(result: PairAttribution, *, width: int, top: int = 5) -> RenderableType:
    """Return all there is to say of one pair, for a console ``width`` characters wide.

    Args:
        result: The attribution.
        width: Of the console; a wider matrix is cut into blocks of columns, never truncated.
        top: How many of the strongest pairs to list.
    """
    parts: list[RenderableType] = [*attribution_tables(result, width=width)]
    parts.append(summary_table(result))
    if top:
        parts.append(strongest_table(result, top))
    parts.append(Text(MEANING.format(layer=result.layer), style="italic"))
    return Group(*parts)


def attribution_tables(result: PairAttribution, *, width: int) -> Iterator[Table]:
    """Yield the bordered matrix in blocks of columns that fit the console.

    Rows are the tokens of text a, columns those of text b; the last column and row hold the main
    effects, the corner the intercept.
    """
    bordered = result.bordered().tolist()
    largest = max(abs(value) for row in bordered for value in row)
    # As in the heat maps: an intercept must not take the colour from all pairs.
    limit = max(float(result.matrix.abs().max()), 1e-3 * largest, 1e-12)
    names_a = [*result.tokens_a, "main effect"]
    names_b = [*result.tokens_b, "main effect"]
    widths = [max(_CELL, cell_len(_short(name))) + 1 for name in names_b]
    first_width = max(cell_len(_short(name)) for name in names_a) + 3
    for columns in _blocks(widths, width - first_width):
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column()
        for j in columns:
            table.add_column(Text(_short(names_b[j])), justify="right", no_wrap=True)
        for i, name in enumerate(names_a):
            cells = [_cell(bordered[i][j], limit) for j in columns]
            table.add_row(Text(_short(name), style="bold"), *cells)
        yield table


def summary_table(result: PairAttribution) -> Table:
    """Return score, its parts and the errors."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    main_a, main_b = result.main_effects_a.sum().item(), result.main_effects_b.sum().item()
    converged = "yes" if result.converged else "NO"
    rows = [
        ("score", f"{result.score:.4f} ({result.similarity})"),
        ("= sum of pairs", f"{result.matrix.sum().item():+.4f}"),
        ("+ main effects of a and b", f"{main_a:+.4f} {main_b:+.4f}"),
        ("+ intercept", f"{result.intercept:+.4f}"),
        ("+ residual", f"{result.residual:+.1e}"),
        ("completeness error", f"{result.completeness_error:.1e}"),
        ("token error (estimate)", f"{result.token_error:.1e}"),
        ("converged", f"{converged} (tolerance {result.tolerance:.0e})"),
        ("nodes", f"{result.n_nodes_a} and {result.n_nodes_b} ({result.quadrature})"),
        ("layer, reference", f"{result.layer}, {result.reference}, {_shift(result)}"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def strongest_table(result: PairAttribution, k: int) -> Table:
    """Return the ``k`` entries of largest absolute value."""
    table = Table(title="strongest pairs", title_justify="left", box=None, pad_edge=False)
    for name in ("a", "b"):
        table.add_column(name, justify="right")
    table.add_column("share of the score", justify="right")
    for pair in result.top_pairs(k):
        table.add_row(Text(pair.token_a), Text(pair.token_b), f"{pair.value:+.4f}")
    return table


def print_attribution(result: PairAttribution, *, top: int = 5) -> None:
    """Print one pair to standard output."""
    console = Console(highlight=False, markup=False)
    console.print(render_attribution(result, width=console.width, top=top))


def render_ranking(found: RankingExplanation, *, width: int) -> RenderableType:
    """Return a ranking, and which query tokens decide each comparison, for a console.

    Args:
        found: The ranking.
        width: Of the console; comparisons are cut into blocks of columns that fit it.
    """
    settings = found.settings
    state = "" if found.converged else " NOT CONVERGED."
    parts: list[RenderableType] = [Text(f"query: {found.query}"), ranking_table(found)]
    if found.comparisons:
        parts.append(
            Text(
                "\nWhat each token of the query adds to the margin (score of the first minus score "
                "of the second; positive lifts the first):"
            )
        )
        parts += margin_tables(found, width=width)
    parts.append(
        Text(
            f"{len(found.documents)} of {found.n_documents} documents; layer {settings.layer}, "
            f"reference {settings.reference}, roles {found.role_query} and "
            f"{found.role_documents}; completeness error {found.completeness_error:.1e}.{state}"
        )
    )
    parts.append(Text(MEANING.format(layer=settings.layer), style="italic"))
    return Group(*parts)


def ranking_table(found: RankingExplanation) -> Table:
    """Return the documents, best first; `=` marks equal scores, `*` relevant documents."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("rank", "id", "score"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_column("document")
    for document in found.documents:
        marks = "*" * document.relevant + "=" * document.tied
        table.add_row(
            *(str(document.rank), str(document.corpus_id), f"{document.score:.4f}"),
            *(Text(marks), Text(document.text)),
        )
    return table


def margin_tables(found: RankingExplanation, *, width: int) -> Iterator[Table]:
    """Yield what the query's tokens add to each comparison, in blocks of columns that fit."""
    margins = [comparison.margin for comparison in found.comparisons]
    columns = [[*m.query_tokens.tolist(), m.query_rest, m.residual, m.total] for m in margins]
    names = [*found.tokens, "rest", "residual", "margin"]
    limit = max(*(float(m.query_tokens.abs().max()) for m in margins), 1e-12)
    heads = [f"{c.corpus_id} - {c.rival_id}" for c in found.comparisons]
    widths = [max(_CELL, cell_len(head)) + 1 for head in heads]
    first_width = max(cell_len(_short(name)) for name in names) + 3
    for block in _blocks(widths, width - first_width):
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column()
        for j in block:
            table.add_column(heads[j], justify="right", no_wrap=True)
        for i, name in enumerate(names):
            cells = [_cell(columns[j][i], limit) for j in block]
            table.add_row(Text(_short(name), style="bold"), *cells)
        yield table


def ranking_text(found: RankingExplanation) -> str:
    """Return a ranking as plain text."""
    return _plain_text(render_ranking(found, width=_PLAIN_WIDTH), _PLAIN_WIDTH)


def rows_text(rows: Sequence[Mapping[str, object]], title: str) -> str:
    """Return a tidy table as plain text."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in rows[0]:
        numbers = all(isinstance(row[name], int | float) or row[name] is None for row in rows)
        table.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        cells = [_number(v) if isinstance(v, float) or v is None else str(v) for v in row.values()]
        table.add_row(*map(Text, cells))
    return _plain_text(table, _PLAIN_WIDTH)


def print_ranking(found: RankingExplanation) -> None:
    """Print a ranking to standard output."""
    console = Console(highlight=False, markup=False)
    console.print(render_ranking(found, width=console.width))


def evaluation_table(metrics: Mapping[str, float], layers: Sequence[int]) -> Table:
    """Return a table of flat metrics: one column a layer, and one for what concerns all pairs.

    Args:
        metrics: As in `results.json`.
        layers: The layers, in the order of the columns.
    """
    table = Table("metric")
    plain = [key for key in metrics if key.startswith("test/")]
    columns = ["all pairs"] * bool(plain) + [f"layer {layer}" for layer in layers]
    for column in columns:
        table.add_column(column, justify="right")
    for key in plain:
        table.add_row(key, _number(metrics[key]), *[""] * len(layers))
    names = [
        key.replace(f"/layer_{layers[0]}/", "/layer_*/")
        for key in metrics
        if layers and f"/layer_{layers[0]}/" in key
    ]
    for name in names:
        cells = [_number(metrics.get(name.replace("*", str(layer)))) for layer in layers]
        table.add_row(name.replace("/layer_*/", "/"), *[""] * bool(plain), *cells)
    return table


def print_evaluation(
    metrics: Mapping[str, float],
    layers: Sequence[int],
    categories: Mapping[str, Mapping[str, float]],
    lines: Sequence[str],
    title: str,
) -> None:
    """Print tables, notes and places to stdout, whatever it is."""
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    if metrics:
        console.print(evaluation_table(metrics, layers))
    if categories:
        table = Table("category")
        for column in ("pairs", "mean score", "mean label"):
            table.add_column(column, justify="right")
        for name, row in categories.items():
            means = [_number(row.get(key)) for key in ("score_mean", "label_mean")]
            table.add_row(Text(name), str(row["n_pairs"]), *means)
        console.print(table)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _plain_text(content: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(content)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _number(value: float | None) -> str:
    """Return four digits, or as many as a small number needs."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _blocks(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Cut columns into blocks that fit, at least one column each."""
    block: list[int] = []
    used = 0
    for j, width in enumerate(widths):
        if block and used + width > room:
            yield block
            block, used = [], 0
        block.append(j)
        used += width
    yield block


def _cell(value: float, limit: float) -> Text:
    """Return a value on a background that is red where it adds and blue where it takes away."""
    strength = min(1.0, abs(value) / limit) ** 0.5
    faded = round(255 * (1 - 0.75 * strength))
    colour = f"rgb(255,{faded},{faded})" if value > 0 else f"rgb({faded},{faded},255)"
    return Text(f"{value:+.3f}", style=Style(color="black", bgcolor=colour))


def _short(name: str) -> str:
    if cell_len(name) <= _NAME:
        return name
    return f"{set_cell_size(name, _NAME - 1).rstrip()}…"


def _shift(result: PairAttribution) -> str:
    return "shifted (exact model)" if result.shift else "no shift"
