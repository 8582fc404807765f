r"""The policy loss per response token, and the weights that aggregate it over a batch.

For a token with advantage A, ratio r = exp(log p - log p_old) and engine log-prob q::

    policy = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)       PPO, arXiv 1707.06347; two bounds: DAPO, 2503.14476
             and for A < 0 at most -dual_clip A                      dual clip, arXiv 1912.09729
    loss   = min(exp(log p_old - q), importance_cap) policy          truncated importance sampling (TIS), see below
             + kl_coefficient k3(log p_ref - log p)                  GRPO, arXiv 2402.03300, eq. 4
             - entropy_coefficient H

``k3(d) = exp(d) - d - 1`` is Schulman's low-variance estimator (http://joschu.net/blog/kl-approx.html).  TIS corrects
that the engine samples from a slightly different distribution than the trainer computes (Yao et al. 2025, "Your
efficient RL framework secretly brings you off-policy RL training"); its weight carries no gradient.

Nothing here knows how a batch was cut: the loss of a batch is ``sum over tokens of weight[sample] x loss[token]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_intuitor.config import LossConfig

MAXIMUM_METRICS = ("ratio", "rollout_mismatch")
"""Metrics of `policy_loss` whose maximum says something that their mean hides."""

_MAX_LOG_RATIO = 20.0
"""exp(20) = 4.9e8: differences of log-probs are held in this range, beyond which fp32 gradients mean nothing."""
_MAX_K3 = 10.0
"""A token's k3 is cut here, and then has no gradient, as in verl: one outlier must not decide a step."""


