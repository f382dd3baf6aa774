"""Which experts a token goes to, and with what weight: the gates of DeepSeekMoE, V2 and V3.

DeepSeekMoE (eq. 9–11) and V2 (section 2.2): softmax affinities, the best K, not renormalised; V2's device-limited form
first keeps the groups with the best single affinity. V3 (section 2.1.2, eq. 12–16): sigmoid affinities; a bias is added
for the selection alone; groups are ranked by the sum of their two best biased affinities; the weights are the unbiased
affinities of the chosen, normalised among them and scaled.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import MoE
from deepseek_jax.layers.weights import at_least_float32, weight
from deepseek_jax.parallel.rules import Weight
from deepseek_jax.types import Array


def affinities(x_BTD: Array, w_DE: Array, scoring_func: str) -> Array:
    """s_i,t of every token and expert, [B, T, E], in float32 or wider whatever the compute dtype."""
    wide = at_least_float32(x_BTD.dtype)
    # Full precision: a rounded logit picks another expert, and devices round their default products differently.
    logits_BTE = jnp.einsum("btd,de->bte", x_BTD.astype(wide), w_DE.astype(wide), precision=lax.Precision.HIGHEST)
    logits_BTE = checkpoint_name(logits_BTE, "router_logits")
    return jax.nn.sigmoid(logits_BTE) if scoring_func == "sigmoid" else jax.nn.softmax(logits_BTE, axis=-1)


def group_mask(scores_E: Array, n_group: int, topk_group: int, best_of_group: int) -> Array:
    """Bool [..., E]: experts of the `topk_group` groups whose `best_of_group` highest scores sum highest."""
    grouped = scores_E.reshape(*scores_E.shape[:-1], n_group, -1)
    group_scores = lax.top_k(grouped, best_of_group)[0].sum(axis=-1)
    _, chosen = lax.top_k(group_scores, topk_group)
    kept = jax.nn.one_hot(chosen, n_group, dtype=jnp.int32).sum(axis=-2) > 0
    return jnp.repeat(kept, grouped.shape[-1], axis=-1)


def select_experts(scores_BTE: Array, bias_E: Array | None, config: MoE) -> Array:
    """Indices [B, T, X] of the experts chosen for every token; among equals the lower index wins.

    Masked groups get −inf: V3's biased scores may all be negative, so that a fill of 0 would choose them.
    """
    choice = scores_BTE if bias_E is None else scores_BTE + bias_E.astype(scores_BTE.dtype)
    if config.topk_method != "greedy" and config.n_group > config.topk_group:
        best = 2 if config.topk_method == "noaux_tc" else 1
        choice = jnp.where(group_mask(choice, config.n_group, config.topk_group, best), choice, -jnp.inf)
    return checkpoint_name(lax.top_k(choice, config.num_experts_per_tok)[1], "routing")


def replayed(indices_BTX: Array, recorded_BTX: Array) -> Array:
    """The recorded choice of each token in place of its own; where the record has a −1, its own stays.

    V3.2, section 3.1, "keep routing": an update runs the experts that the rollout ran. An index past the last expert
    makes the gate's weight nan, so that a record of another model cannot pass.
    """
    known = (recorded_BTX >= 0).all(axis=-1, keepdims=True)
    return jnp.where(known, recorded_BTX.astype(indices_BTX.dtype), indices_BTX)


def gate_weights(scores_BTE: Array, indices_BTX: Array, config: MoE) -> Array:
    """g_i,t of the chosen experts, [B, T, X]: unbiased affinities, normalised where the member does so, scaled."""
    weights_BTX = jnp.take_along_axis(scores_BTE, indices_BTX, axis=-1)
    if config.norm_topk_prob:
        weights_BTX = weights_BTX / (weights_BTX.sum(axis=-1, keepdims=True) + 1e-20)
    return weights_BTX * config.routed_scaling_factor


class Router(nn.Module):
    """Affinities and choice. The selection bias is the one variable of the `router` collection; apply only reads it."""

    config: MoE
    param_dtype: str
    stddev: float

    @nn.compact
    def __call__(self, x_BTD: Array, recorded_BTX: Array | None = None) -> tuple[Array, Array, Array]:
        """Scores [B, T, E], indices [B, T, X], weights [B, T, X]; float32 or wider.

        The weights, and their gradient, are those of the scores at hand, whether the indices are their best or recorded.
        """
        c = self.config
        w = weight(
            self, "w", (x_BTD.shape[-1], c.n_routed_experts), ("embed", "router"),
            dtype=self.param_dtype, stddev=self.stddev,
        )  # fmt: skip
        bias = None
        if c.topk_method == "noaux_tc":
            dtype = at_least_float32(self.param_dtype)
            box: Any = self.variable(
                "router", "bias", lambda: Weight(jnp.zeros(c.n_routed_experts, dtype), ("router",))
            )
            bias = box.value
        scores = affinities(x_BTD, w, c.scoring_func)
        indices = select_experts(scores, bias, c)
        if recorded_BTX is not None:
            indices = replayed(indices, recorded_BTX)
        return scores, indices, gate_weights(scores, indices, c)
