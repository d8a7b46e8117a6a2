"""References of one hidden vector, repeated: their embedding depends on no length."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from xsiam.errors import InputError, ModelError
from xsiam.references.base import AbstractReference, ReferenceRows, pad_id, register_reference
from xsiam.split import Features, SplitModel, evaluation_mode, features_to
from xsiam.texts import check_texts

if TYPE_CHECKING:
    from xsiam.encoder import SiameseEncoder

# e(r) of a length-free reference may differ over lengths by float noise only: 6e-7 was measured on
# all-MiniLM-L6-v2 and 7e-6 on all-mpnet-base-v2; a real dependence is above 1e-2.
LENGTH_FREE_TOLERANCE = 1e-4
# At a vector of small e(c) noise is amplified: 2e-5 was measured on all-mpnet-base-v2 and 1.4e-4 on
# a tiny random model, whose uniform reference kept the limit above.
VECTOR_TOLERANCE = 1e-3
LENGTHS_CHECKED = (1, 2, 5, 17, 64)
# How far e(c) may lie from the saved one, relative to a text's embedding, in the same model.
_SAME_MODEL, _SAME_MODEL_HALF = 1e-4, 5e-2


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
    _length_tolerance = LENGTH_FREE_TOLERANCE

    def rows(self, split: SplitModel, features: Features) -> ReferenceRows:
        """Return one row of length 1, which stands for every length."""
        ids = features["input_ids"]
        single = features_of_length(split, features, 1)
        inverse = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        return ReferenceRows(features=single, inverse=inverse, start=self.vector(split, single))

    def vector(self, split: SplitModel, single: Features) -> Tensor:
        """Return c as [1, 1, D] from the features of a single PAD."""
        with (
            evaluation_mode(split.model),
            split.without_positions(),
            split.without_padding_gradients(),
        ):
            return split.capture(single, 0)

    def check(self, split: SplitModel, features: Features) -> None:
        """Raise ModelError, with the measured spread, where e(r) depends on the length."""
        with torch.no_grad(), evaluation_mode(split.model):
            start = self.vector(split, features_of_length(split, features, 1))
            embeddings = [
                split.tail(
                    features_of_length(split, features, length), 0, start.expand(1, length, -1)
                )
                for length in LENGTHS_CHECKED
            ]
            text = split.embed(features)[0].double()
        stacked = torch.cat(embeddings).double()
        # Relative to a text's embedding: e(r) itself may be small, as after a folded shift.
        scale = torch.maximum(stacked[0].norm(), text.norm()).clamp_min(1e-30)
        spread = (stacked - stacked[0]).norm(dim=1).max() / scale
        if not torch.isfinite(spread) or spread > self._length_tolerance:
            raise ModelError(
                f"Expected e(r) of reference {self.name!r} to be the same for every length, but "
                f"over lengths {LENGTHS_CHECKED} it differs by {spread.item():.1e} (limit "
                f"{self._length_tolerance:.0e}): {split.name} or its pooling mixes tokens "
                "otherwise than by softmax attention. Set `model.reference=pad`."
            )


class VectorReference(UniformReference):
    """A vector c of one's own, [D], repeated at every position of the embedding output (ours).

    It is saved with the model, and refused where it is loaded with another one: what tells them
    apart is e(c), which a change of floating point type leaves.

    Args:
        vector: c, [D], or None where :meth:`prepare` makes it.

    Raises:
        InputError: If it is no finite vector.
    """

    _length_tolerance = VECTOR_TOLERANCE

    def __init__(self, vector: Tensor | None = None) -> None:
        self._fixed = None if vector is None else _checked(vector)
        self._trained: nn.Parameter | None = None
        self.saved_embedding: Tensor | None = None

    @property
    def c(self) -> Tensor | None:
        """The vector as it is now, [D] float64 on the CPU, or None before it is made."""
        return self._fixed if self._trained is None else self._trained.detach().cpu().double()

    @c.setter
    def c(self, vector: Tensor | None) -> None:
        if self._trained is None:
            self._fixed = vector
            return
        assert vector is not None
        with torch.no_grad():
            self._trained.copy_(vector)

    def as_parameter(self, split: SplitModel) -> nn.Parameter:
        """Return the vector as a weight of the model, [D]: it follows it from now on.

        Raises:
            InputError: If there is no vector yet.
        """
        if self._trained is None:
            self._trained = nn.Parameter(self._in_model(split).clone())
        return self._trained

    @property
    def label(self) -> str:
        """The name and eight digits of the vector."""
        c = self.c
        if c is None:
            return self.name
        return f"{self.name}:{hashlib.sha256(c.numpy().tobytes()).hexdigest()[:8]}"

    def vector(self, split: SplitModel, single: Features) -> Tensor:
        """Return c as [1, 1, D]."""
        return self._in_model(split)[None, None]

    def _in_model(self, split: SplitModel) -> Tensor:
        """Return c on the device and of the type of the weights, with its gradient if trained."""
        weight = next(p for p in split.model.parameters() if p.is_floating_point())
        c = self._fixed if self._trained is None else self._trained
        if c is None:
            raise InputError(f"Expected a vector of reference {self.name!r}, but it has none yet.")
        return c.to(weight.device, weight.dtype)

    def check(self, split: SplitModel, features: Features) -> None:
        """Raise ModelError where e(r) depends on the length or the vector is another model's."""
        width = split.model.config.hidden_size
        if self.c is not None and len(self.c) != width:
            raise ModelError(
                f"Expected a vector of reference {self.name!r} with the {width} dimensions of "
                f"{split.name}, but got {len(self.c)}: it is another model's. Fit it again."
            )
        super().check(split, features)
        saved = self.saved_embedding
        if saved is None:
            return
        with torch.no_grad(), evaluation_mode(split.model):
            now = self.embedding(split, features)[0].double().cpu()
            scale = torch.maximum(split.embed(features)[0].double().cpu().norm(), now.norm())
        half = next(split.model.parameters()).dtype in (torch.float16, torch.bfloat16)
        same = len(now) == len(saved)
        difference = float((now - saved).norm() / scale) if same else float("inf")
        if not difference <= (_SAME_MODEL_HALF if half else _SAME_MODEL):
            raise ModelError(
                f"Expected the model that the vector of reference {self.name!r} was saved with, "
                f"but its embedding differs by {difference:.1e} (relative): the weights are "
                "others. Fit it again."
            )

    def state(self, split: SplitModel, features: Features) -> dict[str, Any]:
        """Return the vector, and e(c), which names the model."""
        c = self.c
        assert c is not None
        with torch.no_grad(), evaluation_mode(split.model):
            embedding = self.embedding(split, features)[0]
        return {"vector": c.tolist(), "embedding": embedding.double().cpu().tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the reference of a saved vector."""
        found = cls(torch.tensor(state["vector"], dtype=torch.float64))
        if state.get("embedding") is not None:
            found.saved_embedding = torch.tensor(state["embedding"], dtype=torch.float64)
        return found


@register_reference
class MeanReference(VectorReference):
    """The average of the embedding output over the tokens of a corpus, at every position (ours).

    Make it by :meth:`of`. Special tokens and prompts are not counted.
    """

    name = "mean"

    def prepare(self, split: SplitModel, features: Sequence[Features]) -> None:
        """Raise InputError where the vector was not made yet: it takes texts."""
        if self.c is None:
            raise InputError(
                "Expected texts to average over for reference 'mean'. Pass "
                "`reference=MeanReference.of(encoder, texts)`."
            )

    @classmethod
    def of(cls, encoder: SiameseEncoder, texts: Sequence[str], batch_size: int = 64) -> Self:
        """Average over the tokens of texts.

        Raises:
            InputError: If there is no text, or one is empty.
        """
        check_texts(texts)
        total, count = torch.zeros((), dtype=torch.float64), 0
        with torch.no_grad(), evaluation_mode(encoder):
            for start in range(0, len(texts), batch_size):
                features = features_to(
                    encoder.preprocess(texts[start : start + batch_size]), encoder.device
                )
                hidden = encoder.split.capture(features, 0).double().cpu()
                own = features["attention_mask"].bool() & ~features["special_tokens_mask"].bool()
                own = own.cpu()
                total = total + hidden[own].sum(0)
                count += int(own.sum())
        return cls(total / max(1, count))


def features_of_length(split: SplitModel, features: Features, length: int) -> Features:
    """Return features of ``length`` PADs, all attended; a prompt belongs to texts only."""
    device = features["input_ids"].device
    single: dict[str, Any] = {
        "input_ids": torch.full((1, length), pad_id(split.tokenizer), device=device),
        "attention_mask": torch.ones(1, length, dtype=torch.long, device=device),
    }
    if "token_type_ids" in features:
        single["token_type_ids"] = torch.zeros(1, length, dtype=torch.long, device=device)
    kept = {k: v for k, v in features.items() if not isinstance(v, Tensor)}
    kept.pop("prompt_length", None)
    return {**kept, **single}


def _checked(vector: Tensor) -> Tensor:
    c = torch.as_tensor(vector).detach().cpu().double()
    if c.ndim != 1 or not c.isfinite().all():
        raise InputError(
            f"Expected one finite vector of hidden width, but got shape {list(c.shape)}"
            + ("." if c.ndim != 1 else " with entries that are not finite.")
        )
    return c
