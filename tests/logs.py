"""Small logs for the tests of the data part: frames staged, and stores made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pandas as pd

from supermoe.config import DataConfig, Eligible, FeatureConfig, WindowLabel
from supermoe.data import vocab
from supermoe.data.events import write_events, write_users
from supermoe.data.examples import write_examples
from supermoe.data.labels import field_of
from supermoe.data.schema import FieldSchema, Schema
from supermoe.data.sources import Frames
from supermoe.data.splits import TimeSplit
from supermoe.data.staging import Staged, connect, stage
from supermoe.data.store import Store, StoreWriter
from supermoe.data.vocab import Vocabularies


def frame(columns: str, *rows: Sequence[Any]) -> pd.DataFrame:
    """Rows -> a frame; `columns` are names parted by spaces, `time` is parsed."""
    table = pd.DataFrame(list(rows), columns=columns.split())
    return table.assign(time=pd.to_datetime(table["time"], format="ISO8601")) if "time" in table else table


def staged(path: Path, events: pd.DataFrame, users: pd.DataFrame | None = None, **tables: pd.DataFrame) -> Staged:
    """Frames sorted and numbered, on a connection of its own that spills into `path`."""
    path.mkdir(parents=True, exist_ok=True)
    con = connect("500MB", 1, path)
    source = Frames(events=events, users=users, tables=tables)
    config = DataConfig.model_construct(fields={})
    return stage(con, source.attach(con), config, path)


@contextmanager
def store_under_construction(log: Staged, path: Path, training_sql: str) -> Iterator[tuple[StoreWriter, Vocabularies]]:
    """A store with vocabularies, users and events written, ready for its examples."""
    vocabularies = vocab.fit(log.con, log.fields, training_sql)
    vocabularies.register(log.con)
    with StoreWriter(path) as writer:
        vocabularies.save(writer.folder / "vocab")
        write_users(log, writer)
        write_events(log, vocabularies, writer)
        yield writer, vocabularies


def seconds(text: str) -> int:
    """ISO time -> seconds UTC."""
    return int(pd.Timestamp(text, tz="UTC").timestamp())


def task(
    kind: str, label: dict[str, Any], eligible: dict[str, Any] | None = None, type: str = "task"
) -> SimpleNamespace:
    """What the data part reads of a task's config."""
    return SimpleNamespace(
        type=type,
        label_kind=kind,
        label=WindowLabel(**label),
        eligible=None if eligible is None else Eligible(**eligible),
    )


def time_split(**config: Any) -> TimeSplit:
    """A splitter by cut dates."""
    return TimeSplit(TimeSplit.Config(**config))


def write_store(
    path: Path, log: Staged, splits: Any, features: Mapping[str, Any] = MappingProxyType({}), **tasks: Any
) -> Store:
    """A finished store with the examples of the splits; `features` maps groups to what stands in YAML."""
    groups = {name: FeatureConfig(**config) for name, config in features.items()}
    plan = splits.plan(log.con, {name: config.label for name, config in tasks.items()})
    with store_under_construction(log, path, plan.training_sql) as (writer, vocabularies):
        copied = {field_of(config.label, vocabularies.categories) for config in tasks.values()} - {None}
        examples = write_examples(log, writer, vocabularies, plan, groups, tasks, copied=copied)
        vocab.save_feature_knots(writer.folder / "vocab", examples.knots)
        fields = {
            name: FieldSchema(kind=field.kind, size=0 if field.kind == "number" else vocabularies.categories[name].size)
            for name, field in log.fields.items()
        }
        schema = Schema(fields=fields, features=list(examples.knots), bags=examples.bags, labels=examples.labels)
        return writer.finish(schema, "mark", examples.summary)
