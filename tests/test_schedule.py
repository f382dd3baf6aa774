"""Schedules, batch ramp, λ and γ against the numbers that the papers print."""

import dataclasses
import math

import numpy as np
import pytest
from helpers import micro, run_config
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.training.schedule import (
    BatchRamp,
    ByTokens,
    MultiStep,
    Phase,
    Phases,
    make_plan,
    rates,
    scaled_tokens,
)

T, B = 10**12, 10**9
V3 = Phases(
    peak=2.2e-4,
    phases=(
        Phase(tokens=10 * T, factor=1.0),
        Phase(tokens=4300 * B, factor=0.1, shape="cosine"),
        Phase(tokens=333 * B, factor=0.1),
        Phase(tokens=167 * B, factor=7.3 / 220),
    ),
)


def test_multi_step_as_printed():
    """DeepSeek LLM, section 2.3: 2,000 warm-up steps, 31.6 % from 80 % and 10 % from 90 % of the tokens on."""
    run = run_config(micro("llm"), schedule=MultiStep(peak=4.2e-4), steps=100_000)
    rate = rates(run)[[0, 1999, 79_999, 80_000, 89_999, 90_000], 0]
    np.testing.assert_allclose(
        rate, [4.2e-4 / 2000, 4.2e-4, 4.2e-4, 4.2e-4 * 0.316, 4.2e-4 * 0.316, 4.2e-5], rtol=1e-12
    )


def test_warm_up_past_the_milestones_never_rises():
    run = run_config(micro("llm"), schedule=MultiStep(peak=1.0, warmup_steps=2000), steps=200)
    assert rates(run)[160:, 0].max() < 159 / 2000


