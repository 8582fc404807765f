"""Where metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases on request, and the fan-out over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary as ProtoSummary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_intuitor.observability.files import drop_steps_after, finite_or_none, json_line

_LOG = logging.getLogger(__name__)


class MetricsSink(Protocol):
    """A place that takes the metrics of a step."""

    name: str

    def log(self, metrics: Mapping[str, float], step: int, weight_version: int) -> None:
        """Take the metrics of one step; steps never go back."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Send what is left and let go; ``failed`` says that the run broke."""
        ...


class MetricsJsonl:
    """`metrics.jsonl`: one JSON object a step, always with ``step`` and ``weight_version``, flushed each time.

    Opening it cuts away the lines of steps after ``resume_step`` (0, a fresh start: all lines).  Metrics that come for
    the step written last are merged into its line, so no step ever has two.  NaN and infinities are written as null.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = drop_steps_after(path, resume_step if resume_step > 0 else -1)
        self._last: dict[str, object] = kept[-1] if kept else {}
        self._last_step: int = kept[-1]["step"] if kept else -1
        path.touch()
        self._file = path.open("r+b")
        self._line_start = path.stat().st_size - len(json_line(self._last).encode()) if kept else 0
        self._line_end = path.stat().st_size

    def log(self, metrics: Mapping[str, float], step: int, weight_version: int) -> None:
        """Write or complete the line of ``step``.  Raises `ValueError` for a step before the last one."""
        if step < self._last_step:
            raise ValueError(f"metrics of step {step} came after those of step {self._last_step}; log steps in order")
        start = self._line_end if step > self._last_step else self._line_start
        earlier = {} if step > self._last_step else self._last
        values = {name: finite_or_none(value) for name, value in metrics.items()}
        row = {"step": step, "weight_version": weight_version, **_without_stamp(earlier), **_without_stamp(values)}
        line = json_line(row).encode()
        self._file.seek(start)
        self._file.write(line)
        self._file.truncate()
        self._file.flush()
        self._last, self._last_step, self._line_start, self._line_end = row, step, start, start + len(line)

    def close(self, *, failed: bool = False) -> None:  # noqa: ARG002 - the file is the same either way
        """Close the file; closing twice is fine."""
        self._file.close()


class TensorBoardSink:
    """TensorBoard scalars.  On resume, steps after ``resume_step`` of earlier event files are purged by TensorBoard."""

    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._writer = EventFileWriter(str(folder))
        # A START record tells TensorBoard to forget every earlier event from this step on.
        first_step = resume_step + 1 if resume_step > 0 else 0
        start = Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._writer.add_event(start)

    def log(self, metrics: Mapping[str, float], step: int, weight_version: int) -> None:
        """Write every metric and the weight version as scalars of ``step``."""
        scalars = {**metrics, "sync/weight_version": float(weight_version)}
        values = [ProtoSummary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=ProtoSummary(value=values)))
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:  # noqa: ARG002 - TensorBoard does not record how a run ended
        """Flush and close the event file."""
        self._writer.close()


class Tracker:
    """Sends the metrics of a step to every sink.

    ``record`` (the jsonl file) must work: its errors go to the caller.  The others are a courtesy: when one fails, it
    is named in one warning and the run goes on; it is tried again at each step, since networks come back.
    """

    def __init__(self, record: MetricsSink, others: Sequence[MetricsSink], warn: Callable[[str], None]) -> None:
        self._record = record
        self._others = list(others)
        self._warn = warn
        self._warned: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int, weight_version: int) -> None:
        """Log to the record first, then to the others."""
        self._record.log(metrics, step, weight_version)
        for sink in self._others:
            self._try(sink.name, partial(sink.log, metrics, step, weight_version))

    def close(self, *, failed: bool = False) -> None:
        """Close every sink."""
        for sink in self._others:
            self._try(sink.name, partial(sink.close, failed=failed))
        self._record.close(failed=failed)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever a tracker's client raises, training is worth more; it is shown
            if name not in self._warned:
                self._warn(f"{name} failed and may miss steps; the run goes on: {type(error).__name__}: {error}")
                self._warned.add(name)
            _LOG.debug("%s failed", name, exc_info=error)


def _without_stamp(row: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if name not in ("step", "weight_version")}
