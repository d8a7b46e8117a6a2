"""What analyses share: the pairs, the models by name, and their attributions, computed once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xsiam.accuracy import sample_pairs
from xsiam.analysis.base import CONTROL, MITIGATED, MODEL, NotApplicableError, VectorRequest
from xsiam.analysis.parsing import ParsedText, load_parser, parse_texts
from xsiam.analysis.probe_sets import ProbeSet, load_probes
from xsiam.analysis.statistics import Interval, Statistic, interval
from xsiam.attribution import PairAttributor
from xsiam.combination import combine
from xsiam.config import AnalysisConfig
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning, InputError, ModelError
from xsiam.index import TokenVectorIndex
from xsiam.index_building import describe, missing_shards
from xsiam.index_manifest import MANIFEST, Manifest
from xsiam.pairs import PairDataset
from xsiam.reading import TokenVectors
from xsiam.result import PairAttribution

__all__ = ["Context"]

_SHARD = 32  # texts; what an interruption costs at most
Key = tuple[str, int, str | None]


@dataclass
class Context:
    """Pairs, models and attributions of one evaluation, for all analyses.

    Attributes:
        settings: The configuration of the analyses.
        encoder: The model that is evaluated.
        pairs: The sample of the data that all analyses look at.
        layers: Layers, the highest first.
        folder: Where token vectors are kept.
        attributor_settings: Arguments of `PairAttributor`, the same for all models.
        roles: Roles of first and second texts.
        load: Loads another model: its name in the configuration, and a reference or None for its
            own.
        progress: Whether to show progress.
        notes: What a reader has to know is added here.
    """

    settings: AnalysisConfig
    encoder: SiameseEncoder
    pairs: PairDataset
    layers: tuple[int, ...]
    folder: Path
    attributor_settings: Mapping[str, Any]
    load: Callable[[str, str | None], SiameseEncoder]
    roles: tuple[str | None, str | None] = (None, None)
    progress: bool = False
    notes: list[str] = field(default_factory=list)
    _encoders: dict[str, SiameseEncoder] = field(default_factory=dict)
    _attributors: dict[tuple[str, int], PairAttributor] = field(default_factory=dict)
    _places: dict[Key, dict[str, tuple[TokenVectorIndex, int]]] = field(default_factory=dict)
    _parses: dict[str, ParsedText] = field(default_factory=dict)

    # -- models ---------------------------------------------------------------------------------

    def model(self, name: str = MODEL) -> SiameseEncoder:
        """Return a model by name, loaded when it is first asked for.

        Raises:
            NotApplicableError: If the configuration names none, or a reference that is tried on it
                does not do for it.
            InputError: If it has a reference shift and should have none, or the other way round.
        """
        if name == MODEL:
            return self.encoder
        if name not in self._encoders:
            kind, _, reference = name.partition("/")
            checkpoint = getattr(self.settings.models, kind)
            if checkpoint is None:
                raise NotApplicableError(
                    f"it needs the checkpoint `analysis.models.{kind}`, which was not given"
                )
            if not reference and kind.startswith("un"):
                reference = "pad"  # the published approximation
            try:
                found = self.load(checkpoint, reference or None)
            except ModelError as error:
                if name == kind:
                    raise
                raise NotApplicableError(f"`{reference}` does not do for it: {error}") from error
            wanted = self.encoder.shift if kind == CONTROL else False
            if kind != MITIGATED and found.shift != wanted:
                has = {True: "with a reference shift", False: "without a reference shift"}
                raise InputError(
                    f"Expected `analysis.models.{kind}` to be a model {has[wanted]}, but got "
                    f"{checkpoint!r}, which is one {has[found.shift]}. Set "
                    f"`analysis.models.{kind}`."
                )
            self._encoders[name] = found
        return self._encoders[name]

    def available(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return which of some models can be had, and lines that say why others cannot."""
        found, reasons = [], []
        for name in names:
            try:
                self.model(name)
                found.append(name)
            except NotApplicableError as error:
                reasons.append(f"`{name}` is left out: {error}.")
        return found, reasons

    def attributor(self, model: str, layer: int) -> PairAttributor:
        """Return the attributor of a model at a layer."""
        key = (model, layer)
        if key not in self._attributors:
            encoder = self.model(model)
            self._attributors[key] = PairAttributor(encoder, layer, **self.attributor_settings)
        return self._attributors[key]

    # -- attributions ---------------------------------------------------------------------------

    def prepare(self, requests: Iterable[VectorRequest], rank: int, world_size: int) -> None:
        """Integrate what is asked for; of several processes each does its share of the texts.

        Texts that are on disk already, for whatever analysis, are not integrated again; the call
        goes on where an earlier one was interrupted.
        """
        for key, texts in _joined(requests).items():
            known = self._known(key, texts)
            missing = [text for text in texts if text not in known]
            if missing:
                self._build(key, missing, rank, world_size)

    def open(self, requests: Iterable[VectorRequest]) -> None:
        """Open what all processes have prepared.

        Raises:
            RuntimeError: If something is missing.
        """
        for key, texts in _joined(requests).items():
            known = self._known(key, texts)
            absent = sum(text not in known for text in texts)
            if absent:
                raise RuntimeError(f"Expected {key} to be prepared, but {absent} texts are not.")
            self._places[key] = {text: known[text] for text in texts}
            flags = {id(index): index.converged for index, _ in known.values()}
            missed = sum(not flags[id(index)][i] for index, i in self._places[key].values())
            if missed:
                self.notes.append(
                    f"{missed} of {len(texts)} texts did not meet the tolerance "
                    f"{self.attributor(*key[:2]).tolerance:g} with `{key[0]}` at layer {key[1]}."
                )

    def attributions(
        self, model: str, layer: int, texts_a: Sequence[str], texts_b: Sequence[str]
    ) -> list[PairAttribution]:
        """Return the attributions of pairs whose texts were requested."""
        settings = self.attributor(model, layer).settings
        sides = zip((texts_a, texts_b), self.roles, strict=True)
        both = [self.token_vectors(model, layer, texts, role) for texts, role in sides]
        return [combine(a, b, settings) for a, b in zip(*both, strict=True)]

    def token_vectors(
        self, model: str, layer: int, texts: Iterable[str], role: str | None
    ) -> Iterator[TokenVectors]:
        """Yield the token vectors of texts that were requested in that role."""
        key = (model, layer, role)
        if key not in self._places:
            raise RuntimeError(
                f"Expected token vectors of {key} to be requested before they are read."
            )
        places = self._places[key]
        return (index.token_vectors(i) for index, i in (places[text] for text in texts))

    def requests(
        self,
        models: Sequence[str],
        texts_a: Sequence[str],
        texts_b: Sequence[str],
        layers: Sequence[int] | None = None,
    ) -> list[VectorRequest]:
        """Return the requests for pairs of texts, at all layers if none are named."""
        return [
            VectorRequest(model, layer, tuple(texts), role)
            for model in models
            for layer in (self.layers if layers is None else layers)
            for texts, role in zip((texts_a, texts_b), self.roles, strict=True)
        ]

    def pair_requests(
        self, models: Sequence[str] = (MODEL,), layers: Sequence[int] | None = None
    ) -> list[VectorRequest]:
        """Return the requests for the sampled pairs."""
        return self.requests(models, self.pairs.texts_a, self.pairs.texts_b, layers)

    def pair_attributions(self, model: str, layer: int) -> list[PairAttribution]:
        """Return the attributions of the sampled pairs, in their order."""
        return self.attributions(model, layer, self.pairs.texts_a, self.pairs.texts_b)

    def costly_pairs(self) -> PairDataset:
        """Return the pairs for what evaluates the model many times a pair, drawn from the sample.

        They are `analysis.n_costly_pairs`, the same for all analyses.
        """
        wanted = self.settings
        rows = sample_pairs(len(self.pairs), wanted.n_costly_pairs, wanted.seed)
        return self.pairs.select(rows)

    def pair_vectors(self, model: str, layer: int) -> Iterator[tuple[TokenVectors, TokenVectors]]:
        """Yield the token vectors of both texts of the sampled pairs, in their order."""
        sides = zip((self.pairs.texts_a, self.pairs.texts_b), self.roles, strict=True)
        both = [self.token_vectors(model, layer, texts, role) for texts, role in sides]
        return zip(*both, strict=True)

    def _known(self, key: Key, texts: Sequence[str]) -> dict[str, tuple[TokenVectorIndex, int]]:
        """Return where texts are whose token vectors are on disk, of this model and settings."""
        wanted = _but_texts(describe(self.attributor(*key[:2]), texts, key[2], "float32", _SHARD))
        found: dict[str, tuple[TokenVectorIndex, int]] = {}
        # A folder that has no manifest yet is one that another process begins at this moment.
        for file in sorted(self.folder.glob(f"{_prefix(key)}-*/{MANIFEST}")):
            path = file.parent
            manifest = Manifest.read(path)
            if _but_texts(manifest) == wanted and not missing_shards(path, manifest):
                index = TokenVectorIndex(path, manifest)
                found |= {text: (index, i) for i, text in enumerate(index.texts)}
        return found

    def _build(self, key: Key, texts: Sequence[str], rank: int, world_size: int) -> None:
        attributor = self.attributor(*key[:2])
        manifest = describe(attributor, texts, key[2], "float32", _SHARD)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # noted when it is opened
            TokenVectorIndex.build(
                attributor,
                texts,
                self.folder / f"{_prefix(key)}-{manifest.key()[:12]}",
                role=key[2],
                dtype="float32",
                shard_size=_SHARD,
                rank=rank,
                world_size=world_size,
                progress=self.progress,
            )

    # -- statistics -----------------------------------------------------------------------------

    def interval(
        self, values: Any, statistic: Statistic = np.mean, *, paired: bool = False
    ) -> Interval:
        """Return a statistic with its interval, by the configured resamples and confidence."""
        wanted = self.settings
        return interval(
            values,
            statistic,
            paired=paired,
            n_resamples=wanted.n_resamples,
            confidence=wanted.confidence,
            seed=wanted.seed,
        )

    def interval_or_note(
        self, values: Any, statistic: Statistic, what: str, notes: list[str]
    ) -> Interval | None:
        """Return the interval of paired values, or None and a note with the reason there is none.

        Args:
            values: Several sequences of values, one of each observation.
            statistic: Takes as many arrays and ``axis``.
            what: What is estimated, for the note.
            notes: Where the note goes.
        """
        try:
            return self.interval(values, statistic, paired=True)
        except NotApplicableError as error:
            notes.append(f"No interval of {what}: {error}.")
            return None

    # -- probes ---------------------------------------------------------------------------------

    @cached_property
    def probes(self) -> ProbeSet:
        """The probes that ``analysis.probes`` names.

        Raises:
            InputError: If they cannot be read, or a row is wrong.
        """
        return load_probes(self.settings.probes)

    # -- parses ---------------------------------------------------------------------------------

    @cached_property
    def parser(self) -> Any:
        """The spaCy pipeline.

        Raises:
            NotApplicableError: If it is not installed, with the command that installs it.
        """
        return load_parser(self.settings.spacy_model)

    def parses(self, texts: Sequence[str]) -> list[ParsedText]:
        """Return texts with words, tags and relations, each parsed once.

        Raises:
            NotApplicableError: If the pipeline is not installed.
        """
        new = sorted(set(texts) - self._parses.keys())
        self._parses.update(zip(new, parse_texts(self.parser, new), strict=True))
        return [self._parses[text] for text in texts]


def _joined(requests: Iterable[VectorRequest]) -> dict[Key, list[str]]:
    """Return the distinct texts by model, layer and role, by length: those of one go together."""
    found: dict[Key, set[str]] = {}
    for request in requests:
        found.setdefault((request.model, request.layer, request.role), set()).update(request.texts)
    return {key: sorted(texts, key=lambda text: (len(text), text)) for key, texts in found.items()}


def _prefix(key: Key) -> str:
    """Return how the folders of a model and layer begin."""
    return f"{key[0].replace('/', '-')}-layer_{key[1]}"


def _but_texts(manifest: Manifest) -> dict[str, Any]:
    """Return all facts of an index but which texts it holds."""
    facts = manifest.facts()
    return {name: facts[name] for name in facts if name not in ("n_texts", "texts_sha256")}
