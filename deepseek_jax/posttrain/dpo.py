"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), as DeepSeek LLM's chat models were tuned with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import require
from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.posttrain.policy import variables_of
from deepseek_jax.posttrain.preference_batches import Batch
from deepseek_jax.posttrain.preference_step import Gradient, PreferenceState, Scores
from deepseek_jax.training.loss import cross_entropy_sum, in_chunks
from deepseek_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class DPO:
    """A policy learns from pairs without a reward model. LLM chat: 1 epoch, batch 512, lr 5e-6, warm-up and cosine."""

    beta: float = 0.1
    """β, how dear it is to leave the reference: the policy that the run began with. The LLM paper does not state its own."""
    label_smoothing: float = 0.0
    """ε: share of the pairs that are taken to be the wrong way round (conservative DPO)."""

    def __post_init__(self) -> None:
        require(self.beta > 0, "DPO", "beta", self.beta, "must be greater than 0")
        require(0 <= self.label_smoothing < 0.5, "DPO", "label_smoothing", self.label_smoothing, "must be in [0, 0.5)")


def dpo_loss(config: DPO, logp_B2: Array, reference_B2: Array) -> tuple[Array, Array]:
    """Loss of each pair (eq. 7, before the mean) and implicit reward of each answer: float [B] and [B, 2].

    −(1 − ε) log σ(m) − ε log σ(−m), with m the chosen answer's reward β (log π − log π_ref) minus the rejected one's.

    Args:
        config: β and ε.
        logp_B2: log-probability of the chosen and of the rejected answer, nats, under the policy.
        reference_B2: the same under the reference; no gradient flows to it.
    """
    rewards_B2 = config.beta * (logp_B2 - lax.stop_gradient(reference_B2))
    margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    smoothing = config.label_smoothing
    loss_B = -(1 - smoothing) * jax.nn.log_sigmoid(margin_B) - smoothing * jax.nn.log_sigmoid(-margin_B)
    return loss_B, rewards_B2


def correct(margin_B: Array) -> Array:
    """1 where the chosen answer is ahead, ½ where both are even, else 0."""
    return (jnp.sign(margin_B) + 1) / 2


def answer_logprobs(hidden_RTD: Array, w_DW: Array, targets_RT: Array, mask_RT: Array, chunk: int) -> Array:
    """Σ log p of the masked targets of each row, nats: float32 or wider [R]. The logits of `chunk` places exist at once.

    Not for gradients: `dpo_gradient` has them.
    """
    wide = at_least_float32(hidden_RTD.dtype)

    def one(piece: tuple[Array, Array, Array]) -> Array:
        hidden, targets, mask = piece
        logits = jnp.einsum("rtd,dw->rtw", hidden, w_DW.astype(hidden.dtype), preferred_element_type=wide)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.where(mask, target - jax.nn.logsumexp(logits, axis=-1), 0).sum(axis=-1)

    parts = (in_chunks(x, chunk) for x in (hidden_RTD, targets_RT, mask_RT))
    return lax.map(one, tuple(parts)).sum(axis=0)


def _rows(batch: Batch) -> tuple[Array, Array, Array]:
    """Inputs, targets and mask of the targets, an answer each row: [2 B, T − 1]."""
    tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask))
    return tokens[:, :-1], tokens[:, 1:], mask[:, 1:]


def _logprobs(model: DeepSeek, params: Any, router: Any, batch: Batch, chunk: int) -> Array:
    """Of each answer: [B, 2]."""
    inputs, targets, mask = _rows(batch)
    variables = variables_of(params, router)
    hidden = model.apply(variables, inputs, method="hidden").hidden
    w_DW = model.apply(variables, method="head_kernel")
    return answer_logprobs(hidden, w_DW, targets, mask, chunk).reshape(-1, 2)


@lru_cache(maxsize=16)
def dpo_scores(model: DeepSeek, chunk: int = 512) -> Scores:
    """The function `(state, batch) -> {"logp", "reference"}`, [B, 2] each: log-probabilities of the answers."""

    def scores(state: PreferenceState, batch: Batch) -> dict[str, Array]:
        logp, reference = (_logprobs(model, p, state.router, batch, chunk) for p in (state.params, state.reference))
        return {"logp": logp, "reference": reference}

    return scores


@lru_cache(maxsize=16)
def dpo_gradient(model: DeepSeek, config: DPO, chunk: int = 512) -> Gradient:
    """The function `(state, batch, pairs) -> (gradient, metrics)`: shares of a batch of `pairs` pairs, which add up."""

    def gradient(state: PreferenceState, batch: Batch, pairs: int) -> tuple[Any, dict[str, Array]]:
        inputs, targets, mask = _rows(batch)
        reference_B2 = _logprobs(model, state.reference, state.router, batch, chunk)

        def objective(params: Any) -> tuple[Array, dict[str, Array]]:
            variables = variables_of(params, state.router)
            hidden = model.apply(variables, inputs, method="hidden").hidden
            w_DW = model.apply(variables, method="head_kernel")
            logp_B2 = lax.stop_gradient(answer_logprobs(hidden, w_DW, targets, mask, chunk).reshape(-1, 2))

            def of_logp(x: Array) -> tuple[Array, tuple[Array, Array]]:
                loss_B, rewards_B2 = dpo_loss(config, x, reference_B2)
                return loss_B.sum() / pairs, (loss_B, rewards_B2)

            (_, (loss_B, rewards_B2)), slope_B2 = jax.value_and_grad(of_logp, has_aux=True)(logp_B2)
            # The chain rule by hand: Σ slope · log p has the loss's gradient, and its logits exist in chunks alone.
            weights = jnp.where(mask, -slope_B2.reshape(-1, 1), 0)
            total = cross_entropy_sum(hidden, w_DW, targets, weights, chunk)
            margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]
            return total, {
                "loss": loss_B.sum() / pairs,
                "accuracy": correct(margin_B).sum() / pairs,
                "margin": margin_B.sum() / pairs,
                "reward_chosen": rewards_B2[:, 0].sum() / pairs,
                "reward_rejected": rewards_B2[:, 1].sum() / pairs,
                "logprob_chosen": logp_B2[:, 0].sum() / pairs,
                "logprob_rejected": logp_B2[:, 1].sum() / pairs,
            }

        grads, metrics = jax.grad(objective, has_aux=True)(state.params)
        return {"params": grads, "head": {}}, metrics

    return gradient
