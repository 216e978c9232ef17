"""Checks that your own task, router, balancer, source or splitter keeps the contract of its seat, for your tests.

    supermoe.testing.check_router({"type": "my_package.routers:MyRouter", "temperature": 2.0})

Each takes the component's config as it would stand in YAML, and raises an `AssertionError` that says what is broken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import duckdb
import numpy as np
import torch
from torch import Tensor

from supermoe.config import ModelConfig, WindowLabel
from supermoe.data.batch import Batch, SetLabels
from supermoe.data.schema import FIRST_ID, FieldSchema, LabelSchema, Schema
from supermoe.data.splits import SPLITS
from supermoe.model.supermoe import SuperMoE
from supermoe.objectives.balancer import Step
from supermoe.serving.parity import probe_batch
from supermoe.typed_yaml import resolve

NAME = "checked"  # of the task under test
VOCABULARY, CLASSES, EXAMPLES = 12, 3, 24


def expect(holds: bool, complaint: str) -> None:
    """Raise an `AssertionError` with the complaint unless it holds."""
    if not holds:
        raise AssertionError(complaint)


def make(module: str, config: Mapping[str, Any], **runtime: Any) -> Any:
    """The component that a config names, its own `Config` validated."""
    cls: Any = resolve(module, config["type"])
    validated = cls.Config.model_validate(dict(config))
    expect(
        cls.Config.model_validate(validated.model_dump(mode="json")) == validated,
        "Config: the saved config does not load back equal",
    )
    return cls(validated, **runtime)


# --- tasks ------------------------------------------------------------------------------------------------------------


def check_task(config: Mapping[str, Any]) -> None:
    """A task: its prior, loss (a sum over what is asked), scores and metrics, also where nothing is asked."""
    cls: Any = resolve("supermoe.objectives.tasks", config["type"])
    kind, asked_field = cls.Config.label_kind, _label_field(config)
    expect(kind in ("number", "class", "set"), f"label_kind must be number, class or set, not {kind!r}")
    schema = _schema(kind, asked_field)
    task = make("supermoe.objectives.tasks", config, name=NAME, label=schema.labels[NAME], schema=schema)
    batch = probe_batch(schema, sorted((n % 7 for n in range(EXAMPLES)), reverse=True))
    labels = _labels(kind, asked_field is not None)
    counts_V = torch.bincount(batch.fields["item" if asked_field is None else asked_field], minlength=VOCABULARY)
    task.fit_prior(labels, counts_V)
    expect(
        np.isfinite(task.prior_loss) and task.prior_loss > 0,
        f"fit_prior: prior_loss must be above 0, not {task.prior_loss}",
    )
    torch.manual_seed(0)
    spec = task.head_spec()
    model = SuperMoE(schema, ModelConfig.model_validate({"dim": 16, "layers": 1, "heads": 1}), {NAME: spec}).eval()
    head = model.heads[NAME]
    task.init_head(head)
    _check_loss(task, model, dataclasses.replace(batch, labels={NAME: labels}), per_example=spec.reads == "example")
    _check_scores(task, model, dataclasses.replace(batch, labels={NAME: labels}))
    if spec.boosted:
        answer = task.decode(torch.randn(EXAMPLES, spec.size))
        expect(torch.allclose(task.decode(task.encode(answer)), answer, atol=1e-4), "encode: not the inverse of decode")
    again = make("supermoe.objectives.tasks", config, name=NAME, label=schema.labels[NAME], schema=schema)
    again.load_state(task.state())
    output = model(batch)
    for key, values in task.scores(head, output, batch).items():
        expect(
            torch.equal(values, again.scores(head, output, batch)[key]),
            f"state: scores['{key}'] change after load_state(state())",
        )


def _check_loss(task: Any, model: SuperMoE, batch: Batch, per_example: bool) -> None:
    output = model(batch)
    loss, count = task.loss(model.heads[NAME], output, batch)
    expect(
        loss.shape == () and loss.dtype == torch.float32,
        f"loss: expected an fp32 scalar, got {loss.dtype} {tuple(loss.shape)}",
    )
    expect(count == task.count(batch) > 0, f"count: {task.count(batch)} for a batch whose loss counted {count}")
    start = loss.item() / count / task.prior_loss
    if task.head_spec().kind == "linear":
        expect(0.9 < start < 1.1, f"init_head: the loss must start at the prior's, it starts at {start:.3f} of it")
    loss.backward(retain_graph=True)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    expect(all(bool(g.isfinite().all()) for g in gradients), "loss: a gradient is not finite")
    expect(any(bool(g.any()) for g in gradients), "loss: no parameter gets a gradient")
    if per_example:
        first = torch.arange(EXAMPLES) < EXAMPLES // 2
        halves = [_loss_of(task, model, output, batch, mask) for mask in (first, ~first)]
        expect(
            sum(c for _, c in halves) == count,
            "loss: the counts of two halves of the examples do not add up to the whole's",
        )
        expect(
            abs(sum(v for v, _ in halves) - loss.item()) < 1e-3 * abs(loss.item()),
            "loss: two halves do not add up to the whole",
        )
        expect(
            _loss_of(task, model, output, batch, torch.zeros(EXAMPLES).bool()) == (0.0, 0),
            "loss: not 0 where nothing is asked",
        )


def _loss_of(task: Any, model: SuperMoE, output: Any, batch: Batch, mask: Tensor) -> tuple[float, int]:
    """Loss and count when only the examples in the mask are asked."""
    masked = dataclasses.replace(batch, labels={NAME: _only(batch.labels[NAME], mask)})
    loss, count = task.loss(model.heads[NAME], output, masked)
    return loss.item(), count


def _check_scores(task: Any, model: SuperMoE, batch: Batch) -> None:
    labels = batch.labels[NAME]
    with torch.no_grad():
        scores = {key: value.numpy() for key, value in task.scores(model.heads[NAME], model(batch), batch).items()}
    prior = task.prior_scores(EXAMPLES)
    for key, array in {**prior, **scores}.items():
        expect(len(array) == EXAMPLES, f"scores['{key}']: {len(array)} rows for {EXAMPLES} examples")
    missing = prior.keys() - scores.keys()
    expect(not missing, f"prior_scores has {sorted(missing)}, which scores has not")
    for answer in (scores, prior):
        metrics = task.metrics(answer, labels)
        expect(
            task.main_metric in metrics,
            f"metrics: there is no main metric '{task.main_metric}' among {sorted(metrics)}",
        )
        expect(metrics[task.main_metric] <= 1, f"metrics: {task.main_metric} must be at most 1, which is perfect")
    nobody = _only(labels, torch.zeros(EXAMPLES).bool())
    expect(bool(np.isnan(task.metrics(scores, nobody)[task.main_metric])), "metrics: not NaN where nothing is asked")
    expect(bool(task.undefined(nobody)), "undefined: gives no reason where nothing is asked")


def _label_field(config: Mapping[str, Any]) -> str | None:
    label = WindowLabel.model_validate(config["label"])
    return label.field or label.next


def _schema(kind: Any, field: str | None) -> Schema:
    item = FieldSchema(kind="category", size=VOCABULARY)
    label = LabelSchema(kind=kind, field=field, num_classes=VOCABULARY if field else CLASSES)
    if field is None and kind != "number":
        label = label.model_copy(update={"classes": [f"class {c}" for c in range(CLASSES)]})
    return Schema(
        fields={field or "item": item, "amount": FieldSchema(kind="number")}, features=["f"], labels={NAME: label}
    )


def _labels(kind: str, of_field: bool) -> Any:
    """Labels of all classes in turn; every fourth example is not asked."""
    index = torch.arange(EXAMPLES)
    asked = index % 4 != 3
    classes = FIRST_ID + index % (VOCABULARY - FIRST_ID) if of_field else index % CLASSES
    if kind == "number":
        return torch.where(asked, (index % 2).float(), torch.nan)
    if kind == "class":
        return torch.where(asked, classes, -1)
    return _only(SetLabels(torch.ones(EXAMPLES).bool(), torch.arange(EXAMPLES + 1), classes), asked)


def _only(labels: Any, mask: Tensor) -> Any:
    """The same labels where `mask` holds; the other examples are not asked."""
    if isinstance(labels, SetLabels):
        sizes = torch.where(mask, labels.offsets.diff(), 0)
        ids = labels.ids[torch.repeat_interleave(mask, labels.offsets.diff())]
        return SetLabels(labels.asked_B & mask, torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), ids)
    return torch.where(mask, labels, torch.nan if labels.is_floating_point() else -1)


# --- routers and balancers --------------------------------------------------------------------------------------------


def check_router(config: Mapping[str, Any], dim: int = 16, experts: int = 4, top_k: int = 2) -> None:
    """A router: k different experts per token, chosen by that token alone, weights that sum to one, a gradient."""
    torch.manual_seed(0)
    router = make("supermoe.model.routers", config, dim=dim, experts=experts, top_k=top_k)
    x_ND = torch.randn(50, dim)
    routing = router(x_ND)
    expert_NK, weight_NK = routing.expert_NK, routing.weight_NK
    expect(expert_NK.shape == weight_NK.shape == (50, top_k), f"expert_NK and weight_NK must be [50, {top_k}]")
    expect(
        expert_NK.dtype == torch.int64 and weight_NK.dtype == torch.float32,
        "expert_NK must be int64 and weight_NK fp32",
    )
    expect(bool(((expert_NK >= 0) & (expert_NK < experts)).all()), "expert_NK names an expert that is not there")
    expect(all(len(set(row)) == top_k for row in expert_NK.tolist()), "expert_NK names an expert twice for one token")
    expect(
        torch.equal(routing.counts_E, torch.bincount(expert_NK.flatten(), minlength=experts)),
        "counts_E does not count expert_NK",
    )
    if top_k > 1:
        torch.testing.assert_close(
            weight_NK.sum(1), torch.ones(50), msg="weight_NK must sum to 1 over the chosen experts"
        )
    part = router(x_ND[:7])
    expect(torch.equal(part.expert_NK, expert_NK[:7]), "a token's experts depend on the other tokens: not causal")
    expect(router(x_ND[:0]).expert_NK.shape == (0, top_k), "no tokens must give no choices")
    loss = (weight_NK * torch.arange(1, top_k + 1)).sum()
    if routing.aux_loss is not None:
        expect(routing.aux_loss.shape == () and bool(routing.aux_loss.isfinite()), "aux_loss must be a finite scalar")
        loss = loss + routing.aux_loss
    loss.backward()
    expect(
        any(p.grad is not None and bool(p.grad.any()) for p in router.parameters()),
        "no router parameter gets a gradient",
    )
    router.update(routing.counts_E)
    other = make("supermoe.model.routers", config, dim=dim, experts=experts, top_k=top_k)
    other.load_state_dict(router.state_dict())
    expect(
        torch.equal(other(x_ND).expert_NK, router(x_ND).expert_NK),
        "state_dict does not hold all that decides the choice",
    )


def check_balancer(config: Mapping[str, Any], names: tuple[str, ...] = ("first", "second", "third")) -> None:
    """A balancer: finite weights that sum to one, also where a task was not asked; all state in the checkpoint."""
    torch.manual_seed(0)
    balancer = make("supermoe.objectives.balancers", config, names=list(names))
    steps = [_step(len(names), absent=n == 2) for n in range(5)]
    for step in steps:
        kept = step.loss_T.clone()
        weight_T = balancer.weight_T = _answer(balancer, step)
        expect(torch.equal(kept.nan_to_num(-1), step.loss_T.nan_to_num(-1)), "forward changes the losses it is given")
        expect(
            weight_T.shape == (len(names),) and not weight_T.requires_grad,
            f"weights must be {len(names)} numbers without gradient",
        )
        expect(
            bool((weight_T.isfinite() & (weight_T >= 0)).all()),
            f"weights must be finite and not negative: {weight_T.tolist()}",
        )
        expect(abs(float(weight_T.sum()) - 1) < 1e-5, f"weights must sum to 1: {weight_T.tolist()}")
        share_T = balancer.share_T
        expect(
            share_T.shape == (len(names),) and bool(share_T.isfinite().all()),
            f"shares must be {len(names)} finite numbers: {share_T.tolist()}",
        )
    other = make("supermoe.objectives.balancers", config, names=list(names))
    other.load_state_dict(balancer.state_dict())
    expect(
        torch.equal(_answer(other, steps[0]), _answer(balancer, steps[0]))
        and torch.equal(other.share_T, balancer.share_T),
        "state_dict does not hold all that decides the weights",
    )


def _step(size: int, absent: bool) -> Step:
    """What a step of random losses and gradients shows; the first task is not asked where `absent`."""
    gradient_TX = torch.randn(size, 20, dtype=torch.float64)
    loss_T, after_T = torch.rand(2, size, dtype=torch.float64) + 0.5
    count_T = torch.full_like(loss_T, 10.0)
    if absent:
        gradient_TX[0], loss_T[0], after_T[0], count_T[0] = 0.0, torch.nan, torch.nan, 0.0
    return Step(loss_T, count_T, gradient_TX @ gradient_TX.t(), after_T)


def _answer(balancer: Any, step: Step) -> Tensor:
    """The weights after a step and an evaluation, asked in the order of training."""
    if balancer.every is not None:
        balancer.steer(step.gram_TT)
    weight_T = balancer(step)
    balancer.weight_T = weight_T
    balancer.observe(1 - step.loss_T)
    return balancer.weight_T


# --- sources and splits -----------------------------------------------------------------------------------------------


def check_source(source: Any) -> None:
    """A source object: its views have the canonical columns, and say the same when they are attached again."""
    counts = []
    for _ in range(2):
        with duckdb.connect() as con:
            tables = source.attach(con)
            types = _columns(con, tables.events)
            for column, wanted in (("user", None), ("time", "TIMESTAMP"), ("event", "VARCHAR")):
                expect(column in types, f"events have no column '{column}'")
                expect(wanted in (None, types[column]), f"events.{column} must be {wanted}, not {types[column]}")
            _expect_no_nulls(con, tables.events, ("user", "time"))
            if tables.users is not None:
                expect(
                    types["user"] == _columns(con, tables.users).get("user"),
                    "users.user and events.user must have one type",
                )
                twice = con.execute(f'SELECT count(*) - count(DISTINCT "user") FROM "{tables.users}"').fetchall()[0][0]
                expect(twice == 0, f"{twice} rows of users repeat a user")
            for name, view in tables.tables.items():
                expect(
                    _columns(con, view).get("time") == "TIMESTAMP",
                    f"table {name} has no column 'time' of type TIMESTAMP",
                )
                _expect_no_nulls(con, view, ("user", "time"))
            counts.append(con.execute(f'SELECT count(*), min(time), max(time) FROM "{tables.events}"').fetchall()[0])
    expect(counts[0] == counts[1], f"attached twice, the events differ: {counts}")


def _columns(con: duckdb.DuckDBPyConnection, view: str) -> dict[str, str]:
    return {row[0]: row[1] for row in con.execute(f'DESCRIBE "{view}"').fetchall()}


def _expect_no_nulls(con: duckdb.DuckDBPyConnection, view: str, columns: tuple[str, ...]) -> None:
    for column in columns:
        nulls = con.execute(f'SELECT count(*) FROM "{view}" WHERE "{column}" IS NULL').fetchall()[0][0]
        expect(nulls == 0, f"{view}.{column} is null in {nulls} rows")


LOG = """
CREATE TABLE log AS
SELECT user_row, row_number() OVER (PARTITION BY user_row ORDER BY n) - 1 AS position,
       row_number() OVER (ORDER BY user_row, n) - 1 AS row,
       TIMESTAMP '2020-01-01' + to_hours(n * 9 + user_row) AS time, 'view' AS event
