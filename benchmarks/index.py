"""Measure a token vector index: build time, matrices a second, sizes, and how well parts add up.

    python benchmarks/index.py --texts 1000 --layer 4 --output results/index.json

Texts are made of the bundled probes. Both storage types hold the same token vectors, integrated
once: ``build_seconds`` of float32 is the whole build, that of float16 only its writing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from xsiam import ConvergenceWarning, PairAttributor, SiameseEncoder, TokenVectorIndex, probes
from xsiam.reading import TokenVectors

DIRECTIONS = 4
PAIRS = 1000


class RememberingAttributor(PairAttributor):
    """An attributor that integrates nothing twice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[tuple[str, ...], list[TokenVectors]] = {}

    def token_vectors(
        self, texts: Sequence[str], role: str | None = None, *, progress: bool = False
    ) -> list[TokenVectors]:
        """Return what was integrated before for these texts."""
        key = tuple(texts)
        if key not in self._known:
            self._known[key] = super().token_vectors(texts, role, progress=progress)
        return self._known[key]


def make_texts(n: int) -> list[str]:
    """Return ``n`` distinct texts of about 15 tokens: sentences of the probes, a third in twos."""
    found = [
        text
        for split in probes.SPLITS
        for pair in probes.load(split)
        for text in (pair.sentence1, pair.sentence2)
    ]
    sentences = list(dict.fromkeys(found))
    chooser = random.Random(0)
    single = chooser.sample(sentences, min(len(sentences), n - n // 3))
    texts = dict.fromkeys(single)
    while len(texts) < n:
        texts[" ".join(chooser.sample(sentences, 2))] = None
    shuffled = list(texts)
    chooser.shuffle(shuffled)
    return shuffled


def per_second(run: Callable[[], Any], n: int, repeats: int = 3) -> float:
    """Return how many of ``n`` pieces a second ``run`` makes, at its best after a first run."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return n / min(seconds)


def speed(index: TokenVectorIndex, n_pairs: int) -> dict[str, float]:
    """Measure matrices of random pairs and of one text with all others."""
    chooser = random.Random(1)
    n = len(index)
    pairs = [(chooser.randrange(n), chooser.randrange(n)) for _ in range(n_pairs)]
    one = [(0, j) for j in range(n)]

    def loop(some: list[tuple[int, int]]) -> None:
        for i, j in some:
            index.matrix(i, j)

    return {
        "matrix_per_second": per_second(lambda: loop(pairs), len(pairs)),
        "matrices_per_second": per_second(lambda: index.matrices(pairs), len(pairs)),
        "matrix_per_second_one_query": per_second(lambda: loop(one), n),
        "matrices_per_second_one_query": per_second(lambda: index.matrices(one), n),
    }


def accuracy(index: TokenVectorIndex, encoder: SiameseEncoder) -> dict[str, float]:
    """Measure how far parts are from score differences (units of the score) and projections.

    Projections are on unit directions, relative to |ẽ(x)|.
    """
    chooser = random.Random(2)
    residuals, own = [], []
    triples = [chooser.sample(range(len(index)), 3) for _ in range(PAIRS)]
    embeddings = encoder.encode(index.texts).double()
    for q, a, b in triples:
        margin = index.margin(q, a, b)
        for parts in (
            margin.query_tokens.sum() + margin.query_rest,
            margin.tokens_a.sum() + margin.tokens_b.sum() + margin.documents_rest,
        ):
            residuals.append(abs(margin.total - float(parts)))
        score_a, score_b = encoder.similarity_of(embeddings[[q, q]], embeddings[[a, b]]).tolist()
        own.append(abs(margin.total - (score_a - score_b)))
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(DIRECTIONS, index.manifest.embedding_dim, generator=generator)
    w = torch.nn.functional.normalize(w, dim=1)
    missed = [
        float(found.residual.abs().max() / index.token_vectors(i).embedding.norm())
        for i, found in enumerate(index.directions(w))
    ]
    texts = [index.token_vectors(i) for i in range(len(index))]
    return {
        "margin_parts_to_total_max": max(residuals),
        "margin_parts_to_total_median": statistics.median(residuals),
        "margin_total_to_model_scores_max": max(own),
        "direction_parts_to_projection_max": max(missed),
        "direction_parts_to_projection_median": statistics.median(missed),
        "completeness_error_max": max(t.completeness_error for t in texts),
        "token_error_max": max(t.token_error for t in texts),
        "converged_share": float(index.converged.double().mean()),
        "tokens_mean": statistics.mean(len(t.tokens) for t in texts),
    }


def main() -> None:
    """Build one index of each type and print what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1000, help="how many")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="name, folder or checkpoint")
    parser.add_argument("--layer", type=int, help="default: L-2")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--shift", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--pairs", type=int, default=20_000, help="matrices to time")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--folder", type=Path, help="keep the indexes (default: temporary)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the results")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    encoder = SiameseEncoder.from_pretrained(arguments.model, shift=arguments.shift)
    layer = max(0, encoder.n_layers - 2) if arguments.layer is None else arguments.layer
    attributor = RememberingAttributor(encoder, layer, tolerance=arguments.tolerance)
    texts = make_texts(arguments.texts)
    results: dict[str, Any] = {
        "model": arguments.model,
        "layer": layer,
        "tolerance": arguments.tolerance,
        "shift": arguments.shift,
        "n_texts": len(texts),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }
    warnings.simplefilter("ignore", ConvergenceWarning)  # the share is in the results
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in ("float32", "float16"):
            folder = (arguments.folder or Path(temporary)) / dtype
            start = time.perf_counter()
            TokenVectorIndex.build(attributor, texts, folder, dtype=dtype)
            seconds = time.perf_counter() - start
            index = TokenVectorIndex.load(folder, attributor)
            results[dtype] = {
                "build_seconds": seconds,
                "megabytes": sum(f.stat().st_size for f in folder.iterdir()) / 1e6,
                **speed(index, arguments.pairs),
                **accuracy(index, encoder),
            }
    content = json.dumps(results, indent=2)
    print(content)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(content + "\n")


if __name__ == "__main__":
    main()
