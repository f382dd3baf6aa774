"""Routes for TPU and GPU, as far as a CPU can judge them: values and gradients in the Pallas interpreter, lowering for
CUDA, and the reasons they give when they refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.kernels.attention import attention_reference, cudnn_gpu, splash_tpu
from deepseek_jax.kernels.grouped_matmul import grouped_matmul_reference, mosaic_gpu, ragged_tpu


def relative(out, expected) -> float:
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(out - expected) / max(np.linalg.norm(expected), 1e-30))


def values_and_gradients(function, args, cotangent):
    """`function`'s output, then its gradient with respect to each argument, compiled as one program."""

    def run(args, cotangent):
        out, pull = jax.vjp(function, *args)
        return out, *pull(cotangent)

    # Most of the time goes into compiling the interpreter's loops; run them as they are.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(run).lower(args, cotangent).compile(quick)(args, cotangent)


def attention_inputs(B, T, N, K, H, V, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, V), (B, T, N, V)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def abstract(shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


# The last case has more key blocks than the fused backward takes, with blocks of 128.
@pytest.mark.parametrize(
    ("T", "heads", "dims", "segments", "causal"),
    [
        (256, (4, 4), (192, 128), True, True),
        (384, (4, 2), (128, 128), True, True),
        (256, (2, 1), (24, 16), False, False),
        (640, (2, 2), (32, 16), True, True),
    ],
)
def test_splash_equals_the_reference_in_the_interpreter(monkeypatch, T, heads, dims, segments, causal):
    monkeypatch.setattr(splash_tpu, "BLOCK_Q", 256)
    monkeypatch.setattr(splash_tpu, "BLOCK_KV", 256)
    monkeypatch.setattr(splash_tpu, "BLOCK_KV_COMPUTE", 256)
    q, k, v, d = attention_inputs(2, T, *heads, *dims)
    ids = None
    if segments:
        # Two documents and padding in the first row; a second row that begins with padding and ends in another document.
        ids = jnp.array([[1] * 100 + [2] * (T - 150) + [0] * 50, [0] * 7 + [3] * (T - 70) + [1] * 63], jnp.int32)
    kwargs = dict(scale=dims[0] ** -0.5, q_segment_ids=ids, kv_segment_ids=ids, causal=causal)
    assert splash_tpu.supports(q, k, v, **kwargs) is None
    assert splash_tpu.block_sizes(T, T, 4).use_fused_bwd_kernel == (T < 640)

    out, *grads = values_and_gradients(partial(splash_tpu.splash, interpret=True, **kwargs), (q, k, v), d)
    expected = values_and_gradients(partial(attention_reference, **kwargs), (q, k, v), d)
    for got, want in zip((out, *grads), expected, strict=True):
        assert got.shape == want.shape and bool(jnp.isfinite(got).all())
        assert relative(got, want) < 1e-5
    if ids is not None:
        assert not np.any(np.asarray(out)[np.asarray(ids) == 0])


def test_splash_says_why_not():
    q, k, v = abstract((2, 256, 4, 192)), abstract((2, 256, 4, 192)), abstract((2, 256, 4, 128))
    ids = jnp.ones((2, 256), jnp.int32)

    def reason(q=q, k=k, v=v, **kwargs):
        return splash_tpu.supports(q, k, v, scale=1.0, **kwargs)

    assert reason() is None
    assert reason(q_segment_ids=ids, kv_segment_ids=ids) is None
    assert "T=200" in reason(abstract((2, 200, 4, 192)), abstract((2, 200, 4, 192)), abstract((2, 200, 4, 128)))
    assert "share one array" in reason(q_segment_ids=ids, kv_segment_ids=ids + 0)
    assert "float16" in reason(abstract((2, 256, 4, 192), "float16"))
    assert "head dims" in reason(abstract((2, 256, 4, 320)), abstract((2, 256, 4, 320)))


@pytest.mark.parametrize("length", range(128, 8193, 640))
@pytest.mark.parametrize("itemsize", [2, 4])
def test_splash_blocks_divide_the_lengths(length, itemsize):
    sizes = splash_tpu.block_sizes(length, length, itemsize)
    for size in (sizes.block_q, sizes.block_kv, sizes.block_kv_compute):
        assert size % 128 == 0 and length % size == 0
    assert sizes.block_kv % sizes.block_kv_compute == 0 and sizes.has_backward_blocks


@pytest.mark.parametrize("sizes", [[10, 0, 100, 5, 0, 80], [0, 0, 130, 0, 70, 0], [200, 0, 0], [0, 0, 0]])
def test_ragged_dot_equals_the_reference_in_the_interpreter(sizes):
    M, K, N = 200, 72, 40
    keys = jax.random.split(jax.random.key(1), 3)
    x, w = jax.random.normal(keys[0], (M, K)), jax.random.normal(keys[1], (len(sizes), K, N))
    d = jax.random.normal(keys[2], (M, N))
    sizes_E = jnp.array(sizes, jnp.int32)
    # What a kernel must not let through: rows that belong to no group.
    d = jnp.where((jnp.arange(M) < sum(sizes))[:, None], d, jnp.nan)

    route = partial(ragged_tpu.grouped_matmul_ragged_dot, group_sizes_E=sizes_E, interpret=True)
    reference = partial(grouped_matmul_reference, group_sizes_E=sizes_E)
    out, dx, dw = values_and_gradients(route, (x, w), d)
    expected, dx_expected, dw_expected = values_and_gradients(reference, (x, w), jnp.nan_to_num(d))
    assert relative(out, expected) < 1e-6 and not np.any(np.asarray(out)[sum(sizes) :])
    assert relative(dx, dx_expected) < 1e-6 and not np.any(np.asarray(dx)[sum(sizes) :])
    assert relative(dw, dw_expected) < 1e-6


def test_ragged_dot_says_why_not():
    sizes = abstract((4,), "int32")
    assert ragged_tpu.supports(abstract((64, 32)), abstract((4, 32, 32)), sizes) is None
    assert "float16" in ragged_tpu.supports(abstract((64, 32), "float16"), abstract((4, 32, 32), "float16"), sizes)


def test_cudnn_says_why_not(monkeypatch):
    q, k, v = abstract((2, 256, 4, 192)), abstract((2, 256, 4, 192)), abstract((2, 256, 4, 128))
    narrow = [abstract((2, 256, 4, 64))] * 3

    def reason(q=q, k=k, v=v, **kwargs):
        return cudnn_gpu.supports(q, k, v, scale=1.0, **kwargs)

    monkeypatch.setattr(cudnn_gpu, "_gpu", lambda: (None, None))
    assert "no NVIDIA GPU" in reason()
    monkeypatch.setattr(cudnn_gpu, "_gpu", lambda: ((7, 5), 91900))
    assert "7.5" in reason(*narrow)
    monkeypatch.setattr(cudnn_gpu, "_gpu", lambda: ((8, 0), 91900))
    assert reason(*narrow) is None and "192" in reason()
    monkeypatch.setattr(cudnn_gpu, "_gpu", lambda: ((9, 0), 90900))
    assert reason(*narrow) is None and "9.10" in reason()
    monkeypatch.setattr(cudnn_gpu, "_gpu", lambda: ((9, 0), 91900))
    assert reason() is None
    assert "float32" in reason(*[abstract(x.shape, "float32") for x in (q, k, v)])
    ids = jnp.ones((2, 256), jnp.int32)
    assert "segment ids" in reason(q_segment_ids=ids, kv_segment_ids=ids)
    assert "S=255" in reason(k=abstract((2, 255, 4, 192)), v=abstract((2, 255, 4, 128)), causal=False)


def test_mosaic_says_why_not(monkeypatch):
    sizes = abstract((4,), "int32")

    class Device:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [Device()])
    assert mosaic_gpu.supports(abstract((300, 128)), abstract((4, 128, 192)), sizes) is None
    assert "multiples of 64" in mosaic_gpu.supports(abstract((300, 96)), abstract((4, 96, 192)), sizes)
    assert "float32" in mosaic_gpu.supports(abstract((8, 64), "float32"), abstract((4, 64, 64), "float32"), sizes)
    with jax.enable_x64(True):
        assert "jax_enable_x64" in mosaic_gpu.supports(abstract((300, 128)), abstract((4, 128, 192)), sizes)
    Device.compute_capability = "8.0"
    assert "8.0" in mosaic_gpu.supports(abstract((300, 128)), abstract((4, 128, 192)), sizes)


