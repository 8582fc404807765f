"""The policy's weights as a vLLM ``WeightSource``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from megatron_intuitor.weight_sync.stream import CheckedStream


class StreamSource(WeightSource):
    """One pass over a checked stream; it can be iterated once, because each update brings a new one."""

    def __init__(self, stream: CheckedStream) -> None:
        self._stream = stream

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of every weight; no communication."""
        return [ParamMeta(meta.name, meta.dtype, meta.shape) for meta in self._stream.metadata]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._stream)
