"""Uploading an export: what a hub receives, and what is refused before and by it."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import close_session, constants
from models import TEXTS, tiny_model

from xsiam import pretrained
from xsiam.cli import main
from xsiam.encoder import SiameseEncoder
from xsiam.errors import HubError, InputError, ModelError
from xsiam.upload import upload_model

TOKEN = "hf_of_a_test"
COMMIT = "1" * 40


class Hub:
    """The part of a hub's interface that an upload uses, on loopback.

    Attributes:
        repos: Whether a repository is private, by name.
        files: Contents by repository and branch, then path.
        requests: Method and path of every request, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.messages: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(200, {})

            def do_GET(self) -> None:
                self.handle_request(b"")

            def do_POST(self) -> None:
                self.handle_request(self.rfile.read(int(self.headers["Content-Length"])))

            def handle_request(self, body: bytes) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    self.answer(401, {"error": "Invalid username or password."})
                else:
                    self.answer(*hub.reply(self.path.strip("/").split("/"), body))

            def answer(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                """Keep the test output clean."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def reply(self, path: list[str], body: bytes) -> tuple[int, Any]:
        match path:
            case ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case ["api", "models", owner, name]:
                if (repo := f"{owner}/{name}") in self.repos:
                    return 200, {"id": repo, "private": self.repos[repo], "sha": COMMIT}
            case ["api", "models", owner, name, "branch", branch]:
                self.files.setdefault((f"{owner}/{name}", branch), {})
                return 200, {}
            case ["api", "models", _, _, "preupload", _]:
                names = [file["path"] for file in json.loads(body)["files"]]
                plain = {"uploadMode": "regular", "shouldIgnore": False}
                return 200, {"files": [{"path": name, **plain} for name in names]}
            case ["api", "models", owner, name, "commit", branch]:
                return self.commit(f"{owner}/{name}", branch, body)
        return 404, {"error": f"no such path {path}"}

    def create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        owner = wanted["organization"] or "tester"
        if owner != "tester":
            return 403, {"error": "You don't have the rights to create a model there"}
        name = f"{owner}/{wanted['name']}"
        status = 409 if name in self.repos else 200
        self.repos.setdefault(name, wanted.get("visibility") == "private")
        return status, {"url": f"{self.url}/{name}"}

    def commit(self, repo: str, branch: str, body: bytes) -> tuple[int, Any]:
        entries = [json.loads(line) for line in body.splitlines()]
        self.messages += [e["value"]["summary"] for e in entries if e["key"] == "header"]
        kept = self.files.setdefault((repo, branch), {})
        for value in (entry["value"] for entry in entries if entry["key"] == "file"):
            kept[value["path"]] = base64.b64decode(value["content"])
        url = f"{self.url}/{repo}/commit/{COMMIT}"
        return 200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub that the client takes for its own, with a token to write there."""
    running = Hub()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield running
    close_session()
    running.close()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export"
    SiameseEncoder(tiny_model(), reference="uniform").save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_every_file_arrives_in_one_commit(hub: Hub, export: Path) -> None:
    url = upload_model(export, "tester/model")
    assert url == f"{hub.url}/tester/model/commit/{COMMIT}"
    assert hub.repos == {"tester/model": False}
    assert hub.files == {("tester/model", "main"): contents(export)}
    assert {"README.md", "xsiam.json", "model.safetensors"} <= contents(export).keys()
    assert hub.messages == ["Upload a Siamese encoder exported by xsiam"]


def test_branch_message_and_privacy(hub: Hub, export: Path) -> None:
    url = upload_model(export, "model", private=True, revision="v1", message="First.")
    assert "/tester/model/" in url  # of the token's owner
    assert hub.repos == {"tester/model": True}
    assert hub.files == {("tester/model", "v1"): contents(export)}
    assert hub.messages == ["First."]
    upload_model(export, "tester/model", private=True, revision="v1")  # again


def test_a_private_upload_never_goes_to_a_public_repository(hub: Hub, export: Path) -> None:
    hub.repos["tester/model"] = False
    with pytest.raises(HubError, match=r"'tester/model' to be private, but it is there"):
        upload_model(export, "tester/model", private=True)
    assert not hub.files


def test_command_in_a_process_of_its_own(hub: Hub, export: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "xsiam.cli", "upload", str(export), "tester/model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub.url}/tester/model/commit/{COMMIT}" in done.stdout
    assert hub.files == {("tester/model", "main"): contents(export)}
    del environment["HF_TOKEN"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "error: Expected a token of the Hugging Face hub, but found none" in done.stderr


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b/c", "", "owner/na me", "owner/..", "owner/name.git"])
def test_names_that_cannot_be_are_refused_before_any_request(
    hub: Hub, export: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upload", str(export), name]) == 2
    assert f"such as 'owner/name', but got {name!r}" in capsys.readouterr().err
    assert not hub.requests


def test_folders_that_are_no_export_are_refused_before_any_request(
    hub: Hub, export: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"has no `xsiam.json`. Give '.*export'"):
        upload_model(export.parent, "tester/model")  # the run's folder
    with pytest.raises(InputError, match=r"has no `xsiam.json`. Write one with"):
        upload_model(tmp_path / "nowhere", "tester/model")
    for name, text in contents(export).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    (tmp_path / "README.md").unlink()
    with pytest.raises(InputError, match=r"no `README.md`. Export the model again"):
        upload_model(tmp_path, "tester/model")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Expected weights in the model folder"):
        upload_model(tmp_path, "tester/model")
    assert not hub.requests


def test_a_wrong_token_is_said_and_not_shown(
    hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"take 'tester/model', but it does not: .*401") as caught:
        upload_model(export, "tester/model")
    assert "hf_wrong" not in str(caught.value)
    assert not hub.files


def test_a_place_that_is_not_yours_is_said(hub: Hub, export: Path) -> None:
    with pytest.raises(HubError, match=r"'other/model', but .*rights to create.* token may write"):
        upload_model(export, "other/model")


def test_a_hub_that_does_not_answer_is_said(
    hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"127.0.0.1:1 to answer, but it does not: ConnectError"):
        upload_model(export, "tester/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="does not: HF_HUB_OFFLINE is set"):
        upload_model(export, "tester/model")
    assert not hub.requests


# -- and back -----------------------------------------------------------------------------------


@pytest.fixture
def downloads(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let hub names lead to the export, as downloaded."""

    def file(name: str, path: str, **options: Any) -> str:
        assert (name, path) == ("tester/model", "xsiam.json")
        return str(export / path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(export))


@pytest.mark.usefixtures("downloads")
def test_what_was_uploaded_is_loaded_with_its_settings(export: Path) -> None:
    """A folded shift is taken out again, and not shifted once more."""
    encoder = SiameseEncoder.from_pretrained("tester/model")
    assert encoder.shift
    assert encoder.reference.name == "uniform"
    local = SiameseEncoder.from_pretrained(export)
    assert (encoder.encode(TEXTS) == local.encode(TEXTS)).all()
    assert pretrained.records_shift("tester/model")
