"""`python -m supermoe.train --config FILE [a.b=c ...]`: from a log to a model, its report, predictions, embeddings.

Prepares the store if it is missing or stale. A run that was stopped continues with the same command.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from supermoe import cli
from supermoe.config import RunConfig
from supermoe.data.disk import publish_text, writing
from supermoe.data.prepare import prepare
from supermoe.data.store import Store
from supermoe.distributed.mesh import World, start
from supermoe.serving import artifact
from supermoe.serving.card import CardFacts
from supermoe.serving.export import export
from supermoe.serving.population import Request
from supermoe.serving.publication import make_room
from supermoe.studies.baselines import boosting
from supermoe.training.build import Run, build_run, wants_refit
from supermoe.training.environment import write_environment
from supermoe.training.evaluation import Evaluation
from supermoe.training.predictions import write_predictions
from supermoe.training.refit import build_refit
from supermoe.training.report import write_report
from supermoe.typed_yaml import build, dump, parse_instant

DAY = 86_400


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    config = cli.read_config(cli.config_parser(__doc__ or "").parse_args(argv))
    with writing(config.run), start(config.distributed) as world:
        train(config, world=world)


def train(config: RunConfig, source: Any = None, world: World | None = None) -> None:
    """Everything a config asks for, from its source or the one given; prints a table and where the outputs lie.

    All ranks of a `world` train, evaluate and export their shares; the first writes what there is one of.
    """
    world = world or World()
    source = source or build("supermoe.data.sources", config.data.source)
    store = world.first(lambda: prepare(config, source)) or Store.open(config.store)
    run = build_run(config, store, world=world)
    run.trainer.resume()  # first: a run of another config is not touched
    world.first(lambda: describe(config))
    run.trainer.fit()
    final = fit_again(run) if wants_refit(run.config, run.store) else run
    measured = final if run.measured_split == "test" else run  # a model is not measured on what it was trained on
    evaluation = measured.evaluate(run.measured_split)
    table = world.first(lambda: conclude(run, measured, final, evaluation))
    as_of = (parse_instant(store.summary["last_event"]) // DAY + 1) * DAY  # the midnight after the last event
    embeddings, request = config.run / "embeddings", Request(source, as_of).share(world.rank, world.size)
    world.first(lambda: make_room(embeddings, request.shards))
    export(artifact.Artifact.load(config.run / "model"), request, embeddings)
    world.first(lambda: print(f"\n{table}\n\n{places(config, evaluation)}"))


def describe(config: RunConfig) -> None:
    """Write what a run is told and runs on into its folder."""
    publish_text(config.run / "config.yaml", dump(config))
    write_environment(config.run)


def conclude(run: Run, measured: Run, final: Run, evaluation: Evaluation) -> str:
    """Write predictions, report and model folder -> the report's table."""
    config = run.config
    baseline = boosting(measured.store, run.tasks, evaluation.split) if config.report.boosting else {}
    write_predictions(config.run / "predictions", run.store, measured.tasks, evaluation)
    table = write_report(config.run, run.tasks, evaluation, baseline, run.facts(), config.report.plots)
    save_model(final, evaluation)
    return table


def places(config: RunConfig, evaluation: Evaluation) -> str:
    """Where the outputs lie, one line each."""
    paths = {"report": "report.md", "predictions": f"predictions/{evaluation.split}"}
    paths |= {"model": "model", "embeddings": "embeddings"}
    return "\n".join(f"{name:12}{config.run / path}" for name, path in paths.items())


def fit_again(run: Run) -> Run:
    """The run that has trained on validation examples as well."""
    if run.trainer.world.is_first:
        tqdm.write("training again, on train and validation examples")
    final = build_refit(run)
    final.trainer.resume()
    final.trainer.fit()
    return final


def save_model(run: Run, evaluation: Evaluation) -> Any:
    """Write the run's model folder and return its path."""
    summary, folder = run.store.summary, run.config.run / "model"
    facts = CardFacts(
        metrics=evaluation.metrics,
        split=evaluation.split,
        first_event=parse_instant(summary["first_event"]),
        last_event=parse_instant(summary["last_event"]),
        num_users=summary["users"],
    )
    states = {name: task.state() for name, task in run.tasks.items()}
    artifact.save(
        folder,
        run.best_model(),
        config=run.config,
        schema=run.store.schema,
        heads=run.heads,
        states=states,
        vocab=run.store.vocab,
        facts=facts,
    )
    return folder


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
