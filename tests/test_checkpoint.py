"""Exports load elsewhere or fail loudly there; checkpoints are self-contained and checked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import TEXTS, tiny_folder, tiny_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import nn

from xsiam.checkpoint import FORMAT_VERSION, read_checkpoint
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, ModelError

SAME = 1e-6  # of the largest coordinate; worst measured 3e-7
PROMPTS = {"query": "query : ", "document": "passage : "}

KINDS = {
    "mean": lambda: tiny_model(),
    "normalize": lambda: tiny_model(extra=[Normalize()]),
    "dense_tanh": lambda: tiny_model(extra=[Dense(32, 24, activation_function=nn.Tanh())]),
    "truncated": lambda: tiny_model(extra=[Normalize()], truncate_dim=16),
    "cls_prompts": lambda: tiny_model(pooling="cls", prompts=PROMPTS),
    "dot": lambda: tiny_model(similarity_fn_name="dot"),
    "albert": lambda: tiny_model("albert"),
    "mpnet": lambda: tiny_model("mpnet"),
}

# Runs where importing xsiam fails, as on a machine that does not have it.
_WITHOUT_XSIAM = """
import json, sys
sys.modules["xsiam"] = None
from sentence_transformers import SentenceTransformer
uniform, pad, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = SentenceTransformer(uniform, device="cpu")
print("EMBEDDINGS", json.dumps(model.encode(texts).tolist()))
for trust in (False, True):
    try:
        SentenceTransformer(pad, device="cpu", trust_remote_code=trust).encode(texts)
        print("ENCODED")
    except Exception as error:
        print("REFUSED", type(error).__name__, " ".join(str(error).split())[:300])
