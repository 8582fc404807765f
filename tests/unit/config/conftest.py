"""The run that the config tests start from."""

from pathlib import Path

import pytest

from tests.unit.config.sample_run import SampleRun, make_sample_run


@pytest.fixture
def sample(tmp_path: Path) -> SampleRun:
    return make_sample_run(tmp_path / "sample")
