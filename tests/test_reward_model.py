"""Reward models: losses against literal loops, reports, and one that is trained and then asked by GRPO's rewards."""

import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, micro, random_variables, save_model_of_bytes
from test_preference import examples
from test_preference_data import encoder, load, talk, write

import deepseek_jax as dsj
from deepseek_jax.posttrain import grpo as room
from deepseek_jax.posttrain.common import Rate
from deepseek_jax.posttrain.grpo_config import GRPO
from deepseek_jax.posttrain.prefer import Prefer, prefer
from deepseek_jax.posttrain.preference_batches import collate
from deepseek_jax.posttrain.preference_data import NO_SUMMARY, LabelFile, PairFile, load_preferences
from deepseek_jax.posttrain.preference_report import (
    calibration,
    readable,
    report_labels,
    report_numbers,
    report_pairs,
)
from deepseek_jax.posttrain.preference_step import init_preference
from deepseek_jax.posttrain.reward_model import (
    RewardModel,
    make_head,
    open_reward_model,
    reward_gradient,
    reward_loss,
    reward_scores,
)
from deepseek_jax.posttrain.rewards import Item, ModelReward, open_rewards
from deepseek_jax.posttrain.tasks import Problem, RunningSum
from deepseek_jax.training.config import AdamW

KINDS = ("pairwise", "pointwise", "regression")


# ---- losses


def literal_loss(kind, scores, label):
    """One example, in float64: Bradley and Terry's model, a cross-entropy, half a square."""
    if kind == "pairwise":
        return -np.log(np.exp(scores[0]) / (np.exp(scores[0]) + np.exp(scores[1])))
    if kind == "regression":
        return (scores[0] - label) ** 2 / 2
    probability = 1 / (1 + np.exp(-scores[0]))
    return -label * np.log(probability) - (1 - label) * np.log(1 - probability)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_their_gradients_are_the_literal_ones(kind):
    draw = np.random.default_rng(0)
    scores = 2 * draw.normal(size=(9, 2 if kind == "pairwise" else 1))
    labels = np.array([0, 1, 1, 0, 0.25, 1, 0, 1, 0.5]) if kind == "pointwise" else draw.normal(size=9)
    config, step = RewardModel(kind=kind), 1e-6
    with jax.enable_x64(True):
        loss = reward_loss(config, jnp.asarray(scores), jnp.asarray(labels))
        slope = jax.grad(lambda x: reward_loss(config, x, jnp.asarray(labels)).sum())(jnp.asarray(scores))
    for b in range(9):
        np.testing.assert_allclose(loss[b], literal_loss(kind, scores[b], labels[b]), rtol=1e-12)
        for a in range(scores.shape[1]):
            up, down = scores[b].copy(), scores[b].copy()
            up[a], down[a] = up[a] + step, down[a] - step
            difference = literal_loss(kind, up, labels[b]) - literal_loss(kind, down, labels[b])
            np.testing.assert_allclose(slope[b, a], difference / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def small():
    """A model with experts, and pairs."""
    config = micro("v3", num_hidden_layers=2, num_nextn_predict_layers=0)
    return dsj.DeepSeek(config), random_variables(config), examples(3, config.vocab_size)


def test_a_score_is_read_where_the_answer_ends_whatever_the_padding(small):
    """Against the state of each conversation's last token, from whole rows of another length and padding."""
    model, variables, pairs = small
    config = RewardModel()
    head = make_head(config, model.config, 3)
    assert head.keys() == {"score"} and abs(float(jnp.std(head["score"])) * np.sqrt(65) - 1) < 0.35
    state = init_preference(AdamW(), variables, reference=False, head=lambda: head)
    batch, wide = collate(pairs, 24, pad_id=1), collate(pairs, 30, pad_id=7)  # 1 is the end token, too

    def whole(trained):
        all_ = {"params": trained["params"], "router": state.router}
        hidden = model.apply(all_, wide.tokens.reshape(-1, 30), method="hidden").hidden.reshape(3, 2, 30, -1)
        ends = [[len(a.ids) - 1 for a in e.answers] for e in pairs]
        return jnp.stack(
            [jnp.stack([hidden[b, a, ends[b][a]] @ trained["head"]["score"] for a in (0, 1)]) for b in range(3)]
        )

    def objective(trained):
        scores = whole(trained)
        return -jnp.log(jax.nn.sigmoid(scores[:, 0] - scores[:, 1])).mean(), scores

    (value, scores), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        {"params": state.params, "head": state.head}
    )
    found, metrics = jax.jit(reward_gradient(model, config), static_argnums=2)(state, batch, 3)
    got = jax.jit(reward_scores(model))(state, batch)["score"]
    np.testing.assert_allclose(got, scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4)
    assert_trees_close(found, grads, rtol=1e-3, atol=1e-6)
    assert float(jnp.abs(grads["head"]["score"]).max()) > 1e-2


