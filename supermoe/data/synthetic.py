"""A simulated log with a planted conflict of tasks, and the best scores that its histories allow.

A user's latent interest on four axes drifts from month to month and decides which topic of each axis's pair is chosen.
Labels depend on what can be seen of it before the cut, and on chance:

    s_k  interest on axis k: log((n_k+ + 1/2) / (n_k- + 1/2)) / SPREAD, of events of the topics k+ and k- in 56 days
    e    resolve: the same log-ratio of buys and carts, + 0.5
    g    absence: ln(1 + days since the last event) - 1.8

| task    | law                                              | training examples asked |
|---------|--------------------------------------------------|-------------------------|
| click   | logit 1.2 s_0 + 0.8 s_1                          | all                     |
| leave   | logit -1.2 s_0 + 0.8 s_1                         | 10 %                    |
| spend   | 5,000 + 2,000 s_0 s_1 + 2,000 N(0, 1)            | all                     |
| upgrade | logit -2 s_0 s_1                                 | 10 %                    |
| segment | four classes, logits 1.5 (s_2, -s_2, s_3, -s_3)  | 20 %                    |
| back    | logit -3 e g                                     | all                     |

`click` and `leave` pull along one axis in opposite directions, `spend` and `upgrade` along a product of two that the
linear tasks have no use for, `segment` needs the axes that all others ignore, `back` a product of event types and time
gaps. Given the history, the expected label is known: no model can do better.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from supermoe import typed_yaml
from supermoe.data.disk import publishing
from supermoe.data.sql import text
from supermoe.data.tables import SourceTables
from supermoe.typed_yaml import UserError

Array = NDArray[np.float64]

VERSION = 2
DAY = 86_400
MONTH = 28 * DAY  # the label window, and the time between two cuts
START = 1_704_067_200  # 2024-01-01 UTC
NUM_MONTHS = 8
CUTS = [START + month * MONTH for month in range(3, NUM_MONTHS)]  # three for training, one for validation, one for test
NUM_TRAINING_CUTS = 3
EVENTS = np.array(["view", "cart", "buy"])
NUM_AXES = 4
SPREAD = 1.3  # of the log-ratios, so that the s_k have a deviation of about 1
ASKED = {"click": 1.0, "leave": 0.1, "spend": 1.0, "upgrade": 0.1, "segment": 0.2, "back": 1.0}
SEGMENTS = np.array(["a", "b", "c", "d"])
MANIFEST = "simulation.json"


class Synthetic:
    """The simulated log: events, the table `outcomes` with one column per task, and `optimal_scores`.

    They are written to the folder `path` as Parquet when they are first asked for. The same seed gives the same log.
    """

    class Config(typed_yaml.Config):
        type: str = "synthetic"
        path: str  # folder of the simulated files
        users: int = Field(4000, ge=50)
        seed: int = Field(0, ge=0)

    def __init__(self, config: Synthetic.Config):
        self.config = config
        self.folder = Path(config.path).expanduser()

    def attach(self, con: duckdb.DuckDBPyConnection) -> SourceTables:
        """Make the views over the simulated files."""
        self._simulate_once()
        for view, name in (("source_events", "events"), ("source_table_outcomes", "outcomes")):
            con.execute(f"CREATE OR REPLACE VIEW {view} AS SELECT * FROM {text(str(self.folder / f'{name}.parquet'))}")
        return SourceTables("source_events", tables={"outcomes": "source_table_outcomes"})

    def fingerprint(self) -> Any:
        """What decides the content of the log."""
        return {"version": VERSION, "users": self.config.users, "seed": self.config.seed}

    def optimal_scores(self) -> dict[str, pa.Table]:
        """The expected label given the history by task: user_id, cut and score, as in files of predictions."""
        self._simulate_once()
        return {task: pq.read_table(self.folder / f"optimal_{task}.parquet") for task in ASKED}

    def _simulate_once(self) -> None:
        manifest = self.folder / MANIFEST
        if manifest.exists() and json.loads(manifest.read_text(encoding="utf-8")) == self.fingerprint():
            return
        if self.folder.exists() and not manifest.exists():
            raise UserError(
                f"data.source.path: {self.folder} exists and holds no simulated log, it would be overwritten; "
                f"name a new folder."
            )
        with publishing(self.folder) as beside:
            beside.mkdir()
            for name, table in simulate(self.config.users, self.config.seed).items():
                pq.write_table(table, beside / f"{name}.parquet")
            (beside / MANIFEST).write_text(json.dumps(self.fingerprint()), encoding="utf-8")


def simulate(num_users: int, seed: int) -> dict[str, pa.Table]:
    """Tables `events`, `outcomes` (null: not asked) and `optimal_<task>` (the expected labels), by name."""
    rng = np.random.default_rng(seed)
    user, time, topic, event = _events(num_users, rng)
    events = {"user": user, "time": _timestamps(time), "event": EVENTS[event], "topic": _topic_names()[topic]}
    events["price"] = np.exp(rng.normal(2 + 0.5 * (event == 2), 0.6))
    who, cut = np.repeat(np.arange(num_users), len(CUTS)), np.tile(CUTS, num_users)
    expected = expected_labels(*observe(user, time, topic, event, num_users))
    outcomes: dict[str, Any] = {"user": who, "time": _timestamps(cut + DAY)}
    outcomes |= {task: _draw(task, expected[task], cut, rng) for task in ASKED}
    events["file_order"] = np.arange(len(user))
    outcomes["file_order"] = np.arange(len(who))
    tables = {"events": pa.table(events), "outcomes": pa.table(outcomes)}
    when = _timestamps(cut).cast(pa.timestamp("us", tz="UTC"))
    for task, score in expected.items():
        optimal = pa.table({"user_id": who, "cut": when, "score": pa.array(score if score.ndim == 1 else list(score))})
        classes = {"classes": json.dumps(SEGMENTS.tolist())} if score.ndim == 2 else None
        tables[f"optimal_{task}"] = optimal.replace_schema_metadata(classes)
    return tables


def observe(user: NDArray, time: NDArray, topic: NDArray, event: NDArray, num_users: int) -> tuple[Array, Array, Array]:
    """What the labels depend on, for every user and cut: the s_k [n, axes], e [n] and g [n].

    Events are sorted by user and time; rows are users times cuts, the cuts of one user side by side.
    """
    topics, types, absence = [], [], []
    for cut in CUTS:
        before = time < cut
        last = np.full(num_users, START)
        np.maximum.at(last, user[before], time[before])
        absence.append(np.log1p((cut - last) / DAY) - 1.8)
        inside = before & (time >= cut - 2 * MONTH)
        topics.append(_counts(user[inside], topic[inside], num_users, 2 * NUM_AXES))
        types.append(_counts(user[inside], event[inside], num_users, len(EVENTS)))
    topics_n, types_n = (np.stack(counts, axis=1).reshape(num_users * len(CUTS), -1) for counts in (topics, types))
    interests = _log_ratio(topics_n[:, 0::2], topics_n[:, 1::2])
    resolve = _log_ratio(types_n[:, 2], types_n[:, 1]) + 0.5
    return interests, resolve, np.stack(absence, axis=1).ravel()


def _counts(user: NDArray, value: NDArray, num_users: int, num_values: int) -> NDArray:
    """How often each user has each value -> [users, values]."""
    cells = np.bincount(user * num_values + value, minlength=num_users * num_values)
    return cells.reshape(num_users, num_values)


def expected_labels(interests: Array, resolve: Array, absence: Array) -> dict[str, Array]:
    """The expected label of every task given the history: [n], for the classes of `segment` [n, 4]."""
    s0, s1, s2, s3 = interests.T
    by_class = 1.5 * np.stack([s2, -s2, s3, -s3], axis=1)
    return {
        "click": _sigmoid(1.2 * s0 + 0.8 * s1),
        "leave": _sigmoid(-1.2 * s0 + 0.8 * s1),
        "spend": 5000 + 2000 * s0 * s1,
        "upgrade": _sigmoid(-2 * s0 * s1),
        "segment": np.exp(by_class) / np.exp(by_class).sum(axis=1, keepdims=True),
        "back": _sigmoid(-3 * resolve * absence),
    }


def _events(num_users: int, rng: np.random.Generator) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """User, second, topic and type of every event, sorted by user and time."""
    per_day = np.exp(rng.normal(np.log(0.12), 0.4, num_users))
    num_sessions = rng.poisson(per_day * NUM_MONTHS * MONTH / DAY) + 2
    session_user = np.repeat(np.arange(num_users), num_sessions)
    session_time = START + rng.integers(0, NUM_MONTHS * MONTH, len(session_user))
    length = 1 + rng.poisson(0.8, len(session_user))
    session = np.repeat(np.arange(len(length)), length)
    within = np.arange(len(session)) - np.repeat(np.cumsum(length) - length, length)
    user = session_user[session]
    pace = np.exp(rng.normal(5, 0.5, num_users))  # seconds between two events of a session
    time = session_time[session] + within * (1 + rng.exponential(pace[user]).astype(np.int64))
    time = np.minimum(time, START + NUM_MONTHS * MONTH - 1)
    month = (time - START) // MONTH
    interest = _interests(num_users, rng)[user, month]
    axis = rng.integers(0, NUM_AXES, len(user))
    is_minus = rng.random(len(user)) > _sigmoid(1.2 * interest[np.arange(len(user)), axis])
    event = np.minimum(rng.poisson(0.7, len(user)), 2)
    order = np.lexsort((time, user))
    return user[order], time[order], (2 * axis + is_minus)[order], event[order]


def _interests(num_users: int, rng: np.random.Generator) -> Array:
    """Latent interests of every user, month and axis: each a stationary autoregression of deviation 1."""
    z = np.empty((num_users, NUM_MONTHS, NUM_AXES))
    z[:, 0] = rng.normal(size=(num_users, NUM_AXES))
    for month in range(1, NUM_MONTHS):
        z[:, month] = 0.8 * z[:, month - 1] + 0.6 * rng.normal(size=(num_users, NUM_AXES))
    return z


def _draw(task: str, expected: Array, cut: NDArray, rng: np.random.Generator) -> pa.Array:
    """Labels around their expectation; in training only a share of the examples is asked."""
    asked = (cut >= CUTS[NUM_TRAINING_CUTS]) | (rng.random(len(cut)) < ASKED[task])
    if task == "segment":
        drawn = (rng.random((len(cut), 1)) > expected.cumsum(axis=1)[:, :-1]).sum(axis=1)
        return pa.array(SEGMENTS[drawn], mask=~asked)
    if task == "spend":
        return pa.array(expected + rng.normal(0, 2000, len(cut)), mask=~asked)
    return pa.array(rng.random(len(cut)) < expected, mask=~asked)


def _log_ratio(above: Array, below: Array) -> Array:
    return np.clip(np.log((above + 0.5) / (below + 0.5)) / SPREAD, -2.5, 2.5)


def _topic_names() -> NDArray:
    return np.array([f"{axis}{sign}" for axis in range(NUM_AXES) for sign in ("plus", "minus")])


def _timestamps(seconds: NDArray) -> pa.Array:
    return pa.array(seconds * 1_000_000, pa.int64()).cast(pa.timestamp("us"))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))
