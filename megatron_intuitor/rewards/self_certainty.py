"""Intuitor's reward: how far the policy's distribution is from uniform, averaged over the response.

``u(o|q) = 1/|o| * sum_i KL(U || p(. | q, o_<i))`` (arXiv 2505.19590, section 3.2).  The KL of each response token comes
with the statistics; this file only averages it, over the whole response including its end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_intuitor.contracts import ResponseStatistics, RolloutGroup


class SelfCertaintyReward:
    """Mean self-certainty of each response, in nats."""

    name = "self_certainty"

    def __call__(self, groups: Sequence[RolloutGroup], statistics: Sequence[ResponseStatistics]) -> Tensor:
        """Return fp32 ``[samples]``, group-major; reads nothing but ``statistics``."""
        assert len(statistics) == sum(len(group.rollouts) for group in groups)
        return torch.tensor([s.self_certainty.double().mean().item() for s in statistics], dtype=torch.float32)
