"""Reinforcement learning from internal feedback on Megatron-core and vLLM."""

__version__ = "0.1.0"
