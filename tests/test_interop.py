"""Published checkpoints: random ones load and give the literal logits, and come back bit for bit."""

import filecmp
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import literal_checkpoints as literal
import ml_dtypes
import numpy as np
import pytest
from parity import CASES, GOLDEN, load_golden, relative
from safetensors.numpy import load_file

import deepseek_jax as dsj
from deepseek_jax.interop import fp8, layout
from deepseek_jax.interop.load import load_hf
from deepseek_jax.interop.names import format_of, table
from deepseek_jax.interop.rewrite import rewrite_hf
from deepseek_jax.interop.rows import scale_rows
from deepseek_jax.interop.save import save_hf
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.parallel import MeshConfig, make_mesh
from deepseek_jax.parallel.rules import unbox

pytest_plugins = ["fake_gcs"]


def named(tree) -> dict:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(entry.key for entry in path): leaf for path, leaf in pairs}


def assert_same_tree(ours, theirs) -> None:
    ours, theirs = named(ours), named(theirs)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]), err_msg=name)


def checkpoint(folder: Path, kind: str, seed: int, tokens: int = 18, **fields):
    """(config.json, tensors, tokens, truth) of a checkpoint on which no choice of experts hangs on rounding."""
    for attempt in range(50):
        draw = np.random.default_rng(1000 * seed + attempt)
        config = literal.random_config(kind, draw) | fields
        tensors = literal.random_tensors(config, draw)
        ids = draw.integers(0, config["vocab_size"], tokens).astype(np.int32)
        if "fp8" in folder.name:
            config["quantization_config"] = literal.FP8 | ({"scale_fmt": "ue8m0"} if seed % 2 else {})
            stored, tensors = literal.quantised(tensors, power_of_two=bool(seed % 2))
        else:
            stored = {
                n: t if n.endswith("correction_bias") else t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()
            }
        truth = literal.logits(config, tensors, ids)
        if truth[2] > 1e-4:
            literal.write(folder, config, stored, shards=1 + seed % 3)
            return config, stored, ids, truth
    raise AssertionError("no seed keeps the choice of experts away from a tie")


def assert_logits(model, variables, ids, truth) -> None:
    out = jax.jit(model.apply)(variables, jnp.asarray(ids)[None])
    assert relative(out.logits[0], truth[0]) < 1e-4
    for k, expected in enumerate(truth[1]):
        assert relative(out.mtp_logits[k, 0, : len(expected)], expected) < 1e-4


KINDS = ["llama-0", "llama-1", "qwen2-0", "deepseek-0", "deepseek_v2-1", "deepseek_v3-0", "deepseek_v3-1"]


@pytest.mark.parametrize(
    "drawn", [*KINDS, "llama-2-fp8", "deepseek_v2-2-fp8", "deepseek_v3-2-fp8", "deepseek_v3-3-fp8"]
)
def test_random_checkpoints_give_the_literal_logits_and_come_back(drawn, tmp_path):
    kind, seed, *quantised = drawn.split("-")
    source = tmp_path / "-".join(["source", *quantised])
    _, stored, ids, truth = checkpoint(source, kind, int(seed))
    model, variables = load_hf(source, progress=False)
    assert_logits(model, variables, ids, truth)

    kept, tree = load_hf(source, "float8" if quantised else "bfloat16", progress=False)
    out = save_hf(
        tmp_path / "out", kept, tree, "float8" if quantised else "bfloat16", progress=False, shard_bytes=50_000
    )
    found = {n: t for file in out.glob("*.safetensors") for n, t in read(file).items()}
    assert found.keys() == stored.keys()
    for name, (dtype, data) in found.items():
        assert data == stored[name].tobytes() and dtype == str(stored[name].dtype), name
    again, same = load_hf(out, progress=False)
    assert_same_tree(same, variables)
    assert again.config == dsj.ModelConfig(**{**vars(model.config), "name": "out"})


def read(file) -> dict:
    """Tensor -> dtype and bytes, by the safetensors library."""
    import safetensors

    names = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F32": "float32", "F16": "float16"}
    return {n: (names[t["dtype"]], bytes(t["data"])) for n, t in safetensors.deserialize(Path(file).read_bytes())}


@pytest.mark.parametrize("case", CASES)
def test_files_of_transformers_give_the_trees_of_the_parity_tests(case):
    model, variables = load_hf(GOLDEN / case, progress=False)
    golden = load_golden(case)
    assert_same_tree(variables, golden.variables)
    assert model.config.rope == golden.config.rope and model.config.attention == golden.config.attention


