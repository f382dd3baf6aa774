"""The gates against the papers' rules written out slowly (tests/literal/experts.py): choice, ties, weights."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from literal.experts import best, choose, gate_weights, select, sigmoid

from deepseek_jax.config import MoE
from deepseek_jax.layers import router

E, X = 12, 3
SHAPE = dict(intermediate_size=8, moe_intermediate_size=8, n_shared_experts=1, first_k_dense_replace=0)
V3 = dict(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.5)
GATES = {
    "softmax greedy": dict(scoring_func="softmax", topk_method="greedy"),
    "softmax greedy scaled": dict(scoring_func="softmax", topk_method="greedy", routed_scaling_factor=16.0),
    "softmax in 2 of 4 groups": dict(
        scoring_func="softmax", topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
    ),
    "softmax in 4 of 4 groups": dict(
        scoring_func="softmax", topk_method="group_limited_greedy", n_group=4, topk_group=4
    ),
    "sigmoid, no groups": V3,
    "sigmoid in 2 of 4 groups": V3 | dict(n_group=4, topk_group=2),
    "sigmoid in 1 of 2 groups": V3 | dict(n_group=2, topk_group=1),
    "sigmoid in 4 of 4 groups": V3 | dict(n_group=4, topk_group=4),
    "sigmoid in 3 of 6 groups, not normalised": V3 | dict(n_group=6, topk_group=3, norm_topk_prob=False),
}
BIASES = {"no bias": (0.0, 0.0), "mixed bias": (-0.5, 0.5), "every biased score negative": (-3.0, -1.5)}


def config(gate: str) -> MoE:
    return MoE(**SHAPE, n_routed_experts=E, num_experts_per_tok=X, **GATES[gate])


@pytest.mark.smoke
@pytest.mark.parametrize("bias_range", BIASES)
@pytest.mark.parametrize("gate", GATES)
def test_gate_equals_literal_gate(gate, bias_range):
    c, draw = config(gate), np.random.default_rng(3)
    x = draw.normal(size=(4, 60, 7)).astype(np.float32)
    w = draw.normal(0, 0.5, size=(7, E)).astype(np.float32)
    bias = draw.uniform(*BIASES[bias_range], size=E).astype(np.float32)
    if c.topk_method != "noaux_tc":
        bias = None
    scores = router.affinities(jnp.asarray(x), jnp.asarray(w), c.scoring_func)
    indices = router.select_experts(scores, None if bias is None else jnp.asarray(bias), c)
    weights = router.gate_weights(scores, indices, c)
    for b, t in np.ndindex(x.shape[:2]):
        truth = choose(list(x[b, t].astype(np.float64) @ w.astype(np.float64)), bias, c)
        np.testing.assert_allclose(scores[b, t], truth.affinities, rtol=2e-6)
        assert list(np.asarray(indices[b, t])) == truth.experts
        np.testing.assert_allclose(weights[b, t], truth.weights, rtol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_of_equal_scores_the_lower_index_wins(gate):
    """Among experts and among groups. Eighths, so that sums are exact and ties are ties in every precision."""
    c, draw = config(gate), np.random.default_rng(4)
    scores = draw.integers(0, 4, size=(1, 300, E)) / 8
    bias = draw.integers(-12, 3, size=E) / 8 if c.topk_method == "noaux_tc" else None
    indices = router.select_experts(
        jnp.asarray(scores, jnp.float32), None if bias is None else jnp.asarray(bias, jnp.float32), c
    )
    expected = [select(list(token), bias, c) for token in scores[0]]
    assert np.asarray(indices[0]).tolist() == expected


def test_a_mask_of_zero_would_choose_the_wrong_experts():
    """The case that the -inf mask is for: with biased scores below 0, zeros of masked groups would win."""
    c = config("sigmoid in 1 of 2 groups")
    scores = np.linspace(0.9, 0.1, E)
    bias = np.full(E, -2.0)
    kept = [score - 2.0 if i < E // 2 else 0.0 for i, score in enumerate(scores)]
    assert best(kept, X) == [6, 7, 8]
    assert select(list(scores), bias, c) == [0, 1, 2]
    indices = router.select_experts(jnp.asarray(scores, jnp.float32)[None, None], jnp.asarray(bias, jnp.float32), c)
    assert np.asarray(indices[0, 0]).tolist() == [0, 1, 2]


def test_groups_are_ranked_by_two_experts_in_v3_and_by_one_in_v2():
    scores = np.zeros(E)
    scores[0], scores[6], scores[7] = 0.9, 0.8, 0.7  # one strong expert in the first half, two in the second
    v3 = config("sigmoid in 1 of 2 groups")
    v2 = MoE(
        **SHAPE, n_routed_experts=E, num_experts_per_tok=X, scoring_func="softmax", topk_method="group_limited_greedy",
        n_group=2, topk_group=1,
    )  # fmt: skip
    array = jnp.asarray(scores, jnp.float32)[None, None]
    assert set(np.asarray(router.select_experts(array, jnp.zeros(E), v3)[0, 0]).tolist()) == {6, 7, 8}
    assert set(np.asarray(router.select_experts(array, None, v2)[0, 0]).tolist()) == {0, 1, 2}
    assert select(list(scores), np.zeros(E), v3) == [6, 7, 8]
    assert select(list(scores), None, v2) == [0, 1, 2]


def test_bias_chooses_and_does_not_weigh():
    c = config("sigmoid, no groups")
    logits, bias = np.linspace(1.0, -1.0, E), np.zeros(E)
    bias[-1] = 5.0
    scores = jax.nn.sigmoid(jnp.asarray(logits, jnp.float32))[None, None]
    indices = router.select_experts(scores, jnp.asarray(bias, jnp.float32), c)
    assert np.asarray(indices[0, 0]).tolist() == [E - 1, 0, 1]
    chosen = [sigmoid(logits[i]) for i in (E - 1, 0, 1)]
    np.testing.assert_allclose(
        router.gate_weights(scores, indices, c)[0, 0], [2.5 * s / sum(chosen) for s in chosen], rtol=1e-6
    )


def test_router_runs_in_float32_under_bfloat16_compute():
    """bfloat16 inputs are exact in float32: the affinities must be those of the float64 product of the same values."""
    draw = np.random.default_rng(5)
    x = jnp.asarray(draw.normal(size=(1, 50, 64)), jnp.bfloat16)
    w = jnp.asarray(draw.normal(0, 0.2, size=(64, E)), jnp.float32)
    scores = router.affinities(x, w, "sigmoid")
    assert scores.dtype == jnp.float32
    logits = np.asarray(x, np.float64)[0] @ np.asarray(w, np.float64)
    np.testing.assert_allclose(scores[0], 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_literal_weights_of_the_papers_example():
    """The literal rule itself, by hand: affinities 1/2, 1/4, 1/8 of the chosen."""
    rule = SimpleNamespace(norm_topk_prob=True, routed_scaling_factor=7.0)
    assert gate_weights([0.5, 0.25, 0.125], [0, 1, 2], rule) == [4.0, 2.0, 1.0]
    rule = SimpleNamespace(norm_topk_prob=False, routed_scaling_factor=2.0)
    assert gate_weights([0.5, 0.25, 0.125], [2, 0], rule) == [0.25, 1.0]
