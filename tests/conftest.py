"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder over the log of `tiny.make_log`; its events and users lie beside it. Not to be changed."""
    from tiny import make_model_folder

    return make_model_folder(tmp_path_factory.mktemp("served"))