def test_every_member_has_a_format_and_its_table_covers_the_tree():
    members = ("v3", "v2", "v2-lite", "moe-16b", "moe-145b", "llm-67b", "r1-distill-qwen-7b", "coder-33b")
    for name in [f"deepseek-{member}" for member in members]:
        config = dsj.get_config(name)
        tree = {leaf: value.shape for leaf, value in named(unbox(abstract_variables(config))).items()}
        assert {row.leaf: row.leaf_shape for row in table(config)} == tree, name
    v3 = table(dsj.get_config("deepseek-v3"))
    assert format_of(dsj.get_config("deepseek-v3")) == "deepseek_v3"
    names = {name for row in (*v3, *scale_rows(v3, (128, 128))) for _, name in row.names()}
    assert len(names) == 91_991 - 2  # published tensors, without the module's copies of embedding and head


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
def test_a_mesh_gets_the_same_values_in_its_shards(kind, tmp_path):
    fields = dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=4, vocab_size=64, intermediate_size=64)
    if kind == "deepseek_v3":
        fields |= dict(kv_lora_rank=20, q_lora_rank=16, moe_intermediate_size=16)
    folder = tmp_path / "fp8"
    checkpoint(folder, kind, 3, **fields)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    _, alone = load_hf(folder, progress=False)
    model, spread = load_hf(folder, mesh=mesh, progress=False)
    assert_same_tree(spread, alone)
    sharded = named(spread)[f"params/{'moe' if kind == 'deepseek_v3' else 'dense'}_layers/attention/w_o"]
    assert {shard.data.size for shard in sharded.addressable_shards} == {sharded.size // 8}
    save_hf(tmp_path / "from_mesh", model, spread, progress=False)
    save_hf(tmp_path / "alone", model, alone, progress=False)
    assert filecmp.cmp(tmp_path / "from_mesh/model.safetensors", tmp_path / "alone/model.safetensors", shallow=False)


def test_shared_host_memory_survives_a_program_that_takes_its_arguments(tmp_path):
    """Leaves stand in memory that numpy allocated, one piece for all devices that replicate it."""
    checkpoint(tmp_path / "a", "llama", 0, hidden_size=48, num_attention_heads=4, vocab_size=64, intermediate_size=64,
               num_key_value_heads=4)  # fmt: skip
    _, variables = load_hf(tmp_path / "a", mesh=make_mesh(MeshConfig()), progress=False)
    before = jax.tree.map(lambda leaf: np.array(leaf), variables)
    twice = jax.jit(lambda v: jax.tree.map(lambda leaf: leaf * 2, v), donate_argnums=0)(variables)
    assert_same_tree(twice, jax.tree.map(lambda leaf: leaf * 2, before))


def test_cloud_folders_are_read_by_range_and_written(gcs, tmp_path):
    checkpoint(tmp_path / "fp8", "deepseek_v3", 2)
    for file in (tmp_path / "fp8").iterdir():
        gcs.put(f"model/{file.name}", file.read_bytes())
    _, here = load_hf(tmp_path / "fp8", progress=False)
    model, there = load_hf("gs://bucket/model", progress=False)
    assert_same_tree(there, here)
    out = save_hf("gs://bucket/out", model, there, progress=False, shard_bytes=100_000)
    assert_same_tree(load_hf(out, progress=False)[1], save_and_load(tmp_path / "x", model, here))


def save_and_load(folder, model, variables, dtype="bfloat16"):
    return load_hf(save_hf(folder, model, variables, dtype, progress=False), progress=False)[1]


def test_rewriting_equals_loading_and_saving(tmp_path):
    checkpoint(tmp_path / "fp8", "deepseek_v3", 4, num_nextn_predict_layers=1)
    model, variables = load_hf(tmp_path / "fp8", "bfloat16", progress=False)
    rewrite_hf(tmp_path / "fp8", tmp_path / "a", progress=False)
    save_hf(tmp_path / "b", model, variables, progress=False)
    ours, theirs = read(tmp_path / "a/model.safetensors"), read(tmp_path / "b/model.safetensors")
    assert ours == theirs
    assert "quantization_config" not in json.loads((tmp_path / "a/config.json").read_text())
    rewrite_hf(tmp_path / "a", tmp_path / "c", "float8", ue8m0=True, mtp=False, progress=False)
    model, _ = load_hf(tmp_path / "c", "float8", progress=False)
    assert model.config.num_nextn_predict_layers == 0


def test_block_fp8(tmp_path):
    draw = np.random.default_rng(0)
    w = draw.normal(0, 0.02, (300, 200)).astype(np.float32)
    w[:128, :128] = 0
    for power_of_two in (False, True):
        values, scales = fp8.quantise(w, power_of_two=power_of_two)
        stored, meant = literal.quantised({"a_proj.weight": w}, power_of_two)
        np.testing.assert_array_equal(scales, stored["a_proj.weight_scale_inv"])
        np.testing.assert_array_equal(values.view(np.uint8), stored["a_proj.weight"].view(np.uint8))
        np.testing.assert_array_equal(fp8.dequantise(values, scales, np.float32), meant["a_proj.weight"])
    assert scales.shape == fp8.scale_shape(w.shape) == (3, 2)
    with pytest.raises(ValueError, match="not finite"):
        fp8.quantise(np.full((2, 2), np.inf, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_decoding_by_xla_is_the_conversion_bit_for_bit(dtype):
    draw = np.random.default_rng(0)
    every = np.arange(256, dtype=np.uint8)[:, None].repeat(4200, 1).view(fp8.FLOAT8)  # past the size that XLA decodes
    decode = fp8.Decoder()
    for offset, least in ((5, 1e-5), (0, 1e-8), (127, 1e-2)):  # the room of the last result is used again
        each = draw.uniform(least, 100 * least, (34, 256)).astype(np.float32)
        out = np.zeros((4200, 300), dtype)
        decode(every, each, offset, 128, out[:, :256])
        with np.errstate(over="ignore"):
            expected = (every.T.astype(np.float32) * each[(offset + np.arange(4200)) // 128]).astype(dtype)
        bits = f"u{expected.itemsize}"
        np.testing.assert_array_equal(out[:, :256].view(bits), expected.view(bits))
        assert not out[:, 256:].any()


@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(136, 130), (7, 5), (256, 64), (130, 300)])
def test_transposition(shape, dtype):
    matrix = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    np.testing.assert_array_equal(layout.transposed(matrix), matrix.T)
    np.testing.assert_array_equal(layout.transposed(matrix[:, 1:-1]), matrix[:, 1:-1].T)


def test_golden_files_are_written_as_they_were_read(tmp_path):
    model, variables = load_hf(GOLDEN / "deepseek_v3", progress=False)
    save_hf(tmp_path / "out", model, variables, "float32", progress=False)
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(GOLDEN / "deepseek_v3/model.safetensors")
    assert_same_tree(ours, theirs)
