"""`deepseek-jax plan MODEL|CONFIG.py --topology v5p:8x8x8 --mesh fsdp=64,expert=8 …`: memory, time and money, before a chip
is rented."""

import argparse
import json
import os
from collections.abc import Sequence

_STEPS = ("train", "grpo", "prefill", "decode")
_DESCRIPTION = """\
Say whether a step fits a machine, how fast it can be and what it costs, without the machine. By arithmetic in
milliseconds; with --compile by the real TPU compiler (extra tpu), which takes minutes."""


def parser() -> argparse.ArgumentParser:
    """All flags of the verb."""
    made = argparse.ArgumentParser(prog="deepseek-jax plan", description=_DESCRIPTION)
    add = made.add_argument
    add(
        "what",
        metavar="MODEL|CONFIG.py",
        help="a member's name (`deepseek-jax models`), or a config file with get_config()",
    )
    add("--topology", metavar="T", help="v5p:8x8x8 (chips by torus), v5p-1024 (the cloud's name), h100:8, h100:16x8")
    add("--slices", type=int, metavar="N", help="slices of that topology (default: the mesh's slice axis)")
    add("--mesh", metavar="M", help="fsdp=64,expert=8; axes not named are 1, one may be -1 (default: all along fsdp)")
    add("--step", choices=_STEPS, default="train", help="which step (default: %(default)s)")
    add("--seq", type=int, metavar="T", help="tokens of a sequence; places of a cache when serving")
    add(
        "--batch",
        type=int,
        metavar="B",
        help="sequences of a step over all devices (default: one a shard of the batch)",
    )
    add("--accumulation", type=int, metavar="A", help="pieces in which the batch is worked off")
    add("--remat", choices=("none", "v3", "full"), help="what the backward pass recomputes")
    add("--moments", choices=("float32", "bfloat16"), help="dtype of the optimizer's moments")
    add("--param-dtype", choices=("float32", "bfloat16"), help="dtype of the stored parameters")
    add("--no-mtp", action="store_true", help="without multi-token modules")
    add(
        "--schedule",
        choices=("gpipe", "1f1b", "interleaved", "zb1p", "dualpipe"),
        default="1f1b",
        help="of the pipeline",
    )
    add("--tokens", type=float, metavar="N", help="tokens of the whole run, for hours and money")
    add("--prices", metavar="FILE", help="prices a chip hour, JSON like planner/prices.json")
    add("--compile", action="store_true", help="ask the real TPU compiler too, in a child process: minutes (extra tpu)")
    add("--keep", metavar="DIR", help="with --compile: keep the compiler's dumps there")
    add("--json", action="store_true", help="print one JSON object")
    add("--picture", metavar="FILE", help="draw memory by part, PNG or SVG")
    return made


def run(args: Sequence[str]) -> None:
    """Print the plan."""
    flags = parser().parse_args(args)
    if flags.topology is None:
        raise ValueError("--topology is missing: say the machine, such as v5p:8x8x8, v5e-64 or h100:8")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs here: no accelerator needs to start

    from pathlib import Path

    from deepseek_jax.cli.train import load_config
    from deepseek_jax.planner.analysis import analyse
    from deepseek_jax.planner.ask import make_request
    from deepseek_jax.planner.show import picture, text

    what = load_config(Path(flags.what)) if flags.what.endswith(".py") else flags.what
    request = make_request(
        what, flags.topology, flags.mesh, seq=flags.seq, batch=flags.batch, accumulation=flags.accumulation,
        step=flags.step, remat=flags.remat, moments=flags.moments, param_dtype=flags.param_dtype, mtp=not flags.no_mtp,
        schedule=flags.schedule, tokens=flags.tokens, slices=flags.slices,
    )  # fmt: skip
    plan = analyse(request, flags.prices)
    compiled = None
    if flags.compile:
        from deepseek_jax.planner.compiled import compile_plan

        compiled = compile_plan(request, keep=flags.keep).to_dict()
    if flags.picture:
        picture(plan, flags.picture, compiled)
    print(json.dumps({**plan.to_dict(), **(compiled or {})}, indent=2) if flags.json else text(plan, compiled))
