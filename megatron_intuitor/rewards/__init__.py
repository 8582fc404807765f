"""Reward sources: from the responses of a step to one number a response."""

from megatron_intuitor.rewards.accuracy import AccuracyReward, Verdict, answer_is_correct, judge_answer
from megatron_intuitor.rewards.registry import build_rewards
from megatron_intuitor.rewards.self_certainty import SelfCertaintyReward

__all__ = [
    "AccuracyReward",
    "SelfCertaintyReward",
    "Verdict",
    "answer_is_correct",
    "build_rewards",
    "judge_answer",
]
