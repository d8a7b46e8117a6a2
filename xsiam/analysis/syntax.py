"""Attribution by parts of speech and by dependency relations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from xsiam.analysis.base import (
    MODEL,
    AbstractAnalysis,
    AnalysisResult,
    Needs,
    ResultTable,
    VectorRequest,
    register_analysis,
)
from xsiam.analysis.classes import (
    ClassSums,
    difference_of_means,
    enrichment,
    sums_by_label,
)
from xsiam.analysis.context import Context
from xsiam.analysis.statistics import SMALLEST_SAMPLE, Finding, Interval, judge, ratio_of_sums
from xsiam.analysis.words import WordPairs, fit_notes, language_notes, word_pairs_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTENT = ("noun", "verb")
ROLES = {
    "nsubj": "subject",
    "nsubjpass": "subject",  # spaCy's English labels
    "nsubj:pass": "subject",  # Universal Dependencies
    "dobj": "object",
    "dative": "object",
    "obj": "object",
    "iobj": "object",
    "root": "root",
}
"""Core roles by dependency relation."""

_GROUPS = {"core": ("subject", "object", "root"), "arguments": ("subject", "object")}
_WORDS = ("all", "different lemmas")
_OTHER = "other"
_N_RELATIONS = 12  # the most frequent ones: 78 classes, and 13 with all others
_N_SHOWN = 8  # classes a layer in the summary

# "Nouns and verbs carry most": more than half of what falls on words; and, as they are many words,
# more than in proportion to their number.
_MOST, _PROPORTIONAL = 0.5, 1.0


@dataclass
class _Collected:
    """What is found, layer by layer."""

    context: Context
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, table: str, **row: Any) -> None:
        self.rows.setdefault(table, []).append(row)

    def judge(self, layer: int, key: str, finding: Finding) -> None:
        self.findings.append(finding)
        self.metrics[f"layer_{layer}/{key}"] = finding.interval.estimate


@register_analysis
class Syntax(AbstractAnalysis):
    """Attribution by parts of speech and by syntactic roles (PROTOCOLS P2-4; P1).

    Of each class of word pairs: its share of the attribution on word pairs, its share of their
    absolute value, and its enrichment, which is the share by its share of the word pairs, or the
    mean entry of the class by the mean entry of all. They are ratios of sums over text pairs, which
    are what is resampled. Special tokens and prompt belong to no word; they have a table of their
    own.

    Roles match where both words are subjects, both objects or both roots, and are mixed where they
    are different ones of these. Texts that say the same share words, and those have the same roles:
    the comparison is made again without pairs of one lemma, and without roots, so that nouns are
    compared with nouns.
    """

    name = "syntax"
    question = "Which parts of speech and which syntactic roles carry the scores?"
    source = "P1, P2"
    needs = Needs(parser=True, min_pairs=SMALLEST_SAMPLE)

    def requests(self, context: Context) -> Iterable[VectorRequest]:
        """Ask for the sampled pairs at every layer."""
        return context.pair_requests()

    def run(self, context: Context) -> AnalysisResult:
        """Sum entries over tags, relations and roles at every layer."""
        found = _Collected(context, notes=language_notes(context))
        for layer in context.layers:
            pairs = word_pairs_of(context, MODEL, layer)
            if layer == context.layers[0]:  # words and tokens are those of every layer
                found.notes += fit_notes([pair.sums for pair in pairs], "are in no figure here")
            _classes_of_layer(found, layer, pairs)
            _roles_of_layer(found, layer, pairs)
            for part, values in _parts(pairs).items():
                found.add("rest", layer=layer, part=part, **context.interval(values).row())
        if not context.encoder.shift:
            found.notes.append(
                "The model has no reference shift: pairs alone do not sum to its scores; `rest` "
                "has the main effects and the intercept."
            )
        return AnalysisResult(_tables(found.rows), found.metrics, found.findings, found.notes)

    def plot(self, result: AnalysisResult) -> Mapping[str, Figure]:
        """Draw enrichment by pair of tags at each layer, and the mean entry of pairs of roles."""
        from xsiam.plots import grid_figure, intervals_figure

        figures = {}
        rows = result.tables["tags"].rows
        for layer in dict.fromkeys(r["layer"] for r in rows):
            values: dict[tuple[str, str], float | None] = {}
            for row in (r for r in rows if r["layer"] == layer):
                value = None if row["enrichment_low"] is None else row["enrichment"]  # too rare
                values[row["one"], row["other"]] = values[row["other"], row["one"]] = value
            title = f"mean entry by that of all word pairs, layer {layer}"
            figures[f"tags_layer_{layer}"] = grid_figure(values, title, centre=_PROPORTIONAL)
        bars = {
            f"{r['one']} – {r['other']}, layer {r['layer']}": (r["mean_entry"], r["low"], r["high"])
            for r in result.tables["roles"].rows
            if r["words"] == "all" and r["low"] is not None
        }
        if bars:
            label = "mean entry of a pair of words, in units of the score"
            figures["roles"] = intervals_figure(bars, label)
        return figures


def _classes_of_layer(found: _Collected, layer: int, pairs: Sequence[WordPairs]) -> None:
    """Add tables of tags and relations, and what P1 says of nouns and verbs."""
    tags = _labels(pairs, "pos")
    relations = _labels(pairs, "relation")[:_N_RELATIONS]
    by_tag = sums_by_label(pairs, lambda word: word.pos, tags)
    by_relation = sums_by_label(
        pairs, lambda w: w.relation if w.relation in relations else _OTHER, [*relations, _OTHER]
    )
    context, notes = found.context, found.notes
    for tag in tags:
        row = by_tag.row(context, by_tag.words(tag), f"{tag}, layer {layer}", notes)
        found.add("words", layer=layer, tag=tag, **row)
    for table, sums in (("tags", by_tag), ("relations", by_relation)):
        for one, other, chosen in sums.classes():
            row = sums.row(context, chosen, f"{one} – {other}, layer {layer}", notes)
            found.add(table, layer=layer, one=one, other=other, **row)
    chosen, what = by_tag.among(CONTENT), "pairs of two words that are nouns or verbs"
    share = context.interval_or_note(
        by_tag.share(chosen), ratio_of_sums, f"share of {what}, layer {layer}", notes
    )
    if share is not None:
        claim = "Nouns and verbs carry most of the score that falls on words"
        quantity = f"share of {what} in the attribution on word pairs, layer {layer}"
        finding = judge(claim, quantity, share, source="P1", above=_MOST)
        found.judge(layer, "noun_verb_share", finding)
    enriched = context.interval_or_note(
        by_tag.shares(chosen), enrichment, f"enrichment of {what}, layer {layer}", notes
    )
    if enriched is not None:
        claim = "Nouns and verbs carry more than in proportion to their number"
        quantity = f"mean entry of {what} by that of all word pairs, layer {layer}"
        finding = judge(claim, quantity, enriched, source="P1", above=_PROPORTIONAL)
        found.judge(layer, "noun_verb_enrichment", finding)


def _roles_of_layer(found: _Collected, layer: int, pairs: Sequence[WordPairs]) -> None:
    """Add tables of roles, and what P2 says of matching ones."""
    claims = {
        ("core", "all"): ("Models attend to matching syntactic roles", "P2"),
        ("arguments", "different lemmas"): (
            "Subjects match subjects and objects match objects beyond equal words",
            "ours",
        ),
    }
    for words in _WORDS:
        sums = sums_by_label(
            pairs,
            lambda word: ROLES.get(word.relation, _OTHER),
            (*_GROUPS["core"], _OTHER),
            None if words == "all" else lambda one, two: one.lemma != two.lemma,
        )
        for one, other, chosen in sums.classes():
            if _OTHER not in (one, other):
                what = f"{one} – {other}, {words}, layer {layer}"
                row = sums.mean_row(found.context, chosen, what, found.notes)
                found.add("roles", layer=layer, words=words, one=one, other=other, **row)
        for group, roles in _GROUPS.items():
            where = {"layer": layer, "roles": group, "words": words}
            difference, columns = _difference(found, sums, roles, where)
            found.add("role_differences", **where, **columns)
            if difference is not None and (group, words) in claims:
                claim, source = claims[group, words]
                quantity = (
                    f"mean entry of matching minus mixed roles ({group}, {words}), layer {layer}"
                )
                finding = judge(claim, quantity, difference, source=source, above=0.0)
                key = f"matching_minus_mixed/{group}/{words.replace(' ', '_')}"
                found.judge(layer, key, finding)


def _difference(
    found: _Collected, sums: ClassSums, roles: Sequence[str], where: Mapping[str, Any]
) -> tuple[Interval | None, dict[str, Any]]:
    """Return mean entry of matching minus mixed roles, and the columns of a table."""
    same = np.diag(np.isin(sums.labels, roles).astype(np.float64))
    values = (*sums.mean(same), *sums.mean(sums.among(roles) - same))
    present = (values[1] > 0) | (values[3] > 0)
    what = ", ".join(str(value) for value in where.values())
    difference = found.context.interval_or_note(
        [value[present] for value in values],
        difference_of_means,
        f"role difference {what}",
        found.notes,
    )
    matching, mixed = ratio_of_sums(*values[:2]), ratio_of_sums(*values[2:])
    return difference, {
        "matching_pairs": int(values[1].sum()),
        "mixed_pairs": int(values[3].sum()),
        "n": int(present.sum()),
        "matching": float(matching) if np.isfinite(matching) else None,
        "mixed": float(mixed) if np.isfinite(mixed) else None,
        "difference": None if difference is None else difference.estimate,
        "low": None if difference is None else difference.low,
        "high": None if difference is None else difference.high,
    }


def _labels(pairs: Sequence[WordPairs], name: str) -> list[str]:
    """Return the labels of all words, the most frequent first."""
    counts = Counter(
        getattr(word, name) for pair in pairs for word in (*pair.words_a, *pair.words_b)
    )
    return sorted(counts, key=lambda label: (-counts[label], label))


def _parts(pairs: Sequence[WordPairs]) -> dict[str, list[float]]:
    """Return what the scores are made of, for each pair of texts."""
    sums = [pair.sums for pair in pairs]
    return {
        "pairs of words": [float(s.matrix[:-1, :-1].sum()) for s in sums],
        "word and special token": [
            float(s.matrix[:-1, -1].sum() + s.matrix[-1, :-1].sum()) for s in sums
        ],
        "two special tokens": [float(s.matrix[-1, -1]) for s in sums],
        "main effects of words": [
            float(s.main_effects_a[:-1].sum() + s.main_effects_b[:-1].sum()) for s in sums
        ],
        "main effects of special tokens": [
            float(s.main_effects_a[-1] + s.main_effects_b[-1]) for s in sums
        ],
        "intercept": [s.intercept for s in sums],
        "residual": [s.residual for s in sums],
        "score": [s.score for s in sums],
    }


def _tables(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, ResultTable]:
    columns = (
        "share, absolute share: of the attribution on word pairs; enrichment: mean entry by that "
        "of all word pairs; n: text pairs that have it"
    )
    frequent = {
        table: [row for row in _strongest(rows[table]) if row["n"] >= SMALLEST_SAMPLE]
        for table in ("tags", "relations")
    }
    return {
        "words": ResultTable(
            rows["words"],
            f"words by tag, each with half of the pairs that it is part of; {columns}",
            shown=True,
        ),
        "strongest_tags": ResultTable(
            frequent["tags"],
            f"the {_N_SHOWN} pairs of tags of the largest absolute share; {columns}",
            shown=True,
        ),
        "strongest_relations": ResultTable(
            frequent["relations"],
            f"the {_N_SHOWN} pairs of relations of the largest absolute share; {columns}",
            shown=True,
        ),
        "roles": ResultTable(
            rows["roles"],
            "mean entry by pair of roles, in units of the score, of all words and without pairs of "
            "one lemma; n: text pairs that have it",
            shown=True,
        ),
        "role_differences": ResultTable(
            rows["role_differences"],
            "mean entry of matching minus mixed roles, in units of the score, among subject, "
            "object and root (core) or subject and object (arguments)",
            shown=True,
        ),
        "rest": ResultTable(
            rows["rest"],
            "what the scores are made of, mean over text pairs in units of the score; prompt "
            "tokens count as special tokens",
            shown=True,
        ),
        "tags": ResultTable(rows["tags"], f"all pairs of tags; {columns}"),
        "relations": ResultTable(
            rows["relations"],
            f"all pairs of the {_N_RELATIONS} most frequent dependency relations and others; "
            f"{columns}",
        ),
    }


def _strongest(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the classes of the largest absolute share at each layer."""
    for layer in dict.fromkeys(row["layer"] for row in rows):
        of_layer = [r for r in rows if r["layer"] == layer and r["absolute_share"] is not None]
        yield from sorted(of_layer, key=lambda r: -r["absolute_share"])[:_N_SHOWN]
