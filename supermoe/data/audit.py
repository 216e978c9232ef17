"""The leak audit: what a store must not know, checked again from its columns and the log, apart from their writers.

    order       every visible event lies before the example's cut, and no invisible one does
    windows     label windows lie inside the data, and end before the next split's cut
    fitting     vocabularies, number knots and feature knots come from training time only
    bags        count no more events than are visible
    users       a user's attribute is asked in one split only, the one that the hash of the user gives
    dates       no input is a date that lies after its own event, so was written later

Attributes of the users table cannot leak into the input: no field, feature or condition can name them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from supermoe.config import FeatureConfig
from supermoe.data import vocab
from supermoe.data.expressions import column_names
from supermoe.data.schema import FIRST_ID, Schema
from supermoe.data.splits import DAY, SPLITS, Plan
from supermoe.data.sql import quote
from supermoe.data.staging import Staged
from supermoe.data.store import is_asked
from supermoe.typed_yaml import UserError, format_duration, format_instant

BLOCK = 1_000_000  # events or examples looked at at a time
SPAN = 4_000_000  # events of some users looked at together, a last user's in full
MAX_THREADS = 4  # that do so side by side
SAMPLE = 1_000  # texts that must all be dates for their column to be taken for one


def audit(
    staged: Staged,
    folder: Path,
    plan: Plan,
    schema: Schema,
    features: Mapping[str, FeatureConfig],
    tasks: Mapping[str, Any],
) -> list[str]:
    """Check the store in `folder` against the log; returns the names of the checks; a UserError lists every leak."""
    store = _Evidence(staged, folder, plan, schema, features, tasks)
    leaks = [f"{name}: {leak}" for name, check in CHECKS.items() for leak in check(store)]
    if leaks:
        listed = "; ".join(f"({number}) {leak}" for number, leak in enumerate(leaks, 1))
        raise UserError(f"leak audit: the store would know what it must not. {listed}.")
    return list(CHECKS)


@dataclass(frozen=True)
class _Evidence:
    """What the checks look at. Columns are mapped anew for each look, so that no more than a block stays in memory."""

    staged: Staged
    folder: Path
    plan: Plan
    schema: Schema
    features: Mapping[str, FeatureConfig]
    tasks: Mapping[str, Any]

    def read(self, name: str, first: int = 0, end: int | None = None) -> np.ndarray:
        """Rows first .. end - 1 of a column, copied."""
        return np.array(np.load(self.folder / f"{name}.npy", mmap_mode="r")[first:end])

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [U + 1]: event rows of each user."""
        lengths = pq.read_table(self.folder / "users.parquet", columns=["length"])["length"].to_numpy()
        return np.append(0, np.cumsum(lengths))

    def event_blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of event rows."""
        size = self.staged.num_events
        return ((first, min(first + BLOCK, size)) for first in range(0, size, BLOCK))

    def example_blocks(self) -> Iterator[int]:
        """First rows of blocks of examples."""
        return iter(range(0, len(np.load(self.folder / "examples/user.npy", mmap_mode="r")), BLOCK))

    def examples_from(self, first: int) -> dict[str, np.ndarray]:
        """A block of the examples' columns, with the range of events that belong to their users."""
        columns = ("user", "cut", "visible", "split")
        block = {name: self.read(f"examples/{name}", first, first + BLOCK) for name in columns}
        start, end = self.offsets[block["user"]], self.offsets[block["user"] + 1]
        return block | {"first": np.int64(first), "start": start, "end": end}

    def examples(self) -> Iterator[dict[str, np.ndarray]]:
        """All blocks of examples in turn."""
        return map(self.examples_from, self.example_blocks())

    def is_training(self, first: int, end: int) -> np.ndarray:
        """Bool per event row: may vocabularies be fitted on it."""
        if not self.plan.by_position:
            return self.read("events/time", first, end) < self.plan.cuts["train"][-1]
        ends, rows = self.offsets[1:], np.arange(first, end)
        return rows < ends[np.searchsorted(ends, rows, side="right")] - 2


def _order(store: _Evidence) -> Iterator[str]:
    """Histories rise in time; `visible` parts them at the cut."""
    with ThreadPoolExecutor(MAX_THREADS) as pool:  # numpy lets go of the interpreter
        rows = [row for row in pool.map(partial(_falling_row, store), store.event_blocks()) if row is not None]
        counts = [*pool.map(partial(_seen_and_missed, store), store.example_blocks())]
    if rows:
        yield f"event row {rows[0]} lies before the one that it follows in its user's history"
    seen, missed = (sum(found) for found in zip(*counts, strict=True)) if counts else (0, 0)
    if seen:
        yield f"{seen} examples see an event at or after their cut"
    if missed:
        yield f"{missed} examples do not see every event before their cut"


def _falling_row(store: _Evidence, block: tuple[int, int]) -> int | None:
    """The first event row of a block that lies before the one it follows in its user's history."""
    begin, end = max(block[0] - 1, 0), block[1]
    time = store.read("events/time", begin, end)
    back = time[1:] < time[:-1]
    starts = store.offsets[np.searchsorted(store.offsets, begin + 1) : np.searchsorted(store.offsets, end)]
    back[starts - begin - 1] = False  # another user's history begins
    return begin + 1 + int(np.argmax(back)) if back.any() else None


