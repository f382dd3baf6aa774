"""Values and gradients of the objectives beside TRL's own trainers, and what TRL computes otherwise, in numbers.

TRL's code runs from rewards to loss: a given rollout goes through `GRPOTrainer._generate_and_score_completions` and
`compute_loss`, with models whose log-probabilities are given (tests/trl_peer.py). Skipped where TRL is missing.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trl_peer import trl_dpo, trl_grpo

from deepseek_jax.posttrain.advantage import group_advantages
from deepseek_jax.posttrain.objective import PolicyLoss, policy_loss

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
GROUPS, G, T = 3, 4, 9
B = GROUPS * G


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@dataclass
class Rollout:
    """Completions as both sides take them; log-probabilities are 0 where nothing counts."""

    lengths: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray
    logp: np.ndarray
    old: np.ndarray
    reference: np.ndarray
    sampler: np.ndarray
    group: int = G


def draw_rollout(seed: int) -> Rollout:
    """Ragged rows, some with tokens in between that the policy did not sample; ratios on both sides of every clip."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, T + 1, B)
    lengths[0] = T
    mask = (np.arange(T) < lengths[:, None]) & ((draw.random((B, T)) < 0.8) | (np.arange(T) == 0))
    logp = -draw.random((B, T)) * 3
    others = (logp + draw.normal(size=(B, T)) * scale for scale in (0.4, 0.5, 0.3))
    rewards = draw.integers(-8, 9, B) / 8  # TRL rounds rewards to float32: these it keeps
    return Rollout(lengths, mask, rewards, *(np.where(mask, x, 0) for x in (logp, *others)))


def ours(config: PolicyLoss, r: Rollout, advantage_B, sampler: bool = False, **totals):
    """Loss and gradient [B, T]; the sampler's log-probabilities are told where `sampler`, or where they are needed."""
    told = r.sampler if sampler or config.importance_cap is not None else None
    value, gradient = jax.value_and_grad(
        lambda x: policy_loss(config, x, r.old, advantage_B[:, None], r.mask, r.reference, told, **totals)[0]
    )(jnp.asarray(r.logp))
    return float(value), np.asarray(gradient)


