"""Users taken in portions that fit in memory, with their events and examples under names that SQL can ask.

While a chunk is at hand the connection holds `chunk_events` (the chunk's rows of `log` and `gap_days`, the days since
the user's previous event) and `chunk_examples` (_example, user_row, cut, visible, split); `_example` is the row among
all examples of the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import duckdb
import numpy as np

from supermoe.config import Eligible
from supermoe.data.expressions import EXAMPLE, check, check_events, holds, of_types
from supermoe.data.splits import Plan
from supermoe.data.staging import Staged
from supermoe.typed_yaml import ALL_TIME

# per GB of DuckDB's memory limit; a chunk ends where its shares of these add up to one
EVENTS, EXAMPLES, VISIBLE = 4_000_000, 100_000, 6_000_000


@dataclass(frozen=True)
class Chunk:
    """Users first_user .. end_user - 1: where their events lie among the store's, and their examples B in order."""

    first_user: int
    offsets: np.ndarray  # int64 [users + 1]: rows of their events among all
    first_example: int
    user_B: np.ndarray  # row among all users
    cut_B: np.ndarray  # seconds UTC
    visible_B: np.ndarray
    split_B: np.ndarray

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.user_B)


def chunks(staged: Staged, plan: Plan) -> Iterator[Chunk]:
    """All users in order; examples are the plan's candidates for whom `plan.eligible` holds, sorted by (user, cut)."""
    con = staged.con
    check(con, plan.eligible.sql, "data.splits.eligible.sql")
    check_events(plan.eligible.events, staged.event_types, "data.splits.eligible.events")
    seen = "WHERE visible > 0" if plan.eligible == Eligible() else ""  # what the default condition says
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE candidates AS FROM ({plan.candidates_sql}) {seen} ORDER BY user_row, cut, split"
    )
    people = con.execute(
        "SELECT first_row, num_events, num_examples, visible FROM people LEFT JOIN (SELECT user_row, count(*) AS "
        "num_examples, sum(visible) AS visible FROM candidates GROUP BY user_row) USING (user_row) ORDER BY user_row"
    ).fetchnumpy()
    first_row, num_events = people["first_row"].astype(np.int64), people["num_events"].astype(np.int64)
    num_examples, visible = (np.ma.filled(people[name], 0).astype(np.float64) for name in ("num_examples", "visible"))
    limit = con.execute("SELECT parse_formatted_bytes(current_setting('memory_limit'))").fetchall()[0][0] / 1e9
    share = num_events / EVENTS + num_examples / EXAMPLES + visible / VISIBLE
    share = np.cumsum(share / limit).astype(np.int64)
    edges = [0, *(np.flatnonzero(np.diff(share)) + 1), len(share)]
    first_example = 0
    for first, end in pairwise(edges):
        _load(con, first, end)
        if plan.eligible != Eligible():
            _keep_eligible(con, plan.eligible, first_example)
        rows = con.execute(
            f"SELECT user_row, epoch_us(cut) // 1000000 AS cut, visible, split FROM chunk_examples ORDER BY {EXAMPLE}"
        ).fetchnumpy()
        offsets = np.append(first_row[first:end], first_row[end - 1] + num_events[end - 1])
        columns = (rows[name].astype(np.int64) for name in ("user_row", "cut", "visible", "split"))
        chunk = Chunk(first, offsets, first_example, *columns)
        first_example += chunk.num_examples
        yield chunk
    con.execute("DROP VIEW chunk_events; DROP TABLE chunk_examples; DROP TABLE candidates")


def _load(con: duckdb.DuckDBPyConnection, first: int, end: int) -> None:
    """Make `chunk_events`, a view so that a query reads only the columns it names, and `chunk_examples`."""
    gap = "epoch(time - lag(time) OVER (PARTITION BY user_row ORDER BY position)) / 86400"
    con.execute(
        f"CREATE OR REPLACE TEMP VIEW chunk_events AS SELECT *, {gap} AS gap_days "
        f"FROM log WHERE user_row >= {first} AND user_row < {end}"
    )
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE chunk_examples AS SELECT rowid AS {EXAMPLE}, * FROM candidates "
        f"WHERE user_row >= {first} AND user_row < {end}"
    )


def _keep_eligible(con: duckdb.DuckDBPyConnection, eligible: Eligible, first_example: int) -> None:
    """Reduce `chunk_examples` to those for whom the condition holds, numbered from `first_example`."""
    size, first = con.execute(f"SELECT count(*), coalesce(min({EXAMPLE}), 0) FROM chunk_examples").fetchall()[0]
    rows = history_rows(eligible.window, eligible.events)
    kept = first + np.flatnonzero(holds(con, rows, eligible.sql, first, size, "data.splits.eligible.sql"))
    con.register("kept_examples", {"number": kept})
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE chunk_examples AS SELECT * REPLACE ({first_example} + row_number() OVER "
        f"(ORDER BY {EXAMPLE}) - 1 AS {EXAMPLE}) FROM chunk_examples WHERE {EXAMPLE} IN (SELECT number FROM "
        "kept_examples)"
    )


def is_eligible(con: duckdb.DuckDBPyConnection, chunk: Chunk, eligible: Eligible, key: str) -> np.ndarray:
    """Bool per example of the chunk at hand: does the condition hold for it."""
    rows = history_rows(eligible.window, eligible.events)
    return holds(con, rows, eligible.sql, chunk.first_example, chunk.num_examples, key)


def history_rows(window: int, events: list[str] | None) -> str:
    """SELECT of what each example of the chunk knows: its user's rows in the `window` seconds before the cut.

    Columns: those of the log, `gap_days`, and `age_days` (days before the cut).
    """
    conditions = ["l.position < x.visible", of_types(events)]
    if window != ALL_TIME:
        conditions.append(f"l.time >= x.cut - to_seconds({window})")
    return _rows("chunk_events", "epoch(x.cut - l.time) / 86400 AS age_days", conditions)


def future_rows(window: int | None, events: list[str] | None, table: str | None) -> str:
    """SELECT of what happened to each example's user in `[cut, cut + window)`, in the log or in a declared table.

    Columns: those of the log or table, and `ahead_days` (days after the cut).
    """
    source = f"table_{table}" if table else "chunk_events"
    # what lies before all cuts of the chunk, or behind all windows, need not be joined
    conditions = ["l.time >= (SELECT min(cut) FROM chunk_examples)", of_types(events)]
    conditions.append("l.time >= x.cut" if table else "l.position >= x.visible")
    if window is not None:
        conditions.append(f"l.time < x.cut + to_seconds({window})")
        conditions.append(f"l.time < (SELECT max(cut) FROM chunk_examples) + to_seconds({window})")
    return _rows(source, "epoch(l.time - x.cut) / 86400 AS ahead_days", conditions)


def _rows(source: str, distance: str, conditions: list[str]) -> str:
    return (
        f"SELECT x.{EXAMPLE}, l.* EXCLUDE (user_row), {distance} FROM {source} AS l "
        f"JOIN chunk_examples AS x ON l.user_row = x.user_row AND {' AND '.join(conditions)}"
    )
