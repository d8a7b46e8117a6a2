"""Training runs: results, resuming, interruption, refusals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from models import WORDS, tiny_folder
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from xsiam import checks, training
from xsiam.config import TrainConfig, load_config
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, InputError, ModelError
from xsiam.resume import SeededSteps
from xsiam.retrieval import RETRIEVAL_FIGURES
from xsiam.training import TrainingResult, run_training

ROOT = Path(__file__).parents[1]
STEPS_PER_EPOCH = 6  # 45 pairs in batches of 8


class KilledError(Exception):
    """Stands for a process that vanished: nothing is saved because of it."""


def write_pairs(path: Path, n: int, seed: int, label: Callable[[float], Any] = float) -> Path:
    draw = random.Random(seed)
    lines = ["sentence1,sentence2,score"]
    for _ in range(n):
        a, b = (" ".join(draw.choices(WORDS[:20], k=draw.randint(3, 9))) for _ in range(2))
        lines.append(f"{a},{b},{label(round(draw.random(), 3))}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model (with dropout) and pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_folder(folder / "model")
    for seed, (name, n) in enumerate({"train": 45, "validation": 23, "test": 21}.items()):
        write_pairs(folder / f"{name}.csv", n, seed)
    return folder


def overrides(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model.name={inputs / 'model'}",
        "model.reference=uniform",
        f"data.train={inputs / 'train.csv'}",
        f"data.validation={inputs / 'validation.csv'}",
        f"data.test={inputs / 'test.csv'}",
        "data.batch_size=8",
        "optimizer.learning_rate=1e-3",
        "trainer.max_epochs=2",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        f"output_dir={output}",
        *more,
    ]


def train(inputs: Path, output: Path, *more: str) -> TrainingResult:
    return run_training(load_config(TrainConfig, [], overrides(inputs, output, *more)))


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """Return an uninterrupted run."""
    return train(inputs, tmp_path_factory.mktemp("finished") / "run")


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def assert_same_run(ours: TrainingResult, theirs: TrainingResult) -> None:
    """Assert that both runs ended in the same bits."""
    for name in ("last_checkpoint", "best_checkpoint"):
        a, b = weights(getattr(ours, name)), weights(getattr(theirs, name))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert ours.metrics == theirs.metrics
    ours_json, theirs_json = (json.loads(r.results_path.read_text()) for r in (ours, theirs))
    assert ours_json["history"] == theirs_json["history"]
    assert ours_json["steps"] == theirs_json["steps"]


def act_at(monkeypatch: pytest.MonkeyPatch, hook: str, step: int, act: Callable[..., Any]) -> None:
    """Make a run do something, once, in a hook when it has made so many steps."""
    done = []

    class Act(Callback):
        pass

    def acts(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == step and not done:
            done.append(step)
            act(*([trainer] if act.__code__.co_argcount else []))

    setattr(Act, hook, acts)
    build = training.build_trainer

    def with_act(*args: Any, callbacks: list[Callback], **kwargs: Any) -> Any:
        return build(*args, callbacks=[*callbacks, Act()], **kwargs)

    monkeypatch.setattr(training, "build_trainer", with_act)


def raise_at(monkeypatch: pytest.MonkeyPatch, hook: str, step: int, error: Exception) -> None:
    """Make a run raise in a hook when it has made so many steps."""

    def throw() -> None:
        raise error

    act_at(monkeypatch, hook, step, throw)


def test_run_leaves_everything(finished: TrainingResult, inputs: Path) -> None:
    results = json.loads(finished.results_path.read_text())
    assert results["schema_version"] == 1
    assert results["metrics"] == finished.metrics
    keys = {f"{kind}_{name}" for kind in ("spearman", "pearson") for name in ("cosine", "dot")}
    keys |= {"loss", "anisotropy"}
    assert set(finished.metrics) == {f"{stage}/{key}" for stage in ("val", "test") for key in keys}
    assert [entry["step"] for entry in results["history"]] == [5, 11]
    best = max(results["history"], key=lambda entry: entry["val/spearman_cosine"])
    assert finished.metrics["val/spearman_cosine"] == best["val/spearman_cosine"]
    assert results["steps"] == 2 * STEPS_PER_EPOCH
    assert results["versions"]["torch"] == torch.__version__
    saved = load_config(TrainConfig, [finished.results_path.parent / "config.yaml"])
    assert saved.data.train == str(inputs / "train.csv")
    assert results["config"]["optimizer"]["learning_rate"] == saved.optimizer.learning_rate == 1e-3


def test_checkpoints_load_weights_only_and_stand_alone(
    finished: TrainingResult, inputs: Path, tmp_path: Path
) -> None:
    for path in (finished.best_checkpoint, finished.last_checkpoint):
        assert "xsiam" in torch.load(path, weights_only=True)
    texts = ["the dog runs", "a small cat sleeps in the yard ."]
    encoder = SiameseEncoder.from_pretrained(finished.best_checkpoint)
    exported = SiameseEncoder.from_pretrained(finished.export)
    torch.testing.assert_close(encoder.encode(texts), exported.encode(texts), rtol=0, atol=1e-6)
    plain = SentenceTransformer(str(finished.export), device="cpu")
    theirs = plain.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(encoder.encode(texts), theirs, rtol=0, atol=1e-5)


def test_export_holds_the_best_weights_not_the_last(inputs: Path, tmp_path: Path) -> None:
    # The lower the better here, so that the first validation of a falling metric is not the last.
    result = train(inputs, tmp_path / "run", "checkpoint.mode=min")
    history = json.loads(result.results_path.read_text())["history"]
    lowest = min(history, key=lambda entry: entry["val/spearman_cosine"])
    assert lowest["step"] == 5  # or the test shows nothing
    assert torch.load(result.best_checkpoint, weights_only=True)["global_step"] == 6
    exported = SiameseEncoder.from_pretrained(result.export)
    best = SiameseEncoder.from_pretrained(result.best_checkpoint)
    last = SiameseEncoder.from_pretrained(result.last_checkpoint)
    assert exported.model_fingerprint == best.model_fingerprint != last.model_fingerprint


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    finished: TrainingResult, inputs: Path, tmp_path: Path
) -> None:
    """Two runs of their own, with dropout and shuffled batches, on the CPU."""
    again = train(inputs, tmp_path / "again")
    assert_same_run(again, finished)
    files = [result.export / "model.safetensors" for result in (again, finished)]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = weights(train(inputs, tmp_path / "other", "seed=1").last_checkpoint)
    ours = weights(finished.last_checkpoint)
    assert any(not torch.equal(ours[key], other[key]) for key in ours)


def test_tensorboard_holds_the_keys_by_global_step(finished: TrainingResult) -> None:
    events = EventAccumulator(str(finished.tensorboard_dir)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/spearman_cosine", "test/pearson_dot"} <= tags
    assert "hp_metric" not in tags
    assert [e.step for e in events.Scalars("train/loss")] == list(range(12))
    assert [e.step for e in events.Scalars("train/gradient_norm")] == list(range(12))
    assert [e.step for e in events.Scalars("val/spearman_cosine")] == [5, 11]
    rates = next(tag for tag in tags if tag.startswith("train/learning_rate"))
    values = [e.value for e in events.Scalars(rates)]
    assert values[0] == 0
    assert max(values) == pytest.approx(1e-3)
    assert values[-1] == pytest.approx(1e-3 / 10)  # 12 steps, 2 of them warm-up


def test_tensorboard_holds_hyperparameters_and_final_metrics(finished: TrainingResult) -> None:
    events = EventAccumulator(str(finished.tensorboard_dir)).Reload()
    for key, value in finished.metrics.items():
        (final,) = events.Scalars(f"final/{key}")
        assert final.value == pytest.approx(value)
    summary = events.SummaryMetadata
    found = {
        tag: HParamsPluginData.FromString(summary(tag).plugin_data.content)
        for tag in events.PluginTagToContent("hparams")
    }
    start = found["_hparams_/session_start_info"].session_start_info.hparams
    assert start["optimizer/learning_rate"].number_value == 1e-3
    assert start["data/batch_size"].number_value == 8
    assert start["model/reference"].string_value == "uniform"
    experiment = found["_hparams_/experiment"].experiment
    named = {info.name.tag for info in experiment.metric_infos}
    assert named == {f"final/{key}" for key in finished.metrics}
    assert "_hparams_/session_end_info" in found


@pytest.mark.parametrize(
    ("hook", "step", "more"),
    [
        pytest.param("on_train_batch_start", 4, ["checkpoint.every_n_steps=2"], id="mid-epoch"),
        pytest.param("on_train_batch_start", 9, ["checkpoint.every_n_steps=4"], id="second-epoch"),
        pytest.param("on_validation_batch_start", 6, ["checkpoint.every_n_steps=4"], id="val"),
        pytest.param("on_train_batch_start", 6, [], id="between-epochs"),
        pytest.param("on_train_batch_start", 7, ["checkpoint.every_n_steps=6"], id="epoch-end"),
        pytest.param(
            "on_train_batch_start", 8, ["trainer.val_check_interval=2"], id="several-validations"
        ),
        pytest.param(
            "on_train_batch_start", 9, ["trainer.check_val_every_n_epoch=2"], id="no-validation-yet"
        ),
        pytest.param(
            "on_train_batch_start",
            5,
            ["trainer.accumulate_grad_batches=2", "checkpoint.every_n_steps=1"],
            id="accumulation",
        ),
        pytest.param(
            "on_train_batch_start",
            10,
            ["trainer.max_steps=11", "checkpoint.every_n_steps=3"],
            id="max-steps",
        ),
        pytest.param(
            "on_train_batch_start",
            9,
            ["trainer.limit_train_batches=5", "checkpoint.every_n_steps=7"],
            id="limited",
        ),
        pytest.param(
            "on_train_batch_start",
            9,
            ["data.num_workers=1", "checkpoint.every_n_steps=8"],
            id="workers",
        ),
    ],
)
def test_resumed_run_equals_uninterrupted_run(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
    step: int,
    more: list[str],
) -> None:
    whole = train(inputs, tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        raise_at(patch, hook, step, KilledError())
        with pytest.raises(KilledError):
            train(inputs, tmp_path / "run", *more)
    before = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < before["global_step"] <= step
    assert_same_run(train(inputs, tmp_path / "run", "resume=auto", *more), whole)


def test_resume_tests_would_notice_other_random_numbers(
    finished: TrainingResult, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is on: without seeded steps two runs that draw differently end differently."""
    monkeypatch.setattr(SeededSteps, "on_train_batch_start", lambda *args: torch.rand(1))
    other = weights(train(inputs, tmp_path / "run").last_checkpoint)
    ours = weights(finished.last_checkpoint)
    assert any(not torch.equal(ours[key], other[key]) for key in ours)


