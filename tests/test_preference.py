"""DPO: its loss and gradient, and runs of it on a model of bytes."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, micro, random_variables, save_model_of_bytes
from marks import needs_8
from stops import stopped_at
from test_preference_data import write

import deepseek_jax as dsj
from deepseek_jax.cli.main import main
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.posttrain.common import Rate
from deepseek_jax.posttrain.dpo import DPO, dpo_gradient, dpo_loss, dpo_scores
from deepseek_jax.posttrain.prefer import Prefer, _Learner, prefer
from deepseek_jax.posttrain.preference_batches import collate
from deepseek_jax.posttrain.preference_data import Answer, Example, LabelFile, PairFile
from deepseek_jax.posttrain.preference_step import init_preference, make_preference_update
from deepseek_jax.posttrain.reward_model import RewardModel
from deepseek_jax.training.config import AdamW

TIMES = {"step_seconds", "tokens_per_second"}


def examples(count, vocab, seed=0):
    """Pairs of ragged answers to one prompt each."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt = draw.integers(2, vocab, draw.integers(2, 6))
        answers = [np.concatenate([prompt, draw.integers(2, vocab, draw.integers(1, 7)), [1]]) for _ in range(2)]
        found.append(Example(tuple(Answer(a.astype(np.int32), len(prompt)) for a in answers), 1.0, 0.5))
    return found


# ---- the loss


def literal_dpo(logp, reference, beta, smoothing):
    """Eq. 7, a pair at a time, in float64."""
    losses = []
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(logp, reference, strict=True):
        margin = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
        right = 1 / (1 + np.exp(-margin))
        losses.append(-(1 - smoothing) * np.log(right) - smoothing * np.log(1 - right))
    return losses


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_of_dpo_are_the_papers(smoothing):
    draw = np.random.default_rng(0)
    logp, reference = (-9 * draw.random((7, 2)) for _ in range(2))
    config = DPO(beta=0.4, label_smoothing=smoothing)
    with jax.enable_x64(True):
        loss, rewards = dpo_loss(config, jnp.asarray(logp), jnp.asarray(reference))
        np.testing.assert_allclose(loss, literal_dpo(logp, reference, 0.4, smoothing), rtol=1e-12)
        np.testing.assert_allclose(rewards, 0.4 * (logp - reference), rtol=1e-12)
        slope = jax.grad(lambda x: dpo_loss(config, x, jnp.asarray(reference))[0].sum())(jnp.asarray(logp))
    # Section 4: ∇ = −β σ(−m) (∇ log π(chosen) − ∇ log π(rejected)), smoothed here.
    margin = 0.4 * ((logp - reference)[:, 0] - (logp - reference)[:, 1])
    weight = -0.4 * ((1 - smoothing) / (1 + np.exp(margin)) - smoothing / (1 + np.exp(-margin)))
    np.testing.assert_allclose(slope, np.stack([weight, -weight], 1), rtol=1e-10)


@pytest.fixture(scope="module")
def small():
    """A model, a state whose reference differs from its policy, and pairs."""
    config = micro("llm-gqa", num_hidden_layers=1)
    state = init_preference(AdamW(), random_variables(config), reference=True)
    state = replace(state, reference=jax.tree.map(lambda x: 0.8 * x, state.reference))
    return dsj.DeepSeek(config), state, examples(4, config.vocab_size)


