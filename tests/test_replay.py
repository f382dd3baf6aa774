"""V3.2's keep-routing and keep-sampling-mask: the trainer runs the experts and the token sets that the sampler ran."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro, random_tokens, random_variables
from literal.experts import sigmoid, softmax, swiglu

import deepseek_jax as dsj
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe import MoELayer
from deepseek_jax.models.cached import extend, init_cache, unstack
from deepseek_jax.parallel.rules import unbox


@pytest.fixture(autouse=True)
def full_precision():
    """GPUs multiply float32 in TF32 unless told otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def _model(kind):
    """Two layers, both of experts where the kind has them."""
    config = micro(kind, num_hidden_layers=2)
    if config.num_moe_layers:
        config = replace(config, ffn=replace(config.ffn, first_k_dense_replace=0))
    return dsj.DeepSeek(config), random_variables(config)


def _shifted(variables):
    """The router's bias turned about, so that every token has other experts."""
    other = jax.tree.map(jnp.array, variables)
    bias = other["router"]["moe_layers"]["ffn"]["router"]["bias"]
    other["router"]["moe_layers"]["ffn"]["router"]["bias"] = jnp.roll(bias, 1, axis=-1) + 10 * (
        jnp.arange(bias.shape[-1]) % 3 == 0
    )
    return other


@partial(jax.jit, static_argnums=0)
def _choices(model, variables, tokens):
    """Experts [B, T, L, X] that the model chooses, by running it from caches."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache = init_cache(model.config, *tokens.shape)
    _, _, experts = extend(model, unstack(model, variables), tokens, positions, cache, fresh=True)
    return jnp.moveaxis(experts, 0, 2).astype(jnp.int16)


def test_replay_of_own_choices_changes_nothing():
    """Bit for bit, values and gradients; multi-token modules choose as they did."""
    model, variables = _model("v3")
    tokens = random_tokens(model.config, (2, 9))
    own = _choices(model, variables, tokens)

    @jax.jit
    def run(params, experts):
        def total(params):
            out = model.apply({**variables, "params": params}, tokens, experts=experts, method="hidden")
            return jnp.square(out.hidden).sum() + jnp.square(out.mtp_hidden).sum(), out

        return jax.value_and_grad(total, has_aux=True)(params)

    live = run(variables["params"], None)
    jax.tree.map(np.testing.assert_array_equal, run(variables["params"], own), live)
    jax.tree.map(np.testing.assert_array_equal, run(variables["params"], jnp.full_like(own, -1)), live)
    other = own.at[:, 4:].set((own[:, 4:] + 1) % 8)  # from place 4 on other experts, and no change before
    out, expected = run(variables["params"], other)[0][1], live[0][1]
    np.testing.assert_array_equal(out.hidden[:, :4], expected.hidden[:, :4])
    assert float(jnp.abs(out.hidden[:, 4:] - expected.hidden[:, 4:]).min(axis=1).max()) > 1e-3
    counts = jax.vmap(lambda x: jnp.bincount(x.reshape(-1), length=8), in_axes=2)(other)
    np.testing.assert_array_equal(out.router["moe_layers"].load, counts)


@pytest.mark.parametrize("gate", ["moe", "v3"])
def test_gradient_of_the_router_under_replay_equals_the_literal_one(gate):
    """Affinities of the present router at recorded experts, normalised and scaled as the member does, and a −1 that chooses."""
    ffn = replace(
        micro(gate).ffn, n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=3, n_shared_experts=0
    )
    B, T, D, X = 2, 3, 5, 2
    with jax.enable_x64(True):
        layer, draw = MoELayer(ffn, param_dtype="float64", stddev=0.5), np.random.default_rng(0)
        x, out_weights = draw.normal(size=(B, T, D)), draw.normal(size=(B, T, D))
        recorded = np.array([[[3, 0], [1, 2], [-1, -1]], [[0, 1], [2, 3], [3, 2]]], np.int16)
        zeros, valid = jnp.zeros((B, T, 1)), jnp.ones((B, T), bool)
        context = Context(cos=zeros, sin=zeros, segment_ids=None, valid=valid, exempt=None)
        variables = jax.tree.map(np.asarray, unbox(layer.init(jax.random.key(0), jnp.asarray(x), context)))
        params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

        def ours(w):
            changed = {**params, "router": {"w": w}}
            return (layer.apply({"params": changed, **rest}, jnp.asarray(x), context, recorded)[0] * out_weights).sum()

        value, gradient = jax.jit(jax.value_and_grad(ours))(params["router"]["w"])

    def theirs(w):
        total = 0.0
        for b in range(B):
            for t in range(T):
                logits = [float(x[b, t] @ w[:, e]) for e in range(4)]
                scores = [sigmoid(logit) for logit in logits] if gate == "v3" else softmax(logits)
                chosen = list(recorded[b, t])
                if chosen[0] < 0:
                    chosen = sorted(range(4), key=lambda e: -scores[e])[:X]
                norm = sum(scores[e] for e in chosen) if gate == "v3" else 1.0
                for e in chosen:
                    expert = {name: np.asarray(params["experts"][name][e]) for name in ("w_gate", "w_up", "w_down")}
                    out = swiglu(expert, x[b, t]) @ out_weights[b, t]
                    total += scores[e] / norm * ffn.routed_scaling_factor * out
        return total

    w = np.asarray(params["router"]["w"])
    assert value == pytest.approx(theirs(w), rel=1e-12)
    for i in np.ndindex(w.shape):
        h = np.zeros_like(w)
        h[i] = 1e-5
        slope = (theirs(w + h) - theirs(w - h)) / 2e-5
        assert gradient[i] == pytest.approx(slope, rel=1e-6, abs=1e-9), i


def test_records_that_do_not_fit_are_named():
    tokens = jnp.zeros((1, 3), jnp.int32)
    for kind, experts, said in (
        ("llm", jnp.zeros((1, 3, 2, 2), jnp.int16), "has none"),
        ("v3", jnp.zeros((1, 3, 1, 2), jnp.int16), r"must be signed integers \(1, 3, 2, 2\), not int16 \(1, 3, 1, 2\)"),
        ("v3", jnp.zeros((1, 3, 2, 2), jnp.uint8), "not uint8"),
    ):
        model = dsj.DeepSeek(micro(kind, num_hidden_layers=3))
        with pytest.raises(ValueError, match=said):
            jax.eval_shape(
                lambda model=model, e=experts: model.init(jax.random.key(0), tokens, experts=e, method="hidden")
            )
