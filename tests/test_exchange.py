"""Tokens that change shards: every row arrives where a literal says, comes back, and what finds no place is counted."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import needs_8
from spread import assert_experts_equal_one_device

from deepseek_jax.layers.expert_parallel import Exchange, parallel_experts
from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
from deepseek_jax.parallel.exchange import by_expert, gather_weight, plan_runs, send_rows
from deepseek_jax.parallel.rules import axes_of, sharded_map

S, E, D = 4, 8, 3

pytestmark = needs_8


def counts(seed: int, rows: int) -> np.ndarray:
    """[S, E]: how many of a shard's `rows` rows are for each expert; some get none."""
    draw = np.random.default_rng(seed)
    return np.stack([np.bincount(draw.integers(0, draw.integers(1, E + 1), rows), minlength=E) for _ in range(S)])


def received(counts_SE: np.ndarray, places: int) -> list[list[tuple[int, int, int]]]:
    """(sender, expert, number among that sender's rows) of the rows that each shard holds: by sender, in their order."""
    held = []
    for shard in range(S):
        mine = range(shard * E // S, (shard + 1) * E // S)
        rows = [
            (sender, e, int(counts_SE[sender, :e].sum()) + i)
            for sender in range(S) for e in mine for i in range(counts_SE[sender, e])
        ]  # fmt: skip
        held.append(rows[:places])
    return held


@pytest.mark.parametrize("places", [S * 12, 15])
@pytest.mark.parametrize("seed", range(3))
def test_rows_arrive_in_order_of_the_experts_and_come_back(seed, places):
    P = 12
    counts_SE = counts(seed, P)
    x = np.random.default_rng(seed).standard_normal((S * P, D)).astype(np.float32)

    def local(x_PD: jax.Array, mine_1E: jax.Array) -> Any:
        axes = axes_of_expert
        all_SE = jax.lax.all_gather(mine_1E[0], axes)
        runs, kept_SE = plan_runs(all_SE, places)
        me = jax.lax.axis_index(axes)
        sent = send_rows(x_PD, runs, places, axes)
        source, place = by_expert(jax.lax.dynamic_slice_in_dim(kept_SE, me * E // S, E // S, axis=1), places)
        return sent[source], send_rows(sent[source][place], runs.back(), P, axes), kept_SE.sum()[None]

    with use_mesh(make_mesh(MeshConfig(data=1, expert=S), jax.devices()[:S])):
        axes_of_expert = axes_of("expert")
        names = ("expert", "none")
        run = jax.jit(sharded_map(local, (names, names), (names, names, ("expert",))))
        ordered, back, kept = run(jnp.asarray(x), jnp.asarray(counts_SE, jnp.int32))
    held = received(counts_SE, places)
    ordered, back = np.asarray(ordered).reshape(S, places, D), np.asarray(back).reshape(S, P, D)
    expected_back = np.zeros_like(back)
    for shard, rows in enumerate(held):
        in_order = sorted(rows, key=lambda row: row[1])  # stable: senders stay in order
        expected = np.array([x[sender * P + number] for sender, _, number in in_order]).reshape(-1, D)
        np.testing.assert_array_equal(ordered[shard, : len(rows)], expected)
        assert not ordered[shard, len(rows) :].any()
        for sender, _, number in rows:
            expected_back[sender, number] = x[sender * P + number]
    np.testing.assert_array_equal(back, expected_back)
    assert set(np.asarray(kept)) == {sum(map(len, held))}


def experts_of(seed: int, skewed: bool) -> tuple[jax.Array, ...]:
    draw = np.random.default_rng(seed)
    B, T, X, F = 8, 4, 2, 8
    x, weights = draw.standard_normal((B, T, 8)), draw.random((B, T, X)) + 0.1
    indices = np.tile([0, 1], (B, T, 1)) if skewed else np.argsort(draw.random((B, T, E)), axis=-1)[..., :X]
    matrices = (draw.standard_normal(shape) for shape in ((E, 8, F), (E, 8, F), (E, F, 8)))
    return jnp.asarray(x), jnp.asarray(indices), jnp.asarray(weights), *map(jnp.asarray, matrices)


@pytest.mark.parametrize(
    "exchange, layout, parts",
    [
        ("ragged", {"expert": 4, "fsdp": 2}, 1),
        ("ring", {"expert": 4, "fsdp": 2}, 2),
        ("ragged", {"expert": 2, "tensor": 2, "context": 2}, 2),
        ("ring", {"expert": 2, "tensor": 2, "context": 2}, 1),
        ("ragged", {"fsdp": 8}, 4),
    ],
)
def test_values_and_gradients_equal_one_device(exchange, layout, parts):
    arguments = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, experts_of(0, False))
    x, indices, *rest = arguments
    cotangent = jnp.asarray(np.random.default_rng(9).standard_normal(x.shape), jnp.float32)
    way = Exchange(way=exchange, gather_parts=parts)
    assert_experts_equal_one_device(x, indices, rest, cotangent, way, layout)


@pytest.mark.parametrize("exchange", ["ragged", "ring"])
def test_what_finds_no_place_is_left_out_and_counted(exchange):
    x, indices, weights, *matrices = experts_of(1, True)  # every token to the experts 0 and 1, of the first shard
    pairs = indices.size

    def run(*arguments, buffer_factor):
        way = Exchange(way=exchange, buffer_factor=buffer_factor)
        return parallel_experts(*arguments, exchange=way, decoding=False)

    with use_mesh(make_mesh(MeshConfig(data=1, expert=4), jax.devices()[:4])):
        whole, none = jax.jit(partial(run, buffer_factor=None))(x, indices, weights, *matrices)
        some, left = jax.jit(partial(run, buffer_factor=2.0))(x, indices, weights, *matrices)
        # 32 places for 64 pairs: a ragged exchange serves the first senders, a ring the first experts.
        expected = whole.at[4:].set(0)
        if exchange == "ring":
            expected, _ = jax.jit(partial(run, buffer_factor=None))(x, indices, weights.at[..., 1].set(0), *matrices)
    assert none == 0 and left == pairs - 2.0 * pairs / 4
    np.testing.assert_allclose(some, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exchange", ["ragged", "ring"])
def test_bounded_buffers_are_for_counted_tokens_and_of_training(exchange):
    """Padding, here all for the experts 0 and 1, takes no place; a decoding step has room for all."""
    x, indices, weights, *matrices = experts_of(1, True)
    valid = jnp.zeros(x.shape[:2], bool).at[:, 1].set(True)
    assert valid.sum() * indices.shape[-1] == indices.size / 4  # the places of a shard
    way = Exchange(way=exchange, buffer_factor=1.0)
    with use_mesh(make_mesh(MeshConfig(data=1, expert=4), jax.devices()[:4])):
        served = partial(parallel_experts, x, indices, weights, *matrices)
        whole, _ = jax.jit(partial(served, exchange=Exchange(way=exchange), decoding=False))()
        some, left = jax.jit(partial(served, exchange=way, decoding=False, valid_BT=valid))()
        decoded, none = jax.jit(partial(served, exchange=way, decoding=True, valid_BT=valid))()
    assert left == none == 0
    np.testing.assert_allclose(some, jnp.where(valid[..., None], whole, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decoded, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exchange", ["ragged", "ring"])
def test_what_padding_is_served_changes_no_gradient(exchange):
    x, indices, *rest = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, experts_of(0, False)
    )
    draw = np.random.default_rng(9)
    valid = jnp.asarray(draw.random(x.shape[:2]) < 0.6)
    cotangent = jnp.asarray(draw.standard_normal(x.shape), jnp.float32) * valid[..., None]
    layout = dict(expert=4, fsdp=2)
    way = Exchange(way=exchange, buffer_factor=8.0)
    assert_experts_equal_one_device(x, indices, rest, cotangent, way, layout, valid)


@pytest.mark.parametrize("wide_sums", [False, True])
def test_devices_add_the_gradients_of_a_gathered_weight(wide_sums):
    """1 of the first and 2⁻⁹ of the others, which bfloat16 cannot tell from what it holds."""

    def local(w_AD: jax.Array, c_A1: jax.Array) -> jax.Array:
        whole = gather_weight(w_AD, axes, 0, "bfloat16", wide_sums=wide_sums)
        return (whole * c_A1.astype(whole.dtype)).sum(keepdims=True)

    c = jnp.asarray([[1.0]] + 7 * [[2.0**-9]])
    with use_mesh(make_mesh(MeshConfig(data=1, fsdp=8), jax.devices()[:8])):
        axes, names = axes_of("embed"), ("embed", "none")
        total = sharded_map(local, (names, names), names)
        gradient = jax.jit(jax.grad(lambda w: total(w, c).astype(jnp.float32).sum()))(jnp.ones((8, 4)))
    assert gradient.dtype == jnp.float32
    assert (np.asarray(gradient) == 1 + 7 * 2.0**-9).all() == wide_sums
