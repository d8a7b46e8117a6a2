"""The study of references in training: its runs, what it measures, and how it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from models import tiny_folder
from test_training import write_pairs

from xsiam import SiameseEncoder
from xsiam.metrics import spearman
from xsiam.pairs import load_pairs

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():  # an installed copy has none
    pytest.skip("the repository's benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import recipes  # noqa: E402
import torch  # noqa: E402


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    tiny_folder(tmp_path / "model")
    files = [
        f"--{split}={write_pairs(tmp_path / f'{split}.csv', 24, seed)}"
        for seed, split in enumerate(recipes.SPLITS)
    ]
    more = [f"--output={tmp_path / 'out'}", f"--model={tmp_path / 'model'}", "--pairs=2"]
    few = [
        "trainer.max_epochs=1",
        "optimizer.learning_rate=1e-3",
        "attribution.enabled=false",
        "trainer.accelerator=cpu",
    ]
    return [*files, *more, "--layers=2", *few]


def rows(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in (folder / "rows").iterdir()}


def test_runs_are_measured_alike_and_not_made_twice(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = "--methods=unmodified,none,uniform"
    assert recipes.main([*command, methods, "--seeds=0"]) == 0
    assert recipes.main([*command, methods, "--seeds=0,1"]) == 0
    out = tmp_path / "out"
    found = rows(out)
    assert set(found) == {"unmodified-0", "none-0", "uniform-0", "none-1", "uniform-1"}
    pairs = load_pairs(tmp_path / "test.csv")
    exact = SiameseEncoder.from_pretrained(out / "runs" / "uniform-1" / "export")
    assert exact.shift
    own = spearman(exact.score(pairs.texts_a, pairs.texts_b), torch.tensor(pairs.labels))
    assert found["uniform-1"]["test_spearman"] == pytest.approx(float(own), abs=1e-9)
    for row in found.values():
        layer = row["layers"]["2"]
        assert len(layer["nodes"]) == 4
        assert layer["converged"] == 1.0
    none, uniform = (
        sum(found[f"{name}-{seed}"]["test_spearman"] for seed in (0, 1)) / 2
        for name in ("none", "uniform")
    )
    table = (out / "table.md").read_text()
    assert f"| uniform | 2 | {100 * uniform:.2f} |" in table
    assert f"| {100 * (uniform - none):+.2f} |" in table

    def refuse(*arguments: object) -> None:
        raise AssertionError("nothing is to be run")

    monkeypatch.setattr(recipes, "run", refuse)
    assert recipes.main([*command, methods, "--seeds=0,1"]) == 0
    with pytest.raises(SystemExit, match=r"Set --output to another folder"):
        recipes.main([*command, methods, "--seeds=0", "optimizer.weight_decay=0.5"])


def test_the_outside_check_trains_by_the_same_recipe(command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the `bench` extra")
    methods = ["unmodified", "fitted-trained", "sentence-transformers"]
    assert recipes.main([*command, f"--methods={','.join(methods)}"]) == 0
    found = rows(tmp_path / "out")
    assert set(found) == {f"{method}-0" for method in methods}  # once, whatever the seeds
    trained = SiameseEncoder.from_pretrained(tmp_path / "out/runs/fitted-trained-0/export")
    start = SiameseEncoder.from_pretrained(tmp_path / "model", reference="fitted")
    assert trained.reference.label != start.reference.label
    theirs, base = found["sentence-transformers-0"], found["unmodified-0"]
    assert theirs["training_seconds"] > 0
    assert theirs["test_pearson"] != base["test_pearson"]