# ---- reports


def test_calibration_is_the_literal_one():
    draw = np.random.default_rng(1)
    probability, outcome = draw.random(200), draw.integers(0, 2, 200)
    probability[:3] = 0.0, 1.0, 0.3
    found = calibration(probability, outcome, bins=5)
    error = 0.0
    for b, line in enumerate(found["bins"]):
        here = [i for i, p in enumerate(probability) if b / 5 <= p < (b + 1) / 5 or (b == 4 and p == 1)]
        assert line["count"] == len(here) > 0
        predicted, observed = (sum(of[i] for i in here) / len(here) for of in (probability, outcome))
        assert line["predicted"] == pytest.approx(predicted) and line["observed"] == pytest.approx(observed)
        error += len(here) / 200 * abs(predicted - observed)
    assert found["ece"] == pytest.approx(error)
    assert found["brier"] == pytest.approx(sum((p - o) ** 2 for p, o in zip(probability, outcome, strict=True)) / 200)


def test_a_calibrated_judge_has_no_error_and_a_cocky_one_has():
    draw = np.random.default_rng(2)
    margin = draw.normal(size=20000) * 2
    margin = np.abs(margin) * np.where(draw.random(20000) < 1 / (1 + np.exp(-np.abs(margin))), 1, -1)
    lengths = draw.integers(1, 9, (20000, 2))
    honest, cocky = report_pairs(margin, lengths), report_pairs(5 * margin, lengths)
    assert honest["calibration"]["ece"] < 0.02 < 0.1 < cocky["calibration"]["ece"]
    assert honest["accuracy"] == cocky["accuracy"] == pytest.approx((margin > 0).mean())
    assert honest["loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean()) and honest["loss"] < cocky["loss"]
    assert all(line["from"] >= 0.5 for line in honest["calibration"]["bins"])
    longer = lengths[:, 0] > lengths[:, 1]
    assert honest["by_length"]["chosen_longer"] == {
        "examples": longer.sum(), "accuracy": pytest.approx((margin[longer] > 0).mean())
    }  # fmt: skip
    assert report_pairs(np.zeros(4), np.ones((4, 2)))["accuracy"] == 0.5


def test_reports_of_labels_and_numbers():
    report = report_labels([2.0, -1.0, 0.5, -3.0], [1, 1, 0, 0])
    assert report["accuracy"] == 0.5 and report["by_label"]["positive"] == {"examples": 2, "accuracy": 0.5}
    losses = [literal_loss("pointwise", [s], y) for s, y in ((2, 1), (-1, 1), (0.5, 0), (-3, 0))]
    assert report["loss"] == pytest.approx(np.mean(losses))
    assert report_labels([1.0], [1])["by_label"]["negative"] == {"examples": 0, "accuracy": None}
    text = readable(report, "RewardModel, step 3")
    assert "RewardModel, step 3: 4 held-out examples" in text and "0.90 to 1.00" in text and "ece" in text
    numbers = report_numbers([1.0, 2.0, 4.0], [1, 3, 5])
    assert numbers == {
        "examples": 3, "loss": pytest.approx(1 / 3), "error": pytest.approx(2 / 3), "bias": pytest.approx(-2 / 3),
        "correlation": pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 5])[0, 1]),
    }  # fmt: skip
    assert report_numbers([1.0, 1.0], [0, 1])["correlation"] == 0 and "error" in readable(numbers, "x")


