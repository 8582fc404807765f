"""Reads slices of the tensors in a Hugging Face folder without reading the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsFolder:
    """The tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` lists.

    Files are memory-mapped; headers are read at once, numbers when asked for.

    Raises:
        ValueError: No safetensors, a listed file is missing or broken, or a tensor is not where the index says.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._handles: dict[str, Any] = {}
        index = self.path / INDEX_FILE
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
            for file in sorted(set(self._file_of.values())):
                self._check_listed(file)
        elif (self.path / SINGLE_FILE).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            raise ValueError(self._nothing_found())

    def _nothing_found(self) -> str:
        reason = f"model.path {str(self.path)!r} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
        if any(self.path.glob("*.bin")):
            reason += "; its *.bin files are pickles and are not read: convert them with save_pretrained"
        return reason

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.path / file, framework="pt", device="cpu")
            except (SafetensorError, FileNotFoundError) as error:
                raise ValueError(f"{self.path / file} cannot be read: {error}") from error
        return self._handles[file]

    def _check_listed(self, file: str) -> None:
        held = set(self._open(file).keys())
        listed = {name for name, where in self._file_of.items() if where == file}
        if held != listed:
            odd = sorted(held ^ listed)[0]
            raise ValueError(f"{self.path / INDEX_FILE} and {self.path / file} disagree about tensor {odd!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.path / self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor, from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header; ValueError where it is no float."""
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ValueError(f"{self.file(name)}: tensor {name!r} is stored as {stored}; only floats are supported")
        return _DTYPES[stored]

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        """Read ``tensor[start : start + length]`` along ``dim``."""
        rows = (slice(None),) * dim + (slice(start, start + length),)
        tensor: Tensor = self._slice(name)[rows]
        return tensor

    def _slice(self, name: str) -> Any:
        return self._open(self._file_of[name]).get_slice(name)
