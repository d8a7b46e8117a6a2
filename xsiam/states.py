"""What attribution needs of texts before anything is differentiated: states and embeddings.

One forward of the model's own modules gives, for every text, every reference that is not known yet
and the texts perturbed by rounding, the hidden states at a layer and the embeddings.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xsiam.linear import FastLinear
from xsiam.references import AbstractReference, pad_id, row_keys
from xsiam.split import Features, SplitModel, select_rows

_TOKENS_AT_ONCE = 4096
_TOKENS_TOGETHER = 512  # with more, padding costs more than reading the weights once saves
_MOST_REFERENCES = 256  # of texts, a few dozen kilobytes each
# Rounding happens in every layer, not only below the first, and one sample is not the worst case:
# over 153 texts and layers of random encoders of high curvature, true errors at the float32 floor
# were up to six times the sample.
_NOISE_SAFETY = 4.0


_Both = tuple[Tensor, Tensor]  # hidden states [m, S, D] and embeddings [m, K]


@dataclass(frozen=True)
class TextStates:
    """Hidden states and embeddings of m texts of one length S and of their references.

    Attributes:
        hidden: Hidden states of the texts at the layer, [m, S, D].
        start: Those of the references, [m, S, D].
        embedding: e(a), without shift or truncation, [m, K].
        reference_embedding: e(r), [m, K].
        noise: How far rounding may move e(a): the embedding output is perturbed by one unit in the
            last place, and four times how far the embedding moves is taken (ours), [m] float64.
        moved: Hidden states of the texts that were perturbed so, [m, S, D].
    """

    hidden: Tensor
    start: Tensor
    embedding: Tensor
    reference_embedding: Tensor
    noise: Tensor
    moved: Tensor


class KnownReferences:
    """Hidden states and embeddings of references at one layer: texts of a length share them."""

    def __init__(self) -> None:
        self._fingerprint: str | None = None
        self._known: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def of(self, fingerprint: str) -> dict[Hashable, tuple[Tensor, Tensor]]:
        """Return what is known of a set of weights; that of others, or too much, is forgotten."""
        if fingerprint != self._fingerprint or len(self._known) > _MOST_REFERENCES:
            self._fingerprint, self._known = fingerprint, {}
        return self._known


def text_states(
    split: SplitModel,
    reference: AbstractReference,
    layer: int,
    groups: Sequence[Features],
    *,
    known: dict[Hashable, tuple[Tensor, Tensor]] | None,
) -> list[TextStates]:
    """Run texts, references and perturbed texts through the model.

    Few texts are padded to one length and run at once: reading the weights takes most of the time.

    Args:
        split: The model.
        reference: Where the paths start.
        layer: A layer that the model can be cut at.
        groups: Features of texts of one length each, tensors [m, S]; equal in all else.
        known: States [S, D] and embeddings [K] of references, to which what was missing is added;
            or None where the blocks read more than hidden states and mask, so that texts and
            references cannot go through them in one batch.

    Returns:
        The states of each group.
    """
    with FastLinear():
        if known is not None and len(groups) > 1 and _padded_tokens(groups) <= _TOKENS_TOGETHER:
            return [_noted(*part) for part in _together(split, reference, layer, groups, known)]
        return [_in_parts(split, reference, layer, features, known) for features in groups]


def _in_parts(
    split: SplitModel,
    reference: AbstractReference,
    layer: int,
    features: Features,
    known: dict[Hashable, tuple[Tensor, Tensor]] | None,
) -> TextStates:
    """Run a bounded number of texts of one length at once."""
    n_texts, length = features["input_ids"].shape
    at_once = max(1, _TOKENS_AT_ONCE // (3 * length))
    device = features["input_ids"].device
    parts = []
    for rows in torch.split(torch.arange(n_texts, device=device), at_once):
        some = select_rows(features, rows)
        if known is None:
            parts.append(_apart(split, reference, layer, some))
        else:
            parts += _together(split, reference, layer, [some], known)
    texts, references, moved = (
        (torch.cat([part[k][0] for part in parts]), torch.cat([part[k][1] for part in parts]))
        for k in range(3)
    )
    return _noted(texts, references, moved)


def _noted(texts: _Both, references: _Both, moved: _Both) -> TextStates:
    noise = _NOISE_SAFETY * (moved[1] - texts[1]).norm(dim=1).double().cpu()
    return TextStates(texts[0], references[0], texts[1], references[1], noise, moved[0])


def perturbed(hidden: Tensor) -> Tensor:
    """Move every number [m, S, D] by one unit in the last place, with fixed random signs."""
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, hidden.shape[1:], generator=generator) - 1
    return hidden * (1 + torch.finfo(hidden.dtype).eps * signs.to(hidden))


def _together(
    split: SplitModel,
    reference: AbstractReference,
    layer: int,
    groups: Sequence[Features],
    known: dict[Hashable, tuple[Tensor, Tensor]],
) -> list[tuple[_Both, _Both, _Both]]:
    batches, needed = [], []
    for features in groups:
        n_texts, length = features["input_ids"].shape
        rows = reference.rows(split, features)
        keys = [(key, length) for key in row_keys(rows)]
        missing = [number for number, key in enumerate(keys) if key not in known]
        first = split.capture(features, 0)
        states = [first, perturbed(first)]
        if missing and reference.is_layered:
            for number in missing:
                own = select_rows(features, (rows.inverse == number).nonzero()[:1, 0])
                hidden, embedding = reference.states(split, own, layer)
                known[keys[number]] = hidden[0].clone(), embedding[0].clone()
            missing = []
        elif missing:
            start = reference.start(split, rows, torch.tensor(missing, device=rows.inverse.device))
            states.append(start.expand(-1, length, -1))
        each = torch.arange(n_texts, device=rows.inverse.device)
        whose = torch.cat([each, each, each[: len(missing)]])
        batches.append((select_rows(features, whose), torch.cat(states)))
        needed.append((n_texts, rows.inverse, keys, missing))
    found = []
    for (hidden, embedding), (n_texts, inverse, keys, missing) in zip(
        _through(split, layer, batches), needed, strict=True
    ):
        texts, moved = (
            (hidden[part], embedding[part])
            for part in (slice(n_texts), slice(n_texts, 2 * n_texts))
        )
        for place, number in enumerate(missing, 2 * n_texts):
            known[keys[number]] = hidden[place].clone(), embedding[place].clone()
        chosen = [known[key] for key in keys]
        starts = torch.stack([state for state, _ in chosen])[inverse]
        embeddings = torch.stack([embedded for _, embedded in chosen])[inverse]
        found.append((texts, (starts, embeddings), moved))
    return found


def _through(
    split: SplitModel, layer: int, batches: Sequence[tuple[Features, Tensor]]
) -> list[_Both]:
    """Run batches of features and states at layer 0 through the model, padded to one length."""
    lengths = [states.shape[1] for _, states in batches]
    features = _padded([features for features, _ in batches], max(lengths), split)
    states = torch.cat([_longer(states, max(lengths)) for _, states in batches])
    hidden, embedding = split.through(features, layer, start=states)
    sizes = [len(states) for _, states in batches]
    parts = zip(torch.split(hidden, sizes), torch.split(embedding, sizes), lengths, strict=True)
    return [(some[:, :length].contiguous(), own) for some, own, length in parts]


def _padded(batches: Sequence[Features], length: int, split: SplitModel) -> Features:
    """Join features of several lengths: PAD, and an attention mask of zeros, at the end."""
    fill = {"input_ids": pad_id(split.tokenizer)}
    return {
        key: torch.cat([_longer(batch[key], length, fill.get(key, 0)) for batch in batches])
        if isinstance(value, Tensor) and value.ndim
        else value
        for key, value in batches[0].items()
    }


def _longer(tensor: Tensor, length: int, value: float = 0) -> Tensor:
    """Pad dimension 1 to a length."""
    missing = length - tensor.shape[1]
    if not missing:
        return tensor
    filler = tensor.new_full((len(tensor), missing, *tensor.shape[2:]), value)
    return torch.cat([tensor, filler], dim=1)


def _padded_tokens(groups: Sequence[Features]) -> int:
    """Return how many tokens texts, references and perturbed texts are, padded to one length."""
    n_texts = sum(len(features["input_ids"]) for features in groups)
    return 3 * n_texts * max(int(features["input_ids"].shape[1]) for features in groups)


def _apart(
    split: SplitModel, reference: AbstractReference, layer: int, features: Features
) -> tuple[_Both, _Both, _Both]:
    moved = perturbed(split.capture(features, 0))
    return (
        split.through(features, layer),
        reference.states(split, features, layer),
        split.through(features, layer, start=moved),
    )
