"""Analyses of minimal pairs: planted entries give the planted figures, and a real model runs."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_folder
from test_minimal_pairs import HEADER, run, write

from xsiam import PairAttributor, SiameseEncoder, probes
from xsiam.analysis import Adjectives, Context, LexicalBias, Mitigation, Negation
from xsiam.analysis.base import AnalysisResult, NotApplicableError
from xsiam.analysis.storage import check_result, settings_hash
from xsiam.analysis.word_measures import entry_of, line_of
from xsiam.config import AnalysisConfig, AnalysisModels, EvaluateConfig, load_config
from xsiam.evaluation import run_evaluation
from xsiam.evaluation_inputs import plan_analyses
from xsiam.pairs import PairDataset
from xsiam.result import PairAttribution

LAYER = 3
EXACT = 1e-6  # float32 matrices
FILLER, OTHER, SPECIAL = 0.02, 0.004, 0.002  # entries: of words, of other tokens, of special tokens
Rule = Callable[[str, str], float]


def tokens_of(text: str) -> tuple[list[tuple[int, int]], list[str]]:
    """Cut words of more than four letters in two; return character spans, and each one's word."""
    spans, words = [(0, 0)], [""]
    for match in re.finditer(r"\w+(?:'\w+)?|[^\w\s]", text):
        start, end = match.span()
        cuts = [start, start + 3, end] if end - start > 4 else [start, end]
        for piece in itertools.pairwise(cuts):
            spans.append(piece)
            words.append(match.group())
    return [*spans, (0, 0)], [*words, ""]


def planted(
    a: str, b: str, entry: Rule, effect: Callable[[str], float], score: float
) -> PairAttribution:
    """Return an attribution whose words have these entries, spread evenly over their pieces."""
    (spans_a, words_a), (spans_b, words_b) = tokens_of(a), tokens_of(b)

    def cell(x: str, y: str) -> float:
        if not (x and y):
            return SPECIAL
        if not (x[0].isalnum() and y[0].isalnum()):
            return OTHER
        return entry(x, y) / (words_a.count(x) * words_b.count(y))

    def effects(words: list[str]) -> torch.Tensor:
        return torch.tensor([effect(w) / words.count(w) if w else 0.0 for w in words])

    matrix = torch.tensor([[cell(x, y) for y in words_b] for x in words_a])
    one: dict[str, Any] = dict.fromkeys(
        ("completeness_error", "token_error", "convergence_delta", "residual", "intercept"), 0.0
    )
    for side, spans, words in (("a", spans_a, words_a), ("b", spans_b, words_b)):
        one |= {f"tokens_{side}": tuple(words), f"offsets_{side}": tuple(spans)}
        one[f"special_mask_{side}"] = tuple(not w for w in words)
        one[f"prompt_mask_{side}"] = (False,) * len(words)
        one |= {f"completeness_error_{side}": 0.0, f"token_error_{side}": 0.0}
        one |= {f"converged_{side}": True, f"n_nodes_{side}": 8}
    return PairAttribution(
        **one,
        text_a=a,
        text_b=b,
        matrix=matrix,
        main_effects_a=effects(words_a),
        main_effects_b=effects(words_b),
        score=score,
        attributed_score=float(matrix.sum()),
        converged=True,
        n_nodes=8,
        layer=LAYER,
        reference="pad",
        quadrature="adaptive",
        tolerance=1e-3,
        similarity="cos",
        shift=False,
        dtype="float32",
        model_fingerprint="",
    )


# --- planted probes ----------------------------------------------------------------------------

N = 6
FRAMES = ("the soup is {} today .", "a {} thing stands there .")


def slot_rows() -> list[list[str]]:
    """Six base words in two templates, with a synonym, an antonym and an unrelated word each."""
    return [
        [
            *(frame.format(f"base{i}"), frame.format(f"{category}{i}"), "0", category),
            *(f"food/{number}", f"{category}:base{i}|{category}{i}"),
        ]
        for i in range(N)
        for number, frame in enumerate(FRAMES)
        for category in ("synonym", "antonym", "unrelated")
    ]


