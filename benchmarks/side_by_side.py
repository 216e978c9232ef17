"""Functions timed side by side in one process, in rotating order: CPU seconds of this thread, or seconds on a GPU.

Beside the time, the most memory that PyTorch allocates for a function at once.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def interleave(functions: dict[str, Callable[[int], Any]], rounds: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Call each function with the number of the round -> a row per function.

    `ms` is the median, `spread` the range; `ratio` the median over rounds of the time over the first function's in the
    same round; `peak_mb` what it allocates. Round 0 is for the memory, warms up and is not counted.
    """
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    memory = {name: peak_mb(functions[name], device) for name in names}
    for number in range(1, rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = _now(device)
            functions[name](number)
            samples[name].append(_now(device) - started)
    base = samples[names[0]]
    return [
        {
            "contender": name,
            "ms": 1e3 * statistics.median(times),
            "spread": [1e3 * min(times), 1e3 * max(times)],
            "ratio": statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True)),
            "peak_mb": memory[name],
        }
        for name, times in samples.items()
    ]


def peak_mb(function: Callable[[int], Any], device: str) -> float:
    """The most that PyTorch holds at once in round 0 beyond what it held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function(0)
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(0)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 1e6


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