def _seen_and_missed(store: _Evidence, first: int) -> tuple[int, int]:
    """How many examples of a block see an event at or after their cut, and how many do not see all before it."""
    block = store.examples_from(first)
    edges = [0, *(np.flatnonzero(np.diff(block["start"] // SPAN)) + 1), len(block["start"])]
    columns = [block[name] for name in ("cut", "visible", "start", "end", "split")]
    counts = [_miscounted(store, *(values[a:b] for values in columns)) for a, b in pairwise(edges)]
    return sum(seen for seen, _ in counts), sum(missed for _, missed in counts)


def _miscounted(
    store: _Evidence, cut: np.ndarray, visible: np.ndarray, start: np.ndarray, stop: np.ndarray, split: np.ndarray
) -> tuple[int, int]:
    low = int(start.min())
    time = np.append(store.read("events/time", low, int(stop.max())), 0)
    inside = (visible >= 0) & (visible <= stop - start)
    after = np.where(inside, start + visible - low, 0)  # row of the first invisible event
    if store.plan.by_position:
        held_out = np.where(split == SPLITS["test"], 1, 2)
        late, early = visible > stop - start - held_out, visible < stop - start - held_out
    else:
        late = (visible > 0) & (time[after - 1] >= cut)
        early = (after < stop - low) & (time[after] < cut)
    return int((late | ~inside).sum()), int((early & inside).sum())


def _windows(store: _Evidence) -> Iterator[str]:
    """Cuts as they stand in the store, each with the longest label window."""
    if store.plan.by_position:
        return
    window = max((config.label.window or 0 for config in store.tasks.values()), default=0)
    ranges: dict[str, tuple[int, int]] = {}
    for block in store.examples():
        for name, code in SPLITS.items():
            cuts = block["cut"][block["split"] == code]
            if len(cuts):
                low, high = ranges.get(name, (cuts[0], cuts[0]))
                ranges[name] = (min(low, int(cuts.min())), max(high, int(cuts.max())))
    for name, (low, high) in ranges.items():
        if low <= store.staged.first_time:
            yield f"the {name} cut {format_instant(low)} has no event before it"
        if high + window > store.staged.last_time + DAY:
            yield (
                f"the label window of {format_duration(window)} after the {name} cut {format_instant(high)} ends after "
                f"the data ({format_instant(store.staged.last_time)})"
            )
    for earlier, later in (("train", "valid"), ("train", "test"), ("valid", "test")):
        if earlier in ranges and later in ranges and ranges[earlier][1] + window > ranges[later][0]:
            yield (
                f"the label window of the {earlier} cut {format_instant(ranges[earlier][1])} ends after the {later} "
                f"cut {format_instant(ranges[later][0])}"
            )


def _fitting(store: _Evidence) -> Iterator[str]:
    """Counts in the vocabularies equal those in training time; knots equal those fitted again there."""
    numbers = {name: field for name, field in store.staged.fields.items() if field.kind == "number"}
    again = vocab.fit(store.staged.con, numbers, _training_sql(store.plan))
    fitted = vocab.load(store.folder / "vocab", store.staged.fields)
    for name in numbers:
        if not np.array_equal(again.knots[name], fitted.knots[name]):
            yield f"the knots of the number field '{name}' are not those of the training time"
    for name, vocabulary in fitted.categories.items():
        if vocabulary.values is None:
            continue
        wrong = np.flatnonzero(_training_counts(store, name)[FIRST_ID:] != np.asarray(vocabulary.counts))
        if len(wrong):
            value = vocabulary.values[int(wrong[0])].as_py()
            yield f"the vocabulary of '{name}' counts {len(wrong)} values, such as {value!r}, beyond training time"
    yield from _feature_knots(store)


def _training_sql(plan: Plan) -> str:
    """Training time, apart from the plan's own predicate."""
    if plan.by_position:
        return "position + 2 < (SELECT num_events FROM people WHERE people.user_row = log.user_row)"
    return f"epoch_us(time) < {plan.cuts['train'][-1] * 1_000_000}"


def _training_counts(store: _Evidence, name: str) -> np.ndarray:
    """How often each id of a category field occurs in training time."""
    counts = np.zeros(store.schema.fields[name].size, np.int64)
    for first, end in store.event_blocks():
        kept = store.is_training(first, end)
        if store.schema.fields[name].kind == "categories":
            offsets = store.read(f"events/{name}.offsets", first, end + 1)
            ids = store.read(f"events/{name}", int(offsets[0]), int(offsets[-1]))[np.repeat(kept, np.diff(offsets))]
        else:
            ids = store.read(f"events/{name}", first, end)[kept]
        counts += np.bincount(ids, minlength=len(counts))
    return counts


def _feature_knots(store: _Evidence) -> Iterator[str]:
    """Knots end at the extremes of the training examples, which are therefore 0 and 1 in every column."""
    low, high = np.full((2, len(store.schema.features)), [[np.inf], [-np.inf]])
    for block in store.examples():
        first = int(block["first"])
        features = store.read("examples/features", first, first + len(block["user"]))[block["split"] == SPLITS["train"]]
        low = np.fmin(low, np.fmin.reduce(features, axis=0, initial=np.inf))
        high = np.fmax(high, np.fmax.reduce(features, axis=0, initial=-np.inf))
    knots = vocab.load_feature_knots(store.folder / "vocab")
    for index, name in enumerate(store.schema.features):
        if len(knots[name]) > 1 and (low[index] > 0 or high[index] < 1):
            yield f"the knots of the feature '{name}' reach beyond the values of the training examples"


def _bags(store: _Evidence) -> Iterator[str]:
    """A bag of a field with one value per event holds at most as many as there are visible events."""
    for name, bag in store.schema.bags.items():
        if store.schema.fields[bag.field].kind != "category":
            continue
        for block in store.examples():
            first = int(block["first"])
            offsets = store.read(f"examples/bags/{name}.offsets", first, first + len(block["user"]) + 1)
            counts = store.read(f"examples/bags/{name}.counts", int(offsets[0]), int(offsets[-1])).astype(np.float64)
            total = np.diff(np.append(0, np.cumsum(counts))[offsets - offsets[0]])
            beyond = int((total > block["visible"]).sum())
            if beyond:
                yield f"the bag '{name}' counts more events than {beyond} examples can see"
                break


def _users(store: _Evidence) -> Iterator[str]:
    """Users with an attribute label belong to the bucket of the split where it is asked."""
    folds = store.plan.users
    for task, config in store.tasks.items():
        if config.label.attribute is None:
            continue
        asked = _asked(store, task)
        user, split = store.read("examples/user")[asked], store.read("examples/split")[asked]
        pairs = np.unique(np.stack([user, split], 1), axis=0)
        names = _names(store, pairs[:, 0])
        code = {folds.fold: SPLITS["test"], (folds.fold + 1) % folds.folds: SPLITS["valid"]}
        wrong = [row for row, split in pairs.tolist() if code.get(folds.bucket(names[row]), SPLITS["train"]) != split]
        if wrong:
            yield (
                f"tasks.{task}: the attribute of {len(set(wrong))} users, such as {names[wrong[0]]}, is asked in a "
                "split that is not theirs"
            )


def _names(store: _Evidence, rows: np.ndarray) -> dict[int, str]:
    """User row -> user id as text."""
    store.staged.con.register("audited", {"user_row": np.unique(rows)})
    names = store.staged.con.execute(
        'SELECT user_row, CAST("user" AS VARCHAR) FROM people JOIN audited USING (user_row)'
    )
    found = dict(names.fetchall())
    store.staged.con.unregister("audited")
    return found


def _asked(store: _Evidence, task: str) -> np.ndarray:
    """Bool per example: does it have a label."""
    if store.schema.labels[task].kind == "set":
        return store.read(f"examples/labels/{task}.asked")
    return is_asked(store.read(f"examples/labels/{task}"))


def _dates(store: _Evidence) -> Iterator[str]:
    """Columns that are dates, by type or by what their texts say, and that an input reads."""
    con, types = store.staged.con, store.staged.column_types
    for column, readers in _read_columns(store).items():
        value = f"TRY_CAST({quote(column)} AS TIMESTAMP)"
        if types[column] == "VARCHAR":
            sample = f"SELECT {quote(column)} FROM log WHERE {quote(column)} IS NOT NULL LIMIT {SAMPLE}"
            number, parsed = con.execute(f"SELECT count(*), count({value}) FROM ({sample})").fetchall()[0]
            is_date = 0 < number == parsed
        else:
            is_date = types[column] == "DATE" or types[column].startswith("TIMESTAMP")
        if not is_date:
            continue
        late = f"CAST({value} AS DATE) > CAST(time AS DATE)" if types[column] == "DATE" else f"{value} > time"
        number, of = con.execute(f"SELECT count(*) FILTER (WHERE {late}), count({quote(column)}) FROM log").fetchall()[
            0
        ]
        if number:
            yield (
                f"'{column}' (read by {', '.join(readers)}) lies after its own event in {number} of {of} rows, so it "
                "was written later; leave it out"
            )


def _read_columns(store: _Evidence) -> dict[str, list[str]]:
    """Columns of the log that inputs are made of -> the keys that read them."""
    readers: dict[str, list[str]] = {}
    for name in store.staged.fields:
        readers.setdefault(name, []).append(f"data.fields.{name}")
    for group, config in store.features.items():
        for feature, sql in config.sql.items():
            for name in column_names(store.staged.con, sql) & store.staged.column_types.keys():
                readers.setdefault(name, []).append(f"features.{group}.sql.{feature}")
    return readers


CHECKS = {"order": _order, "windows": _windows, "fitting": _fitting, "bags": _bags, "users": _users, "dates": _dates}
