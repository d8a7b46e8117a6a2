"""LoRA adapters: what they change and what they leave, alone and in whole training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, TEXTS, tiny_folder, tiny_model
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from test_training import (
    KilledError,
    overrides,
    raise_at,
    run_script,
    train,
    weights,
    write_pairs,
)

from xsiam import PairAttributor, adapters
from xsiam.adapters import (
    add_lora,
    has_adapters,
    lora_settings,
    merge_adapters,
    merged_adapters,
    without_lora,
)
from xsiam.checkpoint import read_checkpoint
from xsiam.config import TrainConfig, load_config
from xsiam.encoder import SiameseEncoder
from xsiam.errors import CheckpointError, InputError, ModelError
from xsiam.module import SiameseModule
from xsiam.references import MeanReference

SAME = 1e-4  # of the largest coordinate; worst measured 2.1e-5 (ALBERT): blocks amplify rounding


def encoder_of(architecture: str = "bert", **options: Any) -> SiameseEncoder:
    return SiameseEncoder(tiny_model(architecture, **options), reference="uniform")


def adapted(encoder: SiameseEncoder, **options: Any) -> SiameseEncoder:
    """Return the encoder with LoRA layers that matter, as after training."""
    add_lora(encoder, **options)
    train_a_lot(encoder)
    return encoder


def train_a_lot(encoder: SiameseEncoder) -> None:
    """Set what LoRA layers begin with as 0 to something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_adapters_begin_as_nothing_and_merge_into_plain_weights(architecture: str) -> None:
    encoder = encoder_of(architecture)
    names, before = list(encoder.state_dict()), encoder.encode(TEXTS)
    settings = add_lora(encoder, r=2)
    assert torch.equal(encoder.encode(TEXTS), before)
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    for target in settings.target_modules:
        assert any(f"{target}.lora_A" in name for name in trained)
    train_a_lot(encoder)
    after = encoder.encode(TEXTS)
    assert difference(after, before) > 0.01
    assert list(without_lora(encoder.state_dict())) == names
    merge_adapters(encoder.model)
    assert not has_adapters(encoder.model)
    assert list(encoder.state_dict()) == names
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert difference(encoder.encode(TEXTS), after) <= SAME


def test_merged_adapters_are_put_back_to_the_bit() -> None:
    encoder = adapted(encoder_of(extra=[Dense(32, 8)]), dropout=0.5).train()
    layers = dict(encoder.named_modules())
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    fingerprint, config = encoder.model_fingerprint, lora_settings(encoder.model)
    random = torch.get_rng_state()

    def fail_within() -> None:
        with merged_adapters(encoder.model):
            assert not has_adapters(encoder.model)
            assert encoder.model_fingerprint != fingerprint
            raise KilledError

    with pytest.raises(KilledError):
        fail_within()
    assert lora_settings(encoder.model) == config
    assert all(a is b for a, b in zip(layers.values(), encoder.modules(), strict=True))
    assert list(layers) == list(dict(encoder.named_modules()))
    assert encoder.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in encoder.state_dict().items())
    assert encoder.model_fingerprint == fingerprint
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_attributions_of_merged_adapters_are_those_of_autodiff(architecture: str) -> None:
    encoder = adapted(encoder_of(architecture), dropout=0.5).train()
    by_autodiff = PairAttributor(encoder, 2, tolerance=1e-4).attribute(*TEXTS[1:3])
    with merged_adapters(encoder.model):
        merged = PairAttributor(encoder, 2, tolerance=1e-4).attribute(*TEXTS[1:3])
    assert by_autodiff.converged
    assert merged.converged
    scale = by_autodiff.matrix.abs().max()
    assert (merged.matrix - by_autodiff.matrix).abs().max() <= 1e-4 * scale
    assert abs(float(merged.matrix.sum()) - float(encoder.score(*TEXTS[1:3]))) <= 1e-4
    plain = PairAttributor(encoder_of(architecture), 2).attribute(*TEXTS[1:3])
    assert (plain.matrix - merged.matrix).abs().max() > 0.01 * scale  # or adapters do nothing


def _scale(encoder: SiameseEncoder) -> None:
    layer = encoder.split.blocks[0].get_submodule("attention.self.query")
    layer.scaling["default"] *= 2  # type: ignore[union-attr, operator, index]


