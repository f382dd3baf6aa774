"""Checkpoints drawn as widely as the formats allow: they come back bit for bit, and headers alone say what they are."""

import os

import checkpoint_draws as draws
import literal_checkpoints as literal
import ml_dtypes
import numpy as np
import pytest
from helpers import micro, random_variables

import deepseek_jax as dsj
from deepseek_jax import storage
from deepseek_jax.interop import headers
from deepseek_jax.interop.hf_config import config_from_hf
from deepseek_jax.interop.inspect import inspect_hf
from deepseek_jax.interop.load import load_hf
from deepseek_jax.interop.save import save_hf


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", literal.KINDS)
def test_drawn_checkpoints_come_back_bit_for_bit(kind, quantised, tmp_path):
    for seed in range(6):
        draw = np.random.default_rng([seed, literal.KINDS.index(kind), quantised])
        config = draws.wide_config(kind, draw)
        tensors = literal.random_tensors(config, draw)
        dtype = "float8" if quantised else "bfloat16"
        if quantised:
            stored, _ = literal.quantised(tensors, bool(seed % 2))
            config["quantization_config"] = literal.FP8 | ({"scale_fmt": "ue8m0"} if seed % 2 else {})
        else:
            stored = {
                n: t if n.endswith("correction_bias") else t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()
            }
        source = literal.write(tmp_path / f"source{seed}", config, stored, shards=1 + seed % 3)
        model, variables = load_hf(source, dtype, progress=False)
        out = save_hf(tmp_path / f"out{seed}", model, variables, dtype, progress=False, shard_bytes=200_000)
        ours, theirs = (headers.open_folder(folder) for folder in (out, source))
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, info in ours.tensors.items():
            other = theirs.tensors[name]
            assert (info.dtype, info.shape) == (other.dtype, other.shape), name
            parts = [storage.read_bytes(t.file, t.start, t.end) for t in (info, other)]
            assert parts[0] == parts[1], name
        assert ours.config.get("quantization_config") == config.get("quantization_config")
        assert len(ours.files) == 1 or all(
            sum(t.nbytes for t in ours.tensors.values() if t.file.name == file) <= 200_000 for file in ours.files
        )


def test_shards_are_of_5_gb():
    assert save_hf.__kwdefaults__["shard_bytes"] == 5_000_000_000


def test_inspecting_reads_headers_only(tmp_path, monkeypatch):
    config = micro("v3")
    folder = save_hf(tmp_path / "v3", dsj.DeepSeek(config), random_variables(config), progress=False)
    [file] = folder.glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = os.path.getsize(file)
    with open(file, "r+b") as stream:  # all that a header does not say is a hole
        stream.truncate(header)
        stream.truncate(size)
    read = []
    whole = storage.read_bytes
    monkeypatch.setattr(
        storage, "read_bytes", lambda p, start=0, end=None: read.append((start, end)) or whole(p, start, end)
    )
    monkeypatch.setattr(storage.PartReader, "read", lambda *args, **kwargs: pytest.fail("a tensor was read"))
    assert "whole: every tensor is there" in str(inspect_hf(folder))
    assert max(end for _, end in read if end <= size) <= header


def test_a_base_within_the_scaling_is_read():
    plain = literal.random_config("llama", np.random.default_rng(0)) | {"rope_theta": 7.0, "rope_scaling": None}
    inner = plain | {"rope_theta": None, "rope_scaling": {"rope_type": "default", "rope_theta": 7.0}}
    assert config_from_hf(inner) == config_from_hf(plain) and config_from_hf(plain).rope == dsj.Rope(theta=7.0)
