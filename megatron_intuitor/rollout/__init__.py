"""Engines that sample responses: vLLM servers in a pool that survives their deaths, or transformers in-process."""

from megatron_intuitor.rollout.build import build_pool
from megatron_intuitor.rollout.engine_state import EngineInfo
from megatron_intuitor.rollout.pool import EnginesStale, RolloutPool
from megatron_intuitor.rollout.transformers_engine import TransformersEngine
from megatron_intuitor.rollout.vllm_client import RequestRefused, VllmClient

__all__ = [
    "EngineInfo",
    "EnginesStale",
    "RequestRefused",
    "RolloutPool",
    "TransformersEngine",
    "VllmClient",
    "build_pool",
]
