"""The neutral reference: hidden states that the unmodified model maps to nothing at all.

With e(r) = 0 main effects and intercept vanish, so that the pair matrix alone is the score of a
model that nobody changed. There are many such states, for there are more numbers in them than in an
embedding. Looked for are nine vectors: one for the first position and one for the last, where most
models have tokens of their own, and seven that take turns in between. At nine tokens every position
is free, so that a root lies near a text's own states; it serves all greater lengths, for the root
of one lies near that of another.

What it does not mean: r is no text. It depends on the layer, and others with e(r) = 0 give other
matrices; how far it lies from the ``pad`` reference is reported.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from xsiam.errors import ConvergenceWarning, InputError, ModelError
from xsiam.families import AutodiffLineariser, post_norm_lineariser
from xsiam.jacobian import exact_numerics
from xsiam.references.base import AbstractReference, ReferenceRows, pad_id, register_reference
from xsiam.references.least_squares import Root, damped_steps, secant_steps
from xsiam.references.solutions import (
    Solution,
    SolutionReport,
    on_cpu,
    read_solutions,
    vectors_file,
    write_solutions,
)
from xsiam.references.tokens import PadReference
from xsiam.split import Features, SplitModel, evaluation_mode, features_to, select_rows

TURNS = 7
N_VECTORS = TURNS + 2
MAX_JACOBIANS = 40
MAX_SECANT_STEPS = 40
ROOT_LENGTH = N_VECTORS
"""Up to here roots are searched for; those of greater lengths start from a known one."""

LIMIT = 1e-5
"""|e(r)| over |e(text)| up to which a reference is neutral."""

_AIM = 0.4  # share of the limit that is aimed at: other batch shapes round otherwise
_COTANGENTS_AT_ONCE = 64


@register_reference
class NeutralReference(AbstractReference):
    """States with e(r) = 0, of a model that stays as it is: vectors in turns (ours).

    They are solved for when they are first needed, for all lengths of a call together, and kept on
    disk for each set of weights, layer and floating point type. It needs no shift, and has none.

    Args:
        cache: Folder of the solutions; None is `$XSIAM_CACHE`, else `~/.cache/xsiam`.
    """

    name = "neutral"
    can_shift = False
    is_layered = True

    def __init__(self, cache: str | Path | None = None) -> None:
        self.cache = None if cache is None else Path(cache)
        self._known: dict[Hashable, dict[str, Solution]] = {}
        self._probe: Features | None = None
        self._told: set[tuple[Path, str]] = set()

    def prepare(self, split: SplitModel, features: Sequence[Features]) -> None:
        """Remember the longest text of ours, where every search begins."""
        self._probe = features[-1]

    def check(self, split: SplitModel, features: Features) -> None:
        """Raise ModelError where an embedding has more dimensions than the vectors."""
        with torch.no_grad(), evaluation_mode(split.model):
            n_equations = split.embed(features).shape[1]
        width = split.model.config.hidden_size
        if n_equations > N_VECTORS * width:
            raise ModelError(
                f"Expected embeddings of at most {N_VECTORS * width} dimensions for reference "
                f"'neutral', but {split.name} has {n_equations}: there are more equations than "
                "numbers. Set `model.reference=fitted`."
            )

    def rows(self, split: SplitModel, features: Features) -> ReferenceRows:
        """Return one row per distinct length."""
        attention = features["attention_mask"]
        distinct, inverse = torch.unique(attention.sum(1), return_inverse=True)
        first = torch.stack(
            [(inverse == number).nonzero()[0, 0] for number in range(len(distinct))]
        )
        rows = select_rows(features, first)
        ids = torch.full_like(rows["input_ids"], pad_id(split.tokenizer))
        return ReferenceRows(features={**rows, "input_ids": ids}, inverse=inverse)

    def embedding(self, split: SplitModel, features: Features) -> Tensor:
        """Raise InputError: there is a reference at one layer only, not at all of them."""
        raise InputError(
            "Expected a layer for reference 'neutral', whose states are its own at every layer. "
            "Ask for `states` at one, or set `model.reference=fitted`."
        )

    def hidden(self, split: SplitModel, features: Features, layer: int) -> Tensor:
        """Return the references' hidden states at ``layer`` for texts of one length, [n, S, D]."""
        return self.states(split, features, layer)[0]

    def states(self, split: SplitModel, features: Features, layer: int) -> tuple[Tensor, Tensor]:
        """Return the references' hidden states as :meth:`hidden` does, and e(r), [n, K]."""
        self.make_ready(split, layer, [features])
        n, length = features["input_ids"].shape
        vectors = self._solutions(split, layer)[_key(features)].vectors
        pattern = _Pattern(split, layer, features)
        hidden = pattern.hidden(vectors.flatten())
        with evaluation_mode(split.model):
            embedding = split.tail(pattern.features, layer, hidden)
        return hidden.expand(n, length, -1), embedding.expand(n, -1)

    def report(self, split: SplitModel, layer: int) -> list[SolutionReport]:
        """Return how what is known at a layer was found, by length: also where others start."""
        solutions = self._solutions(split, layer)
        return sorted((s.report for s in solutions.values()), key=lambda report: report.length)

    def make_ready(
        self,
        split: SplitModel,
        layer: int,
        batch: Sequence[Features],
        *,
        progress: bool = False,
    ) -> None:
        """Solve for the lengths of texts that are not known yet, and keep them on disk.

        Warns:
            ConvergenceWarning: If e(r) of a length stays above the limit: main effects remain.
            UserWarning: If solutions cannot be kept on disk; they are kept in memory.
        """
        known = self._solutions(split, layer)
        asked = {_key(features): features for features in batch}
        missing = {key: features for key, features in asked.items() if key not in known}
        file = self._file(split, layer)
        if missing:
            assert self._probe is not None
            device = batch[0]["input_ids"].device
            probe = features_to(self._probe, device)
            found: dict[str, Solution] = {}
            try:
                with exact_numerics(device), evaluation_mode(split.model):
                    for key, solution in _solve(split, layer, missing, known, probe, progress):
                        found[key] = solution
            finally:  # what was found before an interruption is kept
                known |= found
                write_solutions(file, split.weights.fingerprint(), found)
        news = [key for key in asked if (file, key) not in self._told]
        self._told.update((file, key) for key in news)
        _warn_unconverged([known[key].report for key in news], layer)

    def _solutions(self, split: SplitModel, layer: int) -> dict[str, Solution]:
        file = self._file(split, layer)
        if file not in self._known:
            self._known[file] = read_solutions(file, split.weights.fingerprint())
        return self._known[file]

    def _file(self, split: SplitModel, layer: int) -> Path:
        dtype = str(next(split.model.parameters()).dtype).removeprefix("torch.")
        fingerprint = split.weights.fingerprint()
        name = f"{self.name}-{N_VECTORS}-layer-{layer}"
        return vectors_file(self.cache, name, fingerprint, dtype)


