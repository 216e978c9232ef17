"""Functions timed side by side in one process, in rotating order: CPU seconds of this thread, or seconds on a GPU."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch


def interleave(functions: dict[str, Callable[[int], Any]], rounds: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Call each function with the number of the round -> a row per function.

    `ms` is the median, `spread` the range; `ratio` the median over rounds of the time over the first function's in the
    same round. Round 0 is a warm-up and is not counted.
    """
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = _now(device)
            functions[name](number)
            samples[name].append(_now(device) - started)
    counted = {name: times[1:] for name, times in samples.items()}
    base = counted[names[0]]
    return [
        {
            "contender": name,
            "ms": 1e3 * statistics.median(times),
            "spread": [1e3 * min(times), 1e3 * max(times)],
            "ratio": statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True)),
        }
        for name, times in counted.items()
    ]


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm."""
    return statistics.geometric_mean(values)


def settings(device: str, rounds: int) -> dict[str, Any]:
    """What every row was measured under."""
    malloc = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    load = math.floor(os.getloadavg()[0])
    return {"device": device, "threads": 1, "rounds": rounds, "malloc": malloc or "default", "load_average": load}
