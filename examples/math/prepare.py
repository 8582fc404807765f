"""Write the MATH problems as JSONL files for the configs in this folder.

Downloads ``DigitalLearningGmbH/MATH-lighteval`` (7,500 training and 5,000 test problems, columns ``problem`` and
``solution``; the answer is the solution's last box)::

    python examples/math/prepare.py data/math
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset

SOURCE = "DigitalLearningGmbH/MATH-lighteval"


def main() -> None:
    """Write ``train.jsonl`` and ``test.jsonl``."""
    parser = argparse.ArgumentParser(description=f"Write {SOURCE} as JSONL.")
    parser.add_argument("out", type=Path, help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in load_dataset(SOURCE, "default").items():
        rows.select_columns(["problem", "solution"]).to_json(out / f"{name}.jsonl")
        print(f"{out / name}.jsonl: {len(rows)} problems")


if __name__ == "__main__":
    main()
