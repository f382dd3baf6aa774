"""V3.2's keep-routing and keep-sampling-mask: the trainer runs the experts and the token sets that the sampler ran."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import micro, random_tokens, random_variables
from literal.experts import sigmoid, softmax, swiglu

import deepseek_jax as dsj
from deepseek_jax.infer.engine import Engine, Request, Sampling
from deepseek_jax.infer.sampling import sample_recorded, settings
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe import MoELayer
from deepseek_jax.models.cached import extend, init_cache, unstack
from deepseek_jax.parallel.rules import unbox
from deepseek_jax.posttrain.objective import PolicyLoss, policy_loss
from deepseek_jax.posttrain.policy import init_policy, make_update, token_logprobs, variables_of
from deepseek_jax.posttrain.rollout import pack
from deepseek_jax.training import AdamW
from deepseek_jax.training.loss import cross_entropy_sum


def _model(kind, **fields):
    """Two layers, both of experts where the kind has them."""
    config = micro(kind, num_hidden_layers=2, **fields)
    if config.num_moe_layers:
        config = replace(config, ffn=replace(config.ffn, first_k_dense_replace=0))
    return dsj.DeepSeek(config), random_variables(config)


def _shifted(variables):
    """Another selection bias, by which nearly every token has other experts, with the same affinities."""

    def one(path, leaf):
        return leaf + 10 * (np.arange(8) % 3 == 0) if path[-1].key == "bias" and path[1].key == "moe_layers" else leaf

    return jax.tree_util.tree_map_with_path(one, variables)


@partial(jax.jit, static_argnums=0)
def _choices(model, variables, tokens):
    """Experts [B, T, L, X] that the model chooses, by running it from caches."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache = init_cache(model.config, *tokens.shape)
    _, _, experts = extend(model, unstack(model, variables), tokens, positions, cache, fresh=True)
    return jnp.moveaxis(experts, 0, 2).astype(jnp.int16)


def test_replay_of_own_choices_changes_nothing():
    """Bit for bit, values and gradients; other choices change what sees them, and are what the router counts."""
    model, variables = _model("v3", num_nextn_predict_layers=0)
    tokens = random_tokens(model.config, (2, 9))
    own = _choices(model, variables, tokens)

    @jax.jit
    def run(params, experts):
        def total(params):
            out = model.apply({**variables, "params": params}, tokens, experts=experts, method="hidden")
            return jnp.square(out.hidden).sum(), out

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


@cache
def _sampled(kind):
    """A model, what an engine sampled from it in truncated distributions, and rollouts with what it recorded.

    Prompts are prefilled in pairs, there are more samples than slots, some completions end before their limit, and padding
    is the token that they end with. The model with experts decodes with drafts.
    """
    model, variables = _model(kind)
    experts = dict(record_experts=True, speculate=True) if kind == "v3" else {}
    engine = Engine(
        model, variables, slots=4, places=32, chunk=8, decode_steps=3, prefill_rows=2, record_kept=True, **experts
    )
    prompts = [[5, 9, 11], [7], [3] * 9]

    def run(**fields):
        sampling = Sampling(max_new_tokens=10, temperature=TEMPERATURE, top_p=0.9, top_k=5, seed=1, **fields)
        return engine.generate([Request(prompt=p, sampling=sampling, samples=2) for p in prompts])

    stop = run()[1].tokens[4]
    generations = run(stop_ids=(stop,))
    assert {g.finish_reason for g in generations} == {"stop", "length"}
    rows = [p for p in prompts for _ in range(2)]
    return model, variables, generations, pack(rows, generations, np.arange(6) - 2.5, 21, pad_id=stop)


TEMPERATURE = 0.7


@partial(jax.jit, static_argnums=0)
def _drift(model, variables, rollouts, **records):
    logp, _ = token_logprobs(model, variables, rollouts.tokens, TEMPERATURE, chunk=8, **records)
    return jnp.where(rollouts.mask, jnp.abs(logp - rollouts.sampler_logprobs), 0).max()


