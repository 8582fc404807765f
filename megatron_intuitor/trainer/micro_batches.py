"""What the passes over the model share: packed micro batches, the forward of a stage, statistics of its head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_intuitor.contracts import Batch
from megatron_intuitor.data import PackedMicroBatch, pack, plan_micro_batches
from megatron_intuitor.models import PackedSegments, packed_segments
from megatron_intuitor.ops import TokenStatistics, token_statistics
from megatron_intuitor.trainer.policy import Policy


@dataclass(frozen=True, slots=True)
class PassSettings:
    """What every pass over the model has in common."""

    temperature: float
    micro_batch_tokens: int
    chunk_bytes: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A packed micro batch and Megatron's description of its segments."""

    packed: PackedMicroBatch
    segments: PackedSegments


def micro_batches(policy: Policy, batch: Batch, samples: Sequence[int], settings: PassSettings) -> list[MicroBatch]:
    """This data-parallel rank's share of ``samples``, packed; all ranks have the same number of micro batches."""
    lengths = batch.sequence_lengths
    plan = plan_micro_batches(
        [lengths[i] for i in samples],
        max_tokens=settings.micro_batch_tokens,
        data_parallel_size=policy.groups.data_size,
    )
    multiple = policy.groups.tensor_size if policy.model.config.sequence_parallel else 1
    device = policy.groups.device
    mine = [
        pack(batch, [samples[i] for i in chosen], pad_to_multiple=multiple, device=device)
        for chosen in plan[policy.groups.data_rank]
    ]
    return [MicroBatch(packed, packed_segments(packed.cu_seqlens.diff().tolist(), device)) for packed in mine]


def head_statistics(
    policy: Policy,
    hidden: Tensor,
    micro: MicroBatch,
    settings: PassSettings,
    *,
    mean_row: Tensor | None = None,
    entropy: bool,
) -> TokenStatistics:
    """Statistics of the micro batch's response tokens from the last stage's ``hidden [tokens(/tp), 1, hidden]``."""
    model = policy.model
    return token_statistics(
        hidden.squeeze(1),
        model.output_weight(),
        micro.packed.targets,
        rows=micro.packed.rows,
        vocab_size=model.true_vocab_size,
        group=policy.groups.tensor,
        sequence_parallel=model.config.sequence_parallel,
        temperature=settings.temperature,
        mean_row=mean_row,
        self_certainty=mean_row is not None,
        entropy=entropy,
        chunk_bytes=settings.chunk_bytes,
    )


def run_model(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, MicroBatch]:
    """Forward the next micro batch through this stage."""
    micro = next(data)
    hidden = model(micro.packed.token_ids, micro.packed.position_ids, micro.segments)
    return hidden, micro
