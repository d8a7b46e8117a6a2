"""What the scripts that run inside peers' environments share. It imports nothing of xsiam."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from measuring import Meter, touch

Row = dict[str, Any]
_VERSIONS = ("torch", "transformers", "sentence-transformers", "numpy")


class Recorder:
    """Notes Jacobians and embeddings that pass through a peer's own methods, and changes nothing.

    The vector completeness error of a text is |J δ − Δ| / |Δ| with the peer's own Jacobian J, way δ
    and embeddings. It is computed after the timing.

    Args:
        model: The peer's model object.
        jacobian_method: Name of its method (embeddings, states, …) -> J [K, S, D].
        reference_key: Where its forward's result has the reference's embedding.
    """

    def __init__(self, model: Any, jacobian_method: str, reference_key: str) -> None:
        self.passes: list[tuple[Any, Any, Any]] = []
        self.references: list[Any] = []
        inner, forward = getattr(model, jacobian_method), model.forward

        def jacobian(embeddings: Any, states: Any, *args: Any, **kwargs: Any) -> Any:
            result = inner(embeddings, states, *args, **kwargs)
            self.passes.append((embeddings.detach(), states.detach(), result))
            return result

        def embed(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            self.references.append(result[reference_key].detach())
            return result

        setattr(model, jacobian_method, jacobian)
        model.forward = embed

    def completeness_error(self) -> float:
        """Return the larger of both texts' errors; rows of states run from the text down."""
        errors = []
        for (embeddings, states, jacobian), reference in zip(
            self.passes, self.references, strict=True
        ):
            change = (embeddings[0] - reference.reshape(-1)).double().cpu()
            way = (states[0] - states[-1]).double().cpu()
            found = jacobian.double().cpu().flatten(1) @ way.flatten()
            errors.append(float((found - change).norm() / change.norm()))
        return max(errors)


def measure(request: Row, model: Any, recorder: Recorder, call: Callable[..., Any]) -> Row:
    """Measure one call on the case's texts, and return its figures.

    Args:
        request: The request, with one case.
        model: The peer's model object.
        recorder: Attached to it.
        call: (text_a, text_b) -> (matrix, four similarities): of the texts, of a and b with the
            reference, and of the references.
    """
    settings = request["cases"][0]["settings"]
    touch(model)
    meter = Meter(request["device"])
    meter.baseline()
    meter.start()
    matrix, (score, with_a, with_b, references) = call(*request["texts"])
    seconds, memory = meter.stop()
    explained = score - with_a - with_b + references
    total = float(matrix.sum())
    return {
        "status": "ok",
        "seconds": seconds,
        "peak_bytes": memory,
        "n_nodes": settings["n_nodes"],
        "completeness_error": recorder.completeness_error(),
        "score": score,
        "score_explained": explained,
        "sum_error": abs(total - explained) / abs(explained),
        "matrix_sum": total,
        "matrix": matrix.tolist(),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
    }


def main(run: Callable[[Row], Row]) -> None:
    """Answer the one case of the request named on the command line; errors end the process."""
    import torch

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    answer = run(request)
    with Path(sys.argv[2]).open("a", encoding="utf-8") as answers:
        print(json.dumps(answer), file=answers)
