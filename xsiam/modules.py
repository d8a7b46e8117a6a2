"""The sentence-transformers module that marks an exported model whose shift cannot be folded."""

from __future__ import annotations

from typing import Any

from sentence_transformers.base.modules import Module
from torch import Tensor

from xsiam.errors import ModelError


class ReferenceShift(Module):
    """Stand for a reference shift that depends on the length of the text.

    Such a shift is no function of the pooled embedding, so no stock module can hold it. An export
    names this class in ``modules.json``: plain sentence-transformers refuses a class that is not
    its own, and where it is told to trust the folder the model fails at its first text. It never
    encodes without the shift by silence. ``SiameseEncoder.from_pretrained`` replaces the module by
    the shift.
    """

    config_keys: list[str] = ["reference"]  # noqa: RUF012 - as the base class declares it

    def __init__(self, reference: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reference = reference

    def forward(self, features: dict[str, Tensor | Any], **kwargs: Any) -> dict[str, Tensor | Any]:
        """Raise ModelError: the shift needs the whole encoder."""
        raise ModelError(
            f"This model subtracts the embedding of its {self.reference!r} reference, which plain "
            "sentence-transformers cannot do. Load it with "
            "`xsiam.SiameseEncoder.from_pretrained(path)`."
        )

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Write the module's configuration; it has no weights."""
        self.save_config(output_path)
