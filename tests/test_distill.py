"""Runs of distillation on models of bytes: students that come to their teachers, resumed runs, refused ones."""

import json
import os
import shutil
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro, random_variables
from stops import stopped_at

import deepseek_jax as dsj
from deepseek_jax.chat.data import ChatData, ChatJsonl, PromptResponse
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import byte_tokenizer, with_tokens
from deepseek_jax.infer.engine import Engine
from deepseek_jax.posttrain import teachers as stores
from deepseek_jax.posttrain.common import Rate
from deepseek_jax.posttrain.distill import Distill, FromLogits, OnPolicy, Teacher, distill
from deepseek_jax.posttrain.distill_rollouts import Rollouts
from deepseek_jax.posttrain.rewards import Custom
from deepseek_jax.posttrain.tasks import RunningSum
from deepseek_jax.training import Stopped
from deepseek_jax.training.config import AdamW

TIMES = {"step_seconds", "data_seconds", "update_seconds", "update_tokens_per_second"}


def save(folder, seed, row=0.0, tokenizer=None, **fields):
    """A published checkpoint of a random model with bytes for tokens. The first number of each embedding is the same, so
    that the first row of the head is a bias: with `row` it makes some tokens likely."""
    folder.mkdir()
    config = micro("llm-gqa", **(dict(num_hidden_layers=1, vocab_size=259, bos_token_id=0, eos_token_id=1) | fields))
    variables = random_variables(config, seed=seed, scale=0.05)
    embed, head = variables["params"]["embed"], variables["params"]["head"]
    embed["embedding"] = embed["embedding"].at[:, 0].set(0.3)
    head["w"] = head["w"].at[0].add(jnp.asarray(row * np.random.default_rng(seed).normal(size=config.vocab_size)))
    dsj.save_hf(folder, dsj.DeepSeek(config), variables)
    (tokenizer or byte_tokenizer()).save(folder / "tokenizer.json")
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed, row in (("student", 0, 0.0), ("teacher", 1, 0.5), ("other", 2, 0.3)):
        save(folder / name, seed, row)
    return folder


def some_digits(problem, completion):
    return sum(c.isdigit() for c in completion) / max(len(completion), 1)


def config_of(folders, **fields):
    given = fields.pop("method", {})
    method = dict(
        problems=RunningSum(digits=3), prompts=4, samples=4, max_prompt_tokens=4, max_new_tokens=6, slots=8,
        eval_problems=8,
    )  # fmt: skip
    method = OnPolicy(**(method | given)) if isinstance(given, dict) else given
    defaults = dict(
        init_from=str(folders / "student"), template="none", teachers=(Teacher(path=str(folders / "teacher")),), steps=4,
        rate=Rate(peak=3e-3), optimizer=AdamW(weight_decay=0.0), method=method, checkpoint_every=100,
    )  # fmt: skip
    return Distill(**(defaults | fields))


def same(line):
    return {name: value for name, value in line.items() if name not in TIMES}


def test_a_student_comes_to_its_teacher_on_what_it_writes_itself(folders, tmp_path):
    config = config_of(folders, steps=30, rate=Rate(peak=3e-2, shape="cosine"))
    run = distill(config, tmp_path, progress=False)
    before, after = (run.metrics[i]["evaluation"] for i in (0, -1))
    assert after["kl_0"] < before["kl_0"] / 10 and after["agreement_0"] > before["agreement_0"] + 0.3
    assert {
        "loss", "kl", "kl_0", "agreement_0", "entropy", "cross_entropy", "grad_norm", "applied", "tokens", "length_mean",
        "truncated", "learning_rate", "prompts_too_long", *TIMES,
    } <= set(run.metrics[1])  # fmt: skip
    loaded = dsj.open_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], run.state.params)
    assert "kl_0" in run.summary()


