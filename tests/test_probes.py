"""The bundled pair set: committed files, scheme, and separation of the splits."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import chain, combinations, pairwise
from pathlib import Path
from statistics import mean

import pytest

from xsiam import probes
from xsiam.probes import ProbePair, generate
from xsiam.probes.material import MATERIAL, Family, Frame, Material

ALL = {split: probes.load(split) for split in probes.SPLITS}
PAIRS = [pair for split in probes.SPLITS for pair in ALL[split]]
SPLIT_PAIRS = list(combinations(probes.SPLITS, 2))
SLOT_CATEGORIES = ("synonym", "antonym", "role_swap", "quantity", "specificity", "unrelated")
NEGATIONS = re.compile(
    r"\b(not|no|never|none|nobody|nothing|neither|nowhere|without)\b|n't\b", re.I
)


def slot_frames(material: Material) -> list[Frame]:
    """Frames with one slot, of all categories."""
    return [*material.frames, *chain.from_iterable(material.contrast_frames.values())]


def words_in(sentence: str) -> list[str]:
    return re.findall(r"[\w'-]+", sentence.lower())


def contrast_words(pairs: list[ProbePair]) -> set[str]:
    """Fillers of the slots, read from the ``words`` column (sentence groups have ids there)."""
    return {
        filler
        for pair in pairs
        if pair.category in SLOT_CATEGORIES and "/written/" not in pair.template
        if "+" not in pair.template
        for filler in pair.words.partition(":")[2].split("|")
    }


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", probes.SPLITS)
def test_committed_file_is_a_fresh_generation(split: str) -> None:
    expected = generate.to_csv(generate.generate(split)).encode()
    assert probes.path(split).read_bytes() == expected


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_generation_does_not_depend_on_the_hash_seed(tmp_path: Path, hash_seed: str) -> None:
    command = [sys.executable, "-m", "xsiam.probes.generate", "--output", str(tmp_path)]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
    for split in probes.SPLITS:
        assert (tmp_path / f"{split}.csv").read_bytes() == probes.path(split).read_bytes()


@pytest.mark.parametrize("split", probes.SPLITS)
def test_file_format(split: str) -> None:
    content = probes.path(split).read_bytes()
    assert b"\r" not in content
    assert not content.startswith(b"\xef\xbb\xbf")
    assert content.endswith(b"\n")
    rows = list(csv.reader(content.decode("utf-8").splitlines(), strict=True))
    assert rows[0] == ["sentence1", "sentence2", "score", "category", "template", "words"]
    assert all(len(row) == 6 and all(row) for row in rows)
    assert all(re.fullmatch(r"[01]\.\d\d", row[2]) for row in rows[1:])


def test_check_passes_on_the_committed_files_and_fails_on_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--check"]) == 0
    assert generate.main(["--output", str(tmp_path)]) == 0
    assert generate.main(["--output", str(tmp_path), "--check"]) == 0
    stale = tmp_path / "test.csv"
    stale.write_bytes(stale.read_bytes().replace(b",0.", b",1.", 1))
    (tmp_path / "train.csv").unlink()
    before = stale.read_bytes()
    capsys.readouterr()
    assert generate.main(["--output", str(tmp_path), "--check"]) == 1
    message = capsys.readouterr().err
    assert str(stale) in message
    assert str(tmp_path / "train.csv") in message
    assert "validation.csv" not in message
    assert stale.read_bytes() == before
    assert not (tmp_path / "train.csv").exists()


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [probes.path, probes.load])
def test_unknown_split_names_value_and_choices(function: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"train, validation, test, but got 'dev'"):
        function("dev")


def test_load_gives_frozen_pairs_in_file_order() -> None:
    with probes.path("test").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    assert [[p.sentence1, p.sentence2, p.category, p.template, p.words] for p in ALL["test"]] == [
        [row[0], row[1], *row[3:]] for row in rows
    ]
    assert [pair.score for pair in ALL["test"]] == [float(row[2]) for row in rows]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALL["test"][0].score = 0.5  # type: ignore[misc]


# --- counts and scores -------------------------------------------------------------------------


def test_counts() -> None:
    assert 900 <= len(PAIRS) <= 1200
    shares = {split: len(ALL[split]) / len(PAIRS) for split in probes.SPLITS}
    assert 0.65 <= shares["train"] <= 0.75
    assert min(shares["validation"], shares["test"]) >= 0.12
    total = Counter(pair.category for pair in PAIRS)
    assert tuple(sorted(total)) == tuple(sorted(probes.CATEGORIES))
    assert min(total.values()) >= 50
    for split in ("validation", "test"):
        counts = Counter(pair.category for pair in ALL[split])
        assert all(counts[category] >= 8 for category in probes.CATEGORIES)


def test_scores_follow_the_scheme() -> None:
    assert set(generate.SCORE_RANGES) == set(probes.CATEGORIES)
    for pair in PAIRS:
        low, high = generate.SCORE_RANGES[pair.category]
        assert 0.0 <= low <= pair.score <= high <= 1.0, pair


@pytest.mark.parametrize("split", probes.SPLITS)
def test_mean_scores_are_ordered_by_category(split: str) -> None:
    scores = defaultdict(list)
    for pair in ALL[split]:
        scores[pair.category].append(pair.score)
    order = (
        "paraphrase",
        "synonym",
        "specificity",
        "quantity",
        "role_swap",
        "antonym",
        "unrelated",
    )
    means = [mean(scores[category]) for category in order]
    assert all(left > right for left, right in pairwise(means))
    assert mean(scores["role_swap"]) > mean(scores["negation"]) > mean(scores["unrelated"])
    assert all(len(set(values)) >= 3 for values in scores.values())


def test_docstring_table_states_the_ranges() -> None:
    table = re.findall(r"^(\w+) +(\d\.\d\d)-(\d\.\d\d) ", generate.__doc__ or "", re.M)
    stated = {category: (float(low), float(high)) for category, low, high in table}
    assert stated == generate.SCORE_RANGES


def test_weight_moves_a_score_towards_one() -> None:
    assert generate.weighted(0.2, 1.0) == 0.2
    assert generate.weighted(0.2, 0.75) == 0.4
    assert generate.weighted(0.9, 0.5) == 0.95


# --- separation of the splits ------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), SPLIT_PAIRS)
@pytest.mark.parametrize("column", ["template", "words"])
def test_no_template_and_no_word_pair_crosses_splits(column: str, one: str, other: str) -> None:
    values = [{getattr(pair, column) for pair in ALL[split]} for split in (one, other)]
    assert not values[0] & values[1]


@pytest.mark.parametrize(("one", "other"), SPLIT_PAIRS)
def test_no_sentence_crosses_splits(one: str, other: str) -> None:
    sentences = [
        {text.lower() for pair in ALL[split] for text in (pair.sentence1, pair.sentence2)}
        for split in (one, other)
    ]
    assert not sentences[0] & sentences[1]


@pytest.mark.parametrize(("one", "other"), SPLIT_PAIRS)
def test_no_contrast_word_crosses_splits(one: str, other: str) -> None:
    assert min(len(contrast_words(ALL[split])) for split in (one, other)) > 50
    assert not contrast_words(ALL[one]) & contrast_words(ALL[other])


@pytest.mark.parametrize(("one", "other"), SPLIT_PAIRS)
def test_no_frame_text_crosses_splits(one: str, other: str) -> None:
    def texts(material: Material) -> set[str]:
        slots = [frame.text for frame in slot_frames(material)]
        slots += [frame.text for frame in material.role_frames]
        slots += [frame.affirmative for frame in material.negation_frames]
        return {re.sub(r"\{.*?\}", "_", text).lower() for text in slots}

    assert not texts(MATERIAL[one]) & texts(MATERIAL[other])


@pytest.mark.parametrize("split", probes.SPLITS)
def test_template_ids_are_unique_within_a_split(split: str) -> None:
    material = MATERIAL[split]
    ids = [f"{frame.kind}/{frame.id}" for frame in material.frames]
    for category, frames in material.contrast_frames.items():
        ids += [f"{category}/{frame.kind}/{frame.id}" for frame in frames]
    ids += [f"role/{frame.id}" for frame in material.role_frames]
    ids += [f"negation/{frame.id}" for frame in material.negation_frames]
    ids += [f"negation/{pair.id}" for pair in material.negated_pairs]
    ids += [f"group/{group.id}" for group in (*material.paraphrases, *material.details)]
    assert [name for name, count in Counter(ids).items() if count > 1] == []


def test_all_material_is_used() -> None:
    for split, material in MATERIAL.items():
        templates = " ".join(pair.template for pair in ALL[split])
        words = {filler for pair in ALL[split] for filler in re.split(r"[:|]", pair.words)}
        assert [f.id for f in slot_frames(material) if f.id not in templates] == []
        assert [f.id for f in material.role_frames if f.id not in templates] == []
        assert [f.id for f in material.negation_frames if f.id not in templates] == []
        contrasts = chain.from_iterable(material.contrasts.values())
        assert [c.first for c in contrasts if c.first not in words] == []
        assert [
            f.base for f in material.families if not {f.base, f.synonym, f.unrelated} <= words
        ] == []
        assert [p.first for p in material.role_pairs if p.first not in words] == []
        assert [p.text for p in material.predicates if p.text not in words] == []


# --- sentences ---------------------------------------------------------------------------------


def test_no_pair_is_repeated_and_none_is_a_sentence_with_itself() -> None:
    keys = Counter(frozenset((pair.sentence1, pair.sentence2)) for pair in PAIRS)
    assert [key for key, count in keys.items() if count > 1 or len(key) == 1] == []


def test_sentences_are_well_formed() -> None:
    sentences = {text for pair in PAIRS for text in (pair.sentence1, pair.sentence2)}
    for text in sentences:
        assert re.fullmatch(r"[A-Z][A-Za-z0-9,' -]*[.?]", text), text
        assert "  " not in text
        assert not re.search(r"\b(\w+) \1\b", text, re.I), text
    lengths = [len(words_in(text)) for text in sentences]
    assert min(lengths) >= 3
    assert max(lengths) <= 18
    assert sum(length >= 10 for length in lengths) > 100
    assert any(text.endswith("?") for text in sentences)


def test_indefinite_articles() -> None:
    vowel_but_a = {"useful", "useless"}
    for pair in PAIRS:
        for text in (pair.sentence1, pair.sentence2):
            for article, word in re.findall(r"\b(an?) ([\w-]+)", text, re.I):
                vowel = word[0] in "aeiouAEIOU" and word not in vowel_but_a
                expected = "an" if vowel or word in {"hour", "honest"} else "a"
                assert article.lower() == expected, text


def test_fill_puts_articles_and_a_capital() -> None:
    assert (
        generate.fill("{a x} cat saw {a y}.", x="honest", y="unit") == "An honest cat saw a unit."
    )
    assert generate.fill("{x} is {y}.", x="he", y="up-to-date") == "He is up-to-date."
    with pytest.raises(KeyError):
        generate.fill("{a z}.", x="cat")


# --- what the categories promise ---------------------------------------------------------------


@pytest.mark.parametrize("split", probes.SPLITS)
def test_alternatives_stand_in_the_same_slot(split: str) -> None:
    slots: dict[tuple[str, str], dict[str, ProbePair]] = defaultdict(dict)
    for pair in ALL[split]:
        written = "/written/" in pair.template or "+" in pair.template
        if pair.category in ("synonym", "antonym", "unrelated") and not written:
            category, _, fillers = pair.words.partition(":")
            base, _, other = fillers.partition("|")
            assert category == pair.category
            changed = re.sub(rf"\b(an?) {base}\b|\b{base}\b", "_", pair.sentence1, flags=re.I)
            assert changed == re.sub(
                rf"\b(an?) {other}\b|\b{other}\b", "_", pair.sentence2, flags=re.I
            )
            slots[pair.template, base][category] = pair
    assert len(slots) >= 20
    for alternatives in slots.values():
        assert {"synonym", "unrelated"} <= set(alternatives)
        assert len({pair.sentence1 for pair in alternatives.values()}) == 1
        closest = alternatives.pop("synonym")
        assert all(closest.score > pair.score + 0.3 for pair in alternatives.values())
    assert sum("antonym" in alternatives for alternatives in slots.values()) >= 20


def test_role_swaps_exchange_the_same_words() -> None:
    for pair in PAIRS:
        if pair.category != "role_swap":
            continue
        first, second = pair.words.partition(":")[2].split("|")
        one, other = words_in(pair.sentence1), words_in(pair.sentence2)
        assert one.index(first) < one.index(second)
        if pair.template.endswith(":restated"):
            assert other.index(first) < other.index(second)
            assert "by" in other
        else:
            assert other.index(second) < other.index(first)
            assert sorted(one) == sorted(other)


def test_role_keeping_restatements_reverse_the_order() -> None:
    restated = [p for p in PAIRS if p.category == "paraphrase" and p.template.endswith(":restated")]
    assert len(restated) >= 20
    for pair in restated:
        first, second = pair.words.partition(":")[2].split("|")
        one, other = words_in(pair.sentence1), words_in(pair.sentence2)
        assert one.index(first) < one.index(second)
        if not pair.template.startswith("role/people/betrayed"):
            assert other.index(second) < other.index(first)


def test_exactly_one_side_of_a_negation_is_negated() -> None:
    for pair in PAIRS:
        if pair.category == "negation":
            marker = pair.words.partition(":")[2].partition("|")[0]
            counts = [len(NEGATIONS.findall(text)) for text in (pair.sentence1, pair.sentence2)]
            assert abs(counts[0] - counts[1]) == 1, pair
            holders = [marker in text.lower() for text in (pair.sentence1, pair.sentence2)]
            assert holders.count(True) == 1, pair


def test_unrelated_sentences_score_by_field() -> None:
    assert generate.field_score("food", "food") == generate.SAME_FIELD
    near = generate.field_score("travel", "weather")
    assert near == generate.field_score("weather", "travel") == generate.NEIGHBOURING_FIELD
    assert generate.field_score("food", "law") == generate.DIFFERENT_FIELD
    sentences = [p for p in PAIRS if p.category == "unrelated" and "+" in p.template]
    assert len(sentences) >= 80
    assert all(pair.score <= 0.1 for pair in sentences)


# --- mistakes in the material ------------------------------------------------------------------


def with_train(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    material = dataclasses.replace(MATERIAL["train"], **changes)  # type: ignore[arg-type]
    monkeypatch.setitem(MATERIAL, "train", material)


def test_a_repeated_pair_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_train(monkeypatch, details=MATERIAL["train"].details[:1] * 2)
    with pytest.raises(ValueError, match=r"occur once, but got .*A man is running\."):
        generate.generate("train")


def test_a_sentence_with_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family("person", "bold", "bold", 0.9, None, 0.0, "tall", 0.2)
    with_train(monkeypatch, families=(family,))
    with pytest.raises(ValueError, match=r"two different sentences .*synonym:bold\|bold"):
        generate.generate("train")


def test_a_score_off_the_scheme_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family("person", "bold", "daring", 0.5, None, 0.0, "tall", 0.2)
    with_train(monkeypatch, families=(family,))
    with pytest.raises(ValueError, match=r"'synonym' to be between 0\.85 and 0\.97, but got 0\.50"):
        generate.generate("train")
