"""The commands as a user types them: output, exit codes, and what a help screen may cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from models import TEXT_A, TEXT_B, tiny_folder

from xsiam.cli import main
from xsiam.encoder import SiameseEncoder
from xsiam.result import PairAttribution

_HEAVY = ("torch", "lightning", "rich", "transformers", "datasets", "sentence_transformers")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tiny_folder(tmp_path / "model"))


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, xsiam.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([m for m in {_HEAVY} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert "explain" in run.stdout


def test_explain_prints_the_whole_matrix(model: str, tmp_path: Path, capsys) -> None:
    picture, saved = tmp_path / "out" / "p.png", tmp_path / "r.safetensors"
    arguments = ["explain", TEXT_A, TEXT_B, "--model", model, "--layer", "2"]
    assert main([*arguments, "--plot", str(picture), "--save", str(saved)]) == 0
    out = capsys.readouterr().out
    result = PairAttribution.load(saved)
    assert f"{result.score:.4f}" in out
    assert "no shift" in out
    assert picture.stat().st_size > 1000
    assert all(token in out for token in result.tokens_a + result.tokens_b)
    values = out.count("+0.") + out.count("-0.") + out.count("+1.") + out.count("-1.")
    assert values >= result.bordered().numel()
    assert "contextualised positions that enter block 2" in " ".join(out.split())


def test_explain_keeps_the_shift_that_a_model_records(model: str, tmp_path: Path, capsys) -> None:
    export = tmp_path / "export"
    SiameseEncoder.from_pretrained(model, reference="uniform").save_pretrained(export)
    assert main(["explain", "dog", "cat", "--model", str(export), "--layer", "2"]) == 0
    assert "uniform, shifted" in capsys.readouterr().out
    assert main(["explain", "dog", "cat", "--model", str(export), "--no-shift"]) == 0
    assert "no shift" in capsys.readouterr().out


def test_warnings_are_one_line(model: str, capsys) -> None:
    arguments = ["explain", TEXT_A, TEXT_B, "--model", model, "--layer", "0", "--max-nodes", "15"]
    assert main([*arguments, "--tolerance", "1e-6"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: 2 of 2 texts did not meet the tolerance 1.0e-06")
    assert "NO (tolerance" in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "9"], "between 0 and 3 for BertModel, but got 9"),
        (["--tolerance", "0"], "got 0.0. Set `attribution.tolerance`"),
        (["--role-a", "boss"], "but got 'boss'"),
        (["--reference", "zero"], "but got 'zero'"),
        (["--model", "./nowhere"], "./nowhere"),
        (["--plot", "x.gif", "--layer", "3"], "x.gif"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(model: str, arguments, message: str, capsys) -> None:
    base = [] if "--model" in arguments else ["--model", model]
    assert main(["explain", "dog", "cat", *base, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_a_picture_that_cannot_be_is_refused_before_the_model_is_loaded(capsys) -> None:
    assert main(["explain", "dog", "cat", "--model", "./nowhere", "--plot", "x.gif"]) == 2
    assert "'x.gif'" in capsys.readouterr().err


def test_config_errors_are_one_line(capsys) -> None:
    assert main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert main(["train", "trainer.max_epoch=1"]) == 2
    assert "trainer.max_epochs" in capsys.readouterr().err


def test_debug_shows_the_traceback(model: str) -> None:
    with pytest.raises(ValueError, match="got 9"):
        main(["explain", "dog", "cat", "--model", model, "--layer", "9", "--debug"])


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupt(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xsiam.cli._explain", interrupt)
    assert main(["explain", "dog", "cat"]) == 130
    assert "interrupted" in capsys.readouterr().err