def loss_weights(
    aggregation: Literal["token_mean", "sequence_mean", "constant"], response_lengths: Sequence[int], max_tokens: int
) -> Tensor:
    """Weight of each token of a sample, such that ``sum weight[sample] x loss[token]`` is the aggregated loss.

    Args:
        aggregation: ``token_mean``: mean over all response tokens (DAPO, arXiv 2503.14476).  ``sequence_mean``: mean
            over samples of the mean over their tokens (GRPO, arXiv 2402.03300).  ``constant``: sum over tokens divided
            by samples x ``max_tokens``, which favours no length (Dr. GRPO, arXiv 2503.20783).
        response_lengths: tokens of every sample of the optimizer step, over all ranks and micro batches.
        max_tokens: longest response that sampling allows.

    Returns:
        fp32 ``[samples]``.

    Raises:
        ValueError: no samples, a response without tokens, one longer than ``max_tokens``, or an unknown aggregation.
    """
    lengths = torch.tensor(list(response_lengths), dtype=torch.float64)
    if lengths.numel() == 0 or lengths.min() < 1 or lengths.max() > max_tokens:
        raise ValueError(
            f"response_lengths {list(response_lengths)[:8]} must have samples of 1..{max_tokens} tokens (max_tokens)"
        )
    if aggregation == "token_mean":
        weights = torch.full_like(lengths, 1.0) / lengths.sum()
    elif aggregation == "sequence_mean":
        weights = 1.0 / (lengths * lengths.numel())
    elif aggregation == "constant":
        weights = torch.full_like(lengths, 1.0 / (lengths.numel() * max_tokens))
    else:
        raise ValueError(f"aggregation {aggregation!r} must be token_mean, sequence_mean or constant")
    return weights.float()


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage_per_token: Tensor,
    *,
    rollout_log_prob: Tensor,
    reference_log_prob: Tensor | None = None,
    entropy: Tensor | None = None,
    config: LossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each response token; formulas in the module docstring.

    Args:
        log_prob: ``[tokens]``: the policy's log-probs; the gradient flows through these (and through ``entropy``).
        old_log_prob: ``[tokens]``: the trainer's log-probs before the first update of the batch.
        advantage_per_token: ``[tokens]``: each sample's advantage, repeated for its tokens.
        rollout_log_prob: ``[tokens]``: the engine's log-probs.
        reference_log_prob: ``[tokens]``; needed where ``kl_coefficient`` is not 0, else only reported.
        entropy: ``[tokens]``; needed where ``entropy_coefficient`` is not 0.
        config: clip bounds and coefficients.

    Returns:
        The loss ``[tokens]``, and detached ``[tokens]`` metrics whose mean over tokens (and, for `MAXIMUM_METRICS`,
        maximum) is worth a report: ``ratio``; ``clip_low``, ``clip_high``, ``dual_clip`` (1 where that bound holds
        the token, else 0); ``approx_kl`` (k3 of policy and old policy); ``importance_weight``;
        ``importance_truncated`` (0 or 1); ``rollout_mismatch`` (\\|trainer - engine log-prob\\|); ``reference_kl``
        and ``entropy`` where given.

    Raises:
        ValueError: shapes differ, or a tensor that a coefficient needs is missing.
    """
    given = {
        "old_log_prob": old_log_prob,
        "advantage_per_token": advantage_per_token,
        "rollout_log_prob": rollout_log_prob,
        "reference_log_prob": reference_log_prob,
        "entropy": entropy,
    }
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != log_prob.shape:
            raise ValueError(f"{name} {list(tensor.shape)} must have the shape of log_prob, {list(log_prob.shape)}")
    weight, metrics = _importance(old_log_prob.detach(), rollout_log_prob.detach(), config.importance_cap)
    policy, clip_metrics = _clipped_surrogate(log_prob, old_log_prob.detach(), advantage_per_token.detach(), config)
    loss = weight * policy
    metrics |= clip_metrics
    if reference_log_prob is not None:
        k3 = _k3(reference_log_prob.detach() - log_prob)
        metrics["reference_kl"] = k3.detach()
        loss = loss + config.kl_coefficient * k3 if config.kl_coefficient else loss
    elif config.kl_coefficient:
        raise ValueError(f"kl_coefficient={config.kl_coefficient} needs reference_log_prob; pass it or set 0")
    if entropy is not None:
        metrics["entropy"] = entropy.detach()
        loss = loss - config.entropy_coefficient * entropy if config.entropy_coefficient else loss
    elif config.entropy_coefficient:
        raise ValueError(f"entropy_coefficient={config.entropy_coefficient} needs entropy; pass it or set 0")
    return loss, metrics


def _importance(old: Tensor, rollout: Tensor, cap: float | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Truncated importance weight of trainer over engine; 1 without a cap, whose mismatch is reported all the same."""
    difference = old - rollout
    weight = difference.exp()
    metrics = {"rollout_mismatch": difference.abs()}
    if cap is None:
        weight = torch.ones_like(weight)
        truncated = torch.zeros_like(weight)
    else:
        truncated = (weight > cap).to(weight.dtype)
        weight = weight.clamp(max=cap)
    return weight, metrics | {"importance_weight": weight, "importance_truncated": truncated}


def _clipped_surrogate(
    log_prob: Tensor, old: Tensor, advantage: Tensor, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate as a loss (to be minimised), with both bounds and the dual clip."""
    log_ratio = (log_prob - old).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-ratio * advantage, -clipped * advantage)
    value, negative = ratio.detach(), advantage < 0
    dual = torch.zeros_like(negative)
    if config.dual_clip is not None:
        dual = negative & (value > config.dual_clip)
        loss = torch.where(dual, -config.dual_clip * advantage, loss)
    held = {
        "clip_low": negative & (value < 1 - config.clip_low),
        "clip_high": (advantage > 0) & (value > 1 + config.clip_high),
        "dual_clip": dual,
    }
    metrics = {name: mask.to(value.dtype) for name, mask in held.items()}
    return loss, metrics | {"ratio": value, "approx_kl": _k3(log_ratio.detach())}


def _k3(difference: Tensor) -> Tensor:
    """``exp(d) - d - 1 >= 0``, with d held in +-20 and the value cut at 10."""
    held = difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (torch.expm1(held) - held).clamp(max=_MAX_K3)
