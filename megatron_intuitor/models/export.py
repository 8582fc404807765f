"""Writes the policy as a Hugging Face folder."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_intuitor.contracts import TensorMeta
from megatron_intuitor.models.policy import PolicyModel
from megatron_intuitor.models.policy_weights import PolicyWeights
from megatron_intuitor.models.safetensors_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from megatron_intuitor.platform import broadcast_object

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "additional_chat_templates",
    "LICENSE*",
)
"""What is copied from the source folder beside the weights."""


def export_hf(model: PolicyModel, source: Path, target: Path, *, max_file_bytes: int = 5 * 10**9) -> None:
    """Write ``model`` to ``target`` in the format that it was loaded from; a collective over all ranks.

    Each tensor gets the dtype that it has in ``source``, so that an untouched model gives identical bits.  Config,
    tokenizer, generation config and chat template are copied from ``source``.  The folder is written beside
    ``target`` under a temporary name and renamed when it is complete; an earlier model at ``target`` is replaced.

    Args:
        model: The policy, not its DDP wrapper.
        source: The Hugging Face folder that it came from.
        target: The folder to write.
        max_file_bytes: Size of a safetensors file; also what the driver holds in memory.

    Raises:
        ValueError: ``target`` is ``source``, or exists and is no model folder (on every rank).
    """
    problem = broadcast_object(_problem_with(Path(source), Path(target)), model.groups)
    if problem:
        raise ValueError(problem)
    weights = PolicyWeights(model, dtype=_stored_dtypes(model, Path(source)))
    if not model.groups.is_driver:
        for _ in weights:
            pass
        return
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    _copy_companions(Path(source), partial)
    _write_weights(weights, partial, max_file_bytes)
    _replace(partial, target)


def _problem_with(source: Path, target: Path) -> str | None:
    if target.exists() and source.resolve() == target.resolve():
        return f"the export would overwrite the folder {str(target)!r} that the model came from; choose another"
    if target.exists() and not (target.is_dir() and ((target / "config.json").is_file() or not any(target.iterdir()))):
        return f"the export target {str(target)!r} exists and holds no model; choose another or remove it"
    return None


def _stored_dtypes(model: PolicyModel, source: Path) -> Mapping[str, torch.dtype]:
    folder = SafetensorsFolder(source)
    return {name: folder.dtype(name) for placement in model.placements() for name in placement.names}


def _copy_companions(source: Path, folder: Path) -> None:
    for entry in sorted(source.iterdir()):
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in _COMPANIONS):
            if entry.is_dir():
                shutil.copytree(entry, folder / entry.name)
            else:
                shutil.copyfile(entry, folder / entry.name)


def _write_weights(weights: PolicyWeights, folder: Path, max_file_bytes: int) -> None:
    """Write the stream into numbered files and, where there is more than one, the index that transformers reads."""
    metadata = weights.metadata()
    file_of = _assign_files(metadata, max_file_bytes)
    held: dict[str, Tensor] = {}
    left = {file: list(file_of.values()).count(file) for file in set(file_of.values())}
    for name, tensor in weights:
        assert tensor is not None
        held[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)  # the stream may yield views
        left[file_of[name]] -= 1
        if left[file_of[name]] == 0:
            save_file(held, folder / file_of[name], metadata={"format": "pt"})
            held = {}
    if len(left) > 1:
        total = sum(_bytes(meta) for meta in metadata)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _bytes(meta: TensorMeta) -> int:
    return torch.Size(meta.shape).numel() * meta.dtype.itemsize


def _assign_files(metadata: Sequence[TensorMeta], max_file_bytes: int) -> dict[str, str]:
    """Tensor name -> file name, filling files in order; a tensor beyond the limit has a file to itself."""
    number, size, numbers = 1, 0, {}
    for meta in metadata:
        if size and size + _bytes(meta) > max_file_bytes:
            number, size = number + 1, 0
        numbers[meta.name] = number
        size += _bytes(meta)
    if number == 1:
        return dict.fromkeys(numbers, SINGLE_FILE)
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in numbers.items()}


def _replace(partial: Path, target: Path) -> None:
    """Put a complete folder in place; an earlier one is moved away first and deleted last."""
    os.chmod(partial, 0o755)
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / target.name)
    partial.rename(target)
    shutil.rmtree(old)
