"""Which reward sources a run has."""

from __future__ import annotations

from megatron_intuitor.config import RewardsConfig
from megatron_intuitor.contracts import Reward
from megatron_intuitor.rewards.accuracy import AccuracyReward
from megatron_intuitor.rewards.self_certainty import SelfCertaintyReward


def build_rewards(config: RewardsConfig) -> list[Reward]:
    """Every source of the config, weight 0 included so that it is reported; ``name`` is its key in the config.

    Raises:
        ValueError: a source's settings are wrong; the message names the field.
    """
    return [SelfCertaintyReward(), AccuracyReward(config.accuracy)]
