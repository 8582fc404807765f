"""What both directions share: one process on a CPU node holds the whole model, unsharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_intuitor.config import ModelConfig, ParallelConfig
from megatron_intuitor.platform import initialize, prepare_megatron, shutdown

if TYPE_CHECKING:
    from megatron_intuitor.models import PolicyModel


@contextmanager
def whole_model(hf: Path, precision: Literal["fp32", "bf16"]) -> Iterator[PolicyModel]:
    """The model of the Hugging Face folder ``hf`` with its weights, in a world of one process."""
    prepare_megatron()
    from megatron_intuitor.models import build_policy_model

    parallel = ParallelConfig()
    groups = initialize(parallel, seed=0, timeout_s=600)
    try:
        yield build_policy_model(ModelConfig(path=hf, precision=precision), parallel, groups)
    finally:
        shutdown()
