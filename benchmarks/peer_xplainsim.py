"""Run xplainsim (GPL-3) as its users do; for :mod:`peers`, inside its own environment."""

from __future__ import annotations

from typing import Any

from peer_common import Recorder, main, measure
from xplain.attribution import ModelFactory


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Explain the pair of the request's case."""
    case = request["cases"][0]
    # By hub name, which leads to a local folder here: it picks the architecture by name.
    name = f"sentence-transformers/{case['model']}"
    model = ModelFactory.build(name, layer_idx=case["layer"], N_steps=case["settings"]["n_nodes"])
    model.to(request["device"])
    recorder = Recorder(model, "_compute_integrated_jacobian", "reference")

    def call(text_a: str, text_b: str) -> tuple[Any, tuple[float, ...]]:
        matrix, _, _, *terms = model.explain_similarity(
            text_a, text_b, sim_measure="cosine", return_lhs_terms=True, verbose=False
        )
        return matrix, tuple(terms)

    return measure(request, model, recorder, call)


if __name__ == "__main__":
    main(run)
