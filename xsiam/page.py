"""One attribution as a self-contained HTML fragment, for notebooks and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import Environment

if TYPE_CHECKING:
    from xsiam.result import PairAttribution

# Autoescaping is on: tokens and texts come from users.
_TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""
<div class="xsiam" style="font-family: sans-serif; overflow-x: auto">
<p>score <b>{{ "%.4f" | format(r.score) }}</b>
= pairs {{ "%.4f" | format(pairs) }} {{ "%+.4f" | format(main_a) }}
{{ "%+.4f" | format(main_b) }} (main effects) {{ "%+.4f" | format(r.intercept) }} (intercept)
{{ "%+.1e" | format(r.residual) }} (residual);
completeness error {{ "%.1e" | format(r.completeness_error) }},
{% if r.converged %}converged{% else %}<b>not converged</b>{% endif %};
layer {{ r.layer }}, reference {{ r.reference }}</p>
<table style="border-collapse: collapse; font-size: 80%">
<tr><th></th>
{% for name in names_b %}<th style="padding: 2px 4px">{{ name }}</th>{% endfor %}
</tr>
{% for name, row in rows %}
<tr><th style="padding: 2px 4px; text-align: right">{{ name }}</th>
{% for value, colour in row %}
<td style="padding: 2px 4px; text-align: right; color: black; background: {{ colour }}">
{{- "%+.3f" | format(value) -}}</td>
{% endfor %}</tr>
{% endfor %}
</table>
<p><small>An entry belongs to the two contextualised positions that enter block {{ r.layer }},
not to the words alone.</small></p>
</div>
""")


def render_html(result: PairAttribution) -> str:
    """Return the bordered matrix with score and errors; every text in it is escaped."""
    bordered = result.bordered().tolist()
    largest = max(max(abs(value) for value in row) for row in bordered) or 1.0
    # Of the pairs: main effects of an unmodified model would pale everything else.
    limit = max(float(result.matrix.abs().max()), 1e-3 * largest)
    rows: list[tuple[str, list[Any]]] = [
        (name, [(value, _colour(value / limit)) for value in row])
        for name, row in zip([*result.tokens_a, "main effect"], bordered, strict=True)
    ]
    return _TEMPLATE.render(
        r=result,
        rows=rows,
        names_b=[*result.tokens_b, "main effect"],
        pairs=float(result.matrix.sum()),
        main_a=float(result.main_effects_a.sum()),
        main_b=float(result.main_effects_b.sum()),
    )


def _colour(share: float) -> str:
    """Return white for 0, red towards 1 and blue towards -1; more is no stronger."""
    faded = round(255 * (1 - 0.75 * min(1.0, abs(share)) ** 0.5))
    return f"rgb(255,{faded},{faded})" if share > 0 else f"rgb({faded},{faded},255)"