def negation_rows() -> list[list[str]]:
    """Seven templates of one kind with the same predicate."""
    return [
        [
            *(f"the cat{i} is here .", f"the cat{i} is not here .", "0", "negation"),
            *(f"negation/place/{i}", f"negation:not|p{i % 2}"),
        ]
        for i in range(7)
    ]


def slot_entry(word_a: str, word_b: str) -> float:
    """Entries that depend on the words alone; the second template has no larger one beside them."""
    if (word_a, word_b) == ("soup", "soup"):
        return 2.0
    if not word_a.startswith("base"):
        return FILLER
    i = int(word_a[-1])
    values = {
        f"base{i}": 0.5 + 0.01 * i,
        f"synonym{i}": 0.3 - 0.02 * i,
        f"antonym{i}": -0.1 if i < 2 else 0.2,
        f"unrelated{i}": 0.05,
    }
    return values.get(word_b, FILLER)


def negation_entry(word_a: str, word_b: str) -> float:
    if (word_a, word_b) == ("not", "not"):
        return -0.3
    return -0.01 if "not" in (word_a, word_b) else FILLER


class Planted(Context):
    """A context with planted attributions; no model is ever run."""

    rules: tuple[Rule, Callable[[str, str, str], float]]

    def attributions(self, model: str, layer: int, texts_a: Any, texts_b: Any) -> Any:
        entry, score = self.rules

        def effect(word: str) -> float:
            return -0.02 if word == "not" else 0.0

        scale = 0.5 if model == "mitigated" else 1.0
        return [
            planted(a, b, lambda x, y: scale * entry(x, y), effect, score(model, a, b))
            for a, b in zip(texts_a, texts_b, strict=True)
        ]

    def model(self, name: str = "model") -> Any:
        score = self.rules[1]
        tokenizer = SimpleNamespace(is_fast=True, unk_token="?", tokenize=lambda w: [w])
        return SimpleNamespace(
            trained_on=[run()] if name == "mitigated" else None,
            tokenizer=tokenizer,
            score=lambda a, b, *roles: torch.tensor(
                [score(name, x, y) for x, y in zip(a, b, strict=True)]
            ),
        )


def planted_context(
    folder: Path,
    rows: list[list[str]],
    entry: Rule,
    score: Callable[[str, str, str], float] = lambda model, a, b: 0.8,
    labels: list[float] | None = None,
) -> Planted:
    texts = [f"pair{i}" for i in range(len(labels or [0]))]
    context = Planted(
        settings=AnalysisConfig(
            probes=str(write(folder / "probes.csv", rows)), models=AnalysisModels(mitigated="x")
        ),
        encoder=SimpleNamespace(),  # type: ignore[arg-type]
        pairs=PairDataset(texts, texts, labels),
        layers=(LAYER,),
        folder=folder,
        attributor_settings={},
        load=lambda name, reference: pytest.fail("no model is loaded"),
    )
    context.rules = (entry, score)
    return context


def row_of(result: AnalysisResult, table: str, **where: Any) -> dict[str, Any]:
    (row,) = [
        r
        for r in result.tables[table].rows
        if all(r[column] == value for column, value in where.items())
    ]
    return dict(row)


def test_entry_sums_pieces_and_ranks_words() -> None:
    a, b = FRAMES[0].format("base3"), FRAMES[0].format("synonym3")
    result = planted(a, b, slot_entry, lambda w: 0.1 if w == "soup" else 0.0, 0.8)
    span_a = (a.index("base3"), a.index("base3") + 5)
    entry = entry_of(result, span_a, (b.index("synonym3"), b.index("synonym3") + 8))
    assert entry is not None
    assert entry.value == pytest.approx(0.3 - 0.02 * 3, abs=EXACT)
    assert entry.larger == pytest.approx(1 / 24)  # soup with soup, of 24 others
    # Five words a side; today and base3 have two pieces in a, today and synonym3 in b.
    words = 23 * FILLER + 2.0 + 0.24
    rest = 2 * 8 * OTHER - OTHER + (2 * 8 + 2 * 10) * SPECIAL
    assert entry.rest == pytest.approx(rest / (words + rest), abs=EXACT)
    assert entry.border == pytest.approx(0.2, abs=EXACT)


