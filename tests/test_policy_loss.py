"""Values and gradients of the policy objectives against a literal transcription, on random ragged groups."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from literal import policy as literal

from deepseek_jax.posttrain.advantage import group_advantages, process_advantages
from deepseek_jax.posttrain.objective import PolicyLoss, kl_estimate, policy_loss

B, T = 6, 9


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def _rollouts(seed):
    """Log-probabilities some of which leave every clip, ragged masks with a row that counts nothing, rubbish outside."""
    draw = np.random.default_rng(seed)
    mask = np.arange(T) < draw.integers(1, T + 1, B)[:, None]
    mask[:, 0] &= draw.random(B) < 0.7
    mask[2] = False
    logp = -draw.random((B, T)) * 3
    old, reference, sampler = (logp + draw.normal(size=(B, T)) * scale for scale in (0.4, 0.5, 0.3))
    arrays = [np.where(mask, x, 1e4 * draw.normal(size=(B, T))) for x in (logp, old, reference, sampler)]
    return (mask, draw.normal(size=(B, 1)) * np.ones((1, T)), *arrays)


CONFIGS = [
    PolicyLoss(),
    PolicyLoss(ratio="sequence", clip_high=10.0, clip_low=0.9),
    PolicyLoss(aggregation="dapo", clip_high=0.28, kl=0.0),
    PolicyLoss(aggregation="dr_grpo", max_tokens=32, kl=0.04, kl_estimator="k2"),
    PolicyLoss(kl=0.3, kl_estimator="k1", dual_clip=1.3),
    PolicyLoss(kl=0.3, unbiased_kl=True, off_policy_mask=0.05),
    PolicyLoss(kl=0.2, importance_cap=1.1),
    PolicyLoss(ratio="sequence", importance_cap=1.5, off_policy_mask=0.01, dual_clip=2.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(str(v) for v in vars(c).values()))
def test_loss_and_gradient_equal_the_literal_objective(config):
    for seed in range(4):
        mask, advantage, logp, old, reference, sampler = _rollouts(seed)

        def ours(x):
            return policy_loss(config, x, old, advantage, mask, reference, sampler)[0]  # noqa: B023

        def theirs(x):
            return -literal.objective(config, x, old, advantage, mask, reference, sampler)  # noqa: B023

        value, gradient = jax.value_and_grad(ours)(jnp.asarray(logp))
        assert value == pytest.approx(theirs(logp), rel=1e-12, abs=1e-14)
        for i, t in itertools.product(range(B), range(T)):
            # The mask of V3.2 and the sampler's weight carry no gradient, as in the formulas: their inputs are constants.
            h = np.zeros((B, T))
            h[i, t] = 1e-6
            slope = (theirs(logp + h) - theirs(logp - h)) / 2e-6
            assert gradient[i, t] == pytest.approx(slope, rel=1e-5, abs=1e-9), (i, t)
            assert mask[i, t] or gradient[i, t] == 0


def test_pieces_of_a_batch_add_up():
    mask, advantage, logp, old, reference, _ = _rollouts(7)
    for config in CONFIGS[:4]:
        whole, _ = policy_loss(config, logp, old, advantage, mask, reference)
        totals = dict(completions=float(mask.any(axis=1).sum()), tokens=float(mask.sum()))
        parts = [
            policy_loss(config, logp[s], old[s], advantage[s], mask[s], reference[s], **totals)[0]
            for s in (slice(0, 2), slice(2, 6))
        ]
        assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)


def test_the_first_update_has_ratio_one():
    """Value 0 at β = 0 and zero-mean advantages, and yet a gradient: the loss is no sign of progress."""
    mask, _, logp, *_ = _rollouts(1)
    mask = np.ones_like(mask)
    advantage = np.array([1.0, -1, 2, -2, 0.5, -0.5])[:, None]
    loss, gradient = jax.value_and_grad(lambda x: policy_loss(PolicyLoss(kl=0), x, logp, advantage, mask)[0])(
        jnp.asarray(logp)
    )
    np.testing.assert_allclose(loss, 0, atol=1e-15)
    np.testing.assert_allclose(gradient, -advantage / (B * T) * np.ones((1, T)), rtol=1e-12)


def test_metrics():
    mask, advantage, logp, old, reference, _ = _rollouts(3)
    _, metrics = policy_loss(PolicyLoss(kl=0.1), logp, old, advantage, mask, reference)
    ratio, a = np.exp((logp - old)[mask]), advantage[mask]
    assert metrics.ratio == pytest.approx(ratio.mean())
    assert metrics.clipped_high == pytest.approx(((ratio > 1.2) & (a > 0)).mean())
    assert metrics.clipped_low == pytest.approx(((ratio < 0.8) & (a < 0)).mean())
    assert metrics.masked == 0
    assert metrics.kl == pytest.approx(np.mean(np.exp((reference - logp)[mask]) - (reference - logp)[mask] - 1))


def test_kl_estimators_on_a_known_pair():
    """Means over samples of π: k1 and k3 come to KL(π ‖ π_ref), k2 close to it; the gradient of k2's mean is KL's."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.35, 0.25])
    d, exact = np.log(p / q), float((p * np.log(p / q)).sum())
    for estimator, tolerance in (("k1", 1e-12), ("k3", 1e-12), ("k2", 2e-2)):
        assert float((p * kl_estimate(jnp.asarray(d), estimator)).sum()) == pytest.approx(exact, rel=tolerance)

    def surrogate(theta, estimator):
        logp = jax.nn.log_softmax(theta)
        return (p * kl_estimate(logp - np.log(q), estimator)).sum()  # samples are drawn from p and do not move

    theta = jnp.log(p)
    true = jax.grad(lambda t: (jax.nn.softmax(t) * (jax.nn.log_softmax(t) - np.log(q))).sum())(theta)
    np.testing.assert_allclose(jax.grad(surrogate)(theta, "k2"), true, atol=1e-12)
    assert np.abs(jax.grad(surrogate)(theta, "k3") - true).max() > 1e-3
    assert np.abs(jax.grad(surrogate)(theta, "k1")).max() < 1e-12


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_outcome_advantages(scale):
    draw = np.random.default_rng(0)
    groups = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 2])
    rewards = draw.integers(0, 3, 10).astype(float)
    rewards[groups == 1] = 0.1 + 0.2  # alike
    ours, alike = group_advantages(jnp.asarray(rewards), jnp.asarray(groups), 4, scale)
    np.testing.assert_allclose(ours, literal.outcome_advantages(rewards.tolist(), groups.tolist(), scale), atol=2e-5)
    np.testing.assert_array_equal(alike, groups == 1)


