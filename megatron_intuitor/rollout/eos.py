"""Which tokens end a response: one answer for every engine, so that they stop alike."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoConfig, GenerationConfig

log = logging.getLogger(__name__)


def eos_token_ids(model_path: Path) -> tuple[int, ...]:
    """End-of-sequence ids of a Hugging Face folder: generation_config.json first, else config.json; sorted.

    Empty (with a warning) where neither names one: then every response runs to its longest length.
    """
    ids = None
    if (model_path / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(model_path, local_files_only=True).eos_token_id
    if ids is None:
        ids = getattr(AutoConfig.from_pretrained(model_path, local_files_only=True), "eos_token_id", None)
    if ids is None:
        log.warning("%s names no eos_token_id: responses end only at rollout.sampling.max_tokens", model_path)
        return ()
    return (ids,) if isinstance(ids, int) else tuple(sorted(ids))