def test_line_holds_all_of_the_other_text_and_the_main_effect() -> None:
    a, b = "the cat0 is here .", "the cat0 is not here ."
    result = planted(a, b, negation_entry, lambda w: -0.02 if w == "not" else 0.0, 0.9)
    span = (b.index("not"), b.index("not") + 3)
    line = line_of(result, span, "b")
    assert line is not None
    assert line.pairs == pytest.approx(4 * -0.01 + OTHER + 2 * SPECIAL, abs=EXACT)
    assert line.contribution == pytest.approx(line.pairs - 0.02, abs=EXACT)
    assert line.amount == pytest.approx(0.04 / (0.04 + 16 * FILLER), abs=EXACT)
    assert (line.evenly, line.larger) == (1 / 5, 1.0)
    turned = planted(b, a, negation_entry, lambda w: -0.02 if w == "not" else 0.0, 0.9)
    row = line_of(turned, span, "a")
    assert row is not None
    assert row.contribution == pytest.approx(line.contribution, abs=EXACT)
    assert row.amount == pytest.approx(line.amount, abs=EXACT)


def test_words_beyond_the_window_have_no_entry() -> None:
    result = planted("a dog", "a cat", lambda x, y: 1.0, lambda w: 0.0, 0.5)
    cut = PairAttribution(**{**vars(result), "text_b": "a cat and a mouse"})
    assert entry_of(cut, (2, 5), (2, 5)) is not None
    assert entry_of(cut, (2, 5), (12, 17)) is None
    assert line_of(cut, (12, 17), "b") is None


# --- lexical bias ------------------------------------------------------------------------------


def test_lexical_bias_gives_the_planted_figures(tmp_path: Path) -> None:
    context = planted_context(tmp_path, slot_rows(), slot_entry)
    result = LexicalBias().run(context)
    check_result(result)
    numbers = np.arange(N)
    expected = {
        "identical": 0.5 + 0.01 * numbers,
        "synonym": 0.3 - 0.02 * numbers,
        "unrelated": np.full(N, 0.05),
    }
    for frame in ("same", "another"):
        for relation, values in expected.items():
            row = row_of(result, "entries", frame=frame, relation=relation)
            assert row["estimate"] == pytest.approx(values.mean(), abs=EXACT)
            assert row["sd"] == pytest.approx(values.std(ddof=1), abs=EXACT)
            assert row["n"] == N
            # Two soups meet in the first template alone, and never across templates.
            assert row["larger"] == pytest.approx(1 / 48 if frame == "same" else 0.0)
        gap = 0.2 + 0.03 * numbers
        row = row_of(result, "differences", frame=frame, contrast="identical minus synonym")
        assert row["estimate"] == pytest.approx(gap.mean(), abs=EXACT)
        assert row["effect_size"] == pytest.approx(gap.mean() / gap.std(ddof=1), rel=1e-4)
        assert result.metrics[f"layer_3/{frame}/identical_minus_synonym"] == row["estimate"]
    assert [f.verdict for f in result.findings] == ["confirmed"] * 2
    assert {f.interval.n for f in result.findings} == {N}
    assert set(LexicalBias().plot(result)) == {"entries"}


def test_equal_differences_have_no_effect_size(tmp_path: Path) -> None:
    def entry(a: str, b: str) -> float:
        return 1.0 if a == b else 0.5

    result = LexicalBias().run(planted_context(tmp_path, slot_rows(), entry))
    row = row_of(result, "differences", frame="same", contrast="identical minus synonym")
    assert row["estimate"] == pytest.approx(0.5, abs=EXACT)
    assert row["effect_size"] is None


# --- adjectives --------------------------------------------------------------------------------


