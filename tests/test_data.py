"""Reading, checking, splitting and batching of pairs."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DistributedSampler

from xsiam.data import PairDataModule, PairDataset, load_pairs
from xsiam.errors import InputError
from xsiam.pairs import text_id
from xsiam.sampling import LengthBucketSampler, ShardedEvaluationSampler
from xsiam.teacher import Teacher

COLUMNS = {
    "sentence1": ["A man sings.", 'NA, or "null"', "1.5", "line one\nline two", " padded "],
    "sentence2": ["A person sings.", "null", "1.50", "naïve 東京 \u2028 text", "None"],
    "score": [0.8, 0.25, 1, 0, 0.5],
    "category": ["paraphrase", "", "quantity", "other", "NA"],
}
HEADER = "sentence1,sentence2,score"


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write `columns` in the format that the ending of `path` says, with foreign writers."""
    frame = datasets.Dataset.from_dict(columns)
    if path.suffix in (".csv", ".tsv"):
        frame.to_pandas().to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        frame.to_pandas().to_parquet(path)
    elif path.suffix == ".json":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        frame.to_pandas().to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        frame.save_to_disk(str(path))
    return path


def csv(tmp_path: Path, *lines: str, header: str = HEADER, name: str = "pairs.csv") -> Path:
    path = tmp_path / name
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def many(tmp_path: Path, n: int, name: str = "many.csv", label: bool = True) -> Path:
    """Write `n` pairs of very different lengths."""
    lines = [f"a{i} {'x' * (i * 37 % 101)},b{i}" + f",{i / n}" * label for i in range(n)]
    return csv(tmp_path, *lines, header=HEADER if label else "sentence1,sentence2", name=name)


def preprocess(texts: Any, role: str | None) -> dict[str, Any]:
    """Stand in for a tokenizer: code points, padded."""
    width = max(map(len, texts))
    ids = [[ord(c) for c in text] + [0] * (width - len(text)) for text in texts]
    return {"input_ids": torch.tensor(ids), "role": role}


def numbers(batches: Any) -> list[int]:
    return [index for batch in batches for index in batch]


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl", "p.json", "p.parquet", "saved"])
def test_every_format_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    pairs = load_pairs(write(tmp_path / name, COLUMNS))
    assert pairs.texts_a == COLUMNS["sentence1"]
    assert pairs.texts_b == COLUMNS["sentence2"]
    assert pairs.labels == COLUMNS["score"]
    assert pairs.extra == {"category": COLUMNS["category"]}
    assert pairs.rows == [1, 2, 3, 4, 5]


def test_changed_file_is_read_anew(tmp_path: Path) -> None:
    assert load_pairs(csv(tmp_path, "a,b,0.5")).labels == [0.5]
    assert load_pairs(csv(tmp_path, "a,b,0.7")).labels == [0.7]


def test_byte_order_mark_and_blank_lines_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b"\xef\xbb\xbfsentence1,sentence2,score\r\n\r\na,b,0.5\r\n\r\nc,d,0.6\r\n\r\n")
    assert load_pairs(path).labels == [0.5, 0.6]


