"""Signals, hangs, kills, full disks and poisoned batches: nothing lost, nothing wrong kept, and the run says so."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_device_flags
from trouble import small_run

import deepseek_jax as dsj
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.metrics.writer import read_jsonl
from deepseek_jax.training import BatchRamp, ByTokens, MultiStep, NotFinite, SaveFailed, loop, saves
from deepseek_jax.training import step as step_module
from deepseek_jax.training.loss import loss_parts

TIMES = ("tokens_per_second", "mfu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "corpus"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(["alpha", "beta", "gamma", "delta"], 60)))
    return folder


@pytest.fixture
def small(corpus):
    return lambda **fields: small_run(corpus, corpus.parent / "cache", **fields)


@pytest.fixture
def quiet_train():
    return lambda config, run_dir, **more: dsj.train(config, run_dir, progress=False, **more)


def start(run_dir, corpus, kind, *fields):
    words = [sys.executable, str(Path(__file__).parent / "trouble.py"), str(run_dir), str(corpus), kind, *fields]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(child, ready):
    """Returns when `ready()`; fails when the child ends before, or after two minutes."""
    for _ in range(2400):
        if ready():
            return
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    raise AssertionError("nothing happened in two minutes")


def steps_logged(run_dir):
    path = run_dir / "metrics.jsonl"
    return [line["step"] for line in read_jsonl(path)] if path.exists() else []


def stop(child, number=signal.SIGTERM):
    child.send_signal(number)
    began = time.monotonic()
    _, err = child.communicate(timeout=60)
    return child.returncode, err, time.monotonic() - began


def lines(run_dir):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_jsonl(run_dir / "metrics.jsonl")]


def saved_steps(run_dir):
    with Store(run_dir / "checkpoints", read_only=True) as store:
        return store.steps()


def test_a_signal_saves_within_a_step_and_the_run_goes_on_exactly(corpus, tmp_path):
    number = signal.SIGTERM
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    child = start(broken, corpus, "slow", "steps=60", "checkpoint_every=50")
    wait_for(child, lambda: len(steps_logged(broken)) > 4)
    code, err, _ = stop(child, number)
    assert code == 75 and f"{signal.Signals(number).name}: stopped at step" in err, err
    [saved] = saved_steps(broken)
    assert saved == steps_logged(broken)[-1], "the very step that was done is saved"
    for folder in (broken, whole):
        child = start(folder, corpus, "none", "steps=60", "checkpoint_every=50")
        assert child.communicate(timeout=120) and child.returncode == 0
    assert lines(broken) == lines(whole)


def test_a_signal_during_compilation_ends_the_process_at_once(corpus, tmp_path):
    child = start(tmp_path / "run", corpus, "compile")
    assert child.stdout is not None and child.stdout.readline() == "stuck\n"
    code, err, seconds = stop(child)
    assert code == 75 and "stopped at step 0" in err and seconds < 10, err
    assert saved_steps(tmp_path / "run") == []


def test_a_signal_during_evaluation_saves_and_the_line_is_made_up_for(corpus, tmp_path):
    run = tmp_path / "run"
    child = start(run, corpus, "evaluate", "eval_every=6")
    assert child.stdout is not None and child.stdout.readline() == "stuck\n"
    code, err, seconds = stop(child)
    assert code == 75 and "stopped at step 6" in err and seconds < 10, err
    assert saved_steps(run)[-1] == 6 and steps_logged(run)[-1] == 5
    child = start(run, corpus, "none", "eval_every=6")
    assert child.communicate(timeout=120) and child.returncode == 0
    whole = tmp_path / "whole"
    child = start(whole, corpus, "none", "eval_every=6")
    assert child.communicate(timeout=120) and child.returncode == 0
    assert lines(run)[1:] == lines(whole)[1:], "line 0 had the evaluation that was put in its place"


def test_a_hung_step_ends_the_process_with_all_stacks(corpus, tmp_path):
    child = start(tmp_path / "run", corpus, "step", "hang_timeout_s=8.0")
    _, err = child.communicate(timeout=120)
    assert child.returncode == 124
    for text in (err, (tmp_path / "run" / "hang.txt").read_text()):
        assert "no progress for 8 s while" in text and "in forever" in text and text.lower().count("thread 0x") >= 2


def test_a_second_run_in_the_folder_is_refused(corpus, small, tmp_path):
    child = start(tmp_path / "run", corpus, "slow", "steps=100000")
    wait_for(child, lambda: len(steps_logged(tmp_path / "run")) > 1)
    with pytest.raises(ValueError, match=rf"{child.pid}"):
        dsj.train(small(), tmp_path / "run", progress=False)
    child.kill()
    child.communicate()
    assert dsj.train(small(steps=1), tmp_path / "other", progress=False).checkpoint.exists()


def _poison(monkeypatch, bad):
    """Losses of the batches with these numbers (their first token is set to say so) are NaN."""
    place, count = loop.place_batch, [0]

    def placed(batch, mesh, here):
        if "segment_ids" not in batch:  # a training batch
            batch = {"tokens": batch["tokens"].copy()}
            batch["tokens"][:, 0] = 7 if count[0] in bad else 8
            count[0] += 1
        return place(batch, mesh, here)

    def parts(config, params, router, batch, *rest):
        total, losses = loss_parts(config, params, router, batch, *rest)
        return total * jnp.where(batch["tokens"][0, 0] == 7, jnp.nan, 1.0), losses

    monkeypatch.setattr(loop, "place_batch", placed)
    monkeypatch.setattr(step_module, "loss_parts", parts)


def test_losses_that_are_not_finite(monkeypatch, small, quiet_train, tmp_path):
    """Counted while they come now and then; the end of the run when they come in a row, with nothing bad saved."""
    _poison(monkeypatch, {2, 5, 8, 9, 10})
    config = small(max_skipped_in_a_row=3, checkpoint_every=1, keep_checkpoints=20)
    with pytest.raises(NotFinite, match="3 updates in a row .* up to step 11") as error:
        quiet_train(config, tmp_path / "run")
    assert error.value.exit_code == 76
    read = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped"] for line in read if line["step"]] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 5][: len(read) - 1]
    assert np.isnan(read[3]["loss"]) and np.isfinite(read[4]["loss"])
    kept = sorted(file.name for file in (tmp_path / "run" / "skipped").iterdir())
    assert kept == ["step_10.npz", "step_11.npz", "step_9.npz"]
    assert np.load(tmp_path / "run" / "skipped" / "step_9.npz")["tokens"].shape == (8, 17)
    variables = dsj.load_run(tmp_path / "run").variables
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_a_run_ends_where_the_caller_says(small, quiet_train, tmp_path):
    asked = []

    def until(state, step):
        asked.append(step)
        return np.mean([step]) >= 4  # as comparisons of numpy's numbers answer: no bool of Python's

    quiet_train(small(eval_every=2), tmp_path / "run", until=until)
    assert asked == [2, 4] and saved_steps(tmp_path / "run") == [4]


def test_a_state_that_is_not_finite_is_not_saved(monkeypatch, small, quiet_train, tmp_path):
    monkeypatch.setattr(saves, "all_finite", lambda state: jnp.array(int(state.step) < 8))
    with pytest.raises(NotFinite, match="state of step 8"):
        quiet_train(small(), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [4]


def test_a_save_that_fails(monkeypatch, small, quiet_train, tmp_path, capsys):
    """At once, as a read-only folder does, or behind the run's back, as a full disk does: step 8 is lost, no other."""
    save = Store.save

    def at_once(self, step, *rest):
        if step == 8:
            raise OSError(30, "Read-only file system")
        return save(self, step, *rest)

    def behind(self, step, *rest):
        saved = save(self, step, *rest)
        if step == 8:
            self._hashing.join()
            self._hashing_error = OSError(28, "No space left on device")
        return saved

    for name, failing, said in (("at once", at_once, "Read-only file system"), ("behind", behind, "No space left")):
        monkeypatch.setattr(Store, "save", failing)
        with pytest.raises(SaveFailed, match=rf"step 8: saving .*{said}.*on disk: steps \[4") as error:
            quiet_train(small(), tmp_path / f"stop {name}")
        assert error.value.exit_code == 74
        dsj.train(small(on_save_error="continue", keep_checkpoints=9), tmp_path / f"go on {name}")
        told = capsys.readouterr().err
        assert f"step 8: saving a checkpoint to {tmp_path / f'go on {name}'}" in told and said in told
        assert {4, 12} <= set(saved_steps(tmp_path / f"go on {name}"))

    def last(self, step, *rest):
        if step == 12:
            raise OSError(28, "No space left on device")
        return save(self, step, *rest)

    monkeypatch.setattr(Store, "save", last)
    with pytest.raises(SaveFailed, match="step 12"):
        quiet_train(small(on_save_error="continue"), tmp_path / "last")


