"""The real command under torchrun, its ranks killed, told to end, or hanging, against a run that nothing disturbs."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml

from supermoe.training.metrics import read_metrics

KILLS, STEPS = 20, 80  # some three steps between two kills, and twenty to spare
GRACE = 30  # seconds that torchrun gives ranks after SIGTERM
PATIENCE = 1200  # seconds for what takes a few on an idle machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]  # every start of two processes takes seconds of imports


class Launch:
    """`torchrun ... -m supermoe.train`, of two ranks that share the experts."""

    def __init__(self, folder: Path, run: str, restarts: int = 0, timeout: str = "2m"):
        self.run, self.log = folder / run, folder / "log"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        train = ["-m", "supermoe.train", "--config", "config.yaml", f"run={run}", f"distributed.timeout={timeout}"]
        with self.log.open("w") as log:
            options: dict = {"cwd": folder, "stdout": log, "stderr": subprocess.STDOUT}
            self.agent = subprocess.Popen([*torchrun, "--max-restarts", str(restarts), *train], **options)

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.ranks():
            signal_to(pid, signal.SIGKILL)
        self.agent.kill()
        self.agent.wait()

    def ranks(self) -> list[int]:
        """Their process ids, as far as they live."""
        found = subprocess.run(["pgrep", "-P", str(self.agent.pid)], capture_output=True, text=True)
        return sorted(map(int, found.stdout.split()))

    def steps(self) -> int:
        """Steps that are done."""
        return sum(row["kind"] == "train" for row in read_metrics(self.run))

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.run / "checkpoints").glob(".step_*.writing"))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            assert self.agent.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.01)

    def finish(self, seconds: float = PATIENCE) -> str:
        """Wait for the end -> what was printed."""
        self.agent.wait(seconds)
        return self.log.read_text()


def signal_to(pid: int, number: int) -> None:
    subprocess.run(["kill", f"-{number}", str(pid)], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, a config, and the run `alone` that nothing disturbs."""
    folder = tmp_path_factory.mktemp("torchrun")
    tiny.write_tables(folder)
    config = tiny.make_config(Path()).model_dump(mode="json")
    config["data"]["store"] = "store"
    config["training"] |= {"max_steps": STEPS, "epochs": STEPS, "tokens_per_batch": 500, "accumulate": 2, "threads": 1}
    config["training"] |= {"checkpoint_every": 1, "evaluate_every": 10, "refit": False}
    config["report"] |= {"plots": False}
    config["distributed"] = {"expert": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with Launch(folder, "alone") as launch:
        printed = launch.finish()
        assert launch.agent.returncode == 0, printed
        assert launch.steps() == STEPS
    return folder


def assert_same(folder: Path, run: str) -> None:
    """The same losses and norms at every step, and the same model, bit for bit: ranks add up in the same order."""
    expected, found = read_metrics(folder / "alone"), read_metrics(folder / run)
    assert found == expected
    weights = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("alone", run)]
    assert weights[0] == weights[1]


def wait_for_a_moment(launch: Launch, draw: random.Random, dead: list[int]) -> list[int]:
    """Once other ranks run than the dead, any time after their start, or after a step, or during a save -> they."""
    launch.wait_for(lambda: len(launch.ranks()) == 2 and not set(launch.ranks()) & set(dead))
    kind, start = draw.choice(["start", "step", "save"]), launch.steps()
    if kind != "start":
        launch.wait_for(lambda: launch.steps() > start)
    if kind == "save":
        launch.wait_for(launch.is_saving)
    time.sleep(draw.uniform(0, {"start": 15.0, "step": 1.0, "save": 0.1}[kind]))
    return launch.ranks()


def test_killed_at_twenty_moments_it_ends_where_it_would_have(folder: Path) -> None:
    draw, ranks = random.Random(0), list[int]()
    with Launch(folder, "killed", restarts=KILLS) as launch:
        for _ in range(KILLS):
            ranks = wait_for_a_moment(launch, draw, ranks)
            signal_to(draw.choice(ranks), signal.SIGKILL)
        printed = launch.finish()
        assert launch.agent.returncode == 0, printed
    assert printed.count("continuing from") > KILLS // 2
    assert_same(folder, "killed")


def test_told_to_end_it_saves_and_a_rank_that_hangs_is_named(folder: Path) -> None:
    with Launch(folder, "told") as launch:
        launch.wait_for(lambda: launch.steps() >= 3)
        launch.agent.terminate()
        printed = launch.finish(GRACE)
        steps = launch.steps()
        assert f"terminated after step {steps}, which is saved" in printed
        assert (launch.run / "checkpoints" / f"step_{steps:08d}").exists()
    with Launch(folder, "told", timeout="20s") as launch:
        launch.wait_for(lambda: launch.steps() >= steps + 3)
        signal_to(launch.ranks()[1], signal.SIGSTOP)
        hung = time.monotonic()
        launch.wait_for(lambda: "did not answer" in launch.log.read_text())
        assert time.monotonic() - hung < 2 * 20 + 10  # the longest that gloo waits, and the roll call
        assert "rank 1 on " in launch.finish()
    with Launch(folder, "told") as launch:
        launch.finish()
    assert_same(folder, "told")
