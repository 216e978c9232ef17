"""`python -m supermoe.seesaw --config FILE [--seeds 3] [a.b=c ...]`: does any task pay for another?

Trains every task alone and all together under each method, and writes seesaw.json, seesaw.md and plots: gain over alone
with its interval, losers, mean gain, mean rank. What is trained already is used again; a study that was stopped
continues with the same command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from supermoe import cli
from supermoe.studies.seesaw import Request, study
from supermoe.studies.seesaw_report import gain_rows, method_rows, text_table
from supermoe.typed_yaml import UserError


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, carry out the study, print its tables, and judge it with --gate."""
    parser = cli.config_parser(__doc__ or "")
    parser.add_argument("--seeds", type=_positive, default=3, help="trainings of each kind, from the config's seed on")
    parser.add_argument("--methods", type=_names, help="balancers and read-outs by name, such as seesaw,equal,ple")
    parser.add_argument(
        "--variant", action="append", default=[], help="a method of your own: 'NAME: a.b=c d.e=f'; may be repeated"
    )
    parser.add_argument("--jobs", type=_positive, default=1, help="trainings at a time; they share the cores evenly")
    parser.add_argument("--out", type=Path, help="folder of the study; default: seesaw in the run's folder")
    parser.add_argument("--split", choices=["test", "valid"], default="test", help="what the report measures")
    parser.add_argument("--gate", action="store_true", help="exit with 1 if a task loses under the config's balancer")
    args = parser.parse_args(argv)
    config = cli.read_config(args)
    variants = dict(map(_variant, args.variant))
    out = args.out or config.run / "seesaw"
    request = Request(
        args.config, args.overrides, args.seeds, args.methods, variants, args.jobs, out=out, split=args.split
    )
    result = study(request)
    print(f"\n{text_table(method_rows(result))}\n\n{text_table(gain_rows(result))}\n")
    print(f"report      {out / 'seesaw.md'}\nnumbers     {out / 'seesaw.json'}")
    own = result["own"]
    losers = result["methods"][own]["losers"]
    if args.gate and losers:
        raise SystemExit(f"gate: under {own}, {', '.join(losers)} is worse than alone, see {out / 'seesaw.md'}")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _variant(text: str) -> tuple[str, list[str]]:
    name, separator, overrides = text.partition(":")
    if not separator or not name.strip().replace("_", "").isalnum() or not overrides.split():
        raise UserError(f"--variant '{text}' is not of the form 'NAME: key.subkey=value ...'")
    return name.strip(), overrides.split()


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
