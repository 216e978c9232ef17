"""What all commands share: arguments, and errors that the user can mend as one paragraph with exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supermoe.config import RunConfig, load_run
from supermoe.typed_yaml import UserError, dump


class _PrintSchema(argparse.Action):
    """Prints what editors check a config against, as configs/schema.json holds it."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        print(json.dumps(RunConfig.model_json_schema(), indent=1))
        parser.exit()


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser for commands that run on a config: --config FILE, --print-config and overrides a.b=c."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--print-schema", action=_PrintSchema, nargs=0, help="print the JSON schema and stop")
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="laid over the file, values in YAML")
    return parser


def read_config(args: argparse.Namespace) -> RunConfig:
    """The validated config of a parsed command line; prints it and exits with --print-config."""
    config = load_run(args.config, args.overrides)
    if args.print_config:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def places(folder: Path, names: dict[str, str]) -> str:
    """Where a command's outputs lie in a folder, one line each."""
    return "\n".join(f"{name:12}{folder / path}" for name, path in names.items())


def run(main: Callable[[], None]) -> None:
    """Call a command; a `UserError` ends it with one paragraph on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