def test_the_gradient_equals_autodiff_through_whole_logits_and_a_literal_loop(small):
    model, state, pairs = small
    config = DPO(beta=0.3, label_smoothing=0.1)

    batch, wide = collate(pairs, 24, pad_id=1), collate(pairs, 30, pad_id=7)  # 1 is the end token, too

    def logprobs(params):
        logits = model.apply({"params": params}, wide.tokens.reshape(-1, 30)).logits
        logp = jax.nn.log_softmax(logits).reshape(*wide.tokens.shape, -1)
        return jnp.stack(
            [
                jnp.stack([sum(logp[b, a, i - 1, x.ids[i]] for i in range(x.start, len(x.ids))) for a, x in enumerate(e.answers)])
                for b, e in enumerate(pairs)
            ]
        )  # fmt: skip

    def objective(params):
        logp, reference = logprobs(params), logprobs(state.reference)
        return dpo_loss(config, logp, reference)[0].mean(), (logp, reference)

    (value, (logp, reference)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(state.params)
    found, metrics = jax.jit(dpo_gradient(model, config, chunk=5), static_argnums=2)(state, batch, 4)
    scores = jax.jit(dpo_scores(model, chunk=4))(state, batch)
    np.testing.assert_allclose(scores["logp"], logp, rtol=1e-5)
    np.testing.assert_allclose(scores["reference"], reference, rtol=1e-5)
    literal = literal_dpo(*(np.asarray(x, np.float64) for x in (logp, reference)), 0.3, 0.1)
    np.testing.assert_allclose(metrics["loss"], np.mean(literal), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4)
    assert_trees_close(found["params"], grads, rtol=1e-3, atol=1e-7)
    rewards = 0.3 * np.asarray(logp - reference)
    np.testing.assert_allclose(metrics["margin"], (rewards[:, 0] - rewards[:, 1]).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], (rewards[:, 0] > rewards[:, 1]).mean())
    np.testing.assert_allclose(metrics["logprob_rejected"], np.asarray(logp)[:, 1].mean(), rtol=1e-5)


def test_padding_and_pieces_change_nothing_and_what_is_not_finite_is_not_applied(small):
    model, state, pairs = small
    gradient = dpo_gradient(model, DPO(beta=0.3))

    update = {pieces: make_preference_update(gradient, AdamW(), pieces=pieces) for pieces in (1, 2)}

    def updated(batch, pieces=1):
        return update[pieces](jax.tree.map(jnp.array, state), batch, jnp.float32(1e-3))

    whole, expected = updated(collate(pairs, 24, pad_id=1))
    for batch, pieces in ((collate(pairs, 24, pad_id=7), 1), (collate(pairs, 24, pad_id=1), 2)):
        other, metrics = updated(batch, pieces)
        for name in expected:
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
        assert_trees_close(other.params, whole.params, rtol=1e-2)  # Adam's first step is the gradient's sign
    broken = replace(state, reference=jax.tree.map(lambda x: x * jnp.nan, state.reference))
    before = jax.tree.map(np.asarray, broken)
    after, metrics = update[1](broken, collate(pairs, 24, 1), jnp.float32(1.0))
    assert not metrics["applied"]
    jax.tree.map(np.testing.assert_array_equal, after, before)


# ---- runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A published checkpoint of a random model with bytes for tokens."""
    folder = tmp_path_factory.mktemp("base")
    save_model_of_bytes(folder, num_hidden_layers=1, vocab_size=260)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Digits are preferred to letters."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(80):
        digits, letters = ("".join(draw.choice(list(of), draw.integers(2, 6))) for of in ("0123456789", "abcdefghij"))
        rows.append({"prompt": f"{i}?", "chosen": digits, "rejected": letters})
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def config_of(base, pairs, **fields):
    defaults = dict(
        init_from=str(base), data=PairFile(path=pairs), steps=7, batch_size=16, max_tokens=40, held_out_fraction=0.2,
        rate=Rate(peak=5e-3, warmup_steps=2, shape="cosine"), optimizer=AdamW(weight_decay=0.0), checkpoint_every=3,
        eval_every=4,
    )  # fmt: skip
    return Prefer(**(defaults | fields))


@pytest.fixture(scope="module")
def whole(base, pairs, tmp_path_factory):
    """A run that nothing befalls."""
    return prefer(config_of(base, pairs, steps=None, epochs=1.5), tmp_path_factory.mktemp("whole"), progress=False)


def same(metrics):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics]


