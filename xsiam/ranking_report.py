"""What decides rankings over many queries: figures, and what costs relevant documents their place.

Every query is one observation: the margin between its best relevant document and the strongest of
the others, score(relevant) − score(rival), split over the query's tokens.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from xsiam.attribution import PairAttributor
from xsiam.collection import AUTO, known_ids, open_collection
from xsiam.errors import InputError
from xsiam.index import TokenVectorIndex
from xsiam.margins import ScoreParts
from xsiam.query_margins import (
    QueryMargin,
    query_margins,
    share_of_strongest,
    tokens_to_reverse,
)
from xsiam.retrieval import RETRIEVAL_FIGURES
from xsiam.token_classes import TOKEN_CLASSES

if TYPE_CHECKING:
    from xsiam.analysis.statistics import Interval

__all__ = ["RankingReport", "report_of", "report_rankings"]

TOP = (1, 2, 3, 5, 10)
"""Numbers of strongest tokens whose share is tabulated."""

SUBSETS = ("all", "first", "missed")
"""Queries of a row: all, those whose relevant document is first, those where it is not."""

_COSTLY = 50  # tokens to list

Row = Mapping[str, Any]
Estimate = Callable[[Sequence[float]], "Interval"]


@dataclass(frozen=True, eq=False)
class RankingReport:
    """Rankings of many queries, and what decides them. Tables hold plain rows, tidy.

    Rows have ``estimate``, ``low``, ``high`` and ``n``: a mean over n queries with its interval,
    which is None for fewer than 5, as the mean is for none.

    Attributes:
        queries: The queries, one by one.
        n_documents: Distinct documents that were ranked.
        n_left_out: Queries without any document that is not relevant; they have no margin.
        figures: MRR@10, nDCG@10, recall@1, recall@10.
        parts: Mean of each part of the margin by kind, and its share of Σ|parts|.
        classes: Of each class of query tokens the mean sum of contributions to the margin, its
            share of Σ|contribution| and its share of the number of tokens.
        concentration: Share of Σ|contribution| that the strongest query tokens hold, and what
            ``equal`` contributions would give.
        reversal: Query tokens whose contributions must be taken away to reverse the order, in
            number and as a share of the query's tokens (all of them where none would).
        costly_tokens: Words that speak for the rival where the relevant document is missed, those
            with the largest sum first. They are words of the queries.
        misses: Queries whose relevant document is not first, the worst margin first.
    """

    queries: tuple[QueryMargin, ...]
    n_documents: int
    n_left_out: int
    figures: tuple[Row, ...]
    parts: tuple[Row, ...]
    classes: tuple[Row, ...]
    concentration: tuple[Row, ...]
    reversal: tuple[Row, ...]
    costly_tokens: tuple[Row, ...]
    misses: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        content = {name: [dict(row) for row in getattr(self, name)] for name in _TABLES}
        return {
            "n_queries": len(self.queries),
            "n_documents": self.n_documents,
            "n_left_out": self.n_left_out,
            **content,
            "queries": [query.to_dict() for query in self.queries],
        }

    def __str__(self) -> str:
        from xsiam.report import rows_text

        missed = sum(query.missed for query in self.queries)
        lines = [
            f"{len(self.queries)} queries over {self.n_documents} documents, {missed} of them "
            "without a relevant document in first place."
        ]
        for name in _TABLES:
            rows: Sequence[Row] = getattr(self, name)
            if rows:
                lines.append(rows_text(rows[:20], name.replace("_", " ")))
        return "\n\n".join(lines)


_TABLES = ("figures", "parts", "classes", "concentration", "reversal", "costly_tokens", "misses")


def report_rankings(
    attributor_or_index: PairAttributor | TokenVectorIndex,
    queries: Sequence[str],
    documents: Sequence[str] | Sequence[int] | None = None,
    *,
    relevant: Sequence[int | Sequence[int]],
    role_query: str | None = AUTO,
    role_documents: str | None = AUTO,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> RankingReport:
    """Rank documents for many queries, and say what decides between relevant and other ones.

    Equal documents are one document, and equal queries one query with all that is relevant to
    either. A document with the query's own text is not ranked, unless it is relevant.

    Args:
        attributor_or_index: As for `xsiam.ranking.explain_ranking`.
        queries: The queries.
        documents: Texts, or ids of an index; None is all of the index.
        relevant: The id or ids of the relevant documents of each query.
        role_query: As for `explain_ranking`.
        role_documents: As for `explain_ranking`.
        confidence: Probability that the intervals are made for.
        n_resamples: Bootstrap resamples of the queries.
        seed: Of the resamples.

    Raises:
        InputError: As `explain_ranking`, or if a query has no relevant document, or none has a
            document that is not.
    """
    from xsiam.analysis.statistics import interval

    if isinstance(queries, str) or not queries:
        raise InputError(f"Expected `queries` to be a list of texts, but got {queries!r}.")
    if len(queries) != len(relevant):
        raise InputError(
            f"Expected as many entries of `relevant` as queries, but got {len(relevant)} for "
            f"{len(queries)}."
        )
    collection = open_collection(attributor_or_index, documents, role_query, role_documents)
    wanted = [known_ids(f"relevant[{i}]", ids, collection.ids) for i, ids in enumerate(relevant)]
    for text, ids in zip(queries, wanted, strict=True):
        if not ids:
            raise InputError(f"Expected a relevant document of every query, but {text!r} has none.")
    estimate = functools.partial(
        interval, n_resamples=n_resamples, confidence=confidence, seed=seed
    )
    found, n_left_out = query_margins(collection, queries, wanted)
    if not found:
        raise InputError(
            "Expected a document that is not relevant for one query or more, but there is none. "
            "Add documents."
        )
    return report_of(found, len(set(collection.texts)), n_left_out, estimate)


def report_of(
    queries: Sequence[QueryMargin], n_documents: int, n_left_out: int, estimate: Estimate
) -> RankingReport:
    """Join queries to a report; ``estimate`` gives the mean of values with its interval."""
    subsets = {
        "all": list(queries),
        "first": [q for q in queries if not q.missed],
        "missed": [q for q in queries if q.missed],
    }
    figures = [
        {"figure": name, **_summary([q.figures[i] for q in queries], estimate)}
        for i, name in enumerate(RETRIEVAL_FIGURES)
    ]
    rows: dict[str, list[Row]] = {name: [] for name in ("parts", "classes", "top", "reversal")}
    for subset, some in subsets.items():
        rows["parts"] += [{"queries": subset, **row} for row in _part_rows(some, estimate)]
        rows["classes"] += [{"queries": subset, **row} for row in _class_rows(some, estimate)]
        rows["top"] += [{"queries": subset, **row} for row in _top_rows(some, estimate)]
        rows["reversal"] += [{"queries": subset, **row} for row in _reversal_rows(some, estimate)]
    return RankingReport(
        queries=tuple(queries),
        n_documents=n_documents,
        n_left_out=n_left_out,
        figures=tuple(figures),
        parts=tuple(rows["parts"]),
        classes=tuple(rows["classes"]),
        concentration=tuple(rows["top"]),
        reversal=tuple(rows["reversal"]),
        costly_tokens=tuple(_costly(subsets["missed"])),
        misses=tuple(_misses(subsets["missed"])),
    )


# -- inside -------------------------------------------------------------------------------------


def _summary(values: Sequence[float | None], estimate: Estimate) -> dict[str, Any]:
    """Return the columns of an estimate; undefined values are left out, ``n`` says how many stay.

    An interval is not given of fewer observations than `interval` takes.
    """
    from xsiam.analysis.statistics import SMALLEST_SAMPLE

    defined = [value for value in values if value is not None]
    n = len(defined)
    if n >= SMALLEST_SAMPLE:
        return dict(estimate(defined).row())
    return {"estimate": sum(defined) / n if n else None, "low": None, "high": None, "n": n}


def _part_rows(queries: Sequence[QueryMargin], estimate: Estimate) -> list[Row]:
    rows: list[Row] = []
    parts = [q.parts for q in queries]
    wholes = [sum(map(abs, p)) for p in parts]
    for i, name in enumerate(ScoreParts._fields):
        shares = [abs(p[i]) / w if w else None for p, w in zip(parts, wholes, strict=True)]
        values: dict[str, Sequence[float | None]] = {
            "contribution": [p[i] for p in parts],
            "share": shares,
        }
        rows += [
            {"part": name, "quantity": quantity, **_summary(some, estimate)}
            for quantity, some in values.items()
        ]
    totals = {"residual": [q.margin.residual for q in queries]}
    totals["margin"] = [q.margin.total for q in queries]
    return rows + [
        {"part": name, "quantity": "contribution", **_summary(some, estimate)}
        for name, some in totals.items()
    ]


def _class_rows(queries: Sequence[QueryMargin], estimate: Estimate) -> list[Row]:
    sums = [q.by_class(q.margin.query_tokens) for q in queries]
    shares = [q.class_shares() for q in queries]
    counts = [q.by_class(torch.full((len(q.classes),), 1 / len(q.classes))) for q in queries]
    rows: list[Row] = []
    for name in TOKEN_CLASSES:
        values: dict[str, Sequence[float | None]] = {
            "contribution": [s[name] for s in sums],
            "share": [None if s is None else s[name] for s in shares],
            "share_of_tokens": [c[name] for c in counts],
        }
        rows += [
            {"token_class": name, "quantity": quantity, **_summary(some, estimate)}
            for quantity, some in values.items()
        ]
    return rows


def _top_rows(queries: Sequence[QueryMargin], estimate: Estimate) -> list[Row]:
    sizes = [len(q.classes) for q in queries]
    return [
        {
            "top": k,
            **_summary([share_of_strongest(q.margin.query_tokens, k) for q in queries], estimate),
            "equal": sum(min(k, s) / s for s in sizes) / len(sizes) if sizes else None,
        }
        for k in TOP
    ]


def _reversal_rows(queries: Sequence[QueryMargin], estimate: Estimate) -> list[Row]:
    needed = [tokens_to_reverse(q.margin.query_tokens, q.margin.total) for q in queries]
    never = sum(count is None for count in needed)
    counts = [
        float(len(q.classes) if count is None else count)
        for q, count in zip(queries, needed, strict=True)
    ]
    shares = [count / len(q.classes) for q, count in zip(queries, counts, strict=True)]
    return [
        {"quantity": name, **_summary(values, estimate), "n_never_reversed": never}
        for name, values in (("tokens", counts), ("share_of_tokens", shares))
    ]


def _costly(missed: Sequence[QueryMargin]) -> list[Row]:
    costs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for query in missed:
        mine: dict[tuple[str, str], float] = defaultdict(float)
        values = query.margin.query_tokens.tolist()
        for word, name, value in zip(query.words, query.classes, values, strict=True):
            mine[word.casefold(), name] += value
        for key, value in mine.items():
            if value < 0:
                costs[key].append(value)
    rows: list[Row] = [
        {"word": word, "token_class": name, "n_queries": len(v), "sum": sum(v), "worst": min(v)}
        for (word, name), v in costs.items()
    ]
    return sorted(rows, key=lambda row: (row["sum"], row["word"]))[:_COSTLY]


def _misses(missed: Sequence[QueryMargin]) -> list[Row]:
    rows: list[Row] = []
    for query in sorted(missed, key=lambda q: q.margin.total):
        values = query.margin.query_tokens
        worst = int(values.argmin())
        rows.append(
            {
                **{name: getattr(query, name) for name in ("query", "place", "relevant_id")},
                **{name: getattr(query, name) for name in ("rival_id", "relevant_text")},
                "rival_text": query.rival_text,
                "margin": query.margin.total,
                "costliest_word": query.words[worst],
                "token_class": query.classes[worst],
                "contribution": float(values[worst]),
                "tokens_to_reverse": tokens_to_reverse(values, query.margin.total),
            }
        )
    return rows
