"""What a model family has to say about itself; the families are in `families/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from megatron_intuitor.models.weight_map import WeightEntry

_ABSENT = object()


@dataclass(frozen=True)
class Requirement:
    """A field of ``config.json`` that only some values of are honoured; an absent field always is."""

    field: str
    """Name, with dots into nested objects: ``rope_parameters.rope_type``."""
    allowed: tuple[Any, ...]
    """The values that the family computes correctly; for a list, each element has to be one of them."""

    def check(self, config: PreTrainedConfig) -> None:
        """Raise ValueError where ``config`` asks for something else."""
        value: Any = config
        for name in self.field.split("."):
            value = value.get(name, _ABSENT) if isinstance(value, Mapping) else getattr(value, name, _ABSENT)
            if value is _ABSENT or value is None:
                return
        wrong = [v for v in (value if isinstance(value, list | tuple) else [value]) if v not in self.allowed]
        if wrong:
            allowed = " or ".join(repr(v) for v in self.allowed)
            raise ValueError(
                f"config.json: {self.field} is {wrong[0]!r}, but models of type {config.model_type!r} are supported "
                f"only with {allowed}; choose another checkpoint"
            )


@dataclass(frozen=True)
class LayerOptions:
    """What a transformer layer of the family has beside attention and a gated MLP with norms before them."""

    qk_norm: bool = False
    """RMSNorm over the head dimension of queries and keys."""


def plain_rotary_frequencies(config: PreTrainedConfig, head_dim: int) -> torch.Tensor:
    """Inverse frequencies of rotary embeddings, ``theta^(-2i/d)``, fp32 ``[head_dim / 2]`` (arXiv 2104.09864).

    Computed on the CPU, as transformers does: powers on a GPU differ in the last bit, and positions multiply that.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies: torch.Tensor = 1.0 / (config.rope_parameters["rope_theta"] ** exponents)
    return frequencies


@dataclass(frozen=True)
class Family:
    """A Hugging Face ``model_type`` as megatron has to build it."""

    model_type: str
    requirements: tuple[Requirement, ...]
    weights: tuple[WeightEntry, ...]
    layer: LayerOptions = field(default_factory=LayerOptions)
    megatron_options: Callable[[PreTrainedConfig], dict[str, Any]] = lambda _: {}
    """Fields of megatron's TransformerConfig that differ from a bias-free pre-norm decoder."""
    rotary_frequencies: Callable[[PreTrainedConfig, int], torch.Tensor] = plain_rotary_frequencies
    """(config, head_dim) -> inverse frequencies."""

    def check(self, config: PreTrainedConfig) -> None:
        """Raise ValueError naming the first field of ``config`` that this family does not honour."""
        for requirement in self.requirements:
            requirement.check(config)
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads ({config.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({config.num_key_value_heads})"
            )
