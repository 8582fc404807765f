"""Runs one server and takes the whole family of processes down with it, or with the trainer.

Usage: ``python -I supervisor.py --parent PID --grace SECONDS -- COMMAND...``, in a session of its own.

A server is a tree of processes, and the trainer can end without a word (``kill -9``, out of memory).  This small
process stands between them: it is the leader of the server's process group, looks whether the trainer still is its
parent, and kills the group when either end is gone.  It is a script of the standard library alone, because it has to
be awake from the first moment, long before the server has finished importing.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time

_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the command to its end; returns its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    stop = _StopFlag()
    server = subprocess.Popen(args.command[1:], preexec_fn=_die_with_supervisor)
    while server.poll() is None:
        if os.getppid() != args.parent:
            _kill_group()
        if stop.requested:
            _end(server, args.grace)
        time.sleep(_POLL_S)
    sys.stderr.write(f"supervisor: the server ended with code {server.returncode}\n")
    sys.stderr.flush()
    _kill_group()
    return server.returncode


class _StopFlag:
    """Becomes true at the first SIGTERM."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        self.requested = True


def _end(server: subprocess.Popen[bytes], grace_s: float) -> None:
    """Let the server put away its shared memory, but not for long."""
    server.terminate()
    try:
        server.wait(grace_s)
    except subprocess.TimeoutExpired:
        _kill_group()


def _kill_group() -> None:
    """Kill every process of the session's group, this one included."""
    os.killpg(0, signal.SIGKILL)


def _die_with_supervisor() -> None:
    """In the server, before its program starts: have the kernel kill it when the supervisor dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
