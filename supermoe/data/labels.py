"""Labels: what is asked of each example under each task, computed from what happened after its cut.

A label is an SQL aggregate over the rows of `[cut, cut + window)`, the value of a field in the next event, or a static
attribute of the user; see `supermoe.config.WindowLabel`. Nothing outside the window is within the expression's reach.
Raw answers wait in DuckDB tables (which spill) until all chunks are through; then classes are fitted on the training
examples and answers encoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from supermoe.config import Eligible, WindowLabel
from supermoe.data.chunks import Chunk, future_rows, is_eligible
from supermoe.data.expressions import EXAMPLE, check, check_events, evaluate
from supermoe.data.schema import FIRST_ID, UNKNOWN, LabelSchema
from supermoe.data.splits import SPLITS, Plan
from supermoe.data.sql import quote
from supermoe.data.staging import Staged
from supermoe.data.store import StoreWriter
from supermoe.data.vocab import Vocabularies
from supermoe.typed_yaml import UserError, nearest

BATCH_ROWS = 200_000  # classes of sets written at a time


class Labels:
    """Computes the labels of all tasks chunk by chunk: `add` every chunk in order, then `finish`."""

    def __init__(
        self, staged: Staged, writer: StoreWriter, vocabularies: Vocabularies, plan: Plan, tasks: Mapping[str, Any]
    ):
        self.staged, self.writer, self.vocabularies, self.plan, self.tasks = staged, writer, vocabularies, plan, tasks
        self.con = staged.con
        self._splits = [np.zeros(0, np.int64)]  # split codes of the examples, chunk by chunk
        for task, config in tasks.items():
            _check(staged, vocabularies, plan, task, config)

    def add(self, chunk: Chunk) -> None:
        """Collect the raw answers of the chunk's examples; an eligible example without a row gets `empty`."""
        self._splits.append(chunk.split_B)
        for task, config in self.tasks.items():
            label: WindowLabel = config.label
            answers = self._answers(task, label)
            _check_type(task, config, answers["value"].type)
            self.con.register("answers", answers)
            self.con.register(
                "asked", {EXAMPLE: chunk.first_example + np.flatnonzero(self._asked(task, config, chunk))}
            )
            select = (
                f"SELECT {EXAMPLE}, CASE WHEN answers.{EXAMPLE} IS NULL THEN $empty ELSE value END AS value "
                f"FROM asked LEFT JOIN answers USING ({EXAMPLE})"
            )
            first = len(self._splits) == 2
            into = f"CREATE OR REPLACE TEMP TABLE {_table(task)} AS" if first else f"INSERT INTO {_table(task)}"
            try:
                self.con.execute(f"{into} {select}", {"empty": label.empty})
            except (duckdb.BinderException, duckdb.ConversionException):
                raise UserError(
                    f"tasks.{task}.label.empty: {label.empty!r} does not fit the label's values, which are of type "
                    f"{answers['value'].type}; give a value of that type, or null to ask only users with a row."
                ) from None
            self.con.unregister("answers")
            self.con.unregister("asked")

    def finish(self) -> tuple[dict[str, LabelSchema], dict[str, Any]]:
        """Encode and write all labels; returns their schemas and, per task and split, what was asked."""
        split = np.concatenate(self._splits)
        self.con.register("example_splits", {EXAMPLE: np.arange(len(split)), "split": split})
        schemas, summary = {}, {}
        for task, config in self.tasks.items():
            encode = {"number": self._write_number, "class": self._write_class, "set": self._write_set}[
                config.label_kind
            ]
            schemas[task], summary[task] = encode(task, config.label, split)
            self.con.execute(f"DROP TABLE {_table(task)}")
        self.con.unregister("example_splits")
        return schemas, summary

    def _answers(self, task: str, label: WindowLabel) -> pa.Table:
        """(_example, value) of the chunk's examples that have an answer."""
        rows = future_rows(label.window, label.events, label.table)
        if label.attribute is not None:
            same_split = f"split = {self.plan.users.split_sql(quote('user'))}"
            return self.con.sql(
                f"SELECT {EXAMPLE}, {quote(label.attribute)} AS value FROM chunk_examples JOIN people USING (user_row) "
                f"WHERE {same_split} AND value IS NOT NULL"
            ).to_arrow_table()
        if label.next is not None:
            return self.con.sql(
                f"SELECT {EXAMPLE}, {quote(label.next)} AS value FROM ({rows}) "
                f"QUALIFY position = min(position) OVER (PARTITION BY {EXAMPLE})"
            ).to_arrow_table()
        assert label.sql is not None
        if label.first:
            rows = f"SELECT * FROM ({rows}) QUALIFY time = min(time) OVER (PARTITION BY {EXAMPLE})"
        return evaluate(self.con, rows, {"value": label.sql}, f"tasks.{task}.label.sql")

    def _asked(self, task: str, config: Any, chunk: Chunk) -> np.ndarray:
        """Bool per example of the chunk: may this task ask it."""
        asked = np.ones(chunk.num_examples, bool)
        eligible: Eligible | None = config.eligible
        if eligible is not None:
            asked = is_eligible(self.con, chunk, eligible, f"tasks.{task}.eligible.sql")
        if self.plan.by_position and config.label.next is not None:
            asked &= chunk.split_B != SPLITS["train"]  # its next event is the validation target
        return asked

    def _write_number(self, task: str, label: WindowLabel, split: np.ndarray) -> tuple[LabelSchema, dict[str, Any]]:
        found = self.con.execute(
            f"SELECT {EXAMPLE}, CAST(value AS DOUBLE) AS value FROM {_table(task)} WHERE value IS NOT NULL"
        ).fetchnumpy()
        values = np.full(len(split), np.nan, np.float32)
        values[found[EXAMPLE]] = found["value"]
        finite = np.isfinite(found["value"])
        if not finite.all():
            raise UserError(
                f"tasks.{task}.label: {(~finite).sum()} of {len(finite)} labels are NaN or infinite; guard divisions "
                "and logarithms, for example with nullif(x, 0), and filter NaN out of the column."
            )
        asked = ~np.isnan(values)
        self._check_training(task, values[asked & (split == SPLITS["train"])])
        self.writer.write(f"examples/labels/{task}", values)
        return LabelSchema(kind="number"), _per_split(split, asked, mean=values)

    def _write_class(self, task: str, label: WindowLabel, split: np.ndarray) -> tuple[LabelSchema, dict[str, Any]]:
        schema, join, code = self._classes(task, label, f"SELECT {EXAMPLE}, value FROM {_table(task)}", "class")
        found = self.con.execute(
            f"SELECT {EXAMPLE}, coalesce({code}, -1) AS id FROM {_table(task)} AS answers {join} WHERE answers.value "
            "IS NOT NULL"
        ).fetchnumpy()
        ids = np.full(len(split), -1, np.int32)
        ids[found[EXAMPLE]] = found["id"]
        unseen = np.zeros(len(split), bool)
        unseen[found[EXAMPLE][found["id"] < 0]] = True
        self._check_training(task, ids[(ids >= 0) & (split == SPLITS["train"])])
        self.writer.write(f"examples/labels/{task}", ids)
        return schema, _per_split(split, ids >= 0, unseen=unseen)

    def _write_set(self, task: str, label: WindowLabel, split: np.ndarray) -> tuple[LabelSchema, dict[str, Any]]:
        flat = f"SELECT {EXAMPLE}, unnest(list_distinct(value)) AS value FROM {_table(task)}"
        schema, join, code = self._classes(task, label, flat, "set")
        asked = np.zeros(len(split), bool)
        asked[
            self.con.execute(f"SELECT {EXAMPLE} FROM {_table(task)} WHERE value IS NOT NULL").fetchnumpy()[EXAMPLE]
        ] = True
        known, unseen = np.zeros(len(split), np.int64), np.zeros(len(split), np.int64)
        reader = self.con.sql(
            f"SELECT {EXAMPLE}, {code} AS id FROM ({flat}) AS answers {join} ORDER BY {EXAMPLE}, id NULLS LAST"
        ).to_arrow_reader(BATCH_ROWS)
        with self.writer.column(f"examples/labels/{task}.ids", np.int32) as column:
            for batch in reader:
                example, is_known = batch[EXAMPLE].to_numpy(), batch["id"].is_valid().to_numpy(zero_copy_only=False)
                np.add.at(known, example[is_known], 1)
                np.add.at(unseen, example[~is_known], 1)
                column.append(batch["id"].drop_null().to_numpy())
        self._check_training(task, np.flatnonzero(asked & (split == SPLITS["train"]) & (known > 0)))
        self.writer.write(f"examples/labels/{task}.offsets", np.concatenate([[0], np.cumsum(known)]))
        self.writer.write(f"examples/labels/{task}.asked", asked)
        return schema, _per_split(split, asked, unseen=unseen, mean=known)

    def _classes(self, task: str, label: WindowLabel, flat: str, kind: Any) -> tuple[LabelSchema, str, str]:
        """The classes, and SQL (join, id) that maps `answers.value` to them; null for a class not seen in training.

        `flat`: SELECT _example, value with one row per example and class.
        """
        field = label.field or label.next
        if field is not None:
            vocabulary = self.vocabularies.categories[field]
            join, code = vocabulary.lookup_sql("answers.value")
            return LabelSchema(kind=kind, field=field, num_classes=vocabulary.size), join, f"nullif({code}, {UNKNOWN})"
        training = f"JOIN example_splits USING ({EXAMPLE}) WHERE split = {SPLITS['train']} AND value IS NOT NULL"
        asked = f"SELECT count(*) FROM {_table(task)} {training}"
        frequent = f"GROUP BY value HAVING count(*) >= {label.min_share} * ({asked})"
        self.con.execute(
            f"CREATE OR REPLACE TEMP TABLE classes AS SELECT value, row_number() OVER (ORDER BY value) - 1 AS id "
            f"FROM (SELECT value FROM ({flat}) {training} {frequent})"
        )
        values = [row[0] for row in self.con.execute("SELECT value FROM classes ORDER BY id").fetchall()]
        plain = [value if isinstance(value, str | int | float) else str(value) for value in values]
        schema = LabelSchema(kind=kind, classes=plain, num_classes=len(plain), **self._source(label, plain))
        return schema, "LEFT JOIN classes ON classes.value = answers.value", "classes.id"

    def _source(self, label: WindowLabel, classes: list[Any]) -> dict[str, Any]:
        """The event field that the fitted classes are values of, and their ids in its vocabulary, if there is one."""
        source = field_of(label, self.vocabularies.categories)
        known = self.vocabularies.categories[source].values if source else None
        if known is None:
            return {}
        id_of = {str(value): FIRST_ID + row for row, value in enumerate(known.to_pylist())}
        ids = [id_of.get(str(value), UNKNOWN) for value in classes]
        return {"source": source, "ids": ids} if set(ids) != {UNKNOWN} else {}

    def _check_training(self, task: str, values: np.ndarray) -> None:
        """Refuse a task that nothing can be learnt for; `values` are its known training labels."""
        if self.plan.by_position and self.tasks[task].label.next is not None:
            return  # learns from the positions inside the history
        if len(values) == 0:
            why = "no training example has a label"
        elif (values == values[0]).all():
            why = f"all {len(values)} labels of the training examples are the same"
        else:
            return
        raise UserError(
            f"tasks.{task}: {why}, so there is nothing to learn. Check its label (window, events, empty) and "
            f"`eligible`, or remove the task with tasks.{task}=null."
        )


