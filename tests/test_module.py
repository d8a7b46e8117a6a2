"""The LightningModule by itself: optimiser, schedule, modes, checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from models import TEXTS, tiny_model
from torch.utils.data import DataLoader

from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, InputError
from xsiam.losses import EmbeddedBatch, get_objective
from xsiam.metrics import pearson, spearman
from xsiam.module import SiameseModule
from xsiam.references import VectorReference

LABELS = torch.tensor([0.9, 0.1, 0.4, 0.7])
OTHERS = [*TEXTS[1:], TEXTS[0]]


@pytest.fixture
def encoder() -> SiameseEncoder:
    return SiameseEncoder(tiny_model(), reference="uniform")


def batches(encoder: SiameseEncoder, sizes: tuple[int, ...], labelled: bool = True) -> Any:
    """Return a loader of batches of those sizes."""
    found, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        batch = {
            "a": encoder.preprocess(TEXTS[rows]),
            "b": encoder.preprocess(OTHERS[rows]),
            "index": torch.arange(4)[rows],
        }
        found.append(batch | ({"label": LABELS[rows]} if labelled else {}))
        start += size
    return DataLoader(found, batch_size=None)  # type: ignore[arg-type]


def trainer(path: Path, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 5,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": path,
            **settings,
        }
    )


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
]


def test_decay_is_on_matrices_only_and_frozen_weights_are_left_out(
    encoder: SiameseEncoder, tmp_path: Path
) -> None:
    module = SiameseModule(encoder, weight_decay=0.25)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, batches(encoder, (2, 2)))
    decayed, rest = run.optimizers[0].param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    names = {id(p): name for name, p in encoder.named_parameters()}
    assert all("bias" not in names[id(p)] and "Norm" not in names[id(p)] for p in decayed["params"])
    assert all("bias" in names[id(p)] or "Norm" in names[id(p)] for p in rest["params"])
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert frozen
    assert all("pooler" in name for name in frozen)
    assert len(decayed["params"]) + len(rest["params"]) + len(frozen) == len(names)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, *(1 - k / 8 for k in range(1, 8))]),
        ("constant", [0.0, 0.5, 1.0, *[1.0] * 7]),
    ],
)
def test_schedule_moves_every_step(
    encoder: SiameseEncoder, tmp_path: Path, schedule: str, expected: list[float]
) -> None:
    module = SiameseModule(encoder, learning_rate=0.5, warmup_fraction=0.2, schedule=schedule)
    rates: list[float] = []

    inner = SiameseModule.training_step

    def keep(self: SiameseModule, batch: Any, batch_idx: int) -> torch.Tensor:
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return inner(self, batch, batch_idx) * 0

    module.training_step = keep.__get__(module)  # type: ignore[method-assign]
    trainer(tmp_path).fit(module, batches(encoder, (2, 2)))
    assert rates == pytest.approx([0.5 * rate for rate in expected])


def test_training_runs_in_training_mode_and_learns(tmp_path: Path) -> None:
    encoder = SiameseEncoder(tiny_model(dropout=0.0), reference="uniform").eval()
    module = SiameseModule(encoder, learning_rate=1e-3)
    before = trainer(tmp_path).validate(module, batches(encoder, (4,)), verbose=False)[0]
    run = trainer(tmp_path, max_epochs=20)
    run.fit(module, batches(encoder, (2, 2)))
    assert encoder.model[0].training
    after = trainer(tmp_path).validate(module, batches(encoder, (4,)), verbose=False)[0]
    assert after["val/loss"] < before["val/loss"] / 2


def mean_cosine(texts: list[str], encoder: SiameseEncoder) -> torch.Tensor:
    """Return the mean cosine of all pairs of embeddings, pair by pair."""
    cosines = [
        torch.nn.functional.cosine_similarity(encoder.encode(one), encoder.encode(other))
        for one, other in itertools.combinations(texts, 2)
    ]
    return torch.cat(cosines).mean()


@pytest.mark.parametrize("sizes", [(4,), (3, 1), (1, 1, 2)])
def test_metrics_are_over_all_pairs_however_batched(
    encoder: SiameseEncoder, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    module = SiameseModule(encoder)
    logged = trainer(tmp_path).test(module, batches(encoder, sizes), verbose=False)[0]
    scores = encoder.score(TEXTS, OTHERS)
    a, b = encoder.encode(TEXTS), encoder.encode(OTHERS)
    dots = (a * b).sum(dim=-1)
    expected = {
        "test/loss": (scores - LABELS).square().mean(),
        "test/spearman_cosine": spearman(scores, LABELS),
        "test/pearson_cosine": pearson(scores, LABELS),
        "test/spearman_dot": spearman(dots, LABELS),
        "test/pearson_dot": pearson(dots, LABELS),
        "test/anisotropy": mean_cosine([*TEXTS, *OTHERS], encoder),
    }
    assert logged == pytest.approx({k: v.item() for k, v in expected.items()}, abs=1e-5)


def test_unlabelled_pairs_log_nothing(encoder: SiameseEncoder, tmp_path: Path) -> None:
    """Nothing that needs labels, and no ranking where texts cannot be told apart."""
    module = SiameseModule(encoder, anisotropy=False)
    assert trainer(tmp_path).test(module, batches(encoder, (4,), False), verbose=False) == [{}]
    assert module.undefined == {}


def taught(encoder: SiameseEncoder, sizes: tuple[int, ...], labelled: bool = True) -> Any:
    """Return a loader of batches with a teacher's embeddings, and these: [4, 2, 7]."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.nn.functional.normalize(torch.randn(4, 2, 7, generator=generator), dim=-1)
    loader: Any = batches(encoder, sizes, labelled)
    found = [batch | {"teacher": vectors[batch["index"]]} for batch in loader.dataset]
    return DataLoader(found, batch_size=None), vectors  # type: ignore[arg-type]


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("labelled", [False, True])
def test_scores_are_correlated_with_those_of_a_teacher(
    tmp_path: Path, similarity: str, labelled: bool
) -> None:
    encoder = SiameseEncoder(tiny_model(), reference="uniform", similarity=similarity)
    module = SiameseModule(encoder, "distillation", anisotropy=False)
    loader, vectors = taught(encoder, (3, 1), labelled)
    logged = trainer(tmp_path).validate(module, loader, verbose=False)[0]
    scores, theirs = encoder.score(TEXTS, OTHERS), (vectors[:, 0] * vectors[:, 1]).sum(dim=-1)
    assert logged["val/pearson_teacher"] == pytest.approx(pearson(scores, theirs).item(), abs=1e-5)
    objective = get_objective("distillation", similarity)
    a, b = encoder.encode(TEXTS), encoder.encode(OTHERS)
    losses = [
        objective(EmbeddedBatch(a[rows], b[rows], teacher=vectors[rows])).item() * n
        for rows, n in ((slice(0, 3), 3), (slice(3, 4), 1))
    ]
    assert logged["val/loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert ("val/spearman_cosine" in logged) == labelled
    assert "val/mrr@10" not in logged


def test_correlation_with_equal_scores_of_a_teacher_is_explained(
    encoder: SiameseEncoder, tmp_path: Path
) -> None:
    module = SiameseModule(encoder, "distillation")
    found = next(iter(batches(encoder, (4,), False))) | {"teacher": torch.full((4, 2, 3), 0.5)}
    loader = DataLoader([found], batch_size=None)  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="all 4 scores of the teacher are equal to 0.75"):
        logged = trainer(tmp_path).validate(module, loader, verbose=False)[0]
    assert set(logged) == {"val/loss", "val/anisotropy"}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reference", ["pad", "uniform"])