def _train(encoder: SiameseEncoder) -> None:
    with torch.no_grad():
        next(p for name, p in encoder.named_parameters() if ".lora_A." in name).data += 1e-3


@pytest.mark.parametrize(
    "change", [_scale, _train, lambda e: e.model.disable_adapters()], ids=["scale", "A", "off"]
)
def test_a_change_of_adapters_is_a_change_of_weights(change: Any) -> None:
    encoder = adapted(encoder_of())
    attributor = PairAttributor(encoder, 2)
    fingerprint, score = encoder.model_fingerprint, attributor.attribute(*TEXTS[:2]).score
    encoder.encode(TEXTS)  # the shift is kept
    change(encoder)
    assert encoder.model_fingerprint != fingerprint
    result = attributor.attribute(*TEXTS[:2])
    assert result.score != score
    assert abs(result.score - float(encoder.score(*TEXTS[:2]))) <= 1e-5


@pytest.mark.parametrize("reference", ["uniform", "pad", "mean"])
def test_exports_are_plain_and_the_encoder_keeps_its_adapters(
    tmp_path: Path, reference: str
) -> None:
    model = tiny_model()
    vector = MeanReference.of(SiameseEncoder(model, reference="pad"), TEXTS)
    encoder = SiameseEncoder(model, reference=vector if reference == "mean" else reference)
    adapted(encoder)
    expected = encoder.encode(TEXTS)
    encoder.save_pretrained(tmp_path)
    assert has_adapters(encoder.model)
    assert torch.equal(encoder.encode(TEXTS), expected)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))
    assert not list(tmp_path.rglob("adapter*"))
    assert difference(SiameseEncoder.from_pretrained(tmp_path).encode(TEXTS), expected) <= SAME
    if reference != "pad":
        plain = SentenceTransformer(str(tmp_path), device="cpu")
        theirs = plain.encode(list(TEXTS), convert_to_tensor=True)
        assert difference(theirs, expected) <= SAME


