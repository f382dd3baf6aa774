"""Configurations drawn at random: what is loaded computes the logits of transformers, or of the literal forward pass.

DEEPSEEK_JAX_FUZZ=200 draws so many of each format. Skipped where torch or transformers 5.23 is missing: the `parity` extra.
"""

import dataclasses
import json
import os

import checkpoint_draws as draws
import jax
import jax.numpy as jnp
import literal_checkpoints as literal
import numpy as np
import pytest
from parity import relative, with_target

from deepseek_jax.interop.load import load_hf
from deepseek_jax.interop.save import save_hf

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
COUNT = int(os.environ.get("DEEPSEEK_JAX_FUZZ", "1"))


def truth_of(goldens, config, folder, tokens):
    """Logits, multi-token logits and the distance to another choice of experts, of plain float32 tensors in a folder."""
    if config["model_type"] != "deepseek":
        return goldens.transformers_logits(folder, tokens)
    tensors = literal.read(folder)
    rows = [literal.logits(draws.plainly(config), tensors, row) for row in tokens]
    logits = np.stack([row[0] for row in rows])
    return {"logits": logits, "mtp_logits": logits[:0], "margin": min(row[2] for row in rows)}


@pytest.mark.parametrize("seed", range(COUNT))
@pytest.mark.parametrize("quantised", ["plain", "fp8"])
@pytest.mark.parametrize("kind", literal.KINDS)
def test_what_is_loaded_computes_the_same(goldens, kind, quantised, seed, tmp_path):
    for attempt in range(30):
        draw = np.random.default_rng([seed, attempt, literal.KINDS.index(kind), quantised == "fp8"])
        config = draws.wide_config(kind, draw)
        tensors, tokens = literal.random_tensors(config, draw), draw.integers(0, config["vocab_size"], (2, 21))
        tokens = tokens.astype(np.int32)
        stored, source = tensors, config
        if quantised == "fp8":
            power_of_two = bool(draw.integers(2))
            stored, tensors = literal.quantised(tensors, power_of_two)
            source = config | {"quantization_config": literal.FP8 | ({"scale_fmt": "ue8m0"} if power_of_two else {})}
        literal.write(tmp_path / "plain", config, tensors)
        truth = truth_of(goldens, config, tmp_path / "plain", tokens)
        if truth["margin"] > 1e-4:
            break
    literal.write(tmp_path / "source", source, stored, shards=int(draw.integers(1, 4)))
    model, variables = load_hf(tmp_path / "source", progress=False)
    out = jax.jit(model.apply)(variables, jnp.asarray(tokens))
    assert relative(out.logits, truth["logits"]) < 1e-4, json.dumps(config)
    for depth in range(1, 1 + model.config.num_nextn_predict_layers):
        ours, theirs = (with_target(logits, depth) for logits in (out.mtp_logits, truth["mtp_logits"]))
        assert relative(ours, theirs) < 1e-4, json.dumps(config)

    save_hf(tmp_path / "ours", model, variables, "float32", progress=False, shard_bytes=200_000)
    written = json.loads((tmp_path / "ours/config.json").read_text())
    again = truth_of(goldens, written, tmp_path / "ours", tokens)
    np.testing.assert_array_equal(again["logits"], truth["logits"])
    np.testing.assert_array_equal(again["mtp_logits"], truth["mtp_logits"])
    if kind != "deepseek":
        its_own = goldens.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="float32")
        its_own.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
        reread, _ = load_hf(tmp_path / "theirs", mtp=False, progress=False)  # transformers writes no multi-token module
        assert reread.config == dataclasses.replace(model.config, name="theirs", num_nextn_predict_layers=0)
