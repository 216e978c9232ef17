"""`python -m supermoe.predict MODEL --as-of DATE --out DIR`: every task's scores from the events before a date."""

from __future__ import annotations

import argparse
import sys

from supermoe import cli
from supermoe.distributed.mesh import launched
from supermoe.serving.artifact import Artifact
from supermoe.serving.population import Request, add_arguments
from supermoe.serving.predict import predict


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, predict, and say where the tables lie."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--tasks", help="names separated by commas; default: all")
    args = parser.parse_args(argv)
    artifact = Artifact.load(args.model)
    tasks = args.tasks.split(",") if args.tasks else None
    rank, size = launched()
    manifest = predict(artifact, Request.parse(artifact, args).share(rank, size), args.out, tasks)
    if rank == 0:
        print(f"predictions: {manifest}")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
