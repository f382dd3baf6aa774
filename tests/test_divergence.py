"""The divergences of distillation against loops over tokens, and an update against whole logits."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, micro, random_tokens, random_variables

import deepseek_jax as dsj
from deepseek_jax.posttrain.distill_step import Batch, make_distill_update, make_measure
from deepseek_jax.posttrain.divergence import Divergence, Live, divergence_sums, kl, kl_from_top_k, top_k_of
from deepseek_jax.posttrain.policy import init_policy
from deepseek_jax.training.config import AdamW

# The loss of one place, written out; numbers are Python's.


def softmax(logits, temperature=1.0):
    raised = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [x / sum(raised) for x in raised]


def literal_kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def literal(kind, student, teachers, target):
    """The loss at a place and its gradient by the student's logits, which is derived by hand."""
    tau, W = kind.temperature, len(student)
    p, loss, slope = softmax(student, tau), 0.0, [0.0] * W
    for weight, teacher in zip(kind.weights, teachers, strict=True):
        q = softmax(teacher, tau)
        if kind.direction == "reverse":
            far = literal_kl(p, q)
            d = [p[v] * (math.log(p[v]) - math.log(q[v]) - far) for v in range(W)]
        elif kind.top_k is None or kind.top_k == W:
            far, d = literal_kl(q, p), [p[v] - q[v] for v in range(W)]
        else:
            best = sorted(range(W), key=lambda v: -q[v])[: kind.top_k]
            others = [v for v in range(W) if v not in best]
            p_rest, q_rest = sum(p[v] for v in others), sum(q[v] for v in others)
            far = literal_kl([q[v] for v in best] + [q_rest], [p[v] for v in best] + [p_rest])
            d = [p[v] - (q[v] if v in best else q_rest * p[v] / p_rest) for v in range(W)]
        loss += (1 - kind.mix) * tau**2 * weight * far
        slope = [s + (1 - kind.mix) * tau * weight * x for s, x in zip(slope, d, strict=True)]
    if kind.mix:
        p = softmax(student)
        loss -= kind.mix * math.log(p[target])
        slope = [s + kind.mix * (p[v] - (v == target)) for v, s in enumerate(slope)]
    return loss, slope


KINDS = {
    "reverse of two": Divergence((0.7, 2.0), "reverse"),
    "forward": Divergence((1.0, 0.3)),
    "forward, warm, mixed": Divergence((1.0, 0.5), temperature=2.5, mix=0.3),
    "top 3, warm, mixed": Divergence((0.8, 0.5), temperature=1.7, mix=0.2, top_k=3),
    "all as top k": Divergence((1.0,), top_k=11),
}


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_those_of_loops_over_tokens(name):
    """Float64; chunks that do not divide the places; places that do not count, whatever stands there."""
    kind, (B, T, D, E, W) = KINDS[name], (2, 7, 5, 4, 11)
    draw = np.random.default_rng(len(name))
    hidden, w = draw.normal(size=(B, T, D)), draw.normal(size=(D, W))
    theirs = [(draw.normal(size=(B, T, E)), draw.normal(size=(E, W)) * 2) for _ in kind.weights]
    targets, weights = draw.integers(0, W, (B, T)), draw.random((B, T)) * (draw.random((B, T)) < 0.6)
    expected, dh, dw = 0.0, np.zeros_like(hidden), np.zeros_like(w)
    for b in range(B):
        for t in range(T):
            if weights[b, t]:
                teachers = [list(h[b, t] @ their_w) for h, their_w in theirs]
                loss, slope = literal(kind, list(hidden[b, t] @ w), teachers, targets[b, t])
                expected += weights[b, t] * loss
                dh[b, t] = weights[b, t] * (w @ np.array(slope))
                dw += weights[b, t] * np.outer(hidden[b, t], slope)
    with jax.enable_x64(True):
        live = tuple(Live(*map(jnp.asarray, one)) for one in theirs)
        stored = tuple(top_k_of(h @ v / kind.temperature, kind.top_k or W) for h, v in theirs)
        assert stored[0].ids.shape == (B, T, kind.top_k or W)
        asked = (live,) if kind.direction == "reverse" else (live, stored)
        for teachers in asked:

            @jax.jit
            def loss_and_gradient(hidden, w, teachers):
                def loss(hidden, w):
                    return divergence_sums(kind, hidden, w, teachers, jnp.asarray(targets), jnp.asarray(weights), 3)

                return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, w), loss(hidden, w)[0]

            ((value, figures), grads), alone = loss_and_gradient(hidden, w, teachers)
            np.testing.assert_allclose(alone, value, rtol=1e-12)  # no gradient is asked for
            np.testing.assert_allclose(value, expected, rtol=1e-10)
            np.testing.assert_allclose(grads[0], dh, atol=1e-10)
            np.testing.assert_allclose(grads[1], dw, atol=1e-10)
            weighted = sum(weight * figures[f"kl_{i}"] for i, weight in enumerate(kind.weights))
            np.testing.assert_allclose(figures["kl"], weighted)
            assert 0 <= figures["agreement_0"] <= weights.sum()
            strange = np.where(weights[..., None] > 0, hidden, 1e3)
            ((value, _), again), _ = loss_and_gradient(strange, w, teachers)
            np.testing.assert_allclose(value, expected, rtol=1e-10)
            np.testing.assert_allclose(again[1], dw, atol=1e-10)


