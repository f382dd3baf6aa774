"""A whole run from the command line: train, continue, generate; and that a continued run is the unbroken one."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from helpers import one_device_flags

import deepseek_jax as dsj
from deepseek_jax.metrics.writer import read_jsonl

CONFIG = textwrap.dedent(
    """
    from dataclasses import replace
    from deepseek_jax import get_config as model
    from deepseek_jax.data.config import DataConfig
    from deepseek_jax.data.sources import TextFiles
    from deepseek_jax.training import MultiStep, RunConfig

    def get_config():
        return RunConfig(
            model=replace(model("deepseek-v3-micro"), vocab_size=320, num_hidden_layers=2),
            schedule=MultiStep(peak=1e-2, warmup_steps=2),
            data=DataConfig(
                sources=(TextFiles(path={text!r}),), vocab_size=300, held_out_fraction=0.2, cache_dir={cache!r}
            ),
            steps=6, batch_size=8, seq_len=24, log_every=1, checkpoint_every=3, eval_sequences=4,
            sample_prompts=("a",), sample_tokens=4,
        )
    """
)


def command(*words):
    """What `deepseek-jax` prints, run as a process of its own on one device."""
    done = subprocess.run(
        [sys.executable, "-c", "from deepseek_jax.cli.main import main; raise SystemExit(main())", *map(str, words)],
        env=os.environ | {"XLA_FLAGS": one_device_flags()}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.smoke
def test_train_continue_generate(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    draw = np.random.default_rng(0)
    for i in range(40):
        (text / f"{i}.txt").write_text(" ".join(draw.choice(["alpha", "beta", "gamma", "delta"], 60)))
    config = tmp_path / "small.py"
    config.write_text(CONFIG.format(text=str(text), cache=str(tmp_path / "cache")))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    said = command("train", config, "--run-dir", whole)
    assert "bits per byte" in said and "'a' goes on:" in said and str(whole / "checkpoints" / "6") in said
    lines = read_jsonl(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[-1]["held_out_bits_per_byte"] < lines[0]["held_out_bits_per_byte"]
    assert lines[-1]["tokens"] == 6 * 8 * 24
    assert (whole / "plots" / "loss.png").exists() and (whole / "plots" / "router.png").exists()
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["seeds"] == {"run": 0} and manifest["data"]["fingerprint"] and manifest["mesh"]["data"] == 1

    # The same run, killed after its save at step 3: what came later is gone or will be written again.
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "6")
    command("train", config, "--run-dir", broken)
    for ours, theirs in zip(read_jsonl(broken / "metrics.jsonl"), lines, strict=True):
        for name in ("loss", "loss_main", "loss_mtp", "grad_norm", "held_out_loss"):
            assert ours.get(name) == theirs.get(name), (ours["step"], name)
    first, second = dsj.load_run(whole), dsj.load_run(broken)
    jax.tree.map(np.testing.assert_array_equal, first.variables, second.variables)

    assert command("generate", whole, "--prompt", "alpha ", "--max-new-tokens", 5).startswith("alpha ")
