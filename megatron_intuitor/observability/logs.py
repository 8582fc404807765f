"""Standard-library logging, set up in one place: one line a record, the rank in it, third parties quiet."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

PACKAGE = "megatron_intuitor"

_CHATTY = ("vllm.triton_utils.importing",)
"""Loggers whose warnings say nothing about a run: here that Triton has no CPU backend."""


class _CurrentStderr(logging.Handler):
    """Writes to whatever `sys.stderr` is now, so that records appear above a live progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one formatted record and a line break."""
        stream: TextIO = sys.stderr
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except (OSError, ValueError):  # a closed or full stream: the logging module's own way of reporting it
            self.handleError(record)


def configure_logging(rank: int, level: int = logging.INFO) -> None:
    """Send all log records to stderr as ``12:00:01 W rank3 megatron_intuitor.rollout | text``.

    Records of this package pass from ``level`` on at rank 0 and from warnings on elsewhere; those of other libraries
    from warnings on.  Calling it again replaces the earlier set-up.  Python warnings become log records.
    """
    handler = _CurrentStderr()
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname).1s rank{rank} %(name)s | %(message)s", datefmt="%H:%M:%S")
    )
    root = logging.getLogger()
    for earlier in [h for h in root.handlers if isinstance(h, _CurrentStderr)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(level if rank == 0 else max(level, logging.WARNING))
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    logging.captureWarnings(True)
