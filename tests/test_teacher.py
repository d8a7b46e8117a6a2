"""A teacher's file: whose scores it holds, and when it is taken, made anew or refused."""

from __future__ import annotations

import gc
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import TEXTS, tiny_folder
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize

from xsiam import teacher as teacher_module
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, InputError, ModelError
from xsiam.module import SiameseModule
from xsiam.teacher import Teacher

ROUNDING = 1e-5  # measured: 5e-7, with the padding of batches
PROMPTS = {"query": "query : ", "document": "passage : "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with prompts for roles, whose score is the cosine."""
    return tiny_folder(tmp_path_factory.mktemp("teacher") / "model", prompts=PROMPTS)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of texts whenever a teacher embeds some."""
    counts: list[int] = []
    embed = teacher_module.embed_texts

    def counting(encoder: SiameseEncoder, keys: Any, **settings: Any) -> Any:
        counts.append(len(keys))
        return embed(encoder, keys, **settings)

    monkeypatch.setattr(teacher_module, "embed_texts", counting)
    return counts


def prepared(name: Path, path: Path, texts: Any = None, **settings: Any) -> Teacher:
    """Return a teacher that has embedded texts."""
    teacher = Teacher(name, path, **settings)
    teacher.prepare({None: TEXTS} if texts is None else texts)
    return teacher


def scores(teacher: Teacher, role_a: str | None = None, role_b: str | None = None) -> torch.Tensor:
    """Return the scores of all texts with all texts."""
    return teacher.vectors(TEXTS, role_a) @ teacher.vectors(TEXTS, role_b).T


# ---------------------------------------------------------------- whose scores


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("truncate_dim", [None, 5])
def test_scores_are_the_models_own(
    tmp_path: Path, similarity: Any, truncate_dim: int | None
) -> None:
    name = tiny_folder(tmp_path / "model", similarity_fn_name=similarity, truncate_dim=truncate_dim)
    plain = SentenceTransformer(str(name), device="cpu")
    expected = plain.similarity(*[plain.encode(list(TEXTS), convert_to_tensor=True)] * 2)
    ours = "cos" if similarity == "cosine" else "dot"
    teacher = prepared(name, tmp_path / "file", similarity=ours)
    torch.testing.assert_close(scores(teacher), expected, rtol=ROUNDING, atol=ROUNDING)
    assert teacher.vectors(TEXTS).dtype == torch.float32
    facts = teacher.facts()
    assert (facts["similarity"], facts["shift"], facts["n_texts"]) == (ours, False, 4)
    assert facts["embedding_dim"] == (truncate_dim or 32)


def test_texts_are_embedded_in_their_roles(folder: Path, tmp_path: Path) -> None:
    plain = SentenceTransformer(str(folder), device="cpu")
    expected = plain.similarity(plain.encode_query(list(TEXTS)), plain.encode_document(list(TEXTS)))
    teacher = prepared(folder, tmp_path / "file", {"query": TEXTS, "document": TEXTS})
    found = scores(teacher, "query", "document")
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)
    assert (found - scores(teacher, "query", "query")).abs().max() > 1e-2
    with pytest.raises(
        InputError, match=r"none of 'the small dog .*' in role None. Call `prepare`"
    ):
        teacher.vectors(TEXTS)


def test_prompt_and_window_are_those_given(tmp_path: Path) -> None:
    name = tiny_folder(tmp_path / "model")
    teacher = prepared(name, tmp_path / "file", prompt="query : ")
    whole = SiameseEncoder.from_pretrained(name, shift=False, reference="pad", device="cpu")
    expected = whole.encode([f"query : {text}" for text in TEXTS])
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(teacher.vectors(TEXTS), expected, rtol=0, atol=ROUNDING)
    with pytest.warns(UserWarning, match="longer than the model's window of 4 tokens"):
        prepared(name, tmp_path / "short", max_length=4)


def test_recorded_shift_is_part_of_the_scores(tmp_path: Path, folder: Path) -> None:
    exact = SiameseEncoder.from_pretrained(folder, reference="uniform", device="cpu")
    exact.save_pretrained(tmp_path / "exact")
    teacher = prepared(tmp_path / "exact", tmp_path / "file")
    embeddings = torch.nn.functional.normalize(exact.encode(TEXTS), dim=-1)
    torch.testing.assert_close(scores(teacher), embeddings @ embeddings.T, rtol=0, atol=ROUNDING)
    assert teacher.facts()["shift"]
    assert (scores(teacher) - scores(prepared(folder, tmp_path / "plain"))).abs().max() > 1e-2


def test_a_teacher_is_in_memory_only_while_it_embeds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[SiameseEncoder]] = []
    load = Teacher._load

    def remember(self: Teacher, roles: Any) -> SiameseEncoder:
        alive.append(weakref.ref(encoder := load(self, roles)))
        return encoder

    monkeypatch.setattr(Teacher, "_load", remember)
    teacher = prepared(folder, tmp_path / "file")
    teacher.vectors(TEXTS)
    gc.collect()
    assert [reference() for reference in alive] == [None]


# ---------------------------------------------------------------- the file


