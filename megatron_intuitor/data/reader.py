"""Reads problems from a JSONL file and says exactly which row is wrong when one is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One problem as the file has it.

    Example:
        >>> Row(number=17, question="1+2+3+4=", answer="10")
    """

    number: int
    """Zero-based place among the file's problems; blank lines are not counted."""
    question: str
    answer: str | None


def read_rows(path: Path, *, prompt_column: str, answer_column: str) -> list[Row]:
    """Read every problem of a JSONL file, in file order.

    A file without labels is fine: where no line has ``answer_column``, every answer is None.  Where some lines have
    it and others do not, the first line without it is refused, because a training run would silently lose labels.

    Raises:
        ValueError: the file is missing or empty, or a line is not JSON, not an object, lacks a column, or holds
            something other than text there; the message names file, line and fix.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; data.path and evaluation.path must name a JSONL file")
    records = list(_objects(path))
    if not records:
        raise ValueError(f"{path}: holds no problems; it must have one JSON object a line")
    labelled = any(answer_column in record for _, record in records)
    return [
        Row(
            number=number,
            question=_text(path, line, record, prompt_column, "data.prompt_column"),
            answer=_text(path, line, record, answer_column, "data.answer_column") if labelled else None,
        )
        for number, (line, record) in enumerate(records)
    ]


def _objects(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The JSON objects of a file, each with its one-based line number."""
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {line}: not valid JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {line}: expected a JSON object, found {type(record).__name__}")
            yield line, record


def _text(path: Path, line: int, record: dict[str, object], column: str, field: str) -> str:
    """The text in one column of one record."""
    if column not in record:
        present = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{path}, line {line}: no column {column!r}; columns there: {present}. Set --{field}")
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(
            f"{path}, line {line}: column {column!r} must be a string, found {type(value).__name__} ({value!r:.60})"
        )
    return value
