"""The update of a policy: against the whole logits and plain autodiff, and against what the engine sampled from."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, micro, random_variables
from marks import study

import deepseek_jax as dsj
from deepseek_jax.infer.engine import Engine, Request, Sampling
from deepseek_jax.models.cached import unstack
from deepseek_jax.posttrain.advantage import group_advantages
from deepseek_jax.posttrain.objective import PolicyLoss, policy_loss
from deepseek_jax.posttrain.policy import Rollouts, init_policy, make_update, token_logprobs, variables_of
from deepseek_jax.posttrain.rollout import pack, require_same
from deepseek_jax.training import AdamW
from deepseek_jax.training.optimizer import make_optimizer


def _rollouts(config, B=4, T=11):
    draw = np.random.default_rng(0)
    mask = np.arange(T) >= 4
    mask = mask & (np.arange(T) < draw.integers(5, T + 1, B)[:, None])
    return Rollouts(
        tokens=jnp.asarray(draw.integers(0, config.vocab_size, (B, T + 1)), jnp.int32),
        mask=jnp.asarray(mask),
        advantages=jnp.asarray(draw.normal(size=(B, 1)), jnp.float32),
        sampler_logprobs=jnp.asarray(-draw.random((B, T)), jnp.float32),
    )


@pytest.mark.parametrize("kind", ["llm-gqa", study("v3")])
def test_an_update_equals_autodiff_through_whole_logits(kind):
    config = micro(kind, num_hidden_layers=2, num_nextn_predict_layers=0)
    model, variables = dsj.DeepSeek(config), random_variables(config)
    temperature, loss, optimizer = 0.7, PolicyLoss(kl=0.1, importance_cap=2.0), AdamW(weight_decay=0.01)
    rollouts, state = _rollouts(config), init_policy(AdamW(weight_decay=0.01), variables, reference=True)
    state = replace(state, reference=jax.tree.map(lambda x: 0.9 * x, state.reference))

    def logprobs(params):
        logits = model.apply(variables_of(params, state.router), rollouts.tokens[:, :-1]).logits / temperature
        targets = rollouts.tokens[:, 1:, None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)[..., 0]

    ours, entropy = token_logprobs(model, variables, rollouts.tokens, temperature, chunk=4)
    np.testing.assert_allclose(ours, logprobs(variables["params"]), atol=2e-5)
    assert entropy.shape == ours.shape and float(entropy.min()) >= 0

    def objective(params):
        logp = logprobs(params)
        args = (jax.lax.stop_gradient(logp), rollouts.advantages, rollouts.mask, logprobs(state.reference))
        return policy_loss(loss, logp, *args, rollouts.sampler_logprobs)[0]

    value, grads = jax.value_and_grad(objective)(state.params)
    updates, _ = make_optimizer(optimizer, lambda step: 1e-2).update(grads, state.opt_state, state.params)
    expected = optax.apply_updates(state.params, updates)
    new, metrics = make_update(model, loss, optimizer, temperature=temperature, chunk=4)(
        state, rollouts, jnp.float32(1e-2)
    )
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-3)
    assert_trees_close(new.params, expected, rtol=2e-2)  # Adam's first step is the gradient's sign: rounding shows
    assert int(new.step) == 1 and metrics["kl"] > 0


@pytest.mark.parametrize("ratio", [study("token"), "sequence"])
def test_pieces_and_stated_old_probabilities_change_nothing(ratio):
    config = micro("moe", num_hidden_layers=1)  # experts around the plainest attention: five programs compile
    config = replace(config, ffn=replace(config.ffn, first_k_dense_replace=0))
    model, variables = dsj.DeepSeek(config), random_variables(config)
    loss, optimizer = PolicyLoss(ratio=ratio, kl=0.1, clip_high=0.3, off_policy_mask=5.0), AdamW()
    rollouts = _rollouts(config)
    logp, _ = token_logprobs(model, variables, rollouts.tokens)

    def updated(rollouts, pieces):
        state = init_policy(optimizer, variables, reference=True)
        return make_update(model, loss, optimizer, pieces=pieces)(state, rollouts, jnp.float32(1e-2))

    whole, expected = updated(rollouts, 1)
    for changed, pieces in ((rollouts, 2), (rollouts, 4), (replace(rollouts, old_logprobs=logp), 2)):
        state, metrics = updated(changed, pieces)
        for name in expected:
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
        assert_trees_close(state.params, whole.params, rtol=2e-2)
    _, shifted = updated(replace(rollouts, old_logprobs=logp - 1), 1)
    assert shifted["clipped_high"] > 0.05 and shifted["ratio"] > 1.5


def test_what_is_not_finite_is_not_applied():
    config = micro("llm-gqa", num_hidden_layers=2)
    state = init_policy(AdamW(), random_variables(config), reference=False)
    before = jax.tree.map(jnp.array, state)
    rollouts = replace(_rollouts(config), advantages=jnp.full((4, 1), jnp.nan))
    after, metrics = make_update(dsj.DeepSeek(config), PolicyLoss(kl=0.0), AdamW())(state, rollouts, jnp.float32(1.0))
    assert not metrics["applied"]
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("kind", ["llm-gqa", "v3"])
def test_sampler_and_trainer_have_the_same_probabilities(kind):
    """Cached decoding in slots against one padded forward pass; padding is the end token, which is learned nevertheless."""
    config = micro(kind, num_hidden_layers=2)
    model, variables = dsj.DeepSeek(config), random_variables(config)
    prompts = [[5, 9, 11], [7], [3] * 9]
    sampling = Sampling(max_new_tokens=12, temperature=0.8, seed=1, stop_ids=(config.eos_token_id,))
    engine = Engine(model, variables, slots=4, places=32, chunk=8)
    generations = engine.generate([Request(prompt=p, sampling=sampling, samples=2) for p in prompts])
    stop = generations[1].tokens[5]  # make it an end, so that a completion stops before its limit
    generations = engine.generate(
        [Request(prompt=p, sampling=replace(sampling, stop_ids=(stop,)), samples=2) for p in prompts]
    )
    assert {g.finish_reason for g in generations} == {"stop", "length"}
    rows = [p for p in prompts for _ in range(2)]
    rollouts = pack(rows, generations, np.zeros(6), 24, pad_id=stop)
    assert int(rollouts.mask.sum()) == sum(len(g.tokens) for g in generations)
    logp, _ = token_logprobs(model, variables, rollouts.tokens, 0.8)
    drift = jnp.where(rollouts.mask, jnp.abs(logp - rollouts.sampler_logprobs), 0)
    assert float(drift.max()) < 1e-5
    ended = next(i for i, g in enumerate(generations) if g.finish_reason == "stop")
    last = len(rows[ended]) + len(generations[ended].tokens) - 2
    assert rollouts.mask[ended, last] and not rollouts.mask[ended, last + 1]
    assert rollouts.tokens[ended, last + 1] == rollouts.tokens[ended, last + 2] == stop


def test_rewards_teach_a_policy():
    """From random weights: completions of more even tokens are rewarded, and soon most are even."""
    config = micro("v3", num_hidden_layers=2, num_nextn_predict_layers=0, vocab_size=64)
    model = dsj.DeepSeek(config)
    variables = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    optimizer, loss = AdamW(weight_decay=0.0), PolicyLoss(kl=0.0, aggregation="dr_grpo", max_tokens=6)
    state, update = init_policy(optimizer, variables, reference=False), make_update(model, loss, optimizer)
    shares = []
    for step in range(12):
        engine = Engine(model, variables_of(state.params, state.router), slots=32, places=8, chunk=8, decode_steps=5)
        requests = [
            Request(prompt=[p + 1], sampling=Sampling(max_new_tokens=6, temperature=1.0, seed=step), samples=8)
            for p in range(4)
        ]
        generations = engine.generate(requests)
        rewards = jnp.array([np.mean([t % 2 == 0 for t in g.tokens]) for g in generations])
        groups = jnp.repeat(jnp.arange(4), 8)
        advantages, _ = group_advantages(rewards, groups, 4, "none")
        rollouts = pack([r.prompt for r in requests for _ in range(8)], generations, advantages, 7)
        state, metrics = update(state, rollouts, jnp.float32(1e-2))
        assert float(metrics["sampler_drift_max"]) < 1e-5
        shares.append(float(rewards.mean()))
    assert shares[0] < 0.65 < 0.8 < shares[-1]


def test_stale_and_missing_weights_are_seen():
    config = micro("v3", num_hidden_layers=2)
    model, variables = dsj.DeepSeek(config), random_variables(config)
    weights = unstack(model, variables)
    require_same(model, variables, weights)
    require_same(model, variables, unstack(model, variables, few_rows=True))
    changed = jax.tree.map(jnp.array, variables)
    changed["params"]["moe_layers"]["attention"]["w_o"] = (
        changed["params"]["moe_layers"]["attention"]["w_o"].at[0, 0].add(1)
    )
    with pytest.raises(ValueError, match=r"1 of \d+ leaves of the sampler are not the trainer's, .*w_o"):
        require_same(model, changed, weights)
    with pytest.raises(ValueError, match="differ in their leaves"):
        require_same(model, variables, replace(weights, mtp=()))


def test_rows_that_do_not_fit_are_named():
    done = dsj.Generation(tokens=[1, 2], sampled_logprobs=[-1.0, -1.0], finish_reason="length")
    for prompts, generations, said in (
        ([[1] * 9], [done], "completion 0 has 11 tokens with its prompt, more than length . 1 = 6"),
        ([[]], [done], "prompt 0 is empty"),
        ([[1]], [dsj.Generation()], "completion 0 has not ended"),
        ([], [done], "0 prompts for 1 completions"),
    ):
        with pytest.raises(ValueError, match=said):
            pack(prompts, generations, [0.0], 5)
