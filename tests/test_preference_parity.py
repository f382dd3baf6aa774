"""DPO and pairwise reward models beside TRL's own trainers. Skipped where TRL is missing."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trl_peer import float64, trl_dpo

from deepseek_jax.posttrain.dpo import DPO, dpo_loss
from deepseek_jax.posttrain.reward_model import RewardModel, reward_loss

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
PAIRS, T = 6, 9


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def draw_answers(seed):
    """Log-probabilities of the tokens of ragged answers, and where they are: [2, PAIRS, T]."""
    draw = np.random.default_rng(seed)
    mask = np.arange(T) < draw.integers(1, T + 1, (2, PAIRS, 1))
    return *(-3 * draw.random((2, PAIRS, T)) for _ in range(2)), mask


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_is_trls(trl, trl_folder, beta):
    """Without label smoothing, which TRL's "sigmoid" leaves aside."""
    logp, reference, mask = draw_answers(0)
    theirs, slope = trl_dpo(trl, trl_folder, logp, reference, mask, beta=beta)

    def loss(logp):
        sums = (jnp.where(mask, x, 0).sum(axis=2).T for x in (logp, reference))
        return dpo_loss(DPO(beta=beta), *sums)[0].mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logp))
    assert float(value) == pytest.approx(theirs, rel=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-9, atol=1e-15)
    assert np.abs(slope).max() > 1e-3


def test_a_pairwise_reward_models_loss_is_trls(trl, trl_folder):
    import torch
    from datasets import Dataset

    draw = np.random.default_rng(1)
    scores = draw.normal(size=(PAIRS, 2))
    config = trl.RewardConfig(output_dir=trl_folder, use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_dict({"prompt": ["w1"], "chosen": ["w2"], "rejected": ["w3"]})
    trainer = trl.RewardTrainer(trl_folder, args=config, train_dataset=rows)
    with float64():
        given = torch.tensor(scores.T.reshape(-1, 1), requires_grad=True)  # chosen, then rejected
        inputs = {"input_ids": torch.zeros(2 * PAIRS, 2), "attention_mask": torch.ones(2 * PAIRS, 2)}
        theirs = trainer.compute_loss(lambda **_: SimpleNamespace(logits=given), inputs)
        theirs.backward()
    value, gradient = jax.value_and_grad(lambda x: reward_loss(RewardModel(), x, jnp.ones(PAIRS)).mean())(
        jnp.asarray(scores)
    )
    assert float(value) == pytest.approx(theirs.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, given.grad.numpy().reshape(2, PAIRS).T, rtol=1e-9)
