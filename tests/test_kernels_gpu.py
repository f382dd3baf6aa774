"""The GPU routes against the references in float32, values and gradients, on the GPU itself.

Run with JAX_PLATFORMS=cuda (the suite's default is the CPU). bfloat16 operands leave relative errors of 1e-3 to 1e-2.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.kernels.attention import attention, attention_reference, cudnn_gpu
from deepseek_jax.kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference, mosaic_gpu

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu",
    reason=f"jax runs on {jax.default_backend()}: set JAX_PLATFORMS=cuda on a GPU machine",
)

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}


def relative(out, expected) -> float:
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(out - expected) / jnp.maximum(jnp.linalg.norm(expected), 1e-30))


@partial(jax.jit, static_argnums=0)
def values_and_gradients(function, args, cotangent, *rest):
    """`function(*args, *rest)`, then its gradient with respect to each of `args`."""
    out, pull = jax.vjp(lambda *args: function(*args, *rest), *args)
    return out, *pull(cotangent)


def in_float32(function, args, cotangent):
    """The same in float32 throughout."""
    return values_and_gradients(function, [x.astype(jnp.float32) for x in args], cotangent.astype(jnp.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("lengths", "heads", "dims", "causal"),
    [
        ((512, 512), (4, 4), (128, 128), True),  # MHA
        ((512, 512), (8, 2), (128, 128), True),  # GQA
        ((512, 512), (4, 4), (192, 128), True),  # MLA
        ((512, 512), (8, 2), (192, 128), True),
        ((333, 333), (4, 4), (192, 128), True),  # odd lengths
        ((1001, 1001), (4, 2), (64, 64), True),
        ((1, 1), (4, 4), (192, 128), True),
        ((256, 778), (4, 4), (192, 128), False),
        ((128, 128), (2, 2), (24, 16), True),  # nano
    ],
)
def test_cudnn_equals_the_reference(lengths, heads, dims, causal, dtype):
    (T, S), (N, K), (H, V) = lengths, heads, dims
    keys = jax.random.split(jax.random.key(T + S + N + H), 4)
    shapes = (2, T, N, H), (2, S, K, H), (2, S, K, V), (2, T, N, V)
    *qkv, d = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True))
    kwargs = dict(scale=H**-0.5, causal=causal)
    reason = cudnn_gpu.supports(*qkv, **kwargs)
    if reason is not None:
        pytest.skip(reason)
    got = values_and_gradients(lambda q, k, v: attention(q, k, v, implementation="cudnn", **kwargs), qkv, d)
    want = in_float32(lambda q, k, v: attention_reference(q, k, v, **kwargs), qkv, d)
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert x.shape == y.shape and x.dtype == jnp.dtype(dtype)
        if T == S == 1 and name in ("dq", "dk"):
            # One key: the weight is 1 whatever q and k are.
            assert float(jnp.abs(x).max()) < TOLERANCE[dtype], name
        else:
            assert relative(x, y) < TOLERANCE[dtype], name


def test_attention_keeps_to_blockwise_where_cudnn_cannot():
    """Segment ids and float32 go the other way, and come out right."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 256, 4, 64)) for key in keys)
    ids = jnp.array([[1] * 100 + [2] * 100 + [0] * 56, [1] * 256], jnp.int32)
    kwargs = dict(scale=0.125, q_segment_ids=ids, kv_segment_ids=ids)
    assert relative(attention(q, k, v, **kwargs), attention_reference(q, k, v, **kwargs)) < 1e-5


def group_sizes(kind: str, M: int, E: int) -> np.ndarray:
    """Sizes of E groups in M rows."""
    rng = np.random.default_rng(0)
    if kind == "uniform":
        return np.full(E, M // E, np.int32)
    if kind == "one":
        return np.eye(E, dtype=np.int32)[E // 2] * M
    if kind == "none":
        return np.zeros(E, np.int32)
    # A long-tailed load, a third of the groups empty, first and last among them.
    share = rng.dirichlet(np.full(E, 0.5))
    share[rng.permutation(E)[: E // 3]] = 0
    share[[0, -1]] = 0
    rows = M if kind == "skewed" else M - M // 5 - 3
    return rng.multinomial(rows, share / share.sum()).astype(np.int32)


mosaic = partial(grouped_matmul, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("M", "K", "N", "E"),
    [
        (12_288, 2048, 1408, 16),  # V2-Lite, up: its 768 rows a group
        (12_288, 1408, 2048, 16),  # down
        (8_192, 7168, 2048, 8),  # V3
        (3_001, 64, 192, 6),  # odd number of rows, one inner tile
        (100, 192, 64, 16),  # fewer rows than a tile
        (5, 128, 128, 3),
    ],
)
def test_mosaic_equals_the_reference(M, K, N, E):
    keys = jax.random.split(jax.random.key(M + K), 3)
    x, w = jax.random.normal(keys[0], (M, K), jnp.bfloat16), jax.random.normal(keys[1], (E, K, N), jnp.bfloat16)
    cotangent = jax.random.normal(keys[2], (M, N), jnp.bfloat16)
    reason = mosaic_gpu.supports(x, w, jnp.zeros(E, jnp.int32))
    if reason is not None:
        pytest.skip(reason)
    for kind in ("uniform", "skewed", "short", "one", "none"):
        sizes = group_sizes(kind, M, E)
        sizes_E, rows = jnp.asarray(sizes), int(sizes.sum())
        inside = (jnp.arange(M) < rows)[:, None]
        out, dx, dw = values_and_gradients(mosaic, (x, w), jnp.where(inside, cotangent, jnp.nan), sizes_E)
        # Products of two bfloat16 are exact in float32, and in the tf32 that is a GPU's default.
        widened = [y.astype(jnp.float32) for y in (x, w, jnp.where(inside, cotangent, 0))]
        expected = values_and_gradients(grouped_matmul_reference, widened[:2], widened[2], sizes_E)
        for name, got, want in zip(("out", "dx", "dw"), (out, dx, dw), expected, strict=True):
            assert got.shape == want.shape and got.dtype == jnp.bfloat16
            assert relative(got, want) < 5e-3, (kind, name)
        assert not np.any(np.asarray(out[rows:])) and not np.any(np.asarray(dx[rows:])), kind
        assert not np.any(np.asarray(dw)[sizes == 0]), kind
