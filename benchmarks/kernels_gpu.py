"""Attention and grouped matmul on one NVIDIA GPU: right, and how fast beside jax's library and torch, in one run.

    JAX_PLATFORMS=cuda python benchmarks/kernels_gpu.py [--json FILE] [--only attention|grouped]

Every op is first checked against a float32 reference on random data, ||out - reference|| / ||reference||. A figure is the
median of several timings of many calls each; the spread is (max - min) / median. Causal attention counts the half of the
scores that is needed: forward B·N·T²·(H + V), backward B·N·T²·(3H + 2V) operations; a grouped product 2·M·K·N each. Our
grouped products include a pass that zeroes the rows past the last group, which a model fuses into its next operation.
Takes about five minutes, most of it XLA's search for fast products for the slow comparators.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")  # torch wants memory too

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.kernels.attention import attention, attention_reference, blockwise
from deepseek_jax.kernels.grouped_matmul import grouped_matmul, grouped_matmul_blocks

try:
    import torch
except ImportError:
    torch = None

# name, batch, length, query heads, key/value heads, head dims of keys and values
ATTENTION = [
    ("V2-Lite MLA", 2, 4096, 16, 16, 192, 128),
    ("MLA, 32 heads", 2, 4096, 32, 32, 192, 128),
    ("GQA 32/8", 2, 4096, 32, 8, 128, 128),
]
# name, rows, inner width, outer width, groups
GROUPED = [
    ("V2-Lite up", 49_152, 2048, 1408, 64),
    ("V2-Lite down", 49_152, 1408, 2048, 64),
    ("V3 over 8", 32_768, 7168, 2048, 32),
]


class Timing(float):
    """Median seconds of a call, with the spread of the samples."""

    spread: float


def timed(call: Callable[[], object], wait: Callable[[object], None], samples: int = 7, window: float = 0.04) -> Timing:
    """Times `call`, which starts work on the device; `wait` blocks until the result of a call is there."""
    wait(call())
    start = time.perf_counter()
    wait(call())
    repeats = max(1, min(200, int(window / (time.perf_counter() - start))))
    seconds = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        wait(result)
        seconds.append((time.perf_counter() - start) / repeats)
    timing = Timing(statistics.median(seconds))
    timing.spread = (max(seconds) - min(seconds)) / timing
    return timing


def time_jax(function: Callable, *args) -> Timing | None:
    """None where XLA finds no memory for the program."""
    try:
        compiled = jax.jit(function).lower(*args).compile()
        return timed(lambda: compiled(*args), jax.block_until_ready)
    except jax.errors.JaxRuntimeError as error:
        print(f"# jax refused: {str(error).splitlines()[0]}")
        return None


def time_torch(function: Callable, *args) -> Timing | None:
    """None where torch is not there or refuses the call."""
    if torch is None:
        return None
    try:
        return timed(lambda: function(*args), lambda _: torch.cuda.synchronize())
    except (RuntimeError, AttributeError, TypeError) as error:
        print(f"# torch refused: {str(error).splitlines()[0]}")
        return None


def relative(out, expected) -> float:
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


def reference(function: Callable, *args):
    """`function(*args)`, compiled without searching for fast float32 products, which takes minutes."""
    return jax.jit(function).lower(*args).compile({"xla_gpu_autotune_level": 0})(*args)


def with_gradients(function: Callable) -> Callable:
    """args..., cotangent -> output and the gradients with respect to args."""

    def run(*args):
        out, pull = jax.vjp(function, *args[:-1])
        return out, *pull(args[-1])

    return run


def random(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def row(op: str, shape: str, work: str, flops: float, error: float, timings: dict[str, Timing | None]) -> dict:
    tflops = {name: None if t is None else flops / t / 1e12 for name, t in timings.items()}
    ratio = tflops["ours"] / tflops["torch"] if tflops.get("torch") else None
    spread = max(t.spread for t in timings.values() if t is not None)
    return dict(op=op, shape=shape, work=work, error=error, tflops=tflops, ratio_to_torch=ratio, spread=spread)


def bench_attention(name: str, B: int, T: int, N: int, K: int, H: int, V: int) -> list[dict]:
    q, k, v, d = random(0, (B, T, N, H), (B, T, K, H), (B, T, K, V), (B, T, N, V))
    kwargs = dict(scale=H**-0.5, causal=True)
    ours = partial(attention, implementation="cudnn", **kwargs)
    both = jax.jit(with_gradients(ours)).lower(q, k, v, d).compile()
    got = both(q, k, v, d)
    with jax.default_matmul_precision("highest"):
        first = [x[:1].astype(jnp.float32) for x in (q, k, v, d)]
        want = reference(with_gradients(partial(attention_reference, **kwargs)), *first)
    errors = [relative(x[:1], y) for x, y in zip(got, want, strict=True)]
    del got, want, first

    timings = {"fwd": {"ours": time_jax(ours, q, k, v)}}
    timings["fwd+bwd"] = {"ours": timed(lambda: both(q, k, v, d), jax.block_until_ready)}
    library = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    timings["fwd"]["jax library"] = time_jax(library, q, k, v) if H == V else None
    timings["fwd+bwd"]["jax library"] = time_jax(with_gradients(library), q, k, v, d) if H == V else None
    plain = partial(blockwise, **kwargs)
    timings["fwd"]["blockwise"] = time_jax(plain, q, k, v)
    timings["fwd+bwd"]["blockwise"] = time_jax(with_gradients(plain), q, k, v, d)

    forward = backward = None
    if torch is not None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        shapes = (B, N, T, H), (B, K, T, H), (B, K, T, V)
        qt, kt, vt = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        dt = torch.randn((B, N, T, V), device="cuda", dtype=torch.bfloat16)

        def forward():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(qt, kt, vt, is_causal=True, enable_gqa=N != K)

        def backward():
            return torch.autograd.grad(forward(), (qt, kt, vt), dt)

    timings["fwd"]["torch"] = time_torch(forward)
    timings["fwd+bwd"]["torch"] = time_torch(backward)
    shape = f"{name}: B{B} T{T} N{N} K{K} {H}/{V}"
    fwd, bwd = B * N * T * T * (H + V), B * N * T * T * (3 * H + 2 * V)
    return [
        row("attention", shape, "fwd", fwd, errors[0], timings["fwd"]),
        row("attention", shape, "fwd+bwd", fwd + bwd, max(errors), timings["fwd+bwd"]),
    ]


def group_sizes(skewed: bool, M: int, E: int) -> np.ndarray:
    """Even, or a long tail: the largest group several times the mean, some empty."""
    if not skewed:
        return np.full(E, M // E, np.int32)
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(E, 0.7))
    share[: E // 16] = 0
    return rng.multinomial(M, share / share.sum()).astype(np.int32)


def bench_grouped(name: str, M: int, K: int, N: int, E: int, skewed: bool) -> list[dict]:
    sizes = group_sizes(skewed, M, E)
    sizes_E = jnp.asarray(sizes)
    x, w, d = random(1, (M, K), (E, K, N), (M, N))
    works = {
        "fwd": lambda f: lambda x, w, d, s: f(x, w, s),
        "dgrad": lambda f: lambda x, w, d, s: jax.vjp(lambda x: f(x, w, s), x)[1](d)[0],
        "wgrad": lambda f: lambda x, w, d, s: jax.vjp(lambda w: f(x, w, s), w)[1](d)[0],
    }
    ours = partial(grouped_matmul, implementation="mosaic_gpu")
    wide = [y.astype(jnp.float32) for y in (x, w, d)]  # exact: products of two bfloat16 fit tf32's inputs
    errors, timings = {}, {}
    for work, of in works.items():
        compiled = jax.jit(of(ours)).lower(x, w, d, sizes_E).compile()
        errors[work] = relative(compiled(x, w, d, sizes_E), reference(of(grouped_matmul_blocks), *wide, sizes_E))
        timings[work] = {"ours": timed(lambda run=compiled: run(x, w, d, sizes_E), jax.block_until_ready)}
    del wide
    for work, of in works.items() if not skewed else ():
        timings[work]["jax library"] = time_jax(of(jax.lax.ragged_dot), x, w, d, sizes_E)
        timings[work]["blocks"] = time_jax(of(grouped_matmul_blocks), x, w, d, sizes_E)
    if torch is not None:
        xt, wt, dt = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((M, K), (E, K, N), (M, N)))
        ends = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)
        calls = {
            "fwd": lambda: torch._grouped_mm(xt, wt, offs=ends),
            "dgrad": lambda: torch._grouped_mm(dt, wt.transpose(-2, -1), offs=ends),
            "wgrad": lambda: torch._grouped_mm(xt.t(), dt, offs=ends),
        }
        for work, call in calls.items():
            timings[work]["torch"] = time_torch(call)
    shape = f"{name}: {M} rows, {E}x({K}->{N}), {'skewed' if skewed else 'uniform'}"
    return [row("grouped", shape, work, 2 * M * K * N, errors[work], timings[work]) for work in works]


HEAD = """| op | shape | pass | error | ours | jax library | plain jax | torch | ours/torch | spread |
|---|---|---|---|---|---|---|---|---|---|"""


def printed(rows: list[dict]) -> list[dict]:
    """Prints the rows, and hands them on."""

    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}"

    for r in rows:
        t = r["tflops"]
        plain = t.get("blockwise", t.get("blocks"))
        columns = [figure(t["ours"]), figure(t.get("jax library")), figure(plain), figure(t.get("torch"))]
        ratio = "-" if r["ratio_to_torch"] is None else f"{r['ratio_to_torch']:.2f}"
        figures = " | ".join(columns)
        print(
            f"| {r['op']} | {r['shape']} | {r['work']} | {r['error']:.1e} | {figures} | {ratio} | {r['spread']:.0%} |",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows to this file as well")
    parser.add_argument("--only", choices=["attention", "grouped"])
    options = parser.parse_args()
    device = jax.devices()[0]
    versions = f"jax {jax.__version__}" + ("" if torch is None else f", torch {torch.__version__}")
    print(f"# {device.device_kind}, {versions}, bfloat16, TFLOP/s", flush=True)
    print(HEAD, flush=True)
    rows = []
    if options.only != "grouped":
        for case in ATTENTION:
            rows += printed(bench_attention(*case))
    if options.only != "attention":
        for case in GROUPED:
            for skewed in (False, True):
                rows += printed(bench_grouped(*case, skewed))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(device=device.device_kind, versions=versions, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
