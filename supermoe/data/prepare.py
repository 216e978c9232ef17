"""From a config to a store: attach, sort, fit, encode, ask, audit, publish. Serving does the same, fitting nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from supermoe.config import Eligible, FieldConfig, RunConfig
from supermoe.data import audit, staging, vocab
from supermoe.data.disk import writing
from supermoe.data.events import write_events, write_users
from supermoe.data.examples import write_examples
from supermoe.data.labels import field_of
from supermoe.data.schema import FieldSchema, Schema
from supermoe.data.splits import serving_plan
from supermoe.data.store import FORMAT_VERSION, Store, StoreWriter
from supermoe.data.summary import render, summarise
from supermoe.typed_yaml import UserError, build


def prepare(config: RunConfig, source: Any = None) -> Store:
    """The store that the config describes, made from its source or the one given; an up-to-date one is used again.

    Prints what it found. What is wrong with the data or the declarations is a `UserError`, and then no store is left.
    """
    source = source or build("supermoe.data.sources", config.data.source)
    mark = fingerprint(config, source)
    store = _reusable(config.store, mark)
    if store is not None:
        print(f"{config.store}: up to date, prepared before")
        return store
    tasks: dict[str, Any] = dict(config.tasks)
    features: dict[str, Any] = dict(config.features)
    with writing(config.store), StoreWriter(config.store) as writer:
        with closing(staging.connect(config.data.memory_limit, config.data.threads, writer.scratch)) as con:
            staged = staging.stage(con, source.attach(con), config.data, writer.scratch, _named_fields(config))
            labels = {name: task.label for name, task in tasks.items()}
            plan = build("supermoe.data.splits", config.data.splits).plan(con, labels)
            vocabularies = vocab.fit(con, staged.fields, plan.training_sql)
            vocabularies.save(writer.folder / "vocab")
            vocabularies.register(con)
            num_duplicates = write_events(staged, vocabularies, writer)
            write_users(staged, writer)
            copied = {field for label in labels.values() if (field := field_of(label, vocabularies.categories))}
            examples = write_examples(staged, writer, vocabularies, plan, features, tasks, copied=copied)
            vocab.save_feature_knots(writer.folder / "vocab", examples.knots)
            schema = _schema(staged, vocabularies, list(examples.knots), examples.bags, examples.labels)
            checked = audit.audit(staged, writer.folder, plan, schema, features, tasks)
            summary = summarise(staged, writer, schema, plan, num_duplicates, examples.summary, checked)
        store = writer.finish(schema, mark, summary)
    print(render(summary))
    return store


def prepare_serving(
    source: Any,
    schema: Schema,
    vocab_dir: Path,
    config: Any,
    as_of: int,
    out: Path,
    *,
    everyone: bool = False,
    conditions: Mapping[str, Eligible] | None = None,
) -> Store:
    """A store with one example per eligible user at `as_of` (seconds UTC), in split `serve` and without labels.

    `schema` and `vocab_dir` are the model's: the same SQL computes the features, and nothing is fitted. Only events
    before `as_of` are read. With `everyone`, users whom `data.splits.eligible` leaves out are included, such as those
    without events.
    `conditions`: task -> who is asked, answered by the column examples/labels/<task>.asked.
    """
    with writing(out), StoreWriter(out) as writer:
        with closing(staging.connect(config.data.memory_limit, config.data.threads, writer.scratch)) as con:
            fields = {name: FieldConfig(kind=f.kind, hash_size=f.hash_size) for name, f in schema.fields.items()}
            staged = staging.stage_serving(con, source.attach(con), fields, as_of, writer.scratch)
            vocabularies = vocab.load(vocab_dir, fields)
            vocabularies.register(con)
            write_events(staged, vocabularies, writer)
            write_users(staged, writer)
            eligible = Eligible(sql="true") if everyone else getattr(config.data.splits, "eligible", Eligible())
            plan = serving_plan(as_of, eligible)
            knots = vocab.load_feature_knots(vocab_dir)
            copied = {bag.field for bag in schema.bags.values() if not bag.input}
            examples = write_examples(
                staged, writer, vocabularies, plan, config.features, {}, knots, conditions, copied
            )
        served = schema.model_copy(update={"labels": {}})
        return writer.finish(served, "", examples.summary)


def _named_fields(config: RunConfig) -> set[str]:
    """Fields that labels are about, that are counted in bags, or that pre-training predicts."""
    tasks: dict[str, Any] = dict(config.tasks)
    named = {field for task in tasks.values() for field in (task.label.field, task.label.next) if field}
    named |= {field for group in config.features.values() if group for field in group.bag}
    objectives = [item for item in (config.loss.pretraining or {}).values() if item is not None]
    return named | {field for item in objectives for field in getattr(item, "fields", [])}


def _schema(
    staged: staging.Staged,
    vocabularies: vocab.Vocabularies,
    features: list[str],
    bags: Mapping[str, Any],
    labels: Mapping[str, Any],
) -> Schema:
    fields = {}
    for name, field in staged.fields.items():
        size = 0 if field.kind == "number" else vocabularies.categories[name].size
        fields[name] = FieldSchema(kind=field.kind, size=size, hash_size=field.hash_size)
    return Schema(
        fields=fields, features=features, bags=dict(bags), labels=dict(labels), event_types=list(staged.event_types)
    )


def fingerprint(config: RunConfig, source: Any) -> str:
    """Hash of all that decides what a store holds; empty where the source cannot tell whether it changed."""
    content = source.fingerprint()
    if content is None:
        return ""
    data = config.data.model_dump(mode="json", exclude={"store", "memory_limit", "threads"})
    task: Any
    tasks = {}
    for name, task in config.tasks.items():
        tasks[name] = [task.label_kind, task.model_dump(mode="json", include={"label", "eligible"})]
    features = config.model_dump(mode="json", include={"features"})["features"]
    parts = {"version": FORMAT_VERSION, "data": data, "tasks": tasks, "features": features, "source": content}
    parts["named"] = sorted(_named_fields(config))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _reusable(path: Path, mark: str) -> Store | None:
    """The store at `path` if it was made from the same parts; says why it is made again otherwise."""
    if not (path / "fingerprint.json").exists():
        return None
    try:
        store = Store.open(path)
    except UserError as error:
        print(f"prepared anew: {error}")
        return None
    if mark and store.fingerprint == mark:
        return store
    print(f"{path}: prepared anew, as the source or the sections data, features or tasks changed")
    return None
