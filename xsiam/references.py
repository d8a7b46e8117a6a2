"""References: the neutral input where an attribution path starts (Captum says *baseline*).

A reference answers one question: which hidden states stand for "nothing was said", for texts of
these lengths, at this layer? The encoder subtracts its embedding (the reference shift), the
attribution integrates from its hidden states. To add a reference, subclass
:class:`AbstractReference`, implement :meth:`~AbstractReference.rows`, and decorate the class with
``@register_reference``; nothing else in the library needs to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from xsiam.errors import InputError, ModelError
from xsiam.split import Features, SplitModel, evaluation_mode, select_rows

# e(r) of a length-free reference may differ over lengths by float noise only: 6e-7 was measured on
# all-MiniLM-L6-v2 and 7e-6 on all-mpnet-base-v2; a real dependence is above 1e-2.
LENGTH_FREE_TOLERANCE = 1e-4
LENGTHS_CHECKED = (1, 2, 5, 17, 64)


@dataclass(frozen=True)
class ReferenceRows:
    """The distinct reference inputs of a batch of texts.

    Attributes:
        features: Features of the distinct references, tensors [m, S].
        inverse: For each of the n texts the row of its reference, [n].
        start: Hidden states [m, S, D] that replace the embedded ids at layer 0, or None.
    """

    features: Features
    inverse: Tensor
    start: Tensor | None = None


class AbstractReference(ABC):
    """A neutral input of a text's length, by its hidden states at every layer.

    Attributes:
        name: The registered name.
        length_free: Whether e(r) is the same for every length, so that the shift is one constant.
    """

    name: ClassVar[str]
    length_free: ClassVar[bool] = False

    @abstractmethod
    def rows(self, split: SplitModel, features: Features) -> ReferenceRows:
        """Return the distinct references of a padded batch of texts."""

    def check(self, split: SplitModel, features: Features) -> None:  # noqa: B027 - may stay empty
        """Raise ModelError, with the reason, where ``split`` does not allow this reference."""

    def embedding(self, split: SplitModel, features: Features) -> Tensor:
        """Embed the references: e(r) of each text, [n, K], with gradients and without dropout."""
        rows = self.rows(split, features)
        return self.embed_rows(split, rows)[rows.inverse]

    def embed_rows(self, split: SplitModel, rows: ReferenceRows) -> Tensor:
        """Embed the distinct references, [m, K]."""
        with evaluation_mode(split.model):
            if rows.start is None:
                return split.embed(rows.features)
            return split.tail(rows.features, 0, rows.start)

    def hidden(self, split: SplitModel, features: Features, layer: int) -> Tensor:
        """Return the references' hidden states at ``layer`` for texts of one length, [n, S, D]."""
        rows = self.rows(split, features)
        with evaluation_mode(split.model):
            hidden = split.capture(rows.features, layer, start=rows.start)
        return _at_every_position(hidden[rows.inverse], features)

    def states(self, split: SplitModel, features: Features, layer: int) -> tuple[Tensor, Tensor]:
        """Return the references' hidden states as :meth:`hidden` does, and e(r), [n, K]."""
        rows = self.rows(split, features)
        with evaluation_mode(split.model):
            hidden, embedding = split.through(rows.features, layer, start=rows.start)
        return _at_every_position(hidden[rows.inverse], features), embedding[rows.inverse]


REFERENCES: dict[str, type[AbstractReference]] = {}


def register_reference(cls: type[AbstractReference]) -> type[AbstractReference]:
    """Add a reference class to the registry under its ``name``."""
    REFERENCES[cls.name] = cls
    return cls


def get_reference(reference: str | AbstractReference) -> AbstractReference:
    """Return the reference of that registered name, or the object itself.

    Raises:
        InputError: If no reference of that name is registered.
    """
    if isinstance(reference, AbstractReference):
        return reference
    if reference not in REFERENCES:
        raise InputError(
            f"Expected `reference` to be one of {sorted(REFERENCES)}, but got {reference!r}. "
            "Set `model.reference`."
        )
    return REFERENCES[reference]()


@register_reference
class PadReference(AbstractReference):
    """The published reference at true length: ``[CLS] PAD … PAD [SEP]``, attention mask all ones.

    Every position that the tokenizer's special-tokens mask does not mark becomes PAD; positions are
    the ones the model derives from the ids itself.

    References:
        Moeller et al. (EMNLP 2023), section 2: the reference of the Siamese encoder.
    """

    name = "pad"

    def rows(self, split: SplitModel, features: Features) -> ReferenceRows:
        """Return one row per distinct reference, padded like the batch."""
        pad = pad_id(split.tokenizer)
        if "special_tokens_mask" not in features:
            raise ModelError(
                f"Expected features with a special-tokens mask for reference 'pad', but got "
                f"{sorted(features)}. Make them with `SiameseEncoder.preprocess`."
            )
        ids, attention = features["input_ids"], features["attention_mask"]
        keep = features["special_tokens_mask"].bool() & attention.bool()
        reference_ids = torch.where(keep, ids, torch.full_like(ids, pad))
        key = torch.cat([reference_ids, attention], dim=1)
        distinct, inverse = torch.unique(key, dim=0, return_inverse=True)
        first = _first_occurrence(inverse, len(distinct))
        rows = select_rows(features | {"input_ids": reference_ids}, first)
        return ReferenceRows(features=rows, inverse=inverse)


