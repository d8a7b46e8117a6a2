"""The README.md of exports: metadata that the hub takes, and text that says what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from models import tiny_folder, tiny_model
from sentence_transformers import SentenceTransformer
from test_training import overrides, train, write_pairs

from xsiam.config import TrainConfig, load_config
from xsiam.encoder import SiameseEncoder
from xsiam.model_card import model_card, public_name
from xsiam.training import TrainingResult, run_training

LICENSED = "---\nlicense: {}\nbase_model: org/base\n---\n# A model\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_folder(folder / "model")
    (folder / "model" / "README.md").write_text(LICENSED.format("apache-2.0"))
    for seed, (name, n) in enumerate({"train": 45, "validation": 23, "test": 21}.items()):
        write_pairs(folder / f"{name}.csv", n, seed)
    return folder


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    more = ["trainer.max_epochs=1", "attribution.layers=[2,3]", "attribution.n_pairs=3"]
    more += ["attribution.n_figures=0", "model.freeze_layers=1", "optimizer.layer_decay=0.9"]
    more += ["bend.weight=0.1"]
    return train(inputs, tmp_path_factory.mktemp("finished") / "run", *more)


@pytest.fixture(scope="module")
def text(finished: TrainingResult) -> str:
    return (finished.export / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results(finished: TrainingResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(finished.results_path.read_text())
    return found


def metadata(text: str) -> dict[str, Any]:
    """Return what the hub reads, by the hub's own parser, which must write it again unchanged."""
    card = ModelCard(text)
    assert card.content == text
    found: dict[str, Any] = card.data.to_dict()
    return found


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_metadata_of_a_run(text: str, finished: TrainingResult) -> None:
    found = metadata(text)
    assert found["library_name"] == "sentence-transformers"
    assert found["pipeline_tag"] == "sentence-similarity"
    assert {"xsiam", "sentence-transformers"} <= set(found["tags"])
    assert found["license"] == "apache-2.0"
    assert "base_model" not in found  # a folder is no name on the hub
    (entry,) = found["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "test.csv", "type": "unknown", "split": "test"}
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    keys = {f"{kind}_{name}" for kind in ("spearman", "pearson") for name in ("cosine", "dot")}
    assert values == {key: finished.metrics[f"test/{key}"] for key in keys}


def test_a_card_says_how_a_run_was_made_and_what_it_measured(
    text: str, finished: TrainingResult, results: dict[str, Any]
) -> None:
    for line in (
        "# `model-xsiam`",
        "* base model: `model`; license of the base: `apache-2.0`",
        "* reference: `uniform`, whose embedding is subtracted: folded into a Dense module",
        "* training: `train.csv`, 45 pairs",
        "* validation: `validation.csv`, 23 pairs",
        "* test: `test.csv`, 21 pairs",
        "* objective: `mse_cosine`",
        "* learning rate of a layer relative to the one above: 0.9",
        "* frozen: embeddings and the first 1 blocks",
        "* a term that keeps attribution paths straight, weight 0.1, at all layers",
        "* batch: 8 pairs",
        "* epochs: 1, 6 steps",
        "* precision: `32-true`, seed 0",
    ):
        assert f"\n{line}\n" in text, line
    assert "AdamW, learning rate 0.001, weight decay 0.01, warm-up over 0.1 of the steps" in text
    assert f"trained: {results['model']['trained_parameters']:,} of " in text
    for key in ("spearman_cosine", "loss"):
        val, test = (finished.metrics[f"{stage}/{key}"] for stage in ("val", "test"))
        assert f"| {key} | {val:.4f} | {test:.4f} |" in text
    for layer in (2, 3):
        prefix = f"attribution/layer_{layer}/completeness_error_"
        mean, largest = (finished.metrics[prefix + kind] for kind in ("mean", "max"))
        assert f"| {layer} | {mean:.1e} | {largest:.1e} | 100 % |" in text
    assert "On 3 validation pairs, tolerance 0.001." in text
    for name, version in results["versions"].items():
        assert f"{name} {version}" in text
    assert "\n\n\n" not in text


def test_a_card_tells_nothing_of_the_machine_or_the_texts(
    text: str, inputs: Path, finished: TrainingResult
) -> None:
    for folder in (inputs, finished.export, Path.home()):
        assert str(folder) not in text
    rows = (inputs / "train.csv").read_text().splitlines()[1:]
    assert not any(cell in text for row in rows for cell in row.split(",")[:2] if " " in cell)


def test_a_card_names_the_teacher_without_its_folder(inputs: Path, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "taught-by")
    more = ["objective.name=distillation", f"objective.teacher={tmp_path / 'taught-by'}"]
    run = train(inputs, tmp_path / "run", *more, "trainer.max_epochs=1", "attribution.layers=[]")
    text = (run.export / "README.md").read_text(encoding="utf-8")
    assert "* objective: `distillation`" in text
    assert "* teacher: `taught-by`" in text
    assert str(tmp_path) not in text


def test_facts_of_a_run_stand_beside_its_results(results: dict[str, Any], inputs: Path) -> None:
    assert results["data"]["train"] == {
        "source": str(inputs / "train.csv"),
        "split": None,
        "fraction": None,
        "n_pairs": 45,
        "labelled": True,
    }
    assert results["model"]["lora"] is None
    assert 0 < results["model"]["trained_parameters"] < results["model"]["parameters"]


def test_every_block_of_code_runs(finished: TrainingResult, text: str) -> None:
    code = blocks(text)
    assert len(code) == 2
    for block in code:
        exec(block.replace("MODEL", str(finished.export)), {})


def test_sentence_transformers_keeps_the_card(
    finished: TrainingResult, text: str, tmp_path: Path
) -> None:
    SentenceTransformer(str(finished.export), device="cpu").save(str(tmp_path))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_saving_writes_a_short_card(tmp_path: Path) -> None:
    SiameseEncoder(tiny_model(), reference="uniform").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    found = metadata(text)
    assert "model-index" not in found
    assert "license" not in found
    assert "* base model: not recorded; license of the base: unknown here" in text
    for section in ("## Data", "## Training", "## Results", "## Attribution error"):
        assert section not in text
    assert "\n\n\n" not in text
    for block in blocks(text):
        exec(block.replace("MODEL", str(tmp_path)), {})


def test_a_model_that_only_xsiam_loads_says_so(tmp_path: Path) -> None:
    SiameseEncoder(tiny_model(), reference="pad").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        "`pad`, whose embedding is subtracted and depends on the length: loads with xsiam" in text
    )
    (block,) = blocks(text)
    assert "SiameseEncoder" in block
    exec(block.replace("MODEL", str(tmp_path)), {})


