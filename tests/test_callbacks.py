"""The monitor's keys, in real event files; training as without it; processes share the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from models import tiny_folder, tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xsiam.accuracy import KEYS, layer_key, sample_pairs, summarise
from xsiam.attribution import PairAttributor
from xsiam.callbacks import AttributionMonitor, _summary
from xsiam.data import PairDataModule
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.module import SiameseModule
from xsiam.pairs import PairDataset

EQUAL = 1e-6
N_PAIRS = 7
LAYERS = (1, 2)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*sync_dist=True", "ignore:.*logging interval"
)


def pairs(n: int = 12) -> PairDataset:
    words = ["dog", "cat", "kitten", "house", "garden", "yard"]
    return PairDataset(
        texts_a=[f"the {words[i % 6]} sleeps in the {words[(i + 1) % 6]}" for i in range(n)],
        texts_b=[f"a big {words[(i * 5 + 2) % 6]} runs" for i in range(n)],
        labels=[(i % 5) / 4 for i in range(n)],
    )


def write_csv(path: Path, data: PairDataset) -> Path:
    assert data.labels is not None
    rows = zip(data.texts_a, data.texts_b, data.labels, strict=True)
    path.write_text("sentence1,sentence2,score\n" + "".join(f"{a},{b},{y}\n" for a, b, y in rows))
    return path


class KeepLosses(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *rest) -> None:
        self.losses.append(outputs["loss"].item())


def fit(
    tmp_path: Path, callbacks: list[pl.Callback], epochs: int = 2, **options: Any
) -> tuple[pl.Trainer, list]:
    pl.seed_everything(0, verbose=False)
    encoder = SiameseEncoder(tiny_model(dropout=0.2), reference="uniform", similarity="cos")
    csv = write_csv(tmp_path / "pairs.csv", pairs())
    data = PairDataModule(encoder.preprocess, train=csv, validation=csv, batch_size=4)
    losses = KeepLosses()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=TensorBoardLogger(str(tmp_path), name="tb", version=""),
        callbacks=[losses, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(SiameseModule(encoder), datamodule=data)
    return trainer, losses.losses


def monitor(**kwargs) -> AttributionMonitor:
    return AttributionMonitor(pairs(), LAYERS, n_pairs=N_PAIRS, **kwargs)


def test_every_key_is_in_the_event_file_and_can_be_monitored(tmp_path: Path) -> None:
    key = layer_key(2, "completeness_error_mean")
    best = ModelCheckpoint(tmp_path / "best", monitor=key, mode="min", filename="best")
    stopping = EarlyStopping(monitor=key, mode="min", patience=5)
    trainer, _ = fit(tmp_path, [monitor(), best, stopping])
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {layer_key(layer, name) for layer in LAYERS for name in KEYS} <= set(scalars)
    steps = [event.step for event in events.Scalars(key)]
    assert steps == [2, 5]  # three steps an epoch, counted from 0; no sanity check
    assert best.best_model_score == pytest.approx(min(e.value for e in events.Scalars(key)))
    images = set(events.Tags()["images"])
    assert images == {layer_key(layer, f"pair_{i}") for layer in LAYERS for i in range(2)}
    assert [image.step for image in events.Images(layer_key(1, "pair_0"))] == [3, 6]
    assert trainer.callback_metrics[layer_key(1, "converged_fraction")] == 1.0


def test_values_are_those_of_the_attributor(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, [monitor()], epochs=1)
    encoder = trainer.lightning_module.encoder
    chosen = pairs().select(sample_pairs(12, N_PAIRS, 0))
    results = PairAttributor(encoder, 1).attribute(chosen.texts_a, chosen.texts_b)
    expected = summarise(results, 0.0)
    for name in set(KEYS) - {"seconds"}:
        logged = float(trainer.callback_metrics[layer_key(1, name)])
        assert logged == pytest.approx(expected[name], abs=EQUAL), name


def test_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    _, without = fit(tmp_path / "without", [])
    _, with_monitor = fit(tmp_path / "with", [monitor()])
    assert len(without) == 6
    assert with_monitor == without
    assert len(set(without)) > 1


def test_what_is_cut_off_counts_as_not_converged(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, [monitor(tolerance=1e-7, max_nodes=15)], epochs=1)
    assert trainer.callback_metrics[layer_key(1, "converged_fraction")] < 1.0


def test_epochs_can_be_left_out(tmp_path: Path) -> None:
    fit(tmp_path, [monitor(every_n_epochs=2)])
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.step for e in events.Scalars(layer_key(1, "n_nodes_mean"))] == [5]


def test_sampling_is_seeded_and_leaves_the_global_state() -> None:
    first = sample_pairs(100, 9, 3)
    assert first == sample_pairs(100, 9, 3) == sorted(set(first))
    assert first != sample_pairs(100, 9, 4)
    assert sample_pairs(3, 9, 0) == [0, 1, 2]


def validate(folder: str, csv: str, devices: int) -> tuple[pl.Trainer, dict[str, float]]:
    """Validate a model folder with the monitor and return every logged value."""
    encoder = SiameseEncoder.from_pretrained(folder, reference="pad", similarity="cos")
    data = PairDataModule(encoder.preprocess, validation=csv, eval_batch_size=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        callbacks=[monitor(n_figures=0)],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.validate(SiameseModule(encoder), datamodule=data, verbose=False)
    return trainer, {key: float(value) for key, value in trainer.callback_metrics.items()}


_TWO_PROCESSES = """
import json, sys, warnings
tests, folder, csv, out = sys.argv[1:]
sys.path.insert(0, tests)
from test_callbacks import validate