class _Pattern:
    """The embedding of vectors over a text's positions, and its derivative.

    Their order is: those that take turns, that of the first position, that of the last.

    Args:
        split: The model.
        layer: Where the vectors stand.
        features: Features of a text of that length, tensors [n, S].
    """

    def __init__(self, split: SplitModel, layer: int, features: Features) -> None:
        self.split, self.layer = split, layer
        ids = features["input_ids"][:1]
        self.length = ids.shape[1]
        self.features = {k: v for k, v in features.items() if not isinstance(v, Tensor)}
        self.features |= {
            "input_ids": torch.full_like(ids, pad_id(split.tokenizer)),
            "attention_mask": torch.ones_like(ids),
        }
        if "token_type_ids" in features:
            self.features["token_type_ids"] = torch.zeros_like(ids)
        self.places = (torch.arange(self.length, device=ids.device) - 1) % TURNS
        self.places[0], self.places[-1] = TURNS, TURNS + 1
        self._width = int(split.model.config.hidden_size)
        weight = next(p for p in split.model.parameters() if p.is_floating_point())
        self._like = weight.detach()
        found = post_norm_lineariser(split, layer)
        self._linearise = (
            AutodiffLineariser(split, layer, None) if isinstance(found, str) else found
        )

    def hidden(self, x: Tensor) -> Tensor:
        """Lay vectors x [m·D] out over the positions, [1, S, D]."""
        return x.view(N_VECTORS, -1).to(self._like)[self.places][None]

    def embedding(self, x: Tensor) -> Tensor:
        """Return e(r), [K] float64."""
        embedded: Tensor = self.split.tail(self.features, self.layer, self.hidden(x))
        return embedded[0].double().cpu()

    def shares(self) -> Tensor:
        """Return the share of the positions that each number of x stands at, [m·D] float64."""
        counts = torch.bincount(self.places, minlength=N_VECTORS).double().cpu()
        shares: Tensor = (counts / self.length).repeat_interleave(self._width)
        return shares

    def derivative(self, x: Tensor) -> Tensor:
        """Return de/dx, [K, m·D] float64."""
        linearised = self._linearise(self.features, self.hidden(x))
        n_dimensions = linearised.embedding.shape[1]
        unit = torch.eye(n_dimensions, dtype=self._like.dtype, device=self._like.device)
        turns = torch.nn.functional.one_hot(self.places, N_VECTORS).to(self._like)
        parts = []
        for some in torch.split(unit, _COTANGENTS_AT_ONCE):
            pulled = linearised.pull(some[None])[0].detach()  # [C, S, D]
            parts.append((turns.mT @ pulled).flatten(1))
        return torch.cat(parts).double().cpu()