def test_adjectives_give_the_planted_figures(tmp_path: Path) -> None:
    result = Adjectives().run(planted_context(tmp_path, slot_rows(), slot_entry))
    check_result(result)
    where = {"relation": "antonym", "layer": LAYER}
    assert row_of(result, "entries", quantity="entry", **where)["estimate"] == pytest.approx(
        (2 * -0.1 + 4 * 0.2) / N, abs=EXACT
    )
    assert row_of(result, "entries", quantity="negative", **where)["estimate"] == 2 / N
    found = row_of(result, "entries", quantity="not_negative", **where)
    assert (found["estimate"], found["n"]) == (pytest.approx(4 / N), N)
    gap = row_of(result, "differences", contrast="synonym minus antonym")
    assert gap["estimate"] == pytest.approx(0.3 - 0.02 * 2.5 - 0.1, abs=EXACT)
    claims = {f.claim: f for f in result.findings}
    often = claims["Antonyms often have no negative entry"]
    assert (often.threshold, often.verdict, often.source) == (0.5, "undecided", "P2")
    assert often.interval.low < 0.5 < often.interval.high
    assert claims["Synonyms have larger entries than antonyms of the same word"].source == "ours"


@pytest.mark.parametrize(("value", "verdict"), [(0.1, "confirmed"), (-0.1, "contradicted")])
def test_claim_about_antonyms_can_be_wrong(tmp_path: Path, value: float, verdict: str) -> None:
    result = Adjectives().run(planted_context(tmp_path, slot_rows(), lambda a, b: value))
    often = next(f for f in result.findings if f.claim.startswith("Antonyms often"))
    assert (often.verdict, often.interval.estimate) == (verdict, float(value > 0))


# --- negation ----------------------------------------------------------------------------------


def negation_score(model: str, a: str, b: str) -> float:
    """Plant scores that depend on the template, its number in the text."""
    number = int(re.findall(r"\d", b)[0])
    if int(re.findall(r"\d", a)[0]) != number:
        return 0.5 - 0.1 * ("not" in b) if "mitigated" not in model else 0.4
    lower = 0.2 if model == "mitigated" else 0.0
    if "not" in b:
        return 0.9 - 0.01 * number - lower
    return 0.97 if "really" in b else 1.0


def test_negation_gives_the_planted_figures(tmp_path: Path) -> None:
    context = planted_context(tmp_path, negation_rows(), negation_entry, negation_score)
    result = Negation().run(context)
    check_result(result)
    drop = 0.1 + 0.01 * 3  # mean over seven templates
    itself, another = "the sentence itself", "another frame"
    for against, quantity, expected, n in (
        (itself, "base", 1.0, 7),
        (itself, "change by negation", -drop, 7),
        (itself, "neutral word", 0.97, 7),
        (itself, "change by negation beyond neutral word", 0.03 - drop, 7),
        (itself, "unrelated sentence", 0.5, 7),
        (itself, "drop by negation / by unrelated sentence", drop / 0.5, 7),
        (another, "base", 0.5, 7),
        (another, "change by negation", -0.1, 7),
    ):
        row = row_of(result, "scores", against=against, quantity=quantity)
        assert row["estimate"] == pytest.approx(expected, abs=EXACT), quantity
        assert row["n"] == n
    column = 4 * -0.01 + OTHER + 2 * SPECIAL - 0.02
    enrichment = 5 * 0.04 / (0.04 + 16 * FILLER)
    for line, quantity, value in (
        ("negation", "contribution", column),
        ("negation", "enrichment", enrichment),
        ("negation", "negative", 1.0),
        ("negation", "larger", 1.0),
        ("neutral word", "enrichment", 1.0),
        ("negation minus neutral word", "enrichment", enrichment - 1.0),
        ("neutral word", "negative", 0.0),
        ("both negated: row", "contribution", column - 0.3),
        ("both negated: column", "contribution", column - 0.3),
        ("both negated: common entry", "entry", -0.3),
        ("both negated: common entry", "larger", 0.0),
    ):
        row = row_of(result, "words", line=line, quantity=quantity)
        assert row["estimate"] == pytest.approx(value, abs=EXACT), (line, quantity)
        assert row["n"] == 7
    explained = row_of(result, "explained", layer=LAYER)
    assert explained["estimate"] == pytest.approx(column / -drop, rel=1e-4)
    verdicts = {f.claim.partition(":")[0]: f.verdict for f in result.findings}
    assert verdicts == {
        "Scores mostly ignore negation": "confirmed",
        "Negation lowers the score more than a neutral word in its place": "confirmed",
        "Attributions mostly ignore negation": "confirmed",
        "The negating word has more attribution than a neutral word in its place": "contradicted",
    }
    assert set(Negation().plot(result)) == {"scores", "enrichment"}


