"""The policy objective: GRPO in the forms that the papers print, and the parts that later ones add.

DeepSeekMath (arXiv 2402.03300) eq. 3 and 4 clips the ratio of each token and averages over a completion's tokens. V2 (eq.
32–34), V3 (eq. 26–28) and R1 (eq. 1–3) print the ratio of whole outputs. V3.2 (section 3.1) multiplies the KL estimate by
the ratio and masks what is too far off the policy. Dr. GRPO (arXiv 2503.20783) and DAPO (arXiv 2503.14476) change the
denominator.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from deepseek_jax.config import require
from deepseek_jax.types import Array

Aggregation = Literal["grpo", "dr_grpo", "dapo"]
"""How tokens become one number. `grpo`: mean over a completion, then over completions. `dapo`: mean over all tokens.
`dr_grpo`: sum over the tokens, by a constant for each completion."""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Which objective, by its named parts."""

    ratio: Literal["token", "sequence"] = "token"
    """Of probabilities of tokens (DeepSeekMath), or of whole outputs (as V2, V3 and R1 print it)."""
    aggregation: Aggregation = "grpo"
    max_tokens: int | None = None
    """`dr_grpo`'s constant: tokens that a completion may have."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 − this …"""
    clip_high: float = 0.2
    """… and 1 + this. R1's reasoning stage prints 10."""
    dual_clip: float | None = None
    """A negative advantage counts at most this often (arXiv 1912.09729); above 1."""
    kl: float = 0.001
    """β, the weight of the divergence from the reference; 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of one token, with d = log π − log π_ref: d; d² / 2; exp(−d) + d − 1 (the papers'). k1 and k3 have unbiased values,
    k2 an unbiased gradient."""
    unbiased_kl: bool = False
    """Multiply the estimate by the ratio of the token (V3.2): its gradient is unbiased off the policy too."""
    off_policy_mask: float | None = None
    """δ: leave out completions of negative advantage whose mean log(π_old / π) is above it (V3.2). π_old is what the sampler
    reported, where it did: so what differs between two implementations counts too."""
    importance_cap: float | None = None
    """Weigh tokens by min(π_old / π_sampler, this): what differs between the trainer's and the sampler's forward pass."""

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, remedy: str) -> None:
            require(condition, "PolicyLoss", name, getattr(self, name), remedy)

        check(self.ratio in ("token", "sequence"), "ratio", "must be 'token' or 'sequence'")
        check(self.aggregation in ("grpo", "dr_grpo", "dapo"), "aggregation", "must be 'grpo', 'dr_grpo' or 'dapo'")
        check((self.aggregation == "dr_grpo") == (self.max_tokens is not None), "max_tokens", "goes with 'dr_grpo'")
        check(self.max_tokens is None or self.max_tokens > 0, "max_tokens", "must be greater than 0")
        check(0 < self.clip_low <= 1, "clip_low", "must be in (0, 1]")
        check(self.clip_high > 0, "clip_high", "must be greater than 0")
        check(self.dual_clip is None or self.dual_clip > 1, "dual_clip", "must be greater than 1")
        check(self.kl >= 0, "kl", "must not be negative")
        check(self.kl_estimator in ("k1", "k2", "k3"), "kl_estimator", "must be 'k1', 'k2' or 'k3'")
        check(self.importance_cap is None or self.importance_cap > 0, "importance_cap", "must be greater than 0")
        if self.ratio == "sequence":
            check(
                self.aggregation == "grpo",
                "aggregation",
                "the ratio of whole outputs has one term a completion: 'grpo'",
            )


@struct.dataclass
class PolicyMetrics:
    """What an update is judged by; means over the tokens that count, without gradient."""

    kl: Array
    """The estimate of the divergence from the reference, before β; 0 without one."""
    clipped_low: Array
    """Share of tokens (of completions, with the ratio of outputs) whose ratio the lower bound changed the term of."""
    clipped_high: Array
    """The same, of the upper bound."""
    ratio: Array
    """Mean ratio to the policy that sampled."""
    masked: Array
    """Share of completions that the off-policy mask leaves out."""