def _key(features: Features) -> str:
    """Name what e(r) depends on beside the model and the layer: the length, and pooled prompts."""
    length = features["input_ids"].shape[1]
    prompt = features.get("prompt_length")
    return str(length) if prompt is None else f"{length}, prompt {int(prompt)}"


def _solve(
    split: SplitModel,
    layer: int,
    missing: Mapping[str, Features],
    known: Mapping[str, Solution],
    probe: Features,
    progress: bool,
) -> Iterator[tuple[str, Solution]]:
    """Solve for some lengths and those that they start from, whatever else is asked for."""
    scale = float(split.embed(probe)[0].norm())
    target = _AIM * LIMIT * scale
    found = dict(known)
    patterns = {key: _Pattern(split, layer, features) for key, features in missing.items()}
    for length in _starts({pattern.length for pattern in patterns.values()}):
        patterns.setdefault(str(length), _Pattern(split, layer, _lengthened(probe, length)))
    unknown = sorted((key for key in patterns if key not in found), key=_length)
    slopes: Tensor | None = None
    for key in _tracked(unknown, progress):
        pattern = patterns[key]
        if pattern.length <= ROOT_LENGTH:
            found[key] = _timed(pattern, partial(_root, pattern, probe, target), scale)
            yield key, found[key]
            continue
        root = patterns[str(ROOT_LENGTH)]
        if slopes is None:
            slopes = root.derivative(found[str(ROOT_LENGTH)].vectors.flatten())
        start = found[str(_start(pattern.length))].vectors.flatten()
        # a vector moves the embedding by about as much as its share of the positions is (ours)
        own_slopes = slopes * (pattern.shares() / root.shares())
        search = partial(_continued, pattern, start, own_slopes, target)
        found[key] = _timed(pattern, search, scale)
        yield key, found[key]


def _start(length: int) -> int:
    """Return the length whose root a greater one starts from: of 9, 11, 13, 16, 20, ….

    Each is a quarter more than the one before.
    """
    best = ROOT_LENGTH
    while best * 5 // 4 < length:
        best = best * 5 // 4
    return best


