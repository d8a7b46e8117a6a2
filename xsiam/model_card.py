"""The README.md of an exported model: what it is, how it was made, how to load it.

It holds no text of the data and no folder of the machine, and what comes from users (names of
files and models, prompts) stands in code spans, where Markdown and HTML mean nothing. Plain
sentence-transformers keeps this card when it saves the model again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentence_transformers
import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

import xsiam
from xsiam.pretrained import hub_name

if TYPE_CHECKING:
    from xsiam.encoder import SiameseEncoder

__all__ = ["model_card", "public_name"]

_TASKS = {
    "spearman_cosine": ("semantic-similarity", "Spearman correlation of the cosine"),
    "spearman_dot": ("semantic-similarity", "Spearman correlation of the dot product"),
    "pearson_cosine": ("semantic-similarity", "Pearson correlation of the cosine"),
    "pearson_dot": ("semantic-similarity", "Pearson correlation of the dot product"),
    "mrr@10": ("information-retrieval", "Mean reciprocal rank at 10"),
    "ndcg@10": ("information-retrieval", "NDCG at 10"),
    "recall@1": ("information-retrieval", "Recall at 1"),
    "recall@10": ("information-retrieval", "Recall at 10"),
}
_SPLITS = {"train": "training", "validation": "validation", "test": "test"}
_STAGES = {"val": "validation", "test": "test"}
_LAYER_KEYS = ("completeness_error_mean", "completeness_error_max", "converged_fraction")

_TEMPLATE = """\
# {{ title | code }}

A Siamese text encoder, exported by xsiam {{ versions.xsiam }}.
{% if encoder.shift %}
Its score splits exactly into contributions of token pairs.
{% else %}
It has no reference shift: token attributions need main effects and an intercept beside the pairs.
{% endif %}

* base model: {{ base | code if base else "not recorded" }}; license of the base: \
{{ license | code if license else "unknown here" }}
* architecture: {{ encoder.split.name }}, {{ encoder.n_layers }} layers, \
{{ encoder.embedding_dim }} dimensions
{% if encoder.max_length %}
* window: {{ encoder.max_length }} tokens
{% endif %}
* score: {{ "cosine similarity" if encoder.similarity == "cos" else "dot product" }}\
{{ " of normalised embeddings" if encoder.normalize and encoder.similarity == "dot" }}
* reference: {{ encoder.reference.name | code }}, {{ shift }}
{% for name, prompt in prompts %}
* prompt {{ name | code }}: {{ prompt | json | code }}
{% endfor %}

## Use

`MODEL` stands for this folder or, once uploaded, the model's name on the hub.

{% if is_plain %}
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("MODEL")
embeddings = model.encode(["A cat sleeps.", "The kitten naps."])
print(model.similarity(embeddings, embeddings))
```

Token-pair contributions need the package xsiam:

{% endif %}
```python
from xsiam import PairAttributor, SiameseEncoder

