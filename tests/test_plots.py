"""What a heat map shows, and that drawing leaves no global state."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from models import TEXT_A, TEXT_B, tiny_model
from rich.cells import cell_len
from rich.console import Console

from xsiam.attribution import PairAttributor
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.plots import plot_attribution, save_figure
from xsiam.report import attribution_tables, render_attribution
from xsiam.result import PairAttribution


@pytest.fixture(scope="module")
def result() -> PairAttribution:
    return PairAttributor(SiameseEncoder(tiny_model(), shift=False, reference="pad"), 2).attribute(
        TEXT_A, TEXT_B
    )


def shown(axes) -> torch.Tensor:
    return torch.tensor(axes.images[0].get_array().data)


def test_the_bordered_matrix_is_drawn(result: PairAttribution) -> None:
    figure, axes = plot_attribution(result)
    assert torch.equal(shown(axes), result.bordered())
    assert [t.get_text() for t in axes.get_yticklabels()] == [*result.tokens_a, "main effect"]
    assert [t.get_text() for t in axes.get_xticklabels()] == [*result.tokens_b, "main effect"]
    low, high = axes.images[0].get_clim()
    assert low == -high == pytest.approx(-float(result.matrix.abs().max()))
    assert f"score {result.score:.4f}" in axes.get_title()
    assert f"{result.completeness_error:.1e}" in axes.get_title()
    assert isinstance(figure, Figure)


def test_the_intercept_leaves_the_pairs_their_colours(result: PairAttribution) -> None:
    largest = float(result.matrix.abs().max())
    _, axes = plot_attribution(dataclasses.replace(result, intercept=1000 * largest))
    image = axes.images[0]
    assert image.get_clim() == pytest.approx((-largest, largest))
    assert image.colorbar.extend == "both"
    printed = max(float(text.get_text()) for text in axes.texts)
    assert printed == pytest.approx(1000 * largest, abs=0.01)
    # Pairs that are noise beside the border do not set the colours.
    noise = dataclasses.replace(result, matrix=1e-9 * result.matrix)
    border = float(noise.bordered().abs().max())
    assert plot_attribution(noise)[1].images[0].get_clim()[1] == pytest.approx(1e-3 * border)


def test_special_tokens_can_be_left_out_and_their_sum_is_named(result: PairAttribution) -> None:
    _, axes = plot_attribution(result, special_tokens=False, main_effects=False)
    assert torch.equal(shown(axes), result.matrix[1:-1, 1:-1])
    hidden = float(result.matrix.sum() - result.matrix[1:-1, 1:-1].sum())
    assert f"not shown, sum to {hidden:.4f}" in axes.get_title()


def test_what_did_not_converge_says_so(result: PairAttribution) -> None:
    assert "NOT CONVERGED" not in plot_attribution(result)[1].get_title()
    other = dataclasses.replace(result, converged=False)
    assert "NOT CONVERGED" in plot_attribution(other)[1].get_title()


def test_any_token_can_be_drawn(result: PairAttribution, tmp_path: Path) -> None:
    tokens = ("$x^2$", "猫", "🐕", "[CLS]", "_", "ﷺ")
    names = (tokens * 3)[: len(result.tokens_a)]
    odd = dataclasses.replace(result, tokens_a=names)
    path = save_figure(plot_attribution(odd)[0], tmp_path / "a" / "b.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("n", "named"), [(90, 31), (91, 31), (92, 31), (41, 21), (39, 40)])
def test_long_texts_name_some_tokens_and_the_border(
    result: PairAttribution, n: int, named: int
) -> None:
    long = dataclasses.replace(
        result,
        matrix=torch.randn(n, n),
        main_effects_a=torch.randn(n),
        main_effects_b=torch.randn(n),
        tokens_a=tuple(map(str, range(n))),
        tokens_b=tuple(map(str, range(n))),
        special_mask_a=(False,) * n,
        special_mask_b=(False,) * n,
    )
    _, axes = plot_attribution(long)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == named
    assert labels[-1] == "main effect"
    assert labels == [label.get_text() for label in axes.get_xticklabels()]
    assert shown(axes).shape == (n + 1, n + 1)


def test_a_picture_needs_a_known_suffix(result: PairAttribution, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.gif"):
        save_figure(Figure(), tmp_path / "x.gif")


def test_html_escapes_what_users_wrote(result: PairAttribution) -> None:
    names = ("<script>alert(1)</script>", *result.tokens_a[1:])
    odd = dataclasses.replace(result, tokens_a=names, converged=False)
    page = odd.to_html()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<b>not converged</b>" in page
    assert page.count("<td") == result.bordered().numel()
    assert f"{result.score:.4f}" in page
    assert result._repr_html_() == result.to_html()


def test_no_pyplot_state() -> None:
    pyplot = sys.modules.get("matplotlib.pyplot")  # TensorBoard's writer may import it
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize("width", [40, 80, 200])
def test_console_tables_hold_every_value(result: PairAttribution, width: int) -> None:
    tables = list(attribution_tables(result, width=width))
    assert sum(len(table.columns) - 1 for table in tables) == len(result.tokens_b) + 1
    assert all(table.row_count == len(result.tokens_a) + 1 for table in tables)
    console = Console(width=width, markup=False)
    with console.capture() as capture:
        console.print(render_attribution(result, width=width))
    out = capture.get()
    assert max(map(len, out.splitlines())) <= width
    for row in result.bordered().tolist():
        assert all(f"{value:+.3f}" in out for value in row)
    assert "[CLS]" in out


@pytest.mark.parametrize("width", [40, 80])
def test_tokens_of_double_width_do_not_cut_values(result: PairAttribution, width: int) -> None:
    tokens = ("中华人民共和国", "🐕🐕🐕🐕", "a")
    wide = dataclasses.replace(
        result,
        tokens_a=(tokens * 9)[: len(result.tokens_a)],
        tokens_b=(tokens * 9)[: len(result.tokens_b)],
    )
    console = Console(width=width, markup=False)
    with console.capture() as capture:
        for table in attribution_tables(wide, width=width):
            console.print(table)
    out = capture.get()
    assert max(map(cell_len, out.splitlines())) <= width
    for name, row in zip([*wide.tokens_a, "main effect"], wide.bordered().tolist(), strict=True):
        assert name in out
        assert all(f"{value:+.3f}" in out for value in row)
