"""Balance losses, token dropping and the bias update against the papers written out slowly (tests/literal/balance.py)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from literal.balance import load, sequence_losses, updated_bias
from literal.experts import choose, kept_pairs, moe, sigmoid, softmax

from deepseek_jax.config import MoE
from deepseek_jax.layers import balance, router
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe import MoELayer
from deepseek_jax.training.bias import update_router
from deepseek_jax.training.bias import updated_bias as our_updated_bias
from deepseek_jax.types import RouterStats

B, T, E, X = 3, 14, 12, 3
COMMON = dict(
    intermediate_size=8, moe_intermediate_size=8, n_shared_experts=1, first_k_dense_replace=0, n_routed_experts=E,
    num_experts_per_tok=X,
)  # fmt: skip
V1 = MoE(**COMMON, scoring_func="softmax", topk_method="greedy", expert_loss_alpha=0.01)
V1_DEVICES = MoE(
    **COMMON, scoring_func="softmax", topk_method="greedy", n_group=4, topk_group=4, expert_loss_alpha=0.003,
    device_loss_alpha=0.05,
)  # fmt: skip
V2 = MoE(
    **COMMON, scoring_func="softmax", topk_method="group_limited_greedy", n_group=4, topk_group=2,
    routed_scaling_factor=16.0, expert_loss_alpha=0.003, device_loss_alpha=0.05, communication_loss_alpha=0.02,
)  # fmt: skip
V3 = MoE(
    **COMMON, scoring_func="sigmoid", topk_method="noaux_tc", n_group=4, topk_group=2, norm_topk_prob=True,
    routed_scaling_factor=2.5, sequence_loss_alpha=0.1,
)  # fmt: skip
CONFIGS = {"v1": V1, "v1 with devices": V1_DEVICES, "v2": V2, "v3": V3}
VALID = np.ones((B, T), bool)
VALID[1, 9:] = False  # padding at the end
VALID[2, [0, 1, 5]] = False  # and elsewhere


def draw_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, size=(B, T, E))


def draw_bias(c: MoE) -> np.ndarray | None:
    return np.random.default_rng(9).uniform(-2, 0.5, size=E) if c.topk_method == "noaux_tc" else None


def ours(logits, c: MoE):
    """Scores, indices and weights by the library's gate."""
    scores = jax.nn.sigmoid(logits) if c.scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    bias = draw_bias(c)
    indices = router.select_experts(scores, None if bias is None else jnp.asarray(bias, scores.dtype), c)
    return scores, indices, router.gate_weights(scores, indices, c)


def literal_choices(logits: np.ndarray, c: MoE):
    return [[choose(list(token), draw_bias(c), c) for token in sequence] for sequence in logits]


