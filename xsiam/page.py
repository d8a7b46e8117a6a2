"""Attributions and rankings as self-contained HTML fragments, for notebooks and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

if TYPE_CHECKING:
    from xsiam.ranking import Comparison, RankingExplanation
    from xsiam.result import PairAttribution

# Autoescaping is on: tokens and texts come from users.
_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_TEMPLATE = _ENVIRONMENT.from_string("""
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

_RANKING = _ENVIRONMENT.from_string("""
{% macro line(label, tokens, values, rest) %}
<tr><th style="text-align: left; vertical-align: top; padding: 2px 8px 2px 0; white-space: nowrap">
{{- label }}</th><td style="line-height: 1.9">
{% for t in tokens %}
<span title="{{ "%+.4f" | format(t.value) }}" style="display: inline-block; padding: 0 3px;
 margin: 1px; vertical-align: top; text-align: center; line-height: 1.3; color: black;
 background: {{ t.colour }}">{{ t.name }}
{%- if values %}<br><small>{{ "%+.3f" | format(t.value) }}</small>{% endif %}</span>
{% endfor %}
{% if rest is not none %}
<small style="white-space: nowrap">rest {{ "%+.4f" | format(rest) }}</small>
{% endif %}
</td></tr>
{% endmacro %}
<div class="xsiam" style="font-family: sans-serif; overflow-x: auto">
<p>query <b>{{ r.query }}</b>; {{ r.documents | length }} of {{ r.n_documents }} documents;
layer {{ r.settings.layer }}, reference {{ r.settings.reference }},
roles {{ r.role_query }} and {{ r.role_documents }};
completeness error {{ "%.1e" | format(r.completeness_error) }},
{% if r.converged %}converged{% else %}<b>not converged</b>{% endif %}</p>
<table style="border-collapse: collapse; font-size: 90%">
<tr>
{% for name in ("rank", "id", "score", "", "document") %}
<th style="padding: 2px 8px; text-align: left">{{ name }}</th>
{% endfor %}
</tr>
{% for d in r.documents %}
<tr style="border-top: 1px solid #ddd">
<td style="padding: 2px 8px; text-align: right">{{ d.rank }}</td>
<td style="padding: 2px 8px; text-align: right">{{ d.corpus_id }}</td>
<td style="padding: 2px 8px; text-align: right">{{ "%.4f" | format(d.score) }}</td>
<td style="padding: 2px 8px">
{%- if d.relevant %}<b>relevant</b>{% endif %}{% if d.tied %} tied{% endif %}</td>
<td style="padding: 2px 8px">{{ d.text }}</td></tr>
{% endfor %}
</table>
{% for c in comparisons %}
<details{% if loop.index <= 3 %} open{% endif %} style="margin-top: 8px">
<summary><b>{{ c.id }} {{ c.relation }} {{ c.rival }}</b>: margin
{{ "%+.4f" | format(c.margin.total) }},
residual {{ "%+.1e" | format(c.margin.residual) }}</summary>
<table style="border-collapse: collapse; font-size: 80%">
{{ line("query", c.query, true, c.margin.query_rest) }}
{{ line("document " ~ c.id, c.document, false, none) }}
{{ line("document " ~ c.rival, c.rival_tokens, false, c.margin.documents_rest) }}
</table></details>
{% endfor %}
<p><small>Red lifts the first document of a comparison, blue the second. The query's tokens with
their rest sum to the margin, and so do the tokens of both documents with theirs: two splits of one
number. A share belongs to the contextualised position that enters block {{ r.settings.layer }},
not to the word alone.</small></p>
</div>
""")

_PAGE = _ENVIRONMENT.from_string(
    """
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
</head><body>{{ body | safe }}</body></html>
""".lstrip()
)


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


def render_ranking(found: RankingExplanation) -> str:
    """Return a ranking and its comparisons; every text in it is escaped."""
    return _RANKING.render(r=found, comparisons=[_compared(c) for c in found.comparisons])


def whole_page(fragment: str, title: str) -> str:
    """Return a fragment of this module as a page of its own, which loads and runs nothing."""
    return _PAGE.render(body=fragment, title=title)


def _compared(comparison: Comparison) -> dict[str, Any]:
    margin = comparison.margin
    largest = max(float(margin.tokens_a.abs().max()), float(margin.tokens_b.abs().max()))
    return {
        "id": comparison.corpus_id,
        "rival": comparison.rival_id,
        "relation": "above" if margin.total > 0 else "below" if margin.total < 0 else "beside",
        "margin": margin,
        "query": _line(margin.names_query, margin.query_tokens.tolist()),
        "document": _line(margin.names_a, margin.tokens_a.tolist(), largest),
        "rival_tokens": _line(margin.names_b, margin.tokens_b.tolist(), largest),
    }


def _line(
    names: Sequence[str], values: Sequence[float], limit: float | None = None
) -> list[dict[str, Any]]:
    limit = max(abs(value) for value in values) if limit is None else limit
    return [
        {"name": name, "value": value, "colour": _colour(value / (limit or 1.0))}
        for name, value in zip(names, values, strict=True)
    ]


def _colour(share: float) -> str:
    """Return white for 0, red towards 1 and blue towards -1; more is no stronger."""
    faded = round(255 * (1 - 0.75 * min(1.0, abs(share)) ** 0.5))
    return f"rgb(255,{faded},{faded})" if share > 0 else f"rgb({faded},{faded},255)"
