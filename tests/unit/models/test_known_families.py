"""The families that a config may name are the families that can be built."""

from megatron_intuitor.config import SUPPORTED_MODEL_TYPES
from megatron_intuitor.models.registry import FAMILIES


def test_config_and_registry_know_the_same_model_types() -> None:
    assert sorted(SUPPORTED_MODEL_TYPES) == sorted(FAMILIES)
