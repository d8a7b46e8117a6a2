"""Evaluations: results, what is reused, notes instead of NaN, refusals before long work."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from models import TEXT_A, TEXT_B, tiny_folder

from xsiam import evaluation
from xsiam.accuracy import KEYS, layer_key, sample_pairs, summarise
from xsiam.attribution import PairAttributor
from xsiam.config import EvaluateConfig, load_config
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, InputError, ModelError, TruncationWarning
from xsiam.evaluation import EvaluationResult, run_evaluation
from xsiam.metrics import pearson, spearman

LAYERS = (2, 3)
SCORE_TOLERANCE = 1e-5  # float32, other batches
ROWS = [
    (TEXT_A, TEXT_B, 0.9, "voice"),
    ("dog", "cat", 0.2, "unrelated"),
    ("the big house", "the small house", 0.4, "antonym"),
    ("a kitten sleeps in the yard", "a cat sleeps outside", 0.7, "voice"),
    ("a dog runs and a cat sleeps", "the red garden", 0.0, "unrelated"),
    (TEXT_A, "the dog is not in the yard", 0.3, "antonym"),
]


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and pairs, labelled and not."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_folder(folder / "model")
    write_rows(folder / "pairs.csv", ["sentence1", "sentence2", "score", "category"], ROWS)
    write_rows(folder / "plain.csv", ["text_a", "text_b"], [row[:2] for row in ROWS])
    return folder


def config_of(inputs: Path, output: Path, *more: str) -> EvaluateConfig:
    overrides = [
        f"checkpoint={inputs / 'model'}",
        f"data.test={inputs / 'pairs.csv'}",
        "attribution.layers=[2,3]",
        "attribution.n_pairs=4",
        "n_examples=0",
        "accelerator=cpu",
        f"output_dir={output}",
        *more,
    ]
    return load_config(EvaluateConfig, [], overrides)


def evaluate(inputs: Path, output: Path, *more: str) -> EvaluationResult:
    return run_evaluation(config_of(inputs, output, *more))


def read(result: EvaluationResult) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    text = result.results_path.read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return content


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    """Return an evaluation of labelled pairs; tests that change its folder work on a copy."""
    return evaluate(inputs, tmp_path_factory.mktemp("finished") / "run", "n_examples=2")


def test_columns_of_negatives_are_left_alone(inputs: Path, tmp_path: Path) -> None:
    """They train a model, and may hold anything here."""
    header = ["sentence1", "sentence2", "score", "negative"]
    path = write_rows(tmp_path / "triplets.csv", header, [(*row[:3], "") for row in ROWS])
    result = evaluate(inputs, tmp_path / "run", f"data.test={path}", "attribution.enabled=false")
    assert read(result)["metrics"].keys() >= {"test/spearman_cosine"}


@pytest.fixture
def copy(finished: EvaluationResult, tmp_path: Path) -> Path:
    """Return a copy of the finished evaluation's folder."""
    return shutil.copytree(finished.results_path.parent, tmp_path / "copy")


