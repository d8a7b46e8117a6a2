"""Runs that keep a teacher's scores, and runs with several lengths of an embedding."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from models import WORDS, tiny_folder
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import (
    STEPS_PER_EPOCH,
    KilledError,
    assert_same_run,
    distance,
    overrides,
    raise_at,
    refused,
    run_script,
    train,
    weights,
    write_pairs,
)

from xsiam import teacher
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError, ModelError
from xsiam.metrics import pearson
from xsiam.training import TrainingResult

DISTIL = "objective.name=distillation"


def write_texts(path: Path, n: int, seed: int) -> Path:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS[:20], k=draw.randint(3, 9))) for _ in range(n)]
    path.write_text("\n".join(["text", *texts]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, pairs with labels, and texts (89 of them are 45 pairs)."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_folder(folder / "model")
    for seed, (name, n) in enumerate({"train": 45, "validation": 23, "test": 21}.items()):
        write_pairs(folder / f"{name}.csv", n, seed)
        write_texts(folder / f"{name}_texts.csv", 2 * n - 1, seed)
    return folder


def texts_only(folder: Path, *more: str) -> list[str]:
    """Return the overrides of a run on texts alone."""
    splits = ("train", "validation", "test")
    return [DISTIL, *(f"data.{split}={folder / f'{split}_texts.csv'}" for split in splits), *more]


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """Return an uninterrupted run on texts alone."""
    return train(folder, tmp_path_factory.mktemp("finished") / "run", *texts_only(folder))


def test_run_on_texts_alone_is_monitored_by_the_teacher(
    folder: Path, finished: TrainingResult
) -> None:
    keys = {"loss", "anisotropy", "pearson_teacher"}
    assert set(finished.metrics) == {f"{stage}/{key}" for stage in ("val", "test") for key in keys}
    results = json.loads(finished.results_path.read_text())
    assert results["best"]["monitor"] == "val/pearson_teacher"
    assert results["best"]["value"] == max(e["val/pearson_teacher"] for e in results["history"])
    assert results["steps"] == 2 * STEPS_PER_EPOCH
    events = EventAccumulator(str(finished.tensorboard_dir)).Reload()
    assert len(events.Scalars("val/pearson_teacher")) == 2
    plain = SiameseEncoder.from_pretrained(folder / "model", shift=False, device="cpu")
    assert results["teacher"] == {
        "name": str(folder / "model"),
        "architecture": "BertModel",
        "fingerprint": plain.model_fingerprint,
        "embedding_dim": 32,
        "similarity": "cos",
        "shift": False,
        "n_texts": results["teacher"]["n_texts"],
    }
    assert 170 < results["teacher"]["n_texts"] <= 89 + 45 + 41


def test_export_is_exact_and_keeps_the_scores_of_the_plain_model(
    folder: Path, tmp_path: Path
) -> None:
    """On the texts that it has seen: tiny random models have nothing to say on others."""
    name = tiny_folder(tmp_path / "model", dropout=0.0)
    path = write_texts(tmp_path / "texts.csv", 24, 5)
    splits = [f"data.{split}={path}" for split in ("train", "validation", "test")]
    more = [DISTIL, *splits, f"model.name={name}", "trainer.max_epochs=40"]
    result = train(folder, tmp_path / "run", *more)
    texts = path.read_text().splitlines()[1:]
    exact, plain = (
        model.similarity_pairwise(model.encode(texts[::2]), model.encode(texts[1::2]))
        for model in (SentenceTransformer(str(f), device="cpu") for f in (result.export, name))
    )
    kept = pearson(exact, plain).item()
    assert kept == pytest.approx(result.metrics["test/pearson_teacher"], abs=1e-5)
    start = SiameseEncoder.from_pretrained(name, reference="uniform", device="cpu")
    before = pearson(start.score(texts[::2], texts[1::2]), plain).item()
    assert 1 - kept < (1 - before) / 4, (before, kept)  # measured: 0.0044 and 0.038


def test_labels_are_unread_in_training_and_correlated_in_validation(
    folder: Path, tmp_path: Path
) -> None:
    rows = (folder / "train.csv").read_text().splitlines()
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("\n".join([rows[0], *(f"{row.rpartition(',')[0]},?" for row in rows[1:])]))
    more = [DISTIL, "trainer.max_epochs=1"]
    results = [
        train(folder, tmp_path / name, *more, f"data.train={path}")
        for name, path in (("right", folder / "train.csv"), ("wrong", wrong))
    ]
    assert_same_run(*results)
    assert {"val/spearman_cosine", "val/pearson_teacher", "val/loss"} <= results[0].metrics.keys()
    best = json.loads(results[0].results_path.read_text())["best"]
    assert best["monitor"] == "val/spearman_cosine"


def test_another_teacher_may_have_another_dimension(folder: Path, tmp_path: Path) -> None:
    name = tiny_folder(tmp_path / "teacher", architecture="distilbert", truncate_dim=7, seed=3)
    more = texts_only(folder, f"objective.teacher={name}", "model.prompt=query : ")
    result = train(folder, tmp_path / "run", *more, "trainer.max_epochs=1")
    found = json.loads(result.results_path.read_text())["teacher"]
    assert (found["architecture"], found["embedding_dim"]) == ("DistilBertModel", 7)
    plain = SentenceTransformer(str(name), device="cpu")
    texts = ["the dog runs", "a cat"]
    made = teacher.Teacher(name, tmp_path / "run" / "teacher.safetensors")
    made_path = tmp_path / "alone"
    alone = teacher.Teacher(name, made_path)
    alone.prepare({None: texts})
    expected = torch.nn.functional.normalize(plain.encode(texts, convert_to_tensor=True), dim=-1)
    torch.testing.assert_close(alone.vectors(texts), expected, rtol=0, atol=1e-5)
    # The prompt is that of the model in training, the teacher has its own.
    own = (folder / "train_texts.csv").read_text().splitlines()[1:3]
    expected = torch.nn.functional.normalize(plain.encode(own, convert_to_tensor=True), dim=-1)
    torch.testing.assert_close(made.vectors(own), expected, rtol=0, atol=1e-5)


def test_resumed_run_equals_uninterrupted_run_and_embeds_nothing_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: TrainingResult
) -> None:
    more = texts_only(folder, "checkpoint.every_n_steps=4")
    with monkeypatch.context() as patch:
        raise_at(patch, "on_train_batch_start", 9, KilledError())
        with pytest.raises(KilledError):
            train(folder, tmp_path / "run", *more)
    monkeypatch.delattr(teacher, "embed_texts")
    resumed = train(folder, tmp_path / "run", "resume=auto", *more)
    assert_same_run(resumed, finished)
    entries = [json.loads(r.results_path.read_text())["teacher"] for r in (resumed, finished)]
    assert entries[0] == entries[1]


def test_two_processes_share_a_teacher_and_train_on_the_texts_of_both(
    folder: Path, tmp_path: Path
) -> None:
    """The first steps are those of one process: 2 × 4 pairs make the batch of 8."""
    more = texts_only(folder, "trainer.max_steps=3", "data.test=null")
    more += [f"model.name={tiny_folder(tmp_path / 'model', dropout=0.0)}"]
    output = tmp_path / "run"
    arguments = overrides(folder, output, "trainer.devices=2", *more, "data.batch_size=4")
    done = run_script(tmp_path, arguments)
    assert done.returncode == 0, done.stderr
    assert "computed anew" not in done.stderr
    assert [path.name for path in output.glob("*teacher*")] == ["teacher.safetensors"]
    alone = train(folder, tmp_path / "alone", *more)
    ours, theirs = weights(output / "checkpoints" / "last.ckpt"), weights(alone.last_checkpoint)
    start = SiameseEncoder.from_pretrained(tmp_path / "model", device="cpu").state_dict()
    moved = distance(theirs, {f"encoder.{name}": tensor for name, tensor in start.items()})
    assert distance(theirs, ours) < moved / 10  # measured: 0.018 of the way
    results = json.loads((output / "results.json").read_text())
    assert results["processes"] == 2
    key = "val/pearson_teacher"
    assert results["metrics"][key] == pytest.approx(alone.metrics[key], abs=1e-2)


def test_two_processes_have_the_metrics_of_one(folder: Path, tmp_path: Path) -> None:
    more = texts_only(folder, "optimizer.learning_rate=1e-30", "trainer.max_epochs=1")
    done = run_script(tmp_path, overrides(folder, tmp_path / "run", "trainer.devices=2", *more))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    alone = train(folder, tmp_path / "alone", *more, "data.eval_batch_size=5")
    for key in ("val/pearson_teacher", "test/pearson_teacher"):
        assert results["metrics"][key] == pytest.approx(alone.metrics[key], abs=1e-6)


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        (
            ["objective.teacher=x"],
            InputError,
            r"'mse_cosine' \(none\), but got teacher='x'. It is an option of distillation",
        ),
        ([DISTIL, "objective.teacher=./nowhere"], ModelError, r"nowhere"),
        (
            [DISTIL, "model.similarity=dot"],
            InputError,
            r"scores by 'dot' as.*scores by 'cos'. Set `model.similarity=cos`, or another",
        ),
        (
            [DISTIL, "checkpoint.monitor=val/mrr@10"],
            InputError,
            r"val/pearson_teacher, val/loss.*got 'val/mrr@10'",
        ),
        (["checkpoint.monitor=val/pearson_teacher"], InputError, r"got 'val/pearson_teacher'"),
    ],
)
def test_what_does_not_fit_distillation_is_refused(
    folder: Path, tmp_path: Path, more: list[str], error: type[Exception], match: str
) -> None:
    refused(folder, tmp_path, error, match, *more)


def test_one_validation_pair_has_no_correlation(folder: Path, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "two.csv", 2, 0)
    match = r"`checkpoint.monitor=val/pearson_teacher` to be defined, but a correlation needs 2 p"
    refused(folder, tmp_path, InputError, match, *texts_only(folder, f"data.validation={path}"))


@pytest.mark.parametrize("name", ["mse_cosine", "contrastive"])
def test_one_column_is_refused_by_other_objectives(folder: Path, tmp_path: Path, name: str) -> None:
    match = r"Expected two text columns.*one column \('text'\) is enough for objective 'distillat"
    refused(folder, tmp_path, InputError, match, *texts_only(folder, f"objective.name={name}"))


# ---------------------------------------------------------------- matryoshka


@pytest.mark.parametrize(
    "more",
    [
        ["objective.name=contrastive", "data.column_label=none", "objective.dim_weights=[1,0.5]"],
        [DISTIL, "data.column_label=none"],
    ],
)
def test_run_with_several_lengths(folder: Path, tmp_path: Path, more: list[str]) -> None:
    more = [*more, "objective.dims=[32,4]", "objective.chunk_size=3", "trainer.max_epochs=1"]
    result = train(folder, tmp_path / "run", *more)
    results = json.loads(result.results_path.read_text())
    assert results["best"]["monitor"] == ("val/pearson_teacher" if DISTIL in more else "val/mrr@10")
    assert results["config"]["objective"]["dims"] == [32, 4]
    best = SiameseEncoder.from_pretrained(result.best_checkpoint)
    cut = SentenceTransformer(str(result.export), device="cpu", truncate_dim=4)
    whole = best.encode(["the dog runs", "a cat"])
    assert whole.shape == (2, 32)
    found = cut.encode(["the dog runs", "a cat"], convert_to_tensor=True)
    torch.testing.assert_close(found, whole[:, :4], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            ["objective.dims=[64,32]"],
            r"at most 32 dimensions.*got \[64, 32\]. Set `objective.dims`",
        ),
        (["objective.dims=[16,8]"], r"the whole embedding of 32 dimensions.*got \[16, 8\]"),
        (
            ["objective.dims=[32,8]", "objective.dim_weights=[1]"],
            r"`dim_weights` to be 2 positive numbers.*got \[1.0\]. Set `objective.dim_weights`",
        ),
        (["objective.dim_weights=[1]"], r"`dims` for `dim_weights`, but got \[1.0\] without any"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, more: list[str], match: str
) -> None:
    refused(folder, tmp_path, InputError, match, *more)