@pytest.mark.parametrize(
    ("hook", "step", "saved_step"),
    [
        pytest.param("on_train_batch_start", 2, 3, id="in-a-step"),
        pytest.param("on_train_batch_start", 5, 6, id="in-the-last-step-of-an-epoch"),
        pytest.param("on_validation_batch_start", 6, 6, id="in-validation"),
        pytest.param("on_validation_batch_end", 12, 12, id="in-the-last-validation"),
    ],
)
def test_ctrl_c_saves_and_the_run_goes_on_from_there(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: TrainingResult,
    hook: str,
    step: int,
    saved_step: int,
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        act_at(patch, hook, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit) as stopped:
            train(inputs, tmp_path / "run")
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"after step {saved_step}. The state is in {last}" in capsys.readouterr().err
    assert torch.load(last, weights_only=True)["global_step"] == saved_step
    assert not (tmp_path / "run" / "results.json").exists()
    assert_same_run(train(inputs, tmp_path / "run", "resume=auto"), finished)


def test_ctrl_c_before_the_first_step_says_so(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    act_at(monkeypatch, "on_fit_start", 0, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        train(inputs, tmp_path / "run")
    assert stopped.value.code == 130
    assert "nothing to save" in capsys.readouterr().err


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from xsiam import checks, training
from xsiam.config import TrainConfig, load_config

if __name__ == "__main__":
    if {kill_at} is not None:
        from xsiam.resume import LastCheckpoint
        inner = LastCheckpoint.on_train_batch_end
        def kill(self, trainer, *args):
            inner(self, trainer, *args)
            if trainer.global_step == {kill_at}:
                os.kill(os.getpid(), signal.SIGKILL)
        LastCheckpoint.on_train_batch_end = kill
    training.run_training(load_config(TrainConfig, [], sys.argv[1:]))
"""


def run_script(
    folder: Path, arguments: list[str], kill_at: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a training script as a user would, in a process of its own."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests"), kill_at=kill_at))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "PYTEST"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_killed_process_is_resumed(inputs: Path, tmp_path: Path, finished: TrainingResult) -> None:
    more = ["checkpoint.every_n_steps=4"]
    arguments = overrides(inputs, tmp_path / "run", *more)
    died = run_script(tmp_path, arguments, kill_at=10)
    assert died.returncode == -signal.SIGKILL, died.stderr
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 8
    assert_same_run(train(inputs, tmp_path / "run", "resume=auto", *more), finished)


def test_two_processes_agree_with_one_on_the_same_weights(inputs: Path, tmp_path: Path) -> None:
    """One step of 2 × 4 pairs; 23 and 21 pairs do not divide by two."""
    output = tmp_path / "run"
    arguments = overrides(
        inputs, output, "trainer.devices=2", "data.batch_size=4", "trainer.max_epochs=1"
    )
    done = run_script(tmp_path, arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["processes"] == 2
    assert results["steps"] == STEPS_PER_EPOCH
    alone = train(
        inputs,
        tmp_path / "alone",
        f"model.name={output / 'checkpoints' / 'best.ckpt'}",
        "optimizer.learning_rate=1e-30",  # the weights stay as they are
        "trainer.limit_train_batches=1",
        "trainer.max_epochs=1",
    )
    assert alone.metrics.keys() == results["metrics"].keys()
    for key, value in results["metrics"].items():
        assert alone.metrics[key] == pytest.approx(value, abs=1e-6), key


# ---------------------------------------------------------------- objectives


def write_triplets(path: Path, n: int, columns: int) -> Path:
    """Write pairs with columns of negatives; every sixth has the positive of the one before."""
    draw = random.Random(7)
    names = ["anchor", "positive", *(f"negative_{i}" for i in range(columns))]
    rows = [
        [" ".join(draw.choices(WORDS[:20], k=draw.randint(3, 9))) for _ in names] for _ in range(n)
    ]
    for i in range(5, n, 6):
        rows[i][1] = rows[i - 1][1]
    path.write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n", encoding="utf-8")
    return path


def unlabelled(folder: Path, columns: int, *more: str) -> list[str]:
    """Return the overrides of a run on 45 training pairs without labels."""
    return [
        f"data.train={write_triplets(folder / 'triplets.csv', 45, columns)}",
        "data.test=null",
        "trainer.max_epochs=1",
        *more,
    ]


@pytest.mark.parametrize(
    ("columns", "more"),
    [
        (0, ["objective.name=contrastive", "objective.chunk_size=3"]),
        (2, ["objective.name=contrastive", "objective.symmetric=true"]),
        (2, ["objective.name=triplet", "objective.distance=euclidean", "objective.margin=2"]),
    ],
)
def test_runs_without_labels_validate_on_labelled_pairs(
    inputs: Path, tmp_path: Path, columns: int, more: list[str]
) -> None:
    result = train(inputs, tmp_path / "run", *unlabelled(tmp_path, columns, *more))
    assert "val/spearman_cosine" in result.metrics
    # Validation pairs have no negatives: no loss where those are required.
    assert ("val/loss" in result.metrics) == ("objective.name=triplet" not in more)
    events = EventAccumulator(str(result.tensorboard_dir)).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == STEPS_PER_EPOCH
    assert all(0 < loss < 100 for loss in losses)
    if "objective.name=contrastive" in more:
        counts = [event.value for event in events.Scalars("train/masked_negatives")]
        assert sum(counts) > 0


RETRIEVALS = {f"val/{figure}" for figure in RETRIEVAL_FIGURES}


def without_labels(folder: Path, *more: str) -> list[str]:
    """Return the overrides of a run that has no labels for validation either."""
    validation = f"data.validation={write_triplets(folder / 'dev.csv', 23, 1)}"
    more = ("objective.name=contrastive", "objective.temperature=0.2", validation, *more)
    return unlabelled(folder, 1, *more)


def test_validation_without_labels_is_monitored_by_mrr(inputs: Path, tmp_path: Path) -> None:
    result = train(inputs, tmp_path / "run", *without_labels(tmp_path, "trainer.max_epochs=2"))
    assert set(result.metrics) == {"val/loss", "val/anisotropy", *RETRIEVALS}
    results = json.loads(result.results_path.read_text())
    assert results["best"]["monitor"] == "val/mrr@10"
    highest = max(entry["val/mrr@10"] for entry in results["history"])
    assert results["best"]["value"] == result.metrics["val/mrr@10"] == highest
    assert set(results["metrics"]) == set(result.metrics)
    events = EventAccumulator(str(result.tensorboard_dir)).Reload()
    for key in RETRIEVALS:  # the keys survive TensorBoard as they are
        values = [event.value for event in events.Scalars(key)]
        assert values == pytest.approx([entry[key] for entry in results["history"]])


def test_retrieval_figure_makes_a_file_name(inputs: Path, tmp_path: Path) -> None:
    keeps = ModelCheckpoint(
        tmp_path / "kept",
        "{step}-{val/mrr@10:.3f}",
        monitor="val/mrr@10",
        mode="max",
        auto_insert_metric_name=False,
    )
    values = {"step": torch.tensor(5), "val/mrr@10": torch.tensor(0.25)}
    assert Path(keeps.format_checkpoint_name(values)).name == "5-0.250.ckpt"


def test_validation_without_labels_has_a_loss_to_monitor(inputs: Path, tmp_path: Path) -> None:
    more = without_labels(tmp_path)
    match = r"val/spearman_cosine.*have no labels. Set `checkpoint.monitor=val/mrr@10`"
    monitor = "checkpoint.monitor=val/spearman_cosine"
    refused(inputs, tmp_path, InputError, match, *more, monitor)
    monitors = ["checkpoint.monitor=val/loss", "checkpoint.mode=min"]
    result = train(inputs, tmp_path / "run", *more, *monitors)
    assert json.loads(result.results_path.read_text())["best"]["monitor"] == "val/loss"


def test_retrieval_that_cannot_be_defined_is_refused(inputs: Path, tmp_path: Path) -> None:
    match = r"`checkpoint.monitor=val/ndcg@10`.*have labels.*`checkpoint.monitor=val/spearman_cos"
    refused(inputs, tmp_path, InputError, match, "checkpoint.monitor=val/ndcg@10")
    same = tmp_path / "same.csv"
    same.write_text("anchor,positive\nthe dog,a cat\nred house,a cat\n")
    match = r"`checkpoint.monitor=val/mrr@10` to be defined, but .* pairs have 1. Set"
    more = without_labels(tmp_path, f"data.validation={same}", "data.columns_negative=[]")
    refused(inputs, tmp_path, InputError, match, *more)


def test_two_processes_agree_with_one_on_pairs_without_labels(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = without_labels(tmp_path, "optimizer.learning_rate=1e-30")  # weights stay as they are
    more += [f"data.test={inputs / 'plain.csv'}"]
    rows = (inputs / "test.csv").read_text().splitlines()
    (inputs / "plain.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows) + "\n")
    done = run_script(
        tmp_path, overrides(inputs, output, *more, "trainer.devices=2", "data.batch_size=4")
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    alone = train(inputs, tmp_path / "alone", *more, "data.eval_batch_size=5")
    assert alone.metrics.keys() == results["metrics"].keys()
    assert {
        *RETRIEVALS,
        *(f"test/{figure}" for figure in RETRIEVAL_FIGURES),
    } <= alone.metrics.keys()
    for key in alone.metrics.keys() - {"val/loss", "test/loss"}:  # those depend on the batches
        assert alone.metrics[key] == pytest.approx(results["metrics"][key], abs=1e-6), key


def test_two_processes_train_on_the_pairs_of_both(inputs: Path, tmp_path: Path) -> None:
    """The first steps are those of one process: 2 × 4 pairs make the batch of 8."""
    more = unlabelled(
        tmp_path, 1, "objective.name=contrastive", "objective.chunk_size=3", "data.validation=null"
    )
    more += [f"model.name={tiny_folder(tmp_path / 'model', dropout=0.0)}"]
    steps = ["trainer.max_steps=3"]
    output = tmp_path / "run"
    arguments = overrides(inputs, output, "trainer.devices=2", *more, *steps, "data.batch_size=4")
    done = run_script(tmp_path, arguments)
    assert done.returncode == 0, done.stderr
    alone = train(inputs, tmp_path / "alone", *more, *steps, "data.batch_size=8")
    ours = weights(output / "checkpoints" / "last.ckpt")
    theirs = weights(alone.last_checkpoint)
    start = SiameseEncoder.from_pretrained(tmp_path / "model", device="cpu").state_dict()
    before = {f"encoder.{name}": tensor for name, tensor in start.items()}
    moved, error = distance(theirs, before), distance(theirs, ours)
    # Measured: 0.013 of the way, and 0.56 where each process compares its own pairs only.
    assert error < moved / 10
    counts = [masked_of(folder / "tensorboard") for folder in (output, tmp_path / "alone")]
    assert counts[0] == counts[1]
    assert sum(counts[0]) > 0


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the length of the difference of all weights."""
    parts = [(ours[name] - theirs[name]).double().square().sum() for name in theirs]
    return torch.stack(parts).sum().sqrt().item()


def masked_of(folder: Path) -> list[float]:
    """Return the logged numbers of masked negatives, step by step."""
    events = EventAccumulator(str(folder)).Reload()
    return [event.value for event in events.Scalars("train/masked_negatives")]


@pytest.mark.parametrize(
    ("match", "more"),
    [
        (
            r"'mse_cosine' \(none\), but got margin=0.5.*Leave `objective.margin` out",
            ["objective.margin=0.5"],
        ),
        (r"objective uses no labels.*has 'score'", ["objective.name=contrastive"]),
        (
            r"since the objective needs them.*`data.columns_negative`",
            ["objective.name=triplet", "data.column_label=none"],
        ),
        (
            r"45 training pairs in batches of 4 leave a batch of 1. Set `data.batch_size`",
            ["objective.name=cosent", "data.batch_size=4"],
        ),
    ],
)
def test_what_does_not_fit_an_objective_is_refused(
    inputs: Path, tmp_path: Path, match: str, more: list[str]
) -> None:
    refused(inputs, tmp_path, InputError, match, *more)


def test_negatives_are_refused_by_an_objective_without(inputs: Path, tmp_path: Path) -> None:
    train_pairs = tmp_path / "pairs.csv"
    train_pairs.write_text("sentence1,sentence2,negative,score\na,b,c,0.5\nd,e,f,0.1\n")
    match = r"the objective uses none.*'negative'. Set `data.columns_negative=\[\]`"
    refused(inputs, tmp_path, InputError, match, f"data.train={train_pairs}")


# ---------------------------------------------------------------- layers


def test_two_processes_train_upper_layers_at_their_rates(inputs: Path, tmp_path: Path) -> None:
    """DDP waits for the gradient of every parameter that is not frozen, from its second step on."""
    output = tmp_path / "run"
    more = ["model.freeze_layers=1", "optimizer.layer_decay=0.5", "trainer.max_steps=4"]
    more += ["bend.weight=0.1"]  # further forwards, through parts of the model
    arguments = overrides(inputs, output, *more, "trainer.devices=2", "data.batch_size=4")
    done = run_script(tmp_path, arguments)
    assert done.returncode == 0, done.stderr
    after = weights(output / "checkpoints" / "last.ckpt")
    start = SiameseEncoder.from_pretrained(inputs / "model", device="cpu").state_dict()
    moved = {name for name in start if not torch.equal(after[f"encoder.{name}"], start[name])}
    assert moved
    assert all(".layer.1." in name or ".layer.2." in name for name in moved)
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    last = {
        tag.rpartition("/")[2]: events.Scalars(tag)[-1].value
        for tag in events.Tags()["scalars"]
        if tag.startswith("train/learning_rate")
    }
    assert set(last) == {f"block_{b}_{kind}" for b in (1, 2) for kind in ("decayed", "not_decayed")}
    assert last["block_1_decayed"] == pytest.approx(last["block_2_decayed"] / 2)


@pytest.mark.parametrize(
    "more",
    [
        ["model.freeze_layers=1", "optimizer.layer_decay=0.5"],
        ["model.reference=fitted", "model.train_reference=true"],
        ["bend.weight=0.1"],  # draws texts, places and a layer in every step
    ],
)
def test_run_with_rates_by_layer_a_vector_of_its_own_or_straight_paths_is_resumed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    more = [*more, "checkpoint.every_n_steps=4"]
    whole = train(inputs, tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        raise_at(patch, "on_train_batch_start", 9, KilledError())
        with pytest.raises(KilledError):
            train(inputs, tmp_path / "run", *more)
    assert_same_run(train(inputs, tmp_path / "run", "resume=auto", *more), whole)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            "model.reference=fitted model.train_reference=true",
            r"`model.train_reference` to be False as in.*but got True",
        ),
        ("model.freeze_layers=1", r"`model.freeze_layers` to be 0 as in.*but got 1. Set `model.fr"),
        ("optimizer.layer_decay=0.9", r"`optimizer.layer_decay` to be None as in.*but got 0.9"),
    ],
)
def test_resuming_with_other_layers_is_refused(
    inputs: Path, tmp_path: Path, finished: TrainingResult, more: str, match: str
) -> None:
    resume = f"resume={finished.last_checkpoint}"
    refused(inputs, tmp_path, CheckpointError, match, resume, *more.split())


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("model.freeze_layers=9", r"0 and 3 for BertModel, but got 9. Set `model.freeze_layers`"),
        ("model.freeze_layers=3", r"to leave something to train, but got 3.*`model.freeze_layers`"),
        ("model.freeze_layers=-1", r"`model.freeze_layers` to be a whole number of 0 or more.*-1"),
        (
            "optimizer.layer_decay=0",
            r"`optimizer.layer_decay` to be a number above 0 and at most 1",
        ),
        ("optimizer.layer_decay=1.1", r"`optimizer.layer_decay`.*but got 1.1"),
    ],
)
def test_layers_out_of_range_are_refused(
    inputs: Path, tmp_path: Path, more: str, match: str
) -> None:
    refused(inputs, tmp_path, InputError, match, more)


