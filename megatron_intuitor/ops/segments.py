"""Reductions over the samples of a flat tensor: ``offsets[i]:offsets[i + 1]`` is where sample ``i`` lies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def _lengths(offsets: Sequence[int], tokens: int, device: torch.device) -> Tensor:
    lengths = [end - start for start, end in pairwise(offsets)]
    if not offsets or offsets[0] != 0 or offsets[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"offsets {list(offsets)[:8]} must ascend from 0 to the {tokens} values of the flat tensor")
    return torch.tensor(lengths, dtype=torch.int64, device=device)


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    sample = torch.arange(lengths.numel(), device=values.device).repeat_interleave(lengths)
    return values.new_zeros(lengths.numel(), dtype=torch.float64).index_add(0, sample, values.double())


def segment_sum(values: Tensor, offsets: Sequence[int]) -> Tensor:
    """Sum of each sample's values, accumulated in float64.

    Args:
        values: ``[tokens]``.
        offsets: ``samples + 1`` ascending positions from 0 to ``tokens``.

    Returns:
        ``[samples]`` in the dtype of ``values``; 0 for a sample without tokens.

    Raises:
        ValueError: ``offsets`` do not fit ``values``.
    """
    lengths = _lengths(offsets, values.numel(), values.device)
    return _sums(values, lengths).to(values.dtype)


def segment_mean(values: Tensor, offsets: Sequence[int]) -> Tensor:
    """Mean of each sample's values, accumulated in float64; see `segment_sum` for shapes.  NaN for an empty sample."""
    lengths = _lengths(offsets, values.numel(), values.device)
    return (_sums(values, lengths) / lengths).to(values.dtype)


def expand_segments(values: Tensor, offsets: Sequence[int]) -> Tensor:
    """Repeat each sample's value for its tokens: ``[samples] -> [tokens]``."""
    lengths = _lengths(offsets, offsets[-1] if offsets else 0, values.device)
    if lengths.numel() != values.numel():
        raise ValueError(f"values has {values.numel()} samples but offsets describe {lengths.numel()}")
    return values.repeat_interleave(lengths)
