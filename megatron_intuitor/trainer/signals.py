"""A polite end: SIGTERM and SIGINT ask the run to save and leave."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from megatron_intuitor.platform import ProcessGroups


class StopRequested(Exception):  # noqa: N818 - it is a request, not an error
    """Raised where waiting work can be given up because the run has been asked to stop."""


class StopSignal:
    """Remembers that the process was asked to stop; ranks agree on it before they act.

    SIGTERM may come more than once (a cluster and torchrun both send it) and never does more than ask.  A second
    SIGINT is left to Python's default, so that an impatient user can still interrupt.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def raise_if_requested(self) -> None:
        """Raise `StopRequested` on this rank once a signal has come."""
        if self.requested:
            raise StopRequested

    def agreed(self, groups: ProcessGroups) -> bool:
        """Whether any rank was asked to stop; a collective, so that all leave at the same point."""
        flag = torch.tensor(int(self.requested))
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=groups.control)
        return bool(flag.item())
