"""A run folder read back: metrics, samples, summary and config, whatever of them is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_intuitor.observability.files import JsonObject, read_json_lines
from megatron_intuitor.observability.text import redact

STAGES = ("early", "middle", "late")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run folder holds; missing pieces are empty."""

    name: str
    metrics: list[JsonObject]
    """Objects of `metrics.jsonl`, by ascending step."""
    samples: list[JsonObject]
    summary: JsonObject
    config: JsonObject

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: only then there is a summary."""
        return bool(self.summary)

    @property
    def metric_names(self) -> list[str]:
        """Names of all metrics that were ever logged, in the order of their first appearance."""
        names: dict[str, None] = {}
        for row in self.metrics:
            names.update(dict.fromkeys(row))
        return [name for name in names if name not in ("step", "weight_version")]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps at which a metric was logged and its values; null reads as NaN."""
        rows = [row for row in self.metrics if name in row]
        return [row["step"] for row in rows], [float("nan") if row[name] is None else float(row[name]) for row in rows]

    def evaluations(self) -> tuple[JsonObject, JsonObject]:
        """Evaluation before and after: from the summary, else the first and last ``eval/...`` rows of the metrics."""
        if self.summary.get("before") or self.summary.get("after"):
            return self.summary.get("before", {}), self.summary.get("after", {})
        found = [{k: v for k, v in row.items() if k.startswith("eval/")} for row in self.metrics]
        found = [row for row in found if row]
        return (found[0], found[-1]) if len(found) > 1 else ({}, {})


def load_run(folder: Path) -> RunRecord:
    """Read a run folder.  Raises `ValueError` where the folder or both logs are missing, or a file is broken."""
    if not folder.is_dir():
        raise ValueError(f"run folder {str(folder)!r} does not exist; give the output_dir of a run")
    metrics = read_json_lines(folder / "metrics.jsonl")
    samples = read_json_lines(folder / "samples.jsonl")
    summary = _mapping(folder / "summary.json")
    if not (metrics or samples or summary):
        raise ValueError(
            f"run folder {str(folder)!r} holds no metrics.jsonl, samples.jsonl or summary.json; "
            "give the output_dir of a run"
        )
    return RunRecord(
        name=folder.resolve().name,
        metrics=sorted(metrics, key=lambda row: row["step"]),
        samples=samples,
        summary=summary,
        config=redact(_mapping(folder / "config.yaml")),
    )


def stages(samples: Sequence[JsonObject]) -> list[str]:
    """The third of the run, by distinct steps, that each sample comes from: early, middle or late."""
    steps = sorted({row["step"] for row in samples})
    place = {step: STAGES[index * len(STAGES) // len(steps)] for index, step in enumerate(steps)}
    if len(steps) == 2:
        place[steps[1]] = STAGES[2]
    return [place[row["step"]] for row in samples]


def _mapping(path: Path) -> JsonObject:
    if not path.exists():
        return {}
    try:
        # YAML is a superset of JSON, but its reader is a hundred times slower.
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); repair or remove it, then write the report again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}; repair or remove it")
    return content
