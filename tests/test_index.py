"""Indexes: round trips, sums of parts, interruption, several processes, and bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from heads import HEADS, PROMPTS
from models import TEXT_A, TEXT_B, TEXTS, tiny_model
from safetensors import safe_open

from xsiam import index_files, index_manifest
from xsiam.attribution import PairAttributor
from xsiam.encoder import SiameseEncoder
from xsiam.errors import (
    CheckpointError,
    ConvergenceWarning,
    InputError,
    TruncationWarning,
)
from xsiam.index import TokenVectorIndex
from xsiam.index_files import read_shard, shard_path, write_shard
from xsiam.index_manifest import Manifest

# Units of the score, or of |ẽ|; worst measured 2e-6 and 5e-4.
ADDS_UP = {"float32": 1e-5, "float16": 2e-3}
# Entries, relative to the largest; worst measured 3e-7 and 6e-4.
ENTRIES = {"float32": 2e-6, "float16": 2e-3}
CORPUS = [*TEXTS, "the cat sleeps on the red house", "a dog runs after the kitten", "dog"]
QUERY = "the kitten is chased by a big dog"
LAYER = 2


@pytest.fixture(scope="module")
def attributor() -> PairAttributor:
    return PairAttributor(HEADS["cos"](), LAYER, tolerance=1e-5)


@pytest.fixture(scope="module", params=["float32", "float16"])
def index(
    request: pytest.FixtureRequest,
    attributor: PairAttributor,
    tmp_path_factory: pytest.TempPathFactory,
) -> TokenVectorIndex:
    path = tmp_path_factory.mktemp("index") / request.param
    build = {"role": "document", "dtype": request.param, "shard_size": 3}
    TokenVectorIndex.build(attributor, CORPUS, path, **build)
    return TokenVectorIndex.load(path, attributor)


@pytest.fixture
def folder(index: TokenVectorIndex, tmp_path: Path) -> Path:
    """A copy of the float32 or float16 index, to be damaged."""
    return Path(shutil.copytree(index.path, tmp_path / "copy"))


def close(ours: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    assert ours.shape == other.shape
    return float((ours - other).abs().max()) <= tolerance * float(other.abs().max())


def test_everything_known_of_a_text_comes_back(
    index: TokenVectorIndex, attributor: PairAttributor
) -> None:
    assert len(index) == len(CORPUS)
    assert index.texts == tuple(CORPUS)
    assert index.missing == []
    dtype = index.manifest.dtype
    exact = attributor.token_vectors(CORPUS, "document")
    for i, truth in enumerate(exact):
        ours = index.token_vectors(i)
        assert close(ours.vectors, truth.vectors, ENTRIES[dtype])
        assert ours.vectors.dtype == torch.float64
        for name in ("delta", "reference_embedding", "embedding"):
            assert close(getattr(ours, name), getattr(truth, name), 1e-6)
        for name in ("text", "role", "norm", "n_nodes", "tokens", "offsets"):
            assert getattr(ours, name) == getattr(truth, name)
        assert ours.special_mask == truth.special_mask
        assert ours.prompt_mask == truth.prompt_mask
        assert any(ours.prompt_mask)
        missed = float((ours.vectors.sum(1) - truth.delta).norm() / truth.delta.norm())
        bound = ours.completeness_error
        assert 0.999 * missed <= bound <= missed + 2 * truth.completeness_error + 1e-9
        rounding = (ours.vectors - truth.vectors).norm(dim=0).max() / truth.delta.norm()
        assert ours.token_error == pytest.approx(truth.token_error + float(rounding), rel=1e-4)
        assert ours.converged
    assert index.converged.tolist() == [True] * len(CORPUS)


def test_attributions_are_those_of_the_attributor(
    index: TokenVectorIndex, attributor: PairAttributor
) -> None:
    tolerance = ENTRIES[index.manifest.dtype]
    for i, j in ((0, 1), (1, 0), (3, 6), (5, 5)):
        truth = attributor.attribute(CORPUS[i], CORPUS[j], "document", "document")
        ours = index.attribute(i, j)
        assert close(ours.matrix, truth.matrix, tolerance)
        assert close(ours.main_effects_a, truth.main_effects_a, tolerance)
        assert close(ours.main_effects_b, truth.main_effects_b, tolerance)
        assert ours.score == pytest.approx(truth.score, abs=1e-6)
        assert ours.intercept == pytest.approx(truth.intercept, abs=1e-6)
        assert abs(ours.residual) <= ADDS_UP[index.manifest.dtype]
        assert close(index.matrix(i, j), ours.matrix, 1e-5)
        assert ours.layer == LAYER


def test_many_matrices_equal_one_by_one(index: TokenVectorIndex) -> None:
    pairs = [(0, 1), (6, 2), (0, 6), (1, 0), (0, 1), (0, 0)]
    together = index.matrices(pairs)
    assert len(together) == len(pairs)
    for (i, j), found in zip(pairs, together, strict=True):
        assert close(found, index.matrix(i, j), 1e-5)
    assert index.matrices([]) == []
    together[0].zero_()  # nobody else's memory, and not the file's
    assert index.matrix(0, 1).abs().max() > 0
    assert close(together[4], index.matrix(0, 1), 1e-5)


def test_a_query_is_explained_as_the_attributor_does(
    index: TokenVectorIndex, attributor: PairAttributor, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = attributor.attribute([QUERY] * 2, [CORPUS[5], CORPUS[0]], "query", "document")
    calls = []
    integrate = PairAttributor.token_vectors

    def count(self: PairAttributor, *args: object, **kwargs: object) -> object:
        calls.append(args)
        return integrate(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(PairAttributor, "token_vectors", count)
    index = TokenVectorIndex.load(index.path, attributor)
    for result, expected in zip(index.explain(QUERY, [5, 0], "query"), truth, strict=True):
        assert close(result.matrix, expected.matrix, ENTRIES[index.manifest.dtype])
        assert (result.text_a, result.text_b) == (expected.text_a, expected.text_b)
        assert result.tokens_a == expected.tokens_a
        assert result.score == pytest.approx(expected.score, abs=1e-6)
    index.explain(QUERY, [1], "query")
    index.margin(QUERY, 0, 1, "query")
    assert len(calls) == 1
    assert index.explain(QUERY, [1])[0].tokens_a != result.tokens_a  # another role
    assert len(calls) == 2
    for n in range(16):  # the first two are forgotten
        index.explain(f"dog {n}", [])
    index.explain(QUERY, [1], "query")
    assert len(calls) == 2 + 16 + 1


def test_tolerances_may_differ_and_the_looser_one_is_reported(
    index: TokenVectorIndex, attributor: PairAttributor
) -> None:
    coarse = PairAttributor(attributor.encoder, LAYER, tolerance=1e-2)
    result = TokenVectorIndex.load(index.path, coarse).explain(QUERY, [0])[0]
    assert result.tolerance == 1e-2
    assert result.converged


@pytest.mark.parametrize("dtype", sorted(ADDS_UP))
@pytest.mark.parametrize("head", sorted(HEADS))
def test_margins_and_directions_add_up(head: str, dtype: str, tmp_path: Path) -> None:
    encoder = HEADS[head]()
    attributor = PairAttributor(encoder, LAYER, tolerance=1e-5)
    index = TokenVectorIndex.build(attributor, CORPUS, tmp_path, dtype=dtype, shard_size=3)
    scores = encoder.score([QUERY] * len(CORPUS), CORPUS)
    # A plain dot product has no normaliser: its unit is that of the largest score.
    limit = ADDS_UP[dtype] * max(1.0, float(scores.abs().max()))
    for a, b in ((0, 1), (3, 2), (6, 4)):
        margin = index.margin(QUERY, a, b)
        own = float(scores[a] - scores[b])
        assert margin.total == pytest.approx(own, abs=5e-6 * limit / ADDS_UP[dtype])
        by_query = float(margin.query_tokens.sum()) + margin.query_rest
        by_documents = float(margin.tokens_a.sum() + margin.tokens_b.sum()) + margin.documents_rest
        assert by_query == pytest.approx(own, abs=limit)
        assert by_documents == pytest.approx(own, abs=limit)
        assert margin.total == pytest.approx(by_query + margin.residual, abs=1e-12)
        assert by_documents == pytest.approx(by_query, abs=1e-9 * max(1.0, abs(own)))
        assert margin.converged
        if head == "shifted":
            assert abs(margin.query_rest) + abs(margin.documents_rest) < 1e-6
        else:
            assert abs(margin.query_rest) > 1e-4
    w = torch.randn(3, encoder.embedding_dim, generator=torch.Generator().manual_seed(0))
    embeddings = encoder.encode(CORPUS).double()
    for i, found in enumerate(index.directions(w)):
        text = index.token_vectors(i)
        unit = found.norm if encoder.normalize else 1.0
        assert close(found.total, w.double() @ embeddings[i] * unit, 1e-4)
        parts = found.reference + found.contributions.sum(1)
        scale = float((w.norm(dim=1) * text.embedding.norm()).max())
        assert (found.total - parts).abs().max() <= ADDS_UP[dtype] * scale
        assert (found.total - parts - found.residual).abs().max() < 1e-12
        assert found.contributions.shape == (3, len(found.tokens))


def test_margins_are_differences_of_row_and_column_sums(index: TokenVectorIndex) -> None:
    first, second = index.explain(QUERY, [3, 1], "query")
    margin = index.margin(QUERY, 3, 1, "query")

    def rows(result: object) -> torch.Tensor:
        return result.matrix.sum(1) + result.main_effects_a  # type: ignore[attr-defined]

    assert close(margin.query_tokens.float(), rows(first) - rows(second), 1e-4)
    assert close(margin.tokens_a.float(), first.matrix.sum(0) + first.main_effects_b, 1e-4)
    assert close(margin.tokens_b.float(), -second.matrix.sum(0) - second.main_effects_b, 1e-4)
    rest = [float(r.main_effects_b.sum()) + r.intercept for r in (first, second)]
    assert margin.query_rest == pytest.approx(rest[0] - rest[1], abs=1e-5)
    rest = [float(r.main_effects_a.sum()) + r.intercept for r in (first, second)]
    assert margin.documents_rest == pytest.approx(rest[0] - rest[1], abs=1e-5)
    assert margin.total == pytest.approx(first.score - second.score, abs=1e-9)
    assert margin.names_query == first.tokens_a
    assert (margin.names_a, margin.names_b) == (first.tokens_b, second.tokens_b)
    among = index.margin(0, 3, 1)
    assert among.total == pytest.approx(
        index.attribute(0, 3).score - index.attribute(0, 1).score, abs=1e-9
    )
    assert index.margin(0, 1, 3).total == pytest.approx(-among.total, abs=1e-12)


def test_directions_are_projections_of_token_vectors(index: TokenVectorIndex) -> None:
    w = torch.randn(32, generator=torch.Generator().manual_seed(0))
    (found,) = index.directions(w, [4])
    text = index.token_vectors(4)
    assert found.text == CORPUS[4]
    assert found.tokens == text.tokens
    assert close(found.contributions[0], w.double() @ text.vectors, 1e-12)
    assert close(found.total[0], w.double() @ text.embedding, 1e-12)
    assert found.norm == text.norm
    assert [d.text for d in index.directions(w)] == CORPUS


def test_without_an_attributor_indexed_texts_work(index: TokenVectorIndex) -> None:
    alone = TokenVectorIndex.load(index.path)
    assert torch.equal(alone.matrix(0, 5), index.matrix(0, 5))
    assert alone.margin(0, 1, 2).total == index.margin(0, 1, 2).total
    for call in (lambda: alone.explain(QUERY, [0]), lambda: alone.margin(QUERY, 0, 1)):
        with pytest.raises(InputError, match=r"opened without\. Open it with `TokenVectorIndex"):
            call()


def test_files_are_as_documented(index: TokenVectorIndex) -> None:
    names = sorted(p.name for p in index.path.iterdir())
    assert names == ["index.json", *(f"shard_0000{k}.safetensors" for k in range(3))]
    with safe_open(str(shard_path(index.path, 2)), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(name in index_files.__doc__ for name in tensors)
    assert tensors["lengths"].tolist() == [len(index.token_vectors(6).tokens)]
    assert str(tensors["vectors"].dtype) == f"torch.{index.manifest.dtype}"
    assert tensors["embedding"].dtype == torch.float32
    assert json.loads(bytes(tensors["strings"].tolist()))["texts"] == CORPUS[6:]


def test_kept_shards_are_bounded_by_bytes(index: TokenVectorIndex) -> None:
    sizes = [shard_path(index.path, k).stat().st_size for k in range(3)]
    small = TokenVectorIndex.load(index.path, cache_bytes=sizes[0] + sizes[1])
    for i, j in ((0, 6), (3, 0), (6, 3)):
        assert torch.equal(small.matrix(i, j), index.matrix(i, j))
        assert len(small._shards) <= 2
    tiny = TokenVectorIndex.load(index.path, cache_bytes=1)
    assert torch.equal(tiny.matrix(0, 6), index.matrix(0, 6))
    assert len(tiny._shards) == 1


# -- interruption and processes -------------------------------------------------------------------

_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_index import CORPUS, HEADS, LAYER
from xsiam.attribution import PairAttributor
from xsiam.index import TokenVectorIndex
replace = os.replace
def die_at_the_third_shard(part, path):
    if "shard_00002" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(part, path)
os.replace = die_at_the_third_shard
attributor = PairAttributor(HEADS["cos"](), LAYER, tolerance=1e-5)
TokenVectorIndex.build(attributor, CORPUS, sys.argv[2], dtype="float32", shard_size=2)
"""


