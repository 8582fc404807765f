"""Buckets and the finite check."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_intuitor.contracts import TensorMeta
from megatron_intuitor.weight_sync import NonFiniteWeights
from megatron_intuitor.weight_sync.stream import CheckedStream, pack, require_finite, stream_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64]
tensors = st.lists(st.tuples(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES)), max_size=25)


def make_weights(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        (f"weight.{i}", (100 * torch.randn(shape, generator=generator)).to(dtype))
        for i, (shape, dtype) in enumerate(shapes)
    ]


class Stream:
    def __init__(self, weights, announced=None):
        self.weights, self.announced, self.yielded = weights, announced or weights, 0

    def metadata(self):
        return [TensorMeta(name, t.dtype, tuple(t.shape)) for name, t in self.announced]

    def __iter__(self):
        for pair in self.weights:
            self.yielded += 1
            yield pair


@settings(deadline=None, max_examples=150)
@given(shapes=tensors, seed=st.integers(0, 99), capacity=st.integers(1, 3000))
def test_what_is_packed_can_be_unpacked(shapes, seed, capacity):
    weights = make_weights(shapes, seed)
    unpacked, lasts = [], []
    for bucket in pack(iter(weights), len(weights), capacity):
        # Beyond the capacity there is one tensor alone, apart from empty ones.
        assert bucket.size <= capacity or sum(0 not in shape for shape in bucket.shapes) == 1
        assert bucket.payload.numel() >= bucket.size
        lasts.append(bucket.last)
        entries = zip(bucket.names, bucket.dtypes, bucket.shapes, bucket.offsets, strict=True)
        for name, dtype, shape, offset in entries:
            kind = getattr(torch, dtype)
            count = torch.Size(shape).numel()
            raw = bucket.payload[offset : offset + count * kind.itemsize]
            unpacked.append((name, raw.clone().view(kind).reshape(shape)))
    assert [name for name, _ in unpacked] == [name for name, _ in weights]
    for (_, got), (_, want) in zip(unpacked, weights, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert torch.equal(got, want)
    assert lasts == [False] * (len(lasts) - 1) + [True] * bool(lasts)


def test_tensors_that_are_views_are_packed_by_value():
    base = torch.arange(24.0).reshape(4, 6)
    (bucket,) = pack(iter([("t", base.t()), ("part", base[:, 2])]), 2, 1000)
    assert torch.equal(bucket.payload[:96].view(torch.float32), base.t().reshape(-1))


def test_a_bucket_stays_intact_while_the_next_one_is_packed():
    weights = make_weights([([8], torch.float32)] * 6, 0)
    previous = None
    for i, bucket in enumerate(pack(iter(weights), 6, 32)):
        if previous is not None:
            assert torch.equal(previous.payload[:32].view(torch.float32), weights[i - 1][1])
        previous = bucket


@settings(deadline=None)
@given(
    value=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    position=st.integers(0, 299),
)
def test_one_bad_element_is_found(value, dtype, position):
    tensor = torch.randn(300).to(dtype)
    require_finite("w", tensor.reshape(20, 15))
    tensor[position] = value
    with pytest.raises(NonFiniteWeights, match=r"weight model.layers.3.w has 1 of 300 elements"):
        require_finite("model.layers.3.w", tensor.reshape(20, 15))


def test_finite_check_takes_every_shape_and_integers():
    for tensor in (torch.empty(0, 3), torch.tensor(1.0), torch.tensor([3, 4])):
        require_finite("w", tensor)
    require_finite("w", torch.tensor([3e38, -3e38]))


def test_checked_stream_yields_until_the_first_bad_weight_and_drains():
    weights = make_weights([([3], torch.float32)] * 6, 1)
    weights[2][1][0] = float("nan")
    stream = Stream(weights)
    checked = CheckedStream(stream)
    pairs = iter(checked)
    assert [next(pairs)[0], next(pairs)[0]] == ["weight.0", "weight.1"]
    with pytest.raises(NonFiniteWeights, match="weight.2"):
        next(pairs)
    checked.drain()
    assert stream.yielded == 6


@pytest.mark.parametrize("sent", [slice(0, 5), slice(1, 6), slice(None, None, -1)])
def test_a_stream_that_does_not_keep_its_word_is_our_bug(sent):
    weights = make_weights([([n], torch.float32) for n in range(1, 7)], 1)
    with pytest.raises(AssertionError):
        list(CheckedStream(Stream(weights[sent], announced=weights)))


def test_size():
    weights = make_weights([([3, 4], torch.float32), ([5], torch.bfloat16), ([], torch.float32)], 1)
    assert stream_bytes(Stream(weights).metadata()) == 48 + 10 + 4
