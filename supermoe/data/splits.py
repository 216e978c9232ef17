"""Which (user, cut) pairs are asked, and for which split: cuts in time, or each user's last events.

A splitter turns the sorted log (views `log` and `people`, see `supermoe/data/staging.py`) into a `Plan`: the
candidates, and the part of the log that vocabularies may be fitted on. Static attributes are split by user instead, see
`UserFolds`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import duckdb
from pydantic import Field, field_validator

from supermoe.config import Eligible
from supermoe.typed_yaml import (
    ALL_TIME,
    Config,
    Duration,
    Instant,
    UserError,
    format_duration,
    format_instant,
    validate_inside,
)

SPLITS = {"train": 0, "valid": 1, "test": 2, "serve": 3}
DAY = 86_400
DEFAULT_SPACING = 28 * DAY  # between cuts


class UserFolds(Config):
    """Hash buckets of users, for labels that do not change with time: test = fold, valid = fold + 1, the rest train."""

    folds: int = Field(default=5, ge=3)
    fold: int = Field(default=0, ge=0)
    salt: int = 0

    @field_validator("fold")
    @classmethod
    def _inside(cls, fold: int, info: Any) -> int:
        if fold >= info.data.get("folds", fold + 1):
            raise ValueError(f"fold must be smaller than folds ({info.data['folds']})")
        return fold

    def bucket(self, user: Any) -> int:
        """Bucket of one user id; the same as `split_sql` computes in DuckDB."""
        digest = hashlib.md5(f"{self.salt}:{user}".encode(), usedforsecurity=False).hexdigest()
        return int(digest[:15], 16) % self.folds

    def split_sql(self, user: str) -> str:
        """SQL of the split code of the user id in column `user`."""
        bucket = f"(('0x' || substr(md5('{self.salt}:' || CAST({user} AS VARCHAR)), 1, 15))::BIGINT % {self.folds})"
        valid = (self.fold + 1) % self.folds
        return f"CASE {bucket} WHEN {self.fold} THEN {SPLITS['test']} WHEN {valid} THEN {SPLITS['valid']} ELSE 0 END"


@dataclass(frozen=True)
class Plan:
    """What a splitter decided.

    candidates_sql: SELECT user_row, cut TIMESTAMP, visible (number of the user's events before the cut), split code.
    training_sql: predicate over the view `log` (under that name) of the rows that vocabularies and knots are fitted on.
    """

    candidates_sql: str
    training_sql: str
    eligible: Eligible
    users: UserFolds
    cuts: dict[str, list[int]] = field(
        default_factory=dict
    )  # split -> cuts in seconds; empty when every user has their own
    by_position: bool = False  # the cut is an event's position, so that events at the cut's own second may be visible


def instant_sql(seconds: int) -> str:
    """Seconds UTC as a DuckDB timestamp literal."""
    return f"make_timestamp({seconds * 1_000_000}::BIGINT)"


def _candidates(cuts: dict[str, list[int]]) -> str:
    """All users x all cuts, with the number of events before each cut, in one scan of the log."""
    pairs = [(cut, SPLITS[name]) for name, times in cuts.items() for cut in times]
    times = ", ".join(instant_sql(cut) for cut, _ in pairs)
    counts = ", ".join(f"count(*) FILTER (WHERE time < {instant_sql(cut)})" for cut, _ in pairs)
    splits = ", ".join(str(split) for _, split in pairs)
    zeros = ", ".join("0" for _ in pairs)
    return (
        f"SELECT user_row, unnest([{times}]) AS cut, unnest(coalesce(counts, [{zeros}])) AS visible, "
        f"unnest([{splits}]) AS split FROM people LEFT JOIN (SELECT user_row, [{counts}] AS counts FROM log GROUP BY "
        "user_row) USING (user_row)"
    )


def serving_plan(as_of: int, eligible: Eligible) -> Plan:
    """One candidate per user at `as_of` (seconds UTC), in split `serve`; nothing may be fitted."""
    cuts = {"serve": [as_of]}
    return Plan(_candidates(cuts), "false", eligible, UserFolds(), cuts)


class TimeSplit:
    """Cut dates: history strictly before the cut, labels in `[cut, cut + window)`.

    Without any date the cuts are derived: the test window ends with the data, validation lies one window before it, and
    training cuts go back window by window while one window of history is left. Where all labels are attributes, which
    have no window, cuts lie 28 days or a tenth of the log apart, the last at its end. Dates that would let one split
    see another's labels are refused.
    """

    class Series(Config):
        """Cuts at regular distances, both ends included."""

        first: Instant
        last: Instant
        every: Duration = DEFAULT_SPACING

    class Config(Config):
        type: str = "time"
        train: list[Instant] | None = None  # or a series: {first, last, every}
        valid: Instant | None = None
        test: Instant | None = None
        cuts: int = Field(8, ge=1)  # at most so many automatic training cuts
        eligible: Eligible = Eligible()  # which users are asked at a cut
        users: UserFolds = UserFolds()  # of attribute labels

        @field_validator("train", mode="before")
        @classmethod
        def _cuts_of_series(cls, value: Any) -> Any:
            if not isinstance(value, Mapping):
                return value
            series = validate_inside(TimeSplit.Series, value)
            return list(range(series.first, series.last + 1, series.every))

    def __init__(self, config: TimeSplit.Config):
        self.config = config

    def plan(self, con: duckdb.DuckDBPyConnection, labels: Mapping[str, Any]) -> Plan:
        """Decide the cuts for the log behind `con`; `labels` maps task -> WindowLabel."""
        window = max((label.window for label in labels.values() if label.window is not None), default=0)
        first, last = _span(con)
        cuts = self._cuts(first, last, window)
        _check_cuts(cuts, first, last, window)
        return Plan(
            candidates_sql=_candidates(cuts),
            training_sql=f"time < {instant_sql(cuts['train'][-1])}",
            eligible=self.config.eligible,
            users=self.config.users,
            cuts=cuts,
        )

    def _cuts(self, first: int, last: int, window: int) -> dict[str, list[int]]:
        config, step = self.config, window or _spacing(first, last)
        valid, test = config.valid, config.test
        if config.train is None and valid is None:
            if test is None:
                end = (last // DAY + 1) * DAY if step >= DAY else last + 1
                test = end - window
            valid = test - step
        if config.train is not None:
            train = list(config.train)
        else:
            assert valid is not None
            train = [valid - step * n for n in range(config.cuts, 0, -1) if valid - step * (n + 1) >= first]
            if not train:
                raise UserError(
                    f"data.splits: the log spans {_text(first, last)}, too short for automatic cuts: history, "
                    f"training, validation and test each need {format_duration(step)} (the longest label window). Give "
                    "shorter label windows, or dates under data.splits.train, valid and test."
                )
        cuts = {"train": train}
        return cuts | {name: [cut] for name, cut in (("valid", valid), ("test", test)) if cut is not None}


def _spacing(first: int, last: int) -> int:
    """Seconds between cuts without label windows; whole days where the log is long enough."""
    step = min(DEFAULT_SPACING, (last + 1 - first) // 10)
    return max(step - step % DAY or step, 1)


def _span(con: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """Seconds of the first and the last event."""
    first, last = con.execute(
        "SELECT epoch_us(min(time)) // 1000000, epoch_us(max(time)) // 1000000 FROM log"
    ).fetchall()[0]
    if first is None:
        raise UserError("data.splits: the log holds no events, so there is nothing to cut; check data.source.")
    return first, last


def _text(first: int, last: int) -> str:
    return f"{format_instant(first)} to {format_instant(last)}"


def _check_cuts(cuts: dict[str, list[int]], first: int, last: int, window: int) -> None:
    """Refuse cuts that are out of order, outside the data, or whose window reaches into the next split."""
    train = cuts["train"]
    if not train:
        raise UserError("data.splits.train: no training cut; check that `first` is not after `last`.")
    for previous, cut in pairwise(train):
        if cut <= previous:
            wrong = "twice" if cut == previous else f"after {format_instant(previous)}"
            raise UserError(
                f"data.splits.train: {format_instant(cut)} stands {wrong}; give every cut once, in rising order."
            )
    order = [(name, cut) for name, times in cuts.items() for cut in times]
    for name, cut in order:
        if cut <= first:
            raise UserError(
                f"data.splits.{name}: no event lies before the cut {format_instant(cut)}, the log spans "
                f"{_text(first, last)}; move the cut to a later date."
            )
        if cut + window > last + DAY:
            raise UserError(
                f"data.splits.{name}: the label window of {format_duration(window)} after the cut "
                f"{format_instant(cut)} ends at {format_instant(cut + window)}, but the log ends at "
                f"{format_instant(last)}; its labels would count events that are not there yet. Move the cut to "
                f"{format_instant((last + DAY - window) // DAY * DAY)} or earlier."
            )
    ends = [(name, times[-1]) for name, times in cuts.items()]
    for (name, cut), (later, limit) in pairwise(ends):
        if cut + max(window, 1) > limit:
            raise UserError(
                f"data.splits.{name}: the label window of the cut {format_instant(cut)} ends at "
                f"{format_instant(cut + window)}, after the {later} cut {format_instant(limit)}: labels of one split "
                f"would be history of the other. Move data.splits.{name} to {format_instant(limit - window)} or "
                f"earlier, or data.splits.{later} to {format_instant(cut + window)} or later."
            )


class LeaveOneOut:
    """Next-item comparisons: each user's last event is the test target, the last but one the validation target.

    Training examples see all but these two and have no target of their own: next-item losses use the positions inside.
    The cut is the time of the first event that is not visible.
    """

    class Config(Config):
        type: str = "leave_one_out"
        min_events: int = Field(3, ge=3)  # users with fewer are left out
        users: UserFolds = UserFolds()  # of attribute labels

    def __init__(self, config: LeaveOneOut.Config):
        self.config = config

    def plan(self, con: duckdb.DuckDBPyConnection, labels: Mapping[str, Any]) -> Plan:
        """Decide the targets; a label over a window is refused, since it would hold the targets of other splits."""
        for task, label in labels.items():
            if label.sql is not None:
                raise UserError(
                    f"tasks.{task}.label.sql: a label over a window needs cuts in time; under data.splits.type "
                    "leave_one_out only labels of the form `next: field` or `attribute: column` can be asked. Use "
                    "data.splits.type: time."
                )
        _span(con)
        ends = _union(
            "SELECT user_row, num_events - {} AS visible, {} AS split FROM people WHERE num_events >= {}", self.config
        )
        return Plan(
            candidates_sql=f"SELECT x.user_row, time AS cut, visible, split FROM ({ends}) AS x "
            f"JOIN log ON log.user_row = x.user_row AND log.position = x.visible",
            training_sql="position < (SELECT num_events - 2 FROM people WHERE people.user_row = log.user_row)",
            eligible=Eligible(window=ALL_TIME),
            users=self.config.users,
            by_position=True,
        )


def _union(template: str, config: LeaveOneOut.Config) -> str:
    targets: Sequence[tuple[int, int]] = [(2, SPLITS["train"]), (2, SPLITS["valid"]), (1, SPLITS["test"])]
    return " UNION ALL ".join(template.format(back, split, config.min_events) for back, split in targets)


REGISTRY = {"time": TimeSplit, "leave_one_out": LeaveOneOut}
