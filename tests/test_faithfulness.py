"""Leaving tokens out is what scoring the changed texts gives; the study of references runs."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from models import TEXTS, tiny_folder, tiny_model

from xsiam import PairAttributor, SiameseEncoder
from xsiam.analysis.matrices import centred, correlation
from xsiam.perturbation import Absence, interactions, mean_state
from xsiam.split import evaluation_mode

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():  # an installed copy has none
    pytest.skip("the repository's benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import references  # noqa: E402
from faithfulness import deletion  # noqa: E402

A, B = ["small", "dog", "runs"], ["cat", "in", "a", "house"]


def without(words: list[str], place: int, protocol: str) -> str:
    kept = [*words[:place], *(["[MASK]"] if protocol == "mask" else []), *words[place + 1 :]]
    return " ".join(kept)


@pytest.mark.parametrize("protocol", ["mask", "drop"])
def test_interactions_are_differences_of_scores(protocol: str) -> None:
    encoder = SiameseEncoder(tiny_model().double(), shift=False, similarity="cos", reference="pad")
    result = PairAttributor(encoder, 2).attribute(" ".join(A), " ".join(B))
    found = interactions(encoder, result, Absence(protocol))
    for i in range(len(A)):
        for j in range(len(B)):
            a, b = without(A, i, protocol), without(B, j, protocol)
            whole, less_a, less_b, less = encoder.score(
                [" ".join(A), a, " ".join(A), a], [" ".join(B), " ".join(B), b, b]
            ).tolist()
            assert float(found[i, j]) == pytest.approx(whole - less_a - less_b + less, abs=1e-9)


def test_mean_states_take_the_places_of_states() -> None:
    encoder = SiameseEncoder(tiny_model().double(), shift=False, similarity="dot", reference="pad")
    absent = mean_state(encoder, [" ".join(A), " ".join(B)], 1)
    states, less, whole = [], [], []
    with torch.no_grad(), evaluation_mode(encoder):
        for words, place in ((A, 1), (B, 3)):
            features = encoder.preprocess([" ".join(words)])
            hidden = encoder.split.capture(features, 1)
            states.append(hidden[0, 1:-1])
            whole.append(encoder.split.embed(features)[0])
            changed = hidden.clone()
            changed[0, 1 + place] = absent  # behind [CLS]
            less.append(encoder.split.tail(features, 1, changed)[0])
    assert torch.allclose(absent, torch.cat(states).mean(0))
    result = PairAttributor(encoder, 1).attribute(" ".join(A), " ".join(B))
    found = interactions(encoder, result, Absence("mean", 1, absent))[1, 3]
    expected = (whole[0] - less[0]) @ (whole[1] - less[1])  # a dot product has this interaction
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_what_is_deleted_is_scored_again() -> None:
    encoder = SiameseEncoder(tiny_model().double(), shift=False, similarity="cos", reference="pad")
    result = PairAttributor(encoder, 2).attribute(" ".join(A), " ".join(B))
    order = torch.zeros(len(A), len(B))
    order[1, 2], order[0, 0] = 2.0, 1.0
    found = deletion(encoder, result, order, Absence("drop"))
    first, second = encoder.score(["small runs", "runs"], ["cat in house", "in house"]).tolist()
    assert found == pytest.approx((first + second) / 2, abs=1e-9)


def test_centred_matrices_have_no_main_effects() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 5, generator=generator)
    rows, columns = torch.randn(4, 1, generator=generator), torch.randn(1, 5, generator=generator)
    assert centred(matrix).mean(0).abs().max() < 1e-6
    assert correlation(centred(matrix), centred(matrix + rows + columns)) == pytest.approx(1.0)
    assert math.isnan(correlation(torch.ones(1, 2), torch.ones(1, 2)))
    assert math.isnan(correlation(centred(matrix[:, :1]), matrix[:, 0]))


def test_the_study_of_references_runs_goes_on_and_draws(tmp_path, capsys) -> None:
    folder = tiny_folder(tmp_path / "model")
    rows = [f'"{a}","{b}",{k / 4}' for k, (a, b) in enumerate(itertools.pairwise(TEXTS))]
    data, output = tmp_path / "pairs.csv", tmp_path / "study"
    data.write_text("\n".join(["sentence1,sentence2,score", *rows[:4]]), encoding="utf-8")
    arguments = ["--data", str(data), "--output", str(output), "--model", str(folder)]
    arguments += ["--layers", "2", "--pairs", "3", "--tuned", str(folder)]
    assert references.main([*arguments, "--references", "pad"]) == 0
    assert references.main([*arguments, "--references", "pad,uniform"]) == 0
    assert capsys.readouterr().out.count("pad layer-2: done") == 1
    text = (output / "table.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| 2 | ")]
    assert [line.split("|")[2].strip() for line in lines] == ["pad", "uniform"]
    assert "## Layer 2: faithfulness" in text
    assert (output / "table.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="Set --output to another folder"):
        references.main([*arguments, "--references", "pad", "--tolerance", "1e-2"])