def test_adapters_of_a_folder_are_merged(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    model = SentenceTransformer(str(folder), device="cpu")
    model.add_adapter(LoraConfig(r=2, target_modules=["key"], init_lora_weights=False))
    expected = model.encode(list(TEXTS), convert_to_tensor=True)
    model.save(str(tmp_path / "adapter"), create_model_card=False)
    assert list((tmp_path / "adapter").glob("adapter_model*"))
    encoder = SiameseEncoder.from_pretrained(tmp_path / "adapter", shift=False)
    assert not has_adapters(encoder.model)
    assert difference(encoder.encode(TEXTS), expected) <= SAME


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, r"`r` to be 1 or more, but got 0. Set `lora.r`"),
        ({"alpha": 0.0}, r"`alpha` to be above 0, but got 0.0. Set `lora.alpha`"),
        ({"dropout": 1.0}, r"including 1, but got 1.0. Set `lora.dropout`"),
        (
            {"target_modules": ["query", "q_proj"]},
            r"BertModel \(dense, key, query, value\), .*'encoder.layer.0.attention.self.query', "
            r"or 'all-linear', but got 'q_proj', which is in no module. Set `lora.target_modules`",
        ),
        ({"target_modules": ""}, r"but got '', which is in no module"),
        ({"target_modules": "uery"}, r"but got 'uery', which is in no module"),
        ({"target_modules": "attention"}, r"but got 'attention', which is a BertAttention"),
        ({"target_modules": "pooler.dense"}, r"depend on, but got \['pooler.dense'\], which they"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        add_lora(encoder_of(), **options)


def test_missing_peft_is_said_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    match = r'not installed. Install it with `pip install "xsiam\[peft\]"`'
    with pytest.raises(InputError, match=match):
        add_lora(encoder_of())
    config = load_config(TrainConfig, [], ["model.name=./nowhere", "lora.enabled=true"])
    from xsiam.training import run_training

    with pytest.raises(InputError, match=match):  # before the model is looked for
        run_training(config)


def test_adapters_upon_adapters_are_refused() -> None:
    encoder = adapted(encoder_of())
    with pytest.raises(ModelError, match="without adapters to add LoRA to, but it has some"):
        add_lora(encoder)


def test_adapters_that_a_checkpoint_cannot_hold_are_refused() -> None:
    encoder = encoder_of()
    encoder.model.add_adapter(LoraConfig(r=2, target_modules=["key"], use_rslora=True))
    with pytest.raises(ModelError, match=r"got \['default'\] of other kinds or options"):
        encoder.checkpoint_payload()


@pytest.mark.parametrize(
    ("overrides_", "match"),
    [
        (["lora.r=4"], r"no `lora.r` without adapters, but got 4. Set `lora.enabled=true`"),
        (["lora.enabled=true", "lora.r=0"], r"`lora.r` to be a whole number of 1 or more"),
        (["lora.enabled=true", "lora.target_modules=[]"], r"`lora.target_modules` to be a list of"),
        (["lora.enabled=true", "lora.lora_alpha=4"], r"Did you mean `lora.alpha`"),
    ],
)
def test_configurations_that_cannot_be_are_refused(overrides_: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_config(TrainConfig, [], overrides_)


def test_targets_are_read_from_the_command_line() -> None:
    config = load_config(TrainConfig, [], ["lora.enabled=true", "lora.target_modules=all-linear"])
    everything = add_lora(encoder_of(), target_modules=config.lora.target_modules)
    assert len(everything.target_modules) == 19  # three blocks of six, and the pooler
    config = load_config(TrainConfig, [], ["lora.enabled=true", "lora.target_modules=[key,value]"])
    assert config.lora.target_modules == ["key", "value"]


def test_frozen_layers_leave_the_adapters_above() -> None:
    encoder = encoder_of()
    add_lora(encoder)
    module = SiameseModule(encoder, freeze_layers=2, layer_decay=0.5)
    module.setup("fit")
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert len(trained) == 4  # A and B of query and value
    assert all(".layer.2." in name and ".lora_" in name for name in trained)
    with pytest.raises(InputError, match=r"to leave something to train, but got 3"):
        SiameseModule(encoder, freeze_layers=3)


# -- whole runs ---------------------------------------------------------------------------------

LORA = ("lora.enabled=true", "lora.r=2", "lora.dropout=0.1", "optimizer.learning_rate=1e-2")
LORA += ("attribution.layers=[2]", "attribution.n_pairs=3", "attribution.n_figures=0")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model (with dropout) and pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_folder(folder / "model")
    for seed, (name, n) in enumerate({"train": 45, "validation": 23, "test": 21}.items()):
        write_pairs(folder / f"{name}.csv", n, seed)
    return folder


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return an uninterrupted run."""
    return train(inputs, tmp_path_factory.mktemp("finished") / "run", *LORA)


def test_run_trains_adapters_only_and_exports_plain_weights(finished: Any, inputs: Path) -> None:
    base = SiameseEncoder.from_pretrained(inputs / "model", reference="uniform").state_dict()
    after = {
        name.removeprefix("encoder."): t for name, t in weights(finished.last_checkpoint).items()
    }
    assert all(torch.equal(base[name], t) for name, t in without_lora(after).items())
    factors = [tensor for name, tensor in after.items() if ".lora_B." in name]
    assert len(factors) == 6  # query and value of three blocks
    assert all(factor.abs().max() > 0 for factor in factors)

    best = SiameseEncoder.from_pretrained(finished.best_checkpoint)
    exported = SiameseEncoder.from_pretrained(finished.export)
    assert exported.model_fingerprint == best.model_fingerprint
    plain = SentenceTransformer(str(finished.export), device="cpu")
    theirs = plain.encode(list(TEXTS), convert_to_tensor=True)
    assert difference(theirs, best.encode(TEXTS)) <= SAME
    untrained = SiameseEncoder.from_pretrained(inputs / "model", reference="uniform")
    assert difference(theirs, untrained.encode(TEXTS)) > 0.01

    results = json.loads(finished.results_path.read_text())
    assert results["model"]["fingerprint"] == best.model_fingerprint
    assert results["model"]["lora"] == {
        "r": 2,
        "alpha": 16.0,
        "dropout": 0.1,
        "target_modules": ["query", "value"],
    }
    assert results["model"]["trained_parameters"] == 6 * 2 * 2 * 32
    assert results["metrics"]["attribution/layer_2/converged_fraction"] == 1.0


def test_monitored_attributions_are_those_of_the_best_weights(finished: Any, inputs: Path) -> None:
    """What was measured on adapters while training is what the checkpoint's merged weights give."""
    best = SiameseEncoder.from_pretrained(finished.best_checkpoint)
    more = [f"model.name={finished.best_checkpoint}", "optimizer.learning_rate=1e-30"]
    again = train(
        inputs,
        finished.export.parent.parent / "again",
        *LORA[4:],
        *more,
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=1",
    )
    assert not has_adapters(best.model)
    for key in (
        "n_nodes_mean",
        "negative_share",
        "convergence_delta_abs_max",
    ):
        tag = f"attribution/layer_2/{key}"
        assert again.metrics[tag] == pytest.approx(finished.metrics[tag], rel=1e-3, abs=1e-6), tag


def test_the_monitor_changes_no_bit_of_training(
    finished: Any, inputs: Path, tmp_path: Path
) -> None:
    alone = train(inputs, tmp_path / "run", *LORA, "attribution.enabled=false")
    ours, theirs = weights(alone.last_checkpoint), weights(finished.last_checkpoint)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_interrupted_run_is_resumed(
    finished: Any, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        raise_at(patch, "on_train_batch_start", 9, KilledError())
        with pytest.raises(KilledError):
            train(inputs, tmp_path / "run", *LORA, "checkpoint.every_n_steps=4")
    resumed = train(inputs, tmp_path / "run", *LORA, "checkpoint.every_n_steps=4", "resume=auto")
    ours, theirs = weights(resumed.last_checkpoint), weights(finished.last_checkpoint)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    seconds = "attribution/layer_2/seconds"
    assert {**resumed.metrics, seconds: 0} == {**finished.metrics, seconds: 0}


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ((*LORA, "lora.r=3"), r"`lora.r` to be 2 as in the checkpoint .*, but got 3. Set `lora.r`"),
        ((*LORA, "lora.alpha=3"), r"`lora.alpha` to be 16.0 as in .*, but got 3.0"),
        ((*LORA, "lora.target_modules=key"), r"`lora.target_modules` to be \['query', 'value'\]"),
        ((), r"`lora.enabled` to be True as in the checkpoint .*, but got False"),
    ],
)
def test_resuming_with_other_adapters_is_refused(
    finished: Any, inputs: Path, tmp_path: Path, more: tuple[str, ...], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        train(inputs, tmp_path / "run", *more, f"resume={finished.last_checkpoint}")


def test_adapters_are_added_to_a_checkpoint_with_merged_ones(
    finished: Any, inputs: Path, tmp_path: Path
) -> None:
    more = [f"model.name={finished.best_checkpoint}", "trainer.max_epochs=1"]
    result = train(inputs, tmp_path / "run", *LORA, *more)
    merged = SiameseEncoder.from_pretrained(finished.best_checkpoint).state_dict()
    after = {k.removeprefix("encoder."): t for k, t in weights(result.last_checkpoint).items()}
    assert all(torch.equal(merged[name], t) for name, t in without_lora(after).items())


def test_a_checkpoint_of_adapters_needs_peft(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install \"xsiam\[peft\]\""):
        SiameseEncoder.from_pretrained(finished.best_checkpoint)


@pytest.mark.parametrize(
    "lora",
    [{"rank": 2}, {"r": 2, "alpha": 16.0, "dropout": 0.1, "target_modules": ["nowhere"]}],
)
def test_a_checkpoint_with_damaged_adapters_is_refused(
    finished: Any, tmp_path: Path, lora: dict[str, Any]
) -> None:
    checkpoint = read_checkpoint(finished.best_checkpoint)
    checkpoint["xsiam"]["lora"] = lora
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x.ckpt' to hold the weights of its own model"):
        SiameseEncoder.from_pretrained(tmp_path / "x.ckpt")


@pytest.mark.slow
def test_two_processes_train_the_same_adapters(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = [*LORA, "lora.target_modules=all-linear", "trainer.max_epochs=1"]
    done = run_script(
        tmp_path, overrides(inputs, output, *more, "trainer.devices=2", "data.batch_size=4")
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["processes"] == 2
    exported = SiameseEncoder.from_pretrained(output / "export")
    assert exported.model_fingerprint == results["model"]["fingerprint"]
