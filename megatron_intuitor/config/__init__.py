"""What a run is: typed, frozen, no torch."""

from megatron_intuitor.config.checks import check_config
from megatron_intuitor.config.errors import ConfigError
from megatron_intuitor.config.fields import ConfigField, all_fields, all_sections
from megatron_intuitor.config.load import load_config
from megatron_intuitor.config.model_folder import SUPPORTED_MODEL_TYPES
from megatron_intuitor.config.schema import (
    AccuracyConfig,
    AdvantageConfig,
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ProbeConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    Section,
    SelfCertaintyConfig,
    TrainConfig,
)
from megatron_intuitor.config.show import resolved_yaml, write_config

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "AccuracyConfig",
    "AdvantageConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "ConfigError",
    "ConfigField",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProbeConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "SelfCertaintyConfig",
    "TrainConfig",
    "all_fields",
    "all_sections",
    "check_config",
    "load_config",
    "resolved_yaml",
    "write_config",
]
