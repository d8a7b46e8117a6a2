"""The attribution benchmark: what it measures is right, and a run survives what goes wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TEXT_A, TEXT_B, tiny_folder, tiny_model
from sentence_transformers.base.modules import Normalize
from torch.func import jvp, vmap

from xsiam import PairAttributor, SiameseEncoder

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():  # an installed copy has none
    pytest.skip("the repository's benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import attribution  # noqa: E402
import cases  # noqa: E402
import child  # noqa: E402
import convergence  # noqa: E402
import machine  # noqa: E402
import peers  # noqa: E402
import pictures  # noqa: E402
import published  # noqa: E402
import tables  # noqa: E402
import texts  # noqa: E402
from processes import Script  # noqa: E402
from results import Results  # noqa: E402

MATRIX = 1e-5  # of the largest entry; the worst measured was 2e-6
MACHINE = {
    "system": "Linux",
    "processor": "some",
    "cores": 2,
    "threads": 1,
    "python": "3.11",
    "torch": "2.13",
    "device": "cpu",
    "peak_flops": 1e11,
}
PLAN = cases.Plan(
    layers={"small": [2, 1], "large": [2]},
    depth={"small": 3, "large": 3},
    all_layers={"small": [3, 2], "large": [3]},
    environments=("retrivex", "xplainsim", "xsbert"),
)


# -- what is measured ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::xsiam.errors.ConvergenceWarning")
@pytest.mark.parametrize("variant", published.VARIANTS)
@pytest.mark.parametrize(("architecture", "shift"), [("bert", True), ("mpnet", False)])
def test_the_published_procedure_gives_our_riemann_matrix(
    architecture: str, shift: bool, variant: str
) -> None:
    model = tiny_model(architecture, extra=[Normalize()]).double()
    encoder = SiameseEncoder(model, shift=shift, reference="pad")
    training = encoder.model.training
    for layer in (0, 2):
        ours = published.published_attribution(
            encoder, TEXT_A, TEXT_B, layer, 5, variant=variant, chunk=5
        )
        scale = ours.matrix.abs().max()

        def riemann(n_nodes: int, layer: int = layer) -> Any:
            attributor = PairAttributor(encoder, layer, quadrature="riemann", n_nodes=n_nodes)
            return attributor.attribute(TEXT_A, TEXT_B)

        result = riemann(5)
        assert (ours.matrix - result.matrix).abs().max() <= MATRIX * scale
        assert ours.completeness_error == pytest.approx(result.completeness_error, abs=1e-5)
        assert ours.score == pytest.approx(result.score, abs=1e-6)
        assert (ours.matrix - riemann(6).matrix).abs().max() > 10 * MATRIX * scale
    assert encoder.model.training == training
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_the_published_procedure_says_what_it_cannot_do() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    with pytest.raises(ValueError, match="between 0 and 2, but got 3"):
        published.published_attribution(encoder, TEXT_A, TEXT_B, 3, 2)
    with pytest.raises(ValueError, match="but got 'both'"):
        published.published_attribution(encoder, TEXT_A, TEXT_B, 1, 2, variant="both")


def test_operations_of_known_products_are_counted() -> None:
    left, right = torch.randn(10, 64), torch.randn(64, 32)
    one = 2 * 10 * 64 * 32
    assert machine.count_flops(lambda: left @ right) == one
    assert machine.count_flops(lambda: torch.nn.functional.linear(left, right.T)) == one
    with torch.inference_mode():
        assert machine.count_flops(lambda: torch.nn.functional.linear(left, right.T)) == one

    def tail(x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x) @ right).sum(0)

    tangents = torch.randn(7, 10, 64)
    counted = machine.count_flops(lambda: vmap(lambda t: jvp(tail, (left,), (t,))[1])(tangents))
    # The primal, seven tangents, and at most the one product with a zero that jvp performs.
    assert 8 * one <= counted <= 9 * one
    query = torch.randn(1, 2, 8, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert machine.count_flops(lambda: attention(query, query, query)) == 2 * 2 * 2 * 8 * 8 * 16


def test_texts_have_the_length_that_was_asked_for() -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    (text_a,), (text_b,) = texts.make_pairs(
        encoder, {"kind": "words", "tokens_a": 10, "tokens_b": 33}
    )
    assert len(encoder.tokenizer(text_a)["input_ids"]) == 10
    assert len(encoder.tokenizer(text_b)["input_ids"]) == 33
    texts_a, texts_b = texts.make_pairs(encoder, {"kind": "bundled", "n": 1000})
    assert len(texts_a) == len(texts_b) == 1000
    assert len(set(zip(texts_a, texts_b, strict=True))) == 1000
    with pytest.raises(ValueError, match="but got 5000"):
        texts.make_pairs(encoder, {"kind": "bundled", "n": 5000})


@pytest.mark.filterwarnings("ignore::xsiam.errors.ConvergenceWarning")
def test_a_worker_measures_both_methods(tmp_path: Path) -> None:
    worker = child.Worker({"small": str(tiny_folder(tmp_path / "small"))}, "cpu")
    assert worker.depth() == {"small": 3}
    plan = dataclasses.replace(PLAN, nodes=2, repeats=2, batch=3, layers={"small": [2]})
    loop, batched, *adaptive = cases.published(plan)
    first, second = (worker.run(case.to_dict()) for case in (loop, batched))
    assert first["matrix_sum"] == pytest.approx(second["matrix_sum"], rel=1e-4)
    row = worker.run(adaptive[1].to_dict())
    assert row["completeness_error"] <= row["tolerance"] == 1e-3
    assert row["converged"] == 1
    assert len(row["trials"]) == 2
    assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
    peak = worker.run(cases.peak(plan)[0].to_dict())
    assert peak["pairs"] == 3
    assert peak["flops"] > 0
    assert peak["peak_flops"] > 0


def test_a_case_that_fails_is_answered_with_its_reason(tmp_path: Path) -> None:
    worker = child.Worker({"small": str(tiny_folder(tmp_path / "small"))}, "cpu")
    case = dataclasses.replace(cases.layers(PLAN)[0], layer=9)
    answer = child.answer(worker.run, case.to_dict())
    assert answer["status"] == "failed"
    assert "InputError" in answer["note"]
    assert "between 0 and 3" in answer["note"]


def test_keys_are_unique() -> None:
    keys = [case.key for section in cases.SECTIONS.values() for case in section(PLAN)]
    assert len(set(keys)) == len(keys)
    compared = [
        case.settings["compare_with"]
        for section in cases.SECTIONS.values()
        for case in section(PLAN)
        if case.settings.get("compare_with")
    ]
    assert compared
    assert set(compared) <= set(keys)


# -- processes that fail ------------------------------------------------------------------------

_PEER = """
import json, sys, time
request = json.load(open(sys.argv[1]))
for case in request["cases"]:
    if case["settings"].get("crash"):
        raise RuntimeError("the size of tensor a must match")
    if case["settings"].get("sleep"):
        time.sleep(60)
    print("noise")
    with open(sys.argv[2], "a") as answers:
        print(json.dumps({"status": "ok", "seconds": case["settings"]["n"]}), file=answers)