def policy_loss(
    config: PolicyLoss,
    logp_BT: Array,
    old_logp_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    reference_logp_BT: Array | None = None,
    sampler_logp_BT: Array | None = None,
    completions: Array | float | None = None,
    tokens: Array | float | None = None,
) -> tuple[Array, PolicyMetrics]:
    """The loss, to be minimised: less the objective of a batch, or of a piece of one.

    Args:
        config: the parts.
        logp_BT: log-probability of each token under the policy, float32 or wider, nats.
        old_logp_BT: under the policy that is updated from, by the same forward pass.
        advantage_BT: of each token; [B, 1] where a completion has one.
        mask_BT: bool: tokens that the policy sampled. Nothing else counts, whatever the other arrays hold there.
        reference_logp_BT: under the reference; needed where `config.kl` is not 0.
        sampler_logp_BT: as the sampler reported; needed by `importance_cap`, and used by `off_policy_mask`.
        completions: how many the whole batch has; those of this piece by default.
        tokens: how many counted tokens the whole batch has; those of this piece by default.

    Returns:
        Scalar, and metrics of this piece.
    """
    if config.kl and reference_logp_BT is None:
        raise ValueError(f"PolicyLoss.kl = {config.kl}: give reference_logp, or 0 for no reference")
    if config.importance_cap is not None and sampler_logp_BT is None:
        raise ValueError(f"PolicyLoss.importance_cap = {config.importance_cap}: give sampler_logp")
    mask = mask_BT.astype(logp_BT.dtype)
    lengths_B = mask.sum(axis=1)
    counted_B = lengths_B > 0
    completions = jnp.maximum(counted_B.sum(), 1) if completions is None else completions
    tokens = jnp.maximum(mask.sum(), 1) if tokens is None else tokens
    lengths_B = jnp.maximum(lengths_B, 1)

    def where(x_BT: Array) -> Array:  # before any exponential: padding must not overflow into the gradient
        return jnp.where(mask_BT, x_BT, 0)

    log_ratio_BT = where(logp_BT - jax.lax.stop_gradient(old_logp_BT))
    sequence = config.ratio == "sequence"
    if sequence:
        advantage = where(jnp.broadcast_to(advantage_BT, mask_BT.shape)).sum(axis=1, keepdims=True) / lengths_B[:, None]
        log_ratio = log_ratio_BT.sum(axis=1, keepdims=True)
        counts = counted_B[:, None]
    else:
        advantage, log_ratio, counts = jnp.broadcast_to(advantage_BT, mask_BT.shape), log_ratio_BT, mask_BT
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    term = jnp.minimum(ratio * advantage, clipped * advantage)
    if config.dual_clip is not None:
        term = jnp.where(advantage < 0, jnp.maximum(term, config.dual_clip * advantage), term)
    if config.importance_cap is not None:
        assert sampler_logp_BT is not None
        drift = where(jax.lax.stop_gradient(old_logp_BT - sampler_logp_BT))
        if sequence:
            drift = drift.sum(axis=1, keepdims=True)
        term = term * jnp.minimum(jnp.exp(drift), config.importance_cap)
    kept_B = counted_B
    if config.off_policy_mask is not None:
        sampled = old_logp_BT if sampler_logp_BT is None else sampler_logp_BT
        drift_B = where(jax.lax.stop_gradient(sampled - logp_BT)).sum(axis=1) / lengths_B
        negative_B = (jnp.where(counts, advantage, 0).sum(axis=1)) < 0
        kept_B = counted_B & ~(negative_B & (drift_B > config.off_policy_mask))
        term = jnp.where(kept_B[:, None], term, 0)
    kl_BT = jnp.zeros_like(logp_BT)
    if config.kl:
        assert reference_logp_BT is not None
        kl_BT = where(kl_estimate(where(logp_BT - jax.lax.stop_gradient(reference_logp_BT)), config.kl_estimator))
        if config.unbiased_kl:
            kl_BT = kl_BT * jnp.exp(log_ratio_BT)

    def aggregated(x_BT: Array) -> Array:
        sums_B = where(x_BT).sum(axis=1)
        if config.aggregation == "grpo":
            return (sums_B / lengths_B).sum() / completions
        return sums_B.sum() / (tokens if config.max_tokens is None else completions * config.max_tokens)

    policy = jnp.where(counts, term, 0).sum() / completions if sequence else aggregated(term)
    loss = config.kl * aggregated(kl_BT) - policy

    def share(x: Array) -> Array:
        return jax.lax.stop_gradient(jnp.where(counts, x, 0).sum() / jnp.maximum(counts.sum(), 1)).astype(logp_BT.dtype)

    metrics = PolicyMetrics(
        kl=jax.lax.stop_gradient(where(kl_BT).sum() / jnp.maximum(mask.sum(), 1)),
        clipped_low=share((ratio < 1 - config.clip_low) & (advantage < 0)),
        clipped_high=share((ratio > 1 + config.clip_high) & (advantage > 0)),
        ratio=share(ratio),
        masked=1 - kept_B.sum() / jnp.maximum(counted_B.sum(), 1),
    )
    return loss, metrics


def kl_estimate(log_ratio: Array, estimator: Literal["k1", "k2", "k3"]) -> Array:
    """Of KL(π ‖ π_ref) from one sample of π, with log_ratio = log π − log π_ref (Schulman 2020)."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return jnp.square(log_ratio) / 2
    return jnp.exp(-log_ratio) + log_ratio - 1
