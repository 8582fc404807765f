"""Draws tokens from logits: temperature, top-k and top-p, with the log-prob in the distribution that was drawn from."""

from __future__ import annotations

import torch
from torch import Tensor


def processed_log_probs(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The log-probs of the distribution that is sampled; -inf where top-k or top-p leave a token out.

    First the temperature, then the ``k`` most likely tokens (ties with the k-th stay), then the smallest set of the
    most likely tokens whose mass reaches ``p``; what is left is normalised again.

    Args:
        logits: ``[samples, vocab]``.
        temperature: fp32 ``[samples]``; 0 means greedy and leaves the logits as they are.
        top_k: int64 ``[samples]``; values below 1 keep all.
        top_p: fp32 ``[samples]``; 1 keeps all.

    Returns:
        fp32 ``[samples, vocab]``.
    """
    scale = torch.where(temperature > 0, temperature, torch.ones_like(temperature))
    scaled = logits.float() / scale[:, None]
    cut = ((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1)
    if cut.any():
        scaled[cut] = _cut(scaled[cut], top_k[cut], top_p[cut])
    return scaled.log_softmax(-1)


def _cut(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Put -inf where top-k and top-p leave a token out: ``[rows, vocab]``."""
    vocab = logits.shape[1]
    ordered, order = logits.sort(dim=-1, descending=True)
    k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    ordered = ordered.masked_fill(ordered < ordered.gather(1, k[:, None] - 1), -torch.inf)
    # A token stays if the mass before it is below p; the first one always does.
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    drop = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    drop[:, 0] = False
    ordered = ordered.masked_fill(drop, -torch.inf)
    return torch.empty_like(ordered).scatter_(1, order, ordered)


def draw(log_probs: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """One token a row: the first whose cumulated probability exceeds the row's uniform number; greedy at temperature 0.

    Args:
        log_probs: fp32 ``[samples, vocab]``, normalised.
        temperature: fp32 ``[samples]``.
        uniform: fp64 ``[samples]`` in [0, 1).

    Returns:
        int64 ``[samples]``.
    """
    mass = log_probs.double().exp().cumsum(-1)
    # Scaled to the total, so that rounding cannot push the number beyond the last token with any probability.
    target = uniform[:, None] * mass[:, -1:]
    sampled = torch.searchsorted(mass, target, right=True).squeeze(1)
    return torch.where(temperature > 0, sampled, log_probs.argmax(-1))