@pytest.mark.parametrize("name", ["mse_dot", "contrastive", "distillation"])
def test_loss_of_leading_dimensions_is_that_of_the_truncated_model(
    tmp_path: Path, name: str, reference: str, normalize: bool
) -> None:
    """The shift commutes with the cut, and a Normalize comes before it."""

    def loss(truncate_dim: int | None, **settings: Any) -> float:
        model = tiny_model(truncate_dim=truncate_dim)
        encoder = SiameseEncoder(model, reference=reference, normalize=normalize, similarity="dot")
        module = SiameseModule(encoder, name, anisotropy=False, **settings)
        loader, _ = taught(encoder, (4,), name == "mse_dot")
        return trainer(tmp_path).validate(module, loader, verbose=False)[0]["val/loss"]

    ours = loss(None, dims=[32, 8, 3], dim_weights=[1.0, 2.0, 0.5])
    assert ours == pytest.approx(loss(None) + 2 * loss(8) + 0.5 * loss(3), rel=1e-5)
    assert loss(8, dims=[8, 3]) == pytest.approx(loss(8) + loss(3), rel=1e-5)


@pytest.mark.parametrize("name", ["mse_cosine", "distillation"])
def test_leading_dimensions_are_learnt(tmp_path: Path, name: str) -> None:
    def loss_of_four(dims: list[int] | None, epochs: int) -> float:
        encoder = SiameseEncoder(tiny_model(dropout=0.0), reference="uniform")
        loader, vectors = taught(encoder, (4,), name == "mse_cosine")
        module = SiameseModule(encoder, name, learning_rate=1e-3, dims=dims)
        trainer(tmp_path, max_epochs=epochs).fit(module, loader)
        a, b = encoder.encode(TEXTS)[:, :4], encoder.encode(OTHERS)[:, :4]
        return get_objective(name)(EmbeddedBatch(a, b, (), LABELS, teacher=vectors)).item()

    nested, plain, before = loss_of_four([32, 4], 30), loss_of_four(None, 30), loss_of_four(None, 0)
    # Measured: 0.0009, 0.029, 0.93 with labels, and 0.19, 0.26, 0.80 with a random teacher.
    assert nested < 0.8 * min(plain, before), (nested, plain, before)


