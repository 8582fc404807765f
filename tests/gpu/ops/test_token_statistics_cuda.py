"""Token statistics on a CUDA device: the tensor-core path of half-precision weights, and its memory."""

from __future__ import annotations

import pytest
import torch

from megatron_intuitor.ops import check_statistics, mean_output_row, token_statistics
from tests.unit.ops.dense_reference import dense_logits, dense_statistics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1 << 16, 64 << 20])
def test_matches_float64(dtype: torch.dtype, per_row: bool, chunk_bytes: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(96, 64, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(1008, 64, device="cuda") * 0.4).to(dtype).requires_grad_()
    weight.main_grad = torch.zeros(1008, 64, device="cuda")
    rows, targets = torch.randint(0, 96, (70,), device="cuda"), torch.randint(0, 1000, (70,), device="cuda")
    temperature = 0.5 + torch.rand(70, device="cuda") if per_row else 0.7
    options = {"rows": rows, "vocab_size": 1000, "temperature": temperature}
    mean_row = mean_output_row(weight, vocab_size=1000)
    got = token_statistics(hidden, weight, targets, **options, mean_row=mean_row, chunk_bytes=chunk_bytes)
    check_statistics(got, hidden, weight, targets, **options)
    (got.log_prob - 0.3 * got.entropy).sum().backward()
    hidden64, weight64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = dense_statistics(dense_logits(hidden64, weight64, rows, 1000, temperature), targets)
    (expected[0] - 0.3 * expected[2]).sum().backward()
    for actual, wanted in zip((got.log_prob, got.self_certainty, got.entropy), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=2e-4, rtol=1e-5)
    # Half-precision gradients of the logits feed the tensor cores: each product is rounded once.
    rounding = 1e-4 if dtype == torch.float32 else 2**-7
    for actual, wanted in ((hidden.grad, hidden64.grad), (weight.main_grad, weight64.grad)):
        size = float(wanted.abs().max())
        torch.testing.assert_close(actual.double(), wanted, atol=rounding * size, rtol=rounding)


def test_memory_stays_within_the_budget() -> None:
    hidden = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151_936, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight.main_grad = torch.zeros(weight.shape, device="cuda")
    targets = torch.randint(0, 151_936, (4096,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = token_statistics(hidden, weight, targets, vocab_size=151_936, chunk_bytes=64 << 20)
    (got.log_prob + got.entropy).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < (4 * 64 << 20) < 4096 * 151_936 * 4 / 8