def test_claims_about_negation_can_be_wrong(tmp_path: Path) -> None:
    def score(model: str, a: str, b: str) -> float:
        same = re.findall(r"\d", a) == re.findall(r"\d", b)
        return (0.1 if "not" in b else 0.05 if "really" in b else 1.0) if same else 0.2

    def entry(a: str, b: str) -> float:
        return 0.5 if "not" in (a, b) else FILLER

    result = Negation().run(planted_context(tmp_path, negation_rows(), entry, score))
    verdicts = {f.claim: f.verdict for f in result.findings}
    more = verdicts.pop("The negating word has more attribution than a neutral word in its place")
    assert (more, set(verdicts.values())) == ("confirmed", {"contradicted"})


# --- mitigation --------------------------------------------------------------------------------


def mitigation_score(model: str, a: str, b: str) -> float:
    """Plant scores: tuning takes 0.2 of negations, 0.3 of antonyms and 0.01 of synonyms."""
    tuned = model == "mitigated"
    if a.startswith("pair"):
        order = int(a[4:])
        return 0.1 * (order ^ 1 if tuned else order)
    if "cat" in a:
        return negation_score(model, a, b)
    for category, loss in (("synonym", 0.01), ("antonym", 0.3), ("unrelated", 0.0)):
        if category in b:
            return 0.9 - loss * tuned
    raise AssertionError(b)


def test_mitigation_gives_the_planted_figures(tmp_path: Path) -> None:
    rows = [*slot_rows(), *negation_rows()]

    def entry(a: str, b: str) -> float:
        return slot_entry(a, b) if a.startswith("base") else negation_entry(a, b)

    labels = [0.1 * i for i in range(8)]
    context = planted_context(tmp_path, rows, entry, mitigation_score, labels)
    result = Mitigation().run(context)
    check_result(result)
    antonym = (2 * -0.1 + 4 * 0.2) / N
    synonym = 0.3 - 0.02 * 2.5
    column = 4 * -0.01 + OTHER + 2 * SPECIAL - 0.02
    for layer, category, quantity, change, n in (
        (None, "negation", "score", -0.2, 7),
        (None, "antonym", "score", -0.3, N),
        (None, "synonym", "score", -0.01, N),
        (None, "unrelated", "score", 0.0, N),
        (None, "synonym minus antonym", "score", 0.29, N),
        (LAYER, "antonym", "entry", -antonym / 2, N),  # tuning halves all entries of words
        (LAYER, "synonym minus antonym", "entry", -(synonym - antonym) / 2, N),
        (LAYER, "negation", "contribution of the negating word", 0.02, 7),
    ):
        row = row_of(result, "changes", layer=layer, category=category, quantity=quantity)
        assert row["estimate"] == pytest.approx(change, abs=EXACT), (category, quantity)
        assert row["after"] - row["before"] == pytest.approx(change, abs=EXACT)
        assert row["n"] == n
    assert row["before"] == pytest.approx(column, abs=EXACT)
    # Neighbours change places: Σd² = 8, so Spearman is 1 − 6·8 / (8·63).
    expected = 1 - 6 * 8 / (8 * 63)
    (row,) = result.tables["correlation"].rows
    assert (row["before"], row["after"]) == (pytest.approx(1.0), pytest.approx(expected))
    assert row["estimate"] == pytest.approx(expected - 1)
    verdicts = {f.claim: f.verdict for f in result.findings}
    assert verdicts["Tuning lowers the scores of antonym pairs"] == "confirmed"
    assert verdicts["Scores of synonym pairs do not suffer"] == "confirmed"
    assert verdicts["Attributions follow: the negating word contributes less"] == "contradicted"
    assert {f.source for f in result.findings} == {"ours"}
    assert set(Mitigation().plot(result)) == {"changes"}