@pytest.fixture
def attributed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the layers that are attributed at, one entry a call."""
    layers: list[int] = []
    original = PairAttributor.attribute

    def spy(self: PairAttributor, *args: Any, **kwargs: Any) -> Any:
        layers.append(self.layer)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PairAttributor, "attribute", spy)
    return layers


def direct(inputs: Path) -> tuple[SiameseEncoder, torch.Tensor, torch.Tensor]:
    encoder = SiameseEncoder.from_pretrained(inputs / "model", device="cpu")
    a, b = (encoder.encode([row[side] for row in ROWS]) for side in (0, 1))
    return encoder, torch.cosine_similarity(a, b), (a * b).sum(dim=-1)


def test_correlations_are_those_of_the_scores(inputs: Path, finished: EvaluationResult) -> None:
    _, cosine, dot = direct(inputs)
    labels = torch.tensor([row[2] for row in ROWS])
    expected = {}
    for name, scores in (("cosine", cosine), ("dot", dot)):
        expected[f"test/spearman_{name}"] = float(spearman(scores, labels))
        expected[f"test/pearson_{name}"] = float(pearson(scores, labels))
    assert expected["test/spearman_cosine"] != expected["test/spearman_dot"]
    found = {key: value for key, value in finished.metrics.items() if key.startswith("test/")}
    assert found == pytest.approx(expected, abs=SCORE_TOLERANCE)


def test_layer_metrics_are_those_of_the_attributions(
    inputs: Path, finished: EvaluationResult
) -> None:
    encoder, _, _ = direct(inputs)
    rows = [ROWS[i] for i in sample_pairs(len(ROWS), 4, 0)]
    for layer in LAYERS:
        attributor = PairAttributor(encoder, layer)
        results = attributor.attribute([row[0] for row in rows], [row[1] for row in rows])
        expected = summarise(results, 0.0)
        assert expected.keys() == set(KEYS)
        del expected["seconds"]
        found = {name: finished.metrics[layer_key(layer, name)] for name in expected}
        assert found == pytest.approx(expected, abs=SCORE_TOLERANCE)
        terms = {
            key.rpartition("/")[2]: value
            for key, value in finished.metrics.items()
            if key.startswith(f"reference_terms/layer_{layer}/")
        }
        assert terms["score_minus_sum_above_0.1_share"] == 0  # the model is shifted
        assert terms["main_effects_a_abs_sum_mean"] < SCORE_TOLERANCE
        assert terms["score_minus_sum_abs_mean"] < 0.01


def test_reference_terms_of_an_unshifted_model(inputs: Path, tmp_path: Path) -> None:
    settings = ("model.shift=false", "model.reference=pad", "attribution.layers=[3]")
    result = evaluate(inputs, tmp_path, *settings)
    rows = pq.read_table(tmp_path / "attributions" / "layer_3.parquet").to_pylist()
    terms = [row["main_effects_a"] + row["main_effects_b"] + row["intercept"] for row in rows]
    for row, term in zip(rows, terms, strict=True):
        assert row["sum"] + term + row["residual"] == pytest.approx(row["score"], abs=1e-5)
    far = sum(abs(row["score"] - row["sum"]) > 0.1 for row in rows) / len(rows)
    assert far > 0
    assert result.metrics["reference_terms/layer_3/score_minus_sum_above_0.1_share"] == far
    assert result.metrics["reference_terms/layer_3/main_effects_a_abs_sum_mean"] > 0.1


def test_results_file(inputs: Path, finished: EvaluationResult) -> None:
    content = read(finished)
    assert content["schema_version"] == 1
    assert content["metrics"] == finished.metrics
    assert content["notes"] == list(finished.notes) == []
    assert content["model"]["name"] == str(inputs / "model")
    assert content["attribution"]["reused_layers"] == []
    scores = pq.read_table(finished.pairs_path).column("score").to_pylist()
    assert content["categories"]["unrelated"] == {
        "n_pairs": 2,
        "score_mean": pytest.approx((scores[1] + scores[4]) / 2, abs=1e-6),
        "label_mean": pytest.approx(0.1),
    }
    folder = finished.results_path.parent
    assert load_config(EvaluateConfig, [folder / "config.yaml"]) == config_of(
        inputs, folder, "n_examples=2"
    )


def test_pairs_file(inputs: Path, finished: EvaluationResult) -> None:
    _, cosine, dot = direct(inputs)
    rows = pq.read_table(finished.pairs_path).to_pylist()
    assert [(r["text_a"], r["text_b"], r["label"], r["category"]) for r in rows] == ROWS
    assert [r["index"] for r in rows] == list(range(len(ROWS)))
    assert [r["score"] for r in rows] == [r["score_cosine"] for r in rows]
    assert [r["score_cosine"] for r in rows] == pytest.approx(cosine.tolist(), abs=SCORE_TOLERANCE)
    assert [r["score_dot"] for r in rows] == pytest.approx(dot.tolist(), rel=SCORE_TOLERANCE)
    sample = sample_pairs(len(ROWS), 4, 0)
    for layer in LAYERS:
        known = [r["index"] for r in rows if r[f"layer_{layer}_sum"] is not None]
        assert known == sample
        for i in sample:
            row = rows[i]
            total = row[f"layer_{layer}_sum"] + row[f"layer_{layer}_residual"]
            assert total == pytest.approx(row["score"], abs=SCORE_TOLERANCE)
            assert row[f"layer_{layer}_completeness_error"] < 1e-3
            assert row[f"layer_{layer}_converged"]
        written = pq.read_table(
            finished.results_path.parent / "attributions" / f"layer_{layer}.parquet"
        )
        for line in written.to_pylist():
            for name in ("score", "main_effects_b", "intercept", "convergence_delta", "n_nodes_a"):
                assert rows[line["index"]][f"layer_{layer}_{name}"] == line[name]


def test_strongest_pairs_and_figures(finished: EvaluationResult) -> None:
    folder = finished.results_path.parent
    content = json.loads((folder / "strongest_pairs.json").read_text(encoding="utf-8"))
    sample = sample_pairs(len(ROWS), 4, 0)[:2]
    assert [entry["index"] for entry in content["pairs"]] == sample
    for entry in content["pairs"]:
        for layer in LAYERS:
            values = [abs(p["value"]) for p in entry[f"layer_{layer}"]["token_pairs"]]
            assert values == sorted(values, reverse=True)
            assert 0 < len(values) <= 20
    names = [f"layer_{layer}_pair_{index}.png" for layer in LAYERS for index in sample]
    assert [path.name for path in finished.figures] == names
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in finished.figures)


def test_checkpoint_and_export_score_alike(inputs: Path, tmp_path: Path) -> None:
    settings = {"similarity": "dot", "shift": True, "reference": "uniform"}
    encoder = SiameseEncoder.from_pretrained(inputs / "model", device="cpu", **settings)
    encoder.save_pretrained(tmp_path / "export")
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    checkpoint = {"xsiam": encoder.checkpoint_payload(), "state_dict": state}
    torch.save(checkpoint, tmp_path / "best.ckpt")
    expected = encoder.score([row[0] for row in ROWS], [row[1] for row in ROWS]).tolist()
    for name in ("export", "best.ckpt"):
        result = evaluate(
            inputs, tmp_path / "run", f"checkpoint={tmp_path / name}", "attribution.enabled=false"
        )
        rows = pq.read_table(result.pairs_path).to_pylist()
        assert [row["score"] for row in rows] == pytest.approx(
            expected,
            rel=SCORE_TOLERANCE,
            abs=1e-5,  # dot products of vectors of norm 3
        )
        assert [row["score"] for row in rows] == [row["score_dot"] for row in rows]
        model = read(result)["model"]
        assert {key: model[key] for key in settings} == settings


def test_table_is_printed_to_a_pipe(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(inputs, tmp_path)
    printed = capsys.readouterr().out
    for part in ("test/spearman_cosine", "layer 2", "layer 3", "unrelated", "converged_fraction"):
        assert part in printed
    assert f"{result.metrics['test/spearman_cosine']:.4f}" in printed
    assert str(result.results_path) in printed
    assert "\x1b" not in printed


def test_unlabelled_pairs_are_attributed(inputs: Path, tmp_path: Path) -> None:
    result = evaluate(inputs, tmp_path, f"data.test={inputs / 'plain.csv'}")
    assert result.notes == ("The pairs have no labels: correlations are left out.",)
    assert not any(key.startswith("test/") for key in result.metrics)
    assert result.metrics["attribution/layer_2/converged_fraction"] == 1
    content = read(result)
    assert content["categories"] == {}
    assert content["data"]["labelled"] is False
    assert pq.read_table(result.pairs_path).column("label").null_count == len(ROWS)


def test_undefined_correlations_are_notes(inputs: Path, tmp_path: Path) -> None:
    header = ["sentence1", "sentence2", "score"]
    path = write_rows(tmp_path / "same.csv", header, [(TEXT_A, TEXT_B, x) for x in (0.1, 0.9, 0.5)])
    result = evaluate(inputs, tmp_path / "run", f"data.test={path}", "attribution.enabled=false")
    assert result.metrics == {}
    assert len(result.notes) == 2
    assert result.notes[1].startswith(
        "`test/spearman_dot` and `test/pearson_dot` are undefined: all 3 scores are equal to "
    )
    assert read(result)["notes"] == list(result.notes)
    assert result.figures == ()


def test_one_pair_has_no_correlation(inputs: Path, tmp_path: Path) -> None:
    result = evaluate(inputs, tmp_path, "data.limit=1", "attribution.enabled=false")
    assert "a correlation needs 2 pairs or more, but there are 1" in result.notes[0]


def test_default_layer_and_default_pairs(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path, "attribution.layers=[]", "data.limit=3")
    config.data.test = None
    result = run_evaluation(config)
    assert any("attributions are at layer 2" in note for note in result.notes)
    assert any("bundled test pairs" in note for note in result.notes)
    assert "attribution/layer_2/n_nodes_mean" in result.metrics
    assert read(result)["data"]["n_pairs"] == 3


def test_unconverged_texts_are_one_note(inputs: Path, tmp_path: Path) -> None:
    result = evaluate(
        inputs, tmp_path, "attribution.tolerance=1e-9", "attribution.max_nodes=16",
        "attribution.layers=[0]",
    )  # fmt: skip
    (note,) = result.notes
    assert "did not meet the tolerance 1.0e-09 at layer 0" in note
    assert result.metrics["attribution/layer_0/converged_fraction"] < 1
    again = evaluate(
        inputs, tmp_path, "attribution.tolerance=1e-9", "attribution.max_nodes=16",
        "attribution.layers=[0]",
    )  # fmt: skip
    assert again.notes[1:] == (note,)


def test_truncation_warns_once_and_is_a_note(inputs: Path, tmp_path: Path) -> None:
    with pytest.warns(TruncationWarning, match="window of 6 tokens") as caught:
        result = evaluate(inputs, tmp_path, "model.max_length=6")
    cut = [str(w.message) for w in caught if issubclass(w.category, TruncationWarning)]
    assert len(cut) == 1, cut
    assert "window of 6 tokens" in result.notes[0]


def test_stopped_evaluation_goes_on_with_the_next_layer(
    inputs: Path, finished: EvaluationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PairAttributor.attribute
    attributed: list[int] = []

    def stopped_once(self: PairAttributor, *args: Any, **kwargs: Any) -> Any:
        attributed.append(self.layer)
        if attributed == [2, 3]:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PairAttributor, "attribute", stopped_once)
    with pytest.raises(KeyboardInterrupt):
        evaluate(inputs, tmp_path, "n_examples=2")
    assert not (tmp_path / "results.json").exists()
    result = evaluate(inputs, tmp_path, "n_examples=2", "attribution.memory_budget=1GB")
    assert attributed == [2, 3, 3]
    assert result.notes == (
        "Layer 2 is reused from an earlier run with the same settings (layer_2.parquet).",
    )
    assert read(result)["attribution"]["reused_layers"] == [2]
    ours, theirs = (
        {key: value for key, value in r.metrics.items() if not key.endswith("seconds")}
        for r in (result, finished)
    )
    assert ours == pytest.approx(theirs, abs=SCORE_TOLERANCE)
    assert [p.name for p in result.figures] == [p.name for p in finished.figures]


def test_unfinished_evaluation_leaves_no_earlier_results(
    inputs: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PairAttributor, "attribute", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(inputs, copy, "attribution.tolerance=1e-4")
    left = {path.name for path in copy.iterdir()}
    assert not left & {"results.json", "pairs.parquet", "strongest_pairs.json"}


@pytest.mark.parametrize(
    "change",
    [
        "attribution.tolerance=1e-4",
        "attribution.seed=1",
        "attribution.n_pairs=5",
        "model.shift=false",
        "model.similarity=dot",
        "model.reference=uniform",
        "model.prompt=query : ",
        "model.truncate_dim=16",
        "n_examples=3",
    ],
)
def test_other_settings_are_computed_anew(
    inputs: Path, copy: Path, attributed: list[int], change: str
) -> None:
    result = evaluate(inputs, copy, change)
    assert attributed == list(LAYERS)
    assert not any("reused" in note for note in result.notes)


def test_other_weights_are_computed_anew(
    inputs: Path, copy: Path, tmp_path: Path, attributed: list[int]
) -> None:
    other = tiny_folder(tmp_path / "other", seed=1)
    evaluate(inputs, copy, f"checkpoint={other}")
    assert attributed == list(LAYERS)


def test_damaged_layer_is_computed_anew(inputs: Path, copy: Path, attributed: list[int]) -> None:
    (copy / "attributions" / "layer_2.parquet").write_bytes(b"no parquet")
    result = evaluate(inputs, copy)
    assert attributed == [2]
    assert "Layer 2 is computed anew: layer_2.parquet cannot be read" in result.notes[0]


def test_earlier_pictures_are_removed(inputs: Path, copy: Path) -> None:
    result = evaluate(inputs, copy, "n_examples=1", "attribution.layers=[3]")
    assert sorted((copy / "figures").iterdir()) == sorted(result.figures)
    assert len(result.figures) == 1


def test_extra_column_of_a_name_that_is_taken(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path, "attribution.enabled=false")
    config.data.column_label = "none"
    result = run_evaluation(config)
    table = pq.read_table(result.pairs_path)
    assert table.column("extra_score").to_pylist() == [str(row[2]) for row in ROWS]
    assert table.column("score").null_count == 0


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ["attribution.layers=[2,9]"],
            InputError,
            r"between 0 and 3 .* got 9.*attribution\.layers",
        ),
        (["data.test=nowhere.csv"], InputError, r"`data\.test`.*'nowhere\.csv'"),
        (["data.test=null", "data.train={pairs}"], InputError, "Expected test pairs"),
        (["data.column_label=gold"], InputError, "'gold'"),
        (
            ["data.columns_negative=[category]"],
            InputError,
            r"these pairs are used with none.*'category'. Set `data.columns_negative=\[\]`",
        ),
        (["checkpoint={inputs}/no.ckpt"], CheckpointError, r"no\.ckpt"),
        (["model.role_a=passage"], InputError, "'passage'"),
        (["model.reference=zero"], InputError, "'zero'"),
        (["attribution.quadrature=simpson"], InputError, "simpson"),
        (["accelerator=abacus"], InputError, "'abacus'"),
        (["devices=2"], InputError, "`devices` to be 1.* got 2"),
        (["output_dir={pairs}"], InputError, r"pairs\.csv' is a file"),
        (["output_dir={pairs}/deep"], InputError, r"pairs\.csv' is a file"),
    ],
)
def test_refusals_come_before_work(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(evaluation._Evaluation, "measure", lambda self: pytest.fail("too late"))
    filled = [text.format(inputs=inputs, pairs=inputs / "pairs.csv") for text in overrides]
    with pytest.raises(error, match=message):
        evaluate(inputs, tmp_path / "run", "attribution.n_nodes=null", *filled)
    assert not (tmp_path / "run").exists()


def test_fixed_rule_without_nodes(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path)
    config.attribution.quadrature = "riemann"
    with pytest.raises(InputError, match="n_nodes"):
        run_evaluation(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_absent(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got 'gpu' and this machine has no such device"):
        evaluate(inputs, tmp_path, "accelerator=gpu")


def test_scores_that_are_not_finite(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SiameseEncoder.from_pretrained.__func__  # type: ignore[attr-defined]

    def broken(cls: type[SiameseEncoder], *args: Any, **kwargs: Any) -> SiameseEncoder:
        encoder: SiameseEncoder = load(cls, *args, **kwargs)
        with torch.no_grad():
            next(encoder.parameters()).fill_(torch.nan)
        return encoder

    monkeypatch.setattr(SiameseEncoder, "from_pretrained", classmethod(broken))
    with pytest.raises(ModelError, match=r"6 of 6 are not, the first that of pair 0 \(nan\)"):
        evaluate(inputs, tmp_path, "attribution.enabled=false")


def test_folder_of_a_training_run_is_kept(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match=f"'{tmp_path}' holds a training run"):
        evaluate(inputs, tmp_path)
    assert (tmp_path / "results.json").read_text() == "{}"
