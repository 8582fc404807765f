r"""Log-probability, self-certainty and entropy of response tokens from hidden states, under tensor parallelism.

For the logits z of one position, the temperature T, the true vocabulary V and p = softmax(z / T)::

    log_prob        log p(y)          = z_y/T - logsumexp(z/T)
    self_certainty  KL(uniform || p)  = logsumexp(z/T) - mean(z/T) - log V     (Intuitor, arXiv 2505.19590, eq. 3)
    entropy         -sum p log p

The mean over the vocabulary needs no logits, ``mean_v(h . W_v) = h . mean_v(W_v)``: with `mean_output_row`, computed
once a weight version, self-certainty costs one dot product a token.  Logits exist one tile at a time (see
``ops.tiles``); each rank keeps five numbers a row, and one MAX and one SUM all-reduce a call join the ranks however
many tiles there were.  Backward computes the tiles again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_intuitor.ops.logit_sources import LogitSource, OutputLayer, ReadyLogits, Temperature
from megatron_intuitor.ops.tiles import RowGradient, RunningStatistics, Sweeper, Tiling, finite_or_zero, spans
from megatron_intuitor.ops.vocabulary_shard import (
    VocabularyShard,
    all_reduce_max,
    all_reduce_sum,
    check_rows,
    gather_rows,
    reduce_scatter_rows,
)
from megatron_intuitor.ops.weight_gradient import WeightGradient

_Outputs = tuple[Tensor, Tensor | None, Tensor | None]

_ROWS_AT_A_TIME = 4096
"""Weight rows that `mean_output_row` converts at once."""


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """What the model says about each selected position; fp32 ``[rows]`` each (float64 for float64 input).

    The same on all ranks of the tensor-parallel group.
    """

    log_prob: Tensor
    """Log-probability of the target token, in nats.  Differentiable."""
    self_certainty: Tensor | None
    """KL(uniform || p) in nats, >= 0; None where not asked for.  A detached reward: it carries no gradient."""
    entropy: Tensor | None
    """Entropy in nats, between 0 and log V; None where not asked for.  Differentiable."""


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments of a call that are no inputs of autograd."""

    shard: VocabularyShard
    vocab_size: int
    targets: Tensor
    rows: Tensor | None
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    temperature: Temperature
    mean_row: Tensor | None
    self_certainty: bool
    entropy: bool
    chunk_bytes: int


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    temperature: Temperature = 1.0,
    mean_row: Tensor | None = None,
    self_certainty: bool = True,
    entropy: bool = True,
    chunk_bytes: int = 64 << 20,
) -> TokenStatistics:
    """Statistics of the distributions that an output layer gives at some positions.

    A collective over ``group``: every rank calls it with the same ``targets``, ``rows``, ``temperature`` and flags.
    Any NaN or infinity in ``hidden`` or ``weight`` comes out as NaN.

    Args:
        hidden: ``[tokens, hidden]``, the same on all ranks of the group; under sequence parallelism this rank's
            ``[tokens/tp, hidden]``.  fp32, bf16 or fp16.
        weight: this rank's rows of the output layer, ``[padded_vocab/tp, hidden]``: rank r holds the tokens from
            ``r * padded_vocab/tp`` on.  Rows of tokens >= ``vocab_size`` are padding and do not count.  Its gradient
            is added to ``weight.main_grad`` where that exists (see ``ops.weight_gradient``), else returned.
        targets: ``[rows]`` int64 token ids.
        rows: ``[rows]`` int64 numbers of the positions wanted, counted over all tokens; None for all in order.  The
            distribution at position i is the one that predicts token i + 1.
        vocab_size: true vocabulary V, without padding.
        group: tensor-parallel group; None without tensor parallelism.
        sequence_parallel: whether ``hidden`` is cut over the group; its gradient then is, too.
        temperature: divides the logits; a positive number or ``[rows]``.
        mean_row: `mean_output_row` of the same weight version; without it the logits are summed as they pass.
        self_certainty: whether to compute it.
        entropy: whether to compute it.
        chunk_bytes: budget of logits and their exponentials alive at once.  Weights in half precision need copies of
            a tile of their rows within the same budget: one, and in backward another for its gradient.

    Raises:
        ValueError: shapes, row numbers, token ids, vocabulary or temperature do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [tokens, hidden] and "
            "[vocab/tp, hidden] of one hidden size; flatten batch and sequence first"
        )
    if sequence_parallel and group is None:
        raise ValueError("sequence_parallel=True needs the tensor-parallel group; pass group")
    tokens = hidden.shape[0] * (group.size() if sequence_parallel and group is not None else 1)
    check_rows(rows, targets, tokens, vocab_size)
    request = _Request(
        shard=VocabularyShard.of(weight.shape[0], vocab_size, group),
        vocab_size=vocab_size,
        targets=targets,
        rows=rows,
        group=group,
        sequence_parallel=sequence_parallel,
        temperature=_checked(temperature, targets),
        mean_row=mean_row,
        self_certainty=self_certainty,
        entropy=entropy,
        chunk_bytes=chunk_bytes,
    )
    return TokenStatistics(*_HeadStatistics.apply(hidden, weight, request))


def statistics_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: Temperature = 1.0,
    self_certainty: bool = True,
    entropy: bool = True,
    chunk_bytes: int = 64 << 20,
) -> TokenStatistics:
    """The same as `token_statistics` from this rank's ready-made logits ``[tokens, padded_vocab/tp]``.

    The logits are not modified.  A logit of -inf is a forbidden token: its log-prob is -inf, self-certainty is inf.
    Columns of tokens >= ``vocab_size`` are padding and do not count, whatever they hold.

    Raises:
        ValueError: shapes, token ids, vocabulary or temperature do not fit.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits {list(logits.shape)} must be [tokens, vocab/tp]; flatten batch and sequence first")
    check_rows(None, targets, logits.shape[0], vocab_size)
    request = _Request(
        shard=VocabularyShard.of(logits.shape[1], vocab_size, group),
        vocab_size=vocab_size,
        targets=targets,
        rows=None,
        group=group,
        sequence_parallel=False,
        temperature=_checked(temperature, targets),
        mean_row=None,
        self_certainty=self_certainty,
        entropy=entropy,
        chunk_bytes=chunk_bytes,
    )
    return TokenStatistics(*_LogitStatistics.apply(logits, request))


