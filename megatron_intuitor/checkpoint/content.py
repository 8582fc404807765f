"""What a checkpoint holds: model, optimizer, schedule, random states and where the run stands.

Weights and optimizer states go through Megatron's dist-checkpointing in its fully reshardable form, so that any
parallel layout can load them.  The run's position is plain JSON (``run.json``) and random states are safetensors: a
checkpoint is read without unpickling anything beyond Megatron's own index, and only from the run's own folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_intuitor.checkpoint.random_state import load_random_state, save_random_state
from megatron_intuitor.checkpoint.store import CheckpointStore
from megatron_intuitor.models import PolicyModel
from megatron_intuitor.platform import ProcessGroups, broadcast_object

# Gathered over gloo on one replica only: every rank of a node holding all of it would not fit into host memory.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
_RUN_FILE = "run.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Where a run stands after ``step`` steps."""

    step: int
    weight_version: int
    prompts: dict[str, int]
    """`PromptSampler.state()`: which prompts come next."""
    bad_steps: int = 0
    wandb_id: str | None = None
    before: dict[str, float] = field(default_factory=dict)
    """The evaluation before training, for the table at the end."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What is saved: this rank's part of everything that training changes."""

    model: PolicyModel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def save(store: CheckpointStore, state: TrainerState, trained: Trained, groups: ProcessGroups) -> Path:
    """Write the checkpoint of ``state.step`` and make it visible in one atomic step; a collective over all ranks."""
    folder = Path(broadcast_object(str(store.begin(state.step)) if groups.is_driver else None, groups))
    dist_checkpointing.save(_sharded_state(trained, is_loading=False), str(folder))
    save_random_state(folder, groups)
    torch.distributed.barrier(group=groups.control)
    if groups.is_driver:
        content = {"format": _FORMAT, "state": asdict(state), "scheduler": trained.scheduler.state_dict()}
        (folder / _RUN_FILE).write_text(json.dumps(content, indent=1))
        store.commit(state.step)
    torch.distributed.barrier(group=groups.control)
    return store.path(state.step)


def read_state(folder: Path) -> TrainerState:
    """Where the run of this checkpoint stood; reads one small JSON file."""
    return TrainerState(**_read_run_file(folder)["state"])


def restore(folder: Path, trained: Trained, groups: ProcessGroups) -> TrainerState:
    """Load the whole checkpoint at ``folder`` into ``trained`` and the random generators.

    The parallel layout may differ from the one that saved it; random states are taken up only where the layout is the
    same (they belong to ranks).

    Raises:
        ValueError: the checkpoint was written by another format, or does not fit the model.
    """
    content = _read_run_file(folder)
    loaded = dist_checkpointing.load(_sharded_state(trained, is_loading=True), str(folder))
    trained.model.load_state_dict(loaded["model"], strict=True)
    trained.optimizer.load_state_dict(loaded["optimizer"])
    trained.scheduler.load_state_dict(content["scheduler"])
    load_random_state(folder, groups)
    return TrainerState(**content["state"])


def save_weights(folder: Path, model: PolicyModel) -> None:
    """Write only the weights to ``folder``, aside first and then visible in one step; a world of one process."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True)
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata=_METADATA)}, str(partial))
    partial.rename(folder)


def load_weights(folder: Path, model: PolicyModel) -> None:
    """Load only the weights of the checkpoint at ``folder``."""
    sharded = {"model": model.sharded_state_dict(metadata=_METADATA)}
    model.load_state_dict(dist_checkpointing.load(sharded, str(folder))["model"], strict=True)


def _sharded_state(trained: Trained, *, is_loading: bool) -> dict[str, Any]:
    model_state = trained.model.sharded_state_dict(metadata=_METADATA)
    optimizer_state = trained.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_METADATA)
    return {"model": model_state, "optimizer": optimizer_state}


def _read_run_file(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / _RUN_FILE).read_text())
    if content.get("format") != _FORMAT:
        raise ValueError(
            f"{folder / _RUN_FILE} has format {content.get('format')}, this version reads {_FORMAT}; continue the run "
            "with the version that wrote it, or start from its hf/ export."
        )
    return content
