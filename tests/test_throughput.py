"""The training benchmark: both sides do the same work, and runs survive what goes wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from models import tiny_folder
from test_training import distance, write_pairs

from xsiam.config import TrainConfig, load_config
from xsiam.training_parts import build_data, build_module

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():  # an installed copy has none
    pytest.skip("the repository's benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import training as throughput  # noqa: E402

MACHINE = {"processor": "some", "threads": 1, "torch": "2.13", "device": "cpu"}
SETTINGS = {"loss": "cosent", "batch": 4}
SHARE = 0.01  # of the way that weights went; measured: 2e-4
METHOD = {method.key: method for method in throughput.METHODS}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a command for a tiny model without dropout."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_folder(folder / "model", dropout=0.0)
    data = write_pairs(folder / "train.csv", 46, 0)
    command = ["--output", str(folder / "out"), "--data", str(data), "--model", str(model)]
    return [*command, "--batch", "4", "--steps", "3", "--warm-up", "2", "--runs", "1"]


@pytest.mark.parametrize("bucketed", [True, False])
def test_chosen_batches_are_those_that_xsiam_trains_on(
    arguments: list[str], bucketed: bool
) -> None:
    options = throughput.parse(arguments)
    values = [f"model.name={options.model}", f"data.train={options.data}", "data.batch_size=4"]
    config = load_config(TrainConfig, [], [*values, f"data.length_bucketing={bucketed}".lower()])
    data = build_data(config, build_module(config))
    lengths = data.pairs("train").lengths
    chosen = throughput.choose_batches(lengths, 4, 20, bucketed=bucketed, seed=0)
    assert len(chosen) == 20
    loader = data.train_dataloader()
    seen = []
    for epoch in range(2):  # of 12 batches
        loader.sampler.set_epoch(epoch)
        seen += [batch["index"].tolist() for batch in loader]
    assert seen[:20] == chosen


def test_a_clock_times_what_comes_after_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 25.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    clock = throughput.Clock(2, 3, "cpu")
    with pytest.raises(RuntimeError, match="Expected 5 steps"):
        clock.row()
    for step in range(1, 7):
        clock.step_ended(step)
    assert clock.row()["seconds"] == 15.0


def rows(*speeds: tuple[str, list[float]]) -> list[dict[str, Any]]:
    """Return rows of methods with these samples a second, run by run."""
    return [
        {"method": key, "run": run, "samples": 10, "seconds": 10 / s, "processor_seconds": 20 / s}
        for key, found in speeds
        for run, s in enumerate(found)
    ]


def test_ratios_compare_the_runs_of_one_turn() -> None:
    theirs, ours = "sentence-transformers on random batches", "pad on random batches"
    bucketed = "none on bucketed batches"
    # The machine was half as fast in the second turn, for all.
    lines = {
        line["method"]: line
        for line in throughput.summary(
            rows((theirs, [100, 50, 100]), (ours, [80, 40, 90]), (bucketed, [200, 100, 150]))
        )
    }
    assert list(lines) == [theirs, ours, bucketed]
    assert lines[ours]["ratio_same"] == pytest.approx(0.8)
    assert lines[ours]["ratio_processor"] == pytest.approx(0.8)
    assert (lines[ours]["median"], lines[ours]["lowest"], lines[ours]["highest"]) == (80, 40, 90)
    assert lines[bucketed]["ratio_random"] == pytest.approx(2.0)
    assert lines[bucketed]["ratio_same"] is None  # theirs on those batches was not run


def test_the_report_says_how_and_where() -> None:
    content = {
        "commands": ["python benchmarks/training.py --output x"],
        "machine": MACHINE,
        "settings": SETTINGS,
        "rows": rows(("sentence-transformers on random batches", [100.0])),
    }
    text = throughput.markdown(content)
    assert "    python benchmarks/training.py --output x\n" in text
    assert "* processor: some\n" in text
    assert "| sentence-transformers on random batches | 1 | 100.0 | 100.0 | 100.0 | 1.000 |" in text


def test_results_of_other_conditions_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert throughput.read_results(file, MACHINE, SETTINGS)["rows"] == []
    file.write_text(json.dumps({"machine": MACHINE, "settings": SETTINGS, "rows": [1]}))
    assert throughput.read_results(file, MACHINE, SETTINGS)["rows"] == [1]
    with pytest.raises(SystemExit, match=r"with threads 2 in .*, but got 1"):
        throughput.read_results(file, {**MACHINE, "threads": 2}, SETTINGS)
    with pytest.raises(SystemExit, match=r"with batch 8 in .*, but got 4"):
        throughput.read_results(file, MACHINE, {**SETTINGS, "batch": 8})


@pytest.mark.parametrize("wrong", ["--runs=0", "--warm-up=0"])
def test_wrong_numbers_are_named(wrong: str) -> None:
    name = wrong.partition("=")[0]
    with pytest.raises(SystemExit, match=f"Expected {name} of 1 or more, but got 0"):
        throughput.parse(["--output", "x", wrong])


@pytest.mark.parametrize("loss", list(throughput.LOSSES))
@pytest.mark.parametrize("batches", ["random", "bucketed"])
def test_both_sides_end_in_the_same_weights(
    arguments: list[str], tmp_path: Path, loss: str, batches: str
) -> None:
    """Losses, batches, optimiser, decay, clipping and schedule are one, or they would not."""
    pytest.importorskip("accelerate")
    bench = throughput.Bench(throughput.parse([*arguments, "--loss", loss]))
    bench.check_inputs()
    before = throughput.training_parts.build_module(bench.config).encoder.state_dict()
    found = {}
    for name in (throughput.THEIRS, "none"):
        method = METHOD[f"{name} on {batches} batches"]
        clock = throughput.Clock(2, 3, "cpu")
        train = bench.train_theirs if name == throughput.THEIRS else bench.train_ours
        encoder = train(method, clock, tmp_path / name)
        assert clock.row()["seconds"] > 0
        # Biases of keys change no attention: Adam follows rounding there.
        state = {k: v for k, v in encoder.state_dict().items() if not k.endswith("key.bias")}
        found[name] = {k: v.detach().clone() for k, v in state.items()}
    moved = distance(before, found["none"])
    assert moved > 0
    assert distance(found[throughput.THEIRS], found["none"]) < SHARE * moved


@pytest.mark.slow
def test_finished_runs_are_not_made_again(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    made = []

    def run(self: Any, method: Any) -> dict[str, Any]:
        made.append(method.key)
        if len(made) == 3:
            raise KeyboardInterrupt
        return {"samples": 12, "seconds": 1.0, "processor_seconds": 1.0}

    monkeypatch.setattr(throughput.Bench, "run", run)
    with pytest.raises(KeyboardInterrupt):
        throughput.main(arguments)
    assert throughput.main(arguments) == 0
    keys = [method.key for method in throughput.METHODS]
    assert made == [*keys[:3], *keys[2:]]
    output = Path(arguments[1])
    content = json.loads((output / "results.json").read_text())
    assert [row["method"] for row in content["rows"]] == keys
    assert len(content["commands"]) == 1
    assert throughput.main([*arguments, "--methods=pad", "--runs=2"]) == 0
    assert made[-2:] == ["pad on random batches", "pad on bucketed batches"]
    with pytest.raises(SystemExit, match=r"--methods among .*, but got {.mask.}"):
        throughput.main([*arguments, "--methods=mask"])
    assert "on bucketed batches" in (output / "results.md").read_text()