# ---- runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A published checkpoint of a random model with bytes for tokens."""
    folder = tmp_path_factory.mktemp("base")
    save_model_of_bytes(folder, num_hidden_layers=1, vocab_size=260)
    return folder


def config_of(base, data, **fields):
    defaults = dict(
        init_from=str(base), template="llm", data=data, steps=24, batch_size=16, max_tokens=64, held_out_fraction=0.2,
        rate=Rate(peak=1e-2), optimizer=AdamW(weight_decay=0.0), checkpoint_every=100,
    )  # fmt: skip
    return Prefer(**(defaults | fields))


def words(draw, of):
    return "".join(draw.choice(list(of), draw.integers(3, 7)))


def item(completion, prompt="1+1="):
    problem = Problem(prompt=prompt, answer="2")
    return Item(problem=problem, completion=completion, tokens=len(completion), truncated=False)


@pytest.fixture(scope="module")
def helpful(base, tmp_path_factory):
    """Digits are preferred to letters in the summary; in the thoughts it is the other way round."""
    folder, draw = tmp_path_factory.mktemp("helpful"), np.random.default_rng(0)
    rows = []
    for i in range(80):
        good, bad = words(draw, "0123456789"), words(draw, "abcdefgh")
        answers = [f"<think>\n{bad}\n</think>\n\n{good}", f"<think>\n{good}\n</think>\n\n{bad}"]
        rows.append({"prompt": f"{i}?", "chosen": answers[0], "rejected": answers[1]})
    data = PairFile(path=write(folder / "pairs.jsonl", rows))
    return prefer(config_of(base, data, learn=RewardModel(reads="summary")), folder / "run", progress=False)


def test_a_reward_model_learns_and_is_asked_by_rewards(helpful):
    folder = helpful.run_dir
    after = helpful.metrics[-1]["evaluation"]
    assert after["accuracy"] > 0.95 and after["loss"] < 0.2 and 0 <= after["ece"] <= 0.5
    assert {"score", "margin", "accuracy", "loss"} <= set(helpful.metrics[-1]) and "accuracy" in helpful.summary()
    report = json.loads((folder / "evaluations" / "step_000024.json").read_text())
    assert len(report["calibration"]["bins"]) == 10 and report["by_length"].keys() == {
        "chosen_longer",
        "chosen_shorter",
    }
    assert "probability    predicted" in (folder / "evaluations" / "step_000024.txt").read_text()

    # Answers of other lengths than it was trained on, side by side and alone: the same scores.
    items = [item("4711"), item("abba"), item("<think>\nabba\n</think>\n\n4711"), item("1" * 90), item("<think> 123")]
    with open_rewards([ModelReward(path=str(folder), weight=0.5)], open_model=open_reward_model) as scorer:
        scores = scorer.score(items)
        alone = [scorer.score([one]).parts["model"][0] for one in items]
    r = scores.parts["model"]
    assert not scores.failed.any() and r[0] > r[1] + 1
    np.testing.assert_allclose(r[2], r[0], rtol=1e-5)  # the thoughts are not looked at
    np.testing.assert_allclose(alone, r, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.total, 0.5 * r)


def test_what_a_model_cannot_read_is_a_failure_of_that_item(helpful):
    longest = helpful.config.max_tokens
    judge = open_reward_model(helpful.run_dir, rows=2)
    positions = judge.model.config.max_position_embeddings
    assert positions > longest
    scores = judge([item("1"), item("x" * positions)])
    assert np.isfinite(scores[0]) and np.isnan(scores[1])
    with open_rewards([ModelReward(path=str(helpful.run_dir))], open_model=lambda path: judge) as scorer:
        scored = scorer.score([item("1"), item("x" * positions)])
    assert scored.failed.tolist() == [False, True] and scored.failures == {
        "model: a reward of nan: rewards must be finite": 1
    }


