"""The trainings of a seesaw study: which there are, which are done, and how the others are spread over processes.

Each is a run folder like any other, named by what is trained, its seed and a hash of all that decides its outcome. A
finished one is used again; one that was stopped continues from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from supermoe import __version__
from supermoe.config import RunConfig, load_run
from supermoe.data.disk import publish_text
from supermoe.data.store import Store
from supermoe.studies.gradients import gradient_cosines
from supermoe.training.build import build_run
from supermoe.training.checkpoint import FREE_KEYS
from supermoe.training.environment import write_environment
from supermoe.training.predictions import write_predictions
from supermoe.training.report import write_report
from supermoe.training.second_opinions import add_second_opinions
from supermoe.typed_yaml import UserError, dump

ALONE = "alone"
GRADIENTS = "gradients.json"


@dataclass(frozen=True)
class Training:
    """One training of a study: a task alone (`alone.<task>`) or all together under a method."""

    name: str
    seed: int
    config: RunConfig  # `run` is its folder

    @property
    def folder(self) -> Path:
        """Where its outputs lie."""
        return self.config.run

    @property
    def is_done(self) -> bool:
        """Whether everything that the study reads has been written."""
        return (self.folder / "report.json").exists()


def plan(
    configs: dict[str, RunConfig], seeds: int, out: Path, mark: str, *, threads: int, epochs: int
) -> list[Training]:
    """Every config under every seed.

    Args:
        configs: by the name of what is trained.
        out: folder of the study; `mark`: the store's fingerprint.
        threads, epochs: of one training, where the config leaves them open: the same budget for all.
    """
    found = []
    for name, config in configs.items():
        # What is compared are the weights that validation selected; to train them again would double every cost.
        training = {"threads": config.training.threads or threads, "epochs": config.training.epochs or epochs}
        training |= {"keep_checkpoints": 1, "refit": False}
        shared = {
            "data": config.data.model_copy(update={"store": config.store}),
            "training": config.training.model_copy(update=training),
        }
        for seed in range(config.seed, config.seed + seeds):
            one = config.model_copy(update={**shared, "seed": seed})
            folder = out / "runs" / f"{name}-seed{seed}-{digest(one, mark)}"
            found.append(Training(name, seed, one.model_copy(update={"run": folder})))
    return found


def digest(config: RunConfig, mark: str) -> str:
    """Hash of all that decides the outcome of a training, the version of supermoe included."""
    content = _without_free(config.model_dump(mode="json"))
    text = json.dumps([content, mark, __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _without_free(value: Any, key: str = "") -> Any:
    """A nested mapping without the keys that may change within a run."""
    if not isinstance(value, dict):
        return value
    prefix = f"{key}." if key else ""
    return {name: _without_free(item, prefix + name) for name, item in value.items() if prefix + name not in FREE_KEYS}


def progress(trainings: list[Training]) -> tqdm:
    """A bar over all trainings, those that are done counted; it estimates the time that the others take."""
    done = sum(training.is_done for training in trainings)
    return tqdm(total=len(trainings), initial=done, desc="seesaw", unit=" runs")


def carry_out(trainings: list[Training], jobs: int, bar: tqdm) -> None:
    """Train whatever is not done yet, `jobs` at a time.

    Raises:
        UserError: naming the first training that failed and why, once all others are through.
    """
    waiting = [training for training in trainings if not training.is_done]
    failed: dict[str, str] = {}
    for training in waiting:
        publish_text(training.folder / "config.yaml", dump(training.config))
    for training, error in (_one_by_one if jobs == 1 else _in_processes(jobs))(waiting):
        bar.set_postfix_str(training.folder.name)
        bar.update()
        if error is not None:
            failed[training.folder.name] = str(error)
    if failed:
        name, reason = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(waiting)} trainings failed; {name}: {reason}. The finished ones are kept: mend "
            f"it, or leave this method out with --methods, and run the same command again"
        )


Outcomes = Iterator[tuple[Training, UserError | None]]


def _one_by_one(trainings: Iterable[Training]) -> Outcomes:
    for training in trainings:
        try:
            train(training.folder)
            yield training, None
        except UserError as error:
            yield training, error


def _in_processes(jobs: int) -> Any:
    """Like `_one_by_one` over a pool; each worker is a fresh interpreter, as threads of torch do not survive a fork."""

    def outcomes(trainings: Iterable[Training]) -> Outcomes:
        pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
        try:
            futures: dict[Future, Training] = {pool.submit(train, one.folder): one for one in trainings}
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, UserError):
                    raise error
                yield futures[future], error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()

    return outcomes


def train(folder: Path) -> None:
    """Train the config that lies in a run folder, and write what the study reads; `log.txt` has what it printed."""
    config = load_run(folder / "config.yaml")
    with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        run = build_run(config, Store.open(config.store))
        run.trainer.resume()
        write_environment(folder)
        run.trainer.fit()
        answers = folder / "predictions"
        if len(config.tasks) == 1 and not (answers / "train").exists():
            # A model of all tasks may learn from these: the network's, as trees know these labels by heart.
            write_predictions(answers, run.store, run.tasks, run.evaluate("train"))
        publish_text(folder / GRADIENTS, json.dumps(gradient_cosines(run)))
        add_second_opinions(run)
        for split in ("valid", "test"):
            if len(run.store.rows_of(split)):
                evaluation = run.evaluate(split)
                write_predictions(answers, run.store, run.tasks, evaluation)
        write_report(folder, run.tasks, evaluation, {}, run.facts(), plots=False)


def threads_per_training(jobs: int) -> int:
    """An even share of the cores."""
    return max(1, (os.cpu_count() or 1) // jobs)
