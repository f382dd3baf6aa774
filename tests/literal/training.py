"""Losses over a batch, AdamW, clipping, learning-rate schedules."""

import math

import numpy as np


def token_loss(logits, target):
    """-log softmax(logits)[target], for one position."""
    peak = max(logits)
    return peak + math.log(sum(math.exp(logit - peak) for logit in logits)) - logits[target]


def main_loss(logits, tokens, segment_ids=None, loss_mask=None):
    """Sum over counted targets of the whole batch, over their number.

    Args:
        logits: [B, T, W] of inputs tokens[:, :T].
        tokens: [B, T + 1].
        segment_ids: [B, T + 1]; a target counts when it is in the document of its input. None: one document a row.
        loss_mask: [B, T + 1] of 0/1 for targets; None: all.
    """
    return shifted_loss(logits, tokens, 1, segment_ids, loss_mask)


def mtp_loss(mtp_logits, tokens, weight, segment_ids=None, loss_mask=None):
    """V3 eq. 24–25: λ/D Σ_k L_k.

    Reading: the paper divides each depth by T; here, as for the main loss, by the number of targets that count, so
    that packing does not change the weight of a token.
    """
    depth = len(mtp_logits)
    losses = [shifted_loss(mtp_logits[k - 1], tokens, k + 1, segment_ids, loss_mask) for k in range(1, depth + 1)]
    return weight / depth * sum(losses)


def shifted_loss(logits, tokens, shift, segment_ids=None, loss_mask=None):
    """Mean loss of predicting token i + shift at position i."""
    total, count = 0.0, 0
    for b in range(len(tokens)):
        for i in range(len(logits[b])):
            target = i + shift
            if target >= len(tokens[b]):
                continue
            if segment_ids is not None and (segment_ids[b][i] == 0 or segment_ids[b][target] != segment_ids[b][i]):
                continue
            if loss_mask is not None and not loss_mask[b][target]:
                continue
            total += token_loss(logits[b][i], tokens[b][target])
            count += 1
    return total / count if count else 0.0


def balance_loss(records):
    """Sum over routers and kinds of the mean over the sequences that hold a counted token.

    Reading: the papers average over the sequences of a batch; a multi-token module's router is one more layer, its
    balance loss not scaled by λ/D.
    """
    total = 0.0
    for layers in records.values():
        for layer in layers:
            for losses in layer.losses:
                total += sum(losses.values()) / max(layer.sequences, 1)
    return total


def clipped(gradients, max_norm):
    """All gradients scaled by max_norm / norm when their common norm is above it. Returns them and the norm."""
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients))
    factor = max_norm / norm if norm > max_norm else 1.0
    return [g * factor for g in gradients], norm


def adamw_step(parameter, gradient, m, v, step, lr, beta1, beta2, eps, weight_decay):
    """One step of Adam with decoupled weight decay; `step` counts from 1. Returns parameter, m, v."""
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    return parameter - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * parameter), m, v


def multi_step_rate(step, peak, warmup, total, milestones):
    """LLM paper, section 2.3: linear warm-up to the peak, then the peak times the factor of the last milestone passed.

    Args:
        step: steps taken before this one, from 0. Reading: step n of warm-up, from 1, takes n / warmup of the peak.
        peak: maximum rate.
        warmup: steps of warm-up.
        total: all steps.
        milestones: (share of all steps, factor on the peak), e.g. ((0.8, 0.316), (0.9, 0.1)).
    """
    factor = min((step + 1) / warmup, 1.0) if warmup else 1.0
    for share, value in milestones:
        if step >= share * total:
            factor = value
    return peak * factor
