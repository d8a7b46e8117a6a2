"""Our matrices against the reference code's own, entry by entry.

The matrices were computed once by the reference implementation (its right-endpoint Riemann sum, its
reverse passes). They are not part of the repository: set ``XSIAM_FIXTURES`` to the folder that
holds them, as ``make golden`` requires.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from xsiam import PairAttributor, SiameseEncoder

pytestmark = [
    pytest.mark.golden,
    pytest.mark.filterwarnings("ignore::xsiam.errors.ConvergenceWarning"),  # 20 Riemann nodes
]

TINY_TOLERANCE = 1e-5  # of the largest entry; the worst measured was 2e-6
MPNET_TOLERANCE = 1e-4  # of the largest entry; the worst measured was 3e-6
ARCHITECTURES = ("mpnet", "roberta")


def fixtures(name: str) -> Path:
    """Return a fixture's path; skip where no folder is named, fail where the file is missing."""
    folder = os.environ.get("XSIAM_FIXTURES")
    if not folder:
        pytest.skip("XSIAM_FIXTURES names no folder with the reference code's matrices")
    path = Path(folder) / name
    assert path.exists(), f"XSIAM_FIXTURES is set, but {path} is missing"
    return path


def attribute(case: dict[str, Any], encoder: SiameseEncoder, n_nodes: int) -> Any:
    attributor = PairAttributor(encoder, case["layer"], quadrature="riemann", n_nodes=n_nodes)
    return attributor.attribute(case["text_a"], case["text_b"])


def assert_matches(case: dict[str, Any], encoder: SiameseEncoder, tolerance: float) -> None:
    expected = torch.tensor(case["attribution"])
    result = attribute(case, encoder, case["n_steps"])
    difference = (result.matrix - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance, f"{difference:.1e} at layer {case['layer']}"
    assert result.score == pytest.approx(case["score"], abs=1e-4)
    # The comparison can fail: another node count is seen at once.
    if case["layer"] < encoder.n_layers:
        other = attribute(case, encoder, case["n_steps"] + 1)
        assert (other.matrix - expected).abs().max() / expected.abs().max() > tolerance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_checkpoints_of_the_reference_code(architecture: str) -> None:
    cases = json.loads(fixtures("xsbert_tiny_golden.json").read_text())
    cases = [case for case in cases if case["architecture"] == architecture]
    assert len(cases) == 24
    folder = fixtures(f"xsbert_tiny_{architecture}")
    for case in cases:
        encoder = SiameseEncoder.from_pretrained(
            folder,
            similarity=case["similarity"],
            shift=case["kind"] == "exact",
            reference="pad",
        )
        assert_matches(case, encoder, TINY_TOLERANCE)


@pytest.mark.slow
def test_all_mpnet_base_v2() -> None:
    cases = json.loads(fixtures("xsbert_mpnet_golden.json").read_text())
    model = os.environ.get("XSIAM_MPNET")
    if not model:
        pytest.skip("XSIAM_MPNET names no folder with all-mpnet-base-v2")
    assert len(cases) == 2
    for case in cases:
        encoder = SiameseEncoder.from_pretrained(
            model,
            similarity=case["similarity"],
            shift=case["kind"].startswith("exact"),
            reference="pad",
            normalize=False,
        )
        assert_matches(case, encoder, MPNET_TOLERANCE)
