"""The store gives back the bits it was given, onto any mesh, and refuses what does not match."""

import dataclasses
import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepseek_jax.checkpoint import Store
from deepseek_jax.data.pipeline import TokenSource, batches


@struct.dataclass
class State:
    """A training state in small: every kind of leaf that a run may have."""

    step: jax.Array
    params: dict
    router: dict
    opt_state: tuple
    key: jax.Array
    worker_keys: jax.Array
    empty: jax.Array


def make_state(seed: int = 0) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (16, 8))},
        "head": {"w": jax.random.normal(keys[1], (8, 16)).astype(jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))
    return State(
        step=jnp.asarray(seed, jnp.int32),
        params=params,
        router={"bias": jnp.array([[np.nan, -0.0, np.inf, 1e-45]], jnp.float32)},
        opt_state=optimizer.init(params),
        key=jax.random.key(seed + 7),
        worker_keys=jax.random.split(jax.random.key(seed, impl="rbg"), 2),
        empty=jnp.zeros((0, 3), jnp.bfloat16),
    )


def bits(leaf) -> tuple[str, tuple[int, ...], bytes]:
    """All that can be told of a leaf's value, so that NaN equals NaN and -0.0 does not equal 0.0."""
    raw = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return str(leaf.dtype), leaf.shape, np.asarray(raw).tobytes()


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert bits(x) == bits(y), jax.tree_util.keystr(path)


def abstract(state):
    return jax.eval_shape(lambda: state)


def mesh_of(n: int) -> jax.sharding.Mesh:
    return jax.make_mesh((n,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])


def placed(tree, n: int):
    """Abstract leaves on n devices: matrices sharded by rows, the rest replicated."""
    mesh = mesh_of(n)

    def place(leaf):
        spec = PartitionSpec("fsdp") if leaf.ndim == 2 and leaf.shape[0] and leaf.shape[0] % n == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def put(state, template):
    return jax.tree.map(lambda leaf, wanted: jax.device_put(leaf, wanted.sharding), state, template)


@pytest.mark.parametrize("async_save", [True, False])
def test_restores_the_bits_of_every_kind_of_leaf(tmp_path, async_save):
    state = make_state()
    with Store(tmp_path / "checkpoints", async_save=async_save) as store:
        assert store.latest() is None
        assert store.save(5, state, meta={"tokens": 10, "config": {"a": [1, 2.5, None]}})
        store.wait()
        restored, meta = store.restore(abstract(state))
    assert_same_bits(restored, state)
    assert meta == {"tokens": 10, "config": {"a": [1, 2.5, None]}}
    assert bits(jax.random.normal(restored.key)) == bits(jax.random.normal(state.key))


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 2), (2, 8), (8, 1), (1, 8)])
def test_restores_onto_another_mesh(tmp_path, saved_on, restored_on):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, here are {jax.device_count()}: the CPU has 8 virtual ones")
    state = make_state()
    wanted = placed(abstract(state), restored_on)
    with Store(tmp_path) as store:
        store.save(1, put(state, placed(abstract(state), saved_on)))
        restored, _ = store.restore(wanted)
    assert_same_bits(restored, state)
    for leaf, template in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(template.sharding, leaf.ndim)
    assert len(restored.params["embed"]["embedding"].addressable_shards) == restored_on


def test_restores_params_alone(tmp_path):
    state = make_state()
    with Store(tmp_path) as store:
        store.save(1, state, meta={"a": 1})
    with Store(tmp_path, read_only=True) as store:
        wanted = abstract({"params": state.params, "router": state.router})
        variables, meta = store.restore_params(wanted)
        assert_same_bits(variables, {"params": state.params, "router": state.router})
        assert meta == store.meta() == {"a": 1}
        with pytest.raises(ValueError, match="params/extra: expected, not in the checkpoint"):
            store.restore_params({"params": {**wanted["params"], "extra": wanted["router"]["bias"]}})
        with pytest.raises(ValueError, match="read_only=True"):
            store.save(2, state)


def changed(state: State, **params) -> State:
    return dataclasses.replace(state, params={**state.params, **params})


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            lambda s: changed(s, head={"w": jax.ShapeDtypeStruct((8, 16), jnp.float32)}),
            ["params/head/w: the checkpoint has bfloat16[8,16], expected float32[8,16]"],
        ),
        (
            lambda s: changed(s, head={"w": jax.ShapeDtypeStruct((8, 17), jnp.bfloat16)}),
            ["params/head/w: the checkpoint has bfloat16[8,16], expected bfloat16[8,17]"],
        ),
        (
            lambda s: changed(s, head={"v": s.params["head"]["w"]}),
            ["params/head/v: expected, not in the checkpoint", "params/head/w: in the checkpoint, not expected"],
        ),
        (
            lambda s: dataclasses.replace(s, key=jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))),
            ["key: the checkpoint has key<fry>[], expected key<rbg>[]"],
        ),
        (
            lambda s: dataclasses.replace(s, empty=jax.ShapeDtypeStruct((0, 4), jnp.bfloat16)),
            ["empty: the checkpoint has bfloat16[0,3], expected bfloat16[0,4]"],
        ),
    ],
)
def test_every_leaf_that_differs_is_named(tmp_path, change, messages):
    state = make_state()
    with Store(tmp_path) as store:
        store.save(1, state)
        with pytest.raises(ValueError) as error:
            store.restore(change(abstract(state)))
    for message in [*messages, f"in {len(messages)} leaves"]:
        assert message in str(error.value)


