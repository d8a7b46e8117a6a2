"""Minimal pairs: where words are found, what is compared with what, which probes are left out."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import WORDS, tiny_folder, tiny_model

from xsiam import SiameseEncoder, probes
from xsiam.analysis.base import NotApplicableError
from xsiam.analysis.minimal_pairs import (
    IDENTICAL,
    in_another_frame,
    locate,
    negation_pairs,
    slot_pairs,
    spans_around,
    unrelated_affirmatives,
)
from xsiam.analysis.probe_sets import Probe, check_language, load_probes, usable_probes
from xsiam.config import TrainConfig, load_config
from xsiam.errors import InputError
from xsiam.provenance import bundled_pairs
from xsiam.training import run_training

HEADER = ["sentence1", "sentence2", "score", "category", "template", "words"]
BUNDLED = load_probes("bundled")


def write(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def negation(first: str, second: str, marker: str, template: str = "negation/x/1") -> Probe:
    return Probe(first, second, "negation", template, f"negation:{marker}|p")


# --- places of words ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("The soup is hot.", "hot", "hot"),
        ("Hot soup is hotter.", "hot", "Hot"),
        ("The swimmer came first.", "came first", "came first"),
        ("My sister isn't here.", "n't", "isn't"),
        ("My sister isn’t here.", "n't", "isn’t"),
        ("A brand-new box.", "brand-new", "brand-new"),
        ("No one is here.", "no one", "No one"),
    ],
)
def test_word_is_found_as_a_whole(text: str, word: str, found: str) -> None:
    span = locate(text, word)
    assert span is not None
    assert text[slice(*span)] == found


@pytest.mark.parametrize(
    ("text", "word"),
    [("A hotel.", "hot"), ("hot and hot", "hot"), ("knot", "not"), ("He can not.", "n't")],
)
def test_word_that_is_not_there_exactly_once_is_not_found(text: str, word: str) -> None:
    assert locate(text, word) is None


def test_words_of_a_text_with_one_kept_whole() -> None:
    text = "He doesn't eat brand-new things, ever."
    words = ["He", "doesn't", "eat", "brand-new", "things", "ever"]
    assert [text[slice(*s)] for s in spans_around(text)] == words
    kept = (text.index("eat"), text.index(" things"))
    merged = [*words[:2], "eat brand-new", *words[4:]]
    assert [text[slice(*s)] for s in spans_around(text, kept)] == merged


# --- what is compared --------------------------------------------------------------------------


def test_every_bundled_probe_with_a_slot_or_a_negation_is_used() -> None:
    pairs, missed = slot_pairs(BUNDLED.probes)
    assert missed == 0
    for relation in ("synonym", "antonym"):
        n = sum(p.category == relation for p in BUNDLED.probes)
        assert sum(p.relation == relation for p in pairs) == n > 100
    negated, missed = negation_pairs(BUNDLED.probes)
    assert missed == 0
    assert len(negated) == sum(p.category == "negation" for p in BUNDLED.probes) > 50


def test_slot_pairs_differ_in_their_slot_alone() -> None:
    articles = ("a", "an")
    for pair in slot_pairs(BUNDLED.probes)[0]:
        sides = ((pair.text_a, pair.span_a), (pair.text_b, pair.span_b))
        before = [text[: span[0]].split() for text, span in sides]
        after = [text[span[1] :] for text, span in sides]
        if before[0] and before[0][-1].lower() in articles:
            before = [words[:-1] for words in before]
        assert before[0] == before[1]
        assert after[0] == after[1]
        assert pair.text_b[slice(*pair.span_b)].lower() == pair.word_b.lower()
        assert (pair.relation == IDENTICAL) == (pair.word_a == pair.word_b)


def test_other_frames_hold_the_same_base_word() -> None:
    pairs, _ = slot_pairs(BUNDLED.probes)
    templates = {p.text_a: p.template for p in pairs}
    others = in_another_frame(pairs)
    assert {p.relation for p in others} == {IDENTICAL, "synonym", "antonym", "unrelated"}
    for pair in others:
        assert pair.frame == "another"
        assert pair.text_a[slice(*pair.span_a)].lower() == pair.word_a.lower()
        assert templates[pair.text_a] != pair.template


def test_negated_sentence_is_found_on_either_side() -> None:
    plain, denied = "He goes out with a hat.", "He never goes out with a hat."
    for texts in ((plain, denied), (denied, plain)):
        (pair,), missed = negation_pairs([negation(*texts, "never")])
        assert (pair.affirmative, pair.negated, missed) == (plain, denied, 0)
        assert pair.negated[slice(*pair.span)] == "never"


@pytest.mark.parametrize(
    ("plain", "denied", "marker", "neutral"),
    [
        ("He is here.", "He is not here.", "not", "He is really here."),
        ("He is here.", "He isn't here.", "n't", "He is really here."),
        ("He can drive.", "He can't drive.", "n't", "He can really drive."),
        ("He will go.", "He won't go.", "n't", "He will really go."),
        ("Is he here?", "Isn't he here?", "n't", None),
        ("He drives.", "He does not drive.", "not", None),
        ("He has plans.", "He has no plans.", "no", None),
        ("He has already left.", "He has not left yet.", "not", None),
    ],
)
def test_neutral_word_stands_where_only_a_word_was_added(
    plain: str, denied: str, marker: str, neutral: str | None
) -> None:
    (pair,), _ = negation_pairs([negation(plain, denied, marker)])
    assert pair.neutral == neutral
    if neutral is not None:
        assert pair.neutral_span is not None
        assert neutral[slice(*pair.neutral_span)] == "really"


def test_negation_in_both_or_neither_sentence_is_left_out_and_counted() -> None:
    found, missed = negation_pairs(
        [
            negation("He is not here.", "She is not here.", "not"),
            negation("He is here.", "She is here.", "not"),
            negation("He is here.", "He is not, not here.", "not"),
        ]
    )
    assert (found, missed) == ([], 3)


def test_unrelated_sentences_are_of_other_templates_and_predicates() -> None:
    pairs, _ = negation_pairs(BUNDLED.probes)
    known = {p.affirmative: p for p in pairs}
    for pair, text in zip(pairs, unrelated_affirmatives(pairs), strict=True):
        assert text is not None
        assert known[text].template != pair.template
        assert known[text].predicate != pair.predicate
    assert unrelated_affirmatives(pairs[:1]) == [None]


# --- probes of one's own -----------------------------------------------------------------------

ROW = ["The soup is hot.", "The soup is cold.", "0.2", "antonym", "food/a", "antonym:hot|cold"]


def test_own_probes_are_read_without_scores(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", [[*ROW[:2], *ROW[3:]]], [*HEADER[:2], *HEADER[3:]])
    found = load_probes(path)
    (probe,) = found.probes
    assert (probe.text_a, probe.text_b, probe.fillers) == (*ROW[:2], ("hot", "cold"))
    assert (probe.kind, probe.split, found.name) == ("food", None, str(path))


def test_digest_changes_with_any_cell_that_is_read(tmp_path: Path) -> None:
    digest = load_probes(write(tmp_path / "a.csv", [ROW])).digest
    for column in (0, 1, 3, 4, 5):
        changed = list(ROW)
        changed[column] = "synonym" if column == 3 else f"{ROW[column]}x"
        assert load_probes(write(tmp_path / "b.csv", [changed])).digest != digest
    assert load_probes(write(tmp_path / "c.csv", [ROW])).digest == digest


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([ROW[:4]], HEADER[:4], r"lacks template, words \(it has sentence1"),
        ([], HEADER, "no data row"),
        ([["", *ROW[1:]]], HEADER, r"'sentence1' of `analysis.probes`, but data row 1 .* ''"),
        ([[*ROW[:5], "antonym"]], HEADER, r"'antonym:one\|other', but data row 1 .* 'antonym'"),
        ([[*ROW[:5], "antonym:hot|"]], HEADER, r"data row 1 .* has 'antonym:hot\|'"),
    ],
)
def test_wrong_probes_are_refused(
    tmp_path: Path, rows: list[list[str]], header: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_probes(write(tmp_path / "own.csv", rows, header))


def test_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`analysis.probes`.*nowhere\.csv"):
        load_probes(tmp_path / "nowhere.csv")


# --- what a model may be judged by -------------------------------------------------------------


class _Tokenizer:
    """Cuts words into pieces of so many letters and knows none that begins with q."""

    is_fast = True
    unk_token = "[UNK]"

    def __init__(self, letters: int = 99) -> None:
        self.letters = letters

    def tokenize(self, text: str) -> list[str]:
        word = text.strip()
        if word.startswith("q"):
            return ["[UNK]"]
        return [word[i : i + self.letters] for i in range(0, len(word), self.letters)]


def context(trained_on: Any, source: Any = BUNDLED, tokenizer: Any = None) -> Any:
    encoder = SimpleNamespace(trained_on=trained_on, tokenizer=tokenizer or _Tokenizer())
    return SimpleNamespace(probes=source, model=lambda name: encoder)


def run(**bundled: int) -> dict[str, Any]:
    return {"model": "m", "source": "s.csv", "split": None, "n_pairs": 9, "bundled": bundled}


def test_probes_that_a_model_was_tuned_on_are_left_out() -> None:
    categories = ("antonym", "negation")
    everything, notes = usable_probes(context(None), ["model"], categories)
    assert {p.split for p in everything} == set(probes.SPLITS)
    assert len(notes) == 1
    assert "is unknown" in notes[0]
    held_out, notes = usable_probes(context([run(), run(train=770)]), ["model"], categories)
    assert held_out == [p for p in everything if p.split != "train"]
    left_out = len(everything) - len(held_out)
    assert notes[1].startswith(
        f"{left_out} of {len(everything)} probes of category antonym or negation are left out"
    )
    assert "bundled train" in notes[0]


def test_own_probes_with_words_of_a_split_seen_are_left_out() -> None:
    seen = next(p for p in BUNDLED.probes if p.split == "train" and p.category == "antonym")
    word = seen.fillers[0]
    own = [
        Probe("a", "b", "antonym", "own/1", "antonym:purple|octagonal"),
        Probe("a", "b", "antonym", "own/1", f"antonym:octagonal|{word.upper()}"),
        Probe("a", "b", "antonym", seen.template, "antonym:purple|octagonal"),
    ]
    source = SimpleNamespace(probes=tuple(own), name="own.csv")
    held_out, notes = usable_probes(context([run(train=1)], source), ["model"], ["antonym"])
    assert held_out == own[:1]
    assert "Whether probes of your own are among them is unknown" in notes[0]
    other, _ = usable_probes(context([run(test=1)], source), ["model"], ["antonym"])
    assert other == own


def test_nothing_left_is_a_reason() -> None:
    tuned = context([run(train=1, validation=1, test=1)])
    with pytest.raises(NotApplicableError, match=r"all 84 probes of category negation .*test"):
        usable_probes(tuned, ["model"], ["negation"])
    with pytest.raises(NotApplicableError, match="no probes of category irony"):
        usable_probes(tuned, ["model"], ["irony"])


def test_language_is_told_from_pieces_and_unknown_words() -> None:
    probe = [Probe("aaaa bbbb", "cccc dddd", "antonym", "t", "antonym:x|y")]
    for letters, fits in ((4, True), (2, True), (1, False)):
        encoder: Any = SimpleNamespace(tokenizer=_Tokenizer(letters))
        if fits:
            check_language(encoder, "model", probe)
        else:
            with pytest.raises(NotApplicableError, match=r"4\.00 pieces \(at most 2\)"):
                check_language(encoder, "model", probe)
    encoder = SimpleNamespace(tokenizer=_Tokenizer())
    with pytest.raises(NotApplicableError, match=r"does not know 25\.0% of them \(at most 5%\)"):
        check_language(encoder, "model", [Probe("a b", "c q", "antonym", "t", "antonym:x|y")])
    encoder.tokenizer.is_fast = False
    with pytest.raises(NotApplicableError, match="slow tokenizer of `model`"):
        check_language(encoder, "model", probe)


def test_model_of_a_small_vocabulary_does_not_fit_the_bundled_probes() -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    with pytest.raises(NotApplicableError, match="not in the language of `model`"):
        check_language(encoder, "model", BUNDLED.probes)
    known = [w for w in WORDS if w.isalpha()]
    own = [Probe(" ".join(known[:5]), " ".join(known[5:]), "antonym", "t", "antonym:a|the")]
    check_language(encoder, "model", own)


def test_real_model_knows_the_bundled_probes() -> None:
    encoder = SiameseEncoder.from_pretrained("all-MiniLM-L6-v2", shift=False, reference="pad")
    check_language(encoder, "model", BUNDLED.probes)


# --- what checkpoints record -------------------------------------------------------------------


def test_bundled_pairs_are_recognised_whatever_file_they_come_from() -> None:
    train, test = probes.load("train"), probes.load("test")
    given = [(p.sentence1, p.sentence2) for p in train[:3]]
    given += [(p.sentence2, p.sentence1) for p in test[:2]]
    given += [(train[5].sentence1, test[5].sentence1)]  # both are there, but not together
    assert bundled_pairs(given) == {"train": 3, "test": 2}
    assert bundled_pairs([("a", "b")]) == {}


def test_exports_record_what_a_model_was_tuned_on(tmp_path: Path) -> None:
    encoder = SiameseEncoder(tiny_model(), shift=False, reference="pad")
    assert encoder.trained_on is None
    encoder.save_pretrained(tmp_path / "untuned")
    assert SiameseEncoder.from_pretrained(tmp_path / "untuned").trained_on is None
    encoder.trained_on = [run(train=7)]
    encoder.save_pretrained(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "xsiam.json").read_text())["trained_on"] == [
        run(train=7)
    ]
    assert SiameseEncoder.from_pretrained(tmp_path / "tuned").trained_on == [run(train=7)]


def test_training_records_its_pairs_after_those_of_the_model_it_started_from(
    tmp_path: Path,
) -> None:
    """A renamed file with bundled pairs is recognised; no folder is written down."""
    tiny_folder(tmp_path / "model")
    rows = [[p.sentence1, p.sentence2, "0.5"] for p in probes.load("train")[:3]]
    rows += [["dog", "cat", "0.1"], ["house", "garden", "0.4"]]
    mixed = write(tmp_path / "mixed.csv", rows, HEADER[:3])
    plain = write(tmp_path / "plain.csv", rows[3:], HEADER[:3])

    def tuned(start: Path, data: Path, output: Path) -> SiameseEncoder:
        settings = [f"model.name={start}", "model.reference=uniform", f"data.train={data}"]
        settings += ["trainer.max_steps=1", "trainer.accelerator=cpu", f"output_dir={output}"]
        settings += ["trainer.log_every_n_steps=1", "attribution.enabled=false"]
        result = run_training(load_config(TrainConfig, [], settings))
        best = SiameseEncoder.from_pretrained(result.best_checkpoint)
        exported = SiameseEncoder.from_pretrained(result.export)
        assert best.trained_on == exported.trained_on
        return exported

    first = {"model": "model", "source": "mixed.csv", "split": None, "n_pairs": 5}
    second = {"model": "export", "source": "plain.csv", "split": None, "n_pairs": 2}
    once = tuned(tmp_path / "model", mixed, tmp_path / "once")
    assert once.trained_on == [{**first, "bundled": {"train": 3}}]
    twice = tuned(tmp_path / "once" / "export", plain, tmp_path / "twice")
    assert twice.trained_on == [*once.trained_on, {**second, "bundled": {}}]