def test_rewards_that_differ_by_rounding_are_alike():
    rewards = jnp.asarray([0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2])
    ours, alike = group_advantages(rewards, jnp.zeros(4, jnp.int32), 1)
    assert alike.all() and (ours == 0).all()


def test_equal_rewards_of_any_size_teach_nothing():
    """Their mean rounds: in float32, 16 times 12.7 is not quite 16 · 12.7."""
    for value in (0.1, 12.7, 100.1, 1e5):
        reward = jnp.full(16, value, jnp.float32)
        advantages, alike = group_advantages(reward, jnp.zeros(16, jnp.int32), 1)
        assert alike.all() and not advantages.any()


def test_process_advantages():
    steps = [[(2, 1.0), (5, 0.0), (5, 0.75)], [(8, 0.5)], [(0, 2.0), (3, 1.0), (4, 0.25)]]
    groups = [0, 1, 0]
    flat = [(reward, i, end) for i, mine in enumerate(steps) for end, reward in mine]
    ours = process_advantages(*map(jnp.asarray, zip(*flat, strict=True)), jnp.asarray(groups), 2, T)
    expected = literal.process_advantages(steps, groups)
    np.testing.assert_allclose(ours, [[expected(i, t) for t in range(T)] for i in range(3)], atol=2e-5)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(aggregation="dr_grpo"), "PolicyLoss.max_tokens = None: goes with 'dr_grpo'"),
        (dict(ratio="sequence", aggregation="dapo"), "PolicyLoss.aggregation = 'dapo'"),
        (dict(clip_low=0.0), "PolicyLoss.clip_low = 0.0"),
        (dict(dual_clip=0.5), "PolicyLoss.dual_clip = 0.5"),
        (dict(kl=-1.0), "PolicyLoss.kl = -1.0"),
    ],
)
def test_impossible_objectives_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        PolicyLoss(**fields)
    x = jnp.zeros((1, 2))
    for config in (PolicyLoss(), replace(PolicyLoss(kl=0.0), importance_cap=2.0)):
        with pytest.raises(ValueError, match="give (reference|sampler)_logp"):
            policy_loss(config, x, x, x, x == 0)
