"""An evaluation from its configuration: scores, correlations, and how exact attributions are.

A layer is written as soon as it is finished, so that an evaluation that was stopped goes on with
the next one, and one that is repeated with other data or figures attributes nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

import xsiam
from xsiam.accuracy import layer_key, sample_pairs, summarise_values, values_of
from xsiam.attribution import PairAttributor
from xsiam.config import DataConfig, EvaluateConfig, save_config, to_dict
from xsiam.data import PairDataModule
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning, InputError, ModelError, TruncationWarning
from xsiam.history import SCHEMA_VERSION, finite, run_facts, write_results
from xsiam.losses import get_objective
from xsiam.metrics import pearson, spearman, undefined_reason
from xsiam.pairs import PairDataset
from xsiam.result import PairAttribution
from xsiam.split import evaluation_mode, features_to
from xsiam.tables import BUNDLED
from xsiam.texts import Truncations

__all__ = ["EvaluationResult", "evaluation_table", "run_evaluation"]

CATEGORY = "category"
"""Column by which mean scores are tabulated, where the pairs have it."""

GAP = 0.1
"""Difference of score and matrix sum that counts as large, in units of the score."""

_SCORES = ("cosine", "dot")
_PAIR_COLUMNS = ("sum", "residual", "completeness_error", "converged")
_PLAIN_WIDTH = 100  # columns of a table that goes to a file or a pipe


@dataclass(frozen=True)
class EvaluationResult:
    """Where an evaluation has left what.

    Attributes:
        results_path: `results.json`.
        pairs_path: `pairs.parquet`, one row a pair.
        figures: Heat maps, by layer and then by pair.
        metrics: The flat metrics of `results.json`.
        notes: What a reader of the metrics has to know, one sentence or two each.
    """

    results_path: Path
    pairs_path: Path
    figures: tuple[Path, ...]
    metrics: dict[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Scores:
    """Scores of all pairs, [n] float32 on the CPU."""

    cosine: Tensor
    dot: Tensor
    own: Tensor  # of the model's similarity


@dataclass(frozen=True)
class _Layer:
    """The attributions at one layer: a row of numbers a pair, and the examples in full."""

    rows: list[dict[str, Any]]
    examples: dict[int, PairAttribution]
    seconds: float
    notes: list[str]


def run_evaluation(config: EvaluateConfig) -> EvaluationResult:
    """Score all pairs, attribute a sample of them, write the results and print a table.

    Everything that can be wrong in configuration, model and data is checked before scoring begins.

    Args:
        config: The evaluation, see `xsiam.config.EvaluateConfig`.

    Returns:
        Where everything is, and the metrics.

    Raises:
        InputError: If the configuration or the data do not meet a constraint.
        ModelError: If the model cannot be loaded or used, or its scores are not finite.

    Warns:
        TruncationWarning: If a text is longer than the model's window.
    """
    output = Path(config.output_dir).expanduser()
    _check_output(output)
    encoder = _build_encoder(config, _device(config))
    notes: list[str] = []
    layers = _layers(config, encoder, notes)
    pairs = _load_pairs(config, encoder, notes)
    _prepare_output(output)
    save_config(config, output / "config.yaml")
    return _Evaluation(config, output, encoder, pairs, layers, notes).execute()


class _Evaluation:
    """One evaluation, when everything is loaded and checked."""

    def __init__(
        self,
        config: EvaluateConfig,
        output: Path,
        encoder: SiameseEncoder,
        pairs: PairDataset,
        layers: Sequence[int],
        notes: list[str],
    ) -> None:
        self.config = config
        self.output = output
        self.encoder = encoder
        self.pairs = pairs
        self.layers = layers
        self.notes = notes
        self.roles = (config.model.role_a, config.model.role_b)
        # A progress bar in a file or a pipe is noise.
        self.progress = config.progress_bar and sys.stdout.isatty()
        wanted = config.attribution
        self.sample = sample_pairs(len(pairs), wanted.n_pairs, wanted.seed) if layers else []
        self.reused: list[int] = []

    def execute(self) -> EvaluationResult:
        """Score, attribute, write, print."""
        start = time.monotonic()
        scores = self._score()
        metrics = self._correlations(scores)
        results: dict[int, _Layer] = {}
        for layer in self.layers:
            results[layer] = found = self._stored(layer) or self._attribute(layer)
            self.notes += found.notes
            metrics |= _layer_metrics(layer, found)
        for key in sorted(metrics.keys() - finite(metrics).keys()):
            self.notes.append(f"`{key}` is {metrics[key]}; it is left out.")
        metrics = finite(metrics)
        pairs_path = self.output / "pairs.parquet"
        _write_parquet(pairs_path, self._pair_table(scores, results))
        if results:
            _write_json(self.output / "strongest_pairs.json", self._strongest(scores, results))
        figures = self._draw(results)
        categories = self._categories(scores)
        facts = {
            "notes": self.notes,
            "categories": categories,
            "duration_seconds": time.monotonic() - start,
            **self._facts(),
        }
        write_results(self.output / "results.json", metrics, facts)
        result = EvaluationResult(
            self.output / "results.json", pairs_path, figures, metrics, tuple(self.notes)
        )
        _print(result, self.layers, categories, f"{self.config.checkpoint} on {self.pairs.name}")
        return result

    # -- scores ---------------------------------------------------------------------------------

    def _score(self) -> _Scores:
        """Score all pairs; each distinct text is embedded once."""
        sides = [(self.pairs.texts_a, self.roles[0]), (self.pairs.texts_b, self.roles[1])]
        keys = [(text, role) for texts, role in sides for text in texts]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TruncationWarning)
            embeddings = self._embed(list(dict.fromkeys(keys)))
        for warning in caught:
            if issubclass(warning.category, TruncationWarning):
                self.notes.append(str(warning.message))
            _warn_again(warning)
        n = len(self.pairs)
        a = torch.stack([embeddings[key] for key in keys[:n]])
        b = torch.stack([embeddings[key] for key in keys[n:]])
        cosine, dot = torch.nn.functional.cosine_similarity(a, b, dim=-1), (a * b).sum(dim=-1)
        bad = (~torch.isfinite(dot)).nonzero().flatten().tolist()
        if bad:
            raise ModelError(
                f"Expected finite scores, but {len(bad)} of {n} are not, the first that of pair "
                f"{bad[0]} ({dot[bad[0]]}). Check the model's weights, or set another `checkpoint`."
            )
        return _Scores(cosine, dot, cosine if self.encoder.similarity == "cos" else dot)

    def _embed(
        self, keys: Sequence[tuple[str, str | None]]
    ) -> dict[tuple[str, str | None], Tensor]:
        """Embed texts in batches of one role and of similar lengths, float32 or more."""
        size = self.config.data.eval_batch_size
        batches = []
        for role in dict.fromkeys(role for _, role in keys):
            texts = sorted((text for text, r in keys if r == role), key=len, reverse=True)
            batches += [(texts[i : i + size], role) for i in range(0, len(texts), size)]
        embeddings: dict[tuple[str, str | None], Tensor] = {}
        encoder = self.encoder
        with torch.no_grad(), evaluation_mode(encoder), Truncations(encoder) as truncations:
            for texts, role in track(batches, "embedding texts", disable=not self.progress):
                features = encoder.preprocess_with(truncations, texts, role)
                rows = encoder(features_to(features, encoder.device)).cpu()
                rows = rows if rows.dtype == torch.float64 else rows.float()
                embeddings |= {(t, role): row for t, row in zip(texts, rows, strict=True)}
        return embeddings

    def _correlations(self, scores: _Scores) -> dict[str, float]:
        """Correlate both scores with the labels; say why where that is undefined."""
        if self.pairs.labels is None:
            self.notes.append("The pairs have no labels: correlations are left out.")
            return {}
        metrics = {}
        labels = torch.tensor(self.pairs.labels, dtype=torch.float64)
        for name in _SCORES:
            values = getattr(scores, name)
            reason = undefined_reason(values, labels)
            if reason is not None:
                self.notes.append(
                    f"`test/spearman_{name}` and `test/pearson_{name}` are undefined: {reason}."
                )
                continue
            metrics[f"test/spearman_{name}"] = float(spearman(values, labels))
            metrics[f"test/pearson_{name}"] = float(pearson(values, labels))
        return metrics

    # -- attributions ---------------------------------------------------------------------------

    @property
    def example_rows(self) -> list[int]:
        """Row numbers of the pairs that are shown one by one."""
        return self.sample[: self.config.n_examples]

    def _attribute(self, layer: int) -> _Layer:
        """Attribute the sample at a layer and write it down."""
        chosen = self.pairs.select(self.sample)
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            warnings.simplefilter("ignore", TruncationWarning)  # said when all texts were scored
            attributor = PairAttributor(self.encoder, layer, **_attributor_settings(self.config))
            results = attributor.attribute(
                chosen.texts_a, chosen.texts_b, *self.roles, progress=self.progress
            )
        notes = []
        for warning in caught:
            if issubclass(warning.category, ConvergenceWarning):
                notes.append(str(warning.message))
            else:
                _warn_again(warning)
        found = _Layer(
            rows=[_row(i, result) for i, result in zip(self.sample, results, strict=True)],
            examples=dict(zip(self.example_rows, results, strict=False)),
            seconds=time.monotonic() - start,
            notes=notes,
        )
        self._store(layer, found)
        return found

    def _paths(self, layer: int) -> tuple[Path, Path]:
        """Return the file of a layer's rows, and the folder of its examples."""
        folder = self.output / "attributions" / f"layer_{layer}"
        return folder.with_suffix(".parquet"), folder

    def _store(self, layer: int, found: _Layer) -> None:
        """Write a layer; the rows come last, since they say that it is finished."""
        path, folder = self._paths(layer)
        path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for row, result in found.examples.items():
            result.save(folder / f"pair_{row}.safetensors")
        facts = {
            "schema_version": SCHEMA_VERSION,
            "settings_hash": self._settings_hash(layer),
            "model_fingerprint": self.encoder.model_fingerprint,
            "examples": list(found.examples),
            "seconds": found.seconds,
            "notes": found.notes,
        }
        table = pa.Table.from_pylist(found.rows)
        _write_parquet(path, table.replace_schema_metadata({"xsiam": json.dumps(facts)}))

    def _stored(self, layer: int) -> _Layer | None:
        """Return a layer that was computed before from the same model, pairs and settings."""
        path, folder = self._paths(layer)
        if not path.is_file():
            return None
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            self.notes.append(
                f"Layer {layer} is computed anew: {path.name} cannot be read ({error})."
            )
            return None
        facts = json.loads((table.schema.metadata or {}).get(b"xsiam", b"{}"))
        wanted = self.example_rows
        if facts.get("settings_hash") != self._settings_hash(layer):
            return None
        files = {row: folder / f"pair_{row}.safetensors" for row in wanted}
        if not set(wanted) <= set(facts["examples"]) or not all(
            f.is_file() for f in files.values()
        ):
            return None
        self.reused.append(layer)
        said = f"Layer {layer} is reused from an earlier run with the same settings ({path.name})."
        examples = {row: PairAttribution.load(file) for row, file in files.items()}
        return _Layer(table.to_pylist(), examples, facts["seconds"], [said, *facts["notes"]])

    def _settings_hash(self, layer: int) -> str:
        """Return a digest of everything that the numbers of a layer depend on."""
        encoder, chosen = self.encoder, self.pairs.select(self.sample)
        settings = _attributor_settings(self.config)
        del settings["memory_budget"]  # never changes numbers
        content = {
            "xsiam": xsiam.__version__,
            "schema_version": SCHEMA_VERSION,
            "layer": layer,
            "attribution": settings,
            "model": [encoder.model_fingerprint, repr(encoder.model), str(encoder.dtype)],
            "head": [encoder.similarity, encoder.shift, encoder.reference.name, encoder.normalize],
            "texts": [encoder.max_length, encoder.model.truncate_dim],
            "prompts": [encoder.model.prompts, encoder.model.default_prompt_name, self.roles],
            "pairs": [self.sample, chosen.texts_a, chosen.texts_b],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    # -- what is written ------------------------------------------------------------------------

    def _pair_table(self, scores: _Scores, results: Mapping[int, _Layer]) -> pa.Table:
        """Return one row a pair; what was not attributed is null there."""
        pairs = self.pairs
        columns: dict[str, Any] = {
            "index": pa.array(range(len(pairs)), pa.int64()),
            "text_a": pa.array(pairs.texts_a, pa.string()),
            "text_b": pa.array(pairs.texts_b, pa.string()),
            "score_cosine": scores.cosine.numpy(),
            "score_dot": scores.dot.numpy(),
            "score": scores.own.numpy(),
            "label": _labels_array(pairs),
        }
        for layer, found in results.items():
            by_index = {row["index"]: row for row in found.rows}
            for name in _PAIR_COLUMNS:
                columns[f"layer_{layer}_{name}"] = pa.array(
                    [by_index.get(i, {}).get(name) for i in range(len(pairs))]
                )
        for name, values in pairs.extra.items():
            while name in columns:
                name = f"extra_{name}"
            columns[name] = _any_array(values)
        return pa.table(columns)

    def _strongest(self, scores: _Scores, results: Mapping[int, _Layer]) -> dict[str, Any]:
        """Return the strongest token pairs of the examples, at every layer."""
        entries = []
        for index in self.example_rows:
            layers = {}
            for layer, found in results.items():
                result = found.examples[index]
                layers[f"layer_{layer}"] = {
                    "sum": float(result.matrix.sum()),
                    "residual": result.residual,
                    "completeness_error": result.completeness_error,
                    "converged": result.converged,
                    "token_pairs": [p._asdict() for p in result.top_pairs(self.config.top_k)],
                }
            entry = {
                "index": index,
                "text_a": self.pairs.texts_a[index],
                "text_b": self.pairs.texts_b[index],
                "score": float(scores.own[index]),
                "label": None if self.pairs.labels is None else self.pairs.labels[index],
            }
            entries.append({**entry, **layers})
        return {"schema_version": SCHEMA_VERSION, "top_k": self.config.top_k, "pairs": entries}

    def _draw(self, results: Mapping[int, _Layer]) -> tuple[Path, ...]:
        """Draw the examples at every layer."""
        if not any(found.examples for found in results.values()):
            return ()
        from xsiam.plots import plot_attribution, save_figure  # matplotlib is slow to import

        paths = []
        (self.output / "figures").mkdir(exist_ok=True)
        for layer, found in results.items():
            for index, result in found.examples.items():
                path = self.output / "figures" / f"layer_{layer}_pair_{index}.png"
                save_figure(plot_attribution(result)[0], path)
                paths.append(path)
        return tuple(paths)

    def _categories(self, scores: _Scores) -> dict[str, dict[str, float]]:
        """Return the number of pairs, mean score and mean label of each category."""
        groups: dict[str, list[int]] = {}
        for index, category in enumerate(self.pairs.extra.get(CATEGORY, [])):
            groups.setdefault("" if category is None else str(category), []).append(index)
        table = {}
        for category, rows in sorted(groups.items()):
            table[category] = {"n_pairs": len(rows), "score_mean": float(scores.own[rows].mean())}
            if self.pairs.labels is not None:
                labels = [self.pairs.labels[row] for row in rows]
                table[category]["label_mean"] = sum(labels) / len(labels)
        return table

    def _facts(self) -> dict[str, Any]:
        encoder = self.encoder
        return {
            **run_facts(),
            "config": to_dict(self.config),
            "model": {
                "name": self.config.checkpoint,
                "architecture": encoder.split.name,
                "fingerprint": encoder.model_fingerprint,
                "n_layers": encoder.n_layers,
                "embedding_dim": encoder.embedding_dim,
                "similarity": encoder.similarity,
                "shift": encoder.shift,
                "reference": encoder.reference.name,
                "normalize": encoder.normalize,
            },
            "data": {
                "name": self.pairs.name,
                "n_pairs": len(self.pairs),
                "labelled": self.pairs.labels is not None,
            },
            "attribution": {
                "layers": list(self.layers),
                "reused_layers": self.reused,
                "pairs": self.sample,
            },
        }


# -- checks before long work ----------------------------------------------------------------------


def _check_output(output: Path) -> None:
    """Raise InputError where the output folder cannot be written, or holds something else."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(
            f"Expected `output_dir` to be a folder, but {str(existing)!r} is a file. "
            "Set `output_dir`."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"Expected `output_dir` to be writable, but {str(existing)!r} is not. Set `output_dir`."
        )
    if (output / "checkpoints").exists():
        raise InputError(
            f"Expected `output_dir` to be a folder for evaluations, but {str(output)!r} holds a "
            "training run, whose results would be overwritten. Set `output_dir`."
        )


def _prepare_output(output: Path) -> None:
    """Make the folder, and remove what an earlier evaluation wrote, but for finished layers."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Expected `output_dir` to be writable, but making {str(output)!r} failed: {error}. "
            "Set `output_dir`."
        ) from error
    # The presence of results says that an evaluation is finished.
    for name in ("results.json", "pairs.parquet", "strongest_pairs.json"):
        (output / name).unlink(missing_ok=True)
    for figure in (output / "figures").glob("layer_*_pair_*.png"):
        figure.unlink()


