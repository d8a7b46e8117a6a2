"""Run the reference code (xsbert, MIT) from a folder that the user names; for :mod:`peers`."""

from __future__ import annotations

import sys
from typing import Any

from peer_common import Recorder, main, measure


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Explain the pair of the request's case, as an exact model with a cosine."""
    sys.path.insert(0, request["source"])
    from sentence_transformers import models
    from xsbert.models import ShiftingReferenceTransformer, XSMPNet

    case = request["cases"][0]
    transformer = ShiftingReferenceTransformer(request["models"][case["model"]])
    pooling = models.Pooling(transformer.get_word_embedding_dimension())
    model = XSMPNet(modules=[transformer, pooling], device=request["device"])
    model.eval()
    model.init_attribution_to_layer(idx=case["layer"], N_steps=case["settings"]["n_nodes"])
    recorder = Recorder(model, "_compute_integrated_jacobian", "reference")

    def call(text_a: str, text_b: str) -> tuple[Any, tuple[float, ...]]:
        matrix, _, _, *terms = model.explain_similarity(
            text_a, text_b, sim_measure="cos", return_lhs_terms=True, verbose=False
        )
        return matrix, tuple(terms)

    return measure(request, model, recorder, call)


if __name__ == "__main__":
    main(run)
