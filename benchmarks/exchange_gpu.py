"""Expert exchange on several GPUs of one host: gradients of the ragged all-to-all against the emulation's, and both ways timed.

    python benchmarks/exchange_gpu.py [--tokens 8192] [--buffer 1.25] [--rounds 20]
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 python benchmarks/exchange_gpu.py --small

Two layouts of all devices: experts over all, and, of four or more, fsdp 2 × experts over the rest. A layer of routed
experts of V2-Lite's shape (64 experts of 1,408, width 2,048, 6 a token), random weights and routes, bfloat16, forward and
backward. Values and gradients are compared with the emulation (an all-to-all of equal blocks) element by element: XLA's one-shot
ragged all-to-all on GPUs was seen to corrupt gradients, so the bits are looked at before the times. One line of JSON a
layout.
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.layers import expert_parallel
from deepseek_jax.parallel import MeshConfig, exchange, make_mesh, use_mesh

ragged_all_to_all = exchange.ragged_all_to_all


def layer(way: str, buffer: float | None, arrays: Any, cotangent: jax.Array) -> Any:
    """Compiled value and gradients of the layer, by one way of exchange."""
    chosen = expert_parallel.Exchange(way="ring" if way == "ring" else "ragged", buffer_factor=buffer)
    if way != "ring":
        exchange.ragged_all_to_all = partial(ragged_all_to_all, implementation=way)

    def total(arrays: Any, indices: jax.Array) -> jax.Array:
        x, weights, *matrices = arrays
        out, _ = expert_parallel.parallel_experts(x, indices, weights, *matrices, exchange=chosen, decoding=False)
        return (out.astype(jnp.float32) * cotangent).sum()

    run = jax.jit(jax.value_and_grad(total))
    return run.lower(*arrays).compile()


def seconds(function: Any, *arguments: Any, rounds: int) -> tuple[float, float, float]:
    """Median, least and most."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), max(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a device")
    parser.add_argument("--buffer", type=float, help="places of a device, over its even share; room for all by default")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    E, X, D, F, T = (8, 2, 32, 16, 64) if options.small else (64, 6, 2048, 1408, options.tokens)
    N, draw = jax.device_count(), np.random.default_rng(0)
    for degrees in ({"expert": N}, *[{"fsdp": 2, "expert": N // 2}] * (N > 2)):
        x = draw.standard_normal((N, T, D))
        indices = jnp.asarray(np.argsort(draw.random((N, T, E)), axis=-1)[..., :X].astype(np.int32))
        matrices = [draw.standard_normal(shape) * 0.05 for shape in ((E, D, F), (E, D, F), (E, F, D))]
        arrays = [jnp.asarray(a, jnp.bfloat16) for a in (x, *matrices)]
        arrays.insert(1, jnp.asarray(draw.random((N, T, X)), jnp.float32))
        cotangent = jnp.asarray(draw.standard_normal((N, T, D)), jnp.float32)
        with use_mesh(make_mesh(MeshConfig(data=1, **degrees))):
            ways = {
                way: layer(way, options.buffer, (arrays, indices), cotangent)
                for way in (*["native"] * (not options.small), "emulated", "ring")
            }
            truth = jax.device_get(ways["emulated"](arrays, indices))
            row: dict[str, Any] = {"device": jax.devices()[0].device_kind, "layout": degrees, "jax": jax.__version__}
            for way, run in ways.items():
                found = jax.device_get(run(arrays, indices))
                worst = max(
                    float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max() / np.abs(b).max())
                    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
                )
                median, least, most = seconds(run, arrays, indices, rounds=options.rounds)
                row[way] = {"largest_difference": worst, "ms": [round(1e3 * t, 2) for t in (median, least, most)]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
