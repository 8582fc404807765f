"""One fake run for all tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.observability.fake_run import write_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny-run")
