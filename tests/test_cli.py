"""The commands as a user types them: output, exit codes, and what a help screen may cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from models import TEXT_A, TEXT_B, tiny_folder
from sentence_transformers import SentenceTransformer

from xsiam.cli import main
from xsiam.encoder import SiameseEncoder
from xsiam.index import TokenVectorIndex
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


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(f"{TEXT_A}\n{TEXT_B}\ndog\n")
    return path


def test_an_index_is_built_and_explains_a_query(
    model: str, texts: Path, tmp_path: Path, capsys
) -> None:
    folder = str(tmp_path / "index")
    build = ["index", "build", "--model", model, "--layer", "2", "--texts", str(texts)]
    build += ["--output", folder, "--dtype", "float32", "--shard-size", "2", "--shift"]
    assert main(build) == 0
    assert f"3 texts in {folder}, 3 converged" in capsys.readouterr().out
    assert main(build) == 0  # all is there
    index = TokenVectorIndex.load(folder)
    assert index.texts == (TEXT_A, TEXT_B, "dog")
    assert index.settings.layer == 2
    assert index.settings.shift
    capsys.readouterr()
    explain = ["index", "explain", "--index", folder, "--model", model]
    assert main([*explain, "the cat", "--docs", "2,0"]) == 0
    out = capsys.readouterr().out
    assert out.index("text 2: dog") < out.index(f"text 0: {TEXT_A}")
    encoder = SiameseEncoder.from_pretrained(model)
    assert f"2, {encoder.reference_label}, shifted" in out
    assert encoder.reference.name == "fitted"
    score = encoder.score("the cat", "dog").item()
    assert f"{score:.4f} (cos)" in out


def test_a_process_of_several_builds_its_share(
    model: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    build = ["index", "build", "--model", model, "--layer", "3", "--texts", str(texts)]
    assert main([*build, "--output", str(tmp_path / "i"), "--shard-size", "1"]) == 0
    assert "2 shards are left to other processes" in capsys.readouterr().out


def test_user_errors_about_an_index(model: str, texts: Path, tmp_path: Path, capsys) -> None:
    build = ["index", "build", "--model", model, "--layer", "3", "--output", str(tmp_path / "i")]
    assert main([*build, "--texts", str(texts)]) == 0
    (tmp_path / "gap.txt").write_text("dog\n\ncat\n")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    explain = ["index", "explain", "--index", str(tmp_path / "i"), "dog", "--model", model]
    other = ["index", "explain", "--index", str(tmp_path), "dog", "--docs", "0"]
    cases = {
        "nowhere.txt": [*build, "--texts", "nowhere.txt"],
        "line 2 is empty": [*build, "--texts", str(tmp_path / "gap.txt")],
        "file in UTF-8": [*build, "--texts", str(tmp_path / "latin.txt")],
        "`shard_size` to be 256": [*build, "--texts", str(texts), "--shard-size", "5"],
        "between 0 and 2, but got 3": [*explain, "--docs", "3"],
        "such as 0,5, but got 'x'": [*explain, "--docs", "x"],
        "no `index.json`": other,
    }
    for message, arguments in cases.items():
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    with pytest.raises(ValueError, match="line 2 is empty"):
        main([*cases["line 2 is empty"], "--debug"])


def test_a_reference_is_fitted_and_folded(model: str, tmp_path: Path, capsys) -> None:
    output, texts = tmp_path / "exact", tmp_path / "texts.txt"
    texts.write_text(f"{TEXT_A}\n{TEXT_B}\ndog\nthe kitten sleeps\n")
    command = ["fit-reference", "--model", model, "--output", str(output)]
    assert main(command) == 0
    assert "change of scores: unknown" in capsys.readouterr().out
    assert main([*command, "--texts", str(texts)]) == 0
    assert "root mean square, 4 texts" in capsys.readouterr().out
    plain = SentenceTransformer(str(output))
    exact = SiameseEncoder.from_pretrained(output)
    assert exact.shift
    assert exact.reference.name == "fitted"
    ours = exact.encode([TEXT_A, TEXT_B])
    theirs = plain.encode([TEXT_A, TEXT_B], convert_to_tensor=True)
    assert (ours - theirs).abs().max() < 1e-6
    assert main(["explain", "dog", "cat", "--model", str(output), "--layer", "2"]) == 0
    assert "fitted:" in capsys.readouterr().out


def test_an_index_with_a_fitted_reference_takes_the_same_one(
    model: str, tmp_path: Path, capsys
) -> None:
    texts, folder = tmp_path / "texts.txt", str(tmp_path / "index")
    texts.write_text(f"{TEXT_A}\n{TEXT_B}\n")
    build = ["index", "build", "--model", model, "--layer", "2", "--texts", str(texts)]
    assert main([*build, "--output", folder, "--reference", "fitted"]) == 0
    assert (
        main(["index", "explain", "dog", "--index", folder, "--model", model, "--docs", "0"]) == 0
    )
    assert f"text 0: {TEXT_A}" in capsys.readouterr().out