def test_dimensions_change_the_loss_and_no_other_metric(
    encoder: SiameseEncoder, tmp_path: Path
) -> None:
    plain, nested = (
        trainer(tmp_path).validate(
            SiameseModule(encoder, dims=dims), batches(encoder, (4,)), verbose=False
        )[0]
        for dims in (None, [32, 8])
    )
    assert plain.keys() == nested.keys()
    assert [key for key in plain if plain[key] != nested[key]] == ["val/loss"]


def embedded(encoder: SiameseEncoder, n: int) -> EmbeddedBatch:
    return EmbeddedBatch(encoder.encode(TEXTS[:n]), encoder.encode(OTHERS[:n]))


@pytest.mark.parametrize("similarity", ["cos", "dot"])
def test_contrastive_loss_is_on_the_score_of_the_encoder(tmp_path: Path, similarity: str) -> None:
    encoder = SiameseEncoder(tiny_model(), reference="uniform", similarity=similarity)
    options = {"temperature": 2.0, "symmetric": True}
    module = SiameseModule(encoder, "contrastive", objective_options=options, anisotropy=False)
    logged = trainer(tmp_path).validate(module, batches(encoder, (4,), False), verbose=False)[0]
    expected = get_objective("contrastive", similarity, **options)(embedded(encoder, 4))
    assert logged == {"val/loss": pytest.approx(expected.item(), rel=1e-5)}


def test_scores_are_not_rounded_in_mixed_precision(tmp_path: Path, encoder: SiameseEncoder) -> None:
    module = SiameseModule(encoder, "contrastive")
    run = trainer(tmp_path, precision="bf16-mixed")
    logged = run.validate(module, batches(encoder, (4,), False), verbose=False)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        a, b = (encoder(encoder.preprocess(texts)).float() for texts in (TEXTS, OTHERS))
    expected = get_objective("contrastive")(EmbeddedBatch(a, b)).item()
    assert logged["val/loss"] == pytest.approx(expected, rel=1e-6)


