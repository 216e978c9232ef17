"""`python -m supermoe.prepare --config FILE [key.subkey=value ...]`: make the store, and print what the log holds."""

from __future__ import annotations

import sys

from supermoe import cli
from supermoe.config import DistributedConfig
from supermoe.data.prepare import prepare
from supermoe.distributed.mesh import start


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, prepare, and say where the store lies."""
    args = cli.config_parser(__doc__ or "").parse_args(argv)
    config = cli.read_config(args)
    with start(DistributedConfig()) as world:
        world.first(lambda: prepare(config))
        world.first(lambda: print(f"store     {config.store}"))


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
