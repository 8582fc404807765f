"""Self-certainty is the mean over the response, and every source of the config is built."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_intuitor.config.schema import AccuracyConfig, RewardsConfig, SelfCertaintyConfig
from megatron_intuitor.contracts import Prompt, ResponseStatistics, Reward, Rollout, RolloutGroup
from megatron_intuitor.rewards import SelfCertaintyReward, build_rewards


def made_step(lengths: list[list[int]], seed: int) -> tuple[list[RolloutGroup], list[ResponseStatistics]]:
    """Groups of responses of the given lengths with random statistics."""
    generator = torch.Generator().manual_seed(seed)
    groups = [
        RolloutGroup(
            Prompt(f"t:{g}", "q", "q", (1,), None if g % 2 else "5"),
            tuple(Rollout((7,) * n, (0.0,) * n, (0,) * n, "stop", text="#5") for n in group),
        )
        for g, group in enumerate(lengths)
    ]
    statistics = [
        ResponseStatistics(*(torch.rand(n, generator=generator) * 20 for _ in range(3)))
        for group in lengths
        for n in group
    ]
    return groups, statistics


SHAPES = st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 2**31))
def test_self_certainty_is_the_mean_of_each_response(lengths, seed):
    groups, statistics = made_step(lengths, seed)
    scores = SelfCertaintyReward()(groups, statistics)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(statistics),)
    for score, s in zip(scores.tolist(), statistics, strict=True):
        exact = sum(s.self_certainty.tolist()) / len(s.self_certainty)
        assert score == pytest.approx(exact, rel=2e-7)


def test_every_source_is_built_whatever_its_weight():
    config = RewardsConfig(self_certainty=SelfCertaintyConfig(weight=0.0), accuracy=AccuracyConfig(weight=0.0))
    rewards = build_rewards(config)
    assert [reward.name for reward in rewards] == list(RewardsConfig.model_fields)
    assert all(isinstance(reward, Reward) for reward in rewards)
    groups, statistics = made_step([[2, 3], [1, 4]], seed=0)
    assert [reward(groups, statistics).shape for reward in rewards] == [(4,), (4,)]


def test_settings_reach_their_source():
    with pytest.raises(ValueError, match="answer_pattern"):
        build_rewards(RewardsConfig(accuracy=AccuracyConfig(answer_pattern="(")))
    groups, statistics = made_step([[1, 1]], seed=0)
    accuracy = build_rewards(RewardsConfig(accuracy=AccuracyConfig(answer_pattern=r"=(\d)")))[1]
    assert accuracy(groups, statistics).tolist() == [0.0, 0.0]
