"""Builds the policy from a Hugging Face folder."""

from __future__ import annotations

from megatron_intuitor.config import ModelConfig, ParallelConfig
from megatron_intuitor.models.hf_config import read_hf_config
from megatron_intuitor.models.layers import choose_layers
from megatron_intuitor.models.load import load_hf_weights
from megatron_intuitor.models.policy import PolicyModel
from megatron_intuitor.models.registry import family_of
from megatron_intuitor.models.transformer_config import build_transformer_config
from megatron_intuitor.platform import ProcessGroups


def build_policy_model(model: ModelConfig, parallel: ParallelConfig, groups: ProcessGroups) -> PolicyModel:
    """Build this rank's part of the model at ``model.path`` and load its weights.

    Args:
        model: Folder, precision, recompute and layer implementation.
        parallel: The sizes that ``groups`` was made with.
        groups: From `platform.initialize`.

    Raises:
        ValueError: The folder, its config or its weights cannot be used, or cannot be cut into these sizes.
    """
    hf = read_hf_config(model.path)
    family = family_of(hf.model_type)
    layers = choose_layers(model.layers)
    config = build_transformer_config(hf, family, model, parallel, layers)
    policy = PolicyModel(hf, family, config, layers, groups)
    load_hf_weights(policy, model.path)
    return policy