def lower_for_cuda(function, *args) -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_cudnn_lowers_for_cuda(monkeypatch):
    """The private function still takes the arguments that the route passes, in the installed jax."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)

    def run(q, k, v, d):
        out, pull = jax.vjp(lambda q, k, v: cudnn_gpu.cudnn(q, k, v, scale=0.1), q, k, v)
        return out, pull(d)

    T = 255  # odd: jax refuses its gradient, so the route adds a row
    q, k, v = abstract((2, T, 8, 192)), abstract((2, T, 4, 192)), abstract((2, T, 4, 128))
    d = abstract((2, T, 8, 128))
    assert lower_for_cuda(run, q, k, v, d).count("__cudnn$fmhaSoftmax") == 2
    assert cudnn_gpu.PRIMITIVE in str(jax.make_jaxpr(run)(q, k, v, d))

    # A policy that saves that primitive's outputs spares the backward pass the forward kernel.
    def policy(primitive, *_, **__):
        return primitive.name == cudnn_gpu.PRIMITIVE

    def remat(q, k, v):
        return jax.checkpoint(lambda *x: cudnn_gpu.cudnn(*x, scale=0.1), policy=policy)(q, k, v)

    kernels = lower_for_cuda(jax.value_and_grad(lambda *x: remat(*x).sum()), q, k, v).count("__cudnn$fmhaSoftmax")
    assert kernels == 2


def test_mosaic_lowers_for_cuda(monkeypatch):
    """Likewise for the sample kernels, which ask the first device how many multiprocessors it has."""

    class Device:
        core_count = 132

    monkeypatch.setattr(jax, "devices", lambda *args: [Device()])

    def run(x, w, sizes, d):
        out, pull = jax.vjp(lambda x, w: mosaic_gpu.grouped_matmul_mgpu(x, w, sizes), x, w)
        return out, pull(d)

    # 1001 rows: not a multiple of eight, which the kernels want.
    args = abstract((1001, 192)), abstract((6, 192, 128)), abstract((6,), "int32"), abstract((1001, 128))
    assert lower_for_cuda(run, *args).count("mosaic_gpu") >= 3