def test_a_run_learns_and_is_a_run_folder(whole):
    folder = whole.run_dir
    before, *_, after = [line["evaluation"] for line in whole.metrics if "evaluation" in line]
    report = json.loads((folder / "evaluations" / "step_000004.json").read_text())
    assert whole.metrics[-1]["step"] == math.ceil(1.5 * (80 - report["examples"]) / 16) == int(whole.state.step) == 7
    assert before["loss"] == pytest.approx(np.log(2), abs=1e-6) and before["accuracy"] == 0.5 and before["margin"] == 0
    assert after["accuracy"] > 0.9 and after["loss"] < 0.6 and after["reward_chosen"] > after["reward_rejected"]
    assert {"loss", "margin", "accuracy", "logprob_chosen", "logprob_rejected", "grad_norm"} <= set(whole.metrics[1])
    loaded = dsj.open_model(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], whole.state.params)
    assert report["calibration"]["ece"] == whole.metrics[4]["evaluation"]["ece"]
    assert "DPO, step 7:" in (folder / "evaluations" / "step_000007.txt").read_text() and "accuracy" in whole.summary()


def test_a_run_that_was_stopped_goes_on_bit_for_bit(base, pairs, whole, tmp_path, monkeypatch):
    config = whole.config
    # Examples are taken then, and nothing is given away.
    step = stopped_at(monkeypatch, _Learner, "_collated", 6, lambda: prefer(config, tmp_path / "cut", progress=False))
    assert step == 5
    again = prefer(config, tmp_path / "cut", progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)
    assert same(again.metrics) == same(whole.metrics)


@needs_8
def test_shards_change_nothing(whole, tmp_path):
    config = replace(whole.config, mesh=MeshConfig(fsdp=4, tensor=2, data=1), pieces=2, batch_size=16)
    run = prefer(config, tmp_path, progress=False)
    for name in ("loss", "margin", "grad_norm"):
        ours, theirs = ([line[name] for line in of.metrics if name in line] for of in (run, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert_trees_close(run.state.params, whole.state.params, rtol=1e-2)


@needs_8
def test_what_cannot_be_run_is_refused(base, pairs, tmp_path, capsys):
    for fields, said in (
        (dict(epochs=1), r"Prefer.epochs = 1: give epochs or steps \(= 7\), one of the two"),
        (dict(pieces=3), "Prefer.pieces = 3: must divide batch_size = 16"),
        (dict(learn=RewardModel(kind="pointwise")), "Prefer.data = .*must be a LabelFile"),
        (dict(data=LabelFile(path=pairs)), "Prefer.data = .*must be a PairFile"),
        (dict(batch_size=12), "Prefer.batch_size = 12: divided by pieces = 1 must be a multiple of the 8 devices"),
        (dict(max_tokens=10**6), "Prefer.max_tokens = 1000000: must not exceed the model's"),
        (dict(max_tokens=3), "holds nothing to learn from; left out: 80 longer than max_tokens"),
        (dict(data=PairFile(path=str(tmp_path / "no.jsonl"))), "no such file"),
        (dict(held_out_fraction=1.0), r"must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            prefer(config_of(base, pairs, **fields), tmp_path / "run", progress=False)
    for bad in (dict(beta=0.0), dict(label_smoothing=0.5)):
        with pytest.raises(ValueError, match="DPO"):
            DPO(**bad)


def test_the_command_line_goes_on_with_a_run(base, pairs, whole, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from test_preference import config_of\n"
        f"def get_config():\n    return config_of({str(base)!r}, {pairs!r}, steps=None, epochs=1.5)\n"
    )
    args = ["prefer", str(config), "--run-dir", str(whole.run_dir)]
    assert main(args) == 0 and "accuracy: 0.5 before, " in capsys.readouterr().out  # it is done
    assert main([*args, "--learn.beta", "0.3"]) == 2 and "learn" in capsys.readouterr().err
