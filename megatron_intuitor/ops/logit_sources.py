"""Where the tiles of the logits come from, and where their gradients go: an output layer, or ready-made logits."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_intuitor.ops.weight_gradient import WeightGradient

Temperature = float | Tensor
"""One number, or one per row ``[rows]``."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype of logits and sums: fp32, or float64 where an input is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class LogitSource(Protocol):
    """Gives logits divided by the temperature tile by tile, and takes their gradients back."""

    dtype: torch.dtype
    device: torch.device
    rows: int
    columns: int
    copied_width: int | None
    """Hidden size, where a tile's weight rows need a copy in another dtype; else None."""
    minus_infinity: bool
    """Whether -inf is a legal logit."""

    def enter(self, columns: slice) -> None:
        """The next tiles lie in these columns."""
        ...

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Write the logits of these rows and the entered columns into ``out`` and return it."""
        ...

    def absorb(self, rows: slice, gradient: Tensor) -> None:
        """Take the gradient by the (temperature-divided) logits of a tile and overwrite it if need be."""
        ...

    def leave(self) -> None:
        """No more tiles in the entered columns; called in backward only."""
        ...


def _per_row(temperature: Temperature, dtype: torch.dtype) -> Temperature:
    return temperature.to(dtype).unsqueeze(1) if isinstance(temperature, Tensor) else temperature


def _divide(values: Tensor, temperature: Temperature, rows: slice) -> Tensor:
    """Divide a tile by the temperature of its rows, in place; 1 costs nothing."""
    if isinstance(temperature, Tensor):
        return values.div_(temperature[rows])
    return values if temperature == 1 else values.div_(temperature)


class OutputLayer:
    """Logits ``hidden @ weight.T / temperature`` with fp32 products and sums.

    Half-precision operands on CUDA go to the tensor cores as they are and come out in fp32.  Everywhere else they are
    converted first: a CPU multiplies bf16 many times slower than fp32.
    """

    minus_infinity = False

    def __init__(self, hidden: Tensor, weight: Tensor, temperature: Temperature) -> None:
        """``hidden`` is ``[rows, hidden]``, ``weight`` the true rows of this rank's shard, ``[columns, hidden]``."""
        self.dtype = compute_dtype(hidden, weight)
        self.device = hidden.device
        self.rows, self.columns = hidden.shape[0], weight.shape[0]
        self.temperature = _per_row(temperature, self.dtype)
        self.native = hidden.is_cuda and hidden.dtype == weight.dtype in (torch.bfloat16, torch.float16)
        self.weight = weight
        # Dividing the rows once is cheaper than dividing their logits; rounding to half precision forbids it.
        self.hidden = hidden if self.native else hidden.to(self.dtype) / self.temperature
        self.copied_width = None if weight.dtype == self.dtype else hidden.shape[1]
        self._entered = slice(0, 0)
        self._tile_weight = weight
        self._weight_copy = hidden.new_empty(0, dtype=self.dtype)
        self.hidden_gradient: Tensor | None = None
        self.weight_gradient: WeightGradient | None = None

    def want_gradients(self, hidden: bool, weight: WeightGradient | None) -> None:
        """Prepare for backward: whether the hidden states need a gradient, and where the weight's goes."""
        if hidden:
            self.hidden_gradient = torch.zeros(self.hidden.shape, dtype=self.dtype, device=self.device)
        self.weight_gradient = weight

    def enter(self, columns: slice) -> None:
        """Convert the weight rows of these columns if they need it."""
        self._entered = columns
        tile = self.weight[columns]
        if not self.native and tile.dtype != self.dtype:
            if self._weight_copy.numel() < tile.numel():
                self._weight_copy = tile.new_empty(tile.numel(), dtype=self.dtype)
            tile = self._weight_copy[: tile.numel()].view(tile.shape).copy_(tile)
        self._tile_weight = tile

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Multiply a tile."""
        if self.native:
            torch.mm(self.hidden[rows], self._tile_weight.t(), out_dtype=self.dtype, out=out)
            return _divide(out, self.temperature, rows)
        return torch.mm(self.hidden[rows], self._tile_weight.t(), out=out)

    def absorb(self, rows: slice, gradient: Tensor) -> None:
        """Add a tile's share to both gradients."""
        if self.native:
            gradient = _divide(gradient, self.temperature, rows).to(self.weight.dtype)
        if self.hidden_gradient is not None:
            self._add_product(self.hidden_gradient[rows], gradient, self._tile_weight)
        if self.weight_gradient is not None:
            self._add_product(self.weight_gradient.tile(self._entered), gradient.t(), self.hidden[rows])

    def leave(self) -> None:
        """The weight gradient of the entered columns is complete."""
        if self.weight_gradient is not None:
            self.weight_gradient.finish(self._entered)

    def finished_hidden_gradient(self) -> Tensor:
        """Gradient by the hidden rows from this shard's columns, in the compute dtype."""
        assert self.hidden_gradient is not None
        return self.hidden_gradient if self.native else self.hidden_gradient.div_(self.temperature)

    def _add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        if self.native:
            total.add_(torch.mm(left, right, out_dtype=self.dtype))
        else:
            total.addmm_(left, right)


class ReadyLogits:
    """Logits that exist already, ``[rows, vocab/tp]``; tiles are copies."""

    copied_width: int | None = None
    minus_infinity = True

    def __init__(self, logits: Tensor, columns: int, temperature: Temperature) -> None:
        """The first ``columns`` columns are true tokens."""
        self.dtype = compute_dtype(logits)
        self.device = logits.device
        self.rows, self.columns = logits.shape[0], columns
        self.temperature = _per_row(temperature, self.dtype)
        self.values = logits
        self._entered = slice(0, 0)
        self.gradient: Tensor | None = None

    def want_gradient(self) -> None:
        """Prepare for backward."""
        self.gradient = torch.zeros_like(self.values)

    def enter(self, columns: slice) -> None:
        """Remember where the tiles are."""
        self._entered = columns

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Copy a tile."""
        return _divide(out.copy_(self.values[rows, self._entered]), self.temperature, rows)

    def absorb(self, rows: slice, gradient: Tensor) -> None:
        """Write a tile's gradient."""
        assert self.gradient is not None
        self.gradient[rows, self._entered] = _divide(gradient, self.temperature, rows).to(self.gradient.dtype)

    def leave(self) -> None:
        """Nothing to complete."""
