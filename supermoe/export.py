"""`python -m supermoe.export MODEL --as-of DATE --out DIR`: a table of embeddings from the events before a date."""

from __future__ import annotations

import argparse
import sys

from supermoe import cli
from supermoe.distributed.mesh import launched
from supermoe.serving.artifact import Artifact
from supermoe.serving.export import export
from supermoe.serving.population import Request, add_arguments


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, export, and say where the table lies."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    artifact = Artifact.load(args.model)
    rank, size = launched()
    manifest = export(artifact, Request.parse(artifact, args).share(rank, size), args.out)
    if rank == 0:
        print(f"embeddings: {manifest}")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
