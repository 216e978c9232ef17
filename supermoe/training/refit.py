"""The last training of a run: once validation has said how long to train, its examples are trained on as well."""

from __future__ import annotations

from supermoe.data.merged import MergedStore
from supermoe.training.build import Run, build_run

FOLDER = "refit"  # in the run's folder


def build_refit(run: Run) -> Run:
    """A run from the beginning on training and validation examples; it stops at the best share of `run`'s schedule.

    Labels of attributes that depend on who is asked (`eligible`) stay at the cuts where they were.
    """
    told = {name: task.config for name, task in run.tasks.items()}
    attributes = [name for name, task in told.items() if task.label.attribute is not None and task.eligible is None]
    store = MergedStore(run.store, attributes)
    folder, progress = run.config.run / FOLDER, run.trainer.progress
    told_again = {"until": progress["best_share"], "replay": progress["evaluations"]}
    return build_run(run.config, store, folder=folder, world=run.trainer.world, **told_again)