# ---------------------------------------------------------------- straight paths


def test_the_loss_of_the_objective_and_the_bend_of_paths_are_logged_apart(
    inputs: Path, tmp_path: Path
) -> None:
    logged = {}
    for weight in (0.0, 0.5):
        more = [f"bend.weight={weight}", "trainer.max_steps=2", "trainer.log_every_n_steps=1"]
        result = train(inputs, tmp_path / str(weight), *more)
        events = EventAccumulator(str(result.tensorboard_dir)).Reload()
        logged[weight] = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    losses = [logged[weight]["train/loss"][0].value for weight in logged]
    assert losses[0] == losses[1]
    assert "train/bend" not in logged[0.0]
    assert [0 < event.value < 10 for event in logged[0.5]["train/bend"]] == [True, True]


# ---------------------------------------------------------------- choices


def test_metric_of_the_dot_product_is_monitored_for_dot(inputs: Path, tmp_path: Path) -> None:
    result = train(
        inputs,
        tmp_path / "run",
        "model.similarity=dot",
        "objective.name=mse_dot",
        "trainer.max_epochs=1",
        "optimizer.learning_rate=1e-6",
    )
    results = json.loads(result.results_path.read_text())
    assert results["best"]["monitor"] == "val/spearman_dot"


def test_without_validation_the_last_state_is_exported(inputs: Path, tmp_path: Path) -> None:
    more = ["data.validation=null", "data.test=null", "trainer.max_epochs=1"]
    result = train(inputs, tmp_path / "run", *more)
    assert result.metrics == {}
    assert torch.load(result.best_checkpoint, weights_only=True)["global_step"] == 6
    assert (result.export / "modules.json").exists()


