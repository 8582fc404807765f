"""Reads and checks the ``config.json`` of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from megatron_intuitor.models.registry import family_of


def read_hf_config(path: Path) -> PreTrainedConfig:
    """Read ``path/config.json``.

    Raises:
        ValueError: There is none, its ``model_type`` is unknown, or it asks for something that its family does not
            compute (sliding windows, scaled rotary embeddings, dropout, another activation, ...); the message names
            the field.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path {str(path)!r} holds no config.json; give a folder in Hugging Face format")
    try:
        model_type = json.loads(file.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    family = family_of(model_type)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    family.check(config)
    return config
