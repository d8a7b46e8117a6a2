"""Frozen layers and learning rates by layer, on real architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import FAMILIES, TEXTS, tiny_model
from sentence_transformers.sentence_transformer.modules import Dense
from torch.utils.data import DataLoader

from xsiam.depth import check_depths, freeze_lower_layers, parameter_depths, parameter_groups
from xsiam.encoder import SiameseEncoder
from xsiam.errors import InputError
from xsiam.module import SiameseModule

L = 3
PLAIN = tuple(name for name in FAMILIES if name != "albert")

# Where parameters outside the blocks sit, by the start of their names in transformers.
FED = (
    "embeddings.",
    "embed_tokens.",
    "encoder.relative_attention_bias.",
    "encoder.rel_embeddings.",
)
FED += ("shared.", "encoder.embed_tokens.", "encoder.LayerNorm.", "embeddings_project.")
AFTER = ("final_norm.", "norm.", "encoder.final_layer_norm.")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
]


def encoder_of(architecture: str, **options: Any) -> SiameseEncoder:
    return SiameseEncoder(tiny_model(architecture, **options), reference="uniform")


def expected_depth(encoder: SiameseEncoder, name: str) -> int:
    """Return the depth of a parameter by its name in transformers."""
    if not name.startswith("model.0."):
        return L + 1
    numbers = [int(part) for part in name.split(".")[2:] if part.isdigit()]
    own = name.partition(f"{transformer_prefix(encoder)}.")[2]
    if own.startswith(FED):
        return 0
    if own.startswith(AFTER):
        return L + 1
    assert numbers, f"{name} is in no block"
    return numbers[0] + 1


def transformer_prefix(encoder: SiameseEncoder) -> str:
    named = encoder.named_modules()
    return next(name for name, module in named if module is encoder.split.model)


@pytest.mark.parametrize("architecture", PLAIN)
def test_depths_follow_the_names_of_the_architecture(architecture: str) -> None:
    encoder = encoder_of(architecture)
    encoder.freeze_unused_parameters()
    depths = parameter_depths(encoder)
    assert depths == {name: expected_depth(encoder, name) for name in depths}
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert set(depths) == trained
    assert set(depths.values()) >= set(range(L + 1))
    has_last_norm = architecture in ("modernbert", "t5_relu", "t5_gated_gelu", "qwen2", "qwen3")
    assert (L + 1 in depths.values()) == has_last_norm


@pytest.mark.parametrize("decay", [None, 1.0, 0.5])
@pytest.mark.parametrize("architecture", PLAIN)
def test_every_parameter_is_in_one_group_at_the_rate_of_its_depth(
    architecture: str, decay: float | None
) -> None:
    encoder = encoder_of(architecture, extra=[Dense(32, 8)])
    encoder.freeze_unused_parameters()
    groups = parameter_groups(encoder, 1e-3, 0.25, decay)
    names = {id(p): name for name, p in encoder.named_parameters() if p.requires_grad}
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    assert len({group["name"] for group in groups}) == len(groups)
    rates = []
    for group in groups:
        for p in group["params"]:
            depth = expected_depth(encoder, names[id(p)])
            below = {0: L, L + 1: 0}.get(depth, L - depth)
            rate = 1e-3 * (1.0 if decay is None else decay) ** below
            assert group["lr"] == pytest.approx(rate, rel=1e-12), names[id(p)]
            assert group["weight_decay"] == (0.25 if p.ndim > 1 else 0.0)
            rates.append(group["lr"])
    assert len(set(rates)) == (L + 1 if decay == 0.5 else 1)


def loader(encoder: SiameseEncoder, n_batches: int = 3) -> DataLoader[Any]:
    batch = {
        "a": encoder.preprocess(TEXTS),
        "b": encoder.preprocess([*TEXTS[1:], TEXTS[0]]),
        "index": torch.arange(4),
        "label": torch.tensor([0.9, 0.1, 0.4, 0.7]),
    }
    return DataLoader([batch] * n_batches, batch_size=None)  # type: ignore[arg-type]


def fit(module: SiameseModule, path: Path) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
    )
    trainer.fit(module, loader(module.encoder))
    return trainer


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("architecture", ["bert", "mpnet", "deberta_v3", "modernbert", "qwen3"])
def test_frozen_layers_do_not_move(
    tmp_path: Path, architecture: str, n_layers: int, chunk_size: int | None
) -> None:
    encoder = encoder_of(architecture, dropout=0.0)
    features = encoder.preprocess(TEXTS)
    with torch.no_grad():
        hidden = encoder.eval().split.capture(features, n_layers)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    module = SiameseModule(
        encoder, learning_rate=1e-3, freeze_layers=n_layers, chunk_size=chunk_size
    )
    fit(module, tmp_path)
    moved = set()
    for name, p in encoder.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, name
            assert torch.equal(p, before[name]), name
        elif not torch.equal(p, before[name]):
            moved.add(name)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained
    assert min(expected_depth(encoder, name) for name in trained) == n_layers + 1
    assert all(expected_depth(encoder, name) > n_layers for name in trained)
    assert {expected_depth(encoder, name) for name in moved} >= set(range(n_layers + 1, L + 1))
    with torch.no_grad():
        assert torch.equal(encoder.eval().split.capture(features, n_layers), hidden)


def test_nothing_is_frozen_by_default() -> None:
    encoder = encoder_of("bert")
    assert freeze_lower_layers(encoder, 0) == []
    assert all(p.requires_grad for p in encoder.parameters())


def test_all_blocks_can_be_frozen_where_something_comes_after_them(tmp_path: Path) -> None:
    encoder = encoder_of("bert", extra=[Dense(32, 8)])
    module = SiameseModule(encoder, freeze_layers=L, layer_decay=0.5)
    trainer = fit(module, tmp_path)
    names = [group["name"] for group in trainer.optimizers[0].param_groups]
    assert names == ["after_blocks_decayed", "after_blocks_not_decayed"]
    match = r"to train, but got 3 and BertModel has nothing to train after its 3 blocks"
    with pytest.raises(InputError, match=match):
        SiameseModule(encoder_of("bert"), freeze_layers=L)


def test_rates_decay_in_training_and_follow_the_schedule(tmp_path: Path) -> None:
    encoder = encoder_of("bert", dropout=0.0)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    # A decay so strong that AdamW's first steps, as long as the rate, show it.
    module = SiameseModule(
        encoder, learning_rate=1e-3, layer_decay=0.1, warmup_fraction=0, weight_decay=0.0
    )
    trainer = fit(module, tmp_path)
    rates = {g["name"]: g["initial_lr"] for g in trainer.optimizers[0].param_groups}
    assert rates["block_2_decayed"] == pytest.approx(1e-3)
    assert rates["embeddings_not_decayed"] == pytest.approx(1e-6)
    steps: dict[int, float] = {}
    for name, p in encoder.named_parameters():
        if p.requires_grad:
            depth = expected_depth(encoder, name)
            steps[depth] = max(steps.get(depth, 0.0), (p - before[name]).abs().max().item())
    # Three steps at 1, 2/3 and 1/3 of the rate: 2 rates at most, and nearly that somewhere.
    for depth, step in steps.items():
        rate = 1e-3 * 0.1 ** (L - depth)
        assert rate < step < 2.1 * rate, depth


def test_shared_block_is_refused() -> None:
    encoder = encoder_of("albert")
    message = r"the 3 layers of AlbertModel share parameters \(1 different blocks\).*Set `{}`"
    with pytest.raises(InputError, match=message.format("optimizer.layer_decay=null")):
        SiameseModule(encoder, layer_decay=0.9)
    with pytest.raises(InputError, match=message.format("model.freeze_layers=0")):
        SiameseModule(encoder, freeze_layers=1)
    with pytest.raises(InputError, match="share parameters"):
        parameter_depths(encoder)
    assert len(parameter_groups(encoder, 1e-3, 0.0)) == 2  # without either it trains as before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"freeze_layers": 4}, r"0 and 3 for BertModel, but got 4. Set `model.freeze_layers`"),
        ({"freeze_layers": -1}, r"between 0 and 3 for BertModel, but got -1"),
        ({"layer_decay": 0.0}, r"above 0 and at most 1, but got 0.0. Set `optimizer.layer_decay`"),
        ({"layer_decay": 1.5}, r"above 0 and at most 1, but got 1.5"),
    ],
)
def test_values_out_of_range_are_named(settings: dict[str, Any], match: str) -> None:
    encoder = encoder_of("bert")
    with pytest.raises(InputError, match=match):
        check_depths(encoder, **settings)
    with pytest.raises(InputError, match=match):
        SiameseModule(encoder, **settings)


def test_finding_depths_leaves_the_model_as_it_is() -> None:
    encoder = encoder_of("modernbert").train()
    state = torch.get_rng_state()
    parameter_depths(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in encoder.modules())
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    assert not any(block._forward_hooks for block in encoder.split.blocks)
