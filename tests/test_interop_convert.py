"""Run folders and published checkpoints, one into the other, and what `inspect` says."""

import filecmp
import json

import jax
import numpy as np
import pytest
from helpers import micro, random_variables, run_config

import deepseek_jax as dsj
from deepseek_jax.cli import convert, inspect
from deepseek_jax.data.tokenizer import byte_tokenizer
from deepseek_jax.infer.load import load_run
from deepseek_jax.interop.load import load_hf
from deepseek_jax.interop.save import save_hf
from deepseek_jax.parallel import MeshConfig, make_mesh
from deepseek_jax.training.begin import fresh


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small V3 in bfloat16 with a tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "small-v3"
    config = micro("v3", vocab_size=300)
    variables = random_variables(config)
    return save_hf(folder, dsj.DeepSeek(config), variables, tokenizer=byte_tokenizer(), progress=False)


def equal(ours, theirs) -> bool:
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), ours, theirs)
    return all(jax.tree.leaves(same))


def test_a_published_checkpoint_becomes_a_run_and_comes_back(published, tmp_path, capsys):
    convert.run([str(published), str(tmp_path / "run")])
    run = load_run(tmp_path / "run")
    model, variables = load_hf(published, progress=False)
    assert run.step == 0 and run.model.config == model.config and equal(run.variables, variables)
    assert dsj.continue_text(run, ["a"], max_new_tokens=2)

    convert.run([str(tmp_path / "run"), str(tmp_path / "back")])
    assert filecmp.cmp(tmp_path / "back/model.safetensors", published / "model.safetensors", shallow=False)
    assert filecmp.cmp(tmp_path / "back/tokenizer.json", published / "tokenizer.json", shallow=False)
    stated = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert stated["bos_token"] == "<｜begin▁of▁sentence｜>" and stated["eos_token"] == "<｜end▁of▁sentence｜>"
    assert capsys.readouterr().out.split() == [str(tmp_path / "run"), str(tmp_path / "back")]

    convert.run([str(tmp_path / "run"), str(tmp_path / "main"), "--no-mtp", "--dtype", "float8", "--ue8m0"])
    small, _ = load_hf(tmp_path / "main", "float8", progress=False)
    assert small.config.num_nextn_predict_layers == 0


def test_a_run_begins_from_a_published_checkpoint(published, tmp_path):
    convert.run([str(published), str(tmp_path / "run")])
    model, variables = load_hf(published, progress=False)
    config = run_config(model.config, init_from=str(tmp_path / "run"), batch_size=8)
    (tmp_path / "new").mkdir()
    byte_tokenizer().save(tmp_path / "new/tokenizer.json")
    state = fresh(config, make_mesh(MeshConfig()), tmp_path / "new", lambda text: None)
    assert equal(state.params, variables["params"]) and equal(state.router, variables["router"])


def test_a_published_checkpoint_in_another_dtype(published, tmp_path):
    convert.run([str(published), str(tmp_path / "fp8"), "--to", "hf", "--dtype", "float8"])
    assert json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    assert (tmp_path / "fp8/tokenizer.json").exists()
    _, exact = load_hf(published, progress=False)
    _, rounded = load_hf(tmp_path / "fp8", progress=False)
    for ours, theirs in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        assert np.abs(ours - theirs).max() <= np.abs(theirs).max() / 16


def test_what_convert_refuses(published, tmp_path):
    for args, message in (
        ([str(tmp_path), "x"], "neither manifest.json"),
        ([str(published), str(tmp_path / "a"), "--step", "3"], "--step 3"),
        ([str(published), str(tmp_path / "a"), "--dtype", "float8"], "a run computes with its weights"),
        ([str(published), str(tmp_path / "a"), "--ue8m0"], "--ue8m0"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.run(args)
    convert.run([str(published), str(tmp_path / "run")])
    with pytest.raises(ValueError, match="holds a run already"):
        convert.run([str(published), str(tmp_path / "run")])
    with pytest.raises(ValueError, match="is a run folder already"):
        convert.run([str(tmp_path / "run"), str(tmp_path / "b"), "--to", "run"])
    (published / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        with pytest.raises(ValueError, match="has no tokenizer.json: give --tokenizer"):
            convert.run([str(published), str(tmp_path / "c")])
        convert.run([str(published), str(tmp_path / "c"), "--tokenizer", str(tmp_path / "tokenizer.json")])
    finally:
        (tmp_path / "tokenizer.json").rename(published / "tokenizer.json")


def test_inspect_says_what_a_checkpoint_is(published, capsys):
    inspect.run([str(published)])
    text = capsys.readouterr().out
    config = micro("v3", vocab_size=300)
    counts = dsj.count_params(config)
    for part in (
        "format        deepseek_v3", "MLA, 4 heads", f"{counts.main:,} main", f"{counts.mtp:,} multi-token",
        "routed experts", "multi-token modules", "BF16", "F32", "whole: every tensor is there",
    ):  # fmt: skip
        assert part in text, text
    config_file = published / "config.json"
    stated = config_file.read_text()
    config_file.write_text(json.dumps(json.loads(stated) | {"new_field": 1}))
    inspect.run([str(published)])
    config_file.write_text(stated)
    assert "not understood: config.json: unknown fields ['new_field']" in capsys.readouterr().out