def contents(path: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.glob("shard_*")}


def test_after_kill_9_finished_shards_are_kept(attributor: PairAttributor, tmp_path: Path) -> None:
    path = tmp_path / "index"
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, tests, str(path)],
        cwd=Path(tests).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = contents(path)
    assert sorted(before) == ["shard_00000.safetensors", "shard_00001.safetensors"]
    (part,) = path.glob(".*.part")  # written, not yet renamed
    with pytest.raises(CheckpointError, match=r"2 are missing: shard_00002\.safetensors, shard_00"):
        TokenVectorIndex.load(path)
    resumed = TokenVectorIndex.build(attributor, CORPUS, path, dtype="float32", shard_size=2)
    after = contents(path)
    assert {name: after[name] for name in before} == before
    assert not part.exists()
    assert resumed.texts == tuple(CORPUS)
    whole = TokenVectorIndex.build(
        attributor, CORPUS, tmp_path / "whole", dtype="float32", shard_size=2
    )
    for i in range(len(CORPUS)):
        assert close(resumed.matrix(0, i), whole.matrix(0, i), 1e-5)


def test_two_processes_make_the_same_index(
    attributor: PairAttributor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = {"dtype": "float32", "shard_size": 2}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    half = TokenVectorIndex.build(attributor, CORPUS, tmp_path / "two", **build)
    assert half.missing == ["shard_00000.safetensors", "shard_00002.safetensors"]
    assert half.matrix(2, 3).shape == (3, 15)
    with pytest.raises(CheckpointError, match=r"shard_00000\.safetensors to be there, but it is"):
        half.matrix(0, 2)
    with pytest.raises(CheckpointError, match=r"4 shards in .* 2 are missing: shard_00000"):
        TokenVectorIndex.load(tmp_path / "two")
    TokenVectorIndex.build(
        attributor, CORPUS, tmp_path / "two", rank=0, world_size=2, **build
    )  # arguments win
    assert half.missing == []
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    TokenVectorIndex.build(attributor, CORPUS, tmp_path / "one", **build)
    two, one = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert {name: content for name, (_, content) in two.items()} == {
        name: content for name, (_, content) in one.items()
    }


def test_another_process_may_write_the_manifest_meanwhile(
    attributor: PairAttributor, tmp_path: Path
) -> None:
    part = tmp_path / "index" / f".{index_manifest.MANIFEST}-0123abcd.part"
    part.parent.mkdir()
    part.write_bytes(b"{")  # being written
    TokenVectorIndex.build(attributor, CORPUS, part.parent, dtype="float32")
    assert part.exists()


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ({"rank": 1}, {}, r"both or none of `rank` and `world_size`, but got 1 and None"),
        ({"rank": 2, "world_size": 2}, {}, "but got 2 and 2"),
        ({}, {"RANK": "3", "WORLD_SIZE": "2"}, "but got '3' and '2'"),
        ({}, {"RANK": "x", "WORLD_SIZE": "2"}, "but got 'x' and '2'"),
    ],
)
def test_bad_ranks_are_refused(
    given, environment, message, attributor: PairAttributor, tmp_path: Path, monkeypatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        TokenVectorIndex.build(attributor, CORPUS, tmp_path, **given)


def test_a_full_disk_keeps_finished_shards(
    attributor: PairAttributor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = {"dtype": "float32", "shard_size": 2}
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 4:  # the manifest and two shards fit
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(index_manifest.os, "fsync", full)
    with pytest.raises(InputError, match=r"bytes to .*shard_00002\.safetensors, but the disk is f"):
        TokenVectorIndex.build(attributor, CORPUS, tmp_path, **build)
    before = contents(tmp_path)
    assert len(before) == 2
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    TokenVectorIndex.build(attributor, CORPUS, tmp_path, **build)
    after = contents(tmp_path)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before


# -- honesty --------------------------------------------------------------------------------------


def test_what_did_not_converge_stays_flagged(tmp_path: Path) -> None:
    rough = PairAttributor(
        HEADS["cos"](), 0, quadrature="gauss_legendre", n_nodes=4, tolerance=1e-3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        truth = rough.token_vectors(CORPUS)
    expected = [text.converged for text in truth]
    missed = expected.count(False)
    assert missed
    message = rf"^{missed} of 7 texts in .* did not meet the tolerance 1\.0e-03 at layer 0"
    with pytest.warns(ConvergenceWarning, match=message) as caught:
        TokenVectorIndex.build(rough, CORPUS, tmp_path, dtype="float32", shard_size=3)
    assert len(caught) == 1  # not one a shard
    with pytest.warns(ConvergenceWarning, match=message):
        index = TokenVectorIndex.load(tmp_path)
    assert index.converged.tolist() == expected
    worst = expected.index(False)
    assert not index.attribute(worst, worst).converged
    assert not index.margin(worst, 0, 1).converged
    assert not index.directions(torch.ones(32), [worst])[0].converged
    for i, text in enumerate(truth):
        ours = index.token_vectors(i)
        assert ours.token_error == pytest.approx(text.token_error, rel=1e-5)
        assert ours.completeness_error == pytest.approx(text.completeness_error, rel=1e-3)


def test_float16_refuses_what_it_cannot_hold(attributor: PairAttributor, tmp_path: Path) -> None:
    (text,) = attributor.token_vectors([TEXT_A])
    index = TokenVectorIndex.build(attributor, [TEXT_A], tmp_path)
    vectors = text.vectors * (1e5 / text.vectors.abs().max())
    large = dataclasses.replace(text, vectors=vectors, delta=vectors.sum(1))
    with pytest.raises(InputError, match=rf'{TEXT_A!r} is 1e\+05\. Set `dtype="float32"`'):
        write_shard(tmp_path, 0, index.manifest, [large])
    # Below its smallest number everything is rounded to zero: that is no token vector of the text.
    small = dataclasses.replace(text, vectors=text.vectors * 1e-9, delta=text.delta * 1e-9)
    write_shard(tmp_path, 0, index.manifest, [small])
    stored = read_shard(tmp_path, 0, index.manifest).token_vectors(0, None)
    assert not stored.converged
    assert stored.completeness_error == pytest.approx(1.0, abs=1e-3)
    assert stored.token_error > 0.1


def test_cut_texts_are_told_once(attributor: PairAttributor, tmp_path: Path) -> None:
    long = " ".join(["dog"] * 70)
    rough = PairAttributor(attributor.encoder, 3)  # nothing to integrate
    with pytest.warns(TruncationWarning, match=r"^In 2 of 3 shards: 1 of 1 texts .* 8 tokens") as w:
        TokenVectorIndex.build(rough, [long, "dog", long], tmp_path, shard_size=1)
    assert len(w) == 1


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, r"list of at least one text, but got \[\]"),
        ({"texts": "dog"}, "list of at least one text, but got 'dog'"),
        ({"texts": ["dog", " "]}, "row 1 is ' '"),
        ({"role": "boss"}, "but got 'boss'"),
        ({"dtype": "int8"}, r"\['float16', 'float32'\], but got 'int8'"),
        ({"shard_size": 0}, "`shard_size` to be 1 or more texts, but got 0"),
    ],
)
def test_bad_arguments_of_a_build(change, message, attributor, tmp_path: Path) -> None:
    build = {"texts": CORPUS, "path": tmp_path / "new", **change}
    with pytest.raises(InputError, match=message):
        TokenVectorIndex.build(attributor, **build)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": CORPUS[::-1]}, "`texts_sha256` to be '"),
        ({"role": "query"}, "`role` to be 'document' .* but got 'query'"),
        ({"shard_size": 4}, "`shard_size` to be 3 .* but got 4"),
        ({"layer": 1}, "`layer` to be 2 as in the index .* but got 1"),
        ({"tolerance": 1e-4}, r"`tolerance` to be 1e-05 .* but got 0\.0001"),
        ({"quadrature": "gauss_legendre"}, "`quadrature` to be 'adaptive' .* got 'gauss_legendre'"),
        ({"head": "dot"}, "`similarity` to be 'cos' .* but got 'dot'"),
        ({"head": "shifted"}, "`shift` to be False .* but got True"),
        ({"seed": 1}, "`model_fingerprint` to be '.*' .* but got '"),
    ],
)
def test_an_index_is_only_continued_by_the_same_build(
    change, message, index: TokenVectorIndex
) -> None:
    encoder = HEADS[change.get("head", "cos")]()
    if "seed" in change:
        encoder = SiameseEncoder(tiny_model(prompts=PROMPTS, seed=1), shift=False, reference="pad")
    rule = {"quadrature": change.get("quadrature", "adaptive")}
    rule |= {"n_nodes": 4} if rule["quadrature"] != "adaptive" else {}
    attributor = PairAttributor(
        encoder, change.get("layer", LAYER), tolerance=change.get("tolerance", 1e-5), **rule
    )
    build = {"role": "document", "dtype": index.manifest.dtype, "shard_size": 3} | change
    build = {k: build[k] for k in ("role", "dtype", "shard_size")}
    before = contents(index.path)
    with pytest.raises(InputError, match=message):
        TokenVectorIndex.build(attributor, change.get("texts", CORPUS), index.path, **build)
    assert contents(index.path) == before