def test_batch_of_one_pair_is_left_out_of_a_loss_that_compares_pairs(
    encoder: SiameseEncoder, tmp_path: Path
) -> None:
    module = SiameseModule(encoder, "contrastive")
    loader = batches(encoder, (3, 1), False)
    logged = trainer(tmp_path).validate(module, loader, verbose=False)[0]
    expected = get_objective("contrastive")(embedded(encoder, 3)).item()
    assert logged["val/loss"] == pytest.approx(expected, rel=1e-5)


def test_pairs_without_negatives_have_correlations_and_no_triplet_loss(
    encoder: SiameseEncoder, tmp_path: Path
) -> None:
    module = SiameseModule(encoder, "triplet")
    logged = trainer(tmp_path).validate(module, batches(encoder, (4,)), verbose=False)[0]
    assert "val/spearman_cosine" in logged
    assert "val/loss" not in logged
    with pytest.raises(InputError, match=r"Expected negatives for objective 'triplet'"):
        trainer(tmp_path).fit(module, batches(encoder, (4,)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_chunks_change_nothing_under_accumulation_and_clipping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    def descend(self: SiameseModule) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    monkeypatch.setattr(SiameseModule, "configure_optimizers", descend)
    weights = []
    for chunk_size in (None, 1, 2):
        encoder = SiameseEncoder(tiny_model(dropout=0.0), reference="uniform")
        before = torch.cat([p.detach().flatten() for p in encoder.parameters()])
        module = SiameseModule(encoder, "contrastive", chunk_size=chunk_size)
        run = trainer(
            tmp_path,
            precision=precision,
            max_epochs=3,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
        )
        run.fit(module, batches(encoder, (2, 2)))
        assert run.global_step == 3
        weights.append(torch.cat([p.detach().flatten() for p in encoder.parameters()]))
    # Measured, relative to the way that training goes: 8e-6 and 0.11 (products of 8 bits).
    bound = 1e-4 if precision == "32-true" else 0.3
    for other in weights[1:]:
        assert (other - weights[0]).norm() < bound * (weights[0] - before).norm()


class LoggedNorms(Callback):
    """Keep what was logged of each step, beside what the optimiser was given."""

    def __init__(self) -> None:
        self.logged: list[float] = []
        self.clipped: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if "train/gradient_norm" in trainer.callback_metrics:  # not before the first step
            self.logged.append(trainer.callback_metrics["train/gradient_norm"].item())

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.clipped.append(torch.cat(gradients).norm().item())


def gradient_norms(tmp_path: Path, **settings: Any) -> LoggedNorms:
    """Train without dropout or learning, so that every step has the same gradient."""
    encoder = SiameseEncoder(tiny_model(dropout=0.0), reference="uniform")
    norms = LoggedNorms()
    module = SiameseModule(encoder, learning_rate=1e-30)
    run = trainer(tmp_path, max_epochs=2, callbacks=[norms], **settings)
    run.fit(module, batches(encoder, (2, 2)))
    return norms


def test_gradient_norm_is_that_of_the_loss_before_clipping(tmp_path: Path) -> None:
    encoder = SiameseEncoder(tiny_model(dropout=0.0), reference="uniform")
    expected = []
    for rows in (slice(0, 2), slice(2, 4)):
        a, b = (encoder(encoder.preprocess(texts[rows])) for texts in (TEXTS, OTHERS))
        loss = get_objective("mse_cosine")(EmbeddedBatch(a, b, labels=LABELS[rows]))
        used = [p for p in encoder.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, used, allow_unused=True)
        parts = [g.flatten() for g in gradients if g is not None]
        expected.append(torch.cat(parts).norm().item())
    norms = gradient_norms(tmp_path, gradient_clip_val=0.01)
    assert norms.logged == pytest.approx(expected * 2, rel=1e-4)
    assert max(norms.clipped) < 0.0101 < min(norms.logged)


def test_gradient_norm_is_of_what_is_accumulated(tmp_path: Path) -> None:
    """Both batches make one step, and its gradient is the mean of theirs."""
    once = gradient_norms(tmp_path, accumulate_grad_batches=2)
    encoder = SiameseEncoder(tiny_model(dropout=0.0), reference="uniform")
    a, b = (encoder(encoder.preprocess(texts)) for texts in (TEXTS, OTHERS))
    get_objective("mse_cosine")(EmbeddedBatch(a, b, labels=LABELS)).backward()
    gradients = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
    assert once.logged[-1] == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-4)


def test_gradient_norm_has_no_scale_of_mixed_precision(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    scaled = gradient_norms(tmp_path, plugins=[plugin])
    assert scaler.get_scale() == 2.0**10  # no step was left out
    # Measured: 0.017, where the scale would make it 1024 times as long.
    assert scaled.logged == pytest.approx(gradient_norms(tmp_path).logged, rel=0.05)


def test_gradient_norm_and_anisotropy_can_be_left_out(
    encoder: SiameseEncoder, tmp_path: Path
) -> None:
    module = SiameseModule(encoder, gradient_norm=False, anisotropy=False)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, batches(encoder, (4,)), batches(encoder, (4,)))
    assert "train/loss" in run.callback_metrics
    assert "val/loss" in run.callback_metrics
    assert not {"train/gradient_norm", "val/anisotropy"} & run.callback_metrics.keys()


@pytest.mark.parametrize("name", ["cosent", "contrastive"])
def test_other_objectives_are_learnt(tmp_path: Path, name: str) -> None:
    encoder = SiameseEncoder(tiny_model(dropout=0.0), reference="uniform")
    module = SiameseModule(encoder, name, learning_rate=1e-3)
    loader = batches(encoder, (4,))
    before = trainer(tmp_path).validate(module, loader, verbose=False)[0]
    trainer(tmp_path, max_epochs=30).fit(module, loader)
    after = trainer(tmp_path).validate(module, loader, verbose=False)[0]
    assert after["val/loss"] < before["val/loss"] / 2
    if name == "cosent":
        assert before["val/spearman_cosine"] < 0.9 < after["val/spearman_cosine"]


def test_undefined_correlation_is_explained_not_logged(
    encoder: SiameseEncoder, tmp_path: Path
) -> None:
    module = SiameseModule(encoder)
    with pytest.warns(RuntimeWarning, match="is undefined: a correlation needs 2 pairs"):
        logged = trainer(tmp_path).test(module, batches(encoder, (1,)), verbose=False)[0]
    assert set(logged) == {"test/loss", "test/anisotropy"}
    assert set(module.undefined) == {
        f"test/{kind}_{name}" for kind in ("spearman", "pearson") for name in ("cosine", "dot")
    }


def test_checkpoint_hooks(encoder: SiameseEncoder) -> None:
    module = SiameseModule(encoder, "triplet", objective_options={"margin": 0.25})
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["xsiam"]["format_version"] == 1
    assert checkpoint["xsiam"]["objective"] == "triplet"
    assert checkpoint["xsiam"]["objective_options"] == {"margin": 0.25}
    module.on_load_checkpoint(checkpoint)
    checkpoint["xsiam"]["format_version"] = 7
    with pytest.raises(CheckpointError, match=r"format 7. Install a newer xsiam"):
        module.on_load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="carries no encoder"):
        module.on_load_checkpoint({})