def test_run_that_ends_before_its_first_validation_is_validated(
    inputs: Path, tmp_path: Path
) -> None:
    result = train(inputs, tmp_path / "run", "trainer.max_steps=2")
    assert "val/spearman_cosine" in result.metrics
    assert torch.load(result.best_checkpoint, weights_only=True)["global_step"] == 2


def test_early_stopping_stops_and_stays_stopped(inputs: Path, tmp_path: Path) -> None:
    more = ["early_stopping.patience=1", "early_stopping.min_delta=1", "trainer.max_epochs=5"]
    result = train(inputs, tmp_path / "run", *more)
    assert json.loads(result.results_path.read_text())["steps"] == 2 * STEPS_PER_EPOCH
    again = train(inputs, tmp_path / "run", "resume=auto", *more)
    assert_same_run(again, result)


def test_unlabelled_test_pairs_leave_the_correlations_out(inputs: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.csv"
    plain.write_text("sentence1,sentence2\nthe dog,a cat\nred house,big yard\n")
    more = [f"data.test={plain}", "trainer.max_epochs=1"]
    metrics = train(inputs, tmp_path / "run", *more).metrics
    tested = {key for key in metrics if key.startswith("test/")}
    assert tested == {f"test/{figure}" for figure in (*RETRIEVAL_FIGURES, "anisotropy")}
    assert "val/spearman_cosine" in metrics


def test_resuming_from_another_run_keeps_both(
    inputs: Path, tmp_path: Path, finished: TrainingResult
) -> None:
    before = finished.last_checkpoint.read_bytes()
    more = [f"resume={finished.last_checkpoint}", "trainer.max_epochs=3"]
    result = train(inputs, tmp_path / "run", *more)
    assert json.loads(result.results_path.read_text())["steps"] == 3 * STEPS_PER_EPOCH
    assert finished.last_checkpoint.read_bytes() == before
    assert result.best_checkpoint.exists()


# ---------------------------------------------------------------- refusals


def refused(inputs: Path, tmp_path: Path, error: type[Exception], match: str, *more: str) -> None:
    """Assert that a run is refused, and before it has trained or written anything."""
    with pytest.raises(error, match=match):
        train(inputs, tmp_path / "refused", *more)
    assert not (tmp_path / "refused" / "checkpoints").exists()


def test_layer_out_of_range_is_refused(inputs: Path, tmp_path: Path) -> None:
    match = r"between 0 and 3 for BertModel, but got 9.*`attribution.layers`"
    refused(inputs, tmp_path, InputError, match, "attribution.layers=[1,9]")


@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_missing_gpu_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for kind in (checks.CUDAAccelerator, checks.MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", staticmethod(lambda: False))
    match = f"`trainer.accelerator` to be there, but got '{name}'.*`trainer.accelerator=cpu`"
    refused(inputs, tmp_path, InputError, match, f"trainer.accelerator={name}")


def test_unknown_objective_is_refused(inputs: Path, tmp_path: Path) -> None:
    match = r"but got 'mse_cosin'. Did you mean 'mse_cosine'\? Set `objective.name`"
    refused(inputs, tmp_path, InputError, match, "objective.name=mse_cosin")


def test_unknown_role_is_refused(inputs: Path, tmp_path: Path) -> None:
    refused(inputs, tmp_path, InputError, "but got 'qury'", "model.role_a=qury")


def test_missing_file_is_refused(inputs: Path, tmp_path: Path) -> None:
    match = "`data.test` to be a file.*nowhere.csv"
    refused(inputs, tmp_path, InputError, match, f"data.test={tmp_path / 'nowhere.csv'}")


def test_missing_training_pairs_are_refused(inputs: Path, tmp_path: Path) -> None:
    refused(inputs, tmp_path, InputError, "Set `data.train`", "data.train=null")


def test_label_out_of_range_is_refused_with_its_row(inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("sentence1,sentence2,score\na,b,0.5\nc,d,4.2\n")
    refused(inputs, tmp_path, InputError, r"row 2.*4\.2", f"data.validation={path}")


def test_unknown_monitor_is_refused(inputs: Path, tmp_path: Path) -> None:
    match = "but got 'val/spearmann_cosine'"
    refused(inputs, tmp_path, InputError, match, "checkpoint.monitor=val/spearmann_cosine")


def test_monitor_that_cannot_be_defined_is_refused(inputs: Path, tmp_path: Path) -> None:
    flat = write_pairs(tmp_path / "flat.csv", 9, 0, lambda value: 0.5)
    match = r"`checkpoint.monitor=val/spearman_cosine`.*all 9 labels are equal to 0\.5"
    refused(inputs, tmp_path, InputError, match, f"data.validation={flat}")


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("attribution.layers", "attribution.layers=[1]"),
        ("early_stopping.patience", "early_stopping.patience=2"),
    ],
)
def test_what_needs_validation_is_refused_without(
    inputs: Path, tmp_path: Path, key: str, more: str
) -> None:
    match = f"Expected validation pairs for `{key}`"
    refused(inputs, tmp_path, InputError, match, "data.validation=null", more)


@pytest.mark.parametrize(
    "more",
    ["trainer.precision=7-bit", "trainer.strategy=dpp", "trainer.accelerator=abacus"],
)
def test_settings_that_the_trainer_refuses_are_named(
    inputs: Path, tmp_path: Path, more: str
) -> None:
    refused(inputs, tmp_path, InputError, f"`{more}`", more)


def test_finished_run_is_not_overwritten(inputs: Path, finished: TrainingResult) -> None:
    folder = finished.results_path.parent
    before = finished.results_path.read_bytes()
    with pytest.raises(InputError, match=r"finished run.*`output_dir`.*`resume=auto`") as caught:
        train(inputs, folder)
    assert str(folder) in str(caught.value)
    assert finished.results_path.read_bytes() == before


def test_started_run_is_not_overwritten(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(InputError, match="holds a started run"):
        train(inputs, tmp_path / "run")


def test_output_that_is_a_file_is_refused(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"/file' is a file. Set `output_dir`"):
        train(inputs, tmp_path / "file")


def test_missing_checkpoint_to_resume_is_refused(inputs: Path, tmp_path: Path) -> None:
    match = "'gone.ckpt' does not exist. Set `resume`"
    refused(inputs, tmp_path, InputError, match, "resume=gone.ckpt")


def test_corrupt_checkpoint_to_resume_is_refused(inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "corrupt.ckpt"
    path.write_bytes(b"not a checkpoint")
    refused(inputs, tmp_path, CheckpointError, "corrupt.ckpt", f"resume={path}")


def test_checkpoint_of_a_newer_format_is_refused(
    inputs: Path, tmp_path: Path, finished: TrainingResult
) -> None:
    checkpoint = torch.load(finished.last_checkpoint, weights_only=True)
    checkpoint["xsiam"]["format_version"] = 99
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    match = r"it has format 99. Install a newer xsiam"
    refused(inputs, tmp_path, CheckpointError, match, f"resume={tmp_path / 'newer.ckpt'}")


def test_checkpoint_of_another_model_is_refused(
    inputs: Path, tmp_path: Path, finished: TrainingResult
) -> None:
    other = tiny_folder(tmp_path / "distilbert", architecture="distilbert")
    match = "to be of this model, but 'encoder"
    more = [f"resume={finished.last_checkpoint}", f"model.name={other}"]
    refused(inputs, tmp_path, CheckpointError, match, *more)


@pytest.mark.filterwarnings("ignore:.*is undefined:RuntimeWarning")
def test_diverged_training_stops_with_the_reason(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(trainer: Any) -> None:
        for parameter in trainer.lightning_module.parameters():
            parameter.data.fill_(float("nan"))

    act_at(monkeypatch, "on_validation_start", 6, explode)
    match = r"`val/spearman_cosine`.*23 of 23 scores are not finite.*`optimizer.learning_rate`"
    with pytest.raises(ModelError, match=match):
        train(inputs, tmp_path / "run")
