"""An evaluation from its configuration: scores, correlations, and how exact attributions are.

A layer is written as soon as it is finished, so that an evaluation that was stopped goes on with
the next one, and one that is repeated with other data or figures attributes nothing twice.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from xsiam.accuracy import sample_pairs
from xsiam.analysis import summary_of
from xsiam.analysis.storage import Outcome, analysis_metrics
from xsiam.attribution import PairAttributor
from xsiam.checks import (
    check_evaluation_output,
    prepare_evaluation_output,
)
from xsiam.config import EvaluateConfig, save_config, to_dict
from xsiam.embedding import embed_texts
from xsiam.encoder import SiameseEncoder
from xsiam.errors import ConvergenceWarning, ModelError, TruncationWarning
from xsiam.evaluation_inputs import (
    build_encoder,
    evaluation_device,
    layers_to_attribute,
    load_test_pairs,
    plan_analyses,
)
from xsiam.history import SCHEMA_VERSION, finite, run_facts, write_results
from xsiam.index_building import process_of
from xsiam.layer_store import (
    LayerResults,
    LayerStore,
    attributor_settings,
    layer_metrics,
    row_of,
    write_parquet,
)
from xsiam.metrics import pearson, spearman, undefined_reason
from xsiam.pairs import PairDataset
from xsiam.processes import processes
from xsiam.report import print_evaluation

__all__ = ["EvaluationResult", "run_evaluation"]

CATEGORY = "category"
"""Column by which mean scores are tabulated, where the pairs have it."""

_SCORES = ("cosine", "dot")
# Columns of `pairs.parquet` for each layer, of those that `row_of` returns.
_PAIR_COLUMNS = (
    "score", "sum", "main_effects_a", "main_effects_b", "intercept", "residual",
    "convergence_delta", "completeness_error", "completeness_error_a", "completeness_error_b",
    "token_error", "converged", "n_nodes_a", "n_nodes_b",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluationResult:
    """Where an evaluation has left what.

    Attributes:
        results_path: `results.json`.
        pairs_path: `pairs.parquet`, one row a pair.
        figures: Heat maps, by layer and then by pair.
        metrics: The flat metrics of `results.json`.
        notes: What a reader of the metrics has to know, one sentence or two each.
        summary_path: `summary.md` of the analyses, None where none were asked for.
        failed: Names of analyses that ended with an error, which is in the summary.
    """

    results_path: Path
    pairs_path: Path
    figures: tuple[Path, ...]
    metrics: dict[str, float]
    notes: tuple[str, ...]
    summary_path: Path | None = None
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Scores:
    """Scores of all pairs, [n] float32 on the CPU."""

    cosine: Tensor
    dot: Tensor
    own: Tensor  # of the model's similarity


def run_evaluation(config: EvaluateConfig) -> EvaluationResult | None:
    """Score all pairs, attribute a sample of them, make the analyses, and write it all down.

    Everything that can be wrong in configuration, model and data is checked before scoring begins.
    Of the processes that torchrun starts, all share the work of the analyses, and the first does
    the rest.

    Args:
        config: The evaluation, see `xsiam.config.EvaluateConfig`.

    Returns:
        Where everything is, and the metrics; None in all processes but the first.

    Raises:
        InputError: If the configuration or the data do not meet a constraint.
        ModelError: If the model cannot be loaded or used, or its scores are not finite.

    Warns:
        TruncationWarning: If a text is longer than the model's window.
    """
    with processes() as group:
        output = Path(config.output_dir).expanduser()
        check_evaluation_output(output)
        device = evaluation_device(config)
        encoder = build_encoder(config, config.checkpoint, device)
        notes: list[str] = []
        layers = layers_to_attribute(config, encoder, notes)
        pairs = load_test_pairs(config, encoder, notes)
        plan = plan_analyses(config, output, encoder, pairs, layers, device)
        if group.first:
            prepare_evaluation_output(output)
            save_config(config, output / "config.yaml")
        group.wait()
        evaluation = _Evaluation(config, output, encoder, pairs, layers, notes)
        if not group.first:
            if plan is not None:
                plan.run(group)
            return None
        evaluation.measure()
        outcomes = [] if plan is None else plan.run(group)
        return evaluation.finish(outcomes, [] if plan is None else plan.context.notes)


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
        self.store = LayerStore(
            folder=output / "attributions",
            encoder=encoder,
            settings=attributor_settings(wanted),
            chosen=pairs.select(self.sample),
            rows=self.sample,
            example_rows=self.example_rows,
            roles=self.roles,
            notes=notes,
        )

    def measure(self) -> None:
        """Score and attribute."""
        self.start = time.monotonic()
        scores = self.scores = self._score()
        metrics = self._correlations(scores)
        results: dict[int, LayerResults] = {}
        for layer in self.layers:
            found = self.store.read(layer)
            if found is None:
                found = self._attribute(layer)
            else:
                self.reused.append(layer)
            results[layer] = found
            self.notes += found.notes
            metrics |= layer_metrics(layer, found)
        self.metrics, self.results = metrics, results

    def finish(
        self, outcomes: Sequence[Outcome], analysis_notes: Sequence[str]
    ) -> EvaluationResult:
        """Write what was measured and what analyses found, and print it."""
        scores, results = self.scores, self.results
        metrics = dict(self.metrics)
        for key in sorted(metrics.keys() - finite(metrics).keys()):
            self.notes.append(f"`{key}` is {metrics[key]}; it is left out.")
        metrics = finite(metrics) | analysis_metrics(outcomes)
        pairs_path = self.output / "pairs.parquet"
        write_parquet(pairs_path, self._pair_table(scores, results))
        if results:
            _write_json(self.output / "strongest_pairs.json", self._strongest(scores, results))
        figures = self._draw(results)
        categories = self._categories(scores)
        facts = {
            "notes": self.notes,
            "categories": categories,
            "duration_seconds": time.monotonic() - self.start,
            **self._facts(),
        }
        summary_path = None
        if outcomes:
            facts["analyses"] = {outcome.name: outcome.facts() for outcome in outcomes}
            summary_path = self.output / "summary.md"
            head = self._head()
            summary_path.write_text(summary_of(outcomes, head, analysis_notes), encoding="utf-8")
        write_results(self.output / "results.json", metrics, facts)
        result = EvaluationResult(
            self.output / "results.json",
            pairs_path,
            figures,
            metrics,
            tuple(self.notes),
            summary_path,
            tuple(o.name for o in outcomes if o.status == "failed"),
        )
        print_evaluation(
            metrics,
            self.layers,
            categories,
            _closing_lines(result),
            f"{self.config.checkpoint} on {self.pairs.name}",
        )
        return result

    # -- scores ---------------------------------------------------------------------------------

    def _score(self) -> _Scores:
        """Score all pairs; each distinct text is embedded once."""
        sides = [(self.pairs.texts_a, self.roles[0]), (self.pairs.texts_b, self.roles[1])]
        keys = [(text, role) for texts, role in sides for text in texts]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TruncationWarning)
            embeddings = embed_texts(
                self.encoder,
                list(dict.fromkeys(keys)),
                batch_size=self.config.data.eval_batch_size,
                progress=self.progress,
            )
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

    def _attribute(self, layer: int) -> LayerResults:
        """Attribute the sample at a layer and write it down."""
        chosen = self.store.chosen
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            warnings.simplefilter("ignore", TruncationWarning)  # said when all texts were scored
            attributor = PairAttributor(self.encoder, layer, **self.store.settings)
            results = attributor.attribute(
                chosen.texts_a, chosen.texts_b, *self.roles, progress=self.progress
            )
        notes = []
        for warning in caught:
            if issubclass(warning.category, ConvergenceWarning):
                notes.append(str(warning.message))
            else:
                _warn_again(warning)
        found = LayerResults(
            rows=[row_of(i, result) for i, result in zip(self.sample, results, strict=True)],
            examples=dict(zip(self.example_rows, results, strict=False)),
            seconds=time.monotonic() - start,
            notes=notes,
        )
        self.store.write(layer, found)
        return found

    # -- what is written ------------------------------------------------------------------------

    def _pair_table(self, scores: _Scores, results: Mapping[int, LayerResults]) -> pa.Table:
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

    def _strongest(self, scores: _Scores, results: Mapping[int, LayerResults]) -> dict[str, Any]:
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

    def _draw(self, results: Mapping[int, LayerResults]) -> tuple[Path, ...]:
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

    def _head(self) -> dict[str, Any]:
        """Return the first lines of the summary."""
        facts, config, encoder = run_facts(), self.config, self.encoder
        shifted = f"shifted by `{encoder.reference_label}`" if encoder.shift else "not shifted"
        versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
        return {
            "command": f"`{shlex.join([*_launcher(), 'evaluate.py', *facts['command'][1:]])}`",
            "model": f"`{config.checkpoint}`, {encoder.similarity}, {shifted}",
            "pairs": f"{min(config.analysis.n_pairs, len(self.pairs))} of {len(self.pairs)} of "
            f"{self.pairs.name}",
            "machine": f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads",
            "versions": versions,
        }

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


def _launcher() -> list[str]:
    """Return what starts an evaluation in as many processes as this one has."""
    _, world_size = process_of(None, None)
    return ["python"] if world_size == 1 else ["torchrun", "--nproc-per-node", str(world_size)]


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


def _closing_lines(result: EvaluationResult) -> list[str]:
    """Return the notes, and where everything is."""
    lines = [f"note: {note}" for note in result.notes]
    lines += [f"results: {result.results_path}", f"pairs: {result.pairs_path}"]
    if result.figures:
        lines.append(f"heat maps: {result.figures[0].parent}")
    if result.summary_path is not None:
        lines.append(f"analyses: {result.summary_path}")
    if result.failed:
        lines.append(f"FAILED: {', '.join(result.failed)}; the summary says why")
    return lines
