"""The Siamese encoder: a SentenceTransformer with a reference shift and a similarity head."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xsiam.chunks import embed_in_chunks
from xsiam.errors import InputError, ModelError
from xsiam.references import (
    AbstractReference,
    ReferenceRows,
    VectorReference,
    get_reference,
    pad_id,
    recommended_reference,
    row_keys,
)
from xsiam.split import (
    Features,
    SplitModel,
    evaluation_mode,
    features_to,
    join_features,
    select_rows,
    trim,
)
from xsiam.texts import Truncations, check_pairs, check_texts

SIMILARITIES = {"cosine": "cos", "dot": "dot"}  # sentence-transformers' names: ours
_SUPPORTED_MODULES = (Transformer, Pooling, Dense, Normalize, LayerNorm, Dropout)
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # in the order sentence-transformers tries
_PROBE_TEXTS = ("A dog runs.", "Outside in the garden the cat is chased by the dog.")
_LONGER_TEXT = "A dog runs after the kitten."  # nine tokens of most tokenizers
_CACHE_LIMIT = 4096


@dataclass(frozen=True)
class Parts:
    """One batch of embeddings, taken apart.

    Attributes:
        embedding: ẽ after truncation, the vectors whose inner products make the score, [n, K].
        norm: What the model divides by, per text, [n]: the normaliser of a pair is the product.
    """

    embedding: Tensor
    norm: Tensor


class SiameseEncoder(nn.Module):
    """Embed texts and score pairs, with a score that can be exact under attribution.

    With ``shift`` the embedding of a text is e(x) − e(r), where r is the reference of the text's
    own length, and a trailing Normalize moves behind the shift. Then the score of any text with a
    reference is zero and the score decomposes into token pairs exactly.

    Args:
        model: A SentenceTransformer; its pooling, Dense, Normalize, prompts and truncation are
            kept.
        similarity: "cos" or "dot"; None takes the model's own similarity function.
        shift: Whether to subtract the reference embedding.
        reference: A registered name ("pad", "uniform", "fitted", …) or a reference object. None is
            what is recommended: `fitted`, or `pad`, with a warning, where the model does not allow
            that.
        normalize: Whether the embedding ends in a Normalize; None keeps what the model has.

    Raises:
        InputError: If ``similarity`` or ``reference`` is unknown.
        ModelError: If the model has modules that cannot be split, or does not allow the reference.

    References:
        Moeller et al., "An Attribution Method for Siamese Encoders" (EMNLP 2023): the shift.
        Own-length references and the ``uniform`` reference are ours.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        similarity: str | None = None,
        shift: bool = True,
        reference: str | AbstractReference | None = None,
        normalize: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.similarity = _head(model, similarity)
        self.shift = shift
        given = None if reference is None else get_reference(reference)
        if shift and given is not None and not given.can_shift:
            raise InputError(
                f"Expected no shift with reference {given.name!r}, whose embedding is nothing "
                "already, but got shift=True. Set `model.shift=false`."
            )
        modules = list(model.children())
        _check_modules(modules)
        ends_normalized = isinstance(modules[-1], Normalize)
        self.normalize = ends_normalized if normalize is None else normalize
        self._shift_cache: dict[Hashable, Tensor] = {}
        self._cache_weights: Hashable = None
        self.longest_warned = 0
        self.reference_vector: nn.Parameter | None
        self.register_parameter("reference_vector", None)  # see `train_reference`
        # Runs that the model was tuned in, oldest first (`xsiam.provenance`); None: not recorded.
        self.trained_on: list[dict[str, Any]] | None = None
        # Whether processes share the weights (`xsiam.sharding`). All then embed the same number of
        # times, so that none may spare itself what another needs.
        self.sharded = False
        pad_id(self.tokenizer)  # needed by every batch
        probe = self._probe_features()
        self.split = SplitModel(modules[:-1] if ends_normalized else modules, probe)
        self.reference = given or recommended_reference(self.split, probe)
        self.reference.prepare(self.split, [probe, self._probe_features([_LONGER_TEXT])])
        self.reference.check(self.split, probe)
        if shift:
            self.reference.complete(self.split, progress=sys.stdout.isatty())
        with torch.no_grad(), evaluation_mode(self.model):
            self.embedding_dim: int = self.split.embed(probe)[:, : model.truncate_dim].shape[1]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        similarity: str | None = None,
        shift: bool | None = None,
        reference: str | AbstractReference | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> SiameseEncoder:
        """Load a sentence-transformers or Hugging Face folder, a hub name, or a checkpoint.

        Also loads our own ``.ckpt`` files and exports, and the reference code's checkpoint folders
        and archives. What the source records (similarity, shift, reference) is kept; arguments that
        are given win; a plain model becomes a shifted encoder, with ``shift=False`` an
        unmodified one, both with the ``fitted`` reference; models of the reference code that shift
        have ``pad``. The vector of ``fitted`` takes seconds to a minute to find, once for a set of
        weights: it is kept on disk.

        Raises:
            ModelError: If there is no such model or it cannot be used, with the reason.
            CheckpointError: If a checkpoint, export or archive is damaged or of a newer format.
        """
        from xsiam.checkpoint import load_encoder

        return load_encoder(
            name_or_path,
            similarity=similarity,
            shift=shift,
            reference=reference,
            normalize=normalize,
            max_length=max_length,
            truncate_dim=truncate_dim,
            prompts=prompts,
            default_prompt_name=default_prompt_name,
            device=device,
            dtype=dtype,
        )

    # -- what users call ------------------------------------------------------------------------

    def encode(
        self, texts: str | Sequence[str], role: str | None = None, *, batch_size: int = 32
    ) -> Tensor:
        """Embed texts: [n, K] for n texts, after shift, Normalize and truncation.

        Without a shift this equals sentence-transformers' ``encode`` (``encode_query`` and
        ``encode_document`` for those roles). The embedding of a text depends on no other text.

        Raises:
            InputError: If a text is empty or no string, or the role is unknown.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.empty(0, self.embedding_dim, device=self.device)
        check_texts(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        chunks = []
        with (
            torch.no_grad(),
            evaluation_mode(self),
            self.weights_held(),
            Truncations(self) as truncations,
        ):
            for start in range(0, len(texts), batch_size):
                batch = order[start : start + batch_size]
                features = self.preprocess_with(truncations, [texts[i] for i in batch], role)
                chunks.append(self.forward(features_to(features, self.device)))
        inverse = torch.empty(len(texts), dtype=torch.long)
        inverse[torch.tensor(order)] = torch.arange(len(texts))
        return torch.cat(chunks)[inverse.to(self.device)]

    def score(
        self,
        texts_a: str | Sequence[str],
        texts_b: str | Sequence[str],
        role_a: str | None = None,
        role_b: str | None = None,
        *,
        batch_size: int = 32,
    ) -> Tensor:
        """Score pairs of texts: [n] similarities of the i-th texts of both sides."""
        texts_a = [texts_a] if isinstance(texts_a, str) else list(texts_a)
        texts_b = [texts_b] if isinstance(texts_b, str) else list(texts_b)
        check_pairs(texts_a, texts_b)
        return self.similarity_of(
            self.encode(texts_a, role_a, batch_size=batch_size),
            self.encode(texts_b, role_b, batch_size=batch_size),
        )

    def similarity_of(self, embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
        """Return the pairwise similarity [n] of two [n, K] batches of embeddings."""
        if self.similarity == "cos":
            return torch.nn.functional.cosine_similarity(embeddings_a, embeddings_b, dim=-1)
        return (embeddings_a * embeddings_b).sum(dim=-1)

    def preprocess(
        self, texts: Sequence[str], role: str | None = None, *, offsets: bool = True
    ) -> Features:
        """Tokenise texts into one padded batch of features, tensors [n, S].

        Without ``offsets``, the places of tokens in their texts, that is faster; embeddings need
        none.

        Warns (TruncationWarning) where a text exceeds the model's window, once per new longest
        text.
        """
        with Truncations(self, only_longer=True) as truncations:
            return self.preprocess_with(truncations, texts, role, offsets=offsets)

    def forward(self, features: Features) -> Tensor:
        """Embed a batch of features: [n, K], differentiable, as the user sees embeddings."""
        return self._ended(self._shifted(features))

    def embed_columns(
        self,
        columns: Sequence[Features],
        chunk_size: int | None = None,
        *,
        recompute: bool = False,
    ) -> list[Tensor]:
        """Embed several batches, each as :meth:`forward` does, with less padding and in few passes.

        There are as many passes as columns, but each takes texts of similar length, whichever
        column they are from. Where references have to be embedded anew, those of all columns are
        embedded at once, each length one time: lengths recur in a batch of pairs.

        Args:
            columns: Batches of features.
            chunk_size: Most texts to embed at once, see `xsiam.chunks`; None embeds whole columns.
            recompute: Whether blocks keep only their inputs for the backward pass, see
                `xsiam.split.SplitModel.recomputing`.

        Returns:
            The embeddings of each column, [n, K].
        """

        def passing(embed: Callable[[Any], Tensor], given: Any) -> Tensor:
            with self.split.recomputing() if recompute else nullcontext():
                return embed(given)

        texts = partial(passing, self.split.embed)
        references = partial(passing, partial(self.reference.embed_rows, self.split))
        if chunk_size is not None:
            texts = partial(embed_in_chunks, texts, chunk_size=chunk_size)
            references = partial(checkpoint, references, use_reentrant=False)  # one chunk
        sizes = [len(features["input_ids"]) for features in columns]
        joined = join_features(columns)
        if joined is None:
            embedded = [texts(features) for features in columns]
        else:
            embedded = list(torch.split(_by_length(texts, joined, len(columns)), sizes))
        if not self._shifts_live:
            shifts = [self.shift_of(features) for features in columns]
        elif joined is not None:
            rows = self.reference.rows(self.split, joined)
            shifts = list(torch.split(references(rows)[rows.inverse], sizes))
        else:
            each = [self.reference.rows(self.split, features) for features in columns]
            shifts = [references(rows)[rows.inverse] for rows in each]
        return [
            self._ended(own if shift is None else own - shift)
            for own, shift in zip(embedded, shifts, strict=True)
        ]

    def parts(self, features: Features) -> Parts:
        """Return ẽ and the norms the model divides by, for a batch of features."""
        return self.parts_of(self._shifted(features))

    def parts_of(self, embedding: Tensor) -> Parts:
        """Return ẽ and the norms the model divides by, from shifted embeddings [n, K]."""
        truncated = embedding[:, : self.model.truncate_dim]
        if self.similarity == "cos":
            norm = truncated.norm(dim=-1)
        elif self.normalize:
            norm = embedding.norm(dim=-1)
        else:
            norm = torch.ones_like(embedding[:, 0])
        return Parts(truncated, norm)

    def shift_of(self, features: Features) -> Tensor | None:
        """Return e(r) for each text of a batch, [n, K] or [n or 1, K], or None without a shift."""
        if not self.shift:
            return None
        if self._shifts_live:
            return self.reference.embedding(self.split, features)
        return self._cached_shift(features)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a sentence-transformers folder: see :func:`xsiam.checkpoint.export_encoder`."""
        from xsiam.checkpoint import export_encoder

        export_encoder(self, Path(path))

    def checkpoint_payload(self) -> dict[str, Any]:
        """Return all but the weights, as plain values: see :func:`xsiam.checkpoint.payload_of`."""
        from xsiam.checkpoint import payload_of

        return payload_of(self)

    # -- facts ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def n_layers(self) -> int:
        """L: layers are 0 … L, where L is the last hidden state."""
        return self.split.n_layers

    @property
    def max_length(self) -> int | None:
        """The model's window in tokens, special tokens included."""
        return self.model.max_seq_length

    @property
    def roles(self) -> tuple[str, ...]:
        """The role names that texts can have, besides None."""
        return tuple(dict.fromkeys(["query", "document", *self.model.prompts]))

    @property
    def reference_label(self) -> str:
        """The reference's name, with digits that tell it from others of its name where needed."""
        self.reference.complete(self.split)
        return self.reference.label

    @property
    def model_fingerprint(self) -> str:
        """16 hex digits that name this set of weights."""
        return self.split.weights.fingerprint()

    def weights_held(self) -> AbstractContextManager[None]:
        """Return a context in which no weight changes, so that they are looked at only once."""
        return self.split.weights.held()

    def check_role(self, role: str | None) -> None:
        """Raise InputError where ``role`` is neither None nor a known role."""
        if role is not None and role not in self.roles:
            raise InputError(
                f"Expected a role among {list(self.roles)} or None, but got {role!r}. "
                "Set `model.role_a` and `model.role_b`, or give the model a prompt of that name."
            )

    def check_layer(self, layer: int, key: str = "layer") -> None:
        """Raise InputError where ``layer`` is not one of 0 … L."""
        self.split.check_layer(layer, key)

    def train_reference(self) -> None:
        """Make the vector of the reference a weight, ``reference_vector``, trained with the others.

        Raises:
            InputError: If the reference has no vector of its own, or its embedding is not
                subtracted, so that nothing depends on it.
        """
        reference = self.reference
        if not self.shift or not isinstance(reference, VectorReference):
            subtracted = "subtracted" if self.shift else "not subtracted"
            raise InputError(
                f"Expected a reference with a vector of its own, such as 'fitted', and a shift, "
                f"but {reference.name!r} is {subtracted} here. Set `model.train_reference=false`."
            )
        self.reference_vector = reference.as_parameter(self.split)
        self.split.weights.include(self.reference_vector)

    def freeze_unused_parameters(self) -> list[str]:
        """Freeze parameters that embeddings do not depend on (a pooler) and return their names.

        Distributed training would wait for their gradients.
        """
        gradients = {name: p.grad for name, p in self.named_parameters()}
        with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(self):
            for parameter in self.parameters():
                parameter.grad = None
            torch.autograd.backward(self.forward(self._probe_features()).sum())
        unused = [n for n, p in self.named_parameters() if p.requires_grad and p.grad is None]
        for name, parameter in self.named_parameters():
            parameter.grad = gradients[name]
            if name in unused:
                parameter.requires_grad = False
        return unused

    def check_parity(self) -> None:
        """Check that unshifted embeddings are the model's own, for every role.

        Raises:
            ModelError: With the largest difference, where ours differ from ``encode``,
                ``encode_query`` or ``encode_document`` of the SentenceTransformer.
        """
        tolerance = 1e-5 if self.dtype in (torch.float32, torch.float64) else 2e-2
        own: dict[str | None, Any] = {None: self.model.encode}
        own |= {"query": self.model.encode_query, "document": self.model.encode_document}
        ends_normalized = isinstance(list(self.model.children())[-1], Normalize)
        for role, encode in own.items():
            with torch.no_grad(), evaluation_mode(self):
                features = self._probe_features(_PROBE_TEXTS, role)
                ours = self.split.embed(features)
                if not ours.isfinite().all():
                    self.split.check_finite(features, _PROBE_TEXTS)
            if ends_normalized:
                ours = torch.nn.functional.normalize(ours, dim=-1)
            ours = ours[:, : self.model.truncate_dim]
            with evaluation_mode(self):  # `encode` would leave the model in eval mode
                theirs = encode(list(_PROBE_TEXTS), convert_to_tensor=True, show_progress_bar=False)
            scale = theirs.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            difference = ((ours - theirs).norm(dim=-1, keepdim=True) / scale).max().item()
            if not difference <= tolerance:
                raise ModelError(
                    f"Expected the embeddings of role {role!r} to equal the SentenceTransformer's "
                    f"own, but they differ by {difference:.1e} (relative). This model does more in "
                    "`encode` than its modules say; its scores cannot be explained."
                )

    # -- inside ---------------------------------------------------------------------------------

    def _shifted(self, features: Features) -> Tensor:
        embedding = self.split.embed(features)
        shift = self.shift_of(features)
        return embedding if shift is None else embedding - shift

    def _ended(self, embedding: Tensor) -> Tensor:
        """Return what the user sees of a shifted embedding."""
        if self.normalize:
            embedding = torch.nn.functional.normalize(embedding, dim=-1)
        size = self.model.truncate_dim
        return embedding if size is None else embedding[:, :size]

    @property
    def _shifts_live(self) -> bool:
        """Whether there is a shift that must not come from the cache."""
        return self.shift and (self.training or torch.is_grad_enabled() or self.sharded)

    def _cached_shift(self, features: Features) -> Tensor:
        """Return e(r) per text from the cache; what is missing is embedded in one forward."""
        weights = self.split.weights.key()
        if weights != self._cache_weights or len(self._shift_cache) > _CACHE_LIMIT:
            self._shift_cache.clear()
            self._cache_weights = weights
        rows = self.reference.rows(self.split, features)
        keys = row_keys(rows)
        missing = [i for i, key in enumerate(keys) if key not in self._shift_cache]
        if missing:
            index = torch.tensor(missing, device=rows.inverse.device)
            part = ReferenceRows(
                select_rows(rows.features, index),
                rows.inverse,
                None if rows.start is None else rows.start[index],
            )
            embedded = self.reference.embed_rows(self.split, part)
            with torch.inference_mode(False):  # usable outside inference mode later
                self._shift_cache |= {
                    keys[i]: row.clone() for i, row in zip(missing, embedded, strict=True)
                }
        return torch.stack([self._shift_cache[key] for key in keys])[rows.inverse]

    def preprocess_with(
        self,
        truncations: Truncations,
        texts: Sequence[str],
        role: str | None,
        *,
        offsets: bool = True,
    ) -> Features:
        """Tokenise as the SentenceTransformer does for that role; add the special-tokens mask."""
        self.check_role(role)
        prompt, task = self.prompt_of(role)
        flags = {"return_special_tokens_mask": True}
        if offsets and getattr(self.tokenizer, "is_fast", False):
            flags["return_offsets_mapping"] = True
        features: Features = self.model.preprocess(
            list(texts), prompt=prompt, processing_kwargs={"text": flags}, **task
        )
        truncations.look_at(texts, features, prompt)
        return features

    def prompt_of(self, role: str | None) -> tuple[str | None, dict[str, str]]:
        """Return the prompt and the task argument that sentence-transformers uses for ``role``."""
        prompts = self.model.prompts
        if role == "query":
            return prompts.get("query", self._default_prompt()), {"task": "query"}
        if role == "document":
            named = next((n for n in _DOCUMENT_PROMPTS if n in prompts), None)
            prompt = self._default_prompt() if named is None else prompts[named]
            return prompt, {"task": "document"}
        return (self._default_prompt() if role is None else prompts[role]), {}

    def _default_prompt(self) -> str | None:
        name = self.model.default_prompt_name
        return None if name is None else self.model.prompts[name]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the underlying transformer."""
        return self.model[0].tokenizer

    def _probe_features(
        self, texts: Sequence[str] = _PROBE_TEXTS[:1], role: str | None = None
    ) -> Features:
        """Return features of texts of ours; what a small window cuts off them is no news."""
        return features_to(self.preprocess_with(Truncations(self), texts, role), self.device)


def _by_length(embed: Callable[[Features], Tensor], features: Features, passes: int) -> Tensor:
    """Embed texts in some passes over texts of similar length, and return them in their order."""
    order = features["attention_mask"].sum(dim=1).argsort(stable=True)
    groups = [trim(select_rows(features, rows)) for rows in torch.tensor_split(order, passes)]
    return torch.cat([embed(group) for group in groups])[order.argsort()]


def _head(model: SentenceTransformer, similarity: str | None) -> str:
    """Return "cos" or "dot", from the argument or the model's own similarity function."""
    if similarity is not None:
        if similarity not in SIMILARITIES.values():
            raise InputError(
                f"Expected `similarity` to be 'cos' or 'dot', but got {similarity!r}. "
                "Set `model.similarity`."
            )
        return similarity
    own = model.similarity_fn_name
    if own not in SIMILARITIES:
        raise ModelError(
            f"Expected a model that scores by cosine or dot product, but its similarity function "
            f"is {own!r}, which has no exact split over token pairs. Set `model.similarity=cos` or "
            "`dot` to explain that score instead."
        )
    return SIMILARITIES[own]


def _check_modules(modules: Sequence[nn.Module]) -> None:
    """Raise ModelError for a module stack that has no layers to attribute to."""
    if not modules or not isinstance(modules[0], Transformer):
        first = type(modules[0]).__name__ if modules else "nothing"
        raise ModelError(
            f"Expected a model whose first module is a Transformer, but it is {first}: "
            "there are no hidden states to attribute a score to."
        )
    for module in modules[1:]:
        if not isinstance(module, _SUPPORTED_MODULES):
            raise ModelError(
                f"Expected modules among {[m.__name__ for m in _SUPPORTED_MODULES]} after the "
                f"Transformer, but got {type(module).__name__}, which is not supported."
            )