def test_hyperparameters_and_state_hold_plain_values_and_the_encoder_only(
    encoder: SiameseEncoder,
) -> None:
    module = SiameseModule(encoder, learning_rate=1e-4)
    assert dict(module.hparams) == {
        "objective": "mse_cosine",
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "warmup_fraction": 0.1,
        "schedule": "linear",
        "objective_options": None,
        "chunk_size": None,
        "gradient_norm": True,
        "anisotropy": True,
        "layer_decay": None,
        "freeze_layers": 0,
        "activation_checkpointing": False,
        "dims": None,
        "dim_weights": None,
        "train_reference": False,
        "bend_weight": 0.0,
        "bend_layer": None,
        "bend_texts": 8,
    }
    assert all(name.startswith("encoder.model.") for name in module.state_dict())


def test_the_vector_of_a_reference_is_trained_along(tmp_path: Path) -> None:
    encoder = SiameseEncoder(tiny_model(), reference="fitted")
    assert isinstance(encoder.reference, VectorReference)
    before = encoder.reference.c
    scores = encoder.score(TEXTS, OTHERS)
    module = SiameseModule(encoder, learning_rate=1e-2, warmup_fraction=0, train_reference=True)
    assert torch.equal(encoder.score(TEXTS, OTHERS), scores)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, batches(encoder, (4,)))
    after = encoder.reference.c
    assert before is not None
    assert after is not None
    # AdamW's first step moves every number by the learning rate.
    assert torch.allclose((after - before).abs(), torch.tensor(1e-2).double(), rtol=1e-3)
    run.save_checkpoint(tmp_path / "last.ckpt")
    encoder.eval().save_pretrained(tmp_path / "export")
    trained = encoder.score(TEXTS, OTHERS)
    for saved in ("last.ckpt", "export"):
        loaded = SiameseEncoder.from_pretrained(tmp_path / saved)
        assert isinstance(loaded.reference, VectorReference)
        assert loaded.reference.c is not None
        assert torch.equal(loaded.reference.c, after)
        assert loaded.reference_vector is None  # fixed, unless it is asked for again
        assert torch.allclose(loaded.score(TEXTS, OTHERS), trained, atol=1e-6)