def test_another_storage_type_is_refused(index: TokenVectorIndex, attributor) -> None:
    other = {"float16": "float32", "float32": "float16"}[index.manifest.dtype]
    with pytest.raises(InputError, match=f"`dtype` to be '{index.manifest.dtype}' .* '{other}'"):
        TokenVectorIndex.build(
            attributor, CORPUS, index.path, role="document", dtype=other, shard_size=3
        )


def test_another_number_of_nodes_is_refused(attributor: PairAttributor, tmp_path: Path) -> None:
    rules = [
        PairAttributor(attributor.encoder, 3, quadrature="gauss_legendre", n_nodes=n, tolerance=1e3)
        for n in (2, 3)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        TokenVectorIndex.build(rules[0], ["dog"], tmp_path)
    with pytest.raises(InputError, match=r"`n_nodes` to be 2 .* but got 3"):
        TokenVectorIndex.build(rules[1], ["dog"], tmp_path)


def test_folders_of_others_are_left_alone(attributor: PairAttributor, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes\.txt' and no `index\.json`"):
        TokenVectorIndex.build(attributor, CORPUS, tmp_path)
    with pytest.raises(InputError, match=r"notes\.txt' is a file"):
        TokenVectorIndex.build(attributor, CORPUS, tmp_path / "notes.txt")
    with pytest.raises(InputError, match=r"writable folder, but .*notes\.txt/x' is not"):
        TokenVectorIndex.build(attributor, CORPUS, tmp_path / "notes.txt" / "x")


@pytest.mark.parametrize(
    ("made_from", "message"),
    [
        ({"layer": 1}, "attributor with `layer` 2, .* but got 1"),
        ({"reference": "uniform"}, "attributor with `reference` 'pad', .* but got 'uniform'"),
        ({"seed": 1}, "attributor with `model_fingerprint` '.*', .* but got '"),
        ({"similarity": "dot"}, "attributor with `similarity` 'cos', .* but got 'dot'"),
        ({"normalize": True}, "attributor with `normalize` False, .* but got True"),
        ({"shift": True}, "attributor with `shift` False, .* but got True"),
    ],
)
def test_another_attributor_is_refused(made_from, message, index: TokenVectorIndex) -> None:
    options = {"shift": False, "reference": "pad", "layer": LAYER, "seed": 0, **made_from}
    layer, seed = options.pop("layer"), options.pop("seed")
    encoder = SiameseEncoder(tiny_model(prompts=PROMPTS, seed=seed).double(), **options)
    with pytest.raises(InputError, match=message):
        TokenVectorIndex.load(index.path, PairAttributor(encoder, layer))


def test_a_model_that_is_trained_later_is_refused(index: TokenVectorIndex) -> None:
    encoder = HEADS["cos"]()
    opened = TokenVectorIndex.load(index.path, PairAttributor(encoder, LAYER, tolerance=1e-5))
    opened.explain(QUERY, [0])
    with torch.no_grad():
        next(encoder.parameters()).add_(0.1)
    with pytest.raises(InputError, match="attributor with `model_fingerprint`"):
        opened.explain(QUERY, [0])  # remembered, and still refused


@pytest.mark.parametrize("i", [7, -1, True])
def test_ids_out_of_range(i, index: TokenVectorIndex) -> None:
    calls = [
        lambda: index.matrix(i, 0),
        lambda: index.matrices([(0, 0), (0, i)]),
        lambda: index.token_vectors(i),
        lambda: index.explain(QUERY, [i]),
        lambda: index.margin(0, 1, i),
        lambda: index.directions(torch.ones(32), [i]),
    ]
    for call in calls:
        with pytest.raises(InputError, match=f"between 0 and 6, but got {i}"):
            call()


def test_bad_directions_and_cache(index: TokenVectorIndex) -> None:
    with pytest.raises(InputError, match=r"shape \[32\] or \[M, 32\], but got \[2, 31\]"):
        index.directions(torch.ones(2, 31))
    with pytest.raises(InputError, match="finite"):
        index.directions(torch.full((32,), float("nan")))
    with pytest.raises(InputError, match=r"`cache_bytes` to be a positive number .* but got 0"):
        TokenVectorIndex.load(index.path, cache_bytes=0)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v != "absent"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 9}, "Expected format version 1 in .* but it has 9"),
        ({"format": "something"}, "to describe an xsiam token vector index, but it does not"),
        ({"n_texts": 0}, "positive `n_texts` in .* but it has 0"),
        ({"shard_size": "3"}, "positive `shard_size` in .* but it has '3'"),
        ({"dtype": "int8"}, "it has 'int8'"),
        ({"role": "absent"}, "missing 1 required positional argument: 'role'"),
        ({"settings": {}}, "to describe an index, but .* delete the folder"),
        # Another index whose shards happen to be here.
        ({"role": "query"}, "Expected shard 0 of index .* but it holds shard 0 of"),
    ],
)
def test_damaged_manifests(changes, message, folder: Path) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        TokenVectorIndex.load(folder)


