"""Which parallel sizes a model can be cut into, and what megatron is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_intuitor.config.schema import ModelConfig, ParallelConfig
from megatron_intuitor.models.layers import choose_layers
from megatron_intuitor.models.registry import family_of
from megatron_intuitor.models.transformer_config import build_transformer_config


def translate(*, layers: int = 4, parallel: ParallelConfig, **model: object) -> object:
    hf = transformers.Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4
    )
    settings = ModelConfig(path=Path("x"), **{"precision": "fp32", **model})
    return build_transformer_config(hf, family_of("qwen3"), settings, parallel, "local")


@pytest.mark.parametrize(
    ("layers", "stages"), [(4, 1), (4, 2), (4, 4), (3, 2), (5, 2), (7, 4), (36, 8), (9, 8), (5, 3), (11, 3)]
)
def test_every_layer_is_on_exactly_one_stage(layers: int, stages: int) -> None:
    config = translate(layers=layers, parallel=ParallelConfig(pipeline=stages))
    placed = []
    for stage in range(stages):
        first = get_transformer_layer_offset(config, pp_rank=stage)
        placed += range(first, first + get_num_layers_to_build(config, pp_rank=stage))
    assert placed == list(range(layers))
    assert all(get_num_layers_to_build(config, pp_rank=stage) > 0 for stage in range(stages))


@pytest.mark.parametrize(
    ("parallel", "layers", "named"),
    [
        (ParallelConfig(tensor=3), 4, "num_attention_heads"),
        (ParallelConfig(tensor=8), 4, "num_key_value_heads"),
        (ParallelConfig(pipeline=5), 4, "must not exceed"),
        (ParallelConfig(sequence=True), 4, "parallel.sequence"),
    ],
)
def test_impossible_sizes_are_refused(parallel: ParallelConfig, layers: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        translate(layers=layers, parallel=parallel)


def test_bf16_is_for_weights_activations_and_the_wire() -> None:
    config = translate(parallel=ParallelConfig(), precision="bf16")
    assert config.bf16
    assert config.params_dtype == config.pipeline_dtype == torch.bfloat16


def test_transformer_engine_is_refused_where_it_is_absent() -> None:
    if choose_layers("auto") == "local":
        with pytest.raises(ValueError, match="model.layers"):
            choose_layers("transformer_engine")
    assert choose_layers("local") == "local"
