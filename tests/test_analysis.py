"""Analyses: intervals and verdicts, what is kept and shared out, and what becomes of failures."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models import TEXT_A, TEXT_B, TEXTS, tiny_folder

from xsiam.analysis import (
    ANALYSES,
    AbstractAnalysis,
    AnalysisResult,
    Context,
    Needs,
    NotApplicableError,
    ResultTable,
    interval,
    judge,
    register_analysis,
)
from xsiam.analysis.concentration import SHARES, carried
from xsiam.analysis.statistics import Interval, standardised_mean
from xsiam.analysis.summary import markdown_table
from xsiam.attribution import PairAttributor
from xsiam.cli import main
from xsiam.config import EvaluateConfig, load_config
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, InputError
from xsiam.evaluation import EvaluationResult, run_evaluation

LAYERS = (3, 2)
SECRET = "the xylophone of the neighbour"  # text of the data, which no summary may hold
PAIRS = [
    (TEXT_A, TEXT_B, 0.9),
    (SECRET, "a cat sleeps outside", 0.1),
    *((a, b, k / 10) for k, (a, b) in enumerate(zip(TEXTS, reversed(TEXTS), strict=True))),
]
NAME = "concentration"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_folder(folder / "model")
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sentence1", "sentence2", "score"), *PAIRS])
    return folder


def overrides(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        f"checkpoint={inputs / 'model'}",
        f"data.test={inputs / 'pairs.csv'}",
        "attribution.enabled=false",
        "analysis.layers=[2,3]",
        f"analysis.names=[{NAME}]",
        "analysis.n_resamples=100",
        "accelerator=cpu",
        f"output_dir={output}",
        *more,
    ]


def evaluate(inputs: Path, output: Path, *more: str) -> EvaluationResult:
    config = load_config(EvaluateConfig, [], overrides(inputs, output, *more))
    result = run_evaluation(config)
    assert result is not None
    return result


def analyses(result: EvaluationResult) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(result.results_path.read_text(encoding="utf-8"))
    assert content["schema_version"] == 1
    found: dict[str, Any] = content["analyses"]
    return found


@pytest.fixture
def integrated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of texts that are integrated, one entry a shard."""
    counts: list[int] = []
    original = PairAttributor.token_vectors

    def spy(self: PairAttributor, texts: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(texts))
        return original(self, texts, *args, **kwargs)

    monkeypatch.setattr(PairAttributor, "token_vectors", spy)
    return counts


@pytest.fixture
def registered() -> Iterator[None]:
    """Forget analyses that a test registers."""
    before = dict(ANALYSES)
    yield
    ANALYSES.clear()
    ANALYSES.update(before)


# -- statistics ---------------------------------------------------------------------------------


def test_interval_of_a_mean_is_the_normal_one() -> None:
    """Of many observations the bootstrap's is mean ± 1.96 s / √n."""
    values = np.random.default_rng(0).normal(2.0, 3.0, size=400)
    found = interval(values, n_resamples=4000)
    half = 1.959964 * values.std(ddof=1) / math.sqrt(len(values))
    assert found.estimate == pytest.approx(values.mean(), abs=1e-12)
    assert found.n == 400
    assert found.high - found.low == pytest.approx(2 * half, rel=0.06)
    assert (found.low + found.high) / 2 == pytest.approx(values.mean(), abs=0.1 * half)
    narrow = interval(values, confidence=0.5, n_resamples=4000)
    assert narrow.high - narrow.low == pytest.approx(2 * half * 0.674490 / 1.959964, rel=0.06)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draws = np.random.default_rng(1)
    held = [
        found.low <= 0.3 <= found.high
        for found in (
            interval(draws.random(80) < 0.3, n_resamples=400, seed=k, confidence=0.9)
            for k in range(300)
        )
    ]
    assert np.mean(held) == pytest.approx(0.9, abs=0.05)  # 300 draws: 3 standard errors


def test_paired_values_are_resampled_together() -> None:
    """A ratio of sums that is 1/2 in every observation is 1/2 in every resample."""
    whole = np.arange(1.0, 21.0)
    ratio = interval(
        [whole / 2, whole], lambda a, b, axis=-1: a.sum(axis) / b.sum(axis), paired=True
    )
    assert (ratio.low, ratio.estimate, ratio.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-12)
    assert ratio.n == 20


def test_intervals_are_repeatable() -> None:
    values = np.random.default_rng(0).random(30)
    assert interval(values, seed=3) == interval(values, seed=3)
    assert interval(values, seed=3) != interval(values, seed=4)