def _device(config: EvaluateConfig) -> torch.device:
    """Return the device of an evaluation, which is one process on one device."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    kind = config.accelerator.lower()
    found = {
        "auto": "cuda" if cuda else "cpu",
        "cpu": "cpu",
        "gpu": "cuda" if cuda else "mps" if mps else None,
        "cuda": "cuda" if cuda else None,
        "mps": "mps" if mps else None,
    }
    if kind not in found:
        raise InputError(
            f"Expected `accelerator` to be one of {', '.join(found)}, but got "
            f"{config.accelerator!r}. Set `accelerator`."
        )
    name = found[kind]
    if name is None:
        raise InputError(
            f"Expected `accelerator` to be there, but got {config.accelerator!r} and this machine "
            "has no such device that PyTorch can use. Set `accelerator=cpu` or `auto`."
        )
    if config.devices not in (1, "auto"):
        raise InputError(
            "Expected `devices` to be 1, since an evaluation runs in one process, but got "
            f"{config.devices!r}. Set `devices=1`."
        )
    return torch.device(name)


def _build_encoder(config: EvaluateConfig, device: torch.device) -> SiameseEncoder:
    """Load the checkpoint's encoder with what the configuration replaces."""
    settings = asdict(config.model)
    roles = [settings.pop(name) for name in ("role_a", "role_b")]
    prompt = settings.pop("prompt")
    named = {} if prompt is None else {"default": prompt}
    encoder = SiameseEncoder.from_pretrained(
        config.checkpoint,
        **settings,
        prompts=named or None,
        default_prompt_name="default" if named else None,
        device=device,
    )
    for role in roles:
        encoder.check_role(role)
    return encoder


