"""Heat maps of attributions, drawn without any global state of pyplot."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from xsiam.errors import InputError
from xsiam.result import PairAttribution

MAIN_EFFECT = "main effect"
_PRINTED_UP_TO = 24  # cells a side, up to which values are printed inside
_LABELLED_UP_TO = 40  # tokens a side, up to which every one is named
_SUFFIXES = (".png", ".svg", ".pdf")


def plot_attribution(
    result: PairAttribution,
    *,
    ax: Axes | None = None,
    main_effects: bool = True,
    special_tokens: bool = True,
) -> tuple[Figure, Axes]:
    """Draw the attribution matrix, bordered by main effects and intercept.

    Colours are symmetric about zero: red adds to the score, blue takes away. Their range is that of
    the pairs; main effects and an intercept beyond it have the darkest colour, and the colour bar
    ends in arrows. (The intercept of an unshifted model would leave its pairs without any colour.)

    Args:
        result: The attribution.
        ax: Where to draw; None makes a figure.
        main_effects: Whether to draw the border (last row and column, intercept in the corner).
        special_tokens: Whether to draw tokens that the tokenizer added; their sum is named if not.

    Returns:
        The figure and the axes; nothing is shown.
    """
    rows = [i for i, s in enumerate(result.special_mask_a) if special_tokens or not s]
    columns = [j for j, s in enumerate(result.special_mask_b) if special_tokens or not s]
    shown = result.matrix[rows][:, columns]
    hidden = float(result.matrix.sum() - shown.sum())
    largest_pair = float(shown.abs().max()) if shown.numel() else 0.0
    names_a = [_printable(result.tokens_a[i]) for i in rows]
    names_b = [_printable(result.tokens_b[j]) for j in columns]
    if main_effects:
        shown = _with_border(result, shown, rows, columns)
        names_a, names_b = [*names_a, MAIN_EFFECT], [*names_b, MAIN_EFFECT]
    figure, axes = _canvas(ax, len(names_a), len(names_b))
    largest = float(shown.abs().max()) if shown.numel() else 0.0
    limit = colour_limit(largest_pair, largest)
    norm = TwoSlopeNorm(vcenter=0.0, vmin=-limit, vmax=limit)
    image = axes.imshow(shown.numpy(), cmap="RdBu_r", norm=norm, aspect="auto")
    extend = "both" if largest > limit else "neither"
    figure.colorbar(image, ax=axes, label="share of the score", extend=extend)
    _name_ticks(axes, names_a, names_b)
    axes.set_ylabel("text a")
    axes.set_xlabel("text b")
    if max(shown.shape) <= _PRINTED_UP_TO:
        _print_values(axes, shown, limit)
    if main_effects:
        axes.axhline(len(rows) - 0.5, color="black", linewidth=1.5)
        axes.axvline(len(columns) - 0.5, color="black", linewidth=1.5)
    axes.set_title(_title(result, None if special_tokens else hidden), fontsize=9)
    _lay_out(figure)
    return figure, axes


def colour_limit(largest_pair: float, largest: float) -> float:
    """Return the value of the darkest colour: that of the pairs, unless they are next to nothing.

    Args:
        largest_pair: Largest absolute entry of the matrix.
        largest: The same with main effects and intercept.
    """
    return max(largest_pair, 1e-3 * largest, 1e-12)


def check_picture(path: str | Path) -> Path:
    """Return the path of a picture that can be written.

    Raises:
        InputError: If the suffix is not one of .png, .svg and .pdf.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"Expected a picture with a suffix among {list(_SUFFIXES)}, but got {str(path)!r}."
        )
    return path


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a file and return its path.

    Raises:
        InputError: If the suffix is not one of .png, .svg and .pdf.
    """
    path = check_picture(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        _ignore_missing_glyphs()
        figure.savefig(path, dpi=130)
    return path


def _with_border(
    result: PairAttribution, matrix: Tensor, rows: list[int], columns: list[int]
) -> Tensor:
    corner = matrix.new_tensor([result.intercept])
    right = torch.cat([result.main_effects_a[rows], corner])
    top = torch.cat([matrix, result.main_effects_b[columns][None]])
    return torch.cat([top, right[:, None]], dim=1)


def _canvas(ax: Axes | None, n_rows: int, n_columns: int) -> tuple[Figure, Axes]:
    if ax is not None:
        figure = ax.get_figure(root=True)
        assert figure is not None
        return figure, ax
    width, height = (min(18.0, max(4.5, 0.5 * n + 2.5)) for n in (n_columns, n_rows))
    figure = Figure(figsize=(width, min(height, 0.9 * width + 2)))
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _name_ticks(axes: Axes, names_a: list[str], names_b: list[str]) -> None:
    """Name the tokens; of very long texts only every n-th, and the last."""
    rows, columns = _named(len(names_a)), _named(len(names_b))
    axes.set_yticks(rows, [names_a[i] for i in rows], fontsize=8)
    axes.set_xticks(columns, [names_b[j] for j in columns], fontsize=8, rotation=45, ha="right")


def _named(n: int) -> list[int]:
    """Return the positions to name: evenly spaced, with the last, which is the border's."""
    step = -(-n // _LABELLED_UP_TO)
    return [*range(0, n - step, step), n - 1] if n else []


def _print_values(axes: Axes, matrix: Tensor, limit: float) -> None:
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(
                j,
                i,
                f"{value:.2f}".replace("-0.00", "0.00"),
                ha="center",
                va="center",
                fontsize=6,
                color=colour,
            )


def _title(result: PairAttribution, hidden: float | None) -> str:
    state = "" if result.converged else "  NOT CONVERGED"
    lines = [
        f"layer {result.layer}, reference {result.reference}: score {result.score:.4f}, "
        f"pairs sum to {float(result.matrix.sum()):.4f}",
        f"completeness error {result.completeness_error:.1e}, "
        f"residual {result.residual:.1e}{state}",
    ]
    if hidden is not None:
        lines.append(f"pairs with special tokens, not shown, sum to {hidden:.4f}")
    return "\n".join(lines)


def _printable(token: str) -> str:
    """Escape what matplotlib would read as mathematics."""
    return token.replace("$", r"\$")


def _lay_out(figure: Figure) -> None:
    with warnings.catch_warnings():
        _ignore_missing_glyphs()
        figure.tight_layout()


def _ignore_missing_glyphs() -> None:
    # A token in a script that the font lacks is drawn as a box; the picture is right all the same.
    warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)


