"""The benchmark of neutral references: finished layers are kept, others' refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from models import tiny_folder

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():  # an installed copy has none
    pytest.skip("the repository's benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import neutral as benchmark  # noqa: E402


def test_every_length_is_reported_and_finished_layers_are_kept(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    command = ["--output", str(tmp_path / "out"), "--model", str(model), "--lengths", "4-7"]
    assert benchmark.main([*command, "--layers", "2"]) == 0
    file = tmp_path / "out" / "layer-2.json"
    first = file.read_text()
    assert [report["length"] for report in json.loads(first)["solutions"]] == [4, 5, 6, 7]
    assert benchmark.main([*command, "--layers", "2,1"]) == 0
    assert file.read_text() == first
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines[-2:]] == [["| 2", "4"], ["| 1", "4"]]
    with pytest.raises(SystemExit, match="Set --output to another folder"):
        benchmark.main([*command[:-1], "4-8", "--layers", "2"])
    with pytest.raises(SystemExit, match=r'such as "4-64", but got \'many\''):
        benchmark.main([*command[:-1], "many"])
