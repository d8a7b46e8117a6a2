"""Run retrivex (LGPL-2.1) as its users do; for :mod:`peers`, inside its own environment."""

from __future__ import annotations

from typing import Any

from peer_common import Recorder, main, measure
from retrivex.stransformers import IntJacobianExplainableTransformer


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Explain the pair of the request's case."""
    case = request["cases"][0]
    model = IntJacobianExplainableTransformer(
        request["models"][case["model"]], device=request["device"]
    )
    recorder = Recorder(model, "_compute_integrated_gradients_jacobian", "reference_embedding")
    options: dict[str, Any] = {"layer_index": case["layer"]}
    if not case["settings"]["default"]:
        options["num_interpolation_steps"] = case["settings"]["n_nodes"]

    def call(text_a: str, text_b: str) -> tuple[Any, tuple[float, ...]]:
        matrix, _, _, details = model.explain(
            text_a, text_b, return_details=True, show_progress=False, **options
        )
        return matrix, (
            details["query_candidate_similarity"],
            details["query_reference_similarity"],
            details["candidate_reference_similarity"],
            details["references_similarity"],
        )

    return measure(request, model, recorder, call)


if __name__ == "__main__":
    main(run)
