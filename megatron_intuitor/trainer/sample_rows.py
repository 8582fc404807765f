"""Rows of the sample log from a step's batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_intuitor.contracts import Batch, RolloutGroup
from megatron_intuitor.observability import SampleRow
from megatron_intuitor.trainer.score import BatchStatistics


def sample_rows(
    groups: Sequence[RolloutGroup], batch: Batch, statistics: BatchStatistics, rewards: Mapping[str, Tensor]
) -> list[SampleRow]:
    """One row a sample, in the order of the batch."""
    assert batch.advantage is not None
    responses = statistics.per_response(batch)
    samples = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    return [
        SampleRow(
            prompt_id=prompt.id,
            prompt=prompt.text,
            response=rollout.text,
            answer=prompt.answer,
            rewards={name: float(values[i]) for name, values in rewards.items()},
            advantage=float(batch.advantage[i]),
            length=len(rollout.token_ids),
            finish_reason=rollout.finish_reason,
            self_certainty=float(responses[i].self_certainty.mean()),
            entropy=float(responses[i].entropy.mean()),
        )
        for i, (prompt, rollout) in enumerate(samples)
    ]
