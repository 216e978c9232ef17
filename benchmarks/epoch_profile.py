"""Where the time of one training epoch goes, part by part and by operator; changes nothing that a run would do.

    python benchmarks/epoch_profile.py [--config configs/quickstart.yaml] [key=value ...]

Prints CPU time on one thread, in Markdown: the parts of all steps of an epoch, then the operators of ten further ones.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch.profiler import ProfilerActivity, profile

from supermoe.config import load_run
from supermoe.data.batch import Batch
from supermoe.data.prepare import prepare
from supermoe.training.build import build_run
from supermoe.training.trainer import Trainer

TOP_OPERATORS = 12


class Clock:
    """CPU seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`."""
        started = time.process_time()
        yield
        self.seconds[name] += time.process_time() - started


def train(trainer: Trainer, batches: list[Batch], clock: Clock) -> None:
    """One optimiser step, as the trainer does it, in parts."""
    model, objective = trainer.model, trainer.objective
    count_T = objective.counts(batches)
    for batch in batches:
        with clock.part("history pass"):
            history = model.extend(batch)
        with clock.part("indicator pass, features included"):
            output = model.ask(history, batch)
        with clock.part("heads and losses"):
            loss, _ = objective.loss(model.heads, output, batch, count_T, num_batches=len(batches))
        with clock.part("backward"):
            loss.backward()
    with clock.part("clipping and optimiser"):
        trainer._update()


def main() -> None:
    """Profile an epoch and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = load_run(arguments.config, [*arguments.overrides, "training.threads=1"])
    trainer = build_run(config, prepare(config)).trainer
    trainer.model.train()
    clock, events, steps = Clock(), 0, trainer._steps()
    for _ in range(trainer.steps_per_epoch):
        with clock.part("loading"):
            batches = next(steps)
        events += sum(batch.num_events for batch in batches)
        train(trainer, batches, clock)
    total = sum(clock.seconds.values())
    print(f"{trainer.steps_per_epoch} steps, {events:,} events, {total:.1f} s, {events / total:,.0f} events/s\n")
    print("| part | share | us per event |\n|---|---|---|")
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"| {name} | {seconds / total:.0%} | {1e6 * seconds / events:.2f} |")

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for batches in islice(steps, 10):
            train(trainer, batches, Clock())
    operators = sorted(profiled.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
    total = sum(entry.self_cpu_time_total for entry in operators)
    print("\n| operator | share | calls |\n|---|---|---|")
    for entry in operators[:TOP_OPERATORS]:
        print(f"| {entry.key.removeprefix('aten::')} | {entry.self_cpu_time_total / total:.0%} | {entry.count} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
