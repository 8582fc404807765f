"""Where the gradient of the output layer's weight goes: Megatron's ``main_grad`` buffer, or back to autograd.

Megatron's distributed data parallel gives each parameter a ``main_grad`` (usually fp32, a view into a bucket) and
lets a fused linear layer add to it directly.  The layer then sets ``grad_added_to_main_grad`` and returns a gradient
that only wakes the hook of the parameter: the hook adds what was returned if that flag is unset or if
``zero_out_wgrad`` is set, as it is for a weight that is also the input embedding of the same stage.
"""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """Accumulates the gradient of one weight shard tile by tile, in the compute dtype.

    A buffer of that dtype takes the products directly; another dtype gets each tile once, when it is complete.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """``weight`` is the whole shard ``[padded_vocab/tp, hidden]``, padding rows included."""
        self.weight = weight
        self.main_grad: Tensor | None = getattr(weight, "main_grad", None)
        self.total = torch.zeros_like(weight) if self.main_grad is None else self.main_grad
        self.dtype = dtype
        self._tile: Tensor | None = None
        self._copy = weight.new_empty(0, dtype=dtype)

    def tile(self, columns: slice) -> Tensor:
        """The accumulator ``[columns, hidden]`` of some vocabulary columns."""
        if self.total.dtype == self.dtype:
            return self.total[columns]
        if self._tile is None:
            shape = self.total[columns].shape
            if self._copy.numel() < shape.numel():
                self._copy = self.weight.new_empty(shape.numel(), dtype=self.dtype)
            self._tile = self._copy[: shape.numel()].view(shape).zero_()
        return self._tile

    def finish(self, columns: slice) -> None:
        """Hand over the tile of these columns if it was accumulated apart."""
        if self._tile is not None:
            self.total[columns].add_(self._tile)
            self._tile = None

    def result(self) -> Tensor | None:
        """What backward returns for the weight; also sets Megatron's flag where there is a ``main_grad``."""
        if self.main_grad is None:
            return self.total
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        if getattr(self.weight, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight)
        return torch.empty_like(self.weight)