def test_mitigation_without_labels_says_so(tmp_path: Path) -> None:
    rows = [*slot_rows(), *negation_rows()]
    context = planted_context(tmp_path, rows, slot_entry, mitigation_score)
    result = Mitigation().run(context)
    assert result.tables["correlation"].rows == []
    assert any("no labels" in note for note in result.notes)


def test_mitigation_needs_the_tuned_model(tmp_path: Path) -> None:
    context = Context(
        AnalysisConfig(), SimpleNamespace(), PairDataset(["a"], ["b"]), (1,), tmp_path, {},  # type: ignore[arg-type]
        load=lambda name, reference: pytest.fail("no model is loaded"),
    )  # fmt: skip
    assert Mitigation().models(context) == ("model", "mitigated")
    with pytest.raises(NotApplicableError, match=r"`analysis\.models\.mitigated`"):
        context.model("mitigated")
    context.settings.models.unmodified = "x"
    assert Mitigation().models(context) == ("unmodified/fitted", "mitigated")


# --- too little --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("analysis", "rows", "message"),
    [
        (Negation, negation_rows()[:4], r"5 different templates with a negation .* n = 4"),
        (Negation, slot_rows(), r"no probes of category negation in `analysis\.probes`"),
        (Adjectives, slot_rows()[:24], r"5 different antonym pairs or more, .* n = 4"),
        (LexicalBias, slot_rows()[:24], r"5 different words with a synonym or more, .* n = 4"),
        (Mitigation, [*negation_rows(), *slot_rows()[:6]], r"pairs of antonyms .* n = 1"),
    ],
)
def test_too_few_probes_are_a_reason_before_any_work(
    tmp_path: Path, analysis: Any, rows: list[list[str]], message: str
) -> None:
    context = planted_context(tmp_path, rows, slot_entry)
    with pytest.raises(NotApplicableError, match=message):
        list(analysis().requests(context))


# --- a real model ------------------------------------------------------------------------------


def real_probes(path: Path) -> Path:
    """Write five negations and five words with all that they are compared with."""
    chosen: dict[str, list[Any]] = {}
    for p in probes.load("test"):
        if p.category == "negation":
            chosen.setdefault(f"negation {p.template}", [p])
        elif p.template.partition("/")[0] in ("person", "thing", "mood", "food", "task"):
            chosen.setdefault(p.words.partition(":")[2].partition("|")[0], []).append(p)
    negations = [k for k in chosen if k.startswith("negation")][:5]
    bases = [k for k in chosen if not k.startswith("negation")][:5]
    rows = [
        [p.sentence1, p.sentence2, str(p.score), p.category, p.template, p.words]
        for key in [*negations, *bases]
        for p in chosen[key]
    ]
    return write(path, rows)


