"""A whole run on gs://: folder, metrics, token cache, checkpoints, report; killed between, and continued."""

import dataclasses

import numpy as np
from trouble import small_run

import deepseek_jax as dsj
from deepseek_jax import storage
from deepseek_jax.metrics.writer import read_jsonl

pytest_plugins = ["fake_gcs"]


def test_a_run_on_a_bucket_is_the_run_on_a_disk(gcs, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    draw = np.random.default_rng(0)
    for i in range(40):
        (corpus / f"{i}.txt").write_text(" ".join(draw.choice(["alpha", "beta", "gamma", "delta"], 60)))
    local = small_run(corpus, tmp_path / "cache", steps=6, checkpoint_every=3, sample_prompts=("a",), sample_tokens=4)
    there = dataclasses.replace(local, data=dataclasses.replace(local.data, cache_dir="gs://bucket/cache"))
    on_disk = dsj.train(local, tmp_path / "run", progress=False)

    run_dir = "gs://bucket/run"
    first = dsj.train(there, run_dir, progress=False)
    storage.remove_tree(f"{run_dir}/checkpoints/6")
    again = dsj.train(there, run_dir, progress=False)
    for run in (first, again):
        for ours, theirs in zip(run.metrics, on_disk.metrics, strict=True):
            assert {**ours, "tokens_per_second": 0} == {**theirs, "tokens_per_second": 0}
    names = {str(file).removeprefix(run_dir + "/") for file in storage.list_files(run_dir)}
    assert {
        "manifest.json",
        "tokenizer.json",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "plots/loss.png",
    } <= names
    assert "checkpoints/6/sha256.0.json" in names and storage.list_files("gs://bucket/cache")
    assert dsj.load_run(run_dir).step == 6
    assert read_jsonl(f"{run_dir}/metrics.jsonl") == again.metrics
