"""What a run records of where and by what it was made."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import xsiam
from xsiam.history import git_commit, run_facts


def git(folder: Path, *arguments: str) -> str:
    """Run git without anybody's configuration."""
    own = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *own, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_facts_name_versions_and_machine() -> None:
    facts = run_facts()
    assert json.loads(json.dumps(facts)) == facts
    versions = facts["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["xsiam"] == xsiam.__version__
    assert versions["torch"] == torch.__version__
    for name in ("lightning", "transformers", "sentence-transformers", "datasets", "peft"):
        assert versions[name] == version(name)
    assert facts["platform"] == platform.platform()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] >= 1
    assert len(facts["processor"]) > 1
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["command"] == sys.argv


def test_a_package_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from xsiam import history

    found = history.find_spec
    monkeypatch.setattr(history, "find_spec", lambda name: None if name == "peft" else found(name))
    assert "peft" not in run_facts()["versions"]
    assert "datasets" in run_facts()["versions"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, inside = tmp_path / "checkout", tmp_path / "checkout" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    git(checkout, "init", "--quiet")
    monkeypatch.chdir(inside)
    assert git_commit() is None  # no commit yet
    (checkout / "file").write_text("1")
    git(checkout, "add", "file")
    git(checkout, "commit", "--quiet", "-m", "one")
    git(checkout, "tag", "-a", "v1", "-m", "a name that is no commit")
    commit = git(checkout, "rev-parse", "HEAD")
    assert len(commit) == 40
    assert git_commit() == commit
    (checkout / "new").write_text("a file that git does not know")
    assert git_commit() == commit
    (checkout / "file").write_text("2")
    assert git_commit() == f"{commit}-dirty"


def test_no_commit_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
