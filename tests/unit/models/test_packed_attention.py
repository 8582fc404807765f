"""Packed attention against the definition of attention, one segment at a time in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_intuitor.models import packed_segments
from megatron_intuitor.models.layers import PackedAttention

CPU = torch.device("cpu")
lengths_strategy = st.lists(st.integers(1, 90), min_size=1, max_size=9)


def by_definition(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """softmax(q k' / sqrt(d)) v with a causal mask, a segment and a head at a time."""
    per_group = query.shape[1] // key.shape[1]
    outputs, start = [], 0
    for length in lengths:
        rows, heads = slice(start, start + length), []
        for head in range(query.shape[1]):
            q, k, v = query[rows, head], key[rows, head // per_group], value[rows, head // per_group]
            scores = (q @ k.t() / math.sqrt(q.shape[-1])).masked_fill(
                torch.ones(length, length).triu(1) > 0, -torch.inf
            )
            heads.append(scores.softmax(-1) @ v)
        outputs.append(torch.cat(heads, dim=1))
        start += length
    return torch.cat(outputs)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_strategy, grouped=st.booleans(), seed=st.integers(0, 2**31))
def test_equals_definition_and_its_gradients(lengths: list[int], grouped: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, dim = 4, 2 if grouped else 4, 8

    def random(count: int) -> Tensor:
        return torch.randn(sum(lengths), count, dim, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = random(heads), random(kv_heads), random(kv_heads)
    upstream = torch.randn(sum(lengths), heads * dim, generator=generator, dtype=torch.float64)
    attention = PackedAttention(
        TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0), 1
    )
    ours = attention(q, k, v, packed_seq_params=packed_segments(lengths, CPU))
    theirs = by_definition(q, k, v, lengths)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for ours_grad, theirs_grad in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_strategy)
def test_every_token_has_one_place(lengths: list[int]) -> None:
    segments = packed_segments(lengths, CPU)
    assert segments.cu_seqlens_q.dtype == torch.int32
    assert segments.cu_seqlens_q.diff().tolist() == lengths
    assert segments.max_seqlen_q == max(lengths)
    groups = segments.groups
    assert groups is not None
    if groups.take is not None and groups.back is not None:
        assert groups.take[groups.back].tolist() == list(range(sum(lengths)))
        assert len(groups.take) == sum(count * length for count, length in groups.shapes)


def test_near_lengths_share_a_batch_and_far_ones_do_not_pay_for_it() -> None:
    groups = packed_segments([400, 30, 395, 28, 401], CPU).groups
    assert groups is not None
    assert groups.shapes == ((3, 401), (2, 30))
