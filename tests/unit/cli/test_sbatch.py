"""The batch script against stand-ins for Slurm: what it starts, what it passes on, when it asks for another turn."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "slurm" / "train.sbatch"

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/srun"
trap 'echo TERM > "$RECORD/signal"; sleep 0.3; exit 143' TERM
touch "$RECORD/started"
for _ in $(seq 1 "${STEP_TENTHS:-0}"); do sleep 0.1; done
exit "${STEP_CODE:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node3\\nnode4\\n'; else echo "$@" > "$RECORD/requeue"; fi
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": "#!/bin/sh\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "RECORD": str(tmp_path),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[3-4]",
        "SLURM_GPUS_ON_NODE": "8",
    }


def start(environment: Mapping[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        env=dict(environment),
        cwd=environment["RECORD"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_is_bash() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0


def test_it_starts_one_launcher_a_node_with_the_run_as_given(environment: dict[str, str], tmp_path: Path) -> None:
    job = start(environment | {"RANKS_PER_NODE": "6"}, "run.yaml", "--data.template", "a b {question}")
    _, errors = job.communicate(timeout=30)
    assert (job.returncode, errors) == (0, "")
    started = (tmp_path / "srun").read_text().splitlines()
    assert {"torchrun", "--nnodes=2", "--nproc-per-node=6", "--rdzv-backend=c10d"} <= set(started)
    assert "--rdzv-endpoint=node3:23456" in started
    assert started[-5:] == ["megatron_intuitor", "train", "run.yaml", "--data.template", "a b {question}"]
    assert not (tmp_path / "requeue").exists()


def test_the_run_s_exit_code_is_the_job_s(environment: dict[str, str], tmp_path: Path) -> None:
    for tenths in ("0", "3"):
        job = start(environment | {"STEP_CODE": "7", "STEP_TENTHS": tenths}, "run.yaml")
        job.communicate(timeout=30)
        assert job.returncode == 7
    assert not (tmp_path / "requeue").exists()


def test_a_warning_is_passed_on_waited_for_and_ends_in_the_queue(environment: dict[str, str], tmp_path: Path) -> None:
    job = start(environment | {"STEP_TENTHS": "200"}, "run.yaml")
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode == 0
    assert (tmp_path / "signal").read_text() == "TERM\n"
    assert (tmp_path / "requeue").read_text() == "requeue 123456\n"


def test_misuse_is_told(environment: dict[str, str]) -> None:
    for arguments, message in ([], "usage: sbatch"), (["none.yaml"], "none.yaml cannot be read"):
        job = start(environment, *arguments)
        assert message in job.communicate(timeout=30)[1]
        assert job.returncode == 2
    outside = {key: value for key, value in environment.items() if key != "SLURM_GPUS_ON_NODE"}
    assert "submit this file with sbatch" in start(outside, "run.yaml").communicate(timeout=30)[1]


def test_the_launcher_waits_less_than_slurm_does() -> None:
    text = SCRIPT.read_text()
    notice = re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE)
    patience = re.search(r"--shutdown-timeout=(\d+)", text)
    assert notice
    assert patience
    assert 30 < int(patience[1]) < int(notice[1])
