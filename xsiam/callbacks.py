"""The attribution monitor: how exact a model's explanations are, while it trains."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from xsiam.accuracy import KEYS, PairValues, layer_key, sample_pairs, summarise_values, values_of
from xsiam.adapters import merged_adapters
from xsiam.attribution import PairAttributor
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning, InputError, ModelError, TruncationWarning
from xsiam.pairs import PairDataset
from xsiam.result import PairAttribution
from xsiam.sharding import ShardedStrategy, copy_weights

# Strategies under which a process holds all weights, or can gather them.
_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ShardedStrategy)


@dataclass(frozen=True)
class _Share:
    """What one process found out: values and figures by position in the sample."""

    values: dict[int, PairValues]
    figures: dict[int, PairAttribution]
    seconds: float


class AttributionMonitor(Callback):
    """Attribute a fixed sample of pairs at every validation and log how accurate that is.

    Logs, for every layer, the keys of :data:`xsiam.accuracy.KEYS` under
    ``attribution/layer_<l>/``, which ``ModelCheckpoint`` and ``EarlyStopping`` can monitor, and
    heat maps of the first pairs to TensorBoard. Pairs are shared out over processes and every value
    is computed on the gathered pairs. Training is left as it is without the monitor: random states,
    modes, gradients and precision settings. Adapters are merged meanwhile, see `xsiam.adapters`.

    Where processes share the weights, each gathers them into a whole copy of the encoder, which
    stands on the processor between validations: attributions need hidden states of the whole model.

    Args:
        pairs: Where the sample is drawn from, usually the validation pairs.
        layers: Layers to attribute at.
        n_pairs: Size of the sample.
        seed: Of the sample.
        tolerance: Of the adaptive quadrature.
        quadrature: "adaptive" or a fixed rule.
        n_nodes: Nodes of a fixed rule.
        max_nodes: Most nodes per text; a text that needs more counts as not converged.
        time_budget: Seconds per layer and process, after which nothing is refined; None for none.
        n_figures: Pairs to draw at every layer.
        every_n_epochs: Attribute in every n-th epoch only.
        memory_budget: Bytes an evaluation may take, see :class:`~xsiam.PairAttributor`.
        role_a: Role of the first texts.
        role_b: Role of the second texts.

    Raises:
        InputError: If a number is below 1, or the pairs are empty.
    """

    def __init__(
        self,
        pairs: PairDataset,
        layers: Sequence[int],
        *,
        n_pairs: int = 16,
        seed: int = 0,
        tolerance: float = 1e-3,
        quadrature: str = "adaptive",
        n_nodes: int | None = None,
        max_nodes: int = 512,
        time_budget: float | None = 60.0,
        n_figures: int = 2,
        every_n_epochs: int = 1,
        memory_budget: str | int | None = None,
        role_a: str | None = None,
        role_b: str | None = None,
    ) -> None:
        for name, value, least in (
            ("n_pairs", n_pairs, 1),
            ("n_figures", n_figures, 0),
            ("every_n_epochs", every_n_epochs, 1),
        ):
            if value < least:
                raise InputError(
                    f"Expected `{name}` to be at least {least}, but got {value}. "
                    f"Set `attribution.{name}`."
                )
        if len(pairs) == 0:
            raise InputError("Expected pairs to attribute, but got none. Set `data.validation`.")
        self.pairs = pairs.select(sample_pairs(len(pairs), n_pairs, seed))
        self.layers = tuple(dict.fromkeys(layers))
        self.n_figures = n_figures
        self.every_n_epochs = every_n_epochs
        self.roles = (role_a, role_b)
        self.settings: dict[str, Any] = {
            "tolerance": tolerance,
            "quadrature": quadrature,
            "n_nodes": n_nodes,
            "max_nodes": max_nodes,
            "time_budget": time_budget,
            "memory_budget": memory_budget,
        }
        self._copy: SiameseEncoder | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check everything that can be wrong before any long work.

        Raises:
            InputError: If a layer, a role or a rule does not exist, a number is out of range, the
                strategy shares weights in a way of its own, or another callback monitors what is
                not logged.
            ModelError: If the model cannot be attributed.
        """
        encoder = _encoder_of(pl_module)
        for layer in self.layers:
            encoder.check_layer(layer, key="attribution.layers")
        for role in self.roles:
            encoder.check_role(role)
        if type(trainer.strategy) not in _STRATEGIES:  # others derive from these
            raise InputError(
                "Expected a strategy under which each process holds all weights or can gather them "
                f"({', '.join(s.__name__ for s in _STRATEGIES)}), but got "
                f"{type(trainer.strategy).__name__}: attributions need hidden states of the whole "
                "model. Set `attribution.enabled=false`, or `trainer.strategy` to ddp or fsdp."
            )
        if isinstance(trainer.strategy, ShardedStrategy):
            encoder = self._copy_of(encoder)
        if self.layers:
            # Refuses what it cannot do; the first validation would be an epoch later.
            with isolate_rng(), merged_adapters(encoder.model):
                PairAttributor(encoder, self.layers[0], **self.settings)
        if trainer.state.fn == TrainerFn.FITTING:
            _check_monitored(trainer)

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that are logged."""
        return tuple(layer_key(layer, name) for layer in self.layers for name in KEYS)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attribute the sample at every layer and log the results."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        skipped = fitting and (trainer.current_epoch + 1) % self.every_n_epochs
        if trainer.sanity_checking or skipped:
            return
        with (
            isolate_rng(),
            self._whole(_encoder_of(pl_module)) as encoder,
            merged_adapters(encoder.model),
        ):
            for layer in self.layers:
                gathered = _gather(self._attribute_share(encoder, layer, trainer))
                for name, value in _summary(gathered).items():
                    pl_module.log(layer_key(layer, name), value, rank_zero_only=False)
                if trainer.is_global_zero:
                    self._draw(trainer, layer, gathered)

    def _copy_of(self, encoder: SiameseEncoder) -> SiameseEncoder:
        """Return a whole copy of an encoder, made before its weights are shared out."""
        if self._copy is None:
            if encoder.sharded:
                raise ModelError(
                    "Expected an encoder whose weights are not shared out yet, but they are. Pass "
                    "the same AttributionMonitor to the trainer that shared them out."
                )
            self._copy = copy.deepcopy(encoder)
        return self._copy

    @contextmanager
    def _whole(self, encoder: SiameseEncoder) -> Iterator[SiameseEncoder]:
        """Give an encoder with all weights: itself, or its copy where processes share them."""
        if not encoder.sharded:
            yield encoder
            return
        whole = self._copy_of(encoder).to(encoder.device)
        copy_weights(encoder, whole)
        try:
            yield whole
        finally:
            whole.to("cpu")

    def _attribute_share(self, encoder: SiameseEncoder, layer: int, trainer: Trainer) -> _Share:
        """Attribute every world-size-th pair of the sample."""
        start = time.monotonic()
        positions = list(range(trainer.global_rank, len(self.pairs), trainer.world_size))
        share = self.pairs.select(positions)
        with warnings.catch_warnings():
            # The converged fraction says it, at every validation.
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", TruncationWarning)
            attributor = PairAttributor(encoder, layer, **self.settings)
            results = attributor.attribute(share.texts_a, share.texts_b, *self.roles)
        drawn = {p: r for p, r in zip(positions, results, strict=True) if p < self.n_figures}
        values = {p: values_of(r) for p, r in zip(positions, results, strict=True)}
        return _Share(values, drawn, time.monotonic() - start)

    def _draw(self, trainer: Trainer, layer: int, shares: Sequence[_Share]) -> None:
        """Write heat maps to every TensorBoard logger, at the global step."""
        loggers = [x for x in trainer.loggers if isinstance(x, TensorBoardLogger)]
        if not loggers:
            return
        from xsiam.plots import plot_attribution

        figures = {p: r for share in shares for p, r in share.figures.items()}
        for position, result in sorted(figures.items()):
            for logger in loggers:
                figure, _ = plot_attribution(result)
                tag = layer_key(layer, f"pair_{position}")
                logger.experiment.add_figure(tag, figure, global_step=trainer.global_step)


def _check_monitored(trainer: Trainer) -> None:
    """Raise InputError where a callback monitors an attribution that a validation may not log."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set elsewhere
    monitors = [x for x in callbacks if isinstance(x, AttributionMonitor)]
    wanted = [x.monitor for x in callbacks if isinstance(x, ModelCheckpoint | EarlyStopping)]
    for key in wanted:
        if key is None or not key.startswith("attribution/"):
            continue
        logging = [monitor for monitor in monitors if key in monitor.keys]
        if not logging:
            known = ", ".join(x for monitor in monitors for x in monitor.keys)
            raise InputError(
                f"Expected the monitored attribution metric to be one of {known}, but got {key!r}. "
                "Set `checkpoint.monitor` or `attribution.layers`."
            )
        # Where validations leave it out, Lightning fails or compares the value of other weights.
        interval = trainer.check_val_every_n_epoch
        every = min(monitor.every_n_epochs for monitor in logging)
        if every > 1 and (interval is None or interval % every):
            raise InputError(
                f"Expected `every_n_epochs` to be 1, since {key!r} is monitored and every "
                f"validation has to log it, but got {every}. Set `attribution.every_n_epochs=1` or "
                f"`trainer.check_val_every_n_epoch={every}`."
            )


def _summary(shares: Sequence[_Share]) -> dict[str, float]:
    """Summarise the gathered values in the order of the sample, whoever computed them."""
    values = {p: v for share in shares for p, v in share.values.items()}
    ordered = [values[p] for p in sorted(values)]
    return summarise_values(ordered, max(share.seconds for share in shares))


def _gather(share: _Share) -> list[_Share]:
    """Return the shares of all processes, on each of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [share]
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, share)
    return shares


def _encoder_of(pl_module: LightningModule) -> SiameseEncoder:
    encoder = getattr(pl_module, "encoder", None)
    if not isinstance(encoder, SiameseEncoder):
        raise ModelError(
            f"Expected a LightningModule with a SiameseEncoder as `encoder`, but "
            f"{type(pl_module).__name__} has {type(encoder).__name__}."
        )
    return encoder
