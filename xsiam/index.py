"""Token vectors of a corpus, computed once and kept on disk: any pair is then one small product."""

from __future__ import annotations

import dataclasses
import operator
import os
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from xsiam.attribution import PairAttributor
from xsiam.combination import Settings, combine
from xsiam.errors import ConvergenceWarning, InputError
from xsiam.index_building import (
    check_complete,
    describe,
    fill_shards,
    missing_shards,
    prepare_folder,
    process_of,
)
from xsiam.index_files import Shard, ShardCache
from xsiam.index_manifest import Manifest
from xsiam.margins import (
    DirectionContributions,
    Margin,
    check_directions,
    directions_of,
    margin_of,
)
from xsiam.reading import TokenVectors
from xsiam.result import PairAttribution

__all__ = ["DirectionContributions", "Margin", "TokenVectorIndex"]

DEFAULT_CACHE = 2**30
_QUERIES = 16
_TEXTS_PER_PRODUCT = 64
# What the numbers of a query must share with those of the documents. Tolerances may differ.
_SHARED = (
    *("model_fingerprint", "layer", "reference", "shift", "similarity", "normalize"),
    *("truncate_dim", "quadrature"),
)


class TokenVectorIndex:
    """The token vectors of a list of texts, on disk, and what follows from them.

    Make one with :meth:`build`, open it with :meth:`load`. Texts have ids 0 … n − 1 in the order
    they were given. Without an attributor everything among the indexed texts works; queries need
    one of the same model, layer and reference. The folder holds the texts themselves.

    Example:
        >>> index = TokenVectorIndex.build(attributor, texts, "corpus")  # doctest: +SKIP
        >>> index.matrix(0, 1).sum()  # doctest: +SKIP
        >>> index.explain("a query", [0, 5])[0].top_pairs(3)  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Manifest,
        attributor: PairAttributor | None = None,
        cache_bytes: int = DEFAULT_CACHE,
    ) -> None:
        if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int) or cache_bytes < 1:
            raise InputError(
                f"Expected `cache_bytes` to be a positive number of bytes, but got {cache_bytes!r}."
            )
        self.path = Path(path)
        self.manifest = manifest
        self._attributor = attributor
        self._shards = ShardCache(self.path, manifest, cache_bytes)
        self._queries: OrderedDict[tuple[str, str | None], TokenVectors] = OrderedDict()
        if attributor is not None:
            self._check_attributor(attributor)

    @classmethod
    def build(
        cls,
        attributor: PairAttributor,
        texts: Sequence[str],
        path: str | Path,
        *,
        role: str | None = None,
        dtype: str = "float16",
        shard_size: int = 256,
        rank: int | None = None,
        world_size: int | None = None,
        progress: bool = False,
    ) -> TokenVectorIndex:
        """Integrate the token vectors of all texts and write them, shard by shard.

        Called again with the same arguments after an interruption it goes on: finished shards are
        kept, at most the one in progress is lost. Of several processes each computes every
        ``world_size``-th shard; the index that is returned is complete when all have finished (see
        :attr:`missing`). Texts that did not converge are kept and flagged (:attr:`converged`).

        Args:
            attributor: Integrates them.
            texts: The texts; a repeated one gets an id each time.
            path: A new folder, or one that an earlier call began to fill.
            role: Role of the texts (None, "query", "document" or a prompt name).
            dtype: How token vectors are stored: "float16" or "float32". Float16 rounds by at most
                5e-4 of each entry; the errors of the index count that in. Embeddings are always
                float32.
            shard_size: Texts of one file.
            rank: Number of this process; None takes the environment variable RANK, else 0.
            world_size: How many processes there are; None takes WORLD_SIZE, else 1.
            progress: Whether to show a progress bar.

        Raises:
            InputError: If an argument does not meet its constraint, the folder holds something
                else or another index, an entry exceeds float16, or the disk is full.
            CheckpointError: If a finished shard is damaged.

        Warns:
            ConvergenceWarning: If texts did not meet the tolerance.
            TruncationWarning: If texts are longer than the model's window.
        """
        number, total = process_of(rank, world_size)
        texts = texts if isinstance(texts, str) else list(texts)
        manifest = describe(attributor, texts, role, dtype, shard_size)
        prepare_folder(Path(path), manifest)
        shards = range(number, manifest.n_shards, total)
        fill_shards(attributor, texts, Path(path), manifest, shards, progress)
        index = cls(path, manifest, attributor)
        index._warn_unconverged(shards)
        return index

    @classmethod
    def load(
        cls,
        path: str | Path,
        attributor: PairAttributor | None = None,
        *,
        cache_bytes: int = DEFAULT_CACHE,
    ) -> TokenVectorIndex:
        """Open an index.

        Args:
            path: The folder.
            attributor: Integrates queries; it must be of the same model, layer and reference.
            cache_bytes: How many bytes of shards to keep mapped; the rest is read again when used.

        Raises:
            CheckpointError: If there is no index, it is incomplete, damaged, or of another format.
            InputError: If the attributor does not fit.

        Warns:
            ConvergenceWarning: If texts of the index did not meet the tolerance.
        """
        manifest = Manifest.read(Path(path))
        check_complete(Path(path), manifest)
        index = cls(path, manifest, attributor, cache_bytes)
        index._warn_unconverged(range(manifest.n_shards))
        return index

    # -- the texts ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.manifest.n_texts

    @property
    def settings(self) -> Settings:
        """What all results have in common."""
        return self.manifest.settings

    @property
    def missing(self) -> list[str]:
        """Names of the shards that other processes have not written yet."""
        return missing_shards(self.path, self.manifest)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The indexed texts."""
        shards = map(self._shards.get, range(self.manifest.n_shards))
        return tuple(text for shard in shards for text in shard.strings["texts"])

    @property
    def converged(self) -> Tensor:
        """Which texts met the tolerance, [n] bool."""
        shards = map(self._shards.get, range(self.manifest.n_shards))
        return torch.cat([shard.rest["converged"] for shard in shards])

    def token_vectors(self, i: int) -> TokenVectors:
        """Return all that is known of one text, its errors included."""
        shard, k = self._find(i)
        return shard.token_vectors(k, self.manifest.role)

    # -- pairs ----------------------------------------------------------------------------------

    def matrix(self, i: int, j: int) -> Tensor:
        """Return the attribution matrix of two indexed texts, [S_i, S_j], in units of the score.

        Only the pairs of tokens: main effects and errors are in :meth:`attribute`.
        """
        (shard_i, k), (shard_j, m) = self._find(i), self._find(j)
        rows_i, rows_j = shard_i.rows(k).float(), shard_j.rows(m).float()
        return torch.mm(rows_i, rows_j.T).mul_(1 / (shard_i.norms[k] * shard_j.norms[m]))

    def matrices(self, pairs: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return the matrices of many pairs; those of one first text are one product."""
        groups: dict[int, list[int]] = defaultdict(list)
        for position, (i, _) in enumerate(pairs):
            groups[i].append(position)
        found: dict[int, Tensor] = {}
        for i, members in groups.items():
            for start in range(0, len(members), _TEXTS_PER_PRODUCT):
                some = members[start : start + _TEXTS_PER_PRODUCT]
                parts = self._matrices_of(i, [pairs[p][1] for p in some])
                found.update(zip(some, parts, strict=True))
        return [found[position] for position in range(len(pairs))]

    def attribute(self, i: int, j: int) -> PairAttribution:
        """Return the full attribution of two indexed texts, with main effects and errors."""
        return combine(self.token_vectors(i), self.token_vectors(j), self.settings)

    def explain(
        self, query_text: str, doc_ids: Sequence[int], role: str | None = None
    ) -> list[PairAttribution]:
        """Attribute the scores of a query (text a) with indexed texts (text b).

        The query is integrated once; the last queries are remembered. With a looser tolerance of
        the attributor ``converged`` speaks of that one.

        Args:
            query_text: Any text.
            doc_ids: Ids of indexed texts.
            role: Role of the query.

        Raises:
            InputError: If the index was opened without an attributor, its model has changed, the
                query is no text, or an id is out of range.
        """
        documents = [self.token_vectors(i) for i in doc_ids]
        query, settings = self.read_query(query_text, role), self.query_settings
        return [combine(query, document, settings) for document in documents]

    def margin(self, query: str | int, doc_a: int, doc_b: int, role: str | None = None) -> Margin:
        """Split score(query, a) − score(query, b) over tokens: see :class:`Margin`.

        Args:
            query: A text, which needs the attributor, or the id of an indexed one.
            doc_a: Id of document a.
            doc_b: Id of document b.
            role: Role of a query that is a text.
        """
        documents = self.token_vectors(doc_a), self.token_vectors(doc_b)
        if isinstance(query, str):
            return margin_of(self.read_query(query, role), *documents)
        return margin_of(self.token_vectors(query), *documents)

    def directions(
        self, w: Tensor, ids: Sequence[int] | None = None
    ) -> list[DirectionContributions]:
        """Split w·ẽ(x) over the tokens of texts: toward a centroid, or a linear probe's weight.

        Directions are those of ẽ, before a trailing Normalize: see
        :class:`DirectionContributions`.

        Args:
            w: One direction [K], or several [M, K].
            ids: The texts; None is all.

        Raises:
            InputError: If ``w`` has another shape or is not finite, or an id is out of range.
        """
        checked = check_directions(w, self.manifest.embedding_dim)
        chosen = range(len(self)) if ids is None else ids
        return [directions_of(self.token_vectors(i), checked) for i in chosen]

    def read_query(self, text: str, role: str | None = None) -> TokenVectors:
        """Integrate a query, or remember it.

        Raises:
            InputError: If the index was opened without an attributor, its model has changed, or
                the query is no text.
        """
        attributor = self.attributor
        self._check_attributor(attributor)  # the model may have been trained meanwhile
        key = (text, role)
        if key not in self._queries:
            self._queries[key] = attributor.token_vectors([text], role)[0]
            if len(self._queries) > _QUERIES:
                self._queries.popitem(last=False)
        self._queries.move_to_end(key)
        return self._queries[key]

    @property
    def attributor(self) -> PairAttributor:
        """What integrates queries.

        Raises:
            InputError: If the index was opened without.
        """
        if self._attributor is None:
            raise InputError(
                "Expected an attributor, which integrates queries, but this index was opened "
                "without. Open it with `TokenVectorIndex.load(path, attributor)`."
            )
        return self._attributor

    @property
    def query_settings(self) -> Settings:
        """What the results of queries have in common: the looser of both tolerances."""
        tolerance = max(self.settings.tolerance, self.attributor.settings.tolerance)
        return dataclasses.replace(self.settings, tolerance=tolerance)

    def unit_embeddings(self) -> Tensor:
        """Return ẽ / n of all texts, [n, K] float64, whose inner products with a query's score it.

        n is what the model divides by. Token vectors are not read.
        """
        shards = map(self._shards.get, range(self.manifest.n_shards))
        return torch.cat([s.rest["embedding"].double() / s.rest["norm"][:, None] for s in shards])

    # -- inside ---------------------------------------------------------------------------------

    def _find(self, i: int) -> tuple[Shard, int]:
        """Return the shard of a text, and its place in it."""
        number = -1 if isinstance(i, bool) else operator.index(i)
        if not 0 <= number < self.manifest.n_texts:
            raise InputError(
                f"Expected the id of a text to be between 0 and {len(self) - 1}, but got {i!r}."
            )
        shard, k = divmod(number, self.manifest.shard_size)
        return self._shards.get(shard), k

    def _matrices_of(self, i: int, others: Sequence[int]) -> list[Tensor]:
        """Return the matrices of one text with several, by one product of their joined rows."""
        shard, k = self._find(i)
        found = [self._find(j) for j in others]
        rows = [other.rows(m) for other, m in found]
        joined = torch.mm(shard.rows(k).float(), torch.cat(rows).float().T)
        parts = torch.split(joined, [len(r) for r in rows], dim=1)
        norm = shard.norms[k]
        return [
            part * (1 / (norm * other.norms[m]))
            for part, (other, m) in zip(parts, found, strict=True)
        ]

    def _check_attributor(self, attributor: PairAttributor) -> None:
        """Raise InputError where an attributor's numbers do not go with those of the index."""
        encoder = attributor.encoder
        own = dataclasses.asdict(attributor.settings)
        own |= {"normalize": encoder.normalize, "truncate_dim": encoder.model.truncate_dim}
        facts = self.manifest.facts()
        for name in _SHARED:
            if own[name] != facts[name]:
                raise InputError(
                    f"Expected an attributor with `{name}` {facts[name]!r}, as in the index in "
                    f"{os.fspath(self.path)!r}, but got {own[name]!r}. Give the attributor that "
                    "the index was built with, or build another index."
                )

    def _warn_unconverged(self, shards: Sequence[int]) -> None:
        """Warn where texts missed the tolerance; reading every shard also checks it."""
        flags = [self._shards.get(k).rest["converged"] for k in shards]
        missed = sum(int((~flag).sum()) for flag in flags)
        if missed:
            warnings.warn(
                f"{missed} of {sum(map(len, flags))} texts in {os.fspath(self.path)!r} did not "
                f"meet the tolerance {self.settings.tolerance:.1e} at layer {self.settings.layer}; "
                "`index.converged` says which. Give the attributor more `max_nodes` or a higher "
                "layer, or store float32, and build in another folder.",
                ConvergenceWarning,
                stacklevel=3,
            )
