"""Contenders measured side by side: each in a process of its own, one round at a time, in rotating order.

A contender is a script that calls `serve` (or `receive`). The harness writes the name of a measure to its stdin; it
does one round and answers with a JSON line: how many units it did, in how much CPU and wall time, and its peak memory
so far. Rounds of different contenders are interleaved, so that what else happens on the machine touches all of them
alike; trust ratios. This file needs the standard library only, because contenders may live in environments of their
own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

RESULTS = Path(__file__).parent / "results"
MARK = "@result "  # answers are told by this from whatever else a contender prints

# --- in the contender's process ---------------------------------------------------------------------------------------


class Round:
    """One round in progress; its clocks run from the moment it was asked for."""

    def __init__(self, measure: str):
        self.measure = measure
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def done(self, units: float) -> None:
        """Answer that `units` were done."""
        answer = {
            "units": units,
            "wall_s": time.perf_counter() - self._wall,
            "cpu_s": time.process_time() - self._cpu,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(MARK + json.dumps(answer), flush=True)


def receive() -> Round | None:
    """Wait for the next round; None when there are no more."""
    line = sys.stdin.readline().strip()
    return Round(line) if line else None


def ready(measures: list[str], **facts: Any) -> None:
    """Tell that the contender is set up for these measures; `facts`, such as versions, go into its rows."""
    print(MARK + json.dumps({"measures": measures, "facts": facts}), flush=True)


def serve(measures: dict[str, Callable[[], float]], **facts: Any) -> None:
    """Be a contender: run one round of `measures[name]`, which returns the units done, whenever asked."""
    ready(list(measures), **facts)
    while (current := receive()) is not None:
        current.done(measures[current.measure]())


# --- in the process that compares -------------------------------------------------------------------------------------


class ContenderFailed(Exception):
    """A contender ended or answered nonsense; the message is the end of what it wrote to stderr."""


class Contender:
    """A running contender."""

    def __init__(self, command: list[str], threads: int):
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process runs
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        answer = self._answer()
        self.measures: list[str] = answer["measures"]
        self.facts: dict[str, Any] = answer["facts"]
        for measure in self.measures:  # warm-up: caches, first-touch memory, lazily built state
            self.run(measure)

    def run(self, measure: str) -> dict[str, float]:
        """One round."""
        assert self._process.stdin is not None
        self._process.stdin.write(measure + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let the contender end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self._process.wait()
        self._errors.seek(0)
        raise ContenderFailed(self._errors.read().strip()[-500:])


def compare(commands: dict[str, list[str]], measures: list[str], rounds: int, threads: int = 1) -> list[dict[str, Any]]:
    """Interleaved rounds -> one row per contender and measure, rates in units per CPU second.

    The first contender is what the others' `ratio` is of: the median over rounds of its rate divided by theirs in the
    same round. A contender that fails, or whose command is empty, gets a row with the reason.
    """
    running: dict[str, Contender] = {}
    skipped: dict[str, str] = {}
    for name, command in commands.items():
        try:
            running[name] = Contender(command, threads)
        except (OSError, ContenderFailed) as error:
            skipped[name] = str(error)
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}
    names = list(running)
    for number in range(rounds):
        for measure in measures:
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if measure in running[name].measures:
                    samples.setdefault((name, measure), []).append(running[name].run(measure))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    rows = [_row(name, measure, samples, names[0]) | running[name].facts for name, measure in sorted(samples)]
    for contender in running.values():
        contender.close()
    return rows + [{"contender": name, "skipped": reason} for name, reason in skipped.items()]


def _row(name: str, measure: str, samples: dict[tuple[str, str], list[dict[str, float]]], base: str) -> dict[str, Any]:
    mine, theirs = samples[name, measure], samples[base, measure]
    rates = [sample["units"] / sample["cpu_s"] for sample in mine]
    ratios = [other["units"] / other["cpu_s"] / rate for other, rate in zip(theirs, rates, strict=True)]
    return {
        "contender": name,
        "measure": measure,
        "per_cpu_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "per_wall_second": statistics.median(sample["units"] / sample["wall_s"] for sample in mine),
        "ratio": statistics.median(ratios),
        "peak_rss_mb": mine[-1]["peak_rss_mb"],
    }


def write(name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Save rows with what they were measured on -> benchmarks/results/<name>.json."""
    result = {
        "benchmark": name,
        "command": [Path(sys.argv[0]).name, *map(public, sys.argv[1:])],
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": _hardware(),
        "python": platform.python_version(),
        "versions": _versions("torch", "numpy", "duckdb", "triton"),
        "settings": settings,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _versions(*packages: str) -> dict[str, str]:
    """Those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def public(word: str) -> str:
    """A word of a command line, with PATH for an absolute path, also behind `key=`."""
    return re.sub(r"^([\w.]+=)?/.*", r"\1PATH", word)


def _hardware() -> str:
    model = [line.split(":", 1)[1].strip() for line in _output(["lscpu"]).splitlines() if line.startswith("Model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()
    machine = f"{model[0] if model else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB"
    return ", ".join([machine, *gpus])


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""
