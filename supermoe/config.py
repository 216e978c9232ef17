"""Everything a run can be told, with its defaults. One class per section of the YAML file.

Sections whose `type` names a component (source, splits, tasks, router, read-out, balancer ...) are seats: the class
that implements the component owns its own `Config`, in the file that the seat names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from supermoe.typed_yaml import ALL_TIME, Config, Duration, Seat, load


class FieldConfig(Config):
    """How one column of the events is read. `kind` alone may be given as a plain string."""

    kind: Literal["category", "categories", "number"]
    max_size: int = Field(100_000, ge=1)  # most frequent values kept; the rest are `unknown`
    min_count: int = Field(1, ge=1)  # values seen less often in training time are `unknown`
    hash_size: int | None = Field(None, ge=2)  # hash into this many rows instead of fitting a vocabulary


class WindowLabel(Config):
    """A question about a user, answered by SQL over a window; see `supermoe/data/labels.py`.

    Exactly one of `sql` (an aggregate over the window's rows), `attribute` (a column of the users table) and `next`
    (the value of a field in the first event after the cut) says what is asked.
    """

    sql: str | None = None
    attribute: str | None = None
    next: str | None = None
    window: Duration | None = None
    empty: Any = None  # the label of a user without a row in the window; null: not asked
    events: list[str] | None = None  # only these event types
    table: str | None = None  # rows of this declared table instead of the events
    first: bool = False  # only the rows that share the window's earliest time (the next basket)
    field: str | None = None  # classes are this event field's vocabulary, not fitted from the labels
    min_share: float = Field(0.0, ge=0, lt=1)  # classes rarer than this share of labelled training examples are dropped

    @model_validator(mode="after")
    def _one_question(self) -> WindowLabel:
        given = [name for name in ("sql", "attribute", "next") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "a label needs exactly one of `sql: AGGREGATE`, `attribute: COLUMN` of the users table, and "
                f"`next: FIELD`, the field's value in the next event (got {', '.join(given) or 'none'})"
            )
        if self.sql is not None and self.window is None:
            raise ValueError("a label with sql needs a window, for example window: 28d")
        if self.window == ALL_TIME:
            raise ValueError("a label window must end: give a length such as 28d, not all")
        return self


class Eligible(Config):
    """Who is asked: users for whom `sql` holds over the `window` before the cut."""

    window: Duration = ALL_TIME
    events: list[str] | None = None
    sql: str = "count(*) > 0"


class FeatureConfig(Config):
    """Inputs computed over windows before the cut: SQL aggregates, bags of field values, or both derived."""

    windows: list[Duration] = Field(default_factory=list)  # empty: those that `windows_around` the labels'
    sql: dict[str, str] = Field(default_factory=dict)  # name -> aggregate
    bag: list[str] = Field(default_factory=list)  # fields whose values are counted
    auto: bool = False  # derive aggregates (and bags) from the event fields
    events: list[str] | None = None
    max_bag: int = Field(512, ge=1)  # most frequent values kept per user and bag


def windows_around(spans: set[int]) -> list[int]:
    """Windows of features for labels over so many seconds: what tells the next year is seen over years.

    A quarter of the shortest, each of them, two and four times the longest, and all; a week and four weeks where these
    are longer, as people live by them; 28 days where no label has any.
    """
    day = 86_400
    spans = spans or {28 * day}
    quarter, longest = min(spans) // 4, 4 * max(spans)
    whole_days = quarter - quarter % day
    weeks = {span for span in (7 * day, 28 * day) if span > longest}
    return [*sorted({whole_days or max(quarter, 1), *spans, longest // 2, longest, *weeks}), ALL_TIME]


class DataConfig(Config):
    """From a log to a store."""

    source: Annotated[Any, Seat("supermoe.data.sources")]
    splits: Annotated[Any, Seat("supermoe.data.splits", usual="time")] = "time"
    store: Path | None = None  # folder; default: <run>/store
    fields: dict[str, FieldConfig | None] = Field(default_factory=dict)  # column -> how to read it; empty: infer all
    memory_limit: str = "2GB"  # of DuckDB while preparing
    threads: int | None = Field(None, ge=1)

    @field_validator("fields", mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: {"kind": v} if isinstance(v, str) else v for k, v in value.items()}
        return value


class MoEConfig(Config):
    """The mixture-of-experts feed-forward of the blocks after `model.dense_layers`."""

    experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    hidden: int | None = Field(None, ge=1)  # of one expert; default: 4 * dim / top_k, as active as dense
    shared_hidden: int = Field(0, ge=0)  # width of an always-on shared expert; 0: none
    router: Annotated[Any, Seat("supermoe.model.routers")] = "softmax"
    capacity_factor: float | None = Field(None, gt=0)  # None: dropless
    low_memory: bool = False  # keep no hidden rows for the backward: less memory, more time

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) cannot exceed experts ({self.experts})")
        return self


class ModelConfig(Config):
    """The encoder: event embedding, causal history pass, indicator pass, read-out."""

    dim: int = Field(64, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    max_events: int = Field(256, ge=1)  # the most recent events read by attention; features and bags see all
    hidden: int | None = Field(None, ge=1)  # of the dense feed-forward; default: 4 * dim
    activation: Literal["gelu", "silu", "relu2", "swiglu"] = "gelu"
    dense_layers: int = Field(1, ge=0)  # blocks with a dense feed-forward before the MoE blocks
    moe: MoEConfig = Field(default_factory=lambda: MoEConfig())
    dropout: float = Field(0.2, ge=0, lt=1)  # in blocks, and on what heads read of events
    head_dropout: float = Field(0.5, ge=0, lt=1)  # on what heads read of users
    feature_dropout: float = Field(0.4, ge=0, lt=1)  # in the network of declared features and bags; a quarter on inputs
    feature_layers: int = Field(2, ge=0)  # residual blocks of that network
    bag_dim: int = Field(64, ge=1)  # width of a bag's table, before it enters the feature network
    # a user's vector also holds so many leading directions of the features' numbers, and so many of the lifetime bags
    profile_dim: int = Field(64, ge=0)
    number_bins: int = Field(8, ge=2)  # knots of the piecewise-linear number encoding
    tree_rounds: int = Field(75, ge=0)  # of boosted trees that may answer beside a task's network; 0: none
    habits: bool = True  # whether what a user chose before, counts that fade, may answer beside a ranking's network
    task_gradient: float = Field(0.1, ge=0, le=1)  # share of the tasks' gradient that reaches the history
    readout: Annotated[Any, Seat("supermoe.model.readouts")] = "indicator"

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(f"dim ({self.dim}) must be a multiple of 4 * heads ({self.heads})")
        return self


class LossConfig(Config):
    """How the tasks' losses become one."""

    balancer: Annotated[Any, Seat("supermoe.objectives.balancers")] = "equal"
    # every loss in nats over the root of its prior's, so that all send alike much noise into what they share; over its
    # prior's; or as it is
    units: Literal["root", "prior", "nats"] = "root"
    few_users: float = Field(1000, ge=0)  # a task of n labelled users has a say of n / (n + few_users)
    teachers: Path | None = None  # folder that supermoe.seesaw leaves: answers of models of each task alone
    teaching: float = Field(0.5, ge=0, le=1)  # share of a teacher's answer in what is learnt, beside the label
    # None: `next_event`, unless a task learns from events already; {} for none at all
    pretraining: dict[str, Annotated[Any, Seat("supermoe.objectives.pretraining")] | None] | None = None


class TrainingConfig(Config):
    """The loop."""

    epochs: int | None = Field(None, ge=1)  # None: by tasks and examples, see `build.num_epochs`
    max_steps: int | None = Field(None, ge=1)  # ends earlier than `epochs`
    max_minutes: float | None = Field(None, gt=0)  # wall-clock stop, refit included; not bit-reproducible
    tokens_per_batch: int = Field(8192, ge=1)  # events of one micro-batch
    examples_per_batch: int | None = Field(512, ge=1)
    accumulate: int | None = Field(None, ge=1)  # micro-batches per optimiser step over all ranks; default: 1 per rank
    optimizer: Literal["adamw"] = "adamw"
    lr: float = Field(1.5e-3, gt=0)
    table_optimizer: Literal["adamw", "rowwise_adagrad"] = "adamw"  # of the embedding tables
    table_lr: float | None = Field(None, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float | None = Field(None, ge=0)  # None: by the length of the run, see `training/optim.py`
    clip_norm: float = Field(1.0, gt=0)
    schedule: Literal["cosine", "constant_then_decay"] = "cosine"
    warmup_share: float = Field(0.05, ge=0, le=1)
    decay_share: float = Field(0.2, ge=0, le=1)  # of constant_then_decay
    precision: Literal["fp32", "bf16"] = "fp32"
    ema: float | None = Field(0.98, gt=0, lt=1)  # decay per step of the averaged weights that count
    evaluate_every: int | None = Field(None, ge=1)  # steps; default: every epoch
    patience: int | None = Field(None, ge=1)  # evaluations without improvement before stopping; None: see `build`
    refit: bool = True  # train again, for as long as was best, on train and validation cuts; that model is the result
    checkpoint_every: int = Field(200, ge=1)  # steps
    keep_checkpoints: int = Field(2, ge=1)
    tensorboard: bool = False
    threads: int | None = Field(None, ge=1)
    backend: str | None = None  # of the ops, as `python -m supermoe.doctor` lists them; None: the fastest for each call


FAIRSCALE_REFUSED = {
    "fairscale_sdp": "fairscale 0.4.13's ShardedDataParallel trains on wrong gradients from the second step on: since "
    "torch 2 zero_grad() sets gradients to None, and they leave the buckets that it reduces (fairscale issue 354)",
    "fairscale_fsdp": "fairscale 0.4.13's FullyShardedDataParallel does not run: it takes CUDA streams for granted and "
    "is no longer developed",
}


class DistributedConfig(Config):
    """Under torchrun: how the ranks share the work. May differ between two starts of one run."""

    expert: int = Field(1, ge=1)  # neighbouring ranks that hold the experts in turn; the rest of the ranks replicate
    # how the dense weights are kept: whole on every rank (ddp), sharded (fsdp2), or whole with a sharded optimiser
    # state (fairscale: its OSS under DDP, extra `fairscale`)
    strategy: Literal["ddp", "fsdp2", "fairscale"] = "ddp"
    shard_tables: int | None = Field(None, ge=1)  # tables of this many rows and more lie by rows on all ranks
    timeout: Duration = 600  # of a collective; then the ranks that are missing are named

    @field_validator("strategy", mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if value in FAIRSCALE_REFUSED:
            raise ValueError(f"{FAIRSCALE_REFUSED[value]}; use fsdp2, or fairscale for its sharded optimiser under DDP")
        return value


class ReportConfig(Config):
    """What the run's report compares with and draws."""

    boosting: bool = False  # train the gradient-boosted baseline on the same features (extra `report`)
    plots: bool = True


class ExportConfig(Config):
    """The table of embeddings that ends a run."""

    dtype: Literal["float32", "float16"] = "float32"
    rows_per_part: int = Field(100_000, ge=1)


def _derived_features() -> dict[str, FeatureConfig | None]:
    return {"auto": FeatureConfig(auto=True)}


class RunConfig(Config):
    """The whole YAML file."""

    run: Path  # folder of this run's outputs
    seed: int = Field(0, ge=0)
    data: DataConfig
    features: dict[str, FeatureConfig | None] = Field(default_factory=_derived_features)
    tasks: dict[str, Annotated[Any, Seat("supermoe.objectives.tasks")] | None]
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)

    @field_validator("tasks", "features", mode="after")
    @classmethod
    def _drop_null(cls, value: dict) -> dict:
        return {name: item for name, item in value.items() if item is not None}

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if not self.tasks:
            raise ValueError("at least one task is needed under `tasks`")
        for name in [*self.tasks, *self.features]:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"'{name}': names of tasks and features may hold letters, digits and _ only")
        for name, group in self.features.items():
            if group is not None and not group.windows:
                self.features[name] = group.model_copy(update={"windows": windows_around(self._label_windows())})
        return self

    def _label_windows(self) -> set[int]:
        return {task.label.window for task in self.tasks.values() if task is not None and task.label.window}

    @property
    def store(self) -> Path:
        """Folder of the prepared data."""
        return self.data.store or self.run / "store"


def load_run(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read, merge and validate a run's YAML; see `supermoe.typed_yaml.load`."""
    return load(RunConfig, path, overrides)
