"""How much memory the statistics take, and Megatron's contract for the gradient of the output layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_intuitor.ops import mean_output_row, statistics_from_logits, token_statistics
from tests.unit.ops.dense_reference import dense_logits, dense_statistics


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages made under this mode that are alive at the same time; `known` tensors do not count."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


TOKENS, WIDTH, VOCAB = 700, 32, 6000
DENSE = TOKENS * VOCAB * 4


@pytest.mark.parametrize("chunk_bytes", [1 << 17, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_stay_within_the_budget(chunk_bytes: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH).to(dtype).requires_grad_()
    weight.main_grad = torch.zeros(VOCAB, WIDTH)
    targets = torch.randint(0, VOCAB, (TOKENS,))
    mean_row = mean_output_row(weight, vocab_size=VOCAB)
    rows_of_state = 30 * TOKENS * 8
    copies = 0 if dtype == torch.float32 else chunk_bytes
    with PeakMemory(hidden, weight, targets, mean_row, weight.main_grad) as memory:
        got = token_statistics(hidden, weight, targets, vocab_size=VOCAB, mean_row=mean_row, chunk_bytes=chunk_bytes)
    hidden_bytes = 3 * TOKENS * WIDTH * 4
    assert chunk_bytes // 3 < memory.peak <= chunk_bytes + copies + rows_of_state + hidden_bytes < DENSE / 5
    loss = got.log_prob.sum() + got.entropy.sum()
    del got
    with PeakMemory(hidden, weight, targets, mean_row, weight.main_grad) as memory:
        loss.backward()
    assert memory.peak <= chunk_bytes + copies + rows_of_state + 2 * hidden_bytes < DENSE / 5
    assert weight.main_grad.any()


def test_the_memory_count_sees_a_dense_computation() -> None:
    hidden, weight, targets = torch.randn(TOKENS, WIDTH), torch.randn(VOCAB, WIDTH), torch.arange(TOKENS)
    with PeakMemory(hidden, weight, targets) as memory:
        (hidden @ weight.t()).log_softmax(-1).gather(1, targets.unsqueeze(1))
    assert memory.peak >= 2 * DENSE


def test_ready_logits_stay_within_the_budget() -> None:
    logits, targets = torch.randn(TOKENS, VOCAB), torch.randint(0, VOCAB, (TOKENS,))
    with PeakMemory(logits, targets) as memory:
        statistics_from_logits(logits, targets, vocab_size=VOCAB, chunk_bytes=1 << 18)
    assert memory.peak <= (1 << 18) + 30 * TOKENS * 8


def expected_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    leaf = weight.detach().double().requires_grad_()
    log_prob, _, entropy = dense_statistics(dense_logits(hidden.detach(), leaf, None, vocab_size, 1.0), targets)
    (log_prob + 0.5 * entropy).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def step(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> None:
    got = token_statistics(hidden, weight, targets, vocab_size=vocab_size, chunk_bytes=512)
    (got.log_prob + 0.5 * got.entropy).sum().backward()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_gradient_goes_to_main_grad_and_adds_up(weight_dtype: torch.dtype, main_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, 8).to(weight_dtype))
    weight.main_grad = torch.ones(40, 8, dtype=main_dtype)
    weight.grad_added_to_main_grad = False
    expected = torch.ones(40, 8, dtype=torch.float64)
    for _ in range(3):
        hidden, targets = torch.randn(20, 8).to(weight_dtype), torch.randint(0, 37, (20,))
        expected += expected_gradient(hidden, weight, targets, 37)
        step(hidden, weight, targets, 37)
        assert weight.grad_added_to_main_grad is True
        assert weight.grad is not None, "the parameter's hook runs only if a gradient arrives"
        assert weight.grad.shape == weight.shape
        weight.grad = None
    tolerance = 2e-5 if main_dtype == torch.float32 else 0.1
    torch.testing.assert_close(weight.main_grad.double(), expected, atol=tolerance, rtol=tolerance)


def test_without_the_flag_there_is_no_second_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(40, 8))
    weight.main_grad = torch.zeros(40, 8)
    step(torch.randn(20, 8), weight, torch.randint(0, 37, (20,)), 37)
    assert weight.grad is None
    assert weight.main_grad.any()


def test_a_frozen_weight_keeps_its_main_grad() -> None:
    weight = torch.nn.Parameter(torch.randn(40, 8), requires_grad=False)
    weight.main_grad = torch.zeros(40, 8)
    step(torch.randn(20, 8, requires_grad=True), weight, torch.randint(0, 37, (20,)), 37)
    assert not weight.main_grad.any()


def add_like_data_parallel(weight: torch.nn.Parameter) -> None:
    """What the post-backward hook of Megatron's DistributedDataParallel does with a gradient that arrives."""
    assert weight.grad is not None
    if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):
        weight.main_grad.add_(weight.grad)
    weight.grad = None


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embedding_gets_both_gradients_once(tied: bool) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, 8))
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.zeros(40, 8), False, tied
    embedding = weight if tied else torch.nn.Parameter(torch.randn(40, 8))
    weight.register_post_accumulate_grad_hook(add_like_data_parallel)
    leaf = weight.detach().double().requires_grad_()
    other = leaf if tied else embedding.detach().double()
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(2):
        tokens, targets = torch.randint(0, 40, (15,)), torch.randint(0, 37, (15,))
        step(torch.nn.functional.embedding(tokens, embedding).tanh(), weight, targets, 37)
        logits = dense_logits(other[tokens].tanh(), leaf, None, 37, 1.0)
        log_prob, _, entropy = dense_statistics(logits, targets)
        total = total + (log_prob + 0.5 * entropy).sum()
    total.backward()
    torch.testing.assert_close(weight.main_grad.double(), leaf.grad, atol=2e-5, rtol=2e-5)
