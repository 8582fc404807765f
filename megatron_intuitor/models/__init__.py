"""From a Hugging Face folder to a sharded megatron model and back; the only room that builds megatron modules."""

from megatron_intuitor.models.build import build_policy_model
from megatron_intuitor.models.export import export_hf
from megatron_intuitor.models.hf_config import read_hf_config
from megatron_intuitor.models.load import load_hf_weights
from megatron_intuitor.models.packing import PackedSegments, packed_segments
from megatron_intuitor.models.policy import PolicyModel
from megatron_intuitor.models.policy_weights import PolicyWeights

__all__ = [
    "PackedSegments",
    "PolicyModel",
    "PolicyWeights",
    "build_policy_model",
    "export_hf",
    "load_hf_weights",
    "packed_segments",
    "read_hf_config",
]