def test_real_model_end_to_end(tmp_path: Path) -> None:
    """The tuned model is the model itself: nothing changes, to the last digit."""
    path = real_probes(tmp_path / "probes.csv")
    encoder = SiameseEncoder.from_pretrained(
        "all-MiniLM-L6-v2", shift=False, reference="pad", device="cpu"
    )
    encoder.save_pretrained(tmp_path / "export")
    data = write(tmp_path / "pairs.csv", [["a cat", "a dog"]], ["sentence1", "sentence2"])
    config = load_config(
        EvaluateConfig,
        [],
        [
            f"checkpoint={tmp_path / 'export'}",
            f"data.test={data}",
            "attribution.enabled=false",
            "analysis.layers=[5]",
            "analysis.names=[negation,adjectives,lexical_bias,mitigation]",
            f"analysis.models.mitigated={tmp_path / 'export'}",
            "analysis.n_resamples=100",
            f"analysis.probes={path}",
            "accelerator=cpu",
            f"output_dir={tmp_path / 'run'}",
        ],
    )
    done = run_evaluation(config)
    assert done is not None
    facts = json.loads(done.results_path.read_text(encoding="utf-8"))["analyses"]
    assert {name: f["status"] for name, f in facts.items()} == dict.fromkeys(facts, "finished")
    assert sorted(facts) == ["adjectives", "lexical_bias", "mitigation", "negation"]

    def table(name: str) -> list[dict[str, str]]:
        file = done.results_path.parent / "analysis" / f"{name}.csv"
        with file.open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))

    for row in table("mitigation/changes"):
        assert float(row["estimate"]) == 0.0, row
        assert float(row["before"]) != 0.0
    # One entry and one column by hand: tokens that lie within the word's characters.
    attributor = PairAttributor(encoder, layer=5)
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))[1:]

    def inside(text: str, word: str, offsets: Any) -> list[int]:
        start = re.search(rf"\b{re.escape(word)}\b", text).start()  # type: ignore[union-attr]
        return [i for i, (s, e) in enumerate(offsets) if start <= s < e <= start + len(word)]

    one = next(r for r in rows if r[3] == "antonym")
    base, other = one[5].partition(":")[2].split("|")
    result = attributor.attribute(one[0], one[1])
    places = inside(one[0], base, result.offsets_a), inside(one[1], other, result.offsets_b)
    entry = float(result.matrix[places[0]][:, places[1]].sum())
    (found,) = [
        r
        for r in table("adjectives/pairs")
        if (r["word_a"], r["word_b"], r["template"]) == (base, other, one[4])
    ]
    assert float(found["entry"]) == pytest.approx(entry, abs=1e-5)
    assert float(found["score"]) == pytest.approx(float(encoder.score(*one[:2])), abs=1e-5)
    one = next(r for r in rows if r[5].startswith("negation:not|"))
    result = attributor.attribute(one[0], one[1])
    column = inside(one[1], "not", result.offsets_b)
    expected = result.matrix[:, column].sum() + result.main_effects_b[column].sum()
    (found,) = [
        r for r in table("negation/lines") if (r["line"], r["template"]) == ("negation", one[4])
    ]
    assert float(found["contribution"]) == pytest.approx(float(expected), abs=1e-5)


def test_other_probes_are_other_settings(tmp_path: Path) -> None:
    """Finished analyses are reused by this digest: it knows what is in the file."""
    encoder = SiameseEncoder.from_pretrained("all-MiniLM-L6-v2", shift=False, reference="pad")

    def digest(rows: list[list[str]], trained_on: Any = None) -> str:
        encoder.trained_on = trained_on
        context = Context(
            AnalysisConfig(probes=str(write(tmp_path / "probes.csv", rows, HEADER))),
            *(encoder, PairDataset(["a"], ["b"]), (5,), tmp_path, {"memory_budget": None}),
            load=lambda name, reference: pytest.fail("no model is loaded"),
        )
        return settings_hash(Negation(), context)

    rows = negation_rows()
    assert digest(rows) == digest(rows)
    assert digest(rows[1:]) != digest(rows)
    assert digest(rows, [run(train=1)]) != digest(rows)


def test_model_that_records_no_shift_is_compared_without_one(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "plain")
    shifted = SiameseEncoder.from_pretrained(folder, shift=True, reference="pad", device="cpu")
    shifted.save_pretrained(tmp_path / "tuned")
    config = load_config(
        EvaluateConfig, [], [f"checkpoint={folder}", "analysis.names=[concentration]"]
    )
    plan = plan_analyses(
        config, tmp_path, shifted, PairDataset(["dog"], ["cat"]), [2], torch.device("cpu")
    )
    assert plan is not None
    plain = plan.context.load(str(folder), "pad")
    assert (plain.shift, plain.reference.name) == (False, "pad")
    assert plan.context.load(str(tmp_path / "tuned"), None).shift
