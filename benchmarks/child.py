"""Run cases in a process of their own: one line of JSON for each finished one.

    python benchmarks/child.py REQUEST ANSWERS

A request holds cases, model names, device and threads. A case that fails is answered with its
reason, and the next one runs.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from machine import count_flops, facts, matmul_peak, time_by_kind
from measuring import Meter, touch
from published import published_attribution
from texts import demo_pair, make_pairs, warm_up_pair

from xsiam import ConvergenceWarning, PairAttribution, PairAttributor, SiameseEncoder

Row = dict[str, Any]
T = TypeVar("T")
_PASSED_ON = ("tolerance", "quadrature", "n_nodes", "mode", "memory_budget", "max_nodes")


class Worker:
    """Runs cases one after the other and keeps the encoder of the last one.

    Args:
        models: Name or folder for each model label.
        device: "cpu" or "cuda".
    """

    def __init__(self, models: dict[str, str], device: str) -> None:
        self.models = models
        self.device = device
        self._key: Any = None
        self._encoder: SiameseEncoder | None = None

    def run(self, case: Row) -> Row:
        """Measure one case and return its figures."""
        if case["method"] == "facts":
            return {"depth": self.depth(), "machine": facts(self.device)}
        if case["method"].startswith("published"):
            return self.run_published(case)
        return self.run_xsiam(case)

    def depth(self) -> dict[str, int]:
        """Return the number of layers of each model."""
        load = SiameseEncoder.from_pretrained
        return {label: load(name).n_layers for label, name in self.models.items()}

    def encoder(self, case: Row, *, fresh: bool = False) -> SiameseEncoder:
        """Load the encoder of a case, or take the one that is loaded already."""
        settings = case["settings"]
        options = {
            "shift": settings.get("shift", True),
            "max_length": settings.get("max_length"),
            "dtype": getattr(torch, settings.get("dtype", "float32")),
        }
        key = (case["model"], tuple(options.items()))
        if fresh or key != self._key or self._encoder is None:
            self._encoder = None  # hand back the last one's memory first
            self._encoder = SiameseEncoder.from_pretrained(
                self.models[case["model"]],
                similarity="cos",
                reference="pad",
                device=self.device,
                **options,
            )
            touch(self._encoder.model)
            self._key = key
        return self._encoder

    def run_published(self, case: Row) -> Row:
        """One call of the published procedure; set-up is nothing beside its many passes."""
        settings, layer = case["settings"], case["layer"]
        encoder = self.encoder(case)
        variant = case["method"].removeprefix("published, ")
        options = {"variant": variant, "chunk": settings.get("chunk", 16)}
        text_a, text_b = _single(encoder, settings)
        meter = Meter(self.device)
        meter.baseline()
        encoder.score(*warm_up_pair())
        if meter.cuda:  # its libraries set themselves up at first use
            published_attribution(encoder, *warm_up_pair(), layer, 1, **options)
        meter.start()
        result = published_attribution(
            encoder, text_a, text_b, layer, settings["n_nodes"], **options
        )
        seconds, memory = meter.stop()
        return {
            "seconds": seconds,
            "peak_bytes": memory,
            "n_nodes": settings["n_nodes"],
            "completeness_error": result.completeness_error,
            "score": result.score,
            "matrix_sum": float(result.matrix.sum()),
            "matrix": result.matrix.tolist(),
        }

    def run_xsiam(self, case: Row) -> Row:
        """Some calls of xsiam, each by a fresh attributor; the median time and the first memory."""
        settings = case["settings"]
        texts_a, texts_b = make_pairs(self.encoder(case), settings.get("texts"))
        trials, memories, results, set_up = [], [], [], []
        for number in range(settings.get("repeats", 1)):
            fresh = settings.get("fresh_encoder", False) and number == 0  # whose memory counts
            encoder = self.encoder(case, fresh=fresh)
            meter = Meter(self.device)
            meter.baseline()
            start = time.perf_counter()
            attributor = make_attributor(encoder, case)
            if settings.get("warm_up", True):  # other texts: the measured pair is new to all caches
                attributor.attribute(*warm_up_pair())
            set_up.append(time.perf_counter() - start)
            meter.start()
            results = attributor.attribute(texts_a, texts_b)
            seconds, memory = meter.stop()
            trials.append(seconds)
            memories.append(memory)
        row = summarise(results, settings) | {
            "seconds": statistics.median(trials),
            "trials": trials,
            "set_up_seconds": statistics.median(set_up),
            "peak_bytes": memories[0],
            "tolerance": settings["tolerance"],
        }
        if settings.get("count_flops"):
            row |= self._arithmetic(case, texts_a, texts_b)
        return row

    def _arithmetic(self, case: Row, texts_a: Sequence[str], texts_b: Sequence[str]) -> Row:
        """Count a call's operations, and measure the machine's speed at once after the timing."""
        attributor = make_attributor(self.encoder(case), case)
        flops = count_flops(lambda: attributor.attribute(texts_a, texts_b))
        attributor = make_attributor(self.encoder(case), case)
        shares = time_by_kind(lambda: attributor.attribute(texts_a, texts_b), self.device)
        return {"flops": flops, "peak_flops": matmul_peak(self.device), "time": shares}


def make_attributor(encoder: SiameseEncoder, case: Row) -> PairAttributor:
    """Return a fresh attributor with what the case's settings say."""
    settings = case["settings"]
    options = {name: settings[name] for name in _PASSED_ON if name in settings}
    return PairAttributor(encoder, case["layer"], **options)


def summarise(results: Sequence[PairAttribution], settings: Row) -> Row:
    """Gather the figures of one or many results."""
    nodes = [result.n_nodes for result in results]
    row: Row = {
        "pairs": len(results),
        "n_nodes": statistics.median(nodes),
        "n_nodes_max": max(nodes),
        "completeness_error": max(result.completeness_error for result in results),
        "token_error": max(result.token_error for result in results),
        "converged": statistics.fmean(result.converged for result in results),
    }
    if len(results) == 1:
        matrix = results[0].matrix
        row |= {
            "score": results[0].score,
            "matrix_sum": float(matrix.sum()),
            "tokens": list(matrix.shape),
            "matrix": matrix.tolist(),
        }
    elif settings.get("keep_matrices"):
        row["matrix"] = [torch.cat([result.matrix.flatten() for result in results]).tolist()]
    return row


def _single(encoder: SiameseEncoder, settings: Row) -> tuple[str, str]:
    if "texts" not in settings:
        return demo_pair()
    texts_a, texts_b = make_pairs(encoder, settings["texts"])
    return texts_a[0], texts_b[0]


def answer(run: Callable[[Row], Row], case: Row) -> Row:
    """Run one case; an error becomes its answer."""
    try:
        return {"status": "ok"} | run(case)
    except Exception as error:
        return {"status": "failed", "note": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> None:
    """Answer the request named on the command line."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # every row says it
    torch.set_num_threads(request["threads"])
    worker = Worker(request["models"], request["device"])
    with Path(sys.argv[2]).open("a", encoding="utf-8") as answers:
        for case in request["cases"]:
            print(json.dumps(answer(worker.run, case)), file=answers, flush=True)


if __name__ == "__main__":
    main()