encoder = SiameseEncoder.from_pretrained("MODEL")
result = PairAttributor(encoder, layer={{ layer }}).attribute("A cat sleeps.", "The kitten naps.")
print(result.score, result.matrix.sum(), result.completeness_error)
```
{% if run %}

## Data

{% for split, facts in run.data.items() %}
* {{ splits[split] }}: {{ facts.source | public | code }}\
{% if facts.split %}, split {{ facts.split | code }}{% endif %}\
{% if facts.fraction %}, a fraction of {{ facts.fraction }} drawn by the seed{% endif %}, \
{{ facts.n_pairs }} pairs{{ "" if facts.labelled else " without labels" }}
{% endfor %}

## Training

* objective: {{ run.config.objective.name | code }}\
{% for key, value in options %}, {{ key }} {{ value }}{% endfor %}

{% if run.teacher %}
* teacher: {{ run.teacher.name | public | code }}
{% endif %}
* optimiser: AdamW, learning rate {{ optimizer.learning_rate }}, weight decay \
{{ optimizer.weight_decay }}, warm-up over {{ optimizer.warmup_fraction }} of the steps, then \
{{ "linear decay to 0" if optimizer.schedule == "linear" else optimizer.schedule }}
{% if optimizer.layer_decay is not none %}
* learning rate of a layer relative to the one above: {{ optimizer.layer_decay }}
{% endif %}
{% if run.config.model.freeze_layers %}
* frozen: embeddings and the first {{ run.config.model.freeze_layers }} blocks
{% endif %}
{% if run.config.model.train_reference %}
* the vector of the reference was trained with the weights
{% endif %}
{% if run.config.bend.weight %}
* a term that keeps attribution paths straight, weight {{ run.config.bend.weight }}, \
{{ "at all layers" if run.config.bend.layer is none else "at layer %d" % run.config.bend.layer }}
{% endif %}
{% if run.model.lora %}
* LoRA, merged here: rank {{ run.model.lora.r }}, alpha {{ run.model.lora.alpha }}, dropout \
{{ run.model.lora.dropout }}, targets {{ run.model.lora.target_modules | join(", ") | code }}
{% endif %}
* trained: {{ "{:,}".format(run.model.trained_parameters) }} of \
{{ "{:,}".format(run.model.parameters) }} parameters
* batch: {{ run.config.data.batch_size }} pairs\
{% if run.processes > 1 %} on each of {{ run.processes }} processes{% endif %}\
{% if accumulated > 1 %}, gradients of {{ accumulated }} batches added up{% endif %}

* epochs: {{ run.epochs }}, {{ run.steps }} steps
* precision: {{ run.config.trainer.precision | code }}, seed {{ run.seed }}

## Results

{% if metrics %}
| metric | {{ stages.values() | join(" | ") }} |
|---|{{ "--:|" * (stages | length) }}
{% for key, values in metrics.items() %}
| {{ key }} | {{ values | join(" | ") }} |
{% endfor %}

Validation figures are those of the exported weights\
{% if run.best.monitor %}, which were chosen by {{ run.best.monitor | code }}{% endif %}.
{% else %}
Nothing was measured.
{% endif %}

## Attribution error

{% if layers %}
On {{ n_attributed }} validation pairs, tolerance {{ run.config.attribution.tolerance }}. The \
completeness error is how far the token vectors of a text are from summing to their known total, \
relative to it.

| layer | mean | largest | converged |
|--:|--:|--:|--:|
{% for number, mean, largest, converged in layers %}
| {{ number }} | {{ "%.1e" % mean }} | {{ "%.1e" % largest }} | {{ "%.0f" % (100 * converged) }} % |
{% endfor %}
{% else %}
Not measured in this run.
{% endif %}
{% endif %}

## Versions

{% for name, version in versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}\
{% endfor %}.
"""


def model_card(encoder: SiameseEncoder, run: Mapping[str, Any] | None = None) -> str:
    """Return a card in Markdown, with metadata that the hub understands.

    Args:
        encoder: The model that was exported.
        run: What `results.json` of its training run holds; None for a model that was just saved.
    """
    stated = _stated(encoder)
    on_hub, base = stated.get("base_model"), stated.get("base_model")
    if run is not None:
        name = run["config"]["model"]["name"]
        on_hub, base = hub_name(name), hub_name(name) or public_name(name)
    title = f"{(base or encoder.split.name).rpartition('/')[2]}-xsiam"
    license_ = stated.get("license")
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "xsiam"],
        license=None if license_ == "other" else license_,  # which would need a name and a link
        base_model=on_hub,
        model_name=title,
        eval_results=None if run is None else _eval_results(run),
    )
    environment = Environment(trim_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters |= {"code": _code, "json": _json, "public": public_name}
    values = {"encoder": encoder, "title": title, "base": base, "license": license_}
    values |= _encoder_values(encoder)
    values |= {"run": None, "versions": _versions()} if run is None else _run_values(run)
    body = environment.from_string(_TEMPLATE).render(values)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}".rstrip() + "\n"))


def public_name(name: str) -> str:
    """Return a name that may be shown to others: of a path only its last part."""
    is_path = Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or "\\" in name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_path else name


def _code(text: Any) -> str:
    """Return a code span that shows a text as it is, on one line, whatever it holds."""
    shown = "".join(c if c.isprintable() else " " for c in str(text)).strip() or "(empty)"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _json(text: str) -> str:
    """Return a text between quotes, its blanks and line ends visible."""
    return json.dumps(text, ensure_ascii=False)


def _stated(encoder: SiameseEncoder) -> dict[str, str]:
    """Return what the card of the model that was loaded states: license and base model."""
    text = getattr(encoder.model, "_model_card_text", None) or ""
    if not text.startswith("---"):
        return {}
    try:
        found = ModelCard(text, ignore_metadata_errors=True).data
    except (ValueError, TypeError, yaml.YAMLError):
        return {}  # it says nothing that can be read
    values = {key: found.get(key) for key in ("license", "base_model")}
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _encoder_values(encoder: SiameseEncoder) -> dict[str, Any]:
    """Return what the template needs to know of a model."""
    is_plain = not encoder.shift or encoder.reference.length_free
    if not encoder.shift:
        shift = "where attributions start; nothing is subtracted"
    elif is_plain:
        shift = "whose embedding is subtracted: folded into a Dense module"
    else:
        shift = "whose embedding is subtracted and depends on the length: loads with xsiam only"
    prompts = [(name, prompt) for name, prompt in encoder.model.prompts.items() if prompt]
    layer = max(0, encoder.n_layers - 2)
    return {"is_plain": is_plain, "shift": shift, "prompts": prompts, "layer": layer}


def _run_values(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template needs to know of a training run."""
    config, metrics = run["config"], run["metrics"]
    stages = {key: name for key, name in _STAGES.items() if _of_stage(metrics, key)}
    names = dict.fromkeys(name for stage in stages for name in _of_stage(metrics, stage))
    options = {
        key: value
        for key, value in config["objective"].items()
        if key not in ("name", "teacher") and value is not None
    }
    validation = run["data"].get("validation", {}).get("n_pairs", 0)
    return {
        "run": run,
        "splits": _SPLITS,
        "options": list(options.items()),
        "optimizer": config["optimizer"],
        "accumulated": config["trainer"]["accumulate_grad_batches"],
        "stages": stages,
        "metrics": {
            name: [_number(metrics.get(f"{stage}/{name}")) for stage in stages] for name in names
        },
        "layers": _layers(run),
        "n_attributed": min(config["attribution"]["n_pairs"], validation),
        "versions": run["versions"],
    }


def _of_stage(metrics: Mapping[str, float], stage: str) -> dict[str, float]:
    """Return the metrics of a stage without its prefix."""
    prefix = f"{stage}/"
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _layers(run: Mapping[str, Any]) -> list[tuple[float, ...]]:
    """Return number, errors and converged share of every layer that the run has measured."""
    metrics, found = run["metrics"], []
    for layer in run["config"]["attribution"]["layers"]:
        values = [metrics.get(f"attribution/layer_{layer}/{key}") for key in _LAYER_KEYS]
        if None not in values:
            found.append((layer, *values))
    return found


def _eval_results(run: Mapping[str, Any]) -> list[EvalResult] | None:
    """Return the figures of the test, else of the validation, as the hub lists them."""
    for stage in ("test", "val"):
        values = {k: v for k, v in _of_stage(run["metrics"], stage).items() if k in _TASKS}
        if values:
            source = public_name(run["data"].get(_STAGES[stage], {}).get("source", "unknown"))
            return [
                EvalResult(
                    task_type=_TASKS[key][0],
                    dataset_type="unknown",
                    dataset_name=source,
                    dataset_split=_STAGES[stage],
                    metric_type=re.sub(r"\W", "_", key),
                    metric_name=_TASKS[key][1],
                    metric_value=value,
                )
                for key, value in values.items()
            ]
    return None


def _versions() -> dict[str, str]:
    """Return the versions that an export follows from."""
    return {
        "xsiam": xsiam.__version__,
        "sentence-transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