@pytest.mark.parametrize("where", ["rollout", "between"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(folders, tmp_path, monkeypatch, where):
    """Of two teachers, with rewards in its evaluations; killed in a rollout, and between two."""
    teachers = tuple(Teacher(path=str(folders / name), weight=w) for name, w in (("teacher", 0.5), ("other", 2.0)))
    rewards = (Custom(function="test_distill:some_digits", name="digits"),)
    rate = Rate(peak=3e-3, shape="cosine", warmup_steps=2)
    config = config_of(folders, teachers=teachers, rate=rate, method=dict(rewards=rewards))
    whole = distill(config, tmp_path / "whole", progress=False)
    line = whole.metrics[1]
    assert line["loss"] == pytest.approx(line["kl"]) == pytest.approx(0.5 * line["kl_0"] + 2 * line["kl_1"], rel=1e-5)
    assert line["kl_0"] != line["kl_1"]
    assert {"reward", "digits", "greedy_truncated"} <= set(whole.metrics[-1]["evaluation"])
    room, name = (Engine, "step") if where == "rollout" else (Rollouts, "_packed")
    call = 6 if where == "rollout" else 3
    step = stopped_at(monkeypatch, room, name, call, lambda: distill(config, tmp_path / "cut", progress=False))
    assert 0 < step < 4
    again = distill(config, tmp_path / "cut", progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)
    assert [same(line) for line in again.metrics] == [same(line) for line in whole.metrics]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Conversations of two kinds, one of them read twice as often."""
    folder, draw = tmp_path_factory.mktemp("chats"), np.random.default_rng(0)
    for name, count in (("sums", 30), ("words", 14)):
        rows = []
        for i in range(count):
            a, b = draw.integers(0, 10, 2)
            rows.append(
                {"prompt": f"{a}+{b}{'?' * (i % 3)}", "response": str(a + b) if name == "sums" else "no" * (i % 3 + 1)}
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = (
        ChatJsonl(path=str(folder / "sums.jsonl"), rows=PromptResponse(), weight=2.0),
        ChatJsonl(path=str(folder / "words.jsonl"), rows=PromptResponse()),
    )
    return ChatData(sources=sources, template="llm", held_out_fraction=0.2)


def from_logits(folders, chats, **fields):
    own = {name: fields.pop(name) for name in ("steps", "teachers", "pieces", "rate") if name in fields}
    method = FromLogits(**(dict(data=chats, batch_size=8, seq_len=40) | fields))
    return config_of(folders, **(dict(template=None, method=method, rate=Rate(peak=3e-2, shape="cosine")) | own))


def test_a_student_comes_to_its_teacher_on_given_answers_stored_or_asked(folders, chats, tmp_path, monkeypatch):
    """Its k likeliest tokens as they were stored in several files, after a stop in between, and as it gives them now."""
    monkeypatch.setattr(stores, "FILE_BYTES", 6 * 40 * (8 * 100 + 4))
    config = from_logits(folders, chats, steps=12, top_k=100)
    asked = distill(config, tmp_path / "asked", progress=False)
    before, after = (asked.metrics[i]["evaluation"] for i in (0, -1))
    assert after["kl_0"] < before["kl_0"] / 10 and after["tokens"] > 10
    stored = replace(config, method=replace(config.method, stored=True))
    inner, calls = stores.storage.save_array, []

    def interrupted(path, array):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(path, array)

    monkeypatch.setattr(stores.storage, "save_array", interrupted)
    with pytest.raises(Stopped) as stopped:
        distill(stored, tmp_path / "stored", progress=False)
    stopped.value.thread.join()
    done = len(calls) // 3
    run = distill(stored, tmp_path / "stored", progress=False)
    files = sorted((tmp_path / "stored" / "teachers" / "0").glob("*_ids.npy"))
    assert 0 < done < len(files) == (len(calls) // 3) and np.load(files[0]).shape == (6, 40, 100)
    assert np.load(files[0]).dtype == np.int32
    for one, other in zip(asked.metrics, run.metrics, strict=True):
        if "loss" in one:
            np.testing.assert_allclose([one["loss"], one["kl_0"]], [other["loss"], other["kl_0"]], rtol=1e-4)
            assert one["tokens"] == other["tokens"] and one["agreement_0"] == other["agreement_0"]
    with pytest.raises(ValueError, match="was stored for another run .top_k: 100 then, 7 now"):
        distill(
            replace(config, method=replace(config.method, stored=True, top_k=7)), tmp_path / "stored", progress=False
        )


def test_documents_the_whole_vocabulary_and_a_resumed_run(folders, tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} " * 9)
    data = DataConfig(
        sources=(TextFiles(path=str(tmp_path / "text")),), held_out_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )
    config = from_logits(folders, data, steps=4, temperature=2.0, mix=0.25, pieces=2, batch_size=16)
    teacher = Teacher(path=str(shutil.copytree(folders / "teacher", tmp_path / "teacher")))
    config = replace(config, template="none", checkpoint_every=2, eval_every=2, teachers=(teacher,))
    whole = distill(config, tmp_path / "whole", progress=False)
    line = whole.metrics[1]
    assert line["loss"] == pytest.approx(0.75 * 4 * line["kl_0"] + 0.25 * line["cross_entropy"], rel=1e-5)
    assert line["tokens"] == 16 * 40
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    again = distill(config, tmp_path / "cut", progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)
    assert [same(line) for line in again.metrics] == [same(line) for line in whole.metrics]
    other = replace(config, teachers=(replace(teacher, weight=2.0),))
    with pytest.raises(ValueError, match="teachers: .* in the checkpoint"):
        distill(other, tmp_path / "cut", progress=False)
    shutil.rmtree(teacher.path)
    save(tmp_path / "teacher", 7)
    with pytest.raises(ValueError, match="teacher_fingerprints: .* in the checkpoint"):
        distill(config, tmp_path / "cut", progress=False)


def test_what_cannot_run_is_refused_before_it_begins(folders, chats, tmp_path):
    tokens = Teacher(
        path=save(tmp_path / "tokens", 1, tokenizer=with_tokens(byte_tokenizer(), ["<x>"]), vocab_size=260)
    )
    rows = Teacher(path=save(tmp_path / "rows", 1, vocab_size=260))
    for fields, said in (
        (dict(teachers=(tokens,)), r"Distill.teachers\[0\].path = .* has another tokenizer than the student"),
        (dict(teachers=(rows,)), "has vocab_size = 260, the student 259, of one tokenizer with 259 ids"),
        (dict(teachers=(Teacher(path="absent"),)), r"teachers\[0\].path = 'absent' has neither manifest.json"),
        (dict(method=dict(max_new_tokens=10_000)), "rows of 10004 tokens, more than max_position_embeddings"),
        (
            dict(method=FromLogits(data=chats, batch_size=8, seq_len=40, top_k=260), template=None),
            "FromLogits.top_k = 260: ",
        ),
        (
            dict(method=FromLogits(data=chats, batch_size=8, seq_len=999), template=None),
            "rows of 1000 tokens, more than",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            distill(config_of(folders, **fields), tmp_path / "run", progress=False)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    for make, said in (
        (lambda: config_of(folders, teachers=()), "Distill.teachers = .*give at least one"),
        (lambda: Teacher(path="x", weight=0.0), "Teacher.weight = 0.0: must be greater than 0"),
        (lambda: config_of(folders, pieces=3), "Distill.pieces = 3: must divide the 16 rows"),
        (lambda: from_logits(folders, chats, stored=True), "FromLogits.stored = True: needs top_k"),
        (lambda: from_logits(folders, chats, top_k=0), "FromLogits.top_k = 0: must be greater than 0"),
        (lambda: from_logits(folders, chats, mix=1.0), "FromLogits.mix = 1.0: must be in"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
