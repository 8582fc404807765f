"""What vLLM loads in each of its processes: the entry point ``vllm.general_plugins`` of this package.

It only announces, by name, where the ``gloo`` weight-transfer backend is; vLLM imports it when a server was started
with that backend.
"""

from __future__ import annotations

from functools import cache

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory


@cache
def register() -> None:
    """Register the worker side of weight transfer over gloo, once a process (vLLM may call this more often)."""
    WeightTransferEngineFactory.register_engine("gloo", "megatron_intuitor.rollout.gloo_receiver", "GlooWeightReceiver")
