"""Cutting ``[rows, vocab/tp]`` logits into tiles, and what is done with one tile forward and backward.

A tile is the only piece of the logits that exists at any time.  It is swept in blocks that fit a CPU's cache, in
place, so that a tile costs one trip to memory beside its matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

CACHE_BLOCK = 1 << 17
"""Values of a block on a CPU: 512 KiB of logits and as much of exponentials stay in a core's level-2 cache."""
_FLOOR = -1e30
"""Stands for -inf where -inf times 0 would turn into NaN; its exponential is 0."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile size: at most ``rows x columns`` logits and ``block`` exponentials are alive at once."""

    rows: int
    columns: int
    block: int

    @classmethod
    def plan(cls, rows: int, columns: int, *, budget: int, width: int | None, on_cpu: bool) -> Tiling:
        """The tile for ``[rows, columns]`` logits within ``budget`` values.

        Near-square tiles move the least memory: each tile column block reads its weight rows once for all rows of
        the tile.  ``width`` (the hidden size) is given where the weight rows of a tile need a copy in another dtype;
        that copy then keeps to the budget, too.

        Raises:
            ValueError: the budget does not hold two values.
        """
        if budget < 2:
            raise ValueError("chunk_bytes must hold at least two values of the logits' dtype; 67108864 is a good size")
        # On an accelerator each sweep is a kernel launch over the whole tile, so the exponentials need a whole tile.
        scratch = min(budget // 2, CACHE_BLOCK) if on_cpu else budget // 2
        logits = budget - scratch
        tile_rows = max(1, min(rows, isqrt(logits)))
        tile_columns = min(columns, logits // tile_rows, scratch)
        if width is not None:
            tile_columns = min(tile_columns, budget // width)
        tile_columns = max(1, tile_columns)
        # Few columns (small vocabulary, wide hidden states) leave room for more rows.
        return cls(rows=max(1, min(rows, logits // tile_columns)), columns=tile_columns, block=scratch)

    def blocks(self, rows: int, columns: int) -> Iterator[slice]:
        """Row ranges of a tile whose exponentials fit the scratch buffer."""
        return spans(rows, max(1, self.block // columns))


def spans(total: int, step: int) -> Iterator[slice]:
    """Cut ``0..total`` into slices of at most ``step``."""
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def finite_or_zero(maximum: Tensor) -> Tensor:
    """The shift of the exponentials for a maximum: 0 for -inf (nothing seen yet); NaN and +inf stay and spread."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


@dataclass(slots=True)
class RunningStatistics:
    """What is kept of the logits z of each row, over the columns seen so far; each tensor is ``[rows]``."""

    maximum: Tensor
    """max z"""
    exp_sum: Tensor
    """sum of exp(z - maximum)"""
    target_logit: Tensor
    """z of the target where its column was seen, else 0"""
    weighted_sum: Tensor | None
    """sum of (z - maximum) exp(z - maximum), for the entropy"""
    logit_sum: Tensor | None
    """sum of z, for the self-certainty where no mean output row is given"""

    @classmethod
    def empty(cls, rows: int, like: Tensor, *, entropy: bool, logit_sum: bool) -> RunningStatistics:
        """Statistics of no column at all, in the dtype and on the device of ``like``."""
        zeros = like.new_zeros((2 + entropy + logit_sum, rows))
        return cls(
            maximum=like.new_full((rows,), -torch.inf),
            exp_sum=zeros[0],
            target_logit=zeros[1],
            weighted_sum=zeros[2] if entropy else None,
            logit_sum=zeros[-1] if logit_sum else None,
        )

    def narrow(self, rows: slice) -> RunningStatistics:
        """Views of some rows."""
        return RunningStatistics(
            self.maximum[rows],
            self.exp_sum[rows],
            self.target_logit[rows],
            None if self.weighted_sum is None else self.weighted_sum[rows],
            None if self.logit_sum is None else self.logit_sum[rows],
        )

    def rebase(self, maximum: Tensor) -> None:
        """Express the sums relative to another, larger ``maximum``, in place."""
        shift = (self.maximum - finite_or_zero(maximum)).clamp_(min=_FLOOR)
        factor = shift.exp()
        if self.weighted_sum is not None:
            self.weighted_sum.addcmul_(self.exp_sum, shift).mul_(factor)
        self.exp_sum.mul_(factor)
        self.maximum.copy_(maximum)

    def sums(self) -> list[Tensor]:
        """The tensors that are summed over ranks, once all have the same maximum."""
        wanted = (self.exp_sum, self.target_logit, self.weighted_sum, self.logit_sum)
        return [tensor for tensor in wanted if tensor is not None]


@dataclass(frozen=True, slots=True)
class Sweeper:
    """Runs over the logits of one tile; holds the buffer for their exponentials.

    ``minus_infinity`` says whether -inf logits are legal (a forbidden token, in ready-made logits) or a sign of a
    broken weight or hidden state, which must come out as NaN.
    """

    tiling: Tiling
    scratch: Tensor
    minus_infinity: bool

    def accumulate(self, logits: Tensor, local_targets: Tensor, statistics: RunningStatistics) -> None:
        """Forward: add a tile to the statistics of its rows.

        Args:
            logits: fp32 ``[tile rows, tile columns]``, divided by the temperature; overwritten.
            local_targets: ``[tile rows]`` columns of the targets counted from the tile's first; may lie outside.
            statistics: of the tile's rows; changed in place.
        """
        column, inside = self._columns(logits, local_targets)
        picked = logits.gather(1, column.unsqueeze(1)).squeeze(1)
        statistics.target_logit.add_(picked.masked_fill_(~inside, 0.0))
        for block in self.tiling.blocks(*logits.shape):
            self._accumulate_block(logits[block], statistics.narrow(block))

    def _accumulate_block(self, logits: Tensor, statistics: RunningStatistics) -> None:
        if statistics.logit_sum is not None:
            statistics.logit_sum.add_(logits.sum(1))
        peak = logits.amax(1)
        shifted = self._shift(logits, finite_or_zero(peak))
        exponentials = torch.exp(shifted, out=self._scratch_like(shifted))
        exp_sum = exponentials.sum(1)
        weighted = None
        if statistics.weighted_sum is not None:
            weighted = exponentials.mul_(shifted).sum(1)
        if not self.minus_infinity:
            # 0 x -inf is NaN: a logit of -inf poisons its row; every finite value adds 0.
            exp_sum.add_((shifted.amin(1) if weighted is None else weighted) * 0.0)
        statistics.rebase(torch.maximum(statistics.maximum, peak))
        tile = RunningStatistics(peak, exp_sum, peak, weighted, None)
        tile.rebase(statistics.maximum)
        statistics.exp_sum.add_(tile.exp_sum)
        if statistics.weighted_sum is not None and tile.weighted_sum is not None:
            statistics.weighted_sum.add_(tile.weighted_sum)

    def differentiate(self, logits: Tensor, local_targets: Tensor, gradient: RowGradient) -> Tensor:
        """Backward: turn a tile of logits into the gradient of the loss by these logits, in place.

        With p = exp(z - maximum) / exp_sum and H the entropy, ``d log p(y)/dz_v = [v = y] - p_v`` and
        ``dH/dz_v = -p_v (log p_v + H)``.  Shapes as in `accumulate`.
        """
        for block in self.tiling.blocks(*logits.shape):
            shifted = self._shift(logits[block], gradient.shift[block])
            offset = gradient.offset[block].unsqueeze(1)
            if gradient.slope is None:
                shifted.exp_().mul_(offset)
                continue
            exponentials = torch.exp(shifted, out=self._scratch_like(shifted))
            slope = gradient.slope[block].unsqueeze(1)
            torch.addcmul(offset, shifted, slope, out=shifted).mul_(exponentials)
        if gradient.log_prob is not None:
            column, inside = self._columns(logits, local_targets)
            at_target = gradient.log_prob.masked_fill(~inside, 0.0)
            logits.scatter_add_(1, column.unsqueeze(1), at_target.unsqueeze(1))
        return logits

    def _shift(self, logits: Tensor, shift: Tensor) -> Tensor:
        shifted = logits.sub_(shift.unsqueeze(1))
        return shifted.clamp_(min=_FLOOR) if self.minus_infinity else shifted

    def _scratch_like(self, block: Tensor) -> Tensor:
        return self.scratch[: block.numel()].view(block.shape)

    @staticmethod
    def _columns(logits: Tensor, local_targets: Tensor) -> tuple[Tensor, Tensor]:
        column = local_targets.clamp(0, logits.shape[1] - 1)
        return column, column == local_targets


@dataclass(frozen=True, slots=True)
class RowGradient:
    """What the gradient by the logits of a row needs: ``dz = (offset + slope (z - shift)) exp(z - shift)``.

    The target's column gets ``log_prob``, the upstream gradient, on top.  Each tensor is ``[rows]``.
    """

    shift: Tensor
    offset: Tensor
    slope: Tensor | None
    log_prob: Tensor | None

    @classmethod
    def of(
        cls, shift: Tensor, exp_sum: Tensor, entropy: Tensor | None, d_log_prob: Tensor | None, d_entropy: Tensor | None
    ) -> RowGradient:
        """From the saved statistics and the upstream gradients; None means that nothing depends on that output."""
        offset = torch.zeros_like(shift) if d_log_prob is None else -d_log_prob
        slope = None
        if d_entropy is not None:
            assert entropy is not None
            offset = offset + d_entropy * (exp_sum.log() - entropy)
            slope = -d_entropy / exp_sum
        return cls(shift, offset / exp_sum, slope, d_log_prob)

    def narrow(self, rows: slice) -> RowGradient:
        """The same for some rows."""
        slope, log_prob = self.slope, self.log_prob
        return RowGradient(
            self.shift[rows],
            self.offset[rows],
            None if slope is None else slope[rows],
            None if log_prob is None else log_prob[rows],
        )
