"""Updates that are left out: nothing changes but the count; a run with a bad batch is the run without it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro, random_tokens, run_config

from deepseek_jax.training import step as step_module
from deepseek_jax.training.config import AdamW, SpikeSkip
from deepseek_jax.training.guard import all_finite, init_guard, judge
from deepseek_jax.training.loss import loss_parts
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.schedule import MultiStep
from deepseek_jax.training.state import init_state, new_state
from deepseek_jax.training.step import make_train_step

BAD = 7  # a batch whose first token is this one is bad


def _run(**fields):
    """V3's gates, with their bias, around the plainest attention: these programs compile quickly."""
    config = micro("moe", num_hidden_layers=1, initializer_range=0.2)
    config = replace(config, ffn=replace(micro("v3").ffn, first_k_dense_replace=0))
    return run_config(config, batch_size=2, ema_decay=0.9, **fields)


def _batches(run, count, bad=()):
    batches = []
    for i in range(count):
        tokens = np.array(random_tokens(run.model, (run.batch_size, run.seq_len + 1), seed=i))
        tokens[0, 0] = BAD if i in bad else BAD + 1
        batches.append({"tokens": jnp.asarray(tokens)})
    return batches


def _follow(step, state, batches):
    lines = []
    for batch in batches:
        state, metrics = step(state, batch)
        lines.append(jax.device_get(metrics))
    return state, lines


def _poisoned(monkeypatch, factor):
    """`factor` times the loss, and its gradient, of bad batches."""

    def parts(config, params, router, batch, *rest):
        total, losses = loss_parts(config, params, router, batch, *rest)
        return total * jnp.where(batch["tokens"][0, 0] == BAD, factor, 1.0), losses

    monkeypatch.setattr(step_module, "loss_parts", parts)


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_update_that_is_not_finite_is_not_applied(monkeypatch, factor):
    _poisoned(monkeypatch, factor)
    run = _run()
    step, state = jax.jit(make_train_step(run)), init_state(run)
    batches = _batches(run, 4, bad=(1, 2))
    after_one, _ = step(state, batches[0])
    after_three, lines = _follow(step, state, batches[:3])
    jax.tree.map(np.testing.assert_array_equal, after_three.replace(guard=None), after_one.replace(guard=None))
    assert [int(line["skipped"]) for line in lines] == [0, 1, 2]
    assert [int(line["skipped_in_a_row"]) for line in lines] == [0, 1, 2]
    whole, lines = _follow(step, state, batches)
    assert int(lines[-1]["skipped_in_a_row"]) == 0 and int(whole.step) == 2 and int(whole.guard.skipped) == 2
    without, _ = _follow(step, state, [batches[0], batches[3]])
    jax.tree.map(np.testing.assert_array_equal, whole.replace(guard=None), without.replace(guard=None))


def test_spike_is_left_out_as_if_the_batch_were_not_there(monkeypatch):
    _poisoned(monkeypatch, 10.0)
    run = _run(spike_skip=SpikeSkip(window=8, sigma=6.0), steps=30)
    step, state = jax.jit(make_train_step(run)), init_state(run)
    batches = _batches(run, 14, bad=(9,))
    whole, lines = _follow(step, state, batches)
    assert [int(line["skipped"]) for line in lines] == [0] * 9 + [1] * 5
    without, _ = _follow(step, state, batches[:9] + batches[10:])
    jax.tree.map(
        np.testing.assert_array_equal,
        whole.replace(guard=whole.guard.replace(skipped=0)),
        without.replace(guard=without.guard.replace(skipped=0)),
    )


