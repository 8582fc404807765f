"""From a batch of samples of any length to packed micro batches without padding between samples.

Two steps: `plan_micro_batches` decides which samples go where (numbers only, so that every rank can compute the same
plan), and `pack` lays the samples of one micro batch one after the other in a single row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from megatron_intuitor.contracts import Batch

PADDING_TOKEN = 0


@dataclass(frozen=True, slots=True)
class PackedMicroBatch:
    """Samples one after the other in one row of ``T`` tokens, and where their ``R`` response tokens are predicted.

    A model must let tokens attend inside their segment only; ``cu_seqlens`` says where segments begin and end.

    Example:
        Two samples, prompt 2 + response 3 and prompt 1 + response 2, padded to a multiple of 4: ``T`` is 8 and
        ``cu_seqlens == [0, 5, 8]``; padded to a multiple of 5, ``T`` is 10 and ``cu_seqlens == [0, 5, 8, 10]``.
        ``position_ids == [0 1 2 3 4 | 0 1 2 ...]`` and ``rows == [1, 2, 3, 5, 6]``: token 2, the first response
        token, is predicted by the hidden state of row 1.
    """

    token_ids: Tensor
    """int64 ``[1, T]``."""
    position_ids: Tensor
    """int64 ``[1, T]``; starts again at 0 in every segment."""
    cu_seqlens: Tensor
    """int32 ``[segments + 1]``; a padding tail is a segment of its own, the last one."""
    max_seqlen: int
    """Tokens of the longest segment."""
    rows: Tensor
    """int64 ``[R]``: position in ``T`` whose hidden state predicts the response token, the one before it."""
    targets: Tensor
    """int64 ``[R]``: the response token."""
    flat_index: Tensor
    """int64 ``[R]``: where the response token lies in the flat tensors of the batch."""
    sample_index: Tensor
    """int64 ``[R]``: the sample of the batch that the response token belongs to."""


def plan_micro_batches(lengths: Sequence[int], *, max_tokens: int, data_parallel_size: int) -> list[list[list[int]]]:
    """Cut samples of ``lengths`` tokens into micro batches: ``[data rank][micro batch]`` is a list of sample indices.

    Every sample comes exactly once, no micro batch is empty or holds more than ``max_tokens`` tokens, and all data
    ranks have the same number of micro batches.  Longest samples are placed first, each into the emptiest micro
    batch, so two micro batches or two ranks differ by at most one sample's length.  The fewest micro batches for
    which this works are taken.  The plan depends on nothing but the arguments.

    Raises:
        ValueError: a sample alone is longer than ``max_tokens``, there are fewer samples than data ranks, or the
            samples cannot be spread evenly over the ranks.
    """
    _check_plannable(lengths, max_tokens, data_parallel_size)
    fewest = -(-sum(lengths) // (max_tokens * data_parallel_size))
    for per_rank in range(max(1, fewest), len(lengths) // data_parallel_size + 1):
        bins = _longest_first(lengths, per_rank * data_parallel_size)
        if max(tokens for tokens, _ in bins) <= max_tokens:
            return _deal(bins, data_parallel_size)
    raise ValueError(
        f"{len(lengths)} samples cannot be cut into micro batches of at most {max_tokens} tokens, equally many and "
        f"none empty on each of {data_parallel_size} data ranks; raise train.micro_batch_tokens, or make the samples "
        "of a step a multiple of the data-parallel size"
    )


def _check_plannable(lengths: Sequence[int], max_tokens: int, data_parallel_size: int) -> None:
    """Refuse what no plan can satisfy."""
    if len(lengths) < data_parallel_size:
        raise ValueError(
            f"{len(lengths)} samples cannot feed {data_parallel_size} data ranks; raise rollout.prompts_per_step or "
            "rollout.samples_per_prompt, lower algorithm.mini_batches, or use fewer ranks"
        )
    longest = max(lengths)
    if longest > max_tokens:
        raise ValueError(
            f"a sample of {longest} tokens does not fit train.micro_batch_tokens ({max_tokens}); raise it to at least "
            "data.max_prompt_tokens + rollout.sampling.max_tokens"
        )


def _longest_first(lengths: Sequence[int], bins: int) -> list[tuple[int, list[int]]]:
    """Spread samples over ``bins``, longest first, each into the emptiest bin: (tokens, sample indices) of each."""
    heap: list[tuple[int, int, list[int]]] = [(0, index, []) for index in range(bins)]
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, index, content = heap[0]
        content.append(sample)
        heapq.heapreplace(heap, (tokens + lengths[sample], index, content))
    return [(tokens, sorted(content)) for tokens, _, content in heap]


def _deal(bins: list[tuple[int, list[int]]], data_parallel_size: int) -> list[list[list[int]]]:
    """Deal micro batches out to ranks, fullest first and turning back after each round, so that rounds cancel out."""
    ordered = sorted(bins, key=lambda b: (-b[0], b[1]))
    ranks: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    for start in range(0, len(ordered), data_parallel_size):
        forward = (start // data_parallel_size) % 2 == 0
        for rank, (_, content) in zip(
            ranks if forward else reversed(ranks), ordered[start : start + data_parallel_size], strict=True
        ):
            rank.append(content)
    return ranks


def pack(
    batch: Batch, samples: Sequence[int], *, pad_to_multiple: int = 1, device: torch.device | str = "cpu"
) -> PackedMicroBatch:
    """Lay ``samples`` of ``batch`` (indices, kept in the order given) one after the other in one row.

    ``pad_to_multiple`` lengthens the row to a multiple, as sequence parallelism needs (its tensor-parallel size);
    the padding is a segment of its own and has no rows.
    """
    assert samples, "a micro batch holds at least one sample"
    sequences = [(*batch.prompt_ids[i], *batch.response_ids[i]) for i in samples]
    lengths = [len(sequence) for sequence in sequences]
    padding = -sum(lengths) % pad_to_multiple
    segments = [*lengths, padding] if padding else lengths
    starts = [0, *torch.tensor(segments).cumsum(0).tolist()]
    # The state that predicts a sample's first response token is the one of its last prompt token.
    first_rows = [start + len(batch.prompt_ids[i]) - 1 for start, i in zip(starts, samples, strict=False)]
    responses = [len(batch.response_ids[i]) for i in samples]
    return PackedMicroBatch(
        token_ids=torch.tensor([*chain.from_iterable(sequences), *[PADDING_TOKEN] * padding], device=device)[None],
        position_ids=_ranges([0] * len(segments), segments).to(device)[None],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        max_seqlen=max(segments),
        rows=_ranges(first_rows, responses).to(device),
        targets=torch.tensor([*chain.from_iterable(batch.response_ids[i] for i in samples)], device=device),
        flat_index=_ranges([batch.offsets[i] for i in samples], responses).to(device),
        sample_index=torch.tensor(samples).repeat_interleave(torch.tensor(responses)).to(device),
    )


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """``starts[i], starts[i] + 1, ...`` of each length, one after the other: int64 ``[sum(lengths)]``."""
    return torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