@torch.no_grad()
def mean_output_row(weight: Tensor, *, vocab_size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean of the true rows of a sharded output layer: fp32 ``[hidden]``, the same on all ranks; one all-reduce.

    Compute it again after every change of the weight.

    Args:
        weight: this rank's ``[padded_vocab/tp, hidden]``.
        vocab_size: true vocabulary, without padding.
        group: tensor-parallel group; None without tensor parallelism.
    """
    shard = VocabularyShard.of(weight.shape[0], vocab_size, group)
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in spans(shard.columns, _ROWS_AT_A_TIME):
        total += weight[rows].float().sum(0)
    return (all_reduce_sum(total, group) / vocab_size).float()


def _checked(temperature: Temperature, targets: Tensor) -> Temperature:
    """The temperature, if it is positive and has one value or one a row."""
    if isinstance(temperature, Tensor):
        if temperature.shape != targets.shape:
            raise ValueError(
                f"temperature {list(temperature.shape)} must be a number or {list(targets.shape)}, one a row"
            )
        positive = bool((temperature > 0).all())
    else:
        positive = 0 < temperature < math.inf
    if not positive:
        raise ValueError(f"temperature {temperature} must be positive; greedy log-probs do not exist")
    return temperature


def _sweeper(source: LogitSource, chunk_bytes: int, scratch: bool) -> tuple[Sweeper, Tensor]:
    """The sweeper of a call and its buffer for one tile of logits."""
    tiling = Tiling.plan(
        source.rows,
        source.columns,
        budget=chunk_bytes // source.dtype.itemsize,
        width=source.copied_width,
        on_cpu=source.device.type == "cpu",
    )
    logits = torch.empty(tiling.rows * tiling.columns, dtype=source.dtype, device=source.device)
    exponentials = logits.new_empty(min(tiling.block, logits.numel()) if scratch else 0)
    return Sweeper(tiling, exponentials, source.minus_infinity), logits


def _reduce(source: LogitSource, request: _Request) -> RunningStatistics:
    """Sweep all tiles, then join the ranks: one MAX and one SUM all-reduce."""
    sweeper, buffer = _sweeper(source, request.chunk_bytes, scratch=True)
    wants_sum = request.self_certainty and request.mean_row is None
    total = RunningStatistics.empty(source.rows, buffer, entropy=request.entropy, logit_sum=wants_sum)
    for columns in spans(source.columns, sweeper.tiling.columns):
        source.enter(columns)
        local_targets = request.targets - (request.shard.start + columns.start)
        for rows in spans(source.rows, sweeper.tiling.rows):
            sweeper.accumulate(_tile(source, rows, columns, buffer), local_targets[rows], total.narrow(rows))
    total.rebase(all_reduce_max(total.maximum.clone(), request.group))
    packed = all_reduce_sum(torch.stack(total.sums()), request.group)
    for tensor, summed in zip(total.sums(), packed, strict=True):
        tensor.copy_(summed)
    return total


def _tile(source: LogitSource, rows: slice, columns: slice, buffer: Tensor) -> Tensor:
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    return source.logits(rows, buffer[: shape[0] * shape[1]].view(shape))


def _outputs(total: RunningStatistics, mean: Tensor | None, request: _Request) -> _Outputs:
    """Log-prob, self-certainty and entropy from the joined statistics; ``mean`` is that of the logits."""
    maximum, log_sum = finite_or_zero(total.maximum), total.exp_sum.log()
    # Differences of large numbers first: with logits of 1e4 their sum with log_sum would lose three digits.
    log_prob = (total.target_logit - maximum) - log_sum
    certainty = None
    if request.self_certainty:
        if mean is None:
            assert total.logit_sum is not None
            mean = total.logit_sum / request.vocab_size
        certainty = (maximum - mean) + log_sum - math.log(request.vocab_size)
    entropy = None if total.weighted_sum is None else log_sum - total.weighted_sum / total.exp_sum
    return log_prob, certainty, entropy


def _differentiate(source: LogitSource, request: _Request, gradient: RowGradient) -> None:
    """Compute all tiles again and hand their gradients to the source."""
    sweeper, buffer = _sweeper(source, request.chunk_bytes, scratch=gradient.slope is not None)
    for columns in spans(source.columns, sweeper.tiling.columns):
        source.enter(columns)
        local_targets = request.targets - (request.shard.start + columns.start)
        for rows in spans(source.rows, sweeper.tiling.rows):
            tile = _tile(source, rows, columns, buffer)
            source.absorb(rows, sweeper.differentiate(tile, local_targets[rows], gradient.narrow(rows)))
        source.leave()


class _HeadStatistics(torch.autograd.Function):
    """Hidden states and output layer to statistics."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, request: _Request) -> _Outputs:
        ctx.set_materialize_grads(False)
        ctx.request = request
        if request.sequence_parallel:
            assert request.group is not None
            hidden = gather_rows(hidden, request.group)
        ctx.tokens = hidden.shape[0]
        selected = hidden if request.rows is None else hidden.index_select(0, request.rows)
        layer = OutputLayer(selected, weight[: request.shard.columns], request.temperature)
        total = _reduce(layer, request)
        mean = None
        if request.self_certainty and request.mean_row is not None:
            mean = (selected.to(layer.dtype) @ request.mean_row.to(layer.dtype)) / request.temperature
        log_prob, certainty, entropy = _outputs(total, mean, request)
        ctx.save_for_backward(selected, weight, finite_or_zero(total.maximum), total.exp_sum, entropy)
        if certainty is not None:
            ctx.mark_non_differentiable(certainty)
        return log_prob, certainty, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_log_prob: Tensor | None, _: Tensor | None, d_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if d_log_prob is None and d_entropy is None:
            return None, None, None
        selected, weight, shift, exp_sum, entropy = ctx.saved_tensors
        request: _Request = ctx.request
        layer = OutputLayer(selected, weight[: request.shard.columns], request.temperature)
        sink = WeightGradient(weight, layer.dtype) if ctx.needs_input_grad[1] else None
        layer.want_gradients(ctx.needs_input_grad[0], sink)
        _differentiate(layer, request, RowGradient.of(shift, exp_sum, entropy, d_log_prob, d_entropy))
        d_hidden = None
        if ctx.needs_input_grad[0]:
            d_hidden = _hidden_gradient(layer.finished_hidden_gradient(), ctx.tokens, request).to(selected.dtype)
        return d_hidden, None if sink is None else sink.result(), None


def _hidden_gradient(of_rows: Tensor, tokens: int, request: _Request) -> Tensor:
    """Join the shards' gradients of the selected rows ``[rows, hidden]`` and put them where the rows came from."""
    if not request.sequence_parallel:
        of_rows = all_reduce_sum(of_rows, request.group)
    gradient = of_rows
    if request.rows is not None:
        gradient = of_rows.new_zeros((tokens, of_rows.shape[1])).index_add_(0, request.rows, of_rows)
    if request.sequence_parallel:
        assert request.group is not None
        gradient = reduce_scatter_rows(gradient, request.group)
    return gradient


class _LogitStatistics(torch.autograd.Function):
    """Ready-made logits to statistics."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, request: _Request) -> _Outputs:
        ctx.set_materialize_grads(False)
        ctx.request = request
        total = _reduce(ReadyLogits(logits, request.shard.columns, request.temperature), request)
        log_prob, certainty, entropy = _outputs(total, None, request)
        ctx.save_for_backward(logits, finite_or_zero(total.maximum), total.exp_sum, entropy)
        if certainty is not None:
            ctx.mark_non_differentiable(certainty)
        return log_prob, certainty, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_log_prob: Tensor | None, _: Tensor | None, d_entropy: Tensor | None
    ) -> tuple[Tensor | None, None]:
        if d_log_prob is None and d_entropy is None:
            return None, None
        logits, shift, exp_sum, entropy = ctx.saved_tensors
        source = ReadyLogits(logits, ctx.request.shard.columns, ctx.request.temperature)
        source.want_gradient()
        _differentiate(source, ctx.request, RowGradient.of(shift, exp_sum, entropy, d_log_prob, d_entropy))
        assert source.gradient is not None
        return source.gradient, None