warnings.simplefilter("ignore")
trainer, values = validate(folder, csv, 2)
if trainer.is_global_zero:
    open(out, "w").write(json.dumps(values))
"""


def test_two_processes_log_what_one_does(tmp_path: Path) -> None:
    folder = str(tiny_folder(tmp_path / "model"))
    csv = str(write_csv(tmp_path / "pairs.csv", pairs(11)))  # odd, and no multiple of the batch
    _, alone = validate(folder, csv, 1)
    (tmp_path / "validate.py").write_text(_TWO_PROCESSES)
    out = tmp_path / "two.json"
    arguments = [str(Path(__file__).parent), folder, csv, str(out)]
    run = subprocess.run(
        [sys.executable, str(tmp_path / "validate.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    together = json.loads(out.read_text())
    assert set(together) == set(alone)
    assert {layer_key(1, "converged_fraction"), "val/spearman_cosine"} <= set(alone)
    for key, value in alone.items():
        if not key.endswith("seconds"):
            assert together[key] == pytest.approx(value, abs=EQUAL), key


@pytest.mark.parametrize("world_size", [2, 3, N_PAIRS + 2])
def test_each_pair_is_of_one_process_however_many_there_are(world_size: int) -> None:
    encoder = SiameseEncoder(tiny_model(), reference="uniform", similarity="cos")
    some = monitor()
    shares = [
        some._attribute_share(encoder, 2, SimpleNamespace(global_rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    positions = sorted(position for share in shares for position in share.values)
    assert positions == list(range(N_PAIRS))
    alone = some._attribute_share(encoder, 2, SimpleNamespace(global_rank=0, world_size=1))
    together = _summary(shares) | {"seconds": 0.0}
    assert together == pytest.approx(_summary([alone]) | {"seconds": 0.0}, abs=EQUAL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, r"`tolerance` to be a positive number, but got 0\.0"),
        ({"max_nodes": 0}, r"`max_nodes` to be a positive number, but got 0"),
        ({"time_budget": -1.0}, r"`time_budget` to be a positive number, but got -1\.0"),
        ({"quadrature": "simpson"}, r"but got 'simpson'\. Set `attribution\.quadrature`"),
        ({"quadrature": "riemann"}, r"'riemann', but got None\. Set `attribution\.n_nodes`"),
        ({"memory_budget": "lots"}, r"but got 'lots'\. Set `attribution\.memory_budget`"),
    ],
)
def test_bad_quadrature_is_refused_before_the_first_step(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    losses = KeepLosses()
    with pytest.raises(InputError, match=message):
        fit(tmp_path, [monitor(**settings), losses])
    assert losses.losses == []


def test_only_what_every_validation_logs_can_be_monitored(tmp_path: Path) -> None:
    key = layer_key(2, "completeness_error_mean")
    for callback in (ModelCheckpoint(tmp_path / "a", monitor=key), EarlyStopping(key)):
        losses = KeepLosses()
        with pytest.raises(InputError, match=rf"{key}.* but got 3\. Set .*every_n_epochs=1"):
            fit(tmp_path, [monitor(every_n_epochs=3), callback, losses])
        assert losses.losses == []
    unknown = layer_key(2, "completeness")
    with pytest.raises(InputError, match=rf"{key}.* but got '{unknown}'"):
        fit(tmp_path, [monitor(), EarlyStopping(unknown)])
    best = ModelCheckpoint(tmp_path / "b", monitor=key)
    fit(tmp_path, [monitor(every_n_epochs=2), best], check_val_every_n_epoch=2)
    assert best.best_model_score is not None


def test_bad_settings_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`n_pairs` to be at least 1, but got 0"):
        AttributionMonitor(pairs(), [1], n_pairs=0)
    with pytest.raises(InputError, match="Expected pairs to attribute"):
        AttributionMonitor(PairDataset([], []), [1])
    with pytest.raises(InputError, match=r"but got 9. Set `attribution.layers`"):
        fit(tmp_path, [AttributionMonitor(pairs(), [9])])
    with pytest.raises(InputError, match=r"or None, but got 'boss'"):
        fit(tmp_path, [AttributionMonitor(pairs(), [1], role_a="boss")])