def test_judge_by_hand():
    config = SpikeSkip(window=4, sigma=2.0)
    guard = init_guard(config)
    for loss in (1.0, 3.0):  # mean 2, standard deviation 1: the bound is 4
        ok, guard = judge(config, guard, jnp.float32(loss), jnp.float32(1))
        assert ok
    assert judge(config, guard, jnp.float32(3.99), jnp.float32(1))[0]
    ok, after = judge(config, guard, jnp.float32(4.01), jnp.float32(1))
    assert not ok and int(after.seen) == 2 and int(after.skipped) == 1
    assert not judge(config, guard, jnp.float32(2), jnp.float32(1.5))[0], "the norms seen do not vary: 1 is their bound"
    assert not judge(None, init_guard(None), jnp.float32(jnp.nan), jnp.float32(1))[0]
    assert not judge(None, init_guard(None), jnp.float32(1), jnp.float32(jnp.inf))[0]


def test_running_mean_and_stored_moments():
    """EMA as its formula; moments in bfloat16 are rounded, between updates only, from those that float32 gives."""
    run = _run(optimizer=AdamW(moment_dtype="bfloat16"), schedule=MultiStep(peak=1e-2, warmup_steps=0))
    plain = replace(run, optimizer=AdamW())
    state, [batch] = init_state(run), _batches(run, 1)
    new, _ = jax.jit(make_train_step(run))(state, batch)
    other, _ = jax.jit(make_train_step(plain))(new_state(plain, state.params, state.router), batch)
    ours, theirs = new.opt_state[1][0], other.opt_state[1][0]
    for one, full in ((ours.mu, theirs.mu), (ours.nu, theirs.nu)):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), one, full)
    jax.tree.map(np.testing.assert_array_equal, new.params, other.params)
    expected = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, state.ema, new.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), new.ema, expected)


def test_batch_of_another_size_has_more_pieces():
    """A ramp's smaller batch gives what a run of that batch size gives."""
    run = _run()
    run = replace(run, batch_size=8, accumulation=4)
    small = replace(run, batch_size=4, accumulation=2)
    state = init_state(run)
    batch = {"tokens": random_tokens(run.model, (4, run.seq_len + 1))}
    ours, _ = jax.jit(make_train_step(run))(state, batch)
    theirs, _ = jax.jit(make_train_step(small))(state, batch)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ValueError, match="3 sequences.*multiple of batch_size / accumulation = 2"):
        jax.eval_shape(make_train_step(run), state, {"tokens": batch["tokens"][:3]})


@pytest.mark.parametrize("ok", [True, False])
def test_moments_of_the_host_follow_the_same_rule_or_stay(ok):
    draw = np.random.default_rng(0)
    shapes = {"moe_layers": {"w": (3, 4, 5), "scale": (3, 4)}, "head": {"w": (4, 6)}}

    def tree() -> dict:
        return jax.tree.map(
            lambda shape: jnp.asarray(draw.standard_normal(shape), jnp.float32), shapes,
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )  # fmt: skip

    params, grads = tree(), tree()
    here, there = (make_optimizer(AdamW(), lambda step: jnp.float32(0.1), on_host=host) for host in (False, True))
    _, state = here.update(tree(), here.init(params), params)
    host = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Host) if leaf.ndim else leaf, state)
    wanted, new = here.update(grads, state, params)
    updates, after = jax.jit(lambda grads, state: there.update(grads, state, params, ok=jnp.bool_(ok)))(grads, host)
    new = jax.tree.map(lambda new, old: new if ok or not new.ndim else old, new, state)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), (updates, after), (wanted, new))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(after) if leaf.ndim} == {"pinned_host"}


@pytest.mark.parametrize("where", ["stack", "matrix", "scale"])
def test_what_is_not_finite_is_found_at_the_host_too(where):
    tree = {"stack": jnp.ones((3, 4, 5)), "matrix": jnp.ones((4, 5)), "scale": jnp.ones(4), "count": jnp.int32(3)}
    at_host = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Host) if leaf.ndim else leaf, tree)
    assert all_finite(at_host)
    broken = jnp.full_like(tree[where], jnp.nan).at[..., 1:].set(1)
    assert not all_finite({**at_host, where: jax.device_put(broken, jax.memory.Space.Host)})
