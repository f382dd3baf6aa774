"""The demonstration experiments/r1_zero_small, its parts at tiny size: corpus, gate, rewards, the last line."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import random_variables

import deepseek_jax as dsj
from deepseek_jax.data.tokenizer import byte_tokenizer
from deepseek_jax.posttrain.rewards import Item
from deepseek_jax.posttrain.tasks import Problem, split_of

SCRIPT = Path(__file__).parent.parent / "experiments" / "r1_zero_small" / "run.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("r1_zero_small_run", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its writer is found by the module's name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tiny(script):
    return script.Setting(
        documents=600, pretraining_steps=4, gate_every=2, gate_problems=16, grpo_steps=2, prompts=4, eval_problems=8
    )


def test_the_corpus_has_problems_of_the_train_split_and_steps_in_its_share(script, tmp_path):
    script.write_corpus(tmp_path / "corpus.jsonl", script.Setting(documents=4000, written=0.3))
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert 3400 < len(texts) < 3800
    for text in texts:
        asked, answer = text.split("=")
        prompt, _, steps = asked.partition(":")
        sums = "".join(str(s) for s in np.cumsum([int(digit) for digit in prompt]) % 10)
        assert split_of(prompt) == "train" and len(prompt) == 6 and answer == sums[-1] and steps in ("", sums[:-1])
    assert sum(":" in text for text in texts) / len(texts) == pytest.approx(0.3, abs=0.03)
    script.write_corpus(tmp_path / "none.jsonl", script.Setting(documents=500, written=0.0))
    assert ":" not in (tmp_path / "none.jsonl").read_text().replace('{"text": ', "")


def test_shuffled_rewards_are_as_many_and_say_nothing(script):
    items = [
        Item(
            problem=Problem(prompt="12", answer="3"), completion="=3" if i % 3 == 0 else "=4", tokens=3, truncated=False
        )
        for i in range(30)
    ]
    right = np.array([item.completion == "=3" for item in items])
    dealt = script.shuffled_accuracy(0)
    scores = np.array([dealt(items) for _ in range(400)])
    assert (scores.sum(axis=1) == 10).all()
    assert scores[:, right].mean() == pytest.approx(1 / 3, abs=0.02)


def test_a_seed_without_skill_ends_at_the_gate_and_one_with_it_goes_on(script, tiny, tmp_path, monkeypatch, capsys):
    """With a random model in place of a pre-trained one; the second time the gate is as low as its skill."""
    config = script.model()
    variables = random_variables(config, scale=0.05)

    def trained(run, run_dir, *, until, progress):
        dsj.save_hf(run_dir, dsj.DeepSeek(config), variables)
        byte_tokenizer().save(run_dir / "tokenizer.json")
        state = SimpleNamespace(params=variables["params"], router=variables.get("router", {}))
        assert run.steps == 4 and run.eval_every == 2
        for step in (2, 4):
            if until(state, step):
                break

    monkeypatch.setattr(script, "SLOTS", 32)
    monkeypatch.setattr(dsj, "train", trained)
    assert script.report(tiny, tmp_path) == 1
    *told, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["gated"] is False and result["seed"] == 0 and result["pretraining_steps"] == 4
    assert "greedy_after" not in result and "curve" not in result and not (tmp_path / "rl").exists()
    assert sum(line.startswith("pre-training step") for line in told) == 2

    assert script.report(replace(tiny, gate=-1.0, shuffled=True), tmp_path / "again") == 0
    *told, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["gated"] is True and result["pretraining_steps"] == 2
    assert {"greedy_before", "greedy_after", "length_before", "length_after", "seconds"} <= set(result)
    assert 0 <= result["greedy_after"] <= 1 <= result["length_after"] <= script.ANSWER
    assert [line.split(":")[0] for line in told if line.startswith("GRPO step")] == ["GRPO step 1", "GRPO step 2"]
    assert sum(line.startswith("greedy, ") for line in told) == 2


def test_the_exit_status_says_whether_the_gate_was_reached(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--seed", "3"])
    monkeypatch.setattr(script, "report", lambda setting, folder: int(setting.seed == 3))
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
