"""The conversion commands: a run's checkpoint becomes its export, and a Hugging Face folder comes back unchanged."""

from __future__ import annotations

import subprocess
import sys

import torch
from safetensors.torch import load_file

from tests.e2e import runs


def convert(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"checkpoint_convert.{command}", *map(str, arguments), "--precision", "fp32"],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_checkpoint_becomes_the_export_of_its_run(tmp_path):
    sharded = runs.config(tmp_path / "run", train={"steps": 2}, parallel={"tensor": 2})
    assert runs.run(sharded, world_size=2) == [0, 0]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    done = convert("megatron_to_hf", "--megatron", checkpoint, "--hf-config", runs.MODEL, "--out", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    converted, exported = load_file(tmp_path / "hf" / "model.safetensors"), runs.weights(tmp_path / "run")
    assert converted.keys() == exported.keys()
    assert all(torch.equal(converted[name], exported[name]) for name in exported)
    again = convert("megatron_to_hf", "--megatron", checkpoint, "--hf-config", runs.MODEL, "--out", tmp_path / "hf")
    assert again.returncode == 2
    assert "exists; name a new folder" in again.stderr


def test_a_hugging_face_folder_comes_back_unchanged(tmp_path):
    there = convert("hf_to_megatron", "--hf", runs.MODEL, "--out", tmp_path / "megatron")
    assert there.returncode == 0, there.stderr
    back = convert(
        "megatron_to_hf", "--megatron", tmp_path / "megatron", "--hf-config", runs.MODEL, "--out", tmp_path / "hf"
    )
    assert back.returncode == 0, back.stderr
    ours, theirs = load_file(tmp_path / "hf" / "model.safetensors"), load_file(runs.MODEL / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in theirs)
