"""What a run ran on: versions and hardware, for `env.json`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch

from supermoe import __version__
from supermoe.data.disk import publish_text

PACKAGES = ("torch", "numpy", "pandas", "pyarrow", "duckdb", "pydantic", "scikit-learn", "triton")


def write_environment(folder: Path) -> None:
    """Write `env.json` into a run's folder."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {
        "supermoe": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "command": sys.argv[1:],
    }
    publish_text(folder / "env.json", json.dumps(found, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