"""


def script(tmp_path: Path, timeout: float = 30.0) -> Script:
    file = tmp_path / "peer.py"
    file.write_text(_PEER)
    return Script(sys.executable, file, {"threads": 1}, timeout)


def test_a_crash_costs_one_case(tmp_path: Path) -> None:
    wanted = [{"settings": s} for s in ({"n": 1}, {"crash": True}, {"n": 3}, {"n": 4})]
    answers = list(script(tmp_path).answers(wanted))
    assert [a["status"] for a in answers] == ["ok", "failed", "ok", "ok"]
    assert answers[1]["note"] == "RuntimeError: the size of tensor a must match"
    assert [a["seconds"] for a in answers if a["status"] == "ok"] == [1, 3, 4]


def test_a_case_out_of_time_is_stopped(tmp_path: Path) -> None:
    wanted = [{"settings": {"sleep": True, "n": 1}}, {"settings": {"n": 2}}]
    answers = list(script(tmp_path, timeout=1.0).answers(wanted))
    assert [a["status"] for a in answers] == ["timeout", "ok"]
    assert answers[0]["note"] == "stopped after 1 s"


# -- rows and tables ----------------------------------------------------------------------------


class FakeRunner:
    """Answers at once; some methods fail, and after some rows the user interrupts."""

    def __init__(self, fails: tuple[str, ...] = (), stop_after: int | None = None) -> None:
        self.fails = fails
        self.stop_after = stop_after
        self.keys: list[str] = []

    def answers(self, group: Any, results: Results) -> Any:
        for case in group:
            if len(self.keys) == self.stop_after:
                raise KeyboardInterrupt
            self.keys.append(case.key)
            if case.method in self.fails:
                yield case, {"status": "failed", "note": "RuntimeError: sizes | differ"}
                continue
            seconds = 40.0 if case.method.startswith("published") else 0.1
            error = 1e-2 if case.method.startswith("published") else 1e-3
            answer = {"status": "ok", "seconds": seconds, "completeness_error": error}
            answer |= {"n_nodes": 4, "pairs": 2, "matrix": [[1.0, 2.0]], "peak_bytes": 10**7}
            if "count_flops" in case.settings:
                answer |= {"flops": 5e9, "peak_flops": 1e11}
            yield case, answer


def all_cases() -> list[Any]:
    return [case for section in cases.SECTIONS.values() for case in section(PLAN)]


def begun(folder: Path, **options: Any) -> Results:
    results = Results(folder, **options)
    results.begin("python benchmarks/attribution.py", MACHINE, {"small": "a", "large": "b"})
    return results


def test_rows_are_written_at_once_and_taken_up_again(tmp_path: Path) -> None:
    runner: Any = FakeRunner(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        attribution.run(all_cases(), begun(tmp_path), runner)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 4
    with (tmp_path / "results.csv").open(newline="") as stream:
        assert [row["title"] for row in csv.DictReader(stream)] == [row["title"] for row in rows]

    again: Any = FakeRunner(fails=("xplainsim",))
    results = begun(tmp_path, resume=True)
    attribution.run(all_cases(), results, again)
    assert not set(again.keys) & set(runner.keys)
    assert len(again.keys) + 4 == len(all_cases())

    last: Any = FakeRunner()
    attribution.run(all_cases(), begun(tmp_path, resume=True), last)
    assert last.keys
    assert all("xplainsim" in key for key in last.keys)  # failed ones alone


def test_the_report_says_how_and_where_and_what_failed(tmp_path: Path) -> None:
    results = begun(tmp_path)
    runner: Any = FakeRunner(fails=("xplainsim",))
    attribution.run(all_cases(), results, runner)
    attribution.report(results)
    text = (tmp_path / "results.md").read_text()
    assert "python benchmarks/attribution.py" in text
    assert "some, 2 cores, 1 threads" in text
    assert "100 GFLOP/s" in text
    assert "RuntimeError: sizes \\| differ" in text
    assert all(tables._TITLES[section].strip() in text for section in cases.SECTIONS)
    assert (tmp_path / "results.png").stat().st_size > 1000
    rows = [r for r in tables.derived_rows(results) if r["section"] == "published"]
    ours = [r for r in rows if r["method"] == "xsiam"]
    assert ours
    assert all(r["times_published"] == pytest.approx(400) for r in ours)
    share = [r["share_of_peak"] for r in tables.derived_rows(results) if r["section"] == "peak"]
    assert share == pytest.approx([0.5] * len(share))


def test_no_rows_no_picture(tmp_path: Path) -> None:
    assert pictures.draw(begun(tmp_path), tmp_path / "x.png") is False


def test_where_memory_is_the_devices_cases_share_two_processes() -> None:
    """Those that wait for others' errors come last; a peer has its own interpreter."""
    found = list(attribution.groups(all_cases(), together=True))
    assert sum(map(len, found)) == len(all_cases())
    waiting = ["tolerance_from" in group[0].settings for group in found]
    assert waiting == sorted(waiting)
    for group in found:
        assert len({case.method for case in group if case.method in peers.PEERS}) <= 1
        assert len({case.method in peers.PEERS for case in group}) == 1
        assert len({"tolerance_from" in case.settings for case in group}) == 1
    alone = list(attribution.groups(all_cases(), together=False))
    assert all(len(group) == 1 for group in alone if group[0].alone)


