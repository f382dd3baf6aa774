"""experiments/distill_vs_rl: its data and its table. (The stages run at micro size in tests/test_r1.py.)"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.cli.train import load_config
from deepseek_jax.posttrain.r1 import R1, _references
from deepseek_jax.posttrain.rewards import accuracy, language_share
from deepseek_jax.posttrain.tasks import Problem, split_of

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments" / "distill_vs_rl"))

import corpus  # noqa: E402
import table  # noqa: E402


def test_steps_are_right_and_lead_to_the_answer():
    assert corpus.steps("( 56 + -33 ) - 4 * 2") == (["56+-33=23", "4*2=8", "23-8=15"], 15)
    for part in corpus.PARTS:
        for question, answer in corpus.questions(part, 50, 3):
            lines, value = corpus.steps(corpus.expression(question))
            assert str(value) == answer
            for line in lines:
                left, _, right = line.partition("=")
                assert eval(left) == int(right)


@pytest.mark.parametrize("gym", [True, False])
def test_prepared_data_keeps_the_splits_apart(tmp_path, monkeypatch, gym):
    if not gym:
        monkeypatch.setattr(corpus, "reasoning_gym_version", lambda: None)
    found = corpus.prepare(tmp_path, 60, 40, 1)

    def read(name):
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    texts = [row["text"] for row in read("corpus.jsonl")]
    assert found["documents"] == len(texts) and found["problems"] == len(read("problems/all.jsonl")) > 90
    for row in read("problems/all.jsonl"):
        assert not any(text.startswith(row["prompt"]) for text in texts), "a problem of RL is in the corpus"
    for row in read("remarks.jsonl"):
        if split_of(row["prompt"]) == "test":
            assert not any(text.startswith(row["prompt"]) for text in texts)
    sums = [text for text in texts if "boxed" in text]
    share = np.mean([corpus.writes_steps(text) for text in sums])
    assert 0.15 < share < 0.45, "a minority writes its steps"
    for row in read("cold.jsonl"):
        user, answer = row["messages"]
        assert split_of(user["content"]) == "train"
        said = f"<think>\n{answer['reasoning_content']}\n</think>\n\n{answer['content']}"
        assert language_share(said, "en") == 1
        value = corpus.steps(corpus.expression(user["content"]))[1]
        assert accuracy(Problem(prompt=user["content"], answer=str(value)), said) == 1


def test_remarks_are_judged():
    question = corpus.REMARKS[0].format(37)
    assert corpus.judged(question, "<think>\nx\n</think>\n\n37 is odd. It lies between 36 and 38.") == (True, True)
    assert corpus.judged(question, "37 is odd.") == (True, False)
    assert corpus.judged(question, corpus.remark(37, full=True, right=False)) == (False, False)
    assert corpus.judged(question, "37 is odd. It lies between 35 and 39.") == (False, False)


def test_table_has_a_line_a_model():
    row = {
        "accuracy": {part: [1, 2, 0.1, 0.9] for part in ("chain", "chain2", "mixed", "all")}, "tokens": 5.0,
        "writes_steps": 0.5, "english": None, "remarks": 4, "true": 2, "full": 1, "seconds": 3.0,
    }  # fmt: skip
    rows = {name: {**row, "model": name} for name in ("student-rl", "base")}
    lines = table.markdown({"rows": rows}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| V3-style base", "| RL on the student"]
    assert "**0.500** (0.100–0.900)" in lines[2] and {line.count("|") for line in lines} == {lines[0].count("|")}


def test_configs_of_the_pipeline_construct():
    published = load_config(ROOT / "configs" / "deepseek_r1.py", R1)
    names = [stage.name for stage in published.stages]
    used = set().union(*(_references(stage.run) for stage in published.stages))
    assert used == {
        "r1-zero-32k",
        "cold-start",
        "reasoning-rl",
        "rl-samples",
        "sft",
        "helpful",
        "safety",
        "all-rl-rules",
    }
    by_name = dict(zip(names, (stage.run for stage in published.stages), strict=True))
    zero, stage4 = by_name["r1-zero-32k"], by_name["all-rl"]
    assert zero.completions == 8192 and zero.completions // zero.updates == 512 and zero.samples == 16
    assert zero.updates * zero.reference_every == 400 and zero.rate.peak == 3e-6 and zero.loss.kl == 0.001
    assert sum(by_name[n].steps * 16 for n in ("r1-zero-32k", "r1-zero")) == 10_400
    assert stage4.temperature == 0.7 and stage4.steps * 16 == 400 and stage4.loss.clip_high == 10