def test_saved_dict_gives_the_split_asked_for(tmp_path: Path) -> None:
    parts = {k: datasets.Dataset.from_dict({**COLUMNS, "category": [k] * 5}) for k in ("a", "dev")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert load_pairs(tmp_path / "d", "dev").extra["category"] == ["dev"] * 5
    with pytest.raises(InputError, match=r"\(a, dev\), but got 'deb'. Did you mean 'dev'"):
        load_pairs(tmp_path / "d", "deb")


def test_selection_in_a_saved_dataset_is_honoured(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(COLUMNS).select([2, 0]).save_to_disk(str(tmp_path / "d"))
    assert load_pairs(tmp_path / "d").texts_a == ["1.5", "A man sings."]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Answer for the hub and record what was asked."""
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict(COLUMNS)

    def names(name: str, config: str | None) -> list[str]:
        if name == "owner/gone":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/gone' doesn't exist.")
        return ["train", "dev", "test"]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    return asked


def test_hub_name_with_configuration_and_slice(hub: list[tuple[Any, ...]]) -> None:
    assert len(load_pairs("owner/name:pair", "train[:5]")) == 5
    assert hub == [("owner/name", "pair", "train[:5]")]


def test_hub_splits_are_found_by_their_usual_names(hub: list[tuple[Any, ...]]) -> None:
    data = PairDataModule(preprocess, name="owner/name", test="train")
    data.setup("fit")
    assert hub == [("owner/name", None, s) for s in ("train", "dev", "train")]


def test_hub_failure_names_the_source(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(InputError, match=r"`data.train`.*'owner/gone': .*doesn't exist"):
        load_pairs("owner/gone", key="data.train")
    assert not hub


@pytest.mark.parametrize("source", ["nowhere", "owner/name/x", "owner/pairs.csv", "./owner/name"])
def test_what_is_no_hub_name_never_reaches_the_hub(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{re.escape(repr(source))} does not exist"):
        load_pairs(source)
    assert not hub


def test_bundled_pairs_are_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = ModuleType("xsiam.probes")
    probes.SPLITS = ("train", "validation", "test")  # type: ignore[attr-defined]
    probes.path = lambda split: csv(tmp_path, f"{split},b,1", name=f"{split}.csv")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xsiam.probes", probes)
    monkeypatch.setattr("xsiam.probes", probes, raising=False)
    data = PairDataModule(preprocess, name="bundled")
    assert [data.pairs(s).texts_a for s in probes.SPLITS] == [["train"], ["validation"], ["test"]]
    with pytest.raises(InputError, match=r"'bundled' \(train, validation, test\), but got 'tes'"):
        load_pairs("bundled", "tes")


def test_progress_bars_are_off_while_loading_and_on_again_after(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "saved", COLUMNS)
    capfd.readouterr()
    load_pairs(tmp_path / "saved")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert not datasets.are_progress_bars_disabled()


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "header",
    [
        "sentence1,sentence2,score",
        "anchor,positive,scores",
        "query,document,label",
        "query,answer,labels",
        "text_a,text_b,similarity",
        "Sentence1,SENTENCE2,Score",
    ],
)
def test_columns_found_by_convention(tmp_path: Path, header: str) -> None:
    pairs = load_pairs(csv(tmp_path, "x,y,0.5", header=header))
    assert (pairs.texts_a, pairs.texts_b, pairs.labels) == (["x"], ["y"], [0.5])


def test_columns_named(tmp_path: Path) -> None:
    path = csv(tmp_path, "x,y,0.5,0.1", header="sentence1,other,gold,score")
    pairs = load_pairs(path, column_a="other", column_b="sentence1", column_label="gold")
    assert (pairs.texts_a, pairs.texts_b, pairs.labels) == (["y"], ["x"], [0.5])
    assert pairs.extra == {"score": ["0.1"]}


@pytest.mark.parametrize(
    ("header", "arguments", "message"),
    [
        ("sentence1,sentense2,score", {}, r"No column is called 'sentence2'.*'sentense2'"),
        ("x,y,score", {}, r"has the columns 'x', 'y', 'score'\. Set `data.column_a`"),
        (
            "first,second,score",
            {"column_a": "first", "column_b": "secnd"},
            r"got 'secnd'.*'second'",
        ),
        ("first,second,score", {"column_a": "first"}, r"but got 'first' and None"),
        ("first,second,score", {"column_a": "first", "column_b": "first"}, r"got 'first' twice"),
        ("sentence1,sentence2,score", {"column_label": "scor"}, r"got 'scor'.*'score'"),
        ("sentence1,sentence2,score", {"column_label": "sentence1"}, r"apart.*'sentence1'"),
        ("query,document,answer", {}, r"has query/document and query/answer"),
        ("sentence1,sentence2,Score", {"column_label": "score"}, r"got 'score'.*'Score'"),
        ("sentence1,sentence2,sentence2", {}, r"has 'sentence2' 2 times"),
    ],
)
def test_wrong_columns(
    tmp_path: Path, header: str, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_pairs(csv(tmp_path, "x,y,0.5", header=header), **arguments)


def test_two_label_columns_are_ambiguous(tmp_path: Path) -> None:
    path = csv(tmp_path, "x,y,0.5,1", header="sentence1,sentence2,score,label")
    with pytest.raises(InputError, match=r"has 'score' and 'label'. Set `data.column_label`"):
        load_pairs(path)
    assert load_pairs(path, column_label="label").labels == [1.0]


# ---------------------------------------------------------------- negatives


def test_negatives_are_found_by_convention_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    header = "negative_10,anchor,Negative_2,positive,negative,negatively,negative_x"
    path = csv(tmp_path, "ten,a,two,b,first,no,no", header=header)
    pairs = load_pairs(path, labels="forbidden", negatives="optional")
    assert pairs.negatives == {"negative": ["first"], "Negative_2": ["two"], "negative_10": ["ten"]}
    assert pairs.extra == {"negatively": ["no"], "negative_x": ["no"]}
    assert (pairs.texts_a, pairs.texts_b) == (["a"], ["b"])


def test_negatives_are_named_in_the_order_given(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,x,y,z", header="anchor,positive,one,two,negative")
    pairs = load_pairs(
        path, labels="forbidden", negatives="required", columns_negative=["two", "one"]
    )
    assert pairs.negatives == {"two": ["y"], "one": ["x"]}
    assert pairs.extra == {"negative": ["z"]}


def test_negative_rules(tmp_path: Path) -> None:
    header = "anchor,positive,negative"
    triplets = csv(tmp_path, "a,b,c", header=header)
    bare = csv(tmp_path, "a,b", header="anchor,positive", name="bare.csv")

    def load(path: Path, rule: Any, named: list[str] | None = None) -> dict[str, list[str]]:
        return load_pairs(
            path, labels="forbidden", negatives=rule, columns_negative=named
        ).negatives

    assert load(triplets, "optional") == load(triplets, "required") == {"negative": ["c"]}
    assert load(triplets, "available") == load(triplets, "available", ["negative"])
    assert load(bare, "optional") == load(bare, "forbidden") == load(bare, "unused") == {}
    assert load(triplets, "forbidden", []) == load(triplets, "optional", []) == {}
    assert load(bare, "available", ["other"]) == {}
    unused = load_pairs(triplets, labels="forbidden")
    assert (unused.negatives, unused.extra) == ({}, {"negative": ["c"]})
    with pytest.raises(
        InputError, match=r"since the objective uses none.*has 'negative'.*`data.columns_neg"
    ):
        load(triplets, "forbidden")
    with pytest.raises(InputError, match=r"these pairs are used with none.*has 'negative'"):
        load(triplets, "unused", ["negative"])
    with pytest.raises(
        InputError, match=r"needs them.*has the columns 'anchor', 'positive'.*is None. Set `data.c"
    ):
        load(bare, "required")
    with pytest.raises(InputError, match=r"`data.columns_negative` is \[\]"):
        load(triplets, "required", [])


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["negativ"], r"`data.columns_negative` to be a column.*got 'negativ'.*'negative'"),
        (["positive"], r"'anchor' and 'positive', but got 'positive' in \['positive'\]"),
        (["negative", "negative"], r"once .* but got 'negative' in"),
    ],
)
def test_wrong_negative_columns(tmp_path: Path, named: list[str], message: str) -> None:
    path = csv(tmp_path, "a,b,c", header="anchor,positive,negative")
    with pytest.raises(InputError, match=message):
        load_pairs(path, labels="forbidden", negatives="optional", columns_negative=named)


def test_negative_columns_with_the_same_number_are_refused(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,c,d", header="anchor,positive,negative_1,negative_01")
    with pytest.raises(InputError, match=r"has 'negative_1' and 'negative_01'. Set `data.columns"):
        load_pairs(path, labels="forbidden", negatives="optional")


def test_label_column_that_is_one_of_negatives_is_refused(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,c", header="anchor,positive,negative")
    with pytest.raises(InputError, match=r"apart.*'negative'"):
        load_pairs(path, negatives="optional", column_label="negative")


def test_empty_negative_is_named_with_its_row(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,c", "a,b,", header="anchor,positive,negative")
    with pytest.raises(InputError, match=r"'negative'.*an empty text in data row 2 \(line 3\)"):
        load_pairs(path, labels="forbidden", negatives="optional")


def test_selection_and_lengths_include_negatives() -> None:
    pairs = PairDataset(["a", "bb"], ["c", "d"], negatives={"negative": ["xyz", "uvwx"]})
    assert pairs.lengths == [5, 7]
    assert pairs.select([1]).negatives == {"negative": ["uvwx"]}
    assert pairs[1] == {"a": ["bb"], "b": ["d"], "index": [1], "negatives": [["uvwx"]]}


def test_number_of_a_text_is_the_same_everywhere() -> None:
    texts = ["", "a", "A", " a", "naïve 東京", "\ud800"]
    numbers_of = [text_id(text) for text in texts]
    assert len(set(numbers_of)) == len(texts)
    assert all(-(2**63) <= number < 2**63 for number in numbers_of)
    assert text_id("a") == 4681665781835383343  # not Python's hash, which differs by process


# ---------------------------------------------------------------- one column of texts


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a", "b"], [("a", "b")]),
        (["a", "b", "c"], [("a", "b"), ("c", "a")]),
        (["a", "b", "c", "d"], [("a", "b"), ("c", "d")]),
        (["a", "b", "c", "d", "a"], [("a", "b"), ("c", "d"), ("a", "a")]),
    ],
)
def test_texts_that_follow_each_other_are_pairs(
    tmp_path: Path, texts: list[str], expected: list[tuple[str, str]]
) -> None:
    path = csv(tmp_path, *(f"{text},0.5" for text in texts), header="text,score")
    pairs = load_pairs(path, labels="optional", one_column=True)
    assert list(zip(pairs.texts_a, pairs.texts_b, strict=True)) == expected
    assert (pairs.labels, pairs.extra, pairs.negatives) == (None, {}, {})
    assert pairs.rows == [1 + 2 * i for i in range(len(expected))]
    assert pairs.select([0]).texts_b == ["b"]


@pytest.mark.parametrize(
    ("header", "named", "texts"),
    [
        ("text,other", None, ["a", "c"]),
        ("Sentence,text_a", None, ["a", "c"]),
        ("other,sentences", None, ["b", "d"]),
        ("other,text", "other", ["a", "c"]),
        ("sentence1,sentence2", "sentence2", ["b", "d"]),
    ],
)
def test_one_column_is_found_or_named(
    tmp_path: Path, header: str, named: str | None, texts: list[str]
) -> None:
    pairs = load_pairs(
        csv(tmp_path, "a,b", "c,d", header=header),
        column_a=named,
        labels="unread",
        one_column=True,
    )
    assert [*pairs.texts_a, *pairs.texts_b] == texts


def test_two_columns_of_pairs_come_before_one(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,c,0.5", header="sentence1,sentence2,text,score")
    pairs = load_pairs(path, labels="unread", one_column=True)
    assert (pairs.texts_a, pairs.texts_b, pairs.labels) == (["a"], ["b"], None)
    assert pairs.extra == {"text": ["c"], "score": ["0.5"]}
    named = load_pairs(
        path, column_a="text", column_b="sentence1", labels="required", one_column=True
    )
    assert (named.texts_a, named.texts_b, named.labels) == (["c"], ["a"], [0.5])


def test_labels_that_are_unread_may_be_anything(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,high,7", "c,d,,", header="sentence1,sentence2,score,label")
    pairs = load_pairs(path, labels="unread", column_label="score")
    assert pairs.labels is None
    assert pairs.extra == {"score": ["high", ""], "label": ["7", ""]}


@pytest.mark.parametrize(
    ("header", "rows", "one_column", "match"),
    [
        ("text", ["a"], True, r"2 texts or more in column 'text'.* has 1"),
        ("text", ["a", '" "'], True, r"'text' to hold texts, but got whitespace.*data row 2"),
        ("text,sentence", ["a,b"], True, r"one column of texts.*'text' and 'sentence'. Set `data."),
        ("words", ["a"], True, r"has the columns 'words'. Set .*`, or `data.column_a` alone\."),
        ("text", ["a"], False, r"one column \('text'\) is enough for objective 'distillation'\."),
    ],
)
def test_one_column_that_does_not_fit_is_refused(
    tmp_path: Path, header: str, rows: list[str], one_column: bool, match: str
) -> None:
    with pytest.raises(InputError, match=match):
        load_pairs(csv(tmp_path, *rows, header=header), labels="unread", one_column=one_column)


# ---------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("c,,0.5", r"'sentence2'.*an empty text in data row 2 \(line 3\) of .*pairs.csv"),
        (" \t ,d,0.5", r"'sentence1'.*whitespace only \(' \\t '\) in data row 2 \(line 3\)"),
        ("c,d,", r"'score' has none in data row 2 \(line 3\).*\(1 of 3 rows have none\)"),
        ("c,d,nan", r"'score'.*finite.*got 'nan' in data row 2 \(line 3\)"),
        ("c,d,-inf", r"got '-inf' in data row 2"),
        ("c,d,high", r"got 'high' in data row 2"),
        ("c,d,1_0", r"got '1_0' in data row 2"),
        ("c,d,3.8", r"between 0 and 1.*got 3.8 in data row 2 .*`data.label_range=\[0,5\]`"),
        ("c,d,-0.5", r"got -0.5 in data row 2 .*`data.label_range=\[-1,1\]`"),
        ("c,d,80", r"got 80.0 in data row 2 .*\(1 of 3 labels.*`data.label_range=\[0.5,80\]`"),
        ("c,d", r"Expected 3 cells.*data row 2 \(line 3\) of .*pairs.csv' has 2"),
        ("c,d,e,0.5", r"data row 2 \(line 3\) of .*pairs.csv' has 4"),
        ('"c"x,d,0.5', r"the record at line 3 is not"),
        ('"c,d,0.5', r"the record at line 3 is not"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_pairs(csv(tmp_path, "a,b,0.5", row, "e,f,0.6"))


def test_line_is_counted_in_the_file_and_row_in_the_data(tmp_path: Path) -> None:
    path = csv(tmp_path, '"a\nmore",b,0.5', "", "c,,0.5")
    with pytest.raises(InputError, match=r"data row 2 \(line 5\)"):
        load_pairs(path)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"sentence2": 7}, r"'sentence2'.*got 7 \(int\) in data row 2 \(line 2\)"),
        ({"sentence1": None}, r"'sentence1'.*got None \(NoneType\) in data row 2"),
        ({"sentence1": ["x"]}, r"got \['x'\] \(list\) in data row 2"),
        ({"score": float("nan")}, r"'score'.*got nan in data row 2"),
        ({"score": float("inf")}, r"'score'.*got inf in data row 2"),
        ({"score": True}, r"'score'.*got True in data row 2"),
        ({"score": None}, r"'score' has none in data row 2"),
    ],
)
def test_bad_json_value_is_named(tmp_path: Path, cell: dict[str, Any], message: str) -> None:
    good = {"sentence1": "a", "sentence2": "b", "score": 0.5}
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (good, {**good, **cell})))
    with pytest.raises(InputError, match=message):
        load_pairs(path)


def test_key_missing_in_one_json_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "score": 1}'
    )
    with pytest.raises(InputError, match=r"'sentence2'.*got None .*data row 2 \(line 2\)"):
        load_pairs(path)


def test_row_is_named_in_a_table_without_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", {**COLUMNS, "sentence1": ["a", "b", "", "d", "e"]})
    with pytest.raises(InputError, match=r"an empty text in data row 3 of .*p.parquet"):
        load_pairs(path)


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"", r"'.*p.csv' is an empty file"),
        ("p.csv", b"\n\n", r"p.csv' to start with a header"),
        ("p.csv", b"sentence1,sentence2,score\n", r"p.csv has none"),
        ("p.json", b"[]", r"p.json has none"),
        ("p.json", b"[3]", r"data row 1 of .*p.json is '3'"),
        ("p.json", b'[{"a": 1},\n oops]', r"p.json' .* line 2 is not valid JSON"),
        ("p.jsonl", b'{"a": 1}\n\n{"a"', r"line 3 is not valid JSON"),
        ("p.parquet", b"no parquet", r"p.parquet' to be a Parquet file"),
        ("p.csv", b"sentence1,sentence2,score\ncaf\xe9,b,1\n", r"byte 29 is 0xe9"),
        ("p.txt", b"a b", r"one of .csv, .*got '.*p.txt'"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_pairs(tmp_path / name)


def test_missing_file_is_named_with_its_key_and_a_near_one(tmp_path: Path) -> None:
    csv(tmp_path, "a,b,0.5", name="train.csv")
    data = PairDataModule(preprocess, train=tmp_path / "trian.csv")
    with pytest.raises(InputError, match=r"`data.train` .*trian.csv' does not exist.*'train.csv'"):
        data.setup()


def test_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{str(tmp_path)!r} cannot be read as one")):
        load_pairs(tmp_path)


# ---------------------------------------------------------------- labels


def test_label_rules(tmp_path: Path) -> None:
    labelled = csv(tmp_path, "a,b,0.5")
    bare = csv(tmp_path, "a,b", header="sentence1,sentence2", name="bare.csv")
    with pytest.raises(
        InputError, match=r"has the columns 'sentence1', 'sentence2' and `data.colu"
    ):
        load_pairs(bare, labels="required")
    with pytest.raises(InputError, match=r"has 'score'. Set `data.column_label=none`"):
        load_pairs(labelled, labels="forbidden")
    with pytest.raises(InputError, match=r"`data.column_label` is 'none'"):
        load_pairs(labelled, column_label="none")
    assert load_pairs(bare, labels="optional").labels is None
    assert load_pairs(bare, labels="forbidden").labels is None
    assert load_pairs(labelled, labels="optional").labels == [0.5]
    ignored = load_pairs(labelled, labels="forbidden", column_label="none")
    assert ignored.labels is None
    assert ignored.extra == {"score": ["0.5"]}


def test_empty_label_column_is_unlabelled_and_a_partly_filled_one_an_error(tmp_path: Path) -> None:
    empty = csv(tmp_path, "a,b,", "c,d,")
    assert load_pairs(empty, labels="optional").labels is None
    with pytest.raises(InputError, match=r"data row 1 \(line 2\).*\(2 of 2 rows"):
        load_pairs(empty)
    with pytest.raises(InputError, match=r"data row 2 \(line 3\).*\(1 of 2 rows"):
        load_pairs(csv(tmp_path, "a,b,0.5", "c,d,"), labels="optional")


def test_label_range_maps_linearly_onto_the_expected_range(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,1", "a,b,2", "a,b,5")
    assert load_pairs(path, label_range=[1, 5]).labels == [0, 0.25, 1]
    assert load_pairs(path, label_range=[1, 5], expected_range=(-1, 1)).labels == [-1, -0.5, 1]
    assert load_pairs(path, expected_range=(1, 5)).labels == [1, 2, 5]
    assert load_pairs(path, expected_range=(-np.inf, np.inf)).labels == [1, 2, 5]


def test_label_outside_the_label_range(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,5", "a,b,5.5")
    with pytest.raises(
        InputError, match=r"between 0 and 5, as `data.label_range`.*got 5.5 .*row 2"
    ):
        load_pairs(path, label_range=[0, 5])


@pytest.mark.parametrize("given", [[5, 0], [1, 1], [0], [0, 1, 2], [0, float("inf")], ["x", 1]])
def test_wrong_label_range(tmp_path: Path, given: list[Any]) -> None:
    with pytest.raises(InputError, match=re.escape(f"but got {given}")):
        load_pairs(csv(tmp_path, "a,b,0.5"), label_range=given)


# ---------------------------------------------------------------- splits


def test_files_by_split(tmp_path: Path) -> None:
    paths = {s: csv(tmp_path, f"{s},b,1", name=f"{s}.csv") for s in ("train", "validation", "test")}
    data = PairDataModule(preprocess, **paths)
    data.setup()
    assert [data.pairs(s).texts_a for s in paths] == [["train"], ["validation"], ["test"]]


def test_file_beside_a_named_dataset(tmp_path: Path) -> None:
    datasets.DatasetDict(
        {s: datasets.Dataset.from_dict({**COLUMNS, "x": [s] * 5}) for s in ("train", "extra")}
    ).save_to_disk(str(tmp_path / "d"))
    test = csv(tmp_path, "file,b,1")
    data = PairDataModule(preprocess, name=str(tmp_path / "d"), validation="extra", test=test)
    data.setup("fit")
    assert data.pairs("train").extra["x"] == ["train"] * 5
    assert data.pairs("validation").extra["x"] == ["extra"] * 5
    assert data.pairs("test").texts_a == ["file"]


def test_fractions_are_disjoint_seeded_and_complete(tmp_path: Path) -> None:
    path = many(tmp_path, 50)

    def cut(seed: int) -> list[list[int]]:
        data = PairDataModule(
            preprocess, train=path, validation_fraction=0.2, test_fraction=0.1, seed=seed
        )
        data.setup()
        return [data.pairs(split).rows for split in ("train", "validation", "test")]

    parts = cut(3)
    assert [len(rows) for rows in parts] == [35, 10, 5]
    assert sorted(chain(*parts)) == list(range(1, 51))
    assert parts == cut(3) != cut(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_fraction": 1.5}, r"`data.validation_fraction`.*but got 1.5"),
        ({"validation_fraction": 0.6, "test_fraction": 0.5}, r"add up to 1.1"),
        ({"test": "t.csv", "test_fraction": 0.5}, r"got 't.csv' and 0.5"),
        ({"batch_size": 0}, r"`data.batch_size` to be 1 or more, but got 0"),
        ({"num_workers": -1}, r"`data.num_workers`.*but got -1"),
        ({"limit": 0}, r"`data.limit`.*but got 0"),
        ({"seed": -3}, r"`seed`.*but got -3"),
    ],
)
def test_wrong_argument_fails_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PairDataModule(preprocess, train="t.csv", **arguments)


def test_fractions_that_leave_nothing(tmp_path: Path) -> None:
    data = PairDataModule(preprocess, train=many(tmp_path, 2), validation_fraction=0.9)
    with pytest.raises(InputError, match=r"they take 2 of 2"):
        data.setup()


@pytest.mark.parametrize("name", ["nowhere", "pairs.csv"])
def test_name_that_holds_no_splits(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"`data.name`.*but got {name!r}"):
        PairDataModule(preprocess, name=name).setup()


def test_missing_split_says_which_key_to_set(tmp_path: Path) -> None:
    data = PairDataModule(preprocess, train=many(tmp_path, 4))
    assert not data.has("test")
    assert data.val_dataloader() == []
    with pytest.raises(InputError, match=r"Expected test pairs.*`data.test`"):
        data.test_dataloader()
    with pytest.raises(InputError, match=r"but got 'dev'"):
        data.pairs("dev")


def test_label_rules_by_split(tmp_path: Path) -> None:
    labelled, bare = many(tmp_path, 4), many(tmp_path, 4, "bare.csv", label=False)
    PairDataModule(preprocess, train=labelled, validation=labelled, test=bare).setup("fit")
    PairDataModule(preprocess, train=bare, validation=labelled, needs_label=False).setup("fit")
    with pytest.raises(InputError, match=r"bare.csv has the columns"):
        PairDataModule(preprocess, train=labelled, validation=bare).setup("fit")
    with pytest.raises(InputError, match=r"many.csv has 'score'. Set `data.column_label=none`"):
        PairDataModule(preprocess, train=labelled, needs_label=False).setup("fit")


def test_negative_rules_by_split(tmp_path: Path) -> None:
    triplets = csv(tmp_path, "a,b,c", "d,e,f", header="anchor,positive,negative")
    bare = csv(tmp_path, "a,b", "c,d", header="anchor,positive", name="bare.csv")

    def data(train: Path, validation: Path, rule: Any, **more: Any) -> PairDataModule:
        module = PairDataModule(
            preprocess,
            train=train,
            validation=validation,
            needs_label=False,
            negatives=rule,
            **more,
        )
        module.setup("fit")
        return module

    assert data(triplets, bare, "required").pairs("validation").negatives == {}
    both = data(bare, triplets, "optional")
    assert [len(both.pairs(split).negatives) for split in ("train", "validation")] == [0, 1]
    assert data(bare, triplets, "forbidden").pairs("validation").extra == {"negative": ["c", "f"]}
    assert data(triplets, triplets, "forbidden", columns_negative=[]).pairs("train").extra
    with pytest.raises(InputError, match=r"since the objective needs them.*bare.csv"):
        data(bare, triplets, "required")
    with pytest.raises(InputError, match=r"since the objective uses none.*pairs.csv"):
        data(triplets, bare, "forbidden")


@pytest.mark.parametrize(
    ("n", "batch_size", "refused"), [(4, 1, True), (5, 4, True), (1, 4, True), (6, 4, False)]
)
def test_batches_of_one_pair_are_refused_where_pairs_are_compared(
    tmp_path: Path, n: int, batch_size: int, refused: bool
) -> None:
    header = "anchor,positive,negative"
    path = csv(tmp_path, *(f"a{i},b{i},c{i}" for i in range(n)), header=header)
    more = {"train": path, "batch_size": batch_size, "needs_label": False, "negatives": "optional"}
    bare = {**more, "columns_negative": []}
    PairDataModule(preprocess, **bare).train_dataloader()  # type: ignore[arg-type]
    PairDataModule(preprocess, **more, in_batch=True).train_dataloader()  # type: ignore[arg-type]
    data = PairDataModule(preprocess, **bare, in_batch=True)  # type: ignore[arg-type]
    if not refused:
        assert len(data.train_dataloader()) == 2
        return
    match = rf"{n} training pairs in batches of {batch_size} leave a batch of 1. Set `data.batch_s"
    with pytest.raises(InputError, match=match):
        data.train_dataloader()


def test_one_pair_a_process_is_a_batch_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    data = PairDataModule(preprocess, train=many(tmp_path, 7), batch_size=1, in_batch=True)
    assert len(data.train_dataloader()) == 3


def test_bad_test_data_stops_training_before_it_begins(tmp_path: Path) -> None:
    bad = csv(tmp_path, "a,b,7")
    data = PairDataModule(preprocess, train=many(tmp_path, 4), test=bad)
    with pytest.raises(InputError, match=r"got 7.0 in data row 1"):
        data.setup("fit")
    data.setup("validate")  # nothing of that stage is wrong


def test_limit(tmp_path: Path) -> None:
    data = PairDataModule(preprocess, train=many(tmp_path, 20), validation_fraction=0.5, limit=3)
    assert (len(data.pairs("train")), len(data.pairs("validation"))) == (3, 3)


# ---------------------------------------------------------------- batches


def test_batch_holds_what_it_says(tmp_path: Path) -> None:
    data = PairDataModule(
        preprocess, train=many(tmp_path, 10), batch_size=4, role_a="query", role_b="document"
    )
    seen = []
    for batch in data.train_dataloader():
        rows = batch["index"].tolist()
        expected = data.pairs("train").select(rows)
        assert batch["a"]["role"] == "query"
        assert batch["b"]["role"] == "document"
        assert torch.equal(batch["a"]["input_ids"], preprocess(expected.texts_a, None)["input_ids"])
        assert torch.equal(batch["b"]["input_ids"], preprocess(expected.texts_b, None)["input_ids"])
        assert torch.equal(batch["label"], torch.tensor(expected.labels))
        assert (batch["label"].dtype, batch["index"].dtype) == (torch.float32, torch.int64)
        seen += rows
    assert sorted(seen) == list(range(10))


def test_unlabelled_batch_has_no_label(tmp_path: Path) -> None:
    data = PairDataModule(preprocess, test=many(tmp_path, 3, label=False))
    assert set(next(iter(data.test_dataloader()))) == {"a", "b", "index", "text_ids"}


def test_batch_holds_negatives_and_numbers_of_texts(tmp_path: Path) -> None:
    header = "anchor,positive,negative,negative_1"
    path = csv(tmp_path, "a,b,a,d", "e,b,g,h", header=header)
    data = PairDataModule(
        preprocess,
        train=path,
        needs_label=False,
        negatives="optional",
        in_batch=True,
        role_b="document",
    )
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"a", "b", "negatives", "index", "text_ids"}
    pairs = data.pairs("train").select(batch["index"].tolist())
    for features, texts in zip(batch["negatives"], pairs.negatives.values(), strict=True):
        assert torch.equal(features["input_ids"], preprocess(texts, None)["input_ids"])
        assert features["role"] == "document"
    columns = [pairs.texts_a, pairs.texts_b, *pairs.negatives.values()]
    assert batch["text_ids"].tolist() == [
        [text_id(t) for t in row] for row in zip(*columns, strict=True)
    ]
    assert batch["text_ids"].dtype == torch.int64
    assert len(batch["text_ids"].unique()) == 6


class Lengths(Teacher):
    """A teacher whose embeddings are the lengths of texts and of roles, and that writes no file."""

    def __init__(self) -> None:
        self.asked: list[dict[str | None, list[str]]] = []

    def prepare(self, texts: Any, device: Any = "cpu") -> None:
        self.asked.append(texts)

    def vectors(self, texts: Any, role: str | None = None) -> torch.Tensor:
        return torch.tensor([[float(len(text)), len(role or "")] for text in texts])


def test_teacher_embeds_all_texts_and_batches_hold_its_embeddings(tmp_path: Path) -> None:
    teacher = Lengths()
    data = PairDataModule(
        preprocess,
        train=csv(tmp_path, "a,bb,9", "ccc,dddd,high", "e,f,"),
        validation=csv(tmp_path, "gg", "h", header="text", name="dev.csv"),
        test=csv(tmp_path, "i,jj,0.25", name="test.csv"),
        batch_size=2,
        role_a="query",
        role_b="doc",
        needs_label=False,
        in_batch=True,
        teacher=teacher,
    )
    data.prepare_data()
    texts = {"query": ["a", "ccc", "e", "gg", "i"], "doc": ["bb", "dddd", "f", "h", "jj"]}
    assert teacher.asked == [texts]
    seen = []
    for batch in data.train_dataloader():  # the last one is a single pair, which has two texts
        assert set(batch) == {"a", "b", "index", "teacher"}
        pairs = data.pairs("train").select(batch["index"].tolist())
        assert batch["teacher"].tolist() == [
            [[len(a), 5], [len(b), 3]] for a, b in zip(pairs.texts_a, pairs.texts_b, strict=True)
        ]
        seen += batch["index"].tolist()
    assert sorted(seen) == [0, 1, 2]
    assert set(next(iter(data.val_dataloader()))) == {"a", "b", "index", "teacher"}
    assert set(next(iter(data.test_dataloader()))) == {"a", "b", "index", "label", "teacher"}


def test_workers_give_the_same_batches(tmp_path: Path) -> None:
    path = many(tmp_path, 9)
    here, there = (
        [
            b["index"].tolist()
            for b in PairDataModule(preprocess, test=path, num_workers=n).test_dataloader()
        ]
        for n in (0, 1)
    )
    assert here == there


LENGTHS = np.random.default_rng(0).integers(1, 400, 1003).tolist()


@pytest.mark.parametrize("bucket", [True, False])
def test_every_row_once_an_epoch_on_one_process(bucket: bool) -> None:
    sampler = LengthBucketSampler(LENGTHS, 16, bucket=bucket)
    batches = list(sampler)
    assert sorted(numbers(batches)) == list(range(1003))
    assert len(batches) == len(sampler) == 63
    assert sorted(map(len, batches)) == [11] + [16] * 62


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthBucketSampler(LENGTHS, 16, seed=seed)
        sampler.set_epoch(epoch)
        list(sampler)  # having been used before changes nothing
        return list(sampler)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert orders == [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), list(LengthBucketSampler(LENGTHS, 16))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert first == list(LengthBucketSampler(LENGTHS, 16))


def padding(batches: list[list[int]]) -> float:
    """Return the share of a batch that is padding."""
    cells = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)
    return 1 - sum(LENGTHS) / cells


def test_bucketing_saves_padding_and_batches_come_in_random_order() -> None:
    bucketed = list(LengthBucketSampler(LENGTHS, 16))
    # Measured: 0.036 against 0.456.
    assert (
        padding(bucketed)
        < 0.15
        < 0.35
        < padding(list(LengthBucketSampler(LENGTHS, 16, bucket=False)))
    )
    longest = [max(LENGTHS[i] for i in batch) for batch in bucketed]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.5


@pytest.mark.parametrize("n", [2, 5, 64, 1003])
@pytest.mark.parametrize("world", [2, 5])
def test_training_shares_are_equal_and_leave_nothing_out(n: int, world: int) -> None:
    if n < world:
        with pytest.raises(InputError, match=rf"at least {world} rows.*but got {n}"):
            LengthBucketSampler(LENGTHS[:n], 4, num_replicas=world)
        return
    ranks = [LengthBucketSampler(LENGTHS[:n], 4, num_replicas=world, rank=r) for r in range(world)]
    for rank in ranks:
        rank.set_epoch(2)
    shares = [list(rank) for rank in ranks]
    sizes = [list(map(len, share)) for share in shares]
    assert all(size == sizes[0] for size in sizes)
    assert len(sizes[0]) == len(ranks[0])
    counts = Counter(numbers(list(chain(*shares))))
    assert set(counts) == set(range(n))
    assert sum(counts.values()) - n == -n % world


def test_all_processes_work_on_similar_lengths_at_a_step() -> None:
    ranks = [list(LengthBucketSampler(LENGTHS, 8, num_replicas=2, rank=r)) for r in (0, 1)]
    # Two batches of 8 of the same step hold what one batch of 16 does.
    assert padding([a + b for a, b in zip(*ranks, strict=True)]) < 0.08


@pytest.mark.parametrize("n", [5, 6, 63, 64, 65, 1003])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("by_length", [True, False])
def test_evaluation_counts_no_row_twice(
    n: int, batch_size: int, world: int, by_length: bool
) -> None:
    lengths = LENGTHS[:n] if by_length else None
    ranks = [
        ShardedEvaluationSampler(n, batch_size, lengths=lengths, num_replicas=world, rank=rank)
        for rank in range(world)
    ]
    shares = [list(rank) for rank in ranks]
    assert sorted(numbers(list(chain(*shares)))) == list(range(n))
    assert {len(share) for share in shares} == {len(ranks[0])}
    limit = 2 if batch_size == 1 and world > 1 else batch_size
    assert all(0 < len(batch) <= limit for share in shares for batch in share)


def test_evaluation_keeps_the_order_without_lengths_and_sorts_with_them() -> None:
    assert list(ShardedEvaluationSampler(5, 2, num_replicas=2, rank=1)) == [[1], [3]]
    assert list(ShardedEvaluationSampler(4, 2, lengths=[9, 1, 5, 1])) == [[1, 3], [2, 0]]


def test_rank_outside_the_world() -> None:
    with pytest.raises(InputError, match=r"between 0 and 1 for 2 processes, but got 2"):
        ShardedEvaluationSampler(8, 2, num_replicas=2, rank=2)


def test_processes_are_learned_from_torch_distributed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    data = PairDataModule(preprocess, train=many(tmp_path, 7), validation=many(tmp_path, 7))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert (loader.sampler.num_replicas, loader.sampler.rank) == (3, 2)  # type: ignore[union-attr]


# ---------------------------------------------------------------- under Lightning's trainer


class Recorder(LightningModule):
    """Train one number and write down which rows came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: list[list[int]] = []
        self.validated: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        self.epochs[-1] += batch["index"].tolist()
        return (self.weight - batch["label"]).square().mean()

    def validation_step(self, batch: dict[str, Any]) -> None:
        self.validated += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(tmp_path: Path, max_epochs: int, **arguments: Any) -> tuple[Recorder, Trainer]:
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=arguments.pop("use_distributed_sampler", True),
    )
    path = many(tmp_path, 21)
    data = PairDataModule(preprocess, train=path, validation=path, batch_size=4, eval_batch_size=4)
    module = Recorder()
    trainer.fit(module, datamodule=data, **arguments)
    return module, trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_trainer_sets_the_epoch_and_keeps_the_samplers(
    tmp_path: Path, use_distributed_sampler: bool
) -> None:
    module, trainer = train(tmp_path, 2, use_distributed_sampler=use_distributed_sampler)
    assert trainer.num_training_batches == 6
    assert [sorted(epoch) for epoch in module.epochs] == [list(range(21))] * 2
    assert module.epochs[0] != module.epochs[1]
    assert sorted(module.validated) == sorted(2 * list(range(21)))
    assert isinstance(trainer.train_dataloader.sampler, LengthBucketSampler)
    # What makes Lightning leave a sampler alone on several processes:
    assert isinstance(trainer.train_dataloader.sampler, DistributedSampler)
    assert isinstance(trainer.val_dataloaders.sampler, DistributedSampler)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_resumed_run_sees_the_same_order(tmp_path: Path) -> None:
    whole, _ = train(tmp_path, 3)
    _, first = train(tmp_path, 2)
    first.save_checkpoint(tmp_path / "x.ckpt")
    resumed, _ = train(tmp_path, 3, ckpt_path=tmp_path / "x.ckpt")
    assert resumed.epochs == whole.epochs[2:]


def test_single_row_is_a_batch_of_one() -> None:
    pairs = PairDataset(["a", "b"], ["c", "d"], rows=[1, 2])
    assert pairs[1] == {"a": ["b"], "b": ["d"], "index": [1]}