def assert_same(got, expected, factor=1.0):
    assert got[0] == pytest.approx(expected[0] * factor, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(got[1], expected[1] * factor, rtol=1e-9, atol=1e-12)
    assert np.abs(expected[1]).max() > 1e-4


PLAIN = dict(loss_type="grpo", use_bias_correction_kl=False)
CAPPED = dict(sampler=True, vllm_importance_sampling_mode="token_truncate")
CASES = {
    "grpo": (PolicyLoss(kl=0), PLAIN),
    "kl": (PolicyLoss(kl=0.3), dict(PLAIN, beta=0.3)),
    "clip_higher": (PolicyLoss(kl=0, clip_low=0.1, clip_high=0.28), dict(PLAIN, epsilon=0.1, epsilon_high=0.28)),
    "dr_grpo": (
        PolicyLoss(kl=0.04, aggregation="dr_grpo", max_tokens=32),
        dict(PLAIN, beta=0.04, loss_type="dr_grpo", max_completion_length=32),
    ),
    "dapo": (
        PolicyLoss(kl=0.1, aggregation="dapo", clip_high=0.28),
        dict(PLAIN, beta=0.1, loss_type="dapo", epsilon_high=0.28),
    ),
    "dual_clip": (PolicyLoss(kl=0, dual_clip=1.3), dict(PLAIN, delta=1.3)),
    "unbiased_kl": (PolicyLoss(kl=0.3, unbiased_kl=True), dict(loss_type="grpo", beta=0.3)),
    "off_policy_mask": (
        PolicyLoss(kl=0.1, off_policy_mask=0.05),
        dict(PLAIN, beta=0.1, off_policy_mask_threshold=0.05),
    ),
    "importance_cap": (
        PolicyLoss(kl=0.2, importance_cap=1.1),
        dict(PLAIN, beta=0.2, vllm_importance_sampling_clip_max=1.1, **CAPPED),
    ),
    "v3_2": (
        PolicyLoss(kl=0.2, unbiased_kl=True, off_policy_mask=0.1, clip_high=0.3),
        dict(loss_type="grpo", beta=0.2, off_policy_mask_threshold=0.1, epsilon_high=0.3, scale_rewards="none"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_trls(trl, trl_folder, case):
    config, fields = CASES[case]
    for seed in range(2):
        r = draw_rollout(seed)
        *theirs, advantages = trl_grpo(trl, trl_folder, r, **fields)
        assert_same(ours(config, r, advantages), theirs)


@pytest.mark.parametrize("case", CASES)
def test_every_part_of_a_case_matters(case):
    """On the rollouts above: a part left out changes the loss."""
    config = CASES[case][0]
    r = draw_rollout(0)
    advantages = np.asarray(group_advantages(r.rewards, np.arange(B) // G, GROUPS)[0])
    parts = {name: default for name, default in vars(PolicyLoss(kl=0)).items() if getattr(config, name) != default}
    for name, default in parts.items():
        without = dict(aggregation="grpo", max_tokens=None) if name == "max_tokens" else {name: default}
        if name != "aggregation" or "max_tokens" not in parts:
            assert abs(ours(replace(config, **without), r, advantages)[0] - ours(config, r, advantages)[0]) > 1e-6, name


def test_dual_clip_below_the_upper_clip_means_another_thing(trl, trl_folder):
    """δ < 1 + ε_high: TRL bounds the ratio before it takes the minimum, so that δ clips gains and 1 + ε_high losses."""
    r = draw_rollout(2)
    *theirs, advantages = trl_grpo(trl, trl_folder, r, delta=1.1, epsilon_high=0.4, **PLAIN)
    assert_same(ours(PolicyLoss(kl=0, clip_high=0.1, dual_clip=1.4), r, advantages), theirs)
    assert abs(ours(PolicyLoss(kl=0, clip_high=0.4, dual_clip=1.1), r, advantages)[0] - theirs[0]) > 1e-4


@pytest.mark.parametrize("cap", [None, 1.2])
def test_the_ratio_of_outputs_is_to_the_power_of_one_by_length_at_trl(trl, trl_folder, cap):
    """TRL's sequence level is GSPO's geometric mean; V2, V3 and R1 print the ratio of outputs, as ours is.

    So theirs at log ratios d is ours at d / |o|, and they agree on completions of one token.
    """
    r = draw_rollout(3)
    fields = dict(PLAIN, importance_sampling_level="sequence", epsilon_high=0.3)
    if cap is not None:
        fields |= CAPPED | dict(
            vllm_importance_sampling_mode="sequence_truncate", vllm_importance_sampling_clip_max=cap
        )
    config = PolicyLoss(kl=0, ratio="sequence", clip_high=0.3, importance_cap=cap)
    counts = r.mask.sum(axis=1, keepdims=True)
    *theirs, advantages = trl_grpo(trl, trl_folder, r, **fields)
    value, gradient = ours(config, replace(r, logp=r.old + (r.logp - r.old) / counts), advantages)
    assert_same((value, gradient / counts), theirs)
    assert abs(ours(config, r, advantages)[0] - theirs[0]) > 1e-4

    one = r.mask & (np.cumsum(r.mask, axis=1) == 1)
    r = replace(r, mask=one, **{name: np.where(one, getattr(r, name), 0) for name in ("logp", "old", "sampler")})
    *theirs, advantages = trl_grpo(trl, trl_folder, r, **fields)
    assert_same(ours(config, r, advantages), theirs)


def test_the_off_policy_mask_is_measured_from_the_sampler_where_it_reported(trl, trl_folder):
    """And from the trainer's old policy otherwise, both as ours: rows that V3.2's mask leaves out have no gradient."""
    r = draw_rollout(26)
    unclipped = dict(epsilon=0.999, epsilon_high=100.0)  # so that nothing else has no gradient
    fields = dict(PLAIN, off_policy_mask_threshold=0.1, vllm_importance_sampling_correction=False, **unclipped)
    counts = r.mask.sum(axis=1)
    for sampler, behaviour in ((False, r.old), (True, r.sampler)):
        _, gradient, advantages = trl_grpo(trl, trl_folder, r, sampler=sampler, **fields)
        masked = (advantages < 0) & ((behaviour - r.logp).sum(axis=1) / counts > 0.1)
        np.testing.assert_array_equal((gradient == 0).all(axis=1), masked)
        assert 0 < masked.sum() < B
        config = PolicyLoss(kl=0, clip_low=0.999, clip_high=100.0, off_policy_mask=0.1)
        np.testing.assert_allclose(ours(config, r, advantages, sampler)[1], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["kl", "dr_grpo", "dapo"])
def test_rows_without_a_counted_token_are_in_trls_denominator(trl, trl_folder, case):
    """Ours leaves them out, so that padding a batch changes nothing; a mean over tokens (dapo) does not know them."""
    config, fields = CASES[case]
    r = draw_rollout(5)
    r.mask[[1, 6]] = False
    for x in (r.logp, r.old, r.reference, r.sampler):
        x[~r.mask] = 0
    *theirs, advantages = trl_grpo(trl, trl_folder, r, **fields)
    assert_same(ours(config, r, advantages), theirs, factor=1 if case == "dapo" else B / (B - 2))
    if case != "dapo":
        assert_same(ours(config, r, advantages, completions=float(B)), theirs)


@pytest.mark.parametrize("case", ["kl", "dr_grpo", "dapo"])
def test_pieces_of_an_update(trl, trl_folder, case):
    """Accumulated, TRL's pieces are ours with the update's totals."""
    config, fields = CASES[case]
    r, halves = draw_rollout(6), (slice(0, B // 2), slice(B // 2, B))
    fields = dict(fields, gradient_accumulation_steps=2, per_device_train_batch_size=B // 2, num_iterations=2)
    *whole, advantages = trl_grpo(trl, trl_folder, r, **CASES[case][1])
    parts = [trl_grpo(trl, trl_folder, r, rows=rows, **fields) for rows in halves]
    assert_same((parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]), whole)
    assert_same(ours(config, r, advantages), whole)


def test_several_updates_of_one_rollout_share_a_denominator_at_trl(trl, trl_folder):
    """dapo with two updates a rollout: TRL divides each by half the rollout's tokens, ours by the update's own."""
    config, fields = CASES["dapo"]
    r, rows = draw_rollout(7), slice(0, B // 2)
    fields = dict(fields, steps_per_generation=2, per_device_train_batch_size=B // 2, num_iterations=1)
    loss, gradient, advantages = trl_grpo(trl, trl_folder, r, rows=rows, **fields)
    half = Rollout(*(getattr(r, name)[rows] for name in vars(r) if name != "group"))
    theirs, tokens = (loss, gradient[rows]), half.mask.sum()
    assert tokens * 2 != r.mask.sum()
    assert_same(ours(config, half, advantages), theirs, factor=r.mask.sum() / 2 / tokens)
    assert_same(ours(config, half, advantages, tokens=r.mask.sum() / 2), theirs)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(trl, trl_folder, scale):
    """The same without a deviation; TRL's is the sample's (n − 1) and 1e-4, ours the population's and 1e-6."""
    r = draw_rollout(8)
    r.rewards[G : 2 * G] = 0.125  # alike
    theirs = trl_grpo(trl, trl_folder, r, scale_rewards=scale, **PLAIN)[2]
    mine = np.asarray(group_advantages(jnp.asarray(r.rewards), np.arange(B) // G, GROUPS, scale)[0])
    grouped = r.rewards.reshape(GROUPS, G)
    if scale == "none":
        np.testing.assert_allclose(mine, theirs, atol=1e-12)
        return
    std = {"group": lambda d: grouped.std(axis=1, ddof=d).repeat(G), "batch": lambda d: r.rewards.std(ddof=d)}[scale]
    np.testing.assert_allclose(mine * (std(0) + 1e-6), theirs * (std(1) + 1e-4), rtol=1e-9, atol=1e-12)
    n = G if scale == "group" else B
    np.testing.assert_allclose(theirs / mine.clip(1e-9) * (mine > 0), np.sqrt(1 - 1 / n) * (mine > 0), rtol=1e-3)


def test_trl_dpo_is_the_papers_loss(trl, trl_folder):
    """What DPO is to be compared with (tests/trl_peer.py) is eq. 7 of arXiv 2305.18290, and its gradient."""
    draw = np.random.default_rng(9)
    lengths = draw.integers(1, T + 1, (2, 5, 1))
    mask = np.arange(T) < lengths
    logp, reference = (-3 * draw.random((2, 5, T)) for _ in range(2))
    value, gradient = trl_dpo(trl, trl_folder, logp, reference, mask, beta=0.3)
    margin = np.where(mask, logp - reference, 0).sum(axis=2)
    sigmoid = 1 / (1 + np.exp(-0.3 * (margin[0] - margin[1])))
    assert value == pytest.approx(-np.log(sigmoid).mean(), rel=1e-12)
    slope = -0.3 * (1 - sigmoid) / 5
    np.testing.assert_allclose(gradient, mask * np.stack([slope, -slope])[..., None], rtol=1e-9, atol=1e-15)
