"""The one error that a wrong config raises: every problem of it at once, each a sentence."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A config that cannot be run.

    Attributes:
        problems: one sentence a problem, naming field, value, rule and fix.
    """

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in self.problems)]))


def problem(field: str, value: object, rule: str, fix: str) -> str:
    """One problem as a sentence: ``field = value: rule; fix``."""
    return f"{field} = {shown(value)}: {rule}; {fix}."


def shown(value: object, limit: int = 80) -> str:
    """A value as a user would write it in YAML, shortened to ``limit`` characters."""
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else str(value) if value != "" else "''"
    return text if len(text) <= limit else text[: limit - 3] + "..."
