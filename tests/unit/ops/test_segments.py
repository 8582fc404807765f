"""Reductions over the samples of a flat tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_intuitor.ops import expand_segments, segment_mean, segment_sum


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 2**31))
def test_against_a_loop(lengths: list[int], seed: int) -> None:
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    values = torch.randn(offsets[-1], generator=torch.Generator().manual_seed(seed))
    parts = [values[a:b].double() for a, b in zip(offsets, offsets[1:], strict=False)]
    sums, means = segment_sum(values, offsets), segment_mean(values, offsets)
    assert sums.dtype == means.dtype == torch.float32
    assert sums.shape == means.shape == (len(lengths),)
    for i, part in enumerate(parts):
        assert float(sums[i]) == pytest.approx(float(part.sum()), abs=1e-6)
        if len(part):
            assert float(means[i]) == pytest.approx(float(part.mean()), abs=1e-6)
        else:
            assert means[i].isnan()
    per_sample = torch.randn(len(lengths))
    expected = [float(per_sample[i]) for i, length in enumerate(lengths) for _ in range(length)]
    assert expand_segments(per_sample, offsets).tolist() == expected


def test_a_long_sample_keeps_its_digits() -> None:
    assert float(segment_sum(torch.full((3_000_000,), 0.1), [0, 3_000_000])) == pytest.approx(300_000, rel=1e-7)


@pytest.mark.parametrize("offsets", [[], [0, 2], [1, 3], [0, 2, 1, 3]])
def test_wrong_offsets_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="must ascend from 0 to the 3 values"):
        segment_sum(torch.ones(3), offsets)


def test_wrong_sample_count_is_refused() -> None:
    with pytest.raises(ValueError, match="2 samples but offsets describe 1"):
        expand_segments(torch.ones(2), [0, 3])