def test_a_first_save_cut_off_is_done_again(small, quiet_train, tmp_path):
    quiet_train(small(steps=4, train_tokens=12 * 8 * 16), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "4" / "sha256.0.json").unlink()
    run = quiet_train(small(steps=8, train_tokens=12 * 8 * 16), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [4, 8] and [line["step"] for line in run.metrics] == list(range(9))
    assert (tmp_path / "run" / "checkpoints" / "4" / "sha256.0.json").exists()


def test_precision_asked_for_is_precision_used(small, quiet_train, tmp_path):
    """Settings of jax that are local to the calling thread hold in the threads beside it too."""
    config = small(steps=1)
    config = replace(config, model=replace(config.model, dtype="float64", param_dtype="float64"))
    with pytest.raises(ValueError, match="param_dtype = 'float64'|dtype = 'float64': set JAX_ENABLE_X64=1"):
        quiet_train(config, tmp_path / "run")
    with jax.enable_x64(True):
        run = quiet_train(config, tmp_path / "run")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(run.state.params)} == {"float64"}


def test_a_damaged_checkpoint_is_passed_over(small, quiet_train, tmp_path, capsys):
    quiet_train(small(), tmp_path / "run")
    before = lines(tmp_path / "run")

    def damage(step):
        file = tmp_path / "run" / "checkpoints" / str(step) / "data" / "metadata"
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])

    damage(12)
    dsj.train(small(), tmp_path / "run")
    said = capsys.readouterr().err
    assert "12 is passed over: data/metadata: its content has changed" in said
    assert "at step 8 of 12: continuing" in said and lines(tmp_path / "run") == before
    damage(8)
    damage(12)
    with pytest.raises(ValueError, match="no good checkpoint"):
        quiet_train(small(), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [8, 12], "nothing is deleted where there is nothing to go on from"


def test_another_recipe_is_refused(small, quiet_train, tmp_path):
    quiet_train(small(steps=4), tmp_path / "run")
    config = small(steps=8)
    for changed, said in (
        (replace(config, schedule=MultiStep(peak=2e-2, warmup_steps=2)), r"schedule.peak: 0.01 .*, 0.02 now"),
        (replace(config, seed=1), "seed: 0 in the checkpoint, 1 now"),
        (replace(config, model=replace(config.model, rms_norm_eps=1e-5)), "model.rms_norm_eps"),
        (replace(config, bias_update_speed=ByTokens(values=(0.0,), boundaries=())), "bias_update_speed"),
        (replace(config, seq_len=15), "seq_len: 16"),
        (replace(config, data=replace(config.data, held_out_fraction=0.3)), "data_fingerprint|tokenizer"),
    ):
        with pytest.raises(ValueError, match=said):
            quiet_train(changed, tmp_path / "run")
    run = quiet_train(replace(config, log_every=2, keep_checkpoints=1), tmp_path / "run")
    assert run.metrics[-1]["step"] == 8


def test_weights_of_another_run(small, quiet_train, tmp_path):
    first = quiet_train(small(steps=4), tmp_path / "first")
    config = small(
        steps=1, init_from=str(tmp_path / "first"), schedule=MultiStep(peak=1e-30, warmup_steps=0), profile="0:1",
        writers=("tensorboard",),
    )  # fmt: skip
    second = quiet_train(config, tmp_path / "second")
    assert list((tmp_path / "second" / "profile").rglob("*.xplane.pb")), "a trace for xprof"
    assert list((tmp_path / "second").rglob("events.out.tfevents.*"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), second.state.params, first.state.params)
    assert second.metrics[0]["held_out_loss"] == first.metrics[-1]["held_out_loss"]
    variables, tokenizer = {"params": first.state.params}, tmp_path / "first" / "tokenizer.json"
    dsj.save_hf(tmp_path / "hf", dsj.DeepSeek(config.model), variables, "float32", tokenizer=tokenizer, progress=False)
    third = quiet_train(replace(config, init_from=str(tmp_path / "hf"), profile=None, writers=()), tmp_path / "hf run")
    assert third.metrics[0]["held_out_loss"] == first.metrics[-1]["held_out_loss"]
    deeper = replace(config, model=replace(config.model, num_hidden_layers=2), init_from=str(tmp_path / "hf"))
    with pytest.raises(ValueError, match="does not match this configuration"):
        quiet_train(deeper, tmp_path / "deeper")
    with pytest.raises(ValueError, match="init_from = '.*absent' holds neither checkpoints nor config.json"):
        quiet_train(replace(config, init_from=str(tmp_path / "absent")), tmp_path / "third")


def test_certificate(small, tmp_path, monkeypatch):
    """The whole recipe at once: ramp, accumulation, λ and γ by tokens, EMA, spikes, stored moments, mixture, masking."""
    from deepseek_jax.data.sources import PythonStdlib
    from deepseek_jax.training import AdamW, SpikeSkip

    v3 = dsj.get_config("deepseek-v3-micro")
    config = small(
        model=replace(v3, vocab_size=320, num_hidden_layers=1, ffn=replace(v3.ffn, first_k_dense_replace=0)),
        accumulation=2, batch_ramp=BatchRamp(start=4, tokens=200, increment=4), ema_decay=0.9,
        spike_skip=SpikeSkip(window=4), optimizer=AdamW(moment_dtype="bfloat16"), steps=8,
        mtp_loss_weight=ByTokens(values=(0.3, 0.1), boundaries=(300,)),
        bias_update_speed=ByTokens(values=(0.01, 0.0), boundaries=(400,)),
    )  # fmt: skip
    sources = (*config.data.sources, PythonStdlib(max_bytes=400_000, weight=0.5))
    config = replace(config, data=replace(config.data, sources=sources, cross_document_attention=False))
    with monkeypatch.context() as patched:
        patched.setenv("XLA_FLAGS", one_device_flags())  # one device is quicker to compile for
        certificate = dsj.certify(config, tmp_path / "proof", steps=3, say=lambda text: None)
    assert certificate["equal"], certificate["differences"]
    assert json.loads((tmp_path / "proof" / "manifest.json").read_text())["certificate"]["state_sha256"]
    # It can fail: one changed number in one line, one bit in the state.
    from deepseek_jax.training import certify as module

    file = tmp_path / "proof" / "killed" / "metrics.jsonl"
    file.write_text(file.read_text().replace('"grad_norm": ', '"grad_norm": 1', 1))
    config = replace(config, train_tokens=config.horizon, steps=6)
    found = sys.modules[module.__module__]._differences(
        config, tmp_path / "proof" / "unbroken", tmp_path / "proof" / "killed"
    )
    assert len(found) == 1 and found[0].endswith("step 1: grad_norm")
