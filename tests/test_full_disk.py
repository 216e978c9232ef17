"""A disk that fills up at any step: one paragraph, exit code 2, and no output that looks complete."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from world import run


@contextlib.contextmanager
def quota(size: int) -> Iterator[None]:
    """No file may grow over so many bytes, in the folder `small` or anywhere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def tmpfs(size: int) -> Iterator[None]:
    """The folder `small` is a file system of so many bytes, where the tests may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", "small"]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", "small"], check=True)


# command, what it leaves last, and sizes of the disk that it notices at different steps
FULL = [
    ("prepare --config config.yaml data.store=small/store", "small/store", (4_096, 20_480)),
    (
        "train --config config.yaml run=small data.store=run/store",
        "small/embeddings/manifest.json",
        (4_096, 65_536, 400_000),
    ),
    ("predict run/model --as-of 2020-12-01 --out small", "small/manifest.json", (4_096, 10_240)),
    ("export run/model --as-of 2020-12-01 --out small", "small/manifest.json", (4_096, 10_240)),
]


@pytest.mark.parametrize("small_disk", [quota, tmpfs])
@pytest.mark.parametrize(
    ("command", "last", "size"), [(command, last, size) for command, last, sizes in FULL for size in sizes]
)
def test_a_full_disk(
    world: Path, capsys: pytest.CaptureFixture, small_disk: Callable, command: str, last: str, size: int
) -> None:
    Path("small").mkdir()
    # No wider than the command: under a quota pytest cannot write to a log either.
    with small_disk(size):
        with pytest.raises(SystemExit) as stop:
            run(command)
        left = Path(last).exists()
    assert stop.value.code == 2
    assert re.match("error: .*small.*; free space", capsys.readouterr().err.splitlines()[-1])
    assert not left