@register_reference
class UniformReference(AbstractReference):
    """One hidden vector c, repeated at every position of the embedding output (ours).

    c is the embedding module's output for PAD without its absolute position. Attention over
    identical values returns that value whatever the weights, so every layer keeps all positions
    identical and e(r) depends on no length: the shift is one constant. Exact for softmax attention
    with mean, CLS, last-token, weighted-mean or max pooling; encoders that mix tokens otherwise are
    refused at load.
    """

    name = "uniform"
    length_free = True

    def rows(self, split: SplitModel, features: Features) -> ReferenceRows:
        """Return one row of length 1, which stands for every length."""
        device = features["input_ids"].device
        single = self._features_of_length(split, features, 1, device)
        inverse = torch.zeros(len(features["input_ids"]), dtype=torch.long, device=device)
        return ReferenceRows(features=single, inverse=inverse, start=self.vector(split, single))

    def vector(self, split: SplitModel, single: Features) -> Tensor:
        """Return c as [1, 1, D] from the features of a single PAD."""
        with evaluation_mode(split.model), split.without_positions():
            return split.capture(single, 0)

    def check(self, split: SplitModel, features: Features) -> None:
        """Raise ModelError, with the measured spread, where e(r) depends on the length."""
        device = features["input_ids"].device
        with torch.no_grad(), evaluation_mode(split.model):
            start = self.vector(split, self._features_of_length(split, features, 1, device))
            embeddings = [
                split.tail(
                    self._features_of_length(split, features, length, device),
                    0,
                    start.expand(1, length, -1),
                )
                for length in LENGTHS_CHECKED
            ]
            text = split.embed(features)[0].double()
        stacked = torch.cat(embeddings).double()
        # Relative to a text's embedding: e(r) itself may be small, as after a folded shift.
        scale = torch.maximum(stacked[0].norm(), text.norm()).clamp_min(1e-30)
        spread = (stacked - stacked[0]).norm(dim=1).max() / scale
        if not torch.isfinite(spread) or spread > LENGTH_FREE_TOLERANCE:
            raise ModelError(
                f"Expected e(r) of reference {self.name!r} to be the same for every length, but "
                f"over lengths {LENGTHS_CHECKED} it differs by {spread.item():.1e} (limit "
                f"{LENGTH_FREE_TOLERANCE:.0e}): {split.name} or its pooling mixes tokens otherwise "
                "than by softmax attention. Set `model.reference=pad`."
            )

    @staticmethod
    def _features_of_length(
        split: SplitModel, features: Features, length: int, device: torch.device
    ) -> Features:
        """Return features of ``length`` PADs, all attended; a prompt belongs to texts only."""
        single: dict[str, Any] = {
            "input_ids": torch.full((1, length), pad_id(split.tokenizer), device=device),
            "attention_mask": torch.ones(1, length, dtype=torch.long, device=device),
        }
        if "token_type_ids" in features:
            single["token_type_ids"] = torch.zeros(1, length, dtype=torch.long, device=device)
        kept = {k: v for k, v in features.items() if not isinstance(v, Tensor)}
        kept.pop("prompt_length", None)
        return {**kept, **single}


def pad_id(tokenizer: Any) -> int:
    """Return the tokenizer's pad id; raise ModelError where it has none."""
    pad = tokenizer.pad_token_id
    if pad is None:
        raise ModelError(
            f"Expected a tokenizer with a pad token, but {type(tokenizer).__name__} has none. "
            "Set `tokenizer.pad_token` (for instance to `tokenizer.eos_token`) and save the model."
        )
    return int(pad)


def _at_every_position(hidden: Tensor, features: Features) -> Tensor:
    """Let a single state [n, 1, D] stand for every position of the texts."""
    length = features["input_ids"].shape[1]
    return hidden.expand(-1, length, -1) if hidden.shape[1] == 1 else hidden


def _first_occurrence(inverse: Tensor, n_distinct: int) -> Tensor:
    """Return the index of the first element of each class in ``inverse``, [n_distinct]."""
    order = torch.arange(len(inverse), device=inverse.device)
    first = torch.full((n_distinct,), len(inverse), device=inverse.device)
    return first.scatter_reduce(0, inverse, order, reduce="amin")
