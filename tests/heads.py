"""Tiny encoders with prompts and every kind of head, in float64."""

from __future__ import annotations

from collections.abc import Callable

from models import tiny_model
from sentence_transformers.base.modules import Normalize

from xsiam.encoder import SiameseEncoder

PROMPTS = {"query": "query : ", "document": "passage : "}
HEADS: dict[str, Callable[[], SiameseEncoder]] = {
    "cos": lambda: SiameseEncoder(
        tiny_model(prompts=PROMPTS).double(), shift=False, reference="pad"
    ),
    "dot": lambda: SiameseEncoder(
        tiny_model(prompts=PROMPTS).double(), similarity="dot", shift=False, reference="pad"
    ),
    "shifted": lambda: SiameseEncoder(tiny_model(prompts=PROMPTS).double(), reference="pad"),
    "truncated_dot_normalize": lambda: SiameseEncoder(
        tiny_model(extra=[Normalize()], truncate_dim=16, similarity_fn_name="dot").double(),
        shift=False,
        reference="pad",
    ),
}