FROM range(30) u(user_row), range(1060) e(n) WHERE (n * n + user_row) % 5 = 0;
CREATE TABLE people AS
SELECT user_row, user_row AS "user", min(row) AS first_row, count(*) AS num_events FROM log GROUP BY user_row
"""


def check_splits(config: Mapping[str, Any], label: Mapping[str, Any] | None = None) -> None:
    """A splitter, on 30 users over the 400 days from 2020-01-01: candidates are right, fitting sees the past only.

    `label` is the one label that is asked for; default: a count over 28 days.
    """
    splitter = make("supermoe.data.splits", config)
    asked = WindowLabel.model_validate(label or {"sql": "count(*)", "window": "28d"})
    with duckdb.connect() as con:
        con.execute(LOG)
        _check_plan(con, splitter.plan(con, {NAME: asked}))


def _check_plan(con: duckdb.DuckDBPyConnection, plan: Any) -> None:
    con.execute(f"CREATE TABLE candidates AS {plan.candidates_sql}")
    splits = {row[0] for row in con.execute("SELECT DISTINCT split FROM candidates").fetchall()}
    expect(SPLITS["train"] in splits, "no candidate is for training")
    expect(splits <= set(SPLITS.values()), f"unknown split codes {sorted(splits - set(SPLITS.values()))}")
    before = "SELECT count(*) FROM log WHERE log.user_row = c.user_row AND "
    before += "position < c.visible AND time > c.cut" if plan.by_position else "time < c.cut"
    wanted = "0" if plan.by_position else "c.visible"
    wrong = con.execute(f"SELECT count(*) FROM candidates c WHERE ({before}) <> {wanted}").fetchall()[0][0]
    expect(wrong == 0, f"`visible` is not the number of events before the cut for {wrong} candidates")
    held_out = f"split IN ({SPLITS['valid']}, {SPLITS['test']})"
    future = (
        f"SELECT count(*) FROM (SELECT * FROM log WHERE {plan.training_sql}) AS l JOIN candidates c USING (user_row) "
    )
    leaks = con.execute(future + f"WHERE {held_out} AND l.position >= c.visible").fetchall()[0][0]
    expect(leaks == 0, f"vocabularies would be fitted on {leaks} events that validation or test must predict")
