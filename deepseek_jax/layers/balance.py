"""Load of the experts, V2's capacity, and the balance losses of DeepSeekMoE, V2 and V3.

Everything is per sequence of T counted tokens (padding is not counted), so that nothing here depends on how a batch is
spread over devices or accumulation steps. Device groups are the configuration's `n_group`, never the mesh.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import MoE
from deepseek_jax.parallel.ring import zigzag
from deepseek_jax.types import Array


def selections(indices_BTX: Array, valid_BT: Array, experts: int, dtype: jnp.dtype) -> Array:
    """1 where a counted token chose an expert: [B, T, E]."""
    return jax.nn.one_hot(indices_BTX, experts, dtype=dtype).sum(axis=2) * valid_BT[..., None]


def tokens_counted(valid_BT: Array, dtype: jnp.dtype) -> Array:
    """T of each sequence, [B, 1]; 1 where nothing is counted, so that means of nothing are 0."""
    return jnp.maximum(valid_BT.sum(axis=1, keepdims=True).astype(dtype), 1)


def load_fraction(selected_BTE: Array, valid_BT: Array, config: MoE) -> Array:
    """f_i = E / (K T) · number of tokens that chose expert i (DeepSeekMoE eq. 13, V2 eq. 24, V3 eq. 18): [B, E]."""
    tokens = tokens_counted(valid_BT, selected_BTE.dtype)
    return selected_BTE.sum(axis=1) * config.n_routed_experts / (config.num_experts_per_tok * tokens)


def mean_affinity(scores_BTE: Array, valid_BT: Array) -> Array:
    """P_i = mean over tokens of the affinity (DeepSeekMoE eq. 14, V2 eq. 25, V3 eq. 20): [B, E]."""
    return (scores_BTE * valid_BT[..., None]).sum(axis=1) / tokens_counted(valid_BT, scores_BTE.dtype)


def by_group(x_BE: Array, config: MoE) -> Array:
    """[B, E] -> [B, G, E / G]."""
    return x_BE.reshape(x_BE.shape[0], config.n_group, -1)


def balance_losses(scores_BTE: Array, indices_BTX: Array, valid_BT: Array, config: MoE) -> dict[str, Array]:
    """Weighted balance losses of each sequence, name -> [B]; only those whose factor is not 0.

    Gradients flow through the affinities alone: the counts f are constants.
    """
    dtype, E = scores_BTE.dtype, config.n_routed_experts
    losses = {}
    if config.expert_loss_alpha or config.device_loss_alpha or config.communication_loss_alpha:
        selected_BTE = selections(indices_BTX, valid_BT, E, dtype)
        f_BE, p_BE = load_fraction(selected_BTE, valid_BT, config), mean_affinity(scores_BTE, valid_BT)
        p_group_BG = by_group(p_BE, config).sum(axis=-1)
        if config.expert_loss_alpha:  # DeepSeekMoE eq. 12, V2 eq. 23
            losses["expert"] = config.expert_loss_alpha * (f_BE * p_BE).sum(axis=-1)
        if config.device_loss_alpha:  # DeepSeekMoE eq. 15, V2 eq. 26
            f_group_BG = by_group(f_BE, config).mean(axis=-1)
            losses["device"] = config.device_loss_alpha * (f_group_BG * p_group_BG).sum(axis=-1)
        if config.communication_loss_alpha:  # V2 eq. 29
            sent_BTG = selected_BTE.reshape(*valid_BT.shape, config.n_group, -1).max(axis=-1)
            tokens = tokens_counted(valid_BT, dtype)
            sent_BG = sent_BTG.sum(axis=1) * config.n_group / (config.topk_group * tokens)
            losses["communication"] = config.communication_loss_alpha * (sent_BG * p_group_BG).sum(axis=-1)
    if config.sequence_loss_alpha:  # V3 eq. 17: the K best of the unbiased affinities, wherever tokens were sent
        best_BTX = checkpoint_name(lax.top_k(scores_BTE, config.num_experts_per_tok)[1], "routing")
        f_BE = load_fraction(selections(best_BTX, valid_BT, E, dtype), valid_BT, config)
        p_BE = mean_affinity(normalised(scores_BTE), valid_BT)
        losses["sequence"] = config.sequence_loss_alpha * (f_BE * p_BE).sum(axis=-1)
    return losses


def normalised(scores_BTE: Array) -> Array:
    """s'_i,t = s_i,t / Σ_j s_j,t (V3 eq. 19)."""
    return scores_BTE / (scores_BTE.sum(axis=-1, keepdims=True) + 1e-20)