@pytest.mark.parametrize(
    ("values", "statistic", "reason"),
    [
        ([1.0, 2.0, 3.0], np.mean, "n = 3"),
        ([1.0, 2.0, 3.0, 4.0, float("nan")], np.mean, "1 of n = 5 observations are not finite"),
        ([2.0] * 8, standardised_mean, "undefined on 100 of 100 resamples of n = 8"),
    ],
)
def test_no_interval_without_its_reason(values: list[float], statistic: Any, reason: str) -> None:
    with pytest.raises(NotApplicableError, match=reason):
        interval(values, statistic, n_resamples=100)


@pytest.mark.parametrize(
    ("low", "high", "side", "verdict"),
    [
        (0.6, 0.8, "above", "confirmed"),
        (0.4, 0.6, "above", "undecided"),
        (0.1, 0.4, "above", "contradicted"),
        (0.1, 0.4, "below", "confirmed"),
        (0.6, 0.8, "below", "contradicted"),
        (0.5, 0.8, "above", "undecided"),
    ],
)
def test_verdicts_follow_from_intervals(low: float, high: float, side: str, verdict: str) -> None:
    found = judge("It is so", "share", Interval(0.5, low, high, 9), source="P2", **{side: 0.5})
    assert found.verdict == verdict
    assert found.threshold == 0.5


def test_a_claim_has_one_threshold() -> None:
    for sides in ({}, {"above": 0.1, "below": 0.2}):
        with pytest.raises(ValueError, match="one of `above` and `below`"):
            judge("It is so", "share", Interval(0, 0, 0, 9), source="ours", **sides)


def test_effect_size_is_mean_by_standard_deviation() -> None:
    assert standardised_mean([1.0, 2.0, 3.0]) == pytest.approx(2.0)
    both = standardised_mean([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]], axis=-1)
    assert both.tolist() == pytest.approx([2.0, 2.0])


# -- concentration ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result_10x10(inputs: Path) -> Any:
    """Return an attribution of 100 entries: 5 of 10, 5 of −1, and 90 of 0.5."""
    encoder = SiameseEncoder.from_pretrained(inputs / "model", device="cpu")
    result = PairAttributor(encoder, 3).attribute("dog", "cat")
    entries = torch.tensor([10.0] * 5 + [-1.0] * 5 + [0.5] * 90)
    matrix = entries[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    special = (True, *([False] * 8), True)
    prompt = (False, True, *([False] * 8))
    masks = {f"special_mask_{side}": special for side in "ab"}
    masks |= {f"prompt_mask_{side}": prompt for side in "ab"}
    return dataclasses.replace(result, matrix=matrix.view(10, 10), **masks)


def test_strongest_entries_carry_what_they_sum_to(result_10x10: Any) -> None:
    absolute = dict(zip(SHARES, carried(result_10x10, "absolute"), strict=True))
    assert absolute[0.01] == 10
    assert absolute[0.05] == 50
    assert absolute[0.1] == 50 - 5  # the negative ones come next
    assert absolute[0.2] == 45 + 10 * 0.5
    assert absolute[1.0] == 45 + 90 * 0.5
    signed = dict(zip(SHARES, carried(result_10x10, "signed"), strict=True))
    assert signed[0.1] == 50 + 5 * 0.5
    assert signed[1.0] == absolute[1.0]
    inner = result_10x10.matrix[2:-1, 2:-1]  # neither special nor of the prompt
    assert carried(result_10x10, "signed", "own")[-1] == pytest.approx(float(inner.sum()))


# -- running ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    return evaluate(inputs, tmp_path_factory.mktemp("finished") / "run")


def test_attributions_of_a_context_are_those_of_an_attributor(
    inputs: Path, finished: EvaluationResult
) -> None:
    """What the analysis reports follows from attributions made one by one."""
    encoder = SiameseEncoder.from_pretrained(inputs / "model", device="cpu")
    for layer in LAYERS:
        results = PairAttributor(encoder, layer).attribute(
            [pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]
        )
        sums = np.stack([carried(r, "absolute") for r in results])
        share = sums[:, SHARES.index(0.05)].sum() / sums[:, -1].sum()
        key = f"analysis/{NAME}/layer_{layer}"
        assert finished.metrics[f"{key}/top_5_percent"] == pytest.approx(share, rel=1e-4)
        negative = np.mean([r.negative_share for r in results])
        assert finished.metrics[f"{key}/negative_share"] == pytest.approx(negative, abs=0.005)


def test_everything_is_written(finished: EvaluationResult) -> None:
    folder = finished.results_path.parent / "analysis" / NAME
    entry = analyses(finished)[NAME]
    assert (entry["status"], entry["reason"], entry["reused"]) == ("finished", None, False)
    assert entry["tables"] == ["carried", "negative", "curves"]
    for table in entry["tables"]:
        rows = pq.read_table(folder / f"{table}.parquet").to_pylist()
        with (folder / f"{table}.csv").open(encoding="utf-8", newline="") as file:
            written = list(csv.DictReader(file))
        assert len(written) == len(rows) > 0
        assert list(written[0]) == list(rows[0])
        assert float(written[0]["estimate"]) == pytest.approx(rows[0]["estimate"])
    for figure in entry["figures"]:
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    assert entry["findings"][0]["interval"]["n"] == len(PAIRS)
    keys = {key for key in finished.metrics if key.startswith("analysis/")}
    assert keys == {
        f"analysis/{NAME}/layer_{layer}/{name}"
        for layer in LAYERS
        for name in ("top_5_percent", "negative_share")
    }


def test_summary_holds_figures_and_no_text_of_the_data(finished: EvaluationResult) -> None:
    assert finished.summary_path is not None
    text = finished.summary_path.read_text(encoding="utf-8")
    value = finished.metrics[f"analysis/{NAME}/layer_3/top_5_percent"]
    assert f"{value:.3f} [" in text
    assert "Few token pairs carry most of the score" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) == 1
    assert all((finished.summary_path.parent / picture).is_file() for picture in pictures)
    for word in ("xylophone", "neighbour"):
        assert word not in text


