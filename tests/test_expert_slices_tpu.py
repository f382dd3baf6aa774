"""Experts of two slices compile for TPUs that are not there, and one row a token crosses the network between them.

The compiler runs in a child process, because its settings are read once. Run this file as a script to see what it prints.
"""

import json
import math
import re
from typing import Any

from marks import needs_libtpu
from spread import printed_by_child

M, D, F, E, X = 256, 1024, 512, 16, 4  # tokens of a device, …
GROUPS = (2, 1)  # a token's experts lie in one slice


@needs_libtpu
def test_one_row_a_token_crosses_the_network():
    sent = json.loads(printed_by_child(__file__, "v5e"))
    rows = [size for kind, dtype, size in sent if kind == "RAGGED_ALL_TO_ALL" and dtype == "bf16"]
    assert rows == [M * D] * 4, "out and back, and the gradients of both"
    others = [size for kind, dtype, size in sent if not (kind == "RAGGED_ALL_TO_ALL" and dtype == "bf16")]
    assert max(others) <= 2 * M * X, "routes, gate weights and places: nothing of the experts"


def main() -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from deepseek_jax.layers.expert_parallel import Exchange, parallel_experts
    from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
    from deepseek_jax.parallel.rules import named_sharding

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=1, slice=2, fsdp=2, expert=2), devices)
    exchange = Exchange(across_slices=True, groups=GROUPS, buffer_factor=1.0)

    def loss(x: Any, weights: Any, *rest: Any) -> Any:
        out, _ = parallel_experts(x, rest[-1], weights, *rest[:-1], exchange=exchange, decoding=False)
        return (out.astype(jnp.float32) ** 2).sum()

    def array(shape: tuple[int, ...], dtype: Any, *names: str) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, names, shape))

    tokens = ("batch", "length", "none")
    arguments = (
        array((8, M, D), jnp.bfloat16, *tokens),
        array((8, M, X), jnp.float32, *tokens),
        *(array((E, D, F), jnp.float32, exchange.axis, "expert_embed", "ffn") for _ in range(2)),
        array((E, F, D), jnp.float32, exchange.axis, "ffn", "expert_embed"),
        array((8, M, X), jnp.int32, *tokens),
    )
    with use_mesh(mesh):
        text = jax.jit(jax.grad(loss, range(5))).lower(*arguments).compile().as_text() or ""
    sends = re.findall(r"= \((\w+)\[([\d,]*)\].* send\(.*_xla_megascale_transfer_type=\"(\w+)\"", text)
    sizes = [(kind, dtype, [int(dim) for dim in dims.split(",") if dim]) for dtype, dims, kind in sends]
    print(json.dumps([(kind, dtype, math.prod(dims)) for kind, dtype, dims in sizes]))


if __name__ == "__main__":
    main()
