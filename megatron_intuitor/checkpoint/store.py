"""Where checkpoints lie: written aside, made visible by one rename, thinned to the newest few.

A folder named ``step_00000020`` is whole; anything else (``.step_00000020.partial``) is left over from a run that was
interrupted and is never read.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step_(\d{8})")
log = logging.getLogger(__name__)


class CheckpointStore:
    """The ``checkpoints/`` folder of a run.  Only the driver calls what changes it."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def complete(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(m.group(1)) for m in matches if m)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        steps = self.complete()
        return self.path(steps[-1]) if steps else None

    def path(self, step: int) -> Path:
        """Where the whole checkpoint of ``step`` lies."""
        return self.folder / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is written before it is whole."""
        return self.folder / f".step_{step:08d}.partial"

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of ``step`` into; leftovers of interrupted runs are removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step_*"):
            log.warning("removing an unfinished checkpoint: %s", leftover)
            shutil.rmtree(leftover)
        partial = self.partial(step)
        partial.mkdir()
        return partial

    def commit(self, step: int) -> Path:
        """Make the checkpoint visible: flush everything to disk, then rename, then drop the oldest ones."""
        partial, final = self.partial(step), self.path(step)
        _flush(partial)
        if final.exists():  # the same step again after a restart: the newer one replaces it
            self._hide(step)
        partial.rename(final)
        _flush_folder(self.folder)
        for old in self.complete()[: -self.keep]:
            self._hide(old)
        for hidden in self.folder.glob(".step_*.old"):
            shutil.rmtree(hidden)
        return final

    def _hide(self, step: int) -> None:
        """Take a checkpoint out of sight in one step, so that a half-deleted one is never mistaken for a whole one."""
        self.path(step).rename(self.folder / f".step_{step:08d}.old")


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _flush_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