@pytest.mark.parametrize(
    ("option", "reason"), [("--variants=loop,both", "variants"), ("--sections=all", "sections")]
)
def test_what_the_benchmark_does_not_know_is_refused(
    tmp_path: Path, option: str, reason: str
) -> None:
    with pytest.raises(SystemExit, match=f"--{reason} among"):
        attribution.main(["--output", str(tmp_path), option])


def test_xsiam_must_not_exceed_the_error_that_it_is_held_against(tmp_path: Path) -> None:
    results = begun(tmp_path)
    loop, batched = cases.published(PLAN)[:2]
    assert attribution.own_error([loop.key], results) is None
    results.add(loop, {"status": "ok", "completeness_error": 0.02})
    results.add(batched, {"status": "ok", "completeness_error": 0.01})
    assert attribution.own_error([loop.key, batched.key], results) == 0.01
    results.add(loop, {"status": "failed", "note": "out of memory"})
    assert attribution.own_error([loop.key], results) is None


def test_results_are_not_mixed(tmp_path: Path) -> None:
    results = begun(tmp_path)
    results.add(all_cases()[0], {"status": "ok", "seconds": 1.0})
    with pytest.raises(ValueError, match="Add --resume"):
        Results(tmp_path)
    with pytest.raises(ValueError, match=r"`threads`.*, 1, but got 8"):
        Results(tmp_path, resume=True).begin("x", MACHINE | {"threads": 8}, {})
    (tmp_path / "results.json").write_text('{"schema_version": 1}')
    with pytest.raises(ValueError, match="reading failed"):
        Results(tmp_path, resume=True)


