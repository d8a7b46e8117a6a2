"""Random weights change attributions, from the top block down, and never the model itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from models import TEXT_A, TEXT_B, TEXTS, tiny_model

from xsiam import PairAttributor, SiameseEncoder
from xsiam.analysis import Context, get_analysis
from xsiam.analysis.base import AnalysisResult
from xsiam.analysis.randomisation import ENTRIES, cascade, depths, similarities
from xsiam.config import AnalysisConfig
from xsiam.pairs import PairDataset

PAIRS = (
    (TEXT_A, TEXT_B),
    (TEXTS[3], TEXT_A),
    (TEXT_B, TEXTS[3]),
    ("a cat sleeps in the house", "the kitten is in the garden"),
    ("a big dog runs", "the small cat is not outside"),
    ("the red house", "a dog and a kitten ."),
)


@pytest.fixture(scope="module")
def encoder() -> SiameseEncoder:
    return SiameseEncoder(tiny_model(), shift=True, reference="pad", similarity="cos")


def weights(encoder: SiameseEncoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in encoder.model.named_parameters()}


def test_blocks_become_random_from_the_top_down(encoder: SiameseEncoder) -> None:
    before = weights(encoder)
    fingerprint = encoder.model_fingerprint
    seen = []
    for depth, copied in cascade(encoder, seed=0):
        after = weights(copied)
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        blocks = {
            int(name.split("layer.")[1].split(".")[0]) for name in changed if "layer." in name
        }
        rest = {name for name in changed if "layer." not in name}
        seen.append((depth, blocks, bool(rest)))
        for name, value in after.items():  # values are those of training, in another order
            assert torch.equal(value.flatten().sort()[0], before[name].flatten().sort()[0])
        assert not copied.training
    assert seen == [
        (1, {2}, False),
        (2, {1, 2}, False),
        (3, {0, 1, 2}, False),
        (4, {0, 1, 2}, True),
    ]
    assert encoder.model_fingerprint == fingerprint
    for name, value in weights(encoder).items():
        assert torch.equal(value, before[name])


def test_every_tensor_is_shuffled_once_and_by_the_seed(encoder: SiameseEncoder) -> None:
    finals = []
    for seed in (0, 0, 1):
        stages = [weights(copied) for _, copied in cascade(encoder, seed)]
        name = next(n for n in stages[0] if "layer.2" in n and stages[0][n].ndim == 2)
        assert all(torch.equal(stage[name], stages[0][name]) for stage in stages)
        finals.append(stages[-1])
    assert all(torch.equal(finals[0][n], finals[1][n]) for n in finals[0])
    assert any(not torch.equal(finals[0][n], finals[2][n]) for n in finals[0])


def test_shared_blocks_are_one(encoder: SiameseEncoder) -> None:
    albert = SiameseEncoder(tiny_model("albert"), shift=False, reference="pad", similarity="cos")
    assert [depth for depth, _ in cascade(albert, seed=0)] == [1, 2]
    assert depths(3) == [1, 2, 3]
    assert depths(12) == [2, 4, 6, 8, 10, 12]
    assert depths(7)[-1] == 7


def test_similarities_leave_out_what_they_say(encoder: SiameseEncoder) -> None:
    attributor = PairAttributor(encoder, 2)
    one = attributor.attribute("the dog sleeps", "a dog runs in")
    same = similarities(one, one)
    assert same == dict.fromkeys(ENTRIES, pytest.approx(1.0))
    twin = attributor.attribute("the dog sleeps", "a dog runs in")
    twin.matrix[2, 2] = 1e3  # dog and dog
    twin.matrix[0] = -1e3  # a special token
    assert similarities(one, twin)["different tokens"] == pytest.approx(1.0)
    assert similarities(one, twin)["double-centred"] < 1.0
    single = attributor.attribute("dog", "a dog runs in")
    assert math.isnan(similarities(single, single)["double-centred"])


def analyse(encoder: SiameseEncoder, folder: Path) -> AnalysisResult:
    texts_a, texts_b = map(list, zip(*PAIRS, strict=True))
    context = Context(
        settings=AnalysisConfig(n_resamples=200),
        encoder=encoder,
        pairs=PairDataset(texts_a, texts_b),
        layers=(2, 1),
        folder=folder,
        attributor_settings={"tolerance": 1e-3},
        load=lambda *_: pytest.fail("no other model is needed"),
    )
    analysis = get_analysis("randomisation")
    requests = list(analysis.requests(context))
    context.prepare(requests, 0, 1)
    context.open(requests)
    return analysis.run(context)


def test_correlations_are_those_of_the_random_models(
    encoder: SiameseEncoder, tmp_path: Path
) -> None:
    fingerprint = encoder.model_fingerprint
    result = analyse(encoder, tmp_path)
    assert encoder.model_fingerprint == fingerprint
    rows = result.tables["correlations"].rows
    assert [row["depth"] for row in rows if row["entries"] == "all"] == [1, 2, 3, 4]
    assert {row["layer"] for row in rows} == {2}  # the highest
    texts_a, texts_b = map(list, zip(*PAIRS, strict=True))
    ours = PairAttributor(encoder, 2).attribute(texts_a, texts_b)
    expected = {}
    for depth, copied in cascade(encoder, seed=0):
        others = PairAttributor(copied, 2).attribute(texts_a, texts_b)
        values = []
        for one, other in zip(ours, others, strict=True):
            ranks = [
                m.matrix[1:-1, 1:-1].flatten().argsort().argsort().double() for m in (one, other)
            ]
            values.append(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
        expected[depth] = sum(values) / len(values)
    for depth, value in expected.items():
        # Nodes may differ by what is integrated with what: ranks of near entries may swap.
        assert result.metrics[f"layer_2/depth_{depth}"] == pytest.approx(value, abs=0.02)
    (finding,) = result.findings
    assert finding.interval.estimate == result.metrics["layer_2/all_weights"]
    assert finding.verdict == "confirmed"  # of a random model other random weights share nothing
    assert set(get_analysis("randomisation").plot(result)) == {"correlations"}


def test_a_copy_with_the_same_weights_is_not_random(
    encoder: SiameseEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check can fail: attributions that do not follow the weights are contradicted."""
    monkeypatch.setattr(
        "xsiam.analysis.randomisation._shuffle", lambda module, generator, done: None
    )
    result = analyse(encoder, tmp_path)
    (finding,) = result.findings
    assert finding.verdict == "contradicted"
    assert finding.interval.estimate == pytest.approx(1.0, abs=0.02)
