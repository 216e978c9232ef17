"""`python -m supermoe.plan --config FILE --gpus N --gpu h200 [a.b=c ...]`: does it fit, how long is a step, what to do.

Builds the model without memory and needs no data: without a prepared store, sizes come from the config's `data.fields`.
"""

from __future__ import annotations

import sys

from supermoe import cli
from supermoe.studies.plan import make_plan
from supermoe.studies.plan_cost import GPUS
from supermoe.studies.plan_text import text_of


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the plan."""
    parser = cli.config_parser(__doc__ or "")
    parser.add_argument("--gpus", type=int, default=1, help="number of devices")
    parser.add_argument("--gpu", default="h200", help=f"kind of device: {', '.join(GPUS)}")
    args = parser.parse_args(argv)
    plan, advice = make_plan(cli.read_config(args), args.gpus, args.gpu)
    print(text_of(plan, advice))


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