def test_a_failed_environment_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: list[str]) -> None:
        raise RuntimeError("no such version")

    def makes(command: list[str], check: bool) -> None:
        python = peers.python_of(Path(command[-1]).parent, Path(command[-1]).name)
        python.parent.mkdir(parents=True)
        python.touch()

    monkeypatch.setattr(peers, "_run", fails)
    monkeypatch.setattr(peers.subprocess, "run", makes)
    with pytest.raises(RuntimeError, match="no such version"):
        peers.make_environments(tmp_path, ("retrivex",))
    assert not peers.python_of(tmp_path, "retrivex").exists()


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    common = ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="'everything'"):
        attribution.main([*common, "--sections", "everything"])
    with pytest.raises(SystemExit, match="holds xsbert/"):
        attribution.main([*common, "--xsbert-source", str(tmp_path)])


@pytest.mark.slow
def test_the_command_line_from_end_to_end(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    arguments = ["--output", str(tmp_path / "out"), "--quick", "--threads", "1"]
    arguments += ["--minilm", str(folder), "--sections", "published,pairs", "--nodes", "2"]
    assert attribution.main(arguments) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert len(rows) == 7
    assert {row["status"] for row in rows} == {"ok"}
    assert attribution.main([*arguments, "--resume"]) == 0


# -- nodes to tolerance -------------------------------------------------------------------------


def test_convergence_goes_on_where_it_stopped(tmp_path: Path, capsys) -> None:
    data, folder = tmp_path / "pairs.csv", tmp_path / "rows"
    data.write_text(f"sentence1,sentence2,score\n{TEXT_A},{TEXT_B},1\n{TEXT_B},the cat,0\n")
    command = [
        "--data",
        str(data),
        "--output",
        str(folder),
        "--model",
        str(tiny_folder(tmp_path / "model")),
    ]
    command += ["--pairs", "2", "--batch", "2", "--tolerance", "1e-2"]
    convergence.main([*command, "--layers", "3-2"])
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(row)["layer"] for row in rows] == [3, 3, 2, 2]  # 3 distinct texts
    assert TEXT_A not in "".join(rows)
    (folder / "rows.jsonl").write_text("".join(rows[:3]) + rows[3][:20])  # a torn line
    capsys.readouterr()
    convergence.main([*command, "--layers", "2,1"])
    assert capsys.readouterr().out.splitlines() == [
        "layer 2: 3 of 3",
        "layer 1: 2 of 3",
        "layer 1: 3 of 3",
    ]
    kept = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    assert kept[:3] == rows[:3]
    found = [json.loads(row) for row in kept]
    texts_of = {text: number for number, text in enumerate([TEXT_A, TEXT_B, "the cat"])}
    again = str(tiny_folder(tmp_path / "model"))
    encoder = SiameseEncoder.from_pretrained(again, similarity="cos", reference="pad")
    vectors = PairAttributor(encoder, 2, tolerance=1e-2).token_vectors(list(texts_of))
    nodes = [n for row in found if row["layer"] == 2 for n in row["n_nodes"]]
    assert nodes == [text.n_nodes for text in vectors]
    table = (folder / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[-3:]] == ["3", "2", "1"]
    data.write_text(f"sentence1,sentence2,score\n{TEXT_A},{TEXT_B},1\n{TEXT_A},the cat,0\n")
    with pytest.raises(SystemExit, match="data"):
        convergence.main([*command, "--layers", "1"])


@pytest.mark.parametrize("layers", ["4", "a", "-1"])
def test_wrong_layers_are_named(layers: str) -> None:
    with pytest.raises(SystemExit, match="--layers"):
        convergence.parse_layers(layers, 3)