def test_the_divergence_of_the_likeliest_tokens_is_at_most_the_whole():
    draw = np.random.default_rng(3)
    student, teacher = (jnp.asarray(3 * draw.normal(size=(4, 6, 50)), jnp.float32) for _ in range(2))

    @jax.jit
    def found(student, teacher):
        return [kl_from_top_k(top_k_of(teacher, k), student) for k in (1, 5, 20, 50)] + [kl(teacher, student)]

    *parts, whole = found(student, teacher)
    for less, more in itertools.pairwise([*parts, whole]):
        assert (less <= more + 1e-5).all()
    assert (parts[0] < 0.5 * whole).any()
    np.testing.assert_allclose(parts[-1], whole, rtol=1e-5, atol=1e-6)


def test_an_update_in_pieces_is_autodiff_through_whole_logits():
    config = micro("llm-gqa", num_hidden_layers=1)
    other = micro("llm-gqa", num_hidden_layers=1, hidden_size=24)
    variables, theirs = random_variables(config), random_variables(other, seed=9)
    model, teacher, optimizer, kind = dsj.DeepSeek(config), dsj.DeepSeek(other), AdamW(), Divergence((0.5,), "reverse")
    tokens = random_tokens(config, (4, 10))
    mask = np.arange(9) >= np.array([[2], [5], [3], [9]])  # the last row counts nothing
    batch = Batch(tokens, jnp.asarray(mask))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @jax.value_and_grad
    def whole(params):
        p = jax.nn.log_softmax(model.apply({"params": params}, tokens[:, :-1]).logits)
        q = jax.nn.log_softmax(teacher.apply(theirs, tokens[:, :-1]).logits)
        return 0.5 * jnp.where(mask, (jnp.exp(p) * (p - q)).sum(axis=-1), 0).sum() / mask.sum()

    value, grads = whole(variables["params"])
    norm = math.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in jax.tree.leaves(grads)))
    begin = jax.jit(partial(init_policy, optimizer, reference=False))
    update = make_distill_update(model, (teacher,), kind, optimizer, mesh, chunk=4, pieces=2)
    new, metrics = update(begin(variables), (theirs,), batch, jnp.float32(1e-2))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    moments = new.opt_state[1][0].mu
    clipped = jax.tree.map(lambda g: 0.1 * min(1.0, 1.0 / norm) * np.asarray(g), grads)
    assert_trees_close(moments, clipped, rtol=1e-4)
    assert metrics["applied"] and metrics["kl_0"] == pytest.approx(2 * float(value), rel=1e-5)
    sums = make_measure(model, (teacher,), kind, mesh, chunk=4)(variables, (theirs,), batch)
    for name in ("loss", "kl", "kl_0", "agreement_0", "entropy", "cross_entropy"):
        np.testing.assert_allclose(sums[name] / mask.sum(), metrics[name], rtol=1e-5, atol=1e-7)
    nan = jax.tree.map(lambda x: x * np.nan, theirs)
    after, metrics = update(begin(variables), (nan,), batch, jnp.float32(1e-2))
    assert not metrics["applied"]
    jax.tree.map(np.testing.assert_array_equal, after, begin(variables))
