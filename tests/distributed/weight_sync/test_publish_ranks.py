"""Publishing is a collective: whatever happens to the driver's engines, no other rank is left waiting."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_intuitor.config import ParallelConfig
from megatron_intuitor.contracts import EngineFailure, TensorMeta
from megatron_intuitor.platform import initialize
from megatron_intuitor.weight_sync import NonFiniteWeights, SyncFailure, WeightPublisher
from tests.distributed.launch import Case, Outcomes, launch

COUNT, RANKS = 9, 3


class GatheredWeights:
    """Each weight is the sum of all ranks' shards; only the driver gets it.  Every rank must take every step."""

    def __init__(self, rank: int, poison: int | None) -> None:
        self.rank, self.poison, self.steps = rank, poison, 0

    def metadata(self):
        return [TensorMeta(f"w{i}", torch.float32, (4, i + 1)) for i in range(COUNT)]

    def __iter__(self):
        for i in range(COUNT):
            tensor = torch.full((4, i + 1), float(self.rank + i))
            dist.all_reduce(tensor)
            if i == self.poison:
                tensor[0, 0] = torch.nan
            self.steps += 1
            yield f"w{i}", tensor if self.rank == 0 else None


class Engine:
    """Takes ``patience`` weights, then fails."""

    name = "engine"

    def __init__(self, patience: int) -> None:
        self.patience, self.weights = patience, {}

    def load_weights(self, weights, version):
        for name, tensor in weights:
            if len(self.weights) == self.patience:
                raise EngineFailure("had enough")
            self.weights[name] = tensor.clone()


class Pool:
    def __init__(self, engine: Engine | None) -> None:
        self.engine, self.loaded = engine, None

    def receivers(self):
        if self.engine is None:
            raise EngineFailure("nobody is up")
        return [self.engine]

    def weights_loaded(self, name, version):
        self.loaded = version

    def weights_failed(self, name, reason, *, alive):
        return False


def check_publish(patience: int | None, poison: int | None, error: type[Exception] | None) -> None:
    groups = initialize(ParallelConfig(), seed=0, timeout_s=30)
    engine = None if patience is None else Engine(patience)
    pool = Pool(engine) if groups.is_driver else None
    publisher = WeightPublisher(pool, timeout_s=20)
    weights = GatheredWeights(groups.rank, poison)
    if groups.is_driver and error is not None:
        with pytest.raises(error):
            publisher.publish(weights, 3)
    else:
        assert publisher.publish(weights, 3).version == 3
    assert weights.steps == COUNT
    # All ranks are at the same place again.
    steps = torch.tensor([float(weights.steps)])
    dist.all_reduce(steps)
    assert steps.item() == COUNT * RANKS
    if groups.is_driver and error is None:
        assert pool.loaded == 3
        expected = {f"w{i}": torch.full((4, i + 1), float(RANKS * i + sum(range(RANKS)))) for i in range(COUNT)}
        assert all(torch.equal(engine.weights[name], want) for name, want in expected.items())


CASES = [
    Case("everything works", check_publish, (COUNT + 1, None, None)),
    Case("the engine fails on the way", check_publish, (4, None, SyncFailure)),
    Case("the engine fails at once", check_publish, (0, None, SyncFailure)),
    Case("the weights are NaN", check_publish, (COUNT + 1, 5, NonFiniteWeights)),
    Case("no engine is up", check_publish, (None, None, EngineFailure)),
]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return launch(RANKS, CASES)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_publish(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
