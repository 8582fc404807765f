"""What a checkpoint holds, and how it is saved, found, loaded and thinned out."""

from megatron_intuitor.checkpoint.content import (
    Trained,
    TrainerState,
    load_weights,
    read_state,
    restore,
    save,
    save_weights,
)
from megatron_intuitor.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointStore",
    "Trained",
    "TrainerState",
    "load_weights",
    "read_state",
    "restore",
    "save",
    "save_weights",
]
