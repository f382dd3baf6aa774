"""The real TPU compiler asked, without a TPU: how much memory a step needs, which collectives it has, whether it fits.

libtpu compiles for absent chips on any x86 Linux CPU. `peak_memory_in_bytes` is the need: arguments plus temporaries count
what is given away twice. XLA's cost analysis is of no use here (loops count once), so FLOPs and time are arithmetic's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_jax.planner.hlo import Allocation, HloCollective, allocations, collectives_in, op_names, summary
from deepseek_jax.planner.request import PlanRequest
from deepseek_jax.serialize import to_dict

# The smallest machine of each kind: libtpu wants one, whatever the topology.
_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler said."""

    fits: bool
    bytes_per_device: int | None
    """Its need; where it refused the program, what it asked for."""
    hbm_bytes: int
    lower_seconds: float
    compile_seconds: float
    peak_rss: int
    """Memory of this machine that compiling took, at its most."""
    memory: dict[str, int] | None
    """Sizes from `memory_analysis`; None where the program was refused."""
    collectives: tuple[HloCollective, ...]
    largest: tuple[Allocation, ...]
    """Regions of the device's memory, largest first."""
    error: str | None
    """The compiler's refusal."""
    text: str
    """The optimised program."""

    def to_dict(self) -> dict[str, Any]:
        """For --json, beside the plan's own."""
        return {
            "compiled_bytes_per_device": self.bytes_per_device,
            "hbm_bytes": self.hbm_bytes,
            "fits": self.fits,
            "lower_seconds": self.lower_seconds,
            "compile_seconds": self.compile_seconds,
            "compiler_peak_rss": self.peak_rss,
            "compiled_memory": self.memory,
            "collectives": summary(self.collectives),
            "largest_allocations": [(one.name, one.bytes) for one in self.largest[:12]],
            "error": self.error,
        }


def compile_plan(request: PlanRequest, *, timeout: float | None = None, keep: str | Path | None = None) -> Compiled:
    """Compile a request's step for its machine, in a child process.

    Args:
        request: what to compile; TPUs alone.
        timeout: seconds after which to give up.
        keep: folder that the compiler's dumps stay in (the program, its buffers); None: they are read and deleted.

    Raises:
        ValueError: no TPU, no libtpu here, a schedule that is not built, or a step that cannot be lowered on that mesh
            (the message is the child's).
        TimeoutError: after `timeout`.
    """
    device = request.device
    if request.not_built is not None:
        raise ValueError(f"--compile: schedule {request.not_built} is not built here: take gpipe, 1f1b or interleaved")
    if device.name not in _ACCELERATORS:
        raise ValueError(
            f"--compile: libtpu compiles for absent TPUs ({', '.join(_ACCELERATORS)}); no compiler does for {device.name}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("--compile needs libtpu, the TPU compiler: pip install 'deepseek-jax[tpu]'")
    with tempfile.TemporaryDirectory() as scratch:
        dumps = Path(keep or scratch).resolve() / "dumps" if keep is None else Path(keep).resolve()
        dumps.mkdir(parents=True, exist_ok=True)
        result = Path(scratch) / "result.json"
        found = _run_child(request, dumps, result, timeout)
        assert device.hbm is not None
        return _read(found, device.hbm)


def environment(device: str, dumps: Path | None = None) -> dict[str, str]:
    """What a process that compiles for an absent TPU must be started with; its dumps go to `dumps`."""
    package = str(Path(__file__).resolve().parents[2])
    # Written also where the program is refused. Other flags are meant for other compilers.
    flags = {} if dumps is None else {"XLA_FLAGS": f"--xla_dump_to={dumps}"}
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": _ACCELERATORS[device],
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache leaves no dumps
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a second compile at once would die of libtpu's lock file
        **flags,
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }


def _run_child(request: PlanRequest, dumps: Path, result: Path, timeout: float | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "deepseek_jax.planner.child", str(dumps), str(result)]
    try:
        child = subprocess.run(
            command, input=json.dumps(to_dict(request)), env=environment(request.device.name, dumps),
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"compiling took more than {timeout:g} s") from None
    if child.returncode or not result.exists():
        lines = child.stderr.strip().splitlines()
        last = next(
            (line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1:] or "?"
        )
        raise ValueError(f"the step could not be compiled (exit code {child.returncode}): {last}")
    return json.loads(result.read_text())


def _read(found: dict[str, Any], hbm: int) -> Compiled:
    text, largest = "", ()
    if found["dumped"]:
        dump = Path(found["dumped"])
        program = dump.with_name(dump.name.removesuffix("-buffer-assignment.txt") + ".txt")
        text = program.read_text() if program.exists() else ""
        largest = tuple(allocations(dump.read_text(), found["names"], op_names(text)))
    memory = found["memory"]
    # The peak counts arguments in the host's memory (libtpu 0.0.42: without them it falls by what the moments take).
    need = memory["peak_memory"] - memory["host_argument_size"] if memory else _wanted(found["error"])
    return Compiled(
        fits=memory is not None and need is not None and need <= hbm,
        bytes_per_device=need,
        hbm_bytes=hbm,
        lower_seconds=found["lower_seconds"],
        compile_seconds=found["compile_seconds"],
        peak_rss=found["peak_rss"],
        memory=memory,
        collectives=tuple(collectives_in(text)),
        largest=largest,
        error=found["error"],
        text=text,
    )


def _wanted(error: str) -> int | None:
    """Bytes that the compiler asked for when it refused: "… (45.62G) exceeds available HBM", "Used 191.00G of …"."""
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds", error) or re.search(r"[Uu]sed ([\d.]+)([KMGT]) of", error)
    return None if match is None else int(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1))