@pytest.mark.smoke
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_loads_equal_the_papers(name):
    c, logits = CONFIGS[name], draw_logits(1)
    scores, indices, _ = ours(jnp.asarray(logits, jnp.float32), c)
    choices = literal_choices(logits, c)
    losses = balance.balance_losses(scores, indices, jnp.asarray(VALID), c)
    truth = [sequence_losses(choices[b], VALID[b], c) for b in range(B)]
    assert set(losses) == set(truth[0])
    for kind, values in losses.items():
        np.testing.assert_allclose(values, [sequence[kind] for sequence in truth], rtol=1e-5)
    selected = balance.selections(indices, jnp.asarray(VALID), E, jnp.float32)
    np.testing.assert_array_equal(selected.sum(axis=1), [load(choices[b], VALID[b], E) for b in range(B)])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_of_padding_has_no_loss(name):
    c = CONFIGS[name]
    scores, indices, _ = ours(jnp.asarray(draw_logits(2), jnp.float32), c)
    valid = jnp.asarray(VALID).at[1].set(False)
    for values in balance.balance_losses(scores, indices, valid, c).values():
        assert values[1] == 0
        assert bool((values[::2] > 0).all())


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_of_perfect_balance(name):
    """Uniform affinities and an even load give alpha times the papers' minimum: 1, times M where a loss counts sends."""
    c = CONFIGS[name]
    scores = jnp.full((1, E, E), 1 / E)
    indices = jnp.asarray([[[(t + k * (E // X)) % E for k in range(X)] for t in range(E)]])
    losses = balance.balance_losses(scores, indices, jnp.ones((1, E), bool), c)
    if "expert" in losses:
        np.testing.assert_allclose(losses["expert"], c.expert_loss_alpha, rtol=1e-5)
    if "device" in losses:
        np.testing.assert_allclose(losses["device"], c.device_loss_alpha, rtol=1e-5)
    if "communication" in losses:  # 3 experts of a token lie on 3 devices, M = 2 are allowed
        np.testing.assert_allclose(losses["communication"], c.communication_loss_alpha * 3 / c.topk_group, rtol=1e-5)
    if "sequence" in losses:  # its counts come from the affinities: all equal, the first K win every time
        np.testing.assert_allclose(losses["sequence"], c.sequence_loss_alpha, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_finite_differences_of_the_papers(name):
    """Through the affinities alone: a small step changes no count."""
    c, logits = CONFIGS[name], draw_logits(3)[:1]
    valid, step = VALID[1:2], 1e-6

    def total(logits: jax.Array) -> jax.Array:
        scores, indices, _ = ours(logits, c)
        return sum(values.sum() for values in balance.balance_losses(scores, indices, jnp.asarray(valid), c).values())

    def literal(logits: np.ndarray) -> float:
        return sum(sequence_losses(literal_choices(logits, c)[0], valid[0], c).values())

    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(total)(jnp.asarray(logits)))
    assert not gradient[~valid].any()
    draw = np.random.default_rng(0)
    for _ in range(12):
        at = (0, draw.integers(T), draw.integers(E))
        up, down = logits.copy(), logits.copy()
        up[at] += step
        down[at] -= step
        difference = (literal(up) - literal(down)) / (2 * step)
        assert math.isclose(gradient[at], difference, rel_tol=1e-4, abs_tol=1e-9), at


# Token dropping


def kept_by_us(scores, indices, valid, exempt, c: MoE) -> np.ndarray:
    affinities = jnp.take_along_axis(scores, indices, axis=-1)
    return np.asarray(balance.within_capacity(affinities, indices, jnp.asarray(valid), jnp.asarray(exempt), c))


def compare_dropping(logits: np.ndarray, exempt: list[bool], c: MoE) -> int:
    """Our kept pairs are the literal ones; returns how many were dropped."""
    scores, indices, _ = ours(jnp.asarray(logits, jnp.float32), c)
    kept, choices, dropped = kept_by_us(scores, indices, VALID, exempt, c), literal_choices(logits, c), 0
    for b in range(B):
        truth = kept_pairs(choices[b], VALID[b], c.n_group, E, c.capacity_factor)
        for t in np.flatnonzero(VALID[b]):
            for x in range(X):
                expected = exempt[b] or (t, int(indices[b, t, x])) in truth
                assert kept[b, t, x] == expected, (b, t, x, c.capacity_factor)
                dropped += not expected
    return dropped


@pytest.mark.parametrize("capacity_factor", [0.4, 1.0, 1.3, 4.0])
@pytest.mark.parametrize("name", ["v1 with devices", "v2"])
def test_dropped_pairs_equal_the_paper(name, capacity_factor):
    c = dataclasses.replace(CONFIGS[name], capacity_factor=capacity_factor)
    dropped = compare_dropping(draw_logits(4), [False, True, False], c)
    assert dropped > 0 if capacity_factor < 2 else dropped == 0


def test_of_equal_affinities_the_earlier_token_is_kept():
    every_token_the_same = np.tile(draw_logits(6)[:, :1], (1, T, 1))
    assert compare_dropping(every_token_the_same, [False] * B, dataclasses.replace(V2, capacity_factor=0.5)) > 0


@pytest.mark.parametrize("capacity_factor", [0.4, 1.0])
def test_budget_is_never_exceeded(capacity_factor):
    """Kept pairs of a device are at most capacity_factor · T · K / n_group: 42 / 4, 27 / 4 and 33 / 4 at a factor of 1."""
    c = dataclasses.replace(V2, capacity_factor=capacity_factor)
    scores, indices, _ = ours(jnp.asarray(draw_logits(7), jnp.float32), c)
    kept = kept_by_us(scores, indices, VALID, [False] * B, c)
    device = np.asarray(indices) // (E // c.n_group)
    for b in range(B):
        budget = capacity_factor * VALID[b].sum() * X / c.n_group
        for g in range(c.n_group):
            assert (kept[b] & (device[b] == g) & VALID[b][:, None]).sum() <= budget


@pytest.mark.parametrize("normalised", [False, True])
def test_layer_drops_by_affinity(normalised):
    """The whole layer. Weights normalised within a token do not order across tokens as affinities do; affinity counts."""
    c = dataclasses.replace(V2, capacity_factor=0.7, norm_topk_prob=normalised, routed_scaling_factor=2.0)
    draw = np.random.default_rng(5)
    x = draw.normal(size=(B, T, 9))
    x[:, ::2] *= 0.3  # tokens without much preference beside tokens with
    shapes = {"router": {"w": (9, E)}}
    for name, stack in (("experts", (E,)), ("shared", ())):
        shapes[name] = {"w_gate": (*stack, 9, 8), "w_up": (*stack, 9, 8), "w_down": (*stack, 8, 9)}
    params = jax.tree.map(lambda shape: draw.normal(0, 0.3, shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    context = Context(
        cos=jnp.zeros(0), sin=jnp.zeros(0), segment_ids=None, valid=jnp.asarray(VALID), exempt=jnp.zeros(B, bool)
    )
    layer = MoELayer(c, param_dtype="float32", stddev=0.3)
    out, stats = jax.jit(layer.apply)({"params": jax.tree.map(np.float32, params)}, np.float32(x), context)
    dropped = 0
    for b in range(B):
        truth, choices, kept = moe(params, None, x[b], VALID[b], c, dropping=True)
        np.testing.assert_allclose(np.asarray(out)[b][VALID[b]], truth[VALID[b]], atol=1e-6)
        dropped += sum(load(choices, VALID[b], E)) - len(kept)
    assert stats.dropped == dropped > 0


# Bias update


@pytest.mark.smoke
@pytest.mark.parametrize("experts", [4, 7, 12, 13, 28, 48])
@pytest.mark.parametrize("compiled", [False, True])
def test_bias_update_equals_the_paper(experts, compiled):
    draw = np.random.default_rng(8)
    loads = draw.integers(0, 6, size=(40, experts)).astype(np.float64)
    loads[:10] = draw.integers(1, 5000, size=(10, 1))  # perfectly balanced layers: sign(0) = 0, nothing moves
    bias = draw.normal(size=loads.shape)
    update = jax.jit(our_updated_bias, static_argnums=2) if compiled else our_updated_bias
    new = update(jnp.asarray(bias, jnp.float32), jnp.asarray(loads, jnp.float32), 0.001)
    truth = [updated_bias(list(b), list(n), 0.001) for b, n in zip(bias.astype(np.float32), loads, strict=True)]
    np.testing.assert_allclose(new, truth, atol=1e-6)


def test_every_router_is_updated_by_its_own_load():
    def stats(loads):
        zero = jnp.zeros(len(loads))
        return RouterStats(
            load=jnp.asarray(loads, jnp.float32),
            balance_loss={},
            entropy=zero,
            dropped=zero,
            overflow=zero,
            valid_sequences=zero,
        )

    bias = {"ffn": {"router": {"bias": jnp.zeros((1, 4))}}}
    state = {"moe_layers": bias, "mtp": {"block": bias}}
    new = update_router(state, {"moe_layers": stats([[3.0, 1, 2, 2]]), "mtp": stats([[0.0, 0, 0, 8]])}, 0.5)
    np.testing.assert_array_equal(new["moe_layers"]["ffn"]["router"]["bias"], [[-0.5, 0.5, 0, 0]])
    np.testing.assert_array_equal(new["mtp"]["block"]["ffn"]["router"]["bias"], [[0.5, 0.5, 0.5, -0.5]])


def test_entropy_is_that_of_the_normalised_affinities():
    for c, affinity in ((V1, softmax), (V3, lambda row: [sigmoid(value) for value in row])):
        logits = draw_logits(10)
        scores, _, _ = ours(jnp.asarray(logits, jnp.float32), c)
        entropies = []
        for b, t in np.argwhere(VALID):
            s = affinity(list(logits[b, t]))
            entropies.append(-sum(value / sum(s) * math.log(value / sum(s)) for value in s))
        np.testing.assert_allclose(balance.affinity_entropy(scores, jnp.asarray(VALID)), np.mean(entropies), rtol=1e-5)