def test_each_text_is_embedded_once(folder: Path, tmp_path: Path, embedded: list[int]) -> None:
    texts = {"query": [*TEXTS, *TEXTS], None: TEXTS[:1]}
    teacher = prepared(folder, tmp_path / "file", texts)
    teacher.prepare(texts)
    assert embedded == [5]
    again = Teacher(folder, tmp_path / "file")
    again.prepare(texts)
    assert embedded == [5]
    assert torch.equal(again.vectors(TEXTS, "query"), teacher.vectors(TEXTS, "query"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_is_the_same_teacher_each_time(
    folder: Path, tmp_path: Path, embedded: list[int]
) -> None:
    """Its model comes from a temporary folder, whose name is part of nothing."""
    encoder = SiameseEncoder.from_pretrained(folder, reference="uniform", device="cpu")
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.strategy.connect(SiameseModule(encoder))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    for _ in range(2):
        prepared(tmp_path / "model.ckpt", tmp_path / "file")
    assert embedded == [4]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(bytes(content))


def renew(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["xsiam"]) | {"version": 99}
        tensors = {name: file.get_tensor(name).clone() for name in ("keys", "vectors")}
    save_file(tensors, path, metadata={"xsiam": json.dumps(header)})


def foreign(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (cut, "is no file of a teacher's embeddings"),
        (flip, "they are damaged"),
        (renew, "has format 99 and not 1"),
        (foreign, "is no file of a teacher's embeddings"),
    ],
)
def test_a_damaged_file_is_made_anew_openly(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], match: str
) -> None:
    path = tmp_path / "file"
    expected = prepared(folder, path).vectors(TEXTS).clone()
    damage(path)
    with pytest.warns(UserWarning, match=f"file are computed anew: .*{match}"):
        found = prepared(folder, path).vectors(TEXTS)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("texts", "settings", "seed", "match"),
    [
        ({None: TEXTS[:3]}, {}, 0, "other texts"),
        ({"query": TEXTS}, {}, 0, "other texts"),
        (None, {"prompt": "query : "}, 0, "another teacher, or of other settings"),
        (None, {"max_length": 63}, 0, "another teacher, or of other settings"),
        (None, {}, 1, "another teacher, or of other settings"),
    ],
)
def test_a_file_of_something_else_is_made_anew_openly(
    tmp_path: Path, texts: Any, settings: dict[str, Any], seed: int, match: str
) -> None:
    prepared(tiny_folder(tmp_path / "0"), tmp_path / "file")
    name = tiny_folder(tmp_path / str(seed), seed=seed)
    expected = prepared(name, tmp_path / "other", texts, **settings)
    with pytest.warns(UserWarning, match=f"file are computed anew: .*{match}"):
        found = prepared(name, tmp_path / "file", texts, **settings)
    role = next(iter(texts or [None]))
    assert torch.equal(found.vectors(TEXTS[:3], role), expected.vectors(TEXTS[:3], role))


def test_pooling_is_part_of_what_a_teacher_is(tmp_path: Path) -> None:
    """It is no weight, and changes every embedding."""
    prepared(tiny_folder(tmp_path / "mean"), tmp_path / "file")
    with pytest.warns(UserWarning, match="another teacher, or of other settings"):
        prepared(tiny_folder(tmp_path / "cls", pooling="cls"), tmp_path / "file")


def test_other_processes_read_the_file_and_load_no_model(folder: Path, tmp_path: Path) -> None:
    first = prepared(folder, tmp_path / "file")
    other = Teacher(folder, tmp_path / "file")
    assert torch.equal(other.vectors(TEXTS[1:3]), first.vectors(TEXTS[1:3]))
    assert len(pickle.dumps(first)) < 1000  # the table stays behind
    assert torch.equal(pickle.loads(pickle.dumps(first)).vectors(TEXTS), first.vectors(TEXTS))


def test_missing_texts_and_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere, but there is no such file. Call `prepare`"):
        Teacher(folder, tmp_path / "nowhere").vectors(TEXTS)
    teacher = prepared(folder, tmp_path / "file")
    with pytest.raises(InputError, match="file, but it has none of 'another' in role None"):
        teacher.vectors(["dog", "another"])
    cut(tmp_path / "file")
    with pytest.raises(CheckpointError, match="file is no file of a teacher's embeddings"):
        Teacher(folder, tmp_path / "file").vectors(TEXTS)


# ---------------------------------------------------------------- refusals


def test_a_teacher_with_another_score_is_refused(tmp_path: Path) -> None:
    name = tiny_folder(tmp_path / "dot", similarity_fn_name="dot")
    match = r"scores by 'cos' as.*/dot' scores by 'dot'. Set `model.similarity=dot`"
    with pytest.raises(InputError, match=match):
        prepared(name, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    unit = tiny_folder(tmp_path / "unit", similarity_fn_name="dot", extra=[Normalize()])
    found = scores(prepared(unit, tmp_path / "file"))
    assert found.diagonal().allclose(torch.ones(4))


def test_unknown_models_and_roles_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        Teacher(tmp_path / "nowhere", tmp_path / "file")
    with pytest.raises(InputError, match="but got 'qury'"):
        prepared(folder, tmp_path / "file", {"qury": TEXTS})


def test_embeddings_that_are_not_finite_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Teacher._load

    def broken(self: Teacher, roles: Any) -> SiameseEncoder:
        encoder = load(self, roles)
        encoder.model[0].auto_model.embeddings.word_embeddings.weight.data[-3:] = torch.nan
        return encoder

    monkeypatch.setattr(Teacher, "_load", broken)
    match = r"those of 1 of 5 texts are not, such as 'passage'. Set another `objective.teacher`"
    with pytest.raises(ModelError, match=match):
        prepared(folder, tmp_path / "file", {None: [*TEXTS, "passage"]})
    assert not (tmp_path / "file").exists()