def test_finished_analyses_are_reused(inputs: Path, tmp_path: Path, integrated: list[int]) -> None:
    first = evaluate(inputs, tmp_path)
    assert integrated
    integrated.clear()
    again = evaluate(inputs, tmp_path)
    assert integrated == []
    assert analyses(again)[NAME]["reused"] is True
    assert again.metrics == first.metrics
    more = evaluate(inputs, tmp_path, "analysis.n_resamples=120")
    assert integrated == []  # other intervals of the same token vectors
    assert analyses(more)[NAME]["reused"] is False
    evaluate(inputs, tmp_path, "attribution.tolerance=1e-4")
    assert integrated


@pytest.mark.usefixtures("registered")
def test_texts_of_one_analysis_are_not_integrated_again_for_another(
    inputs: Path, tmp_path: Path, integrated: list[int]
) -> None:
    new = ["a red kitten", "the yard is big"]

    def requests(self: Any, context: Context) -> Any:
        return context.requests(["model"], [PAIRS[0][0], new[0]], [PAIRS[0][1], new[1]])

    def run(self: Any, context: Context) -> AnalysisResult:
        results = context.attributions("model", 2, [PAIRS[0][0], new[0]], [new[1], PAIRS[0][1]])
        sums = [{"sum": float(r.matrix.sum() + r.residual), "score": r.score} for r in results]
        return AnalysisResult({"sums": ResultTable(sums, "sums")})

    register("further", run, requests=requests)
    evaluate(inputs, tmp_path)
    integrated.clear()
    result = evaluate(inputs, tmp_path, f"analysis.names=[{NAME},further]")
    assert integrated == [len(new)] * len(LAYERS)
    assert analyses(result)["further"]["status"] == "finished"
    encoder = SiameseEncoder.from_pretrained(inputs / "model", device="cpu")
    scores = encoder.score([PAIRS[0][0], new[0]], [new[1], PAIRS[0][1]]).tolist()
    rows = pq.read_table(tmp_path / "analysis" / "further" / "sums.parquet").to_pylist()
    assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-5)
    assert [row["sum"] for row in rows] == pytest.approx(scores, abs=1e-5)  # texts of two folders


def test_interrupted_integration_goes_on(
    inputs: Path, tmp_path: Path, integrated: list[int]
) -> None:
    evaluate(inputs, tmp_path)
    total = len(integrated)
    shards = sorted((tmp_path / "analysis" / "token_vectors").glob("*/shard_*.safetensors"))
    assert len(shards) == total == len(LAYERS)
    shards[0].unlink()
    (tmp_path / "analysis" / NAME / "result.json").unlink()
    integrated.clear()
    result = evaluate(inputs, tmp_path)
    assert len(integrated) == 1
    assert analyses(result)[NAME]["status"] == "finished"


def test_a_folder_that_another_process_only_begins_is_no_obstacle(
    inputs: Path, tmp_path: Path, integrated: list[int]
) -> None:
    """Between making an index's folder and writing its manifest it is empty."""
    evaluate(inputs, tmp_path / "first")
    vectors = Path("analysis") / "token_vectors"
    for folder in (tmp_path / "first" / vectors).iterdir():
        (tmp_path / "second" / vectors / folder.name).mkdir(parents=True)
    integrated.clear()
    result = evaluate(inputs, tmp_path / "second")
    assert len(integrated) == len(LAYERS)
    assert analyses(result)[NAME]["status"] == "finished"


