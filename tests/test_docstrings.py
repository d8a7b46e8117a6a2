"""The benchmark of contrastive training: its pairs, their split, and the interval it reports."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():  # an installed copy has none
    pytest.skip("the repository's benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import docstrings  # noqa: E402
from docstrings import Pair  # noqa: E402


@pytest.mark.parametrize(
    ("text", "anchor", "positive"),
    [
        ("Return the sum.  Of all\n numbers here.", "Return the sum.", "Of all numbers here."),
        ("Print a table\n\nwith one row each.", "Print a table", "with one row each."),
        ("Is it so? It may\nbe so.", "Is it so?", "It may be so."),
    ],
)
def test_first_sentence_and_rest_are_a_pair(text: str, anchor: str, positive: str) -> None:
    assert docstrings.pair_of(text, "m") == Pair(anchor, positive, "m")


@pytest.mark.parametrize("text", ["One sentence only.", "Too short. What is left of it."])
def test_what_says_too_little_is_no_pair(text: str) -> None:
    assert docstrings.pair_of(text, "m") is None


def test_pairs_are_parsed_from_sources_and_no_text_repeats(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "test").mkdir()
    body = '"""Work with objects.\n\nThey are read and written."""\n'
    method = 'class A:\n    def f(self):\n        """Read all of it. And give it back."""\n'
    (tmp_path / "json" / "__init__.py").write_text(body + method)
    (tmp_path / "json" / "again.py").write_text(body + "raise SystemExit('imported')\n")
    (tmp_path / "json" / "test" / "t.py").write_text('"""Test of it all. Nothing to learn here."""')
    (tmp_path / "json" / "broken.py").write_text("def")
    (tmp_path / "mine.py").write_text('"""Not of the library. Nothing to learn here."""')
    assert docstrings.collect(tmp_path) == [
        Pair("Work with objects.", "They are read and written.", "json"),
        Pair("Read all of it.", "And give it back.", "json"),
    ]


def test_modules_are_shared_out_as_wholes() -> None:
    pairs = [Pair(f"{m} {i}", f"{i} {m}", f"m{m}") for m in range(30) for i in range(1 + m % 5)]
    splits = docstrings.share_out(pairs)
    assert splits == docstrings.share_out(pairs)
    assert sorted(p.anchor for some in splits.values() for p in some) == sorted(
        p.anchor for p in pairs
    )
    modules = [{p.module for p in splits[split]} for split in docstrings.SPLITS]
    assert sum(map(len, modules)) == len(set().union(*modules)) == 30
    shares = [len(splits[split]) / len(pairs) for split in docstrings.SPLITS]
    assert shares == pytest.approx(docstrings.SHARES, abs=0.06)


def test_the_interval_is_that_of_modules_not_of_pairs() -> None:
    """Two modules of many equal pairs: of their mean one knows as little as of two numbers."""
    modules = ["a"] * 50 + ["b"] * 50
    base = np.zeros((100, 4))
    trained = np.repeat([[0.0], [1.0]], 50, axis=0) * np.ones(4)
    found = docstrings.compare({"base": base, "trained": trained}, modules)
    row = found["figures"]["mrr@10"]
    assert row["difference"] == 0.5
    assert row["interval"] == [0.0, 1.0]
    constant = docstrings.compare({"base": base, "trained": base + 0.25}, modules)
    assert constant["figures"]["recall@1"]["interval"] == pytest.approx([0.25, 0.25])
