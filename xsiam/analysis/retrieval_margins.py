"""What decides rankings: the first texts of pairs as queries, the second texts as documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

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
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Finding, Interval, judge
from xsiam.collection import Collection
from xsiam.query_margins import QueryMargin, query_margins, tokens_to_reverse
from xsiam.ranking_report import RankingReport, report_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RELEVANT = 0.6
"""Label from which on a pair's second text is relevant for its first; STS calls 3 of 5 "roughly
equivalent"."""

FEW = 0.25
"""A few tokens: a quarter of a query's, two of the eight of a short one."""

_TABLES = ("parts", "classes", "concentration", "reversal")
_CAPTION = "mean over queries with its interval; of relevant minus strongest other document, "


@register_analysis
class RetrievalMargins(AbstractAnalysis):
    """Margins between each query's relevant document and the strongest other one.

    Queries are the distinct first texts of the sampled pairs; each ranks all distinct second texts
    but its own text. Relevant is its own partner, where the pairs have labels one of `RELEVANT` or
    more. Other second texts can be as fitting without anybody having said so: figures are lower
    than on a collection that was judged.
    """

    name = "retrieval"
    question = "Which query tokens decide whether the relevant document is ranked first?"
    source = "ours"
    needs = Needs(min_pairs=SMALLEST_SAMPLE)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for the sampled pairs at every layer."""
        return context.pair_requests()

    def run(self, context: Context) -> AnalysisResult:
        """Rank at every layer; the figures are those of the model and depend on none."""
        kept = relevant_pairs(context.pairs.labels, len(context.pairs))
        queries = [context.pairs.texts_a[i] for i in kept]
        if len(set(queries)) < SMALLEST_SAMPLE:
            raise NotApplicableError(
                f"it needs {SMALLEST_SAMPLE} queries with a relevant document or more, but there "
                f"are n = {len(set(queries))}"
            )
        texts = tuple(dict.fromkeys(context.pairs.texts_b))
        number = {text: i for i, text in enumerate(texts)}
        relevant = [[number[context.pairs.texts_b[i]]] for i in kept]
        rows: dict[str, list[dict[str, Any]]] = {
            name: [] for name in (*_TABLES, "costly_tokens", "misses")
        }
        findings: list[Finding] = []
        metrics: dict[str, float] = {}
        report: RankingReport | None = None
        for layer in context.layers:
            collection = _collection(context, layer, texts)
            found, left_out = query_margins(collection, queries, relevant)
            if len(found) < SMALLEST_SAMPLE:
                raise NotApplicableError(
                    f"it needs {SMALLEST_SAMPLE} queries that rank another document, but there are "
                    f"n = {len(found)}"
                )
            report = report_of(found, len(texts), left_out, context.interval)
            for name, table in rows.items():
                table += [{"layer": layer, **row} for row in getattr(report, name)]
            findings += _findings(found, layer, context)
            share = next(
                row["estimate"]
                for row in report.reversal
                if (row["queries"], row["quantity"]) == ("all", "share_of_tokens")
            )
            metrics[f"layer_{layer}/share_of_tokens_to_reverse"] = share
        assert report is not None
        metrics |= {row["figure"]: row["estimate"] for row in report.figures}
        notes = _notes(context, report, len(kept))
        return AnalysisResult(_tables(report, rows), metrics, findings, notes)

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw the concentration over the strongest tokens, and the share of each class."""
        from xsiam.plots import curves_figure, intervals_figure

        # An interval is missing where next to no query has a contribution other than zero.
        rows = [
            row
            for row in result.tables["concentration"].rows
            if row["queries"] == "all" and row["low"] is not None
        ]
        lines: dict[str, Sequence[tuple[float, float, float, float]]] = {
            f"layer {layer}": [
                (r["top"], r["estimate"], r["low"], r["high"]) for r in rows if r["layer"] == layer
            ]
            for layer in dict.fromkeys(r["layer"] for r in rows)
        }
        lines["equal contributions"] = [
            (r["top"], *[r["equal"]] * 3) for r in rows if r["layer"] == rows[0]["layer"]
        ]
        bars = {
            f"layer {r['layer']}, {r['token_class']}, {r['quantity'].replace('_', ' ')}": (
                *(r["estimate"], r["low"], r["high"]),
            )
            for r in result.tables["classes_of_all"].rows
            if r["quantity"] != "contribution" and r["low"] is not None
        }
        return {
            "concentration": curves_figure(
                lines, "strongest query tokens", "share of absolute contributions to the margin"
            ),
            "classes": intervals_figure(bars, "share of a query's margin and of its tokens"),
        }


def relevant_pairs(labels: Sequence[float] | None, n: int) -> list[int]:
    """Return the pairs whose second text is relevant for the first; without labels all."""
    return [i for i in range(n) if labels is None or labels[i] >= RELEVANT]


