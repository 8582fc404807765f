"""The weight map's layouts, on shards filled by hand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_intuitor.models.geometry import Geometry, padded_vocabulary
from megatron_intuitor.models.registry import FAMILIES
from megatron_intuitor.models.weight_map import Layout, placements


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, int]:
    size = draw(st.sampled_from([1, 2, 3, 4]))
    kv = size * draw(st.integers(1, 2))
    vocab = draw(st.integers(1, 200))
    return (
        Geometry(
            layers=draw(st.integers(1, 3)),
            hidden=size * draw(st.integers(1, 4)),
            ffn=size * draw(st.integers(1, 5)),
            heads=kv * draw(st.integers(1, 3)),
            kv_heads=kv,
            head_dim=draw(st.integers(1, 4)),
            vocab=vocab,
            padded_vocab=padded_vocabulary(vocab, size),
        ),
        size,
    )


def shard_shape(name: str, g: Geometry, size: int) -> tuple[int, ...]:
    """What megatron allocates."""
    qkv = (g.q_width + 2 * g.kv_width) // size
    shapes = {
        "word_embeddings.weight": (g.padded_vocab // size, g.hidden),
        "output_layer.weight": (g.padded_vocab // size, g.hidden),
        "linear_qkv.weight": (qkv, g.hidden),
        "linear_qkv.bias": (qkv,),
        "linear_proj.weight": (g.hidden, g.q_width // size),
        "linear_fc1.weight": (2 * g.ffn // size, g.hidden),
        "linear_fc2.weight": (g.hidden, g.ffn // size),
        "q_layernorm.weight": (g.head_dim,),
        "k_layernorm.weight": (g.head_dim,),
    }
    return next((shape for end, shape in shapes.items() if name.endswith(end)), (g.hidden,))


def fill(layout: Layout, parts: list[Tensor], shards: list[Tensor], geometry: Geometry) -> list[Tensor]:
    """Copy parts into shards, and back out into fresh tensors; count how often each element is written."""
    copies = [torch.zeros_like(part) for part in parts]
    for rank, shard in enumerate(shards):
        for piece in layout.pieces(shard, geometry, rank, len(shards)):
            source = parts[piece.part].narrow(piece.dim, piece.start, piece.length)
            piece.view.copy_(source.reshape(piece.view.shape))
        for piece in layout.pieces(shard, geometry, rank, len(shards)):
            target = copies[piece.part].narrow(piece.dim, piece.start, piece.length)
            target.add_(piece.view.reshape(target.shape))
    return copies


@given(drawn=geometries(), family=st.sampled_from(sorted(FAMILIES)))
def test_every_number_has_exactly_one_place(drawn: tuple[Geometry, int], family: str) -> None:
    geometry, size = drawn
    for placement in placements(FAMILIES[family].weights, geometry):
        layout, count = placement.entry.layout, 1
        parts = []
        for shape in placement.shapes:
            numel = torch.Size(shape).numel()
            parts.append(torch.arange(count, count + numel, dtype=torch.float64).view(shape))
            count += numel
        shards = [
            torch.zeros(shard_shape(placement.megatron, geometry, size), dtype=torch.float64) for _ in range(size)
        ]
        copies = fill(layout, parts, shards, geometry)
        times = 1 if layout.sharded else size
        for part, copy in zip(parts, copies, strict=True):
            assert torch.equal(copy, part * times), placement.megatron
        held = torch.cat([shard.flatten() for shard in shards[: size if layout.sharded else 1]])
        assert sorted(held[held > 0].tolist()) == [float(i) for i in range(1, count)], placement.megatron


def test_groups_of_heads_are_interleaved() -> None:
    """Two kv groups of two query heads, head dimension 1: megatron's rows are q0 q1 k0 v0 q2 q3 k1 v1."""
    geometry = Geometry(layers=1, hidden=2, ffn=2, heads=4, kv_heads=2, head_dim=1, vocab=8, padded_vocab=8)
    entry = next(w for w in FAMILIES["qwen2"].weights if w.megatron.endswith("linear_qkv.bias"))
    shard = torch.zeros(8)
    q, k, v = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    fill(entry.layout, [q, k, v], [shard], geometry)
    assert shard.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@given(vocab=st.integers(1, 300_000), size=st.integers(1, 64))
def test_vocabulary_padding(vocab: int, size: int) -> None:
    padded = padded_vocabulary(vocab, size)
    unit = 64 if vocab >= 8192 else 8
    assert padded >= vocab
    assert padded % size == 0
    assert padded % unit == 0
    assert padded - vocab < unit * size
    if unit % size == 0:
        assert padded == padded_vocabulary(vocab, 1), "usual layouts must agree"