def test_no_index_and_no_json(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere', but it has no `index\.json`"):
        TokenVectorIndex.load(tmp_path / "nowhere")
    (folder / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"Expected JSON in .*index\.json"):
        TokenVectorIndex.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_shards(keep: int, folder: Path, attributor: PairAttributor) -> None:
    path = shard_path(folder, 1)
    good = path.read_bytes()
    path.write_bytes(good[:keep])
    message = r"whole shard in .*shard_00001\.safetensors, .* Delete the file and build"
    with pytest.raises(CheckpointError, match=message):
        TokenVectorIndex.load(folder)
    again = {"role": "document", "dtype": Manifest.read(folder).dtype, "shard_size": 3}
    with pytest.raises(CheckpointError, match=message):
        TokenVectorIndex.build(attributor, CORPUS, folder, **again)
    path.unlink()
    TokenVectorIndex.build(attributor, CORPUS, folder, **again)  # as the message says
    assert TokenVectorIndex.load(folder).texts == tuple(CORPUS)


def test_shards_in_the_wrong_place(folder: Path) -> None:
    shutil.copy(shard_path(folder, 0), shard_path(folder, 1))
    with pytest.raises(CheckpointError, match=r"Expected shard 1 of index .* it holds shard 0 of"):
        TokenVectorIndex.load(folder)
    shard_path(folder, 1).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(CheckpointError, match=r"shard_00001\.safetensors, but it holds shard None"):
        TokenVectorIndex.load(folder)


def test_public_name() -> None:
    import xsiam

    assert xsiam.TokenVectorIndex is TokenVectorIndex
    assert TEXT_B in CORPUS