def test_v3_as_printed():
    """V3, section 4.2, written out: the rate, the batch, λ and γ at the tokens that the paper names."""
    tokens = np.array([0, 10 * T - 1, 12_150 * B, 14_300 * B - 1, 14_300 * B, 14_633 * B - 1, 14_633 * B, 14_800 * B])
    middle = (2.2e-4 + 2.2e-5) / 2  # of the cosine
    expected = [2.2e-4, 2.2e-4, middle, 2.2e-5, 2.2e-5, 2.2e-5, 7.3e-6, 7.3e-6]
    np.testing.assert_allclose(V3.peak * V3.factor(tokens, 0), expected, rtol=1e-6)
    quarter = 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi / 4))
    np.testing.assert_allclose(V3.peak * V3.factor(np.array([10 * T + 4300 * B // 4]), 0), [quarter], rtol=1e-12)
    assert ByTokens(values=(0.3, 0.1), boundaries=(10 * T,)).at(np.array([0, 10 * T - 1, 10 * T])).tolist() == [
        0.3,
        0.3,
        0.1,
    ]


def test_v3_batch_ramp():
    """3,072 to 15,360 sequences over the first 469B tokens, then 15,360 to the end of 14.8T."""
    plan = make_plan(15360, 4096, BatchRamp(start=3072, tokens=469 * B, increment=3072))
    assert [stage.batch_size for stage in plan.stages] == [3072, 6144, 9216, 12288, 15360]
    for stage, share in zip(plan.stages, (0, 0.25, 0.5, 0.75, 1), strict=True):
        assert 0 <= stage.first_token - share * 469 * B < 15360 * 4096
    assert plan.batch_size(0) == 3072 and plan.batch_size(10**6) == 15360
    steps = plan.steps_for(14_800 * B)
    assert plan.tokens_before(steps) >= 14_800 * B > plan.tokens_before(steps - 1)


@given(
    start=st.integers(1, 9), increment=st.integers(1, 5), increments=st.integers(1, 9), tokens=st.integers(1, 5000),
    seq_len=st.integers(1, 7),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_plan_equals_stepping_through_it(start, increment, increments, tokens, seq_len):
    """The closed form against a loop that looks at the tokens before each step."""
    full = start + increment * increments
    plan = make_plan(full, seq_len, BatchRamp(start=start, tokens=tokens, increment=increment))
    seen, sizes, befores = 0, [], []
    for step in range(200):
        size = max(
            s for s in range(start, full + 1, increment) if s == start or seen * (full - start) >= tokens * (s - start)
        )
        assert (plan.batch_size(step), plan.tokens_before(step)) == (size, seen), step
        if step:
            assert plan.steps_for(seen) == step
        befores.append(seen)
        sizes.append(size)
        seen += size * seq_len
    assert plan.all_tokens_before(200).tolist() == befores


def test_rates_go_by_tokens_of_the_ramp():
    run = run_config(
        micro("v3"), steps=None, train_tokens=64 * 8 * 16, batch_size=8, accumulation=4, seq_len=16,
        batch_ramp=BatchRamp(start=2, tokens=1024, increment=2), schedule=MultiStep(peak=1.0, warmup_steps=0),
        mtp_loss_weight=ByTokens(values=(0.3, 0.1), boundaries=(4096,)),
        bias_update_speed=ByTokens(values=(0.001, 0.0), boundaries=(8000,)),
    )  # fmt: skip
    table, tokens = rates(run), run.plan.all_tokens_before(run.last_step)
    assert len(table) == run.last_step > 64, "small batches need more steps"
    np.testing.assert_array_equal(
        table[:, 0], np.where(tokens < 0.8 * 8192, 1, np.where(tokens < 0.9 * 8192, 0.316, 0.1))
    )
    np.testing.assert_array_equal(table[:, 1], np.where(tokens < 4096, 0.3, 0.1))
    np.testing.assert_array_equal(table[:, 2], np.where(tokens < 8000, 0.001, 0.0))
    assert dataclasses.replace(run, steps=10).last_step == 10, "steps ends a run early"
    np.testing.assert_array_equal(rates(dataclasses.replace(run, steps=10)), table[:10])


def test_scaled_down():
    short = scaled_tokens(V3, 1e-9)
    assert [phase.tokens for phase in short.phases] == [10000, 4300, 333, 167] and short.peak == V3.peak
    assert scaled_tokens(ByTokens(values=(1.0, 0.0), boundaries=(T,)), 1e-6).boundaries == (10**6,)
    assert scaled_tokens(BatchRamp(start=1, tokens=B, increment=1), 1e-6).tokens == 1000
    assert scaled_tokens(0.3, 1e-6) == 0.3


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(steps=None), "RunConfig.steps = None"),
        (dict(batch_ramp=BatchRamp(start=3, tokens=100, increment=2)), "RunConfig.batch_ramp .*whole increments"),
        (dict(batch_ramp=BatchRamp(start=4, tokens=100, increment=4)), "batch_ramp .*raise accumulation"),
        (dict(ema_decay=1.0), "ema_decay = 1.0"),
        (dict(profile="5:5"), "profile = '5:5'.*\"A:B\""),
        (dict(profile="five"), "profile = 'five'"),
        (dict(train_tokens=0), "train_tokens = 0"),
        (dict(mtp_loss_weight=-1.0), "mtp_loss_weight = -1.0"),
    ],
)
def test_run_config_refuses(fields, said):
    with pytest.raises(ValueError, match=said):
        run_config(micro("llm"), **fields)


def test_schedules_refuse():
    with pytest.raises(ValueError, match="ByTokens.boundaries"):
        ByTokens(values=(1.0, 2.0), boundaries=())
    with pytest.raises(ValueError, match="Phases.phases"):
        Phases(peak=1.0, phases=())
    with pytest.raises(ValueError, match="Phase.tokens = 0"):
        Phase(tokens=0, factor=1.0)
    with pytest.raises(ValueError, match="BatchRamp.increment = 0"):
        BatchRamp(start=1, tokens=1, increment=0)
    with pytest.raises(ValueError, match="MultiStep.peak"):
        MultiStep(peak=0.0)
