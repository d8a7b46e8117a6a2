"""References that are texts: the special tokens of the input, and other tokens everywhere else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xsiam.errors import InputError, ModelError
from xsiam.references.base import AbstractReference, ReferenceRows, pad_id, register_reference
from xsiam.split import Features, SplitModel, select_rows


class TokensReference(AbstractReference):
    """The text itself with other ids where the tokenizer's special-tokens mask marks none.

    Attention mask and positions are those of the text, at its true length.
    """

    @abstractmethod
    def replacements(self, tokenizer: Any) -> list[int]:
        """Return the ids that take the places of a text's own, over and over."""

    def check(self, split: SplitModel, features: Features) -> None:
        """Raise ModelError where the tokenizer has not the token."""
        self.replacements(split.tokenizer)

    def rows(self, split: SplitModel, features: Features) -> ReferenceRows:
        """Return one row per distinct reference, padded like the batch."""
        if "special_tokens_mask" not in features:
            raise ModelError(
                f"Expected features with a special-tokens mask for reference {self.name!r}, but "
                f"got {sorted(features)}. Make them with `SiameseEncoder.preprocess`."
            )
        ids, attention = features["input_ids"], features["attention_mask"]
        keep = features["special_tokens_mask"].bool() & attention.bool()
        replaced = ids.new_tensor(self.replacements(split.tokenizer))
        own = ~keep & attention.bool()
        places = own.cumsum(dim=1).sub(1).clamp_min(0) % len(replaced)
        filled = torch.where(own, replaced[places], pad_id(split.tokenizer))
        reference_ids = torch.where(keep, ids, filled)
        key = torch.cat([reference_ids, attention], dim=1)
        distinct, inverse = torch.unique(key, dim=0, return_inverse=True)
        first = _first_occurrence(inverse, len(distinct))
        rows = select_rows(features | {"input_ids": reference_ids}, first)
        return ReferenceRows(features=rows, inverse=inverse)


@register_reference
class PadReference(TokensReference):
    """The published reference at true length: ``[CLS] PAD … PAD [SEP]``, attention mask all ones.

    Positions are the ones the model derives from the ids itself.

    References:
        Moeller et al. (EMNLP 2023), section 2: the reference of the Siamese encoder.
    """

    name = "pad"

    def replacements(self, tokenizer: Any) -> list[int]:
        """Return PAD."""
        return [pad_id(tokenizer)]


@register_reference
class MaskReference(TokensReference):
    """As ``pad`` with the tokenizer's mask token: what a masked language model fills in (ours)."""

    name = "mask"

    def replacements(self, tokenizer: Any) -> list[int]:
        """Return the mask token; raise ModelError where there is none."""
        return [_special_id(tokenizer, "mask")]


@register_reference
class UnkReference(TokensReference):
    """As ``pad`` with the tokenizer's unknown token (ours)."""

    name = "unk"

    def replacements(self, tokenizer: Any) -> list[int]:
        """Return the unknown token; raise ModelError where there is none."""
        return [_special_id(tokenizer, "unk")]


@register_reference
class TextReference(TokensReference):
    """As ``pad`` with the tokens of a text of the user's, repeated or cut to length (ours).

    Args:
        text: Any text that is not empty.

    Raises:
        InputError: If it is.
    """

    name = "text"

    def __init__(self, text: str = "") -> None:
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"Expected a text for reference 'text', but got {text!r}. Pass "
                '`reference=TextReference("…")`.'
            )
        self.text = text

    @property
    def label(self) -> str:
        """The name and the text."""
        return f"text:{self.text}"

    def state(self, split: SplitModel, features: Features) -> dict[str, Any]:
        """Return the text."""
        return {"text": self.text}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TextReference:
        """Return the reference of a saved text."""
        return cls(state["text"])

    def replacements(self, tokenizer: Any) -> list[int]:
        """Return the text's ids; raise ModelError where the tokenizer knows none of it."""
        ids: list[int] = tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ModelError(
                f"Expected tokens in the text of reference 'text', but the tokenizer finds none in "
                f"{self.text!r}."
            )
        return ids


def _special_id(tokenizer: Any, kind: str) -> int:
    found = getattr(tokenizer, f"{kind}_token_id")
    if found is None:
        raise ModelError(
            f"Expected a tokenizer with a {kind} token for reference {kind!r}, but "
            f"{type(tokenizer).__name__} has none. Set `model.reference` to 'pad' or 'fitted'."
        )
    return int(found)


def _first_occurrence(inverse: Tensor, n_distinct: int) -> Tensor:
    """Return the index of the first element of each class in ``inverse``, [n_distinct]."""
    order = torch.arange(len(inverse), device=inverse.device)
    first = torch.full((n_distinct,), len(inverse), device=inverse.device)
    return first.scatter_reduce(0, inverse, order, reduce="amin")
