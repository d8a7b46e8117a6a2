"""Configuration: types, overrides, files, errors, and the shipped YAML files."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from xsiam import config as config_module
from xsiam.config import (
    AttributionConfig,
    EvaluateConfig,
    TrainConfig,
    load_config,
    save_config,
    to_dict,
)
from xsiam.errors import InputError
from xsiam.schema import Section, check_value, leaves, validate

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EVALUATIONS = {"analyses"}  # the others train
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.prompt=query: ", "query: "),
        ("model.prompt=a=b", "a=b"),
        ("model.prompt=", ""),
        ("model.prompt=null", None),
        ("model.prompt=None", None),
        ("model.name=no", "no"),
        ("model.name=none", "none"),
        ("data.column_label=none", "none"),
        ("data.column_label=null", None),
        ("model.name=1e3", "1e3"),
        ("model.name=[a, b]", "[a, b]"),
        ("model.similarity=null", None),
        ("model.similarity=dot", "dot"),
        ("model.shift=no", False),
        ("model.shift=1", True),
        ("model.shift=False", False),
        ("model.normalize=yes", True),
        ("model.normalize=none", None),
        ("attribution.layers=4", [4]),
        ("attribution.layers=[4,5]", [4, 5]),
        ("attribution.layers=4, 5", [4, 5]),
        ("attribution.layers=[]", []),
        ("data.label_range=[0,5]", [0.0, 5.0]),
        ("data.label_range=none", None),
        ("data.columns_negative=[hard, other one]", ["hard", "other one"]),
        ("data.columns_negative=hard", ["hard"]),
        ("data.columns_negative=[]", []),
        ("data.columns_negative=null", None),
        ("objective.temperature=1", 1.0),
        ("objective.symmetric=true", True),
        ("objective.chunk_size=16", 16),
        ("objective.teacher=no", "no"),
        ("objective.dims=[32,8]", [32, 8]),
        ("objective.dims=32", [32]),
        ("objective.dim_weights=[1,0.5]", [1.0, 0.5]),
        ("trainer.devices=2", 2),
        ("trainer.devices=-1", -1),
        ("trainer.devices=auto", "auto"),
        ("trainer.devices=0,2", "0,2"),
        ("trainer.limit_train_batches=1", 1),
        ("trainer.limit_train_batches=1.0", 1.0),
        ("trainer.limit_train_batches=0.5", 0.5),
        ("trainer.gradient_clip_val=2", 2.0),
        ("optimizer.learning_rate=2e-5", 2e-5),
        ("resume=auto", "auto"),
    ],
)
def test_override_is_read_by_declared_type(override: str, expected: Any) -> None:
    key = override.partition("=")[0]
    value = value_of(load_config(TrainConfig, [], [override]), key)
    assert value == expected
    assert type(value) is type(expected)
    if isinstance(expected, list):
        assert [type(item) for item in value] == [type(item) for item in expected]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "attribution.tolerance=0",
            r"`attribution.tolerance` to be a positive number, but got 0.0",
        ),
        ("attribution.tolerance=-0.5", r"`attribution.tolerance`.*got -0.5"),
        ("attribution.tolerance=nan", r"`attribution.tolerance`.*got nan"),
        ("attribution.time_budget=inf", r"`attribution.time_budget`.*got inf"),
        ("attribution.tolerance=small", r"`attribution.tolerance` to be a positive.*got 'small'"),
        ("attribution.n_pairs=0", r"`attribution.n_pairs` to be a whole number of 1 or.*got 0"),
        ("attribution.layers=[3,-1]", r"`attribution.layers`.*0 or more, but got \[3, -1\]"),
        ("attribution.layers=[3,3]", r"`attribution.layers`.*different layers.*got \[3, 3\]"),
        ("attribution.layers=[a]", r"`attribution.layers`.*whole number.*got \['a'\]"),
        ("attribution.n_nodes=8", r"no `attribution.n_nodes` with the adaptive.*got 8"),
        ("attribution.quadrature=riemann", r"`attribution.n_nodes`.*'riemann'.*got none"),
        ("data.batch_size=0", r"`data.batch_size` to be a whole number of 1 or more, but got 0"),
        ("data.batch_size=2.5", r"`data.batch_size`.*got '2.5'"),
        ("data.limit=0", r"`data.limit`.*got 0"),
        ("data.validation_fraction=1", r"`data.validation_fraction`.*fraction.*got 1.0"),
        ("data.test_fraction=0", r"`data.test_fraction`.*got 0.0"),
        ("data.label_range=[5,0]", r"`data.label_range` to be two increasing.*got \[5.0, 0.0\]"),
        ("data.label_range=[0,1,2]", r"`data.label_range`.*got \[0.0, 1.0, 2.0\]"),
        ("data.label_range=[0,inf]", r"`data.label_range`.*got \[0.0, inf\]"),
        ("model.similarity=cosine", r"`model.similarity` to be 'cos' or 'dot' or null.*'cosine'"),
        ("model.name= ", r"`model.name` to be text that is not empty, but got ' '"),
        ("model.prompt=${seed}", r"`model.prompt`.*without '\$\{', but got '\$\{seed\}'"),
        ("model.shift=maybe", r"`model.shift` to be true or false, but got 'maybe'"),
        ("model.shift=null", r"`model.shift` to be true or false, but got 'null'"),
        ("data.columns_negative=[a,a]", r"`data.columns_negative` to be a list of different.*'a'"),
        ("objective.temperature=0", r"`objective.temperature` to be a positive.*but got 0.0"),
        ("objective.margin=-1", r"`objective.margin` to be a positive number, but got -1.0"),
        ("objective.distance=dot", r"'cosine' or 'euclidean' or null, but got 'dot'"),
        ("objective.dims=[8,8]", r"`objective.dims` to be a list of different.*got \[8, 8\]"),
        ("objective.dims=[]", r"`objective.dims` to be a list of different whole.*got \[\]"),
        ("objective.dims=[8,0]", r"`objective.dims`.*whole numbers of 1 or.*got \[8, 0\]"),
        ("objective.dim_weights=[1,-1]", r"`objective.dim_weights`.*positive.*\[1.0, -1.0\]"),
        ("objective.chunk_size=0", r"`objective.chunk_size` to be a whole number of 1.*got 0"),
        ("optimizer.learning_rate=0", r"`optimizer.learning_rate`.*got 0.0"),
        ("optimizer.warmup_fraction=1", r"`optimizer.warmup_fraction`.*got 1.0"),
        ("optimizer.schedule=cosine", r"'linear' or 'constant', but got 'cosine'"),
        ("trainer.max_epochs=many", r"`trainer.max_epochs`.*got 'many'"),
        ("trainer.devices=two", r"`trainer.devices`.*got 'two'"),
        ("trainer.devices=0", r"`trainer.devices`.*got 0"),
        ("trainer.limit_val_batches=1.5", r"`trainer.limit_val_batches`.*got 1.5"),
        ("trainer.val_check_interval=0", r"`trainer.val_check_interval`.*got 0"),
        ("early_stopping.patience=0", r"`early_stopping.patience`.*got 0"),
        ("seed=-1", r"`seed`.*got -1"),
        ("seed=4294967296", r"`seed`.*got 4294967296"),
    ],
)
def test_bad_value_names_key_and_value(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(TrainConfig, [], [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_epoch=1", r"in the command line. Did you mean `trainer.max_epochs`\?"),
        ("objective.temprature=1", r"got `objective.temprature`.*`objective.temperature`"),
        ("layers=4", r"got `layers` .*`attribution.layers`"),
        ("atribution.layer=4", r"got `atribution.layer`.*`attribution.layers`"),
        ("batchsize=4", r"got `batchsize`.*`data.batch_size`"),
        ("model.zzzqqq=1", r"got `model.zzzqqq`.*Known keys are `model.name`"),
        ("model=x", r"`model` in 'model=x' is a section.*`model.name`"),
        ("trainer.max_epochs", r"form `key=value`, but got 'trainer.max_epochs'"),
        ("=3", r"form `key=value`, but got '=3'"),
        ("model.name.deep=3", r"got `model.name.deep`.*`model.name`"),
    ],
)  # fmt: skip
def test_unknown_key_suggests_the_right_one(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(TrainConfig, [], [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model:\n  name: no\n",
            r"`model.name`.*got False. Set `model.name` in .*mine.yaml, betwee",
        ),
        ("model:\n  prompt: 7\n", r"`model.prompt`.*got 7. .*between quotes"),
        ("model:\n  shift: 'no'\n", r"`model.shift` to be true or false, but got 'no'"),
        ("trainer:\n  max_epochs: 2.0\n", r"`trainer.max_epochs`.*got 2.0"),
        ("trainer:\n  max_epochs: true\n", r"`trainer.max_epochs`.*got True"),
        ("trainer:\n  max_epochs:\n", r"`trainer.max_epochs`.*got None"),
        ("attribution:\n  layers: 4\n", r"`attribution.layers` to be a list.*got 4"),
        ("attribution:\n  layers: [true]\n", r"`attribution.layers`.*got \[True\]"),
        ("model: MiniLM\n", r"`model` to be a section.*got 'MiniLM'.*mine.yaml"),
        ("model:\n", r"`model` to be a section.*got None"),
        ("trainer:\n  max_epoch: 3\n", r"`trainer.max_epoch` in .*mine.yaml. Did .*max_epochs"),
        ("zzzqqq: 3\n", r"got `zzzqqq` in .*mine.yaml. Known keys are `seed`"),
        ("seed: 1\nseed: 2\n", r"mine.yaml' to be a YAML file.*duplicate key seed"),
        ("model: [1, b: 2", r"mine.yaml' to be a YAML file"),
        ("model:\n  prompt: '${'\n", r"mine.yaml' to be a YAML file"),
        ("- 1\n", r"mine.yaml to hold `key: value` lines, but got a list"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(TrainConfig, [write(tmp_path, text)])


def test_missing_file_is_named_with_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1", "quickstart.yaml")
    with pytest.raises(
        InputError, match=r"quickstar.yaml' does not exist.*Did you mean .*quickstart"
    ):
        load_config(TrainConfig, [tmp_path / "quickstar.yaml"])
    with pytest.raises(InputError, match=r"nowhere.x.yaml' does not exist"):
        load_config(TrainConfig, [tmp_path / "nowhere" / "x.yaml"])


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    first = write(
        tmp_path, "seed: 1\nmodel: {name: one, shift: false}\nattribution: {layers: [1, 2]}"
    )
    second = write(tmp_path, "model: {name: two}\nattribution: {layers: [3]}", "second.yaml")
    config = load_config(TrainConfig, [first, second], ["seed=5", "seed=6"])
    assert (config.seed, config.model.name, config.model.shift) == (6, "two", False)
    assert config.attribution.layers == [3]
    assert load_config(TrainConfig, [second, first]).model.name == "one"


def test_defaults_are_valid_and_independent() -> None:
    config = load_config(TrainConfig)
    assert config == TrainConfig()
    validate(config)
    config.attribution.layers.append(3)
    assert load_config(TrainConfig).attribution.layers == []


def test_evaluation_needs_a_checkpoint_and_has_its_own_defaults() -> None:
    with pytest.raises(InputError, match="Expected `checkpoint`, but none is given"):
        load_config(EvaluateConfig, [], ["data.test=c.csv"])
    config = load_config(EvaluateConfig, [], ["checkpoint=best.ckpt", "attribution.layers=4"])
    assert config.checkpoint == "best.ckpt"
    # A key of the section that is set leaves the evaluation's other defaults alone.
    assert (config.attribution.n_pairs, config.attribution.layers) == (100, [4])
    assert AttributionConfig().n_pairs == 16
    assert set(to_dict(config)["model"].values()) == {None}


def test_fractions_leave_pairs_and_compete_with_no_source() -> None:
    with pytest.raises(InputError, match=r"they add up to 1\.1"):
        load_config(TrainConfig, [], ["data.validation_fraction=0.5", "data.test_fraction=0.6"])
    with pytest.raises(
        InputError, match=r"either `data.test` or `data.test_fraction`.*'c.csv'.*0.1"
    ):
        load_config(TrainConfig, [], ["data.test=c.csv", "data.test_fraction=0.1"])


def test_validate_finds_what_was_set_in_code() -> None:
    config = TrainConfig()
    config.attribution.tolerance = -1.0
    with pytest.raises(
        InputError, match=r"`attribution.tolerance`.*got -1.0. Set `attribution.tole"
    ):
        validate(config)


@pytest.mark.parametrize(
    "text",
    ["no", "null", "1e-3", "query: ", " lead", "~", "", "a\nb", "ünï", "'", '"', "#a", "???"],
)
def test_round_trip_keeps_every_text(tmp_path: Path, text: str) -> None:
    config = TrainConfig()
    config.model.prompt = text
    path = tmp_path / "deep" / "config.yaml"
    save_config(config, path)
    assert load_config(TrainConfig, [path]) == config


def test_round_trip_keeps_every_override(tmp_path: Path) -> None:
    overrides = [
        "seed=3", "model.similarity=dot", "model.prompt=query: ", "model.max_length=64",
        "data.label_range=[0,5]", "data.validation_fraction=0.1", "optimizer.learning_rate=1e-5",
        "trainer.devices=2", "trainer.limit_val_batches=1.0", "trainer.limit_train_batches=1",
        "attribution.layers=[0,6]", "attribution.quadrature=riemann", "attribution.n_nodes=50",
        "attribution.time_budget=null", "attribution.memory_budget=2GB",
    ]  # fmt: skip
    config = load_config(TrainConfig, [], overrides)
    save_config(config, tmp_path / "config.yaml")
    again = load_config(TrainConfig, [tmp_path / "config.yaml"])
    assert again == config
    # Equality takes 1 and 1.0 for the same; to Lightning they are one batch and all of them.
    assert type(again.trainer.limit_train_batches) is int
    assert type(again.trainer.limit_val_batches) is float


def test_shipped_files_are_the_documented_ones() -> None:
    names = {
        "quickstart",
        "stsb_minilm",
        "stsb_mpnet",
        "stsb_distilroberta",
        "ddp_cpu",
        "multi_gpu",
        "fsdp",
        "distil_minilm",
    }
    assert {path.stem for path in SHIPPED} >= names


def leaves_of(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the values of nested sections by dotted key."""
    found = []
    for name, value in content.items():
        inner = leaves_of(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        found += [(prefix + name, value)] if inner is None else inner
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_loads_and_begins_with_its_command(path: Path, tmp_path: Path) -> None:
    schema = EvaluateConfig if path.stem in EVALUATIONS else TrainConfig
    command, folder = ("evaluate", "eval") if schema is EvaluateConfig else ("train", "runs")
    config = load_config(schema, [path])
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    for key, value in leaves_of(content):
        assert value_of(config, key) == value
    assert path.read_text().startswith(f"# python {command}.py configs/{path.name}\n")
    assert config.output_dir == f"{folder}/{path.stem}"
    assert isinstance(config, EvaluateConfig) or config.model.shift
    save_config(config, tmp_path / "config.yaml")
    assert load_config(schema, [tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize("name", ["stsb_minilm", "stsb_mpnet", "stsb_distilroberta"])
def test_recipe_files_hold_the_published_recipe(name: str) -> None:
    config = load_config(TrainConfig, [CONFIGS / f"{name}.yaml"])
    optimizer, trainer = config.optimizer, config.trainer
    assert (optimizer.learning_rate, optimizer.weight_decay) == (2e-5, 0.01)
    assert (optimizer.warmup_fraction, optimizer.schedule) == (0.1, "linear")
    assert (trainer.max_epochs, trainer.gradient_clip_val, trainer.precision) == (5, 1.0, "32-true")
    assert (config.data.batch_size, config.model.reference) == (16, "pad")
    assert config.model.normalize is False


def test_distributed_files_ask_for_what_they_promise() -> None:
    cpu = load_config(TrainConfig, [CONFIGS / "ddp_cpu.yaml"]).trainer
    assert (cpu.accelerator, cpu.devices, cpu.strategy) == ("cpu", 2, "ddp")
    gpu = load_config(TrainConfig, [CONFIGS / "multi_gpu.yaml"]).trainer
    assert (gpu.accelerator, gpu.strategy, gpu.precision) == ("gpu", "ddp", "bf16-mixed")


def test_every_field_has_a_docstring() -> None:
    tree = ast.parse(inspect.getsource(config_module))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) == 16
    for body in (node.body for node in classes):
        for index, node in enumerate(body):
            if isinstance(node, ast.AnnAssign):
                after = body[index + 1]
                assert isinstance(after, ast.Expr), ast.unparse(node)
                assert isinstance(after.value, ast.Constant), ast.unparse(node)


def test_a_list_without_constraint_says_what_its_items_are() -> None:
    with pytest.raises(
        InputError, match=r"`x` to be a list, each of it text or null, but got \[3\]"
    ):
        check_value("x", [3], list[str | None])


@pytest.mark.parametrize("schema", [TrainConfig, EvaluateConfig])
def test_every_key_rejects_what_no_key_takes(schema: type[Section], tmp_path: Path) -> None:
    for key in leaves(schema):
        *sections, name = key.split(".")
        text = f"{name}: {{a: 1}}"
        for section in reversed(sections):
            text = f"{section}: {{{text}}}"
        with pytest.raises(InputError, match=rf"Expected `{key}` to be .*\{{'a': 1\}}"):
            load_config(schema, [write(tmp_path, text)])
