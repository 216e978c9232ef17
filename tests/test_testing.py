"""The contract checks pass on everything built in, and each notices a component that breaks its contract."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import make_log, make_users

from supermoe.data.sources import CompleteJourney, Files, Frames
from supermoe.data.splits import TimeSplit
from supermoe.model.routers import SoftmaxRouter
from supermoe.objectives.balancers import REGISTRY as BALANCERS
from supermoe.objectives.balancers import Equal
from supermoe.objectives.jacobian_descent import JacobianDescent
from supermoe.objectives.tasks import Binary
from supermoe.testing import check_balancer, check_router, check_source, check_splits, check_task

SQL = {"sql": "count(*) > 0", "window": "28d"}
TASKS = [
    {"type": "binary", "label": SQL},
    {"type": "regression", "label": SQL},
    {"type": "regression", "label": SQL, "loss": "huber"},
    {"type": "multiclass", "label": {"attribute": "age"}},
    {"type": "multiclass", "label": {"attribute": "age"}, "label_smoothing": 0.1},
    {"type": "ordinal", "label": {"attribute": "age"}},
    {"type": "multilabel", "label": {**SQL, "sql": "list(distinct item)"}},
    {"type": "retrieval", "label": {**SQL, "sql": "list(distinct item)", "field": "item"}},
    {"type": "next_item", "label": {"next": "item"}},
]


@pytest.mark.parametrize("config", TASKS, ids=lambda c: "-".join([c["type"], *sorted(c.keys() - {"type", "label"})]))
def test_builtin_tasks(config: dict) -> None:
    check_task(config)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balance", ["bias", "aux", "none"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_builtin_routers(kind: str, balance: str, top_k: int) -> None:
    check_router({"type": kind, "balance": balance}, top_k=top_k)


@pytest.mark.parametrize("name", BALANCERS)
def test_builtin_balancers(name: str, tmp_path: Path) -> None:
    if issubclass(BALANCERS[name], JacobianDescent):
        pytest.importorskip("torchjd", reason="the extra `torchjd` is not installed")
    path = tmp_path / "alone.json"
    path.write_text('{"first": 0.1, "second": 0.2, "third": 0.3}')
    told = {"fixed": {"weights": {"first": 2.0}}, "seesaw": {"reference": str(path)}}
    check_balancer({"type": name} | told.get(name, {}))


@pytest.mark.parametrize(
    "config",
    [
        {"type": "time"},
        {"type": "time", "test": "2020-12-01", "valid": "2020-10-01", "train": ["2020-06-01", "2020-08-01"]},
    ],
    ids=["automatic", "dates"],
)
def test_builtin_time_splits(config: dict) -> None:
    check_splits(config)


def test_builtin_leave_one_out() -> None:
    check_splits({"type": "leave_one_out"}, label={"next": "item"})


class MeanLoss(Binary):
    """A mean where a sum is asked for."""

    def loss(self, head, output, batch):
        total, count = super().loss(head, output, batch)
        return total / max(count, 1), count


class NoPrior(Binary):
    """Starts anywhere."""

    def init_head(self, head) -> None:
        torch.nn.init.constant_(head.bias, 3.0)


class NotInverse(Binary):
    """Trees would answer something else."""

    def encode(self, answer):
        return answer[:, None]


class LooksAround(SoftmaxRouter):
    """A choice that depends on the other tokens of the batch."""

    def forward(self, x_ND):
        return super().forward(x_ND + x_ND.sum(0))


class CountsNothing(SoftmaxRouter):
    """Counts that are not those of the choices."""

    def forward(self, x_ND):
        routing = super().forward(x_ND)
        return dataclasses.replace(routing, counts_E=torch.zeros_like(routing.counts_E))


class Drifts(Equal):
    """State that no checkpoint holds, and a sum that is not one."""

    def forward(self, step):
        return self.weight_T * 2


class NaNWhereNotAsked(Equal):
    """Weights straight from the losses."""

    def forward(self, step):
        return step.loss_T / step.loss_T.sum()


class FitsOnTheFuture(TimeSplit):
    """Vocabularies from the whole log."""

    def plan(self, con, labels):
        return dataclasses.replace(super().plan(con, labels), training_sql="true")


class SeesTheCut(TimeSplit):
    """One event too many."""

    def plan(self, con, labels):
        plan = super().plan(con, labels)
        return dataclasses.replace(
            plan, candidates_sql=f"SELECT user_row, cut, visible + 1 AS visible, split FROM ({plan.candidates_sql})"
        )


@pytest.mark.parametrize(
    ("check", "config", "complaint"),
    [
        (check_task, {"type": f"{__name__}:MeanLoss", "label": SQL}, "do not add up|start at the prior"),
        (check_task, {"type": f"{__name__}:NoPrior", "label": SQL}, "start at the prior"),
        (check_task, {"type": f"{__name__}:NotInverse", "label": SQL}, "encode: not the inverse"),
        (check_router, {"type": f"{__name__}:LooksAround"}, "depend on the other tokens"),
        (check_router, {"type": f"{__name__}:CountsNothing"}, "counts_E does not count"),
        (check_balancer, {"type": f"{__name__}:Drifts"}, "sum to 1"),
        (check_balancer, {"type": f"{__name__}:NaNWhereNotAsked"}, "finite and not negative"),
        (check_splits, {"type": f"{__name__}:FitsOnTheFuture"}, "fitted on [0-9]+ events"),
        (check_splits, {"type": f"{__name__}:SeesTheCut"}, "not the number of events before the cut"),
    ],
    ids=lambda value: value["type"].partition(":")[2] if isinstance(value, dict) else None,
)
def test_broken_components_are_noticed(check, config: dict, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check(config)


def test_builtin_sources(tmp_path: Path) -> None:
    log, users = make_log(), make_users()
    log.to_parquet(tmp_path / "events.parquet")
    users.to_csv(tmp_path / "users.csv", index=False)
    config = {"events": str(tmp_path / "events.parquet"), "users": str(tmp_path / "users.csv")}
    check_source(Files(Files.Config.model_validate(config)))
    check_source(CompleteJourney(CompleteJourney.Config()))
    check_source(Frames({"buy": log, "return": log.head(5)}, users, tables={"visits": log[["user", "time"]]}))


class Broken(Frames):
    """A source whose events view is another one."""

    def __init__(self, select: str):
        super().__init__(make_log().head(50), make_users())
        self.select = select

    def attach(self, con):
        tables = super().attach(con)
        con.execute(f"CREATE OR REPLACE TEMP VIEW broken AS SELECT {self.select} FROM {tables.events}")
        return dataclasses.replace(tables, events="broken")


@pytest.mark.parametrize(
    ("select", "complaint"),
    [
        ("* EXCLUDE (event)", "events have no column 'event'"),
        ("* REPLACE (CAST(time AS DATE) AS time)", "events.time must be TIMESTAMP, not DATE"),
        ('* REPLACE (nullif("user", \'u01\') AS "user")', "broken.user is null in [0-9]+ rows"),
        ('* REPLACE (length("user") AS "user")', "must have one type"),
        ("* REPLACE (time + to_seconds(CAST(1e6 * random() AS INTEGER)) AS time)", "attached twice, the events differ"),
    ],
)
def test_broken_sources_are_noticed(select: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_source(Broken(select))