"""


@pytest.fixture(params=sorted(KINDS))
def model(request: pytest.FixtureRequest) -> SentenceTransformer:
    torch.manual_seed(0)
    return KINDS[request.param]()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("reference", ["pad", "uniform"])
@pytest.mark.parametrize("shift", [True, False])
def test_exports_round_trip(model, reference: str, shift: bool, tmp_path: Path) -> None:
    encoder = SiameseEncoder(model, shift=shift, reference=reference)
    encoder.save_pretrained(tmp_path / "export")
    loaded = SiameseEncoder.from_pretrained(tmp_path / "export")
    assert (loaded.shift, loaded.reference.name) == (shift, reference)
    assert (loaded.similarity, loaded.normalize) == (encoder.similarity, encoder.normalize)
    assert difference(loaded.encode(TEXTS), encoder.encode(TEXTS)) <= SAME
    again = tmp_path / "again"
    loaded.save_pretrained(again)  # the fold is folded once, not twice
    assert (
        difference(SiameseEncoder.from_pretrained(again).encode(TEXTS), loaded.encode(TEXTS))
        <= SAME
    )


def test_an_exported_uniform_model_is_a_plain_sentence_transformer(model, tmp_path: Path) -> None:
    encoder = SiameseEncoder(model, reference="uniform")
    encoder.save_pretrained(tmp_path)
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    theirs = plain.encode(list(TEXTS), convert_to_tensor=True)
    assert difference(theirs, encoder.encode(TEXTS)) <= SAME
    pairwise = plain.similarity_pairwise(theirs[:2], theirs[2:])
    assert difference(pairwise, encoder.score(TEXTS[:2], TEXTS[2:])) <= 1e-5
    card = (tmp_path / "README.md").read_text()
    assert "`uniform`, whose embedding is subtracted: folded" in card


def test_exports_where_xsiam_is_not_installed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(extra=[Dense(32, 24, activation_function=nn.Tanh()), Normalize()])
    encoder = SiameseEncoder(model, reference="uniform")
    encoder.save_pretrained(tmp_path / "uniform")
    SiameseEncoder(model, reference="pad").save_pretrained(tmp_path / "pad")
    folders = [str(tmp_path / "uniform"), str(tmp_path / "pad")]
    command = [sys.executable, "-c", _WITHOUT_XSIAM, *folders, json.dumps(TEXTS)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    embeddings = next(x for x in lines if x.startswith("EMBEDDINGS")).removeprefix("EMBEDDINGS")
    assert difference(torch.tensor(json.loads(embeddings)), encoder.encode(TEXTS)) <= SAME
    assert "ENCODED" not in run.stdout
    refusals = [line for line in lines if line.startswith("REFUSED")]
    assert len(refusals) == 2
    assert "xsiam.modules.ReferenceShift" in refusals[0]


def test_an_exported_pad_model_fails_loudly_with_xsiam_installed(tmp_path: Path) -> None:
    SiameseEncoder(tiny_model(), reference="pad").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ReferenceShift"):
        SentenceTransformer(str(tmp_path), device="cpu")
    trusted = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    with pytest.raises(ModelError, match=r"'pad' reference.*from_pretrained"):
        trusted.encode(["dog"])


CHANGES = {
    "bias": lambda plain: plain[2].linear.bias.data.add_(0.1),
    "weight": lambda plain: plain[2].linear.weight.data.add_(0.01),
    "body": lambda plain: plain[0].auto_model.encoder.layer[1].output.dense.weight.data.mul_(1.1),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_folded_model_trained_further_elsewhere_is_noticed(change: str, tmp_path: Path) -> None:
    SiameseEncoder(tiny_model(), reference="uniform").save_pretrained(tmp_path / "a")
    plain = SentenceTransformer(str(tmp_path / "a"), device="cpu")
    with torch.no_grad():
        CHANGES[change](plain)
    plain.save(str(tmp_path / "b"), create_model_card=False)
    shutil.copy(tmp_path / "a" / "xsiam.json", tmp_path / "b")
    with pytest.warns(UserWarning, match="module 2 does not cancel .* 'uniform'"):
        loaded = SiameseEncoder.from_pretrained(tmp_path / "b")
    assert not loaded.shift
    theirs = plain.encode(list(TEXTS), convert_to_tensor=True)
    assert difference(loaded.encode(TEXTS), theirs) <= SAME  # its own scores, unshifted


def save_checkpoint(encoder: SiameseEncoder, path: Path, **changes) -> Path:
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"xsiam": encoder.checkpoint_payload() | changes, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("reference", ["pad", "uniform"])
def test_checkpoints_are_self_contained(model, reference: str, tmp_path: Path) -> None:
    model.save(str(tmp_path / "base"), create_model_card=False)
    encoder = SiameseEncoder.from_pretrained(tmp_path / "base", reference=reference, max_length=20)
    path = save_checkpoint(encoder, tmp_path / "x.ckpt")
    expected = encoder.encode(TEXTS)
    shutil.rmtree(tmp_path / "base")
    loaded = SiameseEncoder.from_pretrained(path)
    assert (loaded.shift, loaded.reference.name, loaded.max_length) == (True, reference, 20)
    assert loaded.model_fingerprint == encoder.model_fingerprint
    assert difference(loaded.encode(TEXTS), expected) <= SAME
    assert loaded.model.prompts == encoder.model.prompts
    overridden = SiameseEncoder.from_pretrained(path, shift=False, similarity="dot")
    assert (overridden.shift, overridden.similarity) == (False, "dot")


def test_plain_hugging_face_encoders_load(tmp_path: Path) -> None:
    model = tiny_model()
    model[0].auto_model.save_pretrained(tmp_path)
    model[0].tokenizer.save_pretrained(tmp_path)
    encoder = SiameseEncoder.from_pretrained(tmp_path, shift=False)
    assert (
        difference(
            encoder.encode(TEXTS), SiameseEncoder(model, shift=False, reference="pad").encode(TEXTS)
        )
        <= SAME
    )


# -- bad input ----------------------------------------------------------------------------------


def test_damaged_and_newer_checkpoints(tmp_path: Path) -> None:
    encoder = SiameseEncoder(tiny_model(), reference="pad")
    path = save_checkpoint(encoder, tmp_path / "x.ckpt")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"x\.ckpt', but reading it failed"):
        SiameseEncoder.from_pretrained(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="carries no encoder"):
        SiameseEncoder.from_pretrained(path)
    newer = save_checkpoint(encoder, tmp_path / "n.ckpt", format_version=FORMAT_VERSION + 1)
    with pytest.raises(CheckpointError, match=f"has format {FORMAT_VERSION + 1}. Install a newer"):
        read_checkpoint(newer)
    escaping = {"../evil.json": torch.zeros(1, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"but got '\.\./evil\.json'"):
        SiameseEncoder.from_pretrained(
            save_checkpoint(encoder, tmp_path / "e.ckpt", files=escaping)
        )
    state = {f"encoder.{k}": v for k, v in list(encoder.state_dict().items())[:-3]}
    torch.save({"xsiam": encoder.checkpoint_payload(), "state_dict": state}, path)
    with pytest.raises(CheckpointError, match="weights of its own model"):
        SiameseEncoder.from_pretrained(path)


def test_pickled_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"xsiam": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        SiameseEncoder.from_pretrained(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_newer_export_is_refused(tmp_path: Path) -> None:
    SiameseEncoder(tiny_model(), reference="uniform").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "xsiam.json").read_text())
    (tmp_path / "xsiam.json").write_text(json.dumps(settings | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="has format 99"):
        SiameseEncoder.from_pretrained(tmp_path)


def test_loading_is_silent(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SiameseEncoder.from_pretrained(tmp_path / "model")
