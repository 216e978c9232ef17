from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from supermoe import cli
from supermoe.config import load_run
from supermoe.typed_yaml import UserError, dump


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump(tiny.make_config(tmp_path)))
    return path


def parse(*args: str):
    return cli.config_parser("what it does").parse_args(args)


def test_overrides_are_laid_over_the_file(file: Path) -> None:
    config = cli.read_config(parse("--config", str(file), "training.epochs=3", "tasks.spend=null"))
    assert config.training.epochs == 3
    assert "spend" not in config.tasks
    assert config.model.dim == load_run(file).model.dim


def test_print_config_prints_what_loads_back_equal_and_stops(file: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.read_config(parse("--config", str(file), "seed=7", "--print-config"))
    assert stop.value.code == 0
    again = file.with_name("again.yaml")
    again.write_text(capsys.readouterr().out)
    assert load_run(again) == load_run(file, ["seed=7"])


def test_a_user_error_is_one_paragraph_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UserError("key: wrong; do that")

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: key: wrong; do that\n")


def test_an_interrupted_command_says_how_to_go_on(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 130
    assert "the same command continues" in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: print(1 / 0))


def test_the_schema_for_editors_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.config_parser("").parse_args(["--print-schema"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == Path("configs/schema.json").read_text(encoding="utf-8")
