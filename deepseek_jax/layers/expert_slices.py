"""Routed experts of several slices: a token crosses the slow link once for each slice that holds experts of its own.

V3 sends a token to the GPUs of its target nodes over InfiniBand, once a node, and on to its experts over NVLink (sections
2.1.2 and 3.2.2). Here the slow link is the network between slices. A token goes to the device of the other slice that has
its own place there; the exchange of layers/expert_parallel.py serves it within that slice, where its results are weighed
and added up; one row comes back for each slice. With groups of experts that lie each within a slice, `topk_group` bounds
how many those are.

Routes are short beside tokens, so all slices are told all of them, and each works out by itself who sends what to whom.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.layers.experts import gather_rows, sort_pairs, weighed_sums
from deepseek_jax.parallel.exchange import Runs, plan_runs, send_rows
from deepseek_jax.types import Array

Within = Callable[[Array, Array, Array], tuple[Array, Array]]
"""(rows [R, D], their experts among those of this slice [R, X], gate weights [R, X]) -> (weighed sums [R, D], pairs left out
[]). An index past the last expert is none: its weight is zero."""


def slices_of_token(groups: tuple[int, int], chosen: int, slices: int) -> int:
    """In how many of `slices` equal parts of the experts those of one token lie at most.

    Args:
        groups: how many there are, and how many of them a token's experts lie in: `MoE.n_group`, `MoE.topk_group`.
        chosen: experts of a token.
        slices: see above.
    """
    there, used = groups
    if there % slices == 0:
        each = 1
    else:  # a group of several slices, or one that begins or ends within a slice
        each = slices // there if slices % there == 0 else slices // there + 2
    return min(slices, chosen, used * each)


def plan_slices(indices_LMX: Array, experts: int, places: int, rows: int) -> tuple[Runs, Array]:
    """Which tokens travel to which of L slices.

    Args:
        indices_LMX: the experts of all tokens, by slice; of one device's place in each.
        experts: of all slices.
        places: a sender's, for (token, slice); the last of the last slices find none where there are more.
        rows: places of a receiver; the last of the last senders find none where there are more.

    Returns:
        The runs, of rows that are sorted by receiver, those for one in order of the tokens; and bool [L, M, L]: whether token
        m of slice s arrives at slice t.
    """
    L = len(indices_LMX)
    goes_LML = (indices_LMX[..., None] // (experts // L) == jnp.arange(L)).any(axis=2)
    number_LML = jnp.cumsum(goes_LML, axis=1, dtype=jnp.int32)
    ends_LL = jnp.minimum(jnp.cumsum(number_LML[:, -1], axis=1), places)
    runs, kept_LL = plan_runs(jnp.diff(ends_LL, axis=1, prepend=0), rows)
    return runs, goes_LML & (number_LML <= kept_LL[:, None])


def across_slices(
    x_MD: Array, indices_MX: Array, weights_MX: Array, experts: int, places: int, rows: int, axes: tuple[str, ...],
    within: Within,
) -> tuple[Array, Array]:  # fmt: skip
    """Weighed sums over each token's experts, wherever they lie; inside a `shard_map` over `axes`.

    Args:
        x_MD: tokens of this device.
        indices_MX: their experts, of all slices; slice l holds the l-th part of them.
        weights_MX: their gate weights, float32 or wider.
        experts: of all slices.
        places: see `plan_slices`, like `rows`.
        rows: see `places`.
        axes: mesh axes of the slices.
        within: serves what has come to this slice.

    Returns:
        [M, D] in the dtype of `x_MD`, and float32 []: pairs of this device's tokens that did not reach their slice, and pairs
        that `within` left out.
    """
    me, L = lax.axis_index(axes), lax.axis_size(axes)
    M, X = indices_MX.shape
    each = experts // L
    indices_LMX = checkpoint_name(lax.all_gather(indices_MX, axes), "routing")
    weights_LMX = lax.all_gather(weights_MX, axes)
    runs, kept_LML = plan_slices(indices_LMX, experts, places, rows)

    # Sender: (token, slice) in order of the slices, those that are none last.
    slice_MX = indices_MX // each
    target_L = jnp.arange(L)
    pairs_ML = (slice_MX[..., None] == target_L).sum(axis=1)
    order_P, place_ML, _ = sort_pairs(jnp.where(pairs_ML > 0, target_L, L), L)
    order_P = order_P[:places]
    x_PD = gather_rows(x_MD, order_P // L, place_ML, True)
    x_RD = send_rows(x_PD, runs, rows, axes)

    # Receiver: rows lie by sender, then in order of its tokens.
    came_A = kept_LML[:, :, me].reshape(-1)
    source_R = checkpoint_name(jnp.argsort(~came_A, stable=True), "routing")[:rows]
    own_RX = indices_LMX.reshape(L * M, X)[source_R] - me * each
    mine_RX = (own_RX >= 0) & (own_RX < each) & (jnp.arange(rows) < came_A.sum())[:, None]
    weights_RX = jnp.where(mine_RX, weights_LMX.reshape(L * M, X)[source_R], 0)
    out_RD, left_out = within(x_RD, jnp.where(mine_RX, own_RX, each), weights_RX)

    out_PD = send_rows(out_RD, runs.back(), places, axes)
    out_MD = weighed_sums(out_PD, jnp.ones((M, L), weights_MX.dtype), order_P, place_ML)
    lost = jnp.where(kept_LML[me], 0, pairs_ML).sum().astype(jnp.float32)
    return out_MD, left_out + lost