def test_the_trainer_runs_the_experts_that_the_sampler_ran():
    """A changed selection bias chooses other experts with the same affinities: under replay nobody can tell."""
    model, variables, _, rollouts = _sampled("v3")
    run, inputs, shifted = rollouts.experts >= 0, rollouts.tokens[:, :-1], _shifted(variables)
    np.testing.assert_array_equal(np.where(run, _choices(model, variables, inputs), -1), rollouts.experts)
    lengths = np.arange(21) <= rollouts.mask.shape[1] - 1 - np.argmax(rollouts.mask[:, ::-1], axis=1)[:, None]
    np.testing.assert_array_equal(run, np.broadcast_to(lengths[..., None, None], run.shape))
    assert (_choices(model, shifted, inputs) != rollouts.experts)[run].mean() > 0.5
    assert _drift(model, variables, rollouts, kept=rollouts.kept) < 1e-5
    assert _drift(model, shifted, rollouts, kept=rollouts.kept) > 0.1
    assert _drift(model, shifted, rollouts, kept=rollouts.kept, experts=rollouts.experts) < 1e-5


@pytest.mark.parametrize("kind", ["llm-gqa", "v3"])
def test_the_trainer_draws_from_the_sets_that_the_sampler_drew_from(kind):
    """Renormalised over what top_p and top_k left; over the whole vocabulary the two would have other probabilities."""
    model, variables, generations, rollouts = _sampled(kind)
    assert _drift(model, variables, rollouts, kept=rollouts.kept, experts=rollouts.experts) < 1e-5
    assert _drift(model, variables, rollouts, experts=rollouts.experts) > 0.05
    logits = np.asarray(jax.jit(model.apply)(variables, rollouts.tokens[:, :-1]).logits, np.float64) / TEMPERATURE
    bits = np.unpackbits(rollouts.kept, axis=-1, bitorder="little").astype(bool)
    for i, t in np.ndindex(rollouts.mask.shape):
        best = np.argsort(-logits[i, t])[:5]
        shares = np.cumsum(np.exp(logits[i, t, best]) / np.exp(logits[i, t, best]).sum())
        expected = best[: 1 + int((shares < 0.9).sum())] if rollouts.mask[i, t] else []
        assert sorted(expected) == np.flatnonzero(bits[i, t]).tolist(), (i, t)
    assert [g.kept.shape for g in generations] == [(len(g.tokens), 32) for g in generations]
    assert kind == "llm-gqa" or sum(g.accepted for g in generations) > 0


def test_an_update_with_both_records_equals_autodiff_of_a_masked_softmax():
    model, variables, _, rollouts = _sampled("v3")
    model = dsj.DeepSeek(replace(model.config, num_nextn_predict_layers=0))  # they drafted, and are not trained here
    variables = {name: {k: v for k, v in tree.items() if k != "mtp"} for name, tree in variables.items()}
    bits = jnp.asarray(np.unpackbits(rollouts.kept, axis=-1, bitorder="little") | ~rollouts.mask[..., None] & 1 == 1)
    state = init_policy(AdamW(), _shifted(variables), reference=True)
    state = replace(state, reference=jax.tree.map(lambda x: np.float32(0.9) * np.asarray(x), state.reference))

    def logprobs(params, experts):
        hidden = model.apply(
            variables_of(params, state.router), rollouts.tokens[:, :-1], experts=experts, method="hidden"
        )
        logits = model.apply(variables_of(params, state.router), hidden.hidden, method="head") / TEMPERATURE
        logp = jax.nn.log_softmax(jnp.where(bits, logits, -1e30))
        entropy = -jnp.where(bits, jnp.exp(logp) * logp, 0).sum(axis=-1)
        return jnp.take_along_axis(logp, rollouts.tokens[:, 1:, None], axis=-1)[..., 0], entropy

    def objective(params):
        logp, entropy = logprobs(params, rollouts.experts)
        args = (jax.lax.stop_gradient(logp), rollouts.advantages, rollouts.mask, logprobs(state.reference, None)[0])
        return policy_loss(LOSS, logp, *args)[0], (entropy * rollouts.mask).sum() / rollouts.mask.sum()

    (value, entropy), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(state.params)
    expected = dict(loss=value, entropy=entropy, grad_norm=optax.tree.norm(grads))
    before, gradient = state.params, grads["moe_layers"]["ffn"]["router"]["w"]
    before = jax.tree.map(np.asarray, before)
    update = make_update(model, LOSS, AdamW(weight_decay=0.0), temperature=TEMPERATURE, chunk=8)
    new, metrics = update(state, rollouts, jnp.float32(1e-2))
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-4, atol=1e-6, err_msg=name)
    assert float(metrics["sampler_drift_max"]) < 1e-5 and metrics["kl"] > 0
    # Adam's first step is the gradient's sign.
    step = new.params["moe_layers"]["ffn"]["router"]["w"] - before["moe_layers"]["ffn"]["router"]["w"]
    clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
    np.testing.assert_array_equal(np.sign(step)[clear], -np.sign(gradient)[clear])
    assert clear.any(axis=(0, 1)).all()


