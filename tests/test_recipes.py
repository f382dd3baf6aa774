"""configs/: every file loads, the published ones say what the papers print, and the small ones have their shape."""

from pathlib import Path

import numpy as np
import pytest

import deepseek_jax as dsj
from deepseek_jax.cli.train import load_config
from deepseek_jax.config import MoE, YarnScaling
from deepseek_jax.training import ByTokens, MultiStep
from deepseek_jax.training.schedule import rates

CONFIGS = Path(__file__).parent.parent / "configs"
T, B = 10**12, 10**9

# file: tokens, peak rate, batch at first and at last, final rate over peak; family.md's table, from the papers.
PUBLISHED = {
    "deepseek_llm_7b": (2 * T, 4.2e-4, 2304, 2304, 0.1),
    "deepseek_llm_67b": (2 * T, 3.2e-4, 4608, 4608, 0.1),
    "deepseek_moe_16b": (2 * T, 4.2e-4, 4608, 4608, 0.316**2),
    "deepseek_v2_lite": (5700 * B, 4.2e-4, 4608, 4608, 0.316**2),
    "deepseek_v2": (8100 * B, 2.4e-4, 2304, 9216, 0.316**2),
    "deepseek_v3": (14_800 * B, 2.2e-4, 3072, 15360, 7.3 / 220),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_and_its_twin(name):
    tokens, peak, first, last, end = PUBLISHED[name]
    config = load_config(CONFIGS / f"{name}.py")
    assert config.horizon == tokens and config.seq_len == 4096
    assert config.plan.batch_size(0) == first and config.plan.batch_size(10**7) == last
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    table = rates(config)
    assert table[:, 0].max() == pytest.approx(peak) and np.argmax(table[:, 0]) == 1999
    assert table[-1, 0] == pytest.approx(peak * end, rel=1e-9)
    assert config.model.rope.scaling is None, "pre-training at 4K is without YaRN"

    twin = load_config(CONFIGS / f"{name}_small.py")
    assert twin.last_step == 200 and type(twin.schedule) is type(config.schedule)
    for share in (0.3, 0.59, 0.61, 0.7, 0.81, 0.89, 0.91, 0.975, 0.99):
        theirs, ours = (
            r[np.searchsorted(c.plan.all_tokens_before(c.last_step), share * c.horizon)]
            for c, r in ((config, table), (twin, rates(twin)))
        )
        # Near a boundary the small run's steps are coarse, so shares are taken away from them.
        assert ours[0] / twin.schedule.peak == pytest.approx(theirs[0] / peak, abs=0.03), share
        assert ours[1] == theirs[1] and (ours[2] == 0) == (theirs[2] == 0), share


def test_milestones_as_printed():
    assert load_config(CONFIGS / "deepseek_v2.py").schedule == MultiStep(
        peak=2.4e-4, milestones=(0.6, 0.9), factors=(0.316, 0.316**2)
    )
    v3 = load_config(CONFIGS / "deepseek_v3.py")
    assert v3.mtp_loss_weight == ByTokens(values=(0.3, 0.1), boundaries=(10 * T,))
    assert v3.bias_update_speed == ByTokens(values=(0.001, 0.0), boundaries=(14_300 * B,))
    assert v3.data.fim_rate == 0.1 and v3.data.cross_document_attention and v3.optimizer.moment_dtype == "bfloat16"
    assert isinstance(v3.model.ffn, MoE) and v3.model.ffn.n_routed_experts == 256


def test_context_extension_as_printed():
    """V3, section 4.3: 1,000 steps at 32K with 1,920 sequences, 1,000 at 128K with 480, both at 7.3e-6."""
    for name, length, batch in (("deepseek_v3_32k", 32768, 1920), ("deepseek_v3_128k", 131072, 480)):
        config = load_config(CONFIGS / f"{name}.py")
        assert (config.seq_len, config.batch_size, config.last_step) == (length, batch, 1000)
        np.testing.assert_array_equal(rates(config), np.broadcast_to([7.3e-6, 0.1, 0.0], (1000, 3)))
        scaling = config.model.rope.scaling
        assert isinstance(scaling, YarnScaling) and (scaling.factor, scaling.beta_slow, scaling.beta_fast) == (
            40,
            1,
            32,
        )
        assert config.model.rope == dsj.get_config("deepseek-v3").rope
        assert config.init_from is not None and config.model.max_position_embeddings == length
