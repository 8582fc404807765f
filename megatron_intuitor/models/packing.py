"""Describes rows of sequences that lie one after the other without padding, to megatron and to our attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

_SLACK_TOKENS = 16
_SLACK_FRACTION = 0.2


@dataclass(frozen=True)
class AttentionGroups:
    """How the segments of a packed row are gathered into a few rectangular batches for attention.

    Segments of near lengths share a batch; the shorter ones are continued with copies of their last token.  Under a
    causal mask no real token sees what comes after it, so this changes neither results nor gradients, and the copies'
    own outputs are dropped.  (Measured, 1 CPU thread, 128 segments of 20-40 tokens: forward + backward 20 ms against
    117 ms with one call a segment.)
    """

    shapes: tuple[tuple[int, int], ...]
    """(segments, tokens of the longest) of each batch."""
    take: Tensor | None
    """int64 ``[places]``: which token of the row is at each place of the batches; None where the two are the same."""
    back: Tensor | None
    """int64 ``[tokens]``: place in the batches of each token of the row."""


@dataclass
class PackedSegments(PackedSeqParams):
    """Megatron's description of a packed row; `AttentionGroups` are worked out once a micro batch, not once a layer."""

    groups: AttentionGroups | None = None


def packed_segments(lengths: Sequence[int], device: torch.device) -> PackedSegments:
    """Describe a packed row whose segments have ``lengths`` tokens; a padding tail is a segment too, none is empty."""
    assert min(lengths) > 0
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    # max_seqlen is the longest segment, not a bound: where it equals the row's length, megatron's rotary embedding
    # counts positions from the start of the row.  Attention sees differences only, but far positions cost precision.
    cumulative = starts.to(device)
    return PackedSegments(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        groups=_group(lengths, starts, device),
    )


def _group(lengths: Sequence[int], starts: Tensor, device: torch.device) -> AttentionGroups:
    """Sort segments into batches and find where each token goes."""
    batches = _batches(lengths)
    shapes = tuple((len(batch), lengths[batch[0]]) for batch in batches)
    if len(batches) == 1 and min(lengths) == max(lengths):
        return AttentionGroups(shapes, None, None)
    all_lengths = torch.tensor(list(lengths))
    takes, back, placed = [], torch.empty(int(starts[-1]), dtype=torch.int64), 0
    for batch, (count, longest) in zip(batches, shapes, strict=True):
        first, length = starts[batch].long()[:, None], all_lengths[batch][:, None]
        position = torch.arange(longest)[None]
        take = first + torch.minimum(position, length - 1)
        place = torch.arange(placed, placed + count * longest).view(count, longest)
        real = position < length
        back[take[real]] = place[real]
        takes.append(take.flatten())
        placed += count * longest
    return AttentionGroups(shapes, torch.cat(takes).to(device), back.to(device))


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Segment numbers, longest first, cut where a segment is much shorter than the first of its batch."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            longest = lengths[batches[-1][0]]
            if longest - lengths[index] <= max(_SLACK_TOKENS, _SLACK_FRACTION * longest):
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches
