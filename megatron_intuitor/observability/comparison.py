"""Before and after: the rows of the table that says what training changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_intuitor.observability.lines import is_share, shown
from megatron_intuitor.observability.text import number, signed, words

FIRST = ("greedy_accuracy", "sampled_accuracy")
LAST = ("self_certainty", "entropy", "length", "response_length")


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One line of the table, ready to show; ``change`` is after minus before, None where one is missing."""

    label: str
    before: str
    after: str
    change: str
    delta: float | None


def differences(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """``after - before`` of every metric that both have."""
    return {name: after[name] - before[name] for name in after if name in before}


def comparison(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> list[ComparisonRow]:
    """Rows in the order accuracies, patterns, self-certainty, entropy, length.

    Names may carry a prefix (``eval/held_out/greedy_accuracy``); where all share one it is not shown.
    """
    names = list(dict.fromkeys([*before, *after]))
    prefixes = {name.rpartition("/")[0] for name in names}
    rows = []
    for name in sorted(names, key=_rank):
        label = words(name.rpartition("/")[2] if len(prefixes) == 1 else name.removeprefix("eval/"))
        rows.append(_row(label, name, before.get(name), after.get(name)))
    return rows


def _rank(name: str) -> int:
    last = name.rpartition("/")[2]
    if last in FIRST:
        return FIRST.index(last)
    return len(FIRST) + 1 + LAST.index(last) if last in LAST else len(FIRST)


def _row(label: str, name: str, before: float | None, after: float | None) -> ComparisonRow:
    delta = None if before is None or after is None else after - before
    if delta is None or not math.isfinite(delta):
        change, delta = "", None
    elif is_share(name) and abs(delta) <= 1.0:
        change = signed(f"{100 * delta:.1f} points", delta)
    else:
        change = signed(number(delta), delta)
    return ComparisonRow(label, shown(name, before), shown(name, after), change, delta)
