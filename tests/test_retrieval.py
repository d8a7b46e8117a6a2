"""Retrieval figures: a slow twin, closed forms, ties, batches, processes and whole runs."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import TEXTS, tiny_model
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.retrieval import (
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from xsiam.data import PairDataModule
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.module import SiameseModule
from xsiam.retrieval import RETRIEVAL_FIGURES, TIE, PairRetrieval, Retrieval, ranking_figures

# Against sums of Python's floats: 4e-16 was the worst.
EXACT = 1e-12

pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers")]


class Pairs:
    """Pairs with repeated texts, and an embedding for each distinct text of each side."""

    def __init__(self, n: int, columns: int, seed: int, dim: int = 4, steps: float = 2.0) -> None:
        draw = torch.Generator().manual_seed(seed)
        n_texts = max(3, 2 * n // 3)
        # Anchors and candidates share texts, so that some candidates are an anchor's own text.
        self.ids = torch.randint(n_texts, (n, 2 + columns), generator=draw)
        # Coarse vectors of few values: many ties.
        table = (torch.randn(2, n_texts, dim, generator=draw) * steps).round() + 0.25
        self.anchors = table[0][self.ids[:, 0]]
        self.candidates = table[1][self.ids[:, 1:]]

    def __len__(self) -> int:
        return len(self.ids)

    def add_to(self, metric: PairRetrieval, rows: Tensor) -> None:
        metric.update(self.anchors[rows], self.candidates[rows], self.ids[rows], rows)


def score(a: list[float], b: list[float], similarity: str) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    if similarity == "dot":
        return product
    return product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def slow_figures(pairs: Pairs, similarity: str) -> dict[str, float]:
    """Return the figures by the definition: sort the candidates of one anchor after the other."""
    anchors: dict[int, list[float]] = {}
    candidates: dict[int, list[float]] = {}
    relevant: dict[int, set[int]] = {}
    for row, (anchor, positive, *negatives) in enumerate(pairs.ids.tolist()):
        anchors[anchor] = pairs.anchors[row].tolist()
        relevant.setdefault(anchor, set()).add(positive)
        for column, text in enumerate((positive, *negatives)):
            candidates[text] = pairs.candidates[row, column].tolist()
    found: dict[str, list[float]] = {key: [] for key in RETRIEVAL_FIGURES}
    for anchor, vector in anchors.items():
        ranked = [
            (score(vector, other, similarity), text in relevant[anchor])
            for text, other in candidates.items()
            if text != anchor or text in relevant[anchor]
        ]
        # Wrong ones first among equals, where 1e-9 is nothing for these numbers.
        ranked.sort(key=lambda entry: (-round(entry[0], 9), entry[1]))
        hits = [is_relevant for _, is_relevant in ranked]
        m = len(relevant[anchor])
        first = hits.index(True) + 1
        found["mrr@10"].append(1 / first if first <= 10 else 0.0)
        gain = sum(1 / math.log2(rank + 2) for rank, hit in enumerate(hits[:10]) if hit)
        found["ndcg@10"].append(gain / sum(1 / math.log2(i + 2) for i in range(min(m, 10))))
        found["recall@1"].append(sum(hits[:1]) / m)
        found["recall@10"].append(sum(hits[:10]) / m)
    return {key: sum(values) / len(values) for key, values in found.items()}


def whole(pairs: Pairs, similarity: str = "cos") -> Retrieval:
    metric = PairRetrieval(similarity)
    pairs.add_to(metric, torch.arange(len(pairs)))
    return metric.compute()


def floats(result: Retrieval) -> dict[str, float]:
    assert result.undefined is None
    assert result.figures is not None
    return {key: value.item() for key, value in result.figures.items()}


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("columns", [0, 2])
@pytest.mark.parametrize("n", [4, 12, 40])
def test_equal_to_a_slow_loop(n: int, columns: int, similarity: str) -> None:
    below = 0
    for seed in range(10):
        pairs = Pairs(n, columns, seed)
        result = whole(pairs, similarity)
        expected = slow_figures(pairs, similarity)
        assert floats(result) == pytest.approx(expected, abs=EXACT)
        assert tuple(floats(result)) == RETRIEVAL_FIGURES
        assert result.n_anchors == len(set(pairs.ids[:, 0].tolist()))
        assert result.n_candidates == len(set(pairs.ids[:, 1:].flatten().tolist()))
        below += expected["recall@10"] < 1
    assert below > 5 or n < 40  # or the cut-off is not tested


def test_equal_to_torchmetrics_where_nothing_is_tied() -> None:
    draw = torch.Generator().manual_seed(3)
    anchors, candidates = (torch.randn(n, 5, generator=draw) for n in (30, 50))
    mask = torch.rand(30, 50, generator=draw) < 0.05
    mask[:, 0] = True
    scores = torch.nn.functional.normalize(anchors) @ torch.nn.functional.normalize(candidates).T
    ours = ranking_figures(anchors, candidates, mask.nonzero())
    rows = list(zip(scores, mask, strict=True))
    theirs = {
        "mrr@10": [retrieval_reciprocal_rank(s, m, top_k=10) for s, m in rows],
        "ndcg@10": [retrieval_normalized_dcg(s, m.long(), top_k=10) for s, m in rows],
        "recall@1": [retrieval_recall(s, m, top_k=1) for s, m in rows],
        "recall@10": [retrieval_recall(s, m, top_k=10) for s, m in rows],
    }
    for key, values in theirs.items():  # in float32 there: 6e-8 was the worst
        assert ours[key].item() == pytest.approx(torch.stack(values).mean().item(), abs=1e-6), key


@pytest.mark.parametrize("place", [1, 2, 10, 11, 30])
def test_closed_form_of_one_relevant_candidate(place: int) -> None:
    angles = torch.linspace(0.0, 1.5, 30, dtype=torch.float64)
    candidates = torch.stack([angles.cos(), angles.sin()], dim=1)
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    figures = ranking_figures(anchor, candidates, torch.tensor([[0, place - 1]]))
    seen = float(place <= 10)
    assert {key: value.item() for key, value in figures.items()} == pytest.approx(
        {
            "mrr@10": seen / place,
            "ndcg@10": seen / math.log2(1 + place),
            "recall@1": float(place == 1),
            "recall@10": seen,
        },
        abs=EXACT,
    )


def test_many_relevant_candidates_have_a_bounded_ideal() -> None:
    """12 relevant ones at places 1 … 12: recall@10 is 10 / 12 and nDCG@10 is 1."""
    angles = torch.linspace(0.0, 1.5, 15, dtype=torch.float64)
    candidates = torch.stack([angles.cos(), angles.sin()], dim=1)
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    relevant = torch.stack([torch.zeros(12, dtype=torch.long), torch.arange(12)], dim=1)
    figures = ranking_figures(anchor, candidates, relevant)
    expected = {"mrr@10": 1.0, "ndcg@10": 1.0, "recall@1": 1 / 12, "recall@10": 10 / 12}
    assert {k: v.item() for k, v in figures.items()} == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize(("gap", "place"), [(0.0, 4), (TIE / 3, 4), (TIE * 3, 1)])
def test_ties_count_against_the_model(gap: float, place: int, similarity: str) -> None:
    """Three wrong candidates score as the relevant one does, or lower by a gap."""
    wrong = 0.5 - gap
    candidates = torch.tensor(
        [[x, math.sqrt(1 - x * x)] for x in (wrong, wrong, 0.5, wrong)], dtype=torch.float64
    )
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    figures = ranking_figures(anchor, candidates, torch.tensor([[0, 2]]), similarity=similarity)
    assert figures["mrr@10"].item() == pytest.approx(1 / place, abs=EXACT)


def test_collapsed_encoder_finds_nothing() -> None:
    """All embeddings equal: every positive is behind all others."""
    metric = PairRetrieval()
    rows = torch.arange(20)
    ids = torch.stack([rows, rows + 100], dim=1)
    metric.update(torch.ones(20, 3), torch.ones(20, 1, 3), ids, rows)
    assert floats(metric.compute()) == dict.fromkeys(RETRIEVAL_FIGURES, 0.0)


def test_positive_of_an_equal_anchor_is_relevant_and_own_text_is_left_out() -> None:
    """Anchor 0 comes twice, with positives 10 and 11; a third pair has text 0 as its positive."""
    ids = torch.tensor([[0, 10], [0, 11], [1, 0]])
    e = torch.eye(3)
    anchors = torch.stack([e[0], e[0], e[1]])
    candidates = torch.stack([e[0] + 0.1 * e[2], e[0] + 0.2 * e[2], e[0] + e[1]])
    metric = PairRetrieval()
    metric.update(anchors, candidates[:, None], ids, torch.arange(3))
    result = metric.compute()
    assert (result.n_anchors, result.n_candidates) == (2, 3)
    # Anchor 0 finds both of its positives, anchor 1 its only one: recall@1 is (1/2 + 1) / 2.
    expected = {"mrr@10": 1.0, "ndcg@10": 1.0, "recall@1": 0.75, "recall@10": 1.0}
    assert floats(result) == pytest.approx(expected, abs=EXACT)


def test_batches_order_repeats_and_blocks_change_nothing() -> None:
    pairs = Pairs(41, 1, seed=5)
    metric = PairRetrieval()
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    for rows in [*order.split(6), order[:4]]:  # the last batch repeats rows, as samplers do
        pairs.add_to(metric, rows)
    assert floats(metric.compute()) == floats(whole(pairs))
    draw = torch.Generator().manual_seed(1)
    anchors, candidates = (torch.randn(n, 5, generator=draw) for n in (11, 17))
    relevant = torch.stack([torch.arange(11), torch.arange(11)], dim=1)
    left_out = torch.stack([torch.arange(11), torch.arange(11) + 1], dim=1)
    first, *others = (
        ranking_figures(anchors, candidates, relevant, left_out, block=block)
        for block in (11, 1, 4, None)
    )
    for other in others:
        for key in RETRIEVAL_FIGURES:
            assert other[key].item() == pytest.approx(first[key].item(), abs=EXACT)


def test_embedding_of_a_repeated_text_does_not_depend_on_the_order_of_batches() -> None:
    """The first pair's is taken, whichever pair comes first: rounding differs between batches."""
    pairs = Pairs(41, 1, seed=5)
    draw = torch.Generator().manual_seed(2)
    pairs.anchors = torch.randn(41, 4, generator=draw)
    pairs.candidates = torch.randn(41, 2, 4, generator=draw)
    metric = PairRetrieval()
    for rows in torch.arange(41).flip(0).split(6):
        pairs.add_to(metric, rows)
    assert floats(metric.compute()) == floats(whole(pairs))


