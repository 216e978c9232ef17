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
from supermoe.studies.measurement import write_measurement
from supermoe.training.build import Run, build_run
from supermoe.training.environment import write_environment
from supermoe.training.evaluation import Evaluation
from supermoe.training.refit import final_run, measured_run
from supermoe.training.second_opinions import add_second_opinions
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
    add_second_opinions(run)
    final = final_run(run)
    if final is not run:
        world.first(lambda: tqdm.write("training again, on train and validation examples"))
        final.trainer.fit()
        add_second_opinions(final, run.opinion_shares())
    measured = measured_run(run, run.measured_split, final)
    evaluation = measured.evaluate(run.measured_split)
    table = world.first(lambda: write_measurement(run, measured, evaluation))
    world.first(lambda: save_model(final, evaluation))
    as_of = (parse_instant(store.summary["last_event"]) // DAY + 1) * DAY  # the midnight after the last event
    embeddings, request = config.run / "embeddings", Request(source, as_of).share(world.rank, world.size)
    world.first(lambda: make_room(embeddings, request.shards))
    export(artifact.Artifact.load(config.run / "model"), request, embeddings)
    paths = {"report": "report.md", "predictions": f"predictions/{evaluation.split}"}
    paths |= {"model": "model", "embeddings": "embeddings"}
    world.first(lambda: print(f"\n{table}\n\n{cli.places(config.run, paths)}"))


def describe(config: RunConfig) -> None:
    """Write what a run is told and runs on into its folder."""
    publish_text(config.run / "config.yaml", dump(config))
    write_environment(config.run)


def save_model(run: Run, evaluation: Evaluation) -> None:
    """Write the run's model folder."""
    summary = run.store.summary
    facts = CardFacts(
        metrics=evaluation.metrics,
        split=evaluation.split,
        first_event=parse_instant(summary["first_event"]),
        last_event=parse_instant(summary["last_event"]),
        num_users=summary["users"],
    )
    states = {name: task.state() for name, task in run.tasks.items()}
    artifact.save(
        run.config.run / "model",
        run.best_model(),
        config=run.config,
        schema=run.store.schema,
        heads=run.heads,
        states=states,
        vocab=run.store.vocab,
        facts=facts,
    )


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