def test_an_unshifted_model_claims_no_exact_split() -> None:
    text = model_card(SiameseEncoder(tiny_model(), shift=False, reference="uniform"))
    assert "splits exactly" not in text
    assert "It has no reference shift" in text
    assert len(blocks(text)) == 2


@pytest.mark.parametrize(
    ("card", "license_", "base"),
    [
        (LICENSED.format("mit"), "mit", "org/base"),
        (LICENSED.format("other"), None, "org/base"),  # it would need a name and a link
        (LICENSED.format("[mit, x]"), None, "org/base"),
        ("# no metadata", None, None),
        ("---\n{ : broken\n---\n", None, None),
        ("---\n- a\n- list\n---\n", None, None),
        ("---\n1: a\n---\n", None, None),
    ],
)
def test_the_card_of_the_base_is_read_for_its_license(
    tmp_path: Path, card: str, license_: str | None, base: str | None
) -> None:
    folder = tiny_folder(tmp_path / "model")
    (folder / "README.md").write_text(card)
    encoder = SiameseEncoder.from_pretrained(folder, reference="uniform")
    found = metadata(model_card(encoder))
    assert (found.get("license"), found.get("base_model")) == (license_, base)


EVIL = "`a` ``b`` <script>alert(1)</script>\n---\n# {{ 7 * 7 }} {% raw %} | [x](y) \u202e"


def test_what_users_write_is_shown_and_does_nothing(tmp_path: Path) -> None:
    encoder = SiameseEncoder(
        tiny_model(prompts={EVIL: EVIL, "query": "query : "}), shift=False, reference="pad"
    )
    text = model_card(encoder)
    metadata(text)
    assert '* prompt `query`: `"query : "`\n' in text
    (line,) = [line for line in text.splitlines() if "alert" in line]
    assert line.startswith("* prompt ``` `a`")
    assert "{{ 7 * 7 }} {% raw %} | [x](y)" in line
    spans = re.findall(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", line)
    assert [fence for fence, _ in spans] == ["```", "```"]
    outside = re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", line)
    assert outside == "* prompt : "
    assert "\u202e" not in text


def test_names_with_signs_of_their_own_are_escaped(inputs: Path, tmp_path: Path) -> None:
    odd = write_pairs(tmp_path / "a`b|<i>*c*.csv", 45, 0)
    arguments = overrides(inputs, tmp_path / "run", "trainer.max_steps=1", f"data.train={odd}")
    arguments += ["data.test=null", "data.test_fraction=0.2", "data.name=null"]
    result = run_training(load_config(TrainConfig, [], arguments))
    text = (result.export / "README.md").read_text(encoding="utf-8")
    metadata(text)
    assert "* training: ``a`b|<i>*c*.csv``, 36 pairs\n" in text
    assert "* test: ``a`b|<i>*c*.csv``, a fraction of 0.2 drawn by the seed, 9 pairs\n" in text
    assert "Not measured in this run." in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("owner/name", "owner/name"),
        ("/home/someone/models/mine/", "mine"),
        ("../mine", "mine"),
        ("~/mine", "mine"),
        (r"C:\models\mine", "mine"),
    ],
)
def test_only_the_last_part_of_a_path_is_shown(name: str, shown: str) -> None:
    assert public_name(name) == shown


def test_a_base_from_the_hub_is_named(finished: TrainingResult, results: dict[str, Any]) -> None:
    run = json.loads(json.dumps(results))
    run["config"]["model"]["name"] = "all-MiniLM-L6-v2"
    text = model_card(SiameseEncoder.from_pretrained(finished.export), run)
    found = metadata(text)
    assert found["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert "# `all-MiniLM-L6-v2-xsiam`" in text