def curves_figure(
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Draw curves with intervals.

    Args:
        lines: Points (x, estimate, low, high) by name, in the order of x.
        x_label: Name of x, with its unit.
        y_label: Name of the estimates.
        log_x: Whether x is on a logarithmic scale.
        log_y: Whether the estimates are.
    """
    figure, axes = new_figure((7.0, 4.5))
    for name, points in lines.items():
        x, y, low, high = zip(*points, strict=True)
        (line,) = axes.plot(x, y, marker=".", label=name)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def intervals_figure(
    bars: Mapping[str, tuple[float, float, float]], x_label: str, *, at: float | None = 0.0
) -> Figure:
    """Draw named estimates with intervals, from top to bottom.

    Args:
        bars: (estimate, low, high) by name.
        x_label: What is estimated, with its unit.
        at: Where to draw a line for comparison; None draws none.
    """
    figure, axes = new_figure((7.0, 0.9 + 0.32 * len(bars)))
    for place, (estimate, low, high) in enumerate(bars.values()):
        axes.plot([low, high], [place, place], color="tab:blue")
        axes.plot([estimate], [place], "o", color="tab:blue", markersize=4)
    if at is not None:
        axes.axvline(at, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [_printable(name) for name in bars])
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3, axis="x")
    return figure


def grid_figure(
    values: Mapping[tuple[str, str], float | None], label: str, *, centre: float = 0.0
) -> Figure:
    """Draw named values on a grid, red above the centre and blue below; None is left white.

    Args:
        values: By names of row and column, both in the order in which they first appear.
        label: What the values are, with their unit.
        centre: The value that has no colour.
    """
    rows = list(dict.fromkeys(row for row, _ in values))
    columns = list(dict.fromkeys(column for _, column in values))
    grid = torch.full((len(rows), len(columns)), torch.nan)
    for (row, column), value in values.items():
        if value is not None:
            grid[rows.index(row), columns.index(column)] = value
    limit = max(float((grid - centre).abs().nan_to_num().max()), 1e-12)
    figure, axes = new_figure((2.5 + 0.62 * len(columns), 1.6 + 0.42 * len(rows)))
    norm = TwoSlopeNorm(vcenter=centre, vmin=centre - limit, vmax=centre + limit)
    image = axes.imshow(grid.numpy(), cmap="RdBu_r", norm=norm, aspect="auto")
    figure.colorbar(image, ax=axes, label=label)
    _name_ticks(axes, [_printable(name) for name in rows], [_printable(name) for name in columns])
    for i, j in (grid == grid).nonzero().tolist():
        value = float(grid[i, j])
        dark = abs(value - centre) > 0.6 * limit
        text = f"{value:.2f}".replace("-0.00", "0.00")
        colour = "white" if dark else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    return figure


def new_figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return a figure of one set of axes that no global state knows of; size in inches."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