def field_of(label: WindowLabel, categories: Mapping[str, Any]) -> str | None:
    """The category field of the events that a label is about: the declared one, or the only one its SQL names."""
    if label.field or label.next:
        return label.field or label.next
    words = set(re.findall(r"[^\W\d]\w*", label.sql or ""))
    named = [name for name in categories if name in words]
    return named[0] if len(named) == 1 and label.table is None else None


def _table(task: str) -> str:
    return f"answers_{task}"


def _per_split(
    split: np.ndarray, asked: np.ndarray, mean: np.ndarray | None = None, unseen: np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    """Per split: number of examples asked, mean label (or size of the set), classes that training has not seen."""
    summary: dict[str, dict[str, float]] = {}
    for name in ("train", "valid", "test"):
        here = split == SPLITS[name]
        summary[name] = {"asked": int((here & asked).sum())}
        if mean is not None and summary[name]["asked"]:
            summary[name]["mean"] = float(mean[here & asked].mean(dtype=np.float64))
        if unseen is not None:
            summary[name]["unseen"] = int(unseen[here].sum())
    return summary


def _check(staged: Staged, vocabularies: Vocabularies, plan: Plan, task: str, config: Any) -> None:
    """Refuse what can be seen to be wrong before any row is read."""
    label, key = config.label, f"tasks.{task}.label"
    if label.sql is not None:
        check(staged.con, label.sql, f"{key}.sql")
    if config.eligible is not None:
        check(staged.con, config.eligible.sql, f"tasks.{task}.eligible.sql")
        check_events(config.eligible.events, staged.event_types, f"tasks.{task}.eligible.events")
    if label.table is None:
        check_events(label.events, staged.event_types, f"{key}.events")
    elif label.table not in staged.tables:
        raise UserError(
            f"{key}.table: no table '{label.table}' is declared under data.source, "
            f"{nearest(label.table, staged.tables)}."
        )
    if label.attribute is not None and label.attribute not in staged.attributes:
        hint = (
            nearest(label.attribute, staged.attributes)
            if staged.attributes
            else "there is no users table with attributes."
        )
        raise UserError(f"{key}.attribute: the users table has no column '{label.attribute}', {hint}")
    if label.attribute is not None and label.empty is not None:
        raise UserError(
            f"{key}.empty: an attribute has no window that could be empty; users without a value are not asked."
        )
    if label.next is not None and label.window is None and not plan.by_position:
        raise UserError(f"{key}.window: `next` needs a window with cuts in time, for example window: 28d.")
    for name in (label.field, label.next):
        if name is not None and name not in vocabularies.categories:
            raise UserError(
                f"{key}: '{name}' is not a category field of the events, {nearest(name, vocabularies.categories)}."
            )


def _check_type(task: str, config: Any, kind: pa.DataType) -> None:
    """Refuse answers that cannot be a label of the task's kind."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_number = (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
    )
    needs = {
        "number": (is_number, "a number or a boolean, for example count(*) > 0"),
        "class": (not is_list and not pa.types.is_nested(kind), "one value, for example mode(category)"),
        "set": (is_list, "a list, for example list(distinct category)"),
    }
    fits, wanted = needs[config.label_kind]
    if not fits and not pa.types.is_null(kind):
        raise UserError(
            f"tasks.{task}.label: a task of type {config.type} needs {wanted}; this label gives values of type {kind}."
        )
