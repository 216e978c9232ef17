"""What a run is found to be worth: predictions and report, with boosting on the same features beside it."""

from __future__ import annotations

from supermoe.studies.baselines import boosting
from supermoe.training.build import Run
from supermoe.training.evaluation import Evaluation
from supermoe.training.predictions import write_predictions
from supermoe.training.report import write_report


def write_measurement(run: Run, measured: Run, evaluation: Evaluation) -> str:
    """Write predictions and report of `evaluation` into the run's folder -> the report's table.

    `measured` is the run whose weights were evaluated: `run` or its refit, whose tasks and training examples count.
    """
    config = run.config
    baseline = boosting(measured.store, run.tasks, evaluation.split) if config.report.boosting else {}
    write_predictions(config.run / "predictions", run.store, measured.tasks, evaluation)
    facts = run.facts() | {"second_opinions": measured.opinion_shares()}
    return write_report(config.run, run.tasks, evaluation, baseline, facts, config.report.plots)