def test_two_processes_gather_embeddings() -> None:
    """The second process has seen pair 0 again, as a sampler that fills up would have it."""
    pairs = Pairs(17, 1, seed=2)
    own, others = torch.arange(17)[::2], torch.tensor([*range(1, 17, 2), 0])
    metric = PairRetrieval()
    pairs.add_to(metric, own)
    answers = iter(
        [pairs.anchors[others], pairs.candidates[others], pairs.ids[others], others],
    )
    metric.distributed_available_fn = lambda: True
    metric.dist_sync_fn = lambda tensor, group: [tensor, next(answers)]
    assert floats(metric.compute()) == floats(whole(pairs))


def test_undefined_is_said_plainly() -> None:
    rows = torch.arange(2)
    metric = PairRetrieval()
    metric.update(torch.ones(2, 3), torch.ones(2, 1, 3), torch.tensor([[0, 5], [1, 5]]), rows)
    reason = "a ranking needs 2 different texts or more, but there are 1"
    assert metric.compute() == (None, reason, 2, 1)
    metric.reset()
    broken = torch.tensor([[1.0, math.nan], [1.0, 0.0]])
    metric.update(broken, torch.ones(2, 1, 2), torch.tensor([[0, 5], [1, 6]]), rows)
    reason = "the embeddings of 1 of 2 anchors are not finite"
    assert metric.compute() == (None, reason, 2, 2)
    with pytest.raises(InputError, match="'cos' or 'dot', but got 'cosine'"):
        PairRetrieval("cosine")


