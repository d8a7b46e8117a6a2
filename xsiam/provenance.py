"""What a model was tuned on, as checkpoints and exports record it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from xsiam import probes
from xsiam.model_card import public_name

if TYPE_CHECKING:
    from xsiam.pairs import PairDataset

__all__ = ["bundled_pairs", "training_record"]


def bundled_pairs(pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Return how many pairs of each bundled split are among these, in either order; no zeros.

    Pairs, since a single sentence that is not made up for a purpose may well be in other data too.
    """
    seen = {frozenset(pair) for pair in pairs}
    counts = {
        split: sum(frozenset((p.sentence1, p.sentence2)) in seen for p in probes.load(split))
        for split in probes.SPLITS
    }
    return {split: count for split, count in counts.items() if count}


def training_record(model: str, facts: Mapping[str, Any], pairs: PairDataset) -> dict[str, Any]:
    """Return what is recorded of one training run, as plain values without paths or texts.

    Args:
        model: The model that the run started from.
        facts: What `PairDataModule.facts` says of the training pairs.
        pairs: The training pairs.

    Returns:
        "model" and "source" as names, "split", "n_pairs", and under "bundled" how many of the
        bundled pairs of each split were among the training pairs, whatever file they came from.
    """
    seconds = [pairs.texts_b, *pairs.negatives.values()]
    together = (pair for texts in seconds for pair in zip(pairs.texts_a, texts, strict=True))
    return {
        "model": public_name(model),
        "source": public_name(facts["source"]),
        "split": facts["split"],
        "n_pairs": len(pairs),
        "bundled": bundled_pairs(together),
    }
