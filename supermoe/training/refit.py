"""The last training of a run: once validation has said how long to train, its examples are trained on as well."""

from __future__ import annotations

from supermoe.data.merged import MergedStore
from supermoe.training.build import Run, build_run, wants_refit

FOLDER = "refit"  # in the run's folder


def final_run(run: Run) -> Run:
    """The run whose weights are published, standing where it was left: a refit if the config asks for one, or `run`."""
    if not wants_refit(run.config, run.store):
        return run
    final = build_refit(run)
    final.trainer.resume()
    return final


def measured_run(run: Run, split: str, final: Run | None = None) -> Run:
    """The run to measure on a split: the final one on test, which is all that it has not trained on, else `run`."""
    if split != "test":
        return run
    return final or final_run(run)


def build_refit(run: Run) -> Run:
    """A run from the beginning on training and validation examples; it stops at the best share of `run`'s schedule.

    Labels of attributes that depend on who is asked (`eligible`) stay at the cuts where they were.
    """
    attributes = [name for name, task in run.tasks.items() if task.is_static and task.config.eligible is None]
    store = MergedStore(run.store, attributes)
    folder, progress = run.config.run / FOLDER, run.trainer.progress
    return build_run(
        run.config,
        store,
        folder=folder,
        until=progress["best_share"],
        replay=progress["evaluations"],
        world=run.trainer.world,
    )