# ---------------------------------------------------------------- in the module and in runs


WORDS = ("dog", "cat", "kitten", "house", "yard", "garden", "red", "big")
ANCHORS = [f"{TEXTS[i % 4]} {word}" for i, word in enumerate(WORDS)]
POSITIVES = [f"{word} {TEXTS[(i + 1) % 4]}" for i, word in enumerate(WORDS)]
POSITIVES[6], ANCHORS[5] = POSITIVES[1], ANCHORS[2]
NEGATIVES = [f"{word} red runs" for word in WORDS]


@pytest.fixture
def triplets(tmp_path: Path) -> Path:
    rows = zip(ANCHORS, POSITIVES, NEGATIVES, strict=True)
    lines = ["anchor\tpositive\tnegative", *("\t".join(row) for row in rows)]
    path = tmp_path / "triplets.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def expected_of(encoder: SiameseEncoder) -> dict[str, float]:
    texts = {text: i for i, text in enumerate(dict.fromkeys([*ANCHORS, *POSITIVES, *NEGATIVES]))}
    pairs = Pairs(8, 1, seed=0)
    columns = (ANCHORS, POSITIVES, NEGATIVES)
    pairs.ids = torch.tensor([[texts[text] for text in row] for row in zip(*columns, strict=True)])
    pairs.anchors = encoder.encode(ANCHORS)
    pairs.candidates = torch.stack([encoder.encode(POSITIVES), encoder.encode(NEGATIVES)], dim=1)
    return slow_figures(pairs, encoder.similarity)


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_module_logs_the_figures_of_pairs_without_labels(
    triplets: Path, tmp_path: Path, batch_size: int, similarity: str
) -> None:
    encoder = SiameseEncoder(tiny_model(), reference="uniform", similarity=similarity)
    data = PairDataModule(
        encoder.preprocess,
        validation=triplets,
        eval_batch_size=batch_size,
        needs_label=False,
        negatives="optional",
        in_batch=True,
    )
    run = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    module = SiameseModule(encoder, "contrastive")
    logged = run.validate(module, datamodule=data, verbose=False)[0]
    expected = {f"val/{key}": value for key, value in expected_of(encoder).items()}
    assert {key: logged[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["val/mrr@10"] < 1  # or the test shows little
    assert not [key for key in logged if "spearman" in key]


def test_texts_of_equal_tokens_are_ties_in_any_batches(tmp_path: Path) -> None:
    """Every positive has a wrong twin that differs in blanks only, so that none comes first."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(12)]
    rows = [(f"a {text}", text) for text in texts]
    rows += [(f"not {text}", text.replace(" ", "  ")) for text in texts]
    path = tmp_path / "twins.tsv"
    lines = ["anchor\tpositive", *("\t".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    encoder = SiameseEncoder(tiny_model(), reference="uniform")
    found = []
    for batch_size in (1, 5, 24):
        data = PairDataModule(encoder.preprocess, test=path, eval_batch_size=batch_size)
        run = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        found.append(run.test(SiameseModule(encoder), datamodule=data, verbose=False)[0])
        assert found[-1]["test/recall@1"] == 0
    for key in RETRIEVAL_FIGURES:
        assert len({logged[f"test/{key}"] for logged in found}) == 1


def test_test_pairs_without_labels_have_figures_whatever_the_objective(
    triplets: Path, tmp_path: Path
) -> None:
    encoder = SiameseEncoder(tiny_model(), reference="uniform")
    data = PairDataModule(encoder.preprocess, test=triplets)  # needs labels, but not for the test
    batch: dict[str, Any] = next(iter(_loader(data)))
    assert batch["text_ids"].shape == (8, 2)
    run = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    logged = run.test(SiameseModule(encoder), datamodule=data, verbose=False)[0]
    assert {f"test/{key}" for key in RETRIEVAL_FIGURES} <= set(logged)
    assert "test/loss" not in logged


def _loader(data: PairDataModule) -> DataLoader[Any]:
    data.setup("test")
    return data.test_dataloader()
