"""The fitted reference: one vector that the model itself maps (almost) to nothing.

A reference of one repeated vector c has the embedding of a single token, so that c can be chosen to
make e(c) small: no data, no labels, and no weight is touched. Then the exact model, with the shift
e(c), scores almost as the unmodified one does, and an unshifted model has small main effects.

What it does not mean: c is no text and no average of texts. The path from it leaves the states that
texts have, as the path from every reference does, and attributions depend on the reference chosen.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from xsiam.errors import ConvergenceWarning, InputError
from xsiam.jacobian import exact_numerics
from xsiam.references.base import register_reference
from xsiam.references.descent import minimise_in_ball
from xsiam.references.solutions import read_vectors, vectors_file, write_vectors
from xsiam.references.uniform import UniformReference, VectorReference, features_of_length
from xsiam.split import Features, SplitModel, evaluation_mode, features_to
from xsiam.texts import check_texts

if TYPE_CHECKING:
    from xsiam.encoder import SiameseEncoder

# |c| may be so many times that of the embedding of PAD: longer ones reach a smaller e(c), but make
# paths harder to integrate.
MAX_NORM = 1.0
N_STARTS = 4
MAX_ITERATIONS = 700
_FIRST_LOOK = 0.12  # every start gets this share of the steps, then the best one goes on alone
_CANDIDATES = 512  # tokens of the vocabulary that are looked at for starts
_MOST_PAIRS = 2000
_NEGLIGIBLE = 1e-5  # |e(c)| of this share of a text's needs no improvement
# A search has settled where its last quarter changed |e(c)| by less than this share of a text's, or
# scores by less than this.
_SETTLED_SHARE, _SETTLED_SCORE = 1e-2, 1e-3
_CANDIDATES_AT_ONCE = 64


@dataclass(frozen=True)
class FitOptions:
    """How to search for a vector: see :func:`fit_reference`.

    Raises:
        InputError: If a number is not positive.
    """

    max_norm: float = MAX_NORM
    n_starts: int = N_STARTS
    max_iterations: int = MAX_ITERATIONS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_norm", "n_starts", "max_iterations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 < value < float("inf"):
                raise InputError(f"Expected `{name}` to be positive, but got {value!r}.")

    @property
    def key(self) -> str:
        """Names these choices among the fitted vectors of a model."""
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())


@dataclass(frozen=True)
class FitReport:
    """How a vector was fitted.

    Attributes:
        residual: |e(c)|.
        relative_residual: |e(c)| over |e(text)| of a short text of ours.
        start_residual: |e(c)| of the embedding of PAD, where ``uniform`` stays.
        norm: |c| over that of the embedding of PAD.
        max_norm: What it was allowed to be.
        at_bound: Whether it is that.
        converged: Whether the search had settled: its last quarter lowered |e(c)| by 1 % of itself
            or of a text's embedding at most (with texts, the difference of scores by 1 % or 0.001).
        iterations: Steps, over all searches.
        n_starts: Starts.
        seed: Of the choice of starts.
        n_texts: Texts whose scores were kept; 0 where none were given.
        score_difference: Root mean square difference of the exact model's scores from the
            unmodified model's, over pairs of those texts; None (unknown) without texts.
        seconds: Wall-clock time.
    """

    residual: float
    relative_residual: float
    start_residual: float
    norm: float
    max_norm: float
    at_bound: bool
    converged: bool
    iterations: int
    n_starts: int
    seed: int
    n_texts: int
    score_difference: float | None
    seconds: float


@register_reference
class FittedReference(VectorReference):
    """One vector c with |e(c)| as small as can be, at every position (ours).

    Without a vector it is fitted to the model in seconds: when an encoder that shifts is made with
    it, else when it is first needed. It is kept on disk for each set of weights and floating point
    type. :func:`fit_reference` has the choices.

    Args:
        vector: c, [D], or None to fit it.
        report: How it was fitted.
        cache: Folder of fitted vectors; None is `$XSIAM_CACHE`, else `~/.cache/xsiam`.
    """

    name = "fitted"

    def __init__(
        self,
        vector: Tensor | None = None,
        report: FitReport | None = None,
        *,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(vector)
        self.report = report
        self.cache = None if cache is None else Path(cache)
        self._probe: Features | None = None

    def prepare(self, split: SplitModel, features: Sequence[Features]) -> None:
        """Remember a text of ours, to fit the vector with."""
        self._probe = features[0]

    def check(self, split: SplitModel, features: Features) -> None:
        """Raise ModelError where e(r) depends on the length or the vector is another model's."""
        if self.c is None:
            UniformReference().check(split, features)
        else:
            super().check(split, features)

    def complete(self, split: SplitModel, *, progress: bool = False) -> None:
        """Fit the vector where there is none, or read the one that was fitted to these weights.

        Raises:
            CheckpointError: If the file of fitted vectors is damaged.

        Warns:
            ConvergenceWarning: If the search had not settled; the best vector is kept and flagged.
            UserWarning: If it cannot be kept on disk.
        """
        if self.c is not None:
            return
        assert self._probe is not None
        weight = next(p for p in split.model.parameters() if p.is_floating_point())
        fingerprint = split.weights.fingerprint()
        dtype = str(weight.dtype).removeprefix("torch.")
        file = vectors_file(self.cache, self.name, fingerprint, dtype)
        options = FitOptions()
        known = read_vectors(file, fingerprint).get(options.key)
        if known is None:
            with torch.inference_mode(False):
                probe = features_to(self._probe, weight.device)
                found = fit_vector(split, probe, options, progress=progress)
            assert found.c is not None
            assert found.report is not None
            known = found.c, dataclasses.asdict(found.report)
            write_vectors(file, fingerprint, {options.key: known})
        self.c, self.report = known[0], FitReport(**known[1])

    def make_ready(
        self, split: SplitModel, layer: int, batch: Sequence[Features], *, progress: bool = False
    ) -> None:
        """Fit the vector where there is none: it serves every layer and length."""
        self.complete(split, progress=progress)

    def vector(self, split: SplitModel, single: Features) -> Tensor:
        """Return c as [1, 1, D], fitted now at the latest."""
        self.complete(split)
        return super().vector(split, single)

    def state(self, split: SplitModel, features: Features) -> dict[str, Any]:
        """Return the vector, e(c), and how it was fitted."""
        self.complete(split)
        report = None if self.report is None else dataclasses.asdict(self.report)
        return super().state(split, features) | {"report": report}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the reference of a saved vector."""
        found = super().from_state(state)
        report = state.get("report")
        found.report = None if report is None else FitReport(**report)
        return found


def fit_reference(
    encoder: SiameseEncoder,
    texts: Sequence[str] | None = None,
    *,
    role: str | None = None,
    max_norm: float = MAX_NORM,
    n_starts: int = N_STARTS,
    max_iterations: int = MAX_ITERATIONS,
    seed: int = 0,
    progress: bool = False,
) -> FittedReference:
    """Fit a reference to an encoder, whose weights are not changed.

    Args:
        encoder: The model; its own reference and shift do not matter.
        texts: Unlabelled texts whose pairwise scores the exact model shall keep. None makes |e(c)|
            as small as can be, which needs no data.
        role: Role of the texts.
        max_norm: Bound on |c|, in units of the embedding of PAD.
        n_starts: Starts of which the best is followed to the end.
        max_iterations: Most steps of a search.
        seed: Of the starts, and of the pairs of texts.
        progress: Whether to show a progress bar.

    Raises:
        InputError: If an argument does not meet its constraint.
        ModelError: If e(r) of a repeated vector depends on the length in this model.

    Warns:
        ConvergenceWarning: If the search had not settled; the best vector is kept and flagged.
    """
    options = FitOptions(max_norm, n_starts, max_iterations, seed)
    probe = encoder._probe_features()
    embeddings = None
    if texts is not None:
        check_texts(texts)
        if len(set(texts)) < 2:
            raise InputError(f"Expected at least two different texts, but got {len(set(texts))}.")
        embeddings = _embeddings(encoder, list(dict.fromkeys(texts)), role)
    found = fit_vector(
        encoder.split,
        probe,
        options,
        embeddings=embeddings,
        is_cosine=encoder.similarity == "cos" or encoder.normalize,
        progress=progress,
    )
    found.check(encoder.split, probe)
    return found


def fit_vector(
    split: SplitModel,
    features: Features,
    options: FitOptions | None = None,
    *,
    embeddings: Tensor | None = None,
    is_cosine: bool = True,
    progress: bool = False,
) -> FittedReference:
    """Fit a vector to a model: see :func:`fit_reference`.

    Args:
        split: The model.
        features: Features of a short text.
        options: How to search.
        embeddings: Unshifted embeddings of texts whose scores shall be kept, [n, K] float64.
        is_cosine: Whether their scores are cosines, else dot products.
        progress: Whether to show a progress bar.
    """
    options = options or FitOptions()
    begin = time.perf_counter()
    UniformReference().check(split, features)
    n_searches = 1 + (embeddings is not None)
    with (
        exact_numerics(features["input_ids"].device),
        evaluation_mode(split.model),
        _progress(progress, n_searches * options.max_iterations) as tell,
    ):
        token = _OneToken(split, features)
        scale = float(split.embed(features)[0].norm())
        radius = options.max_norm * float(token.pad.norm())
        n_steps = options.max_iterations
        best = minimise_in_ball(
            token.squares,
            token.starts(options.n_starts, radius, options.seed),
            radius,
            n_steps,
            first_look=math.ceil(_FIRST_LOOK * n_steps),
            on_step=tell,
            target=(_NEGLIGIBLE * scale) ** 2,
            negligible=_SETTLED_SHARE * scale,
        )
        difference, iterations = None, best.iterations
        if embeddings is not None:
            scores = _Scores(token, embeddings, is_cosine, options.seed)
            best = minimise_in_ball(
                scores.mean_squares,
                best.x[None],
                radius,
                n_steps,
                on_step=tell,
                negligible=_SETTLED_SCORE,
            )
            iterations += best.iterations
            difference = math.sqrt(best.value)
        residual = float(token.embedding(best.x).norm())
        start_residual = float(token.embedding(token.pad).norm())
    report = FitReport(
        residual=residual,
        relative_residual=residual / scale,
        start_residual=start_residual,
        norm=float(best.x.norm() / token.pad.norm()),
        max_norm=options.max_norm,
        at_bound=best.at_bound,
        converged=best.is_settled,
        iterations=iterations,
        n_starts=options.n_starts,
        seed=options.seed,
        n_texts=0 if embeddings is None else len(embeddings),
        score_difference=difference,
        seconds=time.perf_counter() - begin,
    )
    _warn_unconverged(report, options.max_iterations)
    return FittedReference(best.x, report)


class _OneToken:
    """The embedding of a single token as a function of its state at layer 0.

    Args:
        split: The model.
        features: Features of a short text.
    """

    def __init__(self, split: SplitModel, features: Features) -> None:
        self.split = split
        self.single = features_of_length(split, features, 1)
        pad = UniformReference().vector(split, self.single)
        self._like = pad
        self.pad = pad[0, 0].double().cpu()

    def embedding(self, c: Tensor) -> Tensor:
        """Return e(c), [D] to [K] float64."""
        return self.embeddings(c[None])[0]

    def embeddings(self, vectors: Tensor) -> Tensor:
        """Return e of each of several vectors, [n, D] to [n, K] float64."""
        repeated = self._repeated(len(vectors))
        hidden = vectors.to(self._like)[:, None]
        embeddings: Tensor = self.split.tail(repeated, 0, hidden).double().cpu()
        return embeddings

    def squares(self, vectors: Tensor) -> Tensor:
        """Return |e|² of each of several vectors, [n, D] to [n]."""
        return self.embeddings(vectors).square().sum(1)

    def starts(self, n_starts: int, max_norm: float, seed: int) -> Tensor:
        """Return the embedding of PAD and of those sampled tokens whose |e| is smallest, [n, D]."""
        table = self.split.model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(table), generator=generator)[:_CANDIDATES]
        ids = rows.to(self._like.device)[:, None]
        features = {**self._repeated(len(ids)), "input_ids": ids}
        with self.split.without_positions():
            found = self.split.capture(features, 0)[:, 0].double().cpu()
        found = _inside(found, max_norm)
        sizes = torch.cat(
            [self.embeddings(some).norm(dim=1) for some in torch.split(found, _CANDIDATES_AT_ONCE)]
        )
        order = sizes.argsort(stable=True)[: n_starts - 1]
        return torch.cat([_inside(self.pad[None], max_norm), found[order]])

    def _repeated(self, n: int) -> Features:
        """Return features of n single tokens."""
        return {
            key: value.expand(n, -1) if isinstance(value, Tensor) and value.ndim else value
            for key, value in self.single.items()
        }


class _Scores:
    """Differences of the scores of pairs with the shift e(c) from those without."""

    def __init__(self, token: _OneToken, embeddings: Tensor, is_cosine: bool, seed: int) -> None:
        self._token, self._is_cosine = token, is_cosine
        i, j = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randperm(len(i), generator=generator)[:_MOST_PAIRS]
        self._a, self._b = embeddings[i[kept]], embeddings[j[kept]]
        self._own = self._scores(torch.zeros_like(embeddings[:1]))

    def mean_squares(self, vectors: Tensor) -> Tensor:
        """Return the mean square of the differences with each of several vectors, [n, D] to [n]."""
        return (self._scores(self._token.embeddings(vectors)) - self._own).square().mean(1)

    def _scores(self, shifts: Tensor) -> Tensor:
        """Return the scores of all pairs with each shift, [n, K] to [n, pairs]."""
        a, b = self._a - shifts[:, None], self._b - shifts[:, None]
        if self._is_cosine:
            a, b = a / a.norm(dim=2, keepdim=True), b / b.norm(dim=2, keepdim=True)
        return (a * b).sum(2)


def _inside(vectors: Tensor, max_norm: float) -> Tensor:
    """Shorten vectors [n, D] to the bound."""
    factors: Tensor = (max_norm / vectors.norm(dim=1, keepdim=True)).clamp_max(1.0)
    return vectors * factors


def _embeddings(encoder: SiameseEncoder, texts: Sequence[str], role: str | None) -> Tensor:
    """Return the unshifted embeddings of texts, [n, K] float64."""
    with torch.no_grad(), evaluation_mode(encoder):
        rows = [
            encoder.split.embed(features_to(encoder.preprocess([text], role), encoder.device))
            for text in texts
        ]
    return torch.cat(rows).double().cpu()


def _warn_unconverged(report: FitReport, max_iterations: int) -> None:
    if report.converged:
        return
    warnings.warn(
        f"The fitted reference had not settled after {max_iterations} iterations: |e(c)| is "
        f"{report.relative_residual:.1e} of a text's embedding. The best vector is kept. Raise "
        "`max_iterations`.",
        ConvergenceWarning,
        stacklevel=4,
    )


@contextmanager
def _progress(shown: bool, total: float) -> Iterator[Callable[[float], None]]:
    """Yield what is called after every iteration, with |r|: a progress bar, or nothing."""
    if not shown:
        yield lambda residual: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("fitting the reference", total=total)

        def tell(residual: float) -> None:
            bar.update(task, advance=1, description=f"fitting the reference: {residual:.2e}")

        yield tell