def affinity_entropy(scores_BTE: Array, valid_BT: Array) -> Array:
    """Mean over counted tokens of the entropy of the normalised affinities, in nats; a scalar to watch."""
    p = normalised(scores_BTE)
    entropy_BT = -(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))).sum(axis=-1)
    return (entropy_BT * valid_BT).sum() / jnp.maximum(valid_BT.sum(), 1)


def within_capacity(affinity_BTX: Array, indices_BTX: Array, valid_BT: Array, exempt_B: Array, config: MoE) -> Array:
    """V2's token dropping (section 2.2.4): bool [B, T, X], the token-expert pairs that are computed.

    In each sequence a device group has a budget of capacity_factor · T · K / n_group pairs; those with the lowest
    affinity beyond it are dropped, later tokens first among equals. Exempt sequences drop nothing.
    """
    if config.capacity_factor is None:
        return jnp.ones(indices_BTX.shape, bool)
    B, T, X = indices_BTX.shape
    group_BP = (indices_BTX // (config.n_routed_experts // config.n_group)).reshape(B, T * X)
    group_BP = jnp.where(jnp.repeat(valid_BT, X, axis=1), group_BP, config.n_group)  # padding has a group of its own
    affinity_BP = lax.stop_gradient(affinity_BTX).reshape(B, T * X)
    place_BP = jnp.broadcast_to(jnp.repeat(zigzag(jnp.arange(T), "length"), X), group_BP.shape)
    order_BP = jnp.lexsort((place_BP, -affinity_BP, group_BP), axis=-1)  # by group, falling affinity, place
    sorted_group_BP = jnp.take_along_axis(group_BP, order_BP, axis=-1)
    first_BP = jax.vmap(lambda groups: jnp.searchsorted(groups, groups, side="left"))(sorted_group_BP)
    rank_sorted_BP = jnp.arange(T * X)[None] - first_BP
    rank_BP = jnp.take_along_axis(rank_sorted_BP, jnp.argsort(order_BP, axis=-1), axis=-1)
    tokens = valid_BT.sum(axis=1, keepdims=True)
    # Whole pairs; the small term undoes a product that float32 rounds to just below one.
    budget_B1 = jnp.floor(config.capacity_factor * tokens * X / config.n_group + 1e-4)
    return ((rank_BP < budget_B1) | exempt_B[:, None]).reshape(B, T, X)


def exempt_sequences(tokens_BT: Array, share: float) -> Array:
    """Bool [B]: about `share` of all sequences, chosen by a hash of their tokens.

    V2 exempts about a tenth of the sequences; a hash makes the choice the same on every mesh and in every replay.
    """
    positions = jnp.arange(tokens_BT.shape[1], dtype=jnp.uint32)
    mixed = (tokens_BT.astype(jnp.uint32) + positions * jnp.uint32(0x9E3779B9)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    total_B = (mixed ^ (mixed >> 16)).sum(axis=1, dtype=jnp.uint32)
    total_B = (total_B ^ (total_B >> 15)) * jnp.uint32(0x2C1B3C6D)
    uniform_B = (total_B ^ (total_B >> 12)) >> 8  # 24 bits, exact in float32
    return uniform_B.astype(jnp.float32) < share * 2**24