def test_data_iterator_is_saved_where_it_stood(tmp_path):
    source = TokenSource(np.random.default_rng(0).integers(0, 99, 1000), 8)
    iterator = batches(source, 4, seed=0)
    state = {"w": jnp.ones(3)}
    with Store(tmp_path) as store:
        for _ in range(5):
            next(iterator)
        store.save(5, state, iterator)
        expected = [next(iterator)["tokens"] for _ in range(3)]  # while the save may still be under way
        store.save(6, state)
        store.wait()
        resumed = batches(source, 4, seed=0)
        store.restore(abstract(state), resumed, step=5)
        for batch in expected:
            np.testing.assert_array_equal(next(resumed)["tokens"], batch)
        # Before, each process wrote its own copy.
        (tmp_path / "5" / "data" / "metadata").rename(tmp_path / "5" / "data" / "process_0-of-2.json")
        store.restore(abstract(state), resumed, step=5)
        assert resumed.get_state() == {"next_index": 5}
        with pytest.raises(ValueError, match=r"checkpoint .*6 was saved without a data iterator"):
            store.restore(abstract(state), resumed)


def test_state_may_be_given_away_at_once(tmp_path):
    """An asynchronous save holds its own copy: a step that reuses the state's memory does not reach the file."""
    state = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    overwrite = jax.jit(lambda state: {"w": state["w"] * 0 - 1}, donate_argnums=0)
    with Store(tmp_path) as store:
        store.save(1, state)
        jax.block_until_ready(overwrite(state))
        restored, _ = store.restore({"w": jax.ShapeDtypeStruct((2_000_000,), jnp.float32)})
    np.testing.assert_array_equal(restored["w"], np.arange(2_000_000, dtype=np.float32))


def test_keeps_the_latest_and_knows_them_after_reopening(tmp_path):
    with Store(tmp_path, keep=2) as store:
        for step in (1, 5, 9):
            assert store.save(step, make_state(step), meta={"step": step})
        assert not store.save(9, make_state(1)), "a step that is saved already is left as it is"
    with Store(tmp_path, keep=2) as store:
        assert store.steps() == [5, 9] and store.latest() == 9
        assert_same_bits(store.restore(abstract(make_state()))[0], make_state(9))
        assert_same_bits(store.restore(abstract(make_state()), step=5)[0], make_state(5))
        with pytest.raises(ValueError, match=r"step=1: .* holds steps \[5, 9\]"):
            store.restore(abstract(make_state()), step=1)
        store.save(12, make_state(12))
        store.wait()
        assert store.steps() == [9, 12]
    with Store(tmp_path / "all", keep=None) as store:
        for step in range(4):
            store.save(step, {"w": jnp.ones(1)})
        store.wait()
        assert store.steps() == [0, 1, 2, 3]


def test_what_a_killed_save_leaves_behind_does_not_count(tmp_path):
    with Store(tmp_path) as store:
        store.save(3, make_state(3))
    left = [tmp_path / "5.orbax-checkpoint-tmp", tmp_path / "7.orbax-checkpoint-tmp"]
    for folder in left:
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "manifest.ocdbt").write_bytes(b"half")
    with Store(tmp_path, read_only=True) as reader:
        assert reader.latest() == 3
    assert all(folder.exists() for folder in left), "a reader must not clear away what may be a save under way"
    with Store(tmp_path) as store:
        assert store.latest() == 3
        store.save(7, make_state(7))
        assert store.steps() == [3, 7] and not any(folder.exists() for folder in left)
        assert_same_bits(store.restore(abstract(make_state()), step=7)[0], make_state(7))


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Store(tmp_path, keep=0)
    with pytest.raises(ValueError, match="no checkpoints there"):
        Store(tmp_path / "absent", read_only=True)
    with pytest.raises(ValueError, match=r"Orbax takes \*"):
        Store(tmp_path / "a[b]")
    with Store(tmp_path) as store:
        with pytest.raises(ValueError, match="holds no checkpoint"):
            store.restore({})
        with pytest.raises(ValueError, match=r"leaf 'lr' is 0.1 .*jnp.asarray"):
            store.save(1, {"lr": 0.1})
        with pytest.raises(ValueError, match="JSON cannot hold it"):
            store.save(1, {"w": jnp.ones(1)}, meta={"loss": float("nan")})
        with pytest.raises(ValueError, match=re.escape("state key 'a/b'")):
            store.save(1, {"a/b": jnp.ones(1)})
        assert store.latest() is None


def test_nothing_on_disk_is_pickled_and_nothing_is_said(tmp_path, capfd):
    with Store(tmp_path) as store:
        store.save(1, make_state(), batches(TokenSource(np.arange(100), 8), 4, seed=0), meta={"a": 1})
        store.restore(abstract(make_state()))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert logging.getLogger("absl").level == logging.ERROR
    iterator_state = tmp_path / "1" / "data" / "metadata"
    assert json.loads(iterator_state.read_text()) == {"next_index": 0}
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or not file.read_bytes().startswith(b"\x80\x04"), file
