"""`python -m supermoe.evaluate RUN [--split test]`: measure a trained run again, rewrite its report."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from supermoe import cli
from supermoe.config import RunConfig, load_run
from supermoe.data.disk import writing
from supermoe.data.store import Store
from supermoe.distributed.mesh import World, launched, start
from supermoe.studies.measurement import write_measurement
from supermoe.training.build import build_run
from supermoe.training.refit import measured_run
from supermoe.training.trainer import BEST
from supermoe.typed_yaml import UserError


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, evaluate the best weights, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of supermoe.train")
    parser.add_argument(
        "--split", choices=["train", "valid", "test"], help="default: test, or valid without a test cut"
    )
    args = parser.parse_args(argv)
    if not (args.run / "checkpoints" / BEST).exists():
        raise UserError(
            f"{args.run}: there are no trained weights here; give the `run` folder of a finished supermoe.train"
        )
    config = load_run(args.run / "config.yaml", [f"run={args.run}"])
    expert = math.gcd(config.distributed.expert, launched()[1])  # a run is measured on fewer ranks than trained it, too
    distributed = config.distributed.model_copy(update={"expert": expert})
    with writing(args.run), start(distributed) as world:
        evaluate(config.model_copy(update={"distributed": distributed}), args.split, world)


def evaluate(config: RunConfig, split: str | None = None, world: World | None = None) -> None:
    """Measure the best weights of a run on a split, the one that training reported by default, and print the table."""
    world = world or World()
    store = Store.open(config.store)
    run = build_run(config, store, world=world)
    split = split or run.measured_split
    if len(store.rows_of(split)) == 0:
        raise UserError(f"{config.store} holds no examples of the split {split}; choose another --split")
    run.trainer.resume()
    measured = measured_run(run, split)
    evaluation = measured.evaluate(split)
    table = world.first(lambda: write_measurement(run, measured, evaluation))
    paths = {"report": "report.md", "predictions": f"predictions/{split}"}
    world.first(lambda: print(f"{table}\n\n{cli.places(config.run, paths)}"))


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
