"""What is refused, and how: damaged files, paths out of the folder, pickles, tensors and fields that do not fit."""

import json
import struct

import literal_checkpoints as literal
import ml_dtypes
import numpy as np
import pytest
from parity import GOLDEN
from safetensors.numpy import load_file, save_file

import deepseek_jax as dsj
from deepseek_jax.interop.check import summarise
from deepseek_jax.interop.headers import INDEX, open_folder
from deepseek_jax.interop.hf_config import config_from_hf, config_to_hf, quantization_of
from deepseek_jax.interop.inspect import inspect_hf
from deepseek_jax.interop.load import load_hf
from deepseek_jax.interop.names import format_of
from deepseek_jax.interop.save import save_hf


def raw(header, data=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are no safetensors"),
        (raw({}, length=2**62), "its header claims"),
        (raw({}, length=500), "its header claims"),
        (raw(b"[1]"), "its header is a list"),
        (raw(b"{nonsense"), "no JSON"),
        (raw(b"[" * 50_000), "no JSON"),
        (raw(b'{"a": 1, "a": 2}'), "the key 'a' stands there twice"),
        (raw({"a": 3}), "needs dtype, shape and data_offsets"),
        (raw({"a": tensor(0, 4, dtype="C64")}, b"abcd"), "dtype 'C64'"),
        (raw({"a": tensor(0, 4, shape=[2, -2])}, b"abcd"), "lists of sizes"),
        (raw({"a": tensor(0, 4, shape=[True, 4])}, b"abcd"), "lists of sizes"),
        (raw({"a": tensor(4, 0, shape=[0])}, b"abcd"), "ascending"),
        (raw({"a": tensor(0, 4, shape=[2**40, 2**40])}, b"abcd"), "does not take the 4 bytes"),
        (raw({"a": tensor(0, 4), "b": tensor(2, 6)}, b"abcdef"), "'b' at byte 2 overlaps"),
        (raw({"a": tensor(0, 2), "b": tensor(4, 6)}, b"abcdef"), "'b' at byte 4 leaves a gap"),
        (raw({"a": tensor(0, 4)}, b"abcdef"), "end at byte"),
        (raw({"a": tensor(0, 8)}, b"abcdef"), "end at byte"),
        (raw({"__metadata__": {"a": 1}}), "__metadata__ is not an object of strings"),
    ],
)
def test_damaged_headers(content, message, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", "..", ".hidden.safetensors", 3]
)
def test_an_index_names_files_of_its_own_folder(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="must be the name of a .safetensors file beside it"):
        open_folder(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_hf(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no config.json"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds neither"):
        load_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="pickles .*never opened"):
        load_hf(tmp_path)
    weight_map = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    save_file({"a": np.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="names y.safetensors, which is not there"):
        load_hf(tmp_path)
    save_file({"c": np.zeros(2), "d": np.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="holds 'd', which .* places in None"):
        load_hf(tmp_path)
    save_file({"e": np.zeros(2)}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match="holds model-00003-of-00003.safetensors, which .* would be left out"):
        load_hf(tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    save_file({"c": np.zeros(2)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"names 1 tensors that its files do not hold: \['b'\]"):
        load_hf(tmp_path)


@pytest.fixture
def v3(tmp_path):
    """(folder, config, tensors) of a golden checkpoint that a test may spoil."""
    config = json.loads((GOLDEN / "deepseek_v3/config.json").read_text())
    return tmp_path / "v3", config, load_file(GOLDEN / "deepseek_v3/model.safetensors")


def test_tensors_that_do_not_fit_are_all_listed(v3):
    folder, config, tensors = v3
    for expert in (0, 1, 2, 5):
        del tensors[f"model.layers.2.mlp.experts.{expert}.up_proj.weight"]
    tensors["model.layers.0.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(33, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64)
    literal.write(folder, config, tensors)
    with pytest.raises(ValueError) as error:
        load_hf(folder)
    assert "missing: model.layers.2.mlp.experts.0-2,5.up_proj.weight (4)" in str(error.value)
    assert "left over: model.layers.0.extra.weight" in str(error.value)
    assert "wrong: model.norm.weight: F32[33], expected shape [32]" in str(error.value)
    assert "wrong: lm_head.weight: F64[59, 32], expected one of F32, BF16, F16" in str(error.value)
    assert "left over: model.layers.0.extra.weight" in str(inspect_hf(folder))


def test_multi_token_modules_are_loaded_or_left_out_by_name(v3):
    folder, config, tensors = v3
    literal.write(folder, config, tensors)
    model, variables = load_hf(folder, mtp=False, progress=False)
    assert model.config.num_nextn_predict_layers == 0 and "mtp" not in variables["params"]
    main = {name: t for name, t in tensors.items() if not name.startswith("model.layers.4.")}
    literal.write(folder, config, main)  # as transformers writes it
    with pytest.raises(ValueError, match="missing: model.layers.4.(.|\n)*mtp=False"):
        load_hf(folder)
    load_hf(folder, mtp=False, progress=False)
    literal.write(folder, config | {"num_nextn_predict_layers": 0}, tensors)
    with pytest.raises(ValueError, match="left over: model.layers.4."):
        load_hf(folder, mtp=False)
    tensors["model.layers.4.shared_head.head.weight"] = tensors["lm_head.weight"] + 1
    literal.write(folder, config, tensors)
    with pytest.raises(ValueError, match="shared_head.head.weight differs from lm_head.weight"):
        load_hf(folder, progress=False)


def test_fp8_needs_its_scales_and_its_config(v3):
    folder, config, tensors = v3
    stored, _ = literal.quantised(tensors, power_of_two=False)
    literal.write(folder, config, stored)
    with pytest.raises(ValueError, match="has no quantization_config"):
        load_hf(folder)
    config["quantization_config"] = literal.FP8
    name = "model.layers.0.self_attn.o_proj.weight"
    literal.write(folder, config, {n: t for n, t in stored.items() if n != f"{name}_scale_inv"})
    with pytest.raises(ValueError, match=f"missing: {name}_scale_inv"):
        load_hf(folder)
    literal.write(folder, config, stored | {f"{name}_scale_inv": np.ones((2, 1), np.float32)})
    with pytest.raises(ValueError, match=r"scale_inv: F32\[2, 1\], expected F32\[1, 1\]"):
        load_hf(folder)
    literal.write(folder, config, stored | {"model.norm.weight": np.zeros(32, ml_dtypes.float8_e4m3fn)})
    with pytest.raises(ValueError, match="never quantised"):
        load_hf(folder)
    for wrong in (dict(quant_method="awq"), dict(fmt="e5m2"), dict(weight_block_size=[128]), dict(scale_fmt="f")):
        with pytest.raises(ValueError, match="quantization_config"):
            quantization_of({"quantization_config": literal.FP8 | wrong})
    with pytest.raises(ValueError, match="dtype = 'float8': .* is not in FP8"):
        load_hf(GOLDEN / "deepseek_v3", "float8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba': known formats are llama, qwen2"),
        ({"hidden_sizes": 3}, r"unknown fields \['hidden_sizes'\].*did you mean 'hidden_size'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size = '32': must be of type int"),
        ({"vocab_size": True}, "vocab_size = True: must be of type int"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ({"attention_bias": True}, "attention_bias = True: only False"),
        ({"rope_interleave": False}, "rope_interleave = False: only True"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax': model_type 'deepseek_v3' computes 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2: contradicts num_attention_heads"),
        ({"head_dim": 5}, "head_dim = 5: contradicts qk_rope_head_dim"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id = \[1, 2\]: give one id"),
        ({"eos_token_id": 4000}, "eos_token_id = 4000"),
        ({"n_group": 5}, "n_group = 5"),
        ({"rope_scaling": {"factor": 2.0}}, "needs one kind"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "kind 'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "needs one kind"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "both, above 0, or neither"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0}}, "above 0"),
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, r"unknown in a default scaling: \['factor'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5.0}}, "rope_theta = 10000.*rope_scaling"),
        ({"rope_theta": 0}, "theta = 0"),
        ({"rope_theta": None, "rope_scaling": {"type": "default", "rope_theta": "1"}}, "rope_theta = '1'"),
        ({"quantization_config": literal.FP8 | {"bits": 4}}, r"quantization_config .*unknown fields \['bits'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "more": 1}}, r"unknown in a linear scaling: \['more'\]"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor = '2': must be a number"),
        ({"rope_scaling": {"type": "linear"}}, "missing 1 required keyword-only argument: 'factor'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta = 10000.*contradicts"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_scaling = .*contradicts rope_parameters"),
    ],
)
def test_fields_that_do_not_fit(change, message, v3):
    with pytest.raises(ValueError, match=message):
        config_from_hf(v3[1] | change)


def test_both_spellings_say_the_same(v3):
    config = v3[1]
    expected = config_from_hf(config)
    scaling = {k: v for k, v in config["rope_scaling"].items() if k != "type"}
    new = config | {"rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 10000.0}}
    assert config_from_hf(new) == expected
    left_out = (
        "rope_theta",
        "rope_scaling",
        "scoring_func",
        "topk_method",
        "norm_topk_prob",
        "moe_layer_freq",
        "seq_aux",
    )
    assert config_from_hf({k: v for k, v in new.items() if k not in left_out}) == expected
    assert config_from_hf(config_to_hf(expected)) == expected
    plain = config | {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}}
    assert config_from_hf(plain).rope == dsj.Rope(interleaved=True)


def test_configurations_come_back():
    for name in dsj.list_configs():
        config = dsj.get_config(name)
        try:
            published = config_to_hf(config)
        except ValueError as error:
            assert "no published format holds this" in str(error)
            continue
        back = config_from_hf(json.loads(json.dumps(published)), name=name, dtype="bfloat16")
        assert back.attention == config.attention and back.rope == config.rope, name
        assert format_of(back) == format_of(config) and config_to_hf(back) == published


def test_saving_refuses_what_is_not_the_model_s(tmp_path):
    model, variables = load_hf(GOLDEN / "qwen2", progress=False)
    params = dict(variables["params"])
    head = params.pop("head")
    with pytest.raises(ValueError, match="params/head/w is missing"):
        save_hf(tmp_path / "a", model, {"params": params})
    with pytest.raises(ValueError, match="params/head/w has shape"):
        save_hf(tmp_path / "a", model, {"params": params | {"head": {"w": head["w"].T}}})
    with pytest.raises(ValueError, match="params/tail is no leaf of this model"):
        save_hf(tmp_path / "a", model, {"params": params | {"head": head, "tail": head["w"]}})
    big = {"params": params | {"head": {"w": head["w"] + 1e6}}}
    with pytest.raises(ValueError, match="lm_head.weight: a value is too large for float16"):
        save_hf(tmp_path / "a", model, big, "float16", progress=False)
    assert not list((tmp_path / "a").iterdir())
    with pytest.raises(ValueError, match="ue8m0 = True"):
        save_hf(tmp_path / "a", model, variables, ue8m0=True)
    save_hf(tmp_path / "a", model, variables, progress=False)
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        save_hf(tmp_path / "a", model, variables, progress=False)
    with pytest.raises(ValueError, match="dtype = 'int8'"):
        load_hf(tmp_path / "a", "int8")


def test_old_tables_of_angles_are_compared(tmp_path):
    config = json.loads((GOLDEN / "llama_mha/config.json").read_text())
    tensors = load_file(GOLDEN / "llama_mha/model.safetensors")
    angles = 10000.0 ** -(np.arange(0, 10, 2) / 10)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_hf(literal.write(tmp_path, config, tensors | {name: angles.astype(np.float32)}), progress=False)
    literal.write(tmp_path, config, tensors | {name: 2 * angles.astype(np.float32)})
    with pytest.raises(ValueError, match="inv_freq is not what rope_theta"):
        load_hf(tmp_path, progress=False)


def test_summaries():
    names = [f"a.{i}.b.{j}.c" for i in (1, 2, 4) for j in (0, 1)]
    assert summarise([*names, "x"]) == ["a.1-2,4.b.0-1.c (6)", "x"]
    assert summarise(names[1:]) == ["a.1-2,4.b.0-1.c (5 of these)"]