def test_the_gradient_of_the_vector_is_that_of_its_embedding() -> None:
    encoder = SiameseEncoder(tiny_model().double(), reference="fitted").eval()
    encoder.train_reference()
    vector, features = encoder.reference_vector, encoder.preprocess(TEXTS)
    assert vector is not None
    weights = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((encoder(features) * weights).sum(), vector)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            vector += sign * step * direction
            values.append((encoder.encode(TEXTS) * weights).sum())  # no shift of before is kept
            vector -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert float(gradient @ direction) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize(
    ("reference", "shift", "match"),
    [
        ("pad", True, r"but 'pad' is subtracted here. Set `model.train_reference=false`"),
        ("uniform", True, r"a vector of its own.*but 'uniform' is subtracted"),
        ("fitted", False, r"and a shift, but 'fitted' is not subtracted here"),
    ],
)
def test_references_without_a_vector_to_train(reference: str, shift: bool, match: str) -> None:
    encoder = SiameseEncoder(tiny_model(), reference=reference, shift=shift)
    with pytest.raises(InputError, match=match):
        SiameseModule(encoder, train_reference=True)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` to be above 0, but got 0.0. Set `optimizer.l"),
        ({"weight_decay": -1.0}, "`weight_decay` to be 0 or more, but got -1.0"),
        ({"warmup_fraction": 1.5}, "between 0 and 1, but got 1.5"),
        ({"schedule": "cosine"}, "linear, constant, but got 'cosine'. Set `optimizer.schedule`"),
        ({"objective": "mse"}, "but got 'mse'"),
        ({"objective_options": {"scale": 2.0}}, r"got scale=2.0.*Leave `objective.scale` out"),
        ({"dims": [64, 32]}, r"at most 32 dimensions.*got \[64, 32\]. Set `objective.dims`"),
        ({"dims": [16]}, r"the whole embedding of 32.*got \[16\]. Set `objective.dims`"),
        ({"dims": [32, 32]}, r"`dims` to be different.*got \[32, 32\]"),
        ({"dim_weights": [1.0]}, r"`dims` for `dim_weights`, but got \[1.0\]"),
        ({"chunk_size": 0}, "`chunk_size` to be 1 or more, but got 0. Set `objective.chunk_size`"),
    ],
)
def test_bad_settings(encoder: SiameseEncoder, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        SiameseModule(encoder, **settings)


def test_endless_training_is_refused(encoder: SiameseEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`trainer.max_epochs` or `trainer.max_steps`"):
        trainer(tmp_path, max_epochs=-1).fit(SiameseModule(encoder), batches(encoder, (4,)))
