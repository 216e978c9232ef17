"""`python -m supermoe.prepare --config FILE [key.subkey=value ...]`: make the store, and print what the log holds."""

from __future__ import annotations

import sys

from supermoe import cli
from supermoe.data.prepare import prepare


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, prepare, and say where the store lies."""
    args = cli.config_parser(__doc__ or "").parse_args(argv)
    store = prepare(cli.read_config(args))
    print(f"store     {store.path}")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
