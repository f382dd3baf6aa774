"""The process that compiles: reads a request as JSON from its input, writes what it found to the file that it is given.

A process of its own, because libtpu reads its settings once, from the environment, and because its memory is measured.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main(dumps: str, result: str) -> None:
    """Compile the request on standard input; `dumps` is where XLA_FLAGS sends its dumps."""
    import jax
    from jax.experimental import topologies

    from deepseek_jax.parallel.mesh import make_mesh
    from deepseek_jax.planner.programs import lower
    from deepseek_jax.planner.request import PlanRequest
    from deepseek_jax.serialize import from_dict

    request = from_dict(PlanRequest, json.load(sys.stdin))
    many = {"num_slices": request.topology.slices} if request.topology.slices > 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=request.topology.name, **many).devices
    if len(devices) != request.topology.devices:
        raise ValueError(
            f"libtpu makes {len(devices)} devices of {request.topology.name}, not {request.topology.devices}: it knows "
            f"other cores or slices of it, and cannot be asked"
        )
    begun = time.perf_counter()
    lowered, names = lower(request, make_mesh(request.run.mesh, devices))
    middle = time.perf_counter()
    found: dict[str, Any] = {"lower_seconds": middle - begun, "jax": jax.__version__, "error": None, "memory": None}
    try:
        memory: Any = lowered.compile().memory_analysis()
        found["memory"] = {
            name: getattr(memory, f"{name}_in_bytes")
            for name in (
                "peak_memory",
                "argument_size",
                "output_size",
                "alias_size",
                "temp_size",
                "generated_code_size",
                "host_argument_size",
                "host_temp_size",
            )
        }
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found["error"] = str(error)[:20_000]
    found["compile_seconds"] = time.perf_counter() - middle
    found["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["names"] = names
    found["dumped"] = max(
        (str(path) for path in Path(dumps).glob("*.after_optimizations-buffer-assignment.txt")),
        key=lambda name: Path(name).stat().st_size, default=None,
    )  # fmt: skip
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