def _starts(lengths: Iterable[int]) -> set[int]:
    """Return the lengths that some start from, those which these start from, and so on."""
    found: set[int] = set()
    left = set(lengths)
    while left:
        left = {_start(length) for length in left if length > ROOT_LENGTH} - found
        found |= left
    return found


def _timed(pattern: _Pattern, search: Callable[[], Root], scale: float) -> Solution:
    """Search, and report how it went."""
    begin = time.perf_counter()
    root = search()
    residual = root.residual / scale
    report = SolutionReport(
        length=pattern.length,
        residual=residual,
        converged=residual <= LIMIT,
        distance=_distance(pattern, root.x),
        iterations=root.iterations,
        seconds=time.perf_counter() - begin,
    )
    return Solution(on_cpu(root.x.view(N_VECTORS, -1)), report)


def _root(pattern: _Pattern, probe: Features, target: float) -> Root:
    """Return the root that a start leads to: midway from a text to its ``pad``, else those two.

    From midway it takes the fewest steps, and paths to texts bend least.
    """
    texts = pattern.split.capture(probe, pattern.layer)[0]
    pads = PadReference().hidden(pattern.split, probe, pattern.layer)[0]
    roots = []
    for hidden in ((texts + pads) / 2, texts, pads):
        inner = hidden[1:-1] if len(hidden) > 2 else hidden
        turns = inner[torch.arange(TURNS, device=inner.device) % len(inner)]
        start = on_cpu(torch.cat([turns, hidden[:1], hidden[-1:]]).flatten())
        root = damped_steps(pattern.embedding, pattern.derivative, start, target, MAX_JACOBIANS)
        roots.append(root)
        if root.is_found:
            break
    return min(roots, key=lambda root: root.residual)


def _continued(pattern: _Pattern, start: Tensor, slopes: Tensor, target: float) -> Root:
    """Return the root near that of another length: by secants, and by derivatives if they fail."""
    near = secant_steps(pattern.embedding, start, slopes, target, MAX_SECANT_STEPS)
    if near.is_found:
        return near
    root = damped_steps(pattern.embedding, pattern.derivative, near.x, target, MAX_JACOBIANS)
    return replace(root, iterations=near.iterations + root.iterations)


def _lengthened(features: Features, length: int) -> Features:
    """Return features of one text of another length: what is in them is replaced anyway."""
    return {
        key: value[:1, :1].expand(1, length) if isinstance(value, Tensor) else value
        for key, value in features.items()
        if not isinstance(value, Tensor) or value.ndim == 2
    }


def _length(key: str) -> int:
    return int(key.partition(",")[0])


def _distance(pattern: _Pattern, x: Tensor) -> float:
    """Return |r − r_pad| / |r_pad|, r_pad with PAD at every position."""
    nothing = torch.zeros_like(pattern.features["input_ids"])
    features = {**pattern.features, "special_tokens_mask": nothing}
    pad = PadReference().hidden(pattern.split, features, pattern.layer)
    return float((pattern.hidden(x) - pad).norm() / pad.norm())


def _tracked(keys: Sequence[str], progress: bool) -> Iterator[str]:
    """Yield keys, with a progress bar."""
    if not progress:
        yield from keys
        return
    from rich.progress import track

    yield from track(keys, description="solving for neutral references", transient=True)


def _warn_unconverged(reports: Sequence[SolutionReport], layer: int) -> None:
    failed = [report for report in reports if not report.converged]
    if failed:
        worst = max(failed, key=lambda report: report.residual)
        warnings.warn(
            f"No neutral reference was found at layer {layer} for {len(failed)} of {len(reports)} "
            f"lengths: |e(r)| is up to {worst.residual:.1e} of a text's embedding ({worst.length} "
            f"tokens), limit {LIMIT:.0e}. The best is kept, and main effects show what is left. "
            "Take a higher layer, or reference 'fitted'.",
            ConvergenceWarning,
            stacklevel=4,
        )