def _collection(context: Context, layer: int, texts: tuple[str, ...]) -> Collection:
    """Return the second texts of the pairs, read from the vectors that were requested."""
    role_a, role_b = context.roles
    settings = context.attributor(MODEL, layer).settings
    vectors = context.token_vectors(MODEL, layer, texts, role_b)
    return Collection(
        ids=tuple(range(len(texts))),
        texts=texts,
        units=torch.stack([text.embedding / text.norm for text in vectors]),
        read_queries=lambda some: list(context.token_vectors(MODEL, layer, some, role_a)),
        read_documents=lambda places: context.token_vectors(
            MODEL, layer, [texts[i] for i in places], role_b
        ),
        role_query=role_a,
        role_documents=role_b,
        settings=lambda: settings,
    )


def _findings(queries: Sequence[QueryMargin], layer: int, context: Context) -> list[Finding]:
    """Hold margins against claims that were stated before."""
    needed = [tokens_to_reverse(q.margin.query_tokens, q.margin.total) for q in queries]
    shares = [
        1.0 if count is None else count / len(q.classes)
        for q, count in zip(queries, needed, strict=True)
    ]
    findings = [
        judge(
            "A few query tokens decide whether the relevant document or its rival is first",
            f"share of the query's tokens to take away to reverse the order, layer {layer}",
            context.interval(shares),
            source="ours",
            below=FEW,
        )
    ]
    claims = (
        ("special", "Special tokens of the query decide less than their number", {"below": 0.0}),
        (
            "content",
            "Words that are rare among the documents decide more than their number",
            {"above": 0.0},
        ),
    )
    for name, claim, side in claims:
        excess = _excess(queries, name, context)
        if excess is not None:
            quantity = f"share of the margin less the share of tokens of {name}, layer {layer}"
            findings.append(judge(claim, quantity, excess, source="ours", **side))
    return findings


def _excess(queries: Sequence[QueryMargin], name: str, context: Context) -> Interval | None:
    """Return by how much a class's share of contributions exceeds that of its tokens.

    Over the queries that have tokens of that class, and of another; None for too few of them.
    """
    values = []
    for query in queries:
        shares, count = query.class_shares(), query.classes.count(name)
        if shares is not None and 0 < count < len(query.classes):
            values.append(shares[name] - count / len(query.classes))
    return context.interval(values) if len(values) >= SMALLEST_SAMPLE else None


def _tables(
    report: RankingReport, rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, ResultTable]:
    """Return the tables: figures of any layer's report, and the rows of all layers."""
    occurring = {name for query in report.queries for name in query.classes}
    return {
        "figures": ResultTable(
            report.figures,
            "retrieval figures, mean over queries; ties count against the model",
            shown=True,
        ),
        "parts": ResultTable(
            rows["parts"],
            _CAPTION + "the parts of the margin by kind (score units) and their share of the "
            "sum of absolute parts",
        ),
        "classes": ResultTable(
            rows["classes"],
            _CAPTION + "what classes of query tokens contribute (score units), their share of "
            "the sum of absolute contributions, and of the tokens; words in 10 % of the "
            "documents or more are `frequent`",
        ),
        "classes_of_all": ResultTable(
            [
                row
                for row in rows["classes"]
                if row["queries"] == "all" and row["token_class"] in occurring
            ],
            "as `classes`, of all queries, without classes that no query has",
            shown=True,
        ),
        "concentration": ResultTable(
            rows["concentration"],
            _CAPTION + "share of absolute contributions that the strongest query tokens hold; "
            "`equal` is that of equal contributions",
        ),
        "reversal": ResultTable(
            [row for row in rows["reversal"] if row["n"]],
            _CAPTION + "query tokens whose contributions must be taken away to reverse the "
            "order; where none would, all are counted",
            shown=True,
        ),
        "costly_tokens": ResultTable(
            rows["costly_tokens"],
            "words of the queries that speak for the rival where the relevant document is "
            "missed: sum over queries, and the worst, in score units",
        ),
        "misses": ResultTable(
            rows["misses"], "queries whose relevant document is not first, the worst first"
        ),
    }


def _notes(context: Context, report: RankingReport, n_pairs: int) -> list[str]:
    notes = [
        f"{len(report.queries)} queries rank {report.n_documents} documents; the relevant one is "
        f"not first for {sum(q.missed for q in report.queries)}. Documents that fit a query "
        "without being its partner count as wrong."
    ]
    if context.pairs.labels is not None:
        left = len(context.pairs) - n_pairs
        notes.append(
            f"{left} of {len(context.pairs)} pairs have a label below {RELEVANT}: no query."
        )
    if report.n_left_out:
        notes.append(f"{report.n_left_out} queries rank no other document and are left out.")
    return notes
