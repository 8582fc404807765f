"""Megatron's distributed optimizer on torch's Adam: state before the first step, and a resume that changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_intuitor.platform import ProcessGroups


class TwoWeights(MegatronModule):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
        self.b = torch.nn.Parameter(torch.randn(6, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.a.t() + self.b)


def trainer() -> tuple[Any, Any]:
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    module = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=True), TwoWeights(config)
    )
    options = OptimizerConfig(
        optimizer="adam", lr=0.05, weight_decay=0.1, use_distributed_optimizer=True, clip_grad=1.0
    )
    return module, get_megatron_optimizer(options, [module])


def step(module: Any, optimizer: Any, seed: int) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    module.zero_grad_buffer()
    optimizer.zero_grad()
    module(x).square().sum().backward()
    module.finish_grad_sync()
    assert optimizer.step()[0]


def weights(module: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.module.parameters()]


def steps_of(optimizer: Any) -> list[float]:
    inner = [o.optimizer for o in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [state["step"].item() for o in inner for state in o.state.values()]


def test_state_before_the_first_step_leaves_weights_alone(groups: ProcessGroups) -> None:
    module, optimizer = trainer()
    before = weights(module)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    optimizer.sharded_state_dict(module.sharded_state_dict(), is_loading=True, metadata=metadata)
    assert steps_of(optimizer) == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))


def test_each_parameter_counts_its_own_steps_after_loading(groups: ProcessGroups) -> None:
    module, optimizer = trainer()
    for seed in range(3):
        step(module, optimizer, seed)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps_of(optimizer) == [3.0, 3.0]
    step(module, optimizer, 9)
    assert steps_of(optimizer) == [4.0, 4.0]


@pytest.mark.parametrize("sharding", ["dp_reshardable", "fully_reshardable"])
def test_resumed_run_goes_on_exactly_where_it_was(groups: ProcessGroups, tmp_path: Path, sharding: str) -> None:
    metadata = {"distrib_optim_sharding_type": sharding}

    def state(module: Any, optimizer: Any, is_loading: bool) -> dict[str, Any]:
        model = module.module.sharded_state_dict()
        own = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": own}

    module, optimizer = trainer()
    step(module, optimizer, 0)
    step(module, optimizer, 1)
    dist_checkpointing.save(state(module, optimizer, False), str(tmp_path))
    step(module, optimizer, 2)
    step(module, optimizer, 3)

    resumed, its_optimizer = trainer()
    loaded = dist_checkpointing.load(state(resumed, its_optimizer, True), str(tmp_path))
    resumed.module.load_state_dict(loaded["model"])
    its_optimizer.load_state_dict(loaded["optimizer"])
    step(resumed, its_optimizer, 2)
    step(resumed, its_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(module), weights(resumed), strict=True))
