from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from supermoe.training import checkpoint
from supermoe.training.checkpoint import MANIFEST, Checkpoints, changes
from supermoe.typed_yaml import UserError

IDENTITY = {"seed": 1, "run": "a", "training": {"lr": 0.1, "threads": 1}}


def make(folder: Path, keep: int = 2, identity: dict | None = None) -> Checkpoints:
    return Checkpoints(folder / "run" / "checkpoints", keep, identity or IDENTITY)


def tensors(value: float) -> dict:
    return {"model": {"w": torch.full((50, 3), value)}, "count": torch.tensor(int(value))}


def save(checkpoints: Checkpoints, *steps: int) -> list[Path]:
    for step in steps:
        checkpoints.save(step, tensors(step), {"best": step})
        checkpoints.wait()
    return [checkpoints.folder / f"step_{step:08d}" for step in steps]


def test_round_trip(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    (path,) = save(checkpoints, 7)
    assert make(tmp_path).latest() == (path, {"best": 7})
    target = tensors(0)
    checkpoints.load(path, target)
    assert torch.equal(target["model"]["w"], torch.full((50, 3), 7.0))
    assert target["count"].item() == 7


def test_none_at_all(tmp_path: Path) -> None:
    assert make(tmp_path).latest() is None


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    paths = save(make(tmp_path), 2, 4, 10)
    assert sorted(paths[0].parent.iterdir()) == paths[1:]


def test_what_a_killed_run_has_half_written_is_removed(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    (path,) = save(checkpoints, 1)
    (path.parent / ".step_00000002.writing").mkdir()
    (path.parent / ".step_00000002.writing" / "part").write_text("")
    (path.parent / ".best.safetensors.123.writing").write_text("")
    assert checkpoints.latest() == (path, {"best": 1})
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, damage: str) -> None:
    checkpoints = make(tmp_path)
    old, new = save(checkpoints, 1, 2)
    data = next(new.glob("*.distcp"))
    if damage == "truncate":
        os.truncate(data, data.stat().st_size - 10)
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "missing":
        data.unlink()
    elif damage == "manifest":
        (new / MANIFEST).write_text('{"version": 2, "st')
    else:
        (new / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="step_00000002 is damaged"):
        assert checkpoints.latest() == (old, {"best": 1})
    shutil.rmtree(old)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(UserError, match="every checkpoint is damaged; delete this folder"),
    ):
        checkpoints.latest()


def test_another_versions_checkpoint_is_refused(tmp_path: Path) -> None:
    (path,) = save(make(tmp_path), 1)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"version": 99, "files": {}}))
    with pytest.raises(UserError, match=r"checkpoint format 99.*continue with the version that wrote it"):
        make(tmp_path).latest()


def test_a_changed_config_is_refused_by_key(tmp_path: Path) -> None:
    save(make(tmp_path), 1)
    changed = {"seed": 1, "run": "b", "training": {"lr": 0.2, "threads": 4}}
    with pytest.raises(UserError, match=r"training\.lr was 0\.1 and is now 0\.2\. Restore") as error:
        make(tmp_path, identity=changed).latest()
    assert "threads" not in str(error.value)
    assert "; " not in str(error.value)  # the other changes do not matter


def test_changes_name_new_and_removed_keys() -> None:
    found = changes({"tasks": {"a": {"type": "binary"}}}, {"tasks": {"b": {"type": "binary"}}})
    assert found == ["tasks.a was {'type': 'binary'} and is now None", "tasks.b was None and is now {'type': 'binary'}"]


def test_a_write_that_fails_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch) -> None:
    checkpoints = make(tmp_path)
    (good,) = save(checkpoints, 1)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full_disk)
    with pytest.raises(UserError, match=r"step_00000002: No space left on device.*earlier checkpoints are untouched"):
        save(checkpoints, 2)
    assert list(good.parent.iterdir()) == [good]


def test_training_does_not_wait_for_the_disk_and_a_copy_is_written(tmp_path: Path, monkeypatch) -> None:
    checkpoints, state, release = make(tmp_path), tensors(1), threading.Event()
    write = checkpoint.dcp.save

    def slow_disk(*args, **kwargs):
        assert release.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint.dcp, "save", slow_disk)
    checkpoints.save(1, state, {"best": 1})
    state["model"]["w"].fill_(-1)  # training goes on while the disk has not even begun
    assert not list(checkpoints.folder.glob("step_*"))
    release.set()
    with checkpoints.finished():
        pass
    checkpoints.load(checkpoints.folder / "step_00000001", state)
    assert torch.equal(state["model"]["w"], torch.ones(50, 3))


@pytest.mark.parametrize("error", [KeyboardInterrupt, None])
def test_what_was_begun_is_whole_however_training_ends(tmp_path: Path, monkeypatch, error) -> None:
    write = checkpoint.dcp.save

    def slow_write(*args, **options):
        time.sleep(0.2)
        return write(*args, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", slow_write)
    checkpoints = make(tmp_path)
    with contextlib.nullcontext() if error is None else pytest.raises(error), checkpoints.finished():
        checkpoints.save(1, tensors(1.0), {})
        if error is not None:
            raise error
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000001"]


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    (path,) = save(checkpoints, 1)
    with pytest.raises(UserError, match="cannot load the checkpoint"):
        checkpoints.load(path, {"model": {"other": torch.zeros(2)}})