def register(name: str, run: Any, **attributes: Any) -> None:
    kind = type(
        name.title(),
        (AbstractAnalysis,),
        {"name": name, "question": "Is it?", "source": "ours", "run": run, **attributes},
    )
    register_analysis(kind)


@pytest.mark.usefixtures("registered")
def test_a_failure_loses_no_other_analysis(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any, context: Context) -> AnalysisResult:
        raise ZeroDivisionError("nothing to divide by")

    def undefined(self: Any, context: Context) -> AnalysisResult:
        return AnalysisResult({"t": ResultTable([{"x": float("nan")}], "x")})

    register("failing", fail)
    register("undefined", undefined)
    names = f"analysis.names=[failing,undefined,{NAME}]"
    assert main(["evaluate", *overrides(inputs, tmp_path, names)]) == 1
    assert "FAILED: failing, undefined" in capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["analyses"]
    assert content[NAME]["status"] == "finished"
    assert content["failing"]["status"] == "failed"
    assert content["failing"]["reason"] == "ZeroDivisionError: nothing to divide by"
    assert "finite values in t.x, but got nan" in content["undefined"]["reason"]
    trace = (tmp_path / "analysis" / "failing" / "traceback.txt").read_text(encoding="utf-8")
    assert "raise ZeroDivisionError" in trace
    assert "`failing` failed: ZeroDivisionError" in (tmp_path / "summary.md").read_text("utf-8")
    # A failed one is made again, a finished one is not.
    assert main(["evaluate", *overrides(inputs, tmp_path, names)]) == 1
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["analyses"]
    assert content[NAME]["reused"] is True


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (Needs(models=("model", "control")), "`analysis.models.control`, which was not given"),
        (Needs(packages={"no_such_package": "pip install it"}), "`no_such_package`: pip install"),
        (Needs(min_pairs=99), f"99 pairs or more, but there are n = {len(PAIRS)}"),
        (Needs(parser=True), "no spaCy pipeline 'xx_none'.*analysis.spacy_model"),
    ],
)
def test_what_is_missing_is_a_reason_to_skip(
    inputs: Path, tmp_path: Path, needs: Needs, reason: str
) -> None:
    def run(self: Any, context: Context) -> AnalysisResult:
        raise AssertionError("it was run")

    register("wanting", run, needs=needs)
    result = evaluate(inputs, tmp_path, "analysis.names=[wanting]", "analysis.spacy_model=xx_none")
    entry = analyses(result)["wanting"]
    assert entry["status"] == "skipped"
    assert re.search(reason, entry["reason"]), entry["reason"]
    assert result.failed == ()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["analysis.names=[concentratoin]"], InputError, "Did you mean 'concentration'"),
        (["analysis.layers=[9]"], InputError, "analysis.layers"),
        (["analysis.layers=[]"], InputError, "Set `analysis.layers`"),
        (["analysis.n_resamples=5"], InputError, "100 or more"),
        (["analysis.confidence=1.0"], InputError, "between 0.5 and 1"),
    ],
)
def test_bad_settings_are_refused_before_work(
    inputs: Path, tmp_path: Path, more: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(inputs, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("registered")
def test_a_model_that_cannot_be_loaded_is_refused_before_work(inputs: Path, tmp_path: Path) -> None:
    def run(self: Any, context: Context) -> AnalysisResult:
        raise AssertionError("it was run")

    register("comparing", run, needs=Needs(models=("unshifted",)))
    more = ["analysis.names=[comparing]", f"analysis.models.unshifted={tmp_path / 'no.ckpt'}"]
    with pytest.raises(CheckpointError, match=r"no\.ckpt"):
        evaluate(inputs, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_processes_share_the_work(inputs: Path, finished: EvaluationResult, tmp_path: Path) -> None:
    """Two real processes leave what one does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "xsiam.cli", "evaluate"]
    command += overrides(inputs, tmp_path / "run")
    started = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    content = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert content["metrics"] == pytest.approx(finished.metrics, rel=1e-4, abs=1e-5)
    assert content["analyses"][NAME]["status"] == "finished"
    summary = (tmp_path / "run" / "summary.md").read_text(encoding="utf-8")
    assert "* command: `torchrun --nproc-per-node 2 evaluate.py evaluate checkpoint=" in summary


def test_markdown_tables() -> None:
    rows = [{"name": "a|b", "value": 0.25}, {"name": "c", "value": None}]
    assert markdown_table(rows).splitlines() == [
        "| name | value |",
        "|---|--:|",
        "| a\\|b | 0.25 |",
        "| c | – |",
    ]