LOSS = PolicyLoss(kl=0.1)


def test_loss_over_kept_sets_and_its_gradient():
    """Chunks that do not divide the length, a vocabulary that does not fill its bytes, places without a record."""
    draw = np.random.default_rng(0)
    B, T, D, W = 2, 7, 5, 13
    with jax.enable_x64(True):
        hidden, w = jnp.asarray(draw.normal(size=(B, T, D))), jnp.asarray(draw.normal(size=(D, W)))
        targets, weights = draw.integers(0, W, (B, T)), jnp.asarray(draw.normal(size=(B, T)))
        sets = (draw.random((B, T, W)) < 0.4) | (np.arange(W) == targets[..., None])
        sets[0, 2] = False
        bits = jnp.packbits(jnp.asarray(sets), axis=-1, bitorder="little")
        sets[0, 2] = True

        def plain(hidden, w):
            logp = jax.nn.log_softmax(jnp.where(sets, hidden @ w, -jnp.inf))
            return -(weights * jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]).sum()

        def ours(hidden, w):
            return cross_entropy_sum(hidden, w, jnp.asarray(targets), weights, 3, bits)

        value, expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, w)
        assert jax.jit(ours)(hidden, w) == pytest.approx(float(value), rel=1e-12)
        for a, b in zip(jax.jit(jax.grad(ours, (0, 1)))(hidden, w), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_recorded_sets_by_hand():
    """Greedy, whole, truncated and restricted rows of one batch."""
    logits = jnp.log(jnp.tile(jnp.array([0.4, 0.3, 0.2, 0.1] + [0.0] * 6) + 1e-9, (5, 1)))
    rows = [dict(), dict(temperature=1.0), dict(temperature=1.0, top_k=3), dict(temperature=1.0, min_p=0.6)]
    rows.append(dict(temperature=2.0, top_p=0.1))
    allowed = np.ones((5, 10), bool)
    allowed[1, 4:], allowed[3, 0] = False, False
    given, steps = settings([Sampling(**row) for row in rows], allowed), jnp.zeros(5, jnp.int32)
    *_, bits = jax.jit(sample_recorded, static_argnums=4)(logits, given, jnp.zeros((5, 10), bool), steps, "truncated")
    sets = [np.flatnonzero(row).tolist() for row in np.unpackbits(bits, axis=1, count=10, bitorder="little")]
    assert sets == [[0], [0, 1, 2, 3], [0, 1, 2], [1, 2], [0]]
    assert bits.shape == (5, 2) and bits.dtype == jnp.uint8


def test_what_cannot_be_recorded_is_named():
    model = dsj.DeepSeek(micro("llm"))
    request = Request(prompt=[1], sampling=Sampling(max_new_tokens=4, repetition_penalty=1.2))
    with pytest.raises(ValueError, match=r"repetition_penalty = 1.2 of the prompt: must be 1 with record_kept"):
        Engine(model, None, places=32, record_kept=True).submit(request)
    done = dsj.Generation(tokens=[1], sampled_logprobs=[-1.0], finish_reason="length", kept=np.ones((1, 2), np.uint8))
    with pytest.raises(ValueError, match="completion 1 has no kept, which others have"):
        pack([[1], [2]], [done, replace(done, kept=None)], [0.0, 0.0], 5)
