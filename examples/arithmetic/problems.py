"""The arithmetic task: ``a+b+c+d=`` with digits from 1 to 9, and its split into training and held-out problems.

Whether a problem is held out depends on a hash of its text alone, so the split is the same in every run and neither the
supervised training of the tiny model nor reinforcement learning ever sees a held-out problem.

Run it to write ``train.jsonl`` and ``heldout.jsonl`` (columns ``question`` and ``answer``) beside this file::

    python examples/arithmetic/problems.py
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
HELD_OUT_ONE_IN = 10

Terms = tuple[int, int, int, int]


def question(terms: Terms) -> str:
    """The problem as the model sees it: ``(1, 2, 3, 4)`` is ``1+2+3+4=``."""
    return "+".join(map(str, terms)) + "="


def worked_solution(terms: Terms) -> str:
    """The running sums and the answer: ``(1, 2, 3, 4)`` gives ``1+2=3;3+3=6;6+4=10;#10``."""
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{total}+{term}={total + term};")
        total += term
    return "".join(steps) + f"#{total}"


def is_held_out(terms: Terms) -> bool:
    """True for about one problem in ten, by a stable hash of its text."""
    return int(hashlib.sha256(question(terms).encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def split() -> tuple[list[Terms], list[Terms]]:
    """All 6,561 problems as (training, held-out), each in a fixed shuffled order."""
    problems = list(product(range(1, 10), repeat=4))
    random.Random(0).shuffle(problems)
    return [p for p in problems if not is_held_out(p)], [p for p in problems if is_held_out(p)]


def write_jsonl(path: Path, problems: Iterable[Terms]) -> None:
    """Write one JSON object with ``question`` and ``answer`` a line."""
    rows = (json.dumps({"question": question(p), "answer": str(sum(p))}) for p in problems)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Write both files and say how many problems they hold."""
    for name, problems in zip(("train", "heldout"), split(), strict=True):
        write_jsonl(HERE / f"{name}.jsonl", problems)
        print(f"{HERE / name}.jsonl: {len(problems)} problems")


if __name__ == "__main__":
    main()
