"""The CPU platform: what it changes for megatron, and what it leaves alone for everyone else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_intuitor.platform import ProcessGroups, prepare_megatron

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


@no_cuda
def test_importing_megatron_first_is_refused() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"  # the real import takes seconds
        "from megatron_intuitor.platform import prepare_megatron\n"
        "try:\n    prepare_megatron()\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "imported before prepare_megatron()" in run.stdout


def test_again_is_free() -> None:
    before = list(sys.meta_path)
    prepare_megatron()
    assert sys.meta_path == before


@no_cuda
def test_others_keep_their_torch() -> None:
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    assert torch.cuda.is_available() is False


@no_cuda
def test_megatron_takes_the_cpu_for_its_gpu() -> None:
    theirs = clip_grads.__dict__["torch"]
    assert theirs is not torch
    assert theirs.zeros(2, device="cuda").device.type == "cpu"
    assert theirs.zeros(2, device=0).device.type == "cpu"
    assert theirs.cuda.current_device() == torch.device("cpu")
    assert theirs.Tensor is torch.Tensor
    scope = {"__name__": "megatron.pretended", "x": torch.zeros(1, dtype=torch.bfloat16)}
    exec("kind, same = x.type(), x.cuda() is x", scope)
    assert scope["kind"] == "torch.cuda.BFloat16Tensor"
    assert scope["same"]


def test_forked_generator_leaves_the_default_one_alone(groups: ProcessGroups) -> None:
    assert groups.world_size == 1
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    with get_cuda_rng_tracker().fork():
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), wanted)
    with get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.rand(3), first)


def test_checkpointed_dropout_repeats_its_mask(groups: ProcessGroups) -> None:
    x = torch.randn(64, requires_grad=True)

    def half(y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(y, 0.5) * 1.0

    kept = tensor_parallel.checkpoint(half, False, x)
    kept.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, kept != 0)


def test_recompute_of_norms_needs_no_transformer_engine(groups: ProcessGroups) -> None:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    x = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(3, 8)
    recompute = CheckpointWithoutOutput()
    normal = recompute.checkpoint(torch.nn.functional.normalize, x)
    output = torch.nn.functional.linear(normal, weight)
    recompute.discard_output_and_register_recompute(output)
    output.sum().backward()
    expected = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(torch.nn.functional.normalize(expected), weight).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)
