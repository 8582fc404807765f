r"""GRPO's verifiable reward: is the final answer equal to the gold answer?

Both sides are reduced to their final answer first.  Gold: what follows the last ``####`` (GSM8K), else the last
``\boxed{}`` (MATH), else the whole text.  Response: the last match of a configured pattern, else the last ``\boxed{}``,
else what math-verify finds in the text.  Equal strings and plain integers are compared directly; everything else
(fractions, sets, units, percentages, LaTeX) is left to math-verify.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from tokenize import TokenError

import torch
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException
from torch import Tensor

from megatron_intuitor.config import AccuracyConfig
from megatron_intuitor.contracts import ResponseStatistics, RolloutGroup

logger = logging.getLogger(__name__)

TIMEOUT_S = 5
"""For parsing one answer and for comparing two; sympy can otherwise work for hours on ``9^{9^{9^9}}``."""

EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

VERIFICATION_ERRORS = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, SyntaxError, TimeoutException, TokenError, TypeError,
    ValueError,
)  # fmt: skip
"""What sympy and the LaTeX parser raise on text that a model made up."""

PLAIN_INTEGER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)")
THOUSANDS_GAP = re.compile(r"(?<=\d)(\\[,!;: ]|\{,\}| )(?=\d{3}(?!\d))")
NUMBER_WITH_WORDS = re.compile(r"([+-]?[\d.,/ ]*\d)((\s+[A-Za-z]{3,})+)")
BOX_OR_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out of judging one response; ``failed`` says that verification itself broke or took too long."""

    correct: bool
    failed: bool = False


def answer_is_correct(text: str, gold: str, *, answer_pattern: str = "") -> bool:
    """True where the final answer of ``text`` equals the one of ``gold``; see `judge_answer`."""
    return judge_answer(text, gold, answer_pattern=answer_pattern).correct


def judge_answer(text: str, gold: str, *, answer_pattern: str = "") -> Verdict:
    """Compare the final answer of the response ``text`` with the one of ``gold``.

    ``answer_pattern`` is a regular expression whose first group is the answer (last match); a response that it does
    not match is wrong.  Must run in the main thread, where verification can be timed out.
    """
    wanted = _tidy(_final_answer(gold) or gold)
    answer = _last_match(answer_pattern, text) if answer_pattern else last_boxed(text)
    if answer is None and answer_pattern:
        return Verdict(correct=False)
    if answer is not None:
        answer = _tidy(answer)
        if answer == wanted:
            return Verdict(correct=bool(wanted))
        if PLAIN_INTEGER.fullmatch(answer) and PLAIN_INTEGER.fullmatch(wanted):
            return Verdict(correct=_integer(answer) == _integer(wanted))
    return _verify(text if answer is None else _boxed(answer), wanted)


def compile_answer_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern from the config.

    Raises:
        ValueError: it is not a regular expression, or has no group that holds the answer.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"rewards.accuracy.answer_pattern is {pattern!r}, which is no regular expression: {error}"
        ) from error
    if compiled.groups < 1:
        raise ValueError(
            f"rewards.accuracy.answer_pattern is {pattern!r}, but its first group must hold the answer: '#(\\d+)$'"
        )
    return compiled


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{}`` or ``\fbox{}``, nested braces included; None without one."""
    open_braces: list[int | None] = []  # where a box's content begins, None for any other brace
    best: tuple[int, int] | None = None
    for token in BOX_OR_BRACE.finditer(text):
        if token["box"]:
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (best is None or start > best[0]):
                best = start, token.start()
    return text[best[0] : best[1]] if best else None


def _final_answer(gold: str) -> str | None:
    """What a data set's solution gives as its answer, if it marks one."""
    if "####" in gold:
        return gold.rsplit("####", 1)[1]
    return last_boxed(gold)


def _last_match(pattern: str, text: str) -> str | None:
    """First group of the last match; None without a match or where the group took no part in it."""
    found = deque(re.finditer(pattern, text), maxlen=1)
    return found[0][1] if found else None


def _tidy(answer: str) -> str:
    """Take off what does not change an answer but misleads the parser: ``$ 1\\,000.$``, ``18 dollars``."""
    answer = TEXT_COMMAND.sub(r" \1 ", answer).strip().strip("$€£¥").strip().removesuffix(".").strip()
    answer = THOUSANDS_GAP.sub("", answer)
    worded = NUMBER_WITH_WORDS.fullmatch(answer)
    return worded[1].strip() if worded else " ".join(answer.split())


def _integer(text: str) -> tuple[bool, str]:
    """Sign and digits: ``-01,000`` is (True, "1000").  Text, because Python refuses to read very long integers."""
    digits = text.lstrip("+-").replace(",", "").lstrip("0")
    return text.startswith("-") and digits != "", digits


def _boxed(answer: str) -> str:
    """The form in which math-verify takes a bare answer for LaTeX."""
    return rf"\boxed{{{answer}}}"


def _verify(prediction: str, gold: str) -> Verdict:
    """Ask math-verify; what it cannot digest is wrong."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("answers must be verified in the main thread: elsewhere math-verify cannot be timed out")
    try:
        parsed = parse(prediction, EXTRACTION, parsing_timeout=TIMEOUT_S, raise_on_error=True)
        return Verdict(verify(_parse_gold(gold), parsed, timeout_seconds=TIMEOUT_S, raise_on_error=True))
    except VERIFICATION_ERRORS as error:
        logger.debug("verification of %.200r against %.200r failed: %r", prediction, gold, error)
        return Verdict(correct=False, failed=True)


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[object]:
    """A gold answer as math-verify sees it; each is asked for once a sample, so it is kept."""
    return parse(_boxed(gold), EXTRACTION, parsing_timeout=TIMEOUT_S, raise_on_error=True)


class AccuracyReward:
    """1 for a right final answer, 0 for a wrong one, NaN where the prompt has no gold answer."""

    name = "accuracy"

    def __init__(self, config: AccuracyConfig) -> None:
        """Check the pattern now, so that a wrong one stops the run before it starts."""
        self.answer_pattern = config.answer_pattern
        if self.answer_pattern:
            compile_answer_pattern(self.answer_pattern)
        self.failures = 0
        """Responses so far whose verification broke or took too long; they counted as wrong."""

    def __call__(self, groups: Sequence[RolloutGroup], statistics: Sequence[ResponseStatistics]) -> Tensor:
        """Return fp32 ``[samples]``, group-major; reads nothing but the texts and gold answers of ``groups``."""
        del statistics
        failures_before = self.failures
        scores = [self._score(rollout.text, group.prompt.answer) for group in groups for rollout in group.rollouts]
        if self.failures > failures_before:
            logger.warning("%d answers could not be verified; they count as wrong", self.failures - failures_before)
        return torch.tensor(scores, dtype=torch.float32)

    def _score(self, text: str, gold: str | None) -> float:
        """The reward of one response."""
        if gold is None:
            return float("nan")
        verdict = judge_answer(text, gold, answer_pattern=self.answer_pattern)
        self.failures += verdict.failed
        return float(verdict.correct)