def _layers(config: EvaluateConfig, encoder: SiameseEncoder, notes: list[str]) -> list[int]:
    """Return the layers to attribute at, all of them checked, with the settings to do it by."""
    if not config.attribution.enabled:
        return []
    layers = list(config.attribution.layers)
    if not layers:
        layers = [max(encoder.n_layers - 1, 0)]
        notes.append(
            f"No layer was given: attributions are at layer {layers[0]}, the input of the last "
            "block. Set `attribution.layers` for others."
        )
    for layer in layers:
        encoder.check_layer(layer, key="attribution.layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # of its own probe texts
        PairAttributor(encoder, layers[0], **_attributor_settings(config))  # refuses what it cannot
    return layers


def _load_pairs(config: EvaluateConfig, encoder: SiameseEncoder, notes: list[str]) -> PairDataset:
    """Return the test pairs, all of them read and checked; without any the bundled ones."""
    data = config.data
    sources = (data.train, data.validation, data.test, data.name)
    if all(source is None for source in sources):
        data = replace(data, name=BUNDLED)
        notes.append(
            "No pairs were given: these are the bundled test pairs. Set `data.test` for others."
        )
    return _data_module(data, config, encoder).pairs("test")


def _data_module(
    data: DataConfig, config: EvaluateConfig, encoder: SiameseEncoder
) -> PairDataModule:
    # The labels that training would take for this similarity: the same file, the same check.
    objective = get_objective("mse_cosine" if encoder.similarity == "cos" else "mse_dot")
    return PairDataModule(
        encoder.preprocess,
        **asdict(data),
        seed=config.seed,
        role_a=config.model.role_a,
        role_b=config.model.role_b,
        needs_label=False,
        expected_range=objective.label_range,
    )


# -- numbers --------------------------------------------------------------------------------------


def _attributor_settings(config: EvaluateConfig) -> dict[str, Any]:
    """Return the arguments of `PairAttributor` that are configured."""
    names = ("tolerance", "quadrature", "n_nodes", "max_nodes", "memory_budget", "time_budget")
    return {name: getattr(config.attribution, name) for name in names}


def _row(index: int, result: PairAttribution) -> dict[str, Any]:
    """Return the numbers of one pair; ``n_nodes`` is the mean of both texts."""
    names = ("score", "attributed_score", "residual", "convergence_delta", "completeness_error_a",
             "completeness_error_b", "token_error", "n_nodes_a", "n_nodes_b")  # fmt: skip
    return {
        "index": index,
        "sum": float(result.matrix.sum()),
        **{name: getattr(result, name) for name in names},
        "main_effects_a": float(result.main_effects_a.sum()),
        "main_effects_b": float(result.main_effects_b.sum()),
        "main_effects_a_abs": float(result.main_effects_a.abs().sum()),
        "main_effects_b_abs": float(result.main_effects_b.abs().sum()),
        **values_of(result),
        "converged": result.converged,
    }


def _layer_metrics(layer: int, found: _Layer) -> dict[str, float]:
    """Return accuracy and reference terms of a layer, over the sampled pairs."""
    rows = found.rows
    accuracy = summarise_values(rows, found.seconds)
    gaps = [abs(row["score"] - row["sum"]) for row in rows]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    terms = {
        "main_effects_a_abs_sum_mean": mean([row["main_effects_a_abs"] for row in rows]),
        "main_effects_b_abs_sum_mean": mean([row["main_effects_b_abs"] for row in rows]),
        "intercept_mean": mean([row["intercept"] for row in rows]),
        "score_minus_sum_abs_mean": mean(gaps),
        f"score_minus_sum_above_{GAP}_share": mean([float(gap > GAP) for gap in gaps]),
    }
    metrics = {layer_key(layer, name): value for name, value in accuracy.items()}
    return metrics | {f"reference_terms/layer_{layer}/{name}": v for name, v in terms.items()}


# -- files and table ------------------------------------------------------------------------------


def _write_parquet(path: Path, table: pa.Table) -> None:
    """Write a file that appears as a whole or not at all."""
    part = path.with_suffix(".parquet.part")
    pq.write_table(table, part)
    part.replace(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _labels_array(pairs: PairDataset) -> pa.Array:
    if pairs.labels is None:
        return pa.nulls(len(pairs), pa.float64())
    return pa.array(pairs.labels, pa.float64())


def _any_array(values: Sequence[Any]) -> pa.Array:
    """Return a column of whatever type; as texts where the cells have several."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])


def _warn_again(warning: warnings.WarningMessage) -> None:
    """Show a warning that was caught only to look at it."""
    warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def evaluation_table(metrics: Mapping[str, float], layers: Sequence[int]) -> Table:
    """Return a table of flat metrics: one column a layer, and one for what concerns all pairs.

    Args:
        metrics: As in `results.json`.
        layers: The layers, in the order of the columns.
    """
    table = Table("metric")
    plain = [key for key in metrics if key.startswith("test/")]
    columns = ["all pairs"] * bool(plain) + [f"layer {layer}" for layer in layers]
    for column in columns:
        table.add_column(column, justify="right")
    for key in plain:
        table.add_row(key, _number(metrics[key]), *[""] * len(layers))
    names = [
        key.replace(f"/layer_{layers[0]}/", "/layer_*/")
        for key in metrics
        if layers and f"/layer_{layers[0]}/" in key
    ]
    for name in names:
        cells = [_number(metrics.get(name.replace("*", str(layer)))) for layer in layers]
        table.add_row(name.replace("/layer_*/", "/"), *[""] * bool(plain), *cells)
    return table


def _number(value: float | None) -> str:
    """Return four digits, or as many as a small number needs."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _print(
    result: EvaluationResult,
    layers: Sequence[int],
    categories: Mapping[str, Mapping[str, float]],
    title: str,
) -> None:
    """Print tables, notes and places to stdout, whatever it is."""
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    if result.metrics:
        console.print(evaluation_table(result.metrics, layers))
    if categories:
        table = Table("category")
        for column in ("pairs", "mean score", "mean label"):
            table.add_column(column, justify="right")
        for name, row in categories.items():
            means = [_number(row.get(key)) for key in ("score_mean", "label_mean")]
            table.add_row(Text(name), str(row["n_pairs"]), *means)
        console.print(table)
    places = [f"results: {result.results_path}", f"pairs: {result.pairs_path}"]
    if result.figures:
        places.append(f"heat maps: {result.figures[0].parent}")
    for line in [*(f"note: {note}" for note in result.notes), *places]:
        console.print(line, markup=False, soft_wrap=True)
