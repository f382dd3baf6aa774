"""transformers reads what we write, and we read what it writes, with the same logits.

Skipped where torch or transformers 5.23 is missing: the `parity` extra.
"""

import json

import jax
import jax.numpy as jnp
import literal_checkpoints as literal
import numpy as np
import pytest
from parity import relative

from deepseek_jax.interop.load import load_hf
from deepseek_jax.interop.rewrite import rewrite_hf
from deepseek_jax.interop.save import save_hf

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


def drawn(kind: str, seed: int):
    """Configuration, tensors and tokens on which no choice of experts hangs on rounding."""
    for attempt in range(50):
        draw = np.random.default_rng(100 * seed + attempt)
        config = literal.random_config(kind, draw) | {"torch_dtype": "float32"}
        if config.get("num_nextn_predict_layers", 0) > 1:
            config["num_nextn_predict_layers"] = 1
        tensors, ids = literal.random_tensors(config, draw), draw.integers(0, config["vocab_size"], 17)
        if literal.logits(config, tensors, ids)[2] > 1e-3:
            return config, tensors, ids.astype(np.int32)
    raise AssertionError("no seed keeps the choice of experts away from a tie")


def their_logits(transformers, folder, ids):
    import torch

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    with torch.no_grad():
        return model, model.eval()(torch.from_numpy(ids)[None].long(), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "deepseek_v2", "deepseek_v3"])
def test_both_ways(transformers, kind, seed, tmp_path):
    config, tensors, ids = drawn(kind, seed)
    literal.write(tmp_path / "source", config, tensors)
    model, variables = load_hf(tmp_path / "source", progress=False)
    ours = jax.jit(model.apply)(variables, jnp.asarray(ids)[None]).logits[0]

    save_hf(tmp_path / "ours", model, variables, "float32", progress=False, shard_bytes=100_000)
    theirs, logits = their_logits(transformers, tmp_path / "ours", ids)
    assert relative(ours, logits) < 1e-4

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    written = json.loads((tmp_path / "theirs/config.json").read_text())
    assert "rope_parameters" in written and "rope_theta" not in written
    again, tree = load_hf(tmp_path / "theirs", mtp=False, progress=False)
    assert again.config.rope == model.config.rope and again.config.attention == model.config.attention
    for ours_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        node = variables
        for entry in ours_path:
            node = node[entry.key]
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(node))


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_configurations_that_transformers_writes_of_itself(transformers, kind, tmp_path):
    """A config.json that never was ours, with the fields that transformers 5 leaves out."""
    import torch

    torch.manual_seed(0)
    small = dict(vocab_size=64, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    if kind == "llama":
        written = transformers.LlamaConfig(**small, num_key_value_heads=2, head_dim=16)
    else:
        written = transformers.DeepseekV3Config(
            **small, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=8, n_group=4, topk_group=2,
            num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=12,
        )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(written).save_pretrained(tmp_path)
    model, variables = load_hf(tmp_path, mtp=False, progress=False)
    ids = np.arange(20, dtype=np.int32)
    ours = jax.jit(model.apply)(variables, jnp.asarray(ids)[None]).logits[0]
    assert relative(ours, their_logits(transformers, tmp_path, ids)[1]) < 1e-4


def test_fp8_dequantises_to_what_transformers_reads(transformers, tmp_path):
    config, tensors, ids = drawn("deepseek_v3", 3)
    stored, _ = literal.quantised(tensors, power_of_two=False)
    literal.write(tmp_path / "fp8", config | {"quantization_config": literal.FP8}, stored)
    rewrite_hf(tmp_path / "fp8", tmp_path / "plain", "float32", progress=False)
    model, variables = load_hf(tmp_path / "fp8", progress=False)
    ours = jax.jit(model.apply)(variables, jnp.asarray(ids)[None]).logits[0]
    assert relative(ours, their_logits(transformers, tmp_path / "plain", ids)[1]) < 1e-4