def test_grpo_opens_reward_models_by_itself(base, helpful, tmp_path, monkeypatch):
    """On its own mesh, whose devices share the completions."""
    given = {}

    def opened(kinds, **options):
        given.update(options)
        raise ValueError("far enough")

    monkeypatch.setattr(room, "open_rewards", opened)
    config = GRPO(
        init_from=str(base), problems=RunningSum(digits=3), rewards=(ModelReward(path=str(helpful.run_dir)),), steps=1,
        rate=Rate(peak=1e-3), prompts=4, samples=2, max_prompt_tokens=8, max_new_tokens=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="far enough"):
        room.grpo(config, tmp_path, progress=False)
    judge = given["open_model"](str(helpful.run_dir))
    assert judge.mesh.shape["data"] == jax.device_count() and judge.rows >= judge.mesh.size
    items = [item("4711"), item("abba"), item("12")]
    np.testing.assert_allclose(judge(items), open_reward_model(helpful.run_dir)(items), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    "xla_gpu_deterministic_ops=true" in os.environ["XLA_FLAGS"],
    reason="XLA of jax 0.11.2 compiles this update with --xla_gpu_deterministic_ops and then cannot run it (raw_hash_map::at)",
)
def test_a_pointwise_model_gives_probabilities(base, tmp_path):
    draw = np.random.default_rng(1)
    rows = []
    for i in range(80):
        safe = bool(draw.integers(2))
        rows.append(
            {"messages": talk(f"{i}?"), "response": words(draw, "0123456789" if safe else "abcdefgh"), "label": safe}
        )
    data = LabelFile(path=write(tmp_path / "labels.jsonl", rows))
    config = config_of(base, data, learn=RewardModel(kind="pointwise"), pieces=2)
    run = prefer(config, tmp_path / "run", progress=False)
    after = run.metrics[-1]["evaluation"]
    assert after["accuracy"] > 0.9 and set(after) == {"loss", "accuracy", "ece", "brier"}
    scores = open_reward_model(run.run_dir)([item("4711"), item("abba")])
    assert 1 > scores[0] > 0.8 and 0.2 > scores[1] > 0
    assert float(run.state.head["b_score"]) != 0 and run.state.reference == {}


def test_a_model_of_numbers_learns_them(base, tmp_path):
    draw = np.random.default_rng(1)
    rows = [{"prompt": f"{i}?", "response": words(draw, "01") + str(i % 3), "label": 2.0 * (i % 3)} for i in range(96)]
    data = LabelFile(path=write(tmp_path / "labels.jsonl", rows))
    config = config_of(base, data, learn=RewardModel(kind="regression"))
    run = prefer(config, tmp_path / "run", progress=False)
    before, after = (run.metrics[i]["evaluation"] for i in (0, -1))
    assert after["correlation"] > 0.8 and after["loss"] < 0.5 * before["loss"]


def test_what_cannot_be_opened_or_read_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="no run folder: give the folder of a run of prefer with learn=RewardModel"):
        open_reward_model(base)
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {"model": {}, "grpo": {}}}))
    with pytest.raises(ValueError, match="the run of another kind of model"):
        open_reward_model(tmp_path)
    for bad in (dict(kind="listwise"), dict(reads="thoughts")):
        with pytest.raises(ValueError, match=r"RewardModel\..* must be"):
            RewardModel(**bad)
    rows = [
        {"prompt": "q", "chosen": "<think> only thoughts", "rejected": "x"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    data = load_preferences(
        PairFile(path=path), replace(encoder("v3"), reads="summary"), max_tokens=64, held_out_fraction=0.0
    )
    assert data.skipped == {NO_SUMMARY: 1} and len(load(path, "v3").train) == 2
