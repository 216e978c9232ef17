"""The seesaw study: every task alone, all together under each method, and who pays for whom.

A method is what the tasks are trained together with: a balancer (under the config's own read-out), a read-out (under
the balancer `equal`), or a variant, which is a name for overrides of the config. The store is prepared once, before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from supermoe.config import RunConfig, load_run
from supermoe.data.batches import label_rows
from supermoe.data.disk import publish_text, publishing, read_json, writing
from supermoe.data.prepare import fingerprint, prepare
from supermoe.data.store import Store
from supermoe.model.readouts import REGISTRY as READOUTS
from supermoe.objectives.balancers import REGISTRY as BALANCERS
from supermoe.objectives.task import Task
from supermoe.studies.baselines import boosting
from supermoe.studies.seesaw_report import write_seesaw_report
from supermoe.studies.seesaw_runs import ALONE, GRADIENTS, Training, carry_out, plan, progress, threads_per_training
from supermoe.studies.seesaw_table import Answers, aligned, compare, metric_of, read_predictions
from supermoe.training.build import build_tasks, num_epochs
from supermoe.training.metrics import finite, read_metrics
from supermoe.typed_yaml import UserError, build, nearest

REMEDY = "delete the folder it lies in and run the same command again"
REFERENCE = "reference.json"  # gain of every task alone: what the balancer `seesaw` takes as its reference
TEACHERS = "teachers"  # their answers to the training examples: what `loss.teachers` can name
SEESAW = "seesaw"  # the balancer that is given both
MAX_POINTS = 200  # of a curve of weights in the report


@dataclass(frozen=True)
class Request:
    """What the command was asked for."""

    config: Path
    overrides: list[str] = field(default_factory=list)
    seeds: int = 3
    methods: list[str] | None = None  # None: every balancer and read-out that needs no more to be told
    variants: dict[str, list[str]] = field(default_factory=dict)  # name -> overrides
    jobs: int = 1
    out: Path | None = None  # default: <run>/seesaw
    split: str = "test"


def study(request: Request) -> dict[str, Any]:
    """Train what is missing, compare, write seesaw.json, seesaw.md and plots -> the content of seesaw.json."""
    base = load_run(request.config, request.overrides)
    if len(base.tasks) < 2:
        raise UserError(f"{request.config}: a seesaw needs two tasks or more, there is only '{next(iter(base.tasks))}'")
    out = _folder(request, base)
    methods = method_configs(request, base)
    source = build("supermoe.data.sources", base.data.source)
    with writing(out):
        store = prepare(base, source)
        _check(store, request, methods, source)
        configs = {f"{ALONE}.{task}": alone(request, base, task) for task in base.tasks} | methods
        tasks = build_tasks(base, store)
        epochs = num_epochs(base, {name: task.head_spec() for name, task in tasks.items()}, store)
        budget = {"threads": threads_per_training(request.jobs), "epochs": epochs}
        trainings = plan(configs, request.seeds, out, store.fingerprint, **budget)
        singles = [training for training in trainings if training.name.startswith(f"{ALONE}.")]
        with progress(trainings) as bar:
            carry_out(singles, request.jobs, bar)
            publish_text(out / REFERENCE, json.dumps(references(singles), indent=1) + "\n")
            publish_teachers(singles, out / TEACHERS)
            carry_out(trainings, request.jobs, bar)
        result = _head(request, base) | summarise(tasks, store, request.split, trainings, _optimal(source))
        if base.report.boosting:
            for name, metrics in boosting(store, tasks, request.split).items():
                result["tasks"][name]["boosting"] = metrics[tasks[name].main_metric]
        publish_text(out / "seesaw.json", json.dumps(finite(result), indent=1) + "\n")
        write_seesaw_report(out, result)
    return result


def _folder(request: Request, base: RunConfig) -> Path:
    """Where the study lies."""
    return request.out or base.run / "seesaw"


# --- what is trained --------------------------------------------------------------------------------------------------


def own_method(config: RunConfig) -> str:
    """The method that the config itself describes: its balancer under its read-out."""
    return config.loss.balancer.type


def method_configs(request: Request, base: RunConfig) -> dict[str, RunConfig]:
    """Config of every method by name, the config's own first; all tasks, one store, one budget.

    Raises:
        UserError: for a method that is not known, or cannot be built; of those not asked for, it is printed.
    """
    known = [*BALANCERS, *READOUTS, *request.variants]
    names = request.methods or [*BALANCERS, *(name for name in READOUTS if name != base.model.readout.type)]
    found = {}
    for name in dict.fromkeys([own_method(base), *names, *request.variants]):
        if name not in known and name != own_method(base):
            raise UserError(f"--methods: unknown method '{name}', {nearest(name, known)}")
        try:
            config = load_run(request.config, [*request.overrides, *_overrides(name, request, base)])
            if name not in (SEESAW, *request.variants):  # whose reference may be what this study writes
                build("supermoe.objectives.balancers", config.loss.balancer, names=list(config.tasks))
            found[name] = config
        except UserError as error:
            if request.methods or name in request.variants or name == own_method(base):
                raise
            print(f"{name} is left out: {error}")
    return found


def _overrides(name: str, request: Request, base: RunConfig) -> list[str]:
    """What makes a method of the config."""
    if name in request.variants:
        return request.variants[name]
    if name == own_method(base):
        return []
    if name == SEESAW:
        out = _folder(request, base)
        return [f"loss.balancer={{type: {SEESAW}, reference: '{out / REFERENCE}'}}", f"loss.teachers={out / TEACHERS}"]
    return [f"model.readout={name}", "loss.balancer=equal"] if name in READOUTS else [f"loss.balancer={name}"]


def alone(request: Request, base: RunConfig, task: str) -> RunConfig:
    """The same encoder, budget and pre-training for one task only; early stopping follows this task."""
    others = [f"tasks.{name}=null" for name in base.tasks if name != task]
    config = load_run(request.config, [*request.overrides, *others, "loss.balancer=equal", "loss.teachers=null"])
    return config.model_copy(update={"features": base.features})  # whose windows may follow from all tasks' labels


def _check(store: Store, request: Request, methods: dict[str, RunConfig], source: Any) -> None:
    """Refuse a store without the splits that are needed, and methods that want another store."""
    if not len(store.rows_of("valid")):
        raise UserError("data.splits: a seesaw study needs a validation cut, which selects the weights; set valid")
    if not len(store.rows_of(request.split)):
        raise UserError(
            f"data.splits: the store holds no examples of the split {request.split}; give data.splits.test a cut, or "
            f"choose --split valid (and say so: the weights were selected on it)"
        )
    for name, config in methods.items():
        if config.store != store.path or (store.fingerprint and fingerprint(config, source) != store.fingerprint):
            raise UserError(f"--variant {name}: all methods share one store; only model, loss and training may differ")


def _optimal(source: Any) -> Mapping[str, pa.Table]:
    """The best scores there can be, where the source is a simulation that knows them."""
    return source.optimal_scores() if hasattr(source, "optimal_scores") else {}


def references(singles: list[Training]) -> dict[str, float]:
    """Best validation gain over the prior of every task alone, the mean over seeds."""
    gains: dict[str, list[float]] = {}
    for training in singles:
        task = training.name.removeprefix(f"{ALONE}.")
        rows = [row["gain"][task] for row in read_metrics(training.folder) if row["kind"] == "valid"]
        gains.setdefault(task, []).append(max((gain for gain in rows if gain is not None), default=0.0))
    return {task: float(np.mean(values)) for task, values in gains.items()}


def publish_teachers(singles: list[Training], folder: Path) -> None:
    """Lay the answers of every task alone to the training examples out as `loss.teachers` wants them."""
    for training in singles:
        task = training.name.removeprefix(f"{ALONE}.")
        with publishing(folder / f"seed{training.seed}" / f"{task}.parquet") as beside:
            shutil.copyfile(training.folder / "predictions" / "train" / f"{task}.parquet", beside)


# --- what came of it --------------------------------------------------------------------------------------------------


def _head(request: Request, base: RunConfig) -> dict[str, Any]:
    """What was asked for."""
    head = {"config": str(request.config), "overrides": request.overrides, "variants": request.variants}
    head |= {"split": request.split, "selected_on": "valid", "own": own_method(base)}
    return head | {"seeds": list(range(base.seed, base.seed + request.seeds))}


def summarise(
    tasks: Mapping[str, Task], store: Store, split: str, trainings: list[Training], optimal: Mapping[str, pa.Table]
) -> dict[str, Any]:
    """What came of the trainings, measured on a split, as plain data; see `compare`."""
    runs: dict[str, list[Training]] = {}
    for training in trainings:
        runs.setdefault(training.name, []).append(training)
    methods = [name for name in runs if not name.startswith(f"{ALONE}.")]
    answers = {}
    for name, task in tasks.items():
        folders = {ALONE: runs[f"{ALONE}.{name}"]} | {method: runs[method] for method in methods}
        tables = {of: [read_predictions(run.folder, split, name) for run in found] for of, found in folders.items()}
        answers[name] = Answers(task.main_metric, tables)
    result = compare(answers)
    rows = store.rows_of(split)
    for name, task in tasks.items():
        prior = task.metrics(task.prior_scores(len(rows)), label_rows(store.labels[name], rows))
        result["tasks"][name]["prior"] = prior[task.main_metric]
        if name in optimal:
            best = aligned(optimal[name], answers[name].tables[ALONE][0])
            result["tasks"][name]["optimal"] = metric_of(best, task.main_metric)
    for method in methods:
        result["methods"][method] |= _training_facts(runs[method])
    return result


def _training_facts(runs: Sequence[Training]) -> dict[str, Any]:
    """Cost of a method, and what happened inside its first seed's training."""
    first = runs[0].folder
    reports = [read_json(run.folder / "report.json", REMEDY, "router") for run in runs]
    rows = [row for row in read_metrics(first) if row["kind"] == "train"]
    rows = rows[:: max(1, len(rows) // MAX_POINTS)]
    return {
        "parameters": reports[0]["parameters"],
        "seconds_per_step": float(np.mean([60 * r["training_minutes"] / max(r["steps"], 1) for r in reports])),
        "weights": {"step": [row["step"] for row in rows], "weight": [shared_weights(row) for row in rows]},
        "gradients": read_json(first / GRADIENTS, REMEDY, "cosine"),
        "experts": {
            layer: {name.removeprefix("task "): load for name, load in health["by"].items() if name.startswith("task ")}
            for layer, health in reports[0]["router"].items()
        },
    }


def shared_weights(row: dict[str, Any]) -> dict[str, float]:
    """Weight of every loss in what is shared, from a line of metrics.jsonl: times its share where it has one."""
    share = row.get("share", {})
    return {name: weight * share.get(name, 1.0) for name, weight in row["weight"].items()}
