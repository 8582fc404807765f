"""A look at the first row of each data file, so that a wrong column is told before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_intuitor.config.errors import problem
from megatron_intuitor.config.schema import RunConfig


def data_problems(run: RunConfig, world_size: int) -> Iterator[str]:  # noqa: ARG001 - the signature of all checks
    """Problems of ``data`` and ``evaluation``: files that are not there, columns and templates that do not fit."""
    data = run.data
    if "{question}" not in data.template:
        rule = "has no {question}, so every prompt would be the same"
        yield problem("data.template", data.template, rule, "put {question} where the question goes")
    if data.format == "raw" and data.system_prompt:
        rule = "a system message needs data.format = chat"
        fix = "write its text into data.template, or set data.format to chat"
        yield problem("data.system_prompt", data.system_prompt, rule, fix)
    yield from _file_problems(run, "data.path", data.path, needs_answer=run.rewards.accuracy.weight != 0)
    if run.evaluation.path is not None:
        yield from _file_problems(run, "evaluation.path", run.evaluation.path, needs_answer=False)


def _file_problems(run: RunConfig, field: str, path: Path, *, needs_answer: bool) -> Iterator[str]:
    row = _first_row(path)
    if isinstance(row, str):
        yield problem(field, path, row, "give a JSONL file with one problem a line")
        return
    columns = ", ".join(row)
    if run.data.prompt_column not in row:
        rule = f"is no column of the first row of {field} ({path}), which has: {columns}"
        yield problem("data.prompt_column", run.data.prompt_column, rule, "name the column that holds the question")
    if needs_answer and row.get(run.data.answer_column) is None:
        rule = (
            f"rewards.accuracy.weight = {run.rewards.accuracy.weight} needs gold answers, but the first row of {field} "
            f"({path}) has only: {columns}"
        )
        fix = "name the column that holds the answer, or set rewards.accuracy.weight to 0"
        yield problem("data.answer_column", run.data.answer_column, rule, fix)


def _first_row(path: Path) -> dict[str, Any] | str:
    """The first row of a JSONL file that is not blank, or the reason why there is none."""
    if not path.exists():
        return "does not exist"
    if not path.is_file():
        return "is not a file"
    try:
        with path.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), None)
        row = None if first is None else json.loads(first)
    except (OSError, ValueError) as error:
        return f"cannot be read as JSONL ({error})"
    if row is None:
        return "holds no row"
    return row if isinstance(row, dict) else "has a first row that is no JSON object"
