"""References: the neutral input where an attribution path starts (Captum says *baseline*).

A reference answers one question: which hidden states stand for "nothing was said", for texts of
these lengths, at this layer? The encoder subtracts its embedding (the reference shift), the
attribution integrates from its hidden states. To add a reference, subclass
:class:`AbstractReference`, implement :meth:`~AbstractReference.rows`, and decorate the class with
``@register_reference``; nothing else in the library needs to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from xsiam.errors import InputError, ModelError
from xsiam.split import Features, SplitModel, evaluation_mode, select_rows


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
        can_shift: Whether an encoder can subtract e(r).
        is_layered: Whether the states at a layer are made there, not by the blocks below.
    """

    name: ClassVar[str]
    length_free: ClassVar[bool] = False
    can_shift: ClassVar[bool] = True
    is_layered: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The name, with digits that tell it from others of its name where there are others."""
        return self.name

    def prepare(  # noqa: B027 - may stay empty
        self, split: SplitModel, features: Sequence[Features]
    ) -> None:
        """Make what the reference needs of a model, once, before anything else is asked for.

        Args:
            split: The model.
            features: Features of texts of ours, one after the other: a short one, then longer ones.
        """

    def complete(  # noqa: B027 - may stay empty
        self, split: SplitModel, *, progress: bool = False
    ) -> None:
        """Make what :meth:`prepare` put off, since it takes seconds that not everyone needs.

        Args:
            split: The model.
            progress: Whether to show a progress bar.
        """

    def make_ready(  # noqa: B027 - may stay empty
        self, split: SplitModel, layer: int, batch: Sequence[Features], *, progress: bool = False
    ) -> None:
        """Make what texts of these shapes need at a layer, before they are integrated.

        Args:
            split: The model.
            layer: Where the paths live.
            batch: Features of texts, tensors [n, S], each of one length.
            progress: Whether to show a progress bar.
        """

    def state(self, split: SplitModel, features: Features) -> dict[str, Any]:
        """Return what must be saved with a model beside the name, as plain values."""
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AbstractReference:
        """Return the reference that :meth:`state` was of."""
        return cls()

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

    def start(self, split: SplitModel, rows: ReferenceRows, which: Tensor) -> Tensor:
        """Return the states at layer 0 of some of the distinct references, [m, S or 1, D]."""
        if rows.start is not None:
            return rows.start[which]
        with evaluation_mode(split.model):
            return split.capture(select_rows(rows.features, which), 0)

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


def row_keys(rows: ReferenceRows) -> list[Hashable]:
    """Return a hashable key for each distinct reference: everything its embedding depends on."""
    features = rows.features
    ids, attention = features["input_ids"], features["attention_mask"].bool()
    device = ids.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    plain = tuple(sorted((k, str(v)) for k, v in features.items() if not isinstance(v, Tensor)))
    pairs = zip(ids.tolist(), attention.tolist(), strict=True)
    return [
        (tuple(i for i, real in zip(row, mask, strict=True) if real), plain, autocast)
        for row, mask in pairs
    ]
