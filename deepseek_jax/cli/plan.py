"""`deepseek-jax plan MODEL|CONFIG.py --topology v5p:8x8x8 --mesh fsdp=64,expert=8 …`: memory, time and money, before a chip
is rented."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.config import REMATS

_STEPS = ("train", "grpo", "prefill", "decode")
_SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "dualpipe")
# What --search has no use for.
_SEARCHED = ("mesh", "remat", "accumulation", "microbatches", "chunks", "schedule", "picture", "keep")
_DESCRIPTION = """\
Say whether a step fits a machine, how fast it can be and what it costs, without the machine. By arithmetic in
milliseconds; with --compile by the real TPU compiler (extra tpu), which takes minutes."""


def parser() -> argparse.ArgumentParser:
    """All flags of the verb."""
    made = argparse.ArgumentParser(prog="deepseek-jax plan", description=_DESCRIPTION)
    add = made.add_argument
    add(
        "what",
        nargs="?",
        metavar="MODEL|CONFIG.py",
        help="a member's name (`deepseek-jax models`), or a config file with get_config()",
    )
    add("--topology", metavar="T", help="v5p:8x8x8 (chips by torus), v5p-1024 (the cloud's name), h100:8, h100:16x8")
    add("--preset", metavar="NAME", help="a machine and a mesh for it; --presets lists them")
    add("--presets", action="store_true", help="list the presets with their reasons")
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
    add("--remat", choices=REMATS, help="what the backward pass recomputes")
    add("--moments", choices=("float32", "bfloat16"), help="dtype of the optimizer's moments")
    add("--moments-on", choices=("device", "host"), help="whose memory the moments lie in between updates")
    add("--param-dtype", choices=("float32", "bfloat16"), help="dtype of the stored parameters")
    add(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the model; may be repeated"
    )
    add("--no-mtp", action="store_true", help="without multi-token modules")
    add("--microbatches", type=int, metavar="M", help="of a pipeline over the mesh's stages")
    add("--chunks", type=int, metavar="V", help="runs of layers a stage has in it (default: the config's, or 1)")
    add("--schedule", choices=_SCHEDULES, help="of the pipeline; of zb1p and dualpipe the idle time alone is counted")
    add("--tokens", type=float, metavar="N", help="tokens of the whole run, for hours and money")
    add("--prices", metavar="FILE", help="prices a chip hour, JSON like planner/prices.json")
    add(
        "--search",
        action="store_true",
        help="find the cheapest mesh, recomputation and rows; T may name several, by commas",
    )
    add("--compile", action="store_true", help="ask the real TPU compiler too, in a child process: minutes (extra tpu)")
    add("--keep", metavar="DIR", help="with --compile: keep the compiler's dumps there")
    add("--json", action="store_true", help="print one JSON object")
    add("--picture", metavar="FILE", help="draw memory by part, PNG or SVG")
    return made


def run(args: Sequence[str]) -> None:
    """Print the plan."""
    flags = parser().parse_args(args)
    if flags.presets:
        _list_presets()
        return
    if flags.what is None:
        raise ValueError("say what to plan: a member's name (`deepseek-jax models` lists them), or a config file")
    _check(flags)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs here: no accelerator needs to start

    from deepseek_jax.planner.analysis import analyse
    from deepseek_jax.planner.show import picture, text

    requests = _requests(flags)
    if flags.search:
        _search(flags, requests)
        return
    [request] = requests
    plan = analyse(request, flags.prices)
    compiled = None
    if flags.compile:
        from deepseek_jax.planner.compiled import compile_plan

        compiled = compile_plan(request, keep=flags.keep).to_dict()
    if flags.picture:
        picture(plan, flags.picture, compiled)
    print(json.dumps({**plan.to_dict(), **(compiled or {})}, indent=2) if flags.json else text(plan, compiled))


def _check(flags: argparse.Namespace) -> None:
    """Raise for flags that another leaves no use for, and for a picture that could not be written."""
    if flags.keep is not None and not flags.compile:
        raise ValueError(f"--keep {flags.keep}: the dumps are the compiler's: give --compile too")
    for name in _SEARCHED if flags.search else ():
        if (value := getattr(flags, name)) is not None:
            raise ValueError(
                f"--{name} {value}: --search does not read it, since it tries meshes, recomputation and pieces itself "
                f"(slices are --slices): leave one of both out"
            )
    if flags.picture is not None:
        path = Path(flags.picture)
        if path.is_dir() or path.suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"--picture {path}: must be a file's name that ends in .png or .svg")
        if not path.parent.is_dir():
            raise ValueError(f"--picture {path}: there is no folder {path.parent}: make it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"--picture {path}: may not be written: take another folder")


def _requests(flags: argparse.Namespace) -> list[Any]:
    """One request a machine."""
    from deepseek_jax.cli.train import load_config
    from deepseek_jax.parallel.presets import preset
    from deepseek_jax.planner.ask import make_request

    topologies, mesh, slices = flags.topology, flags.mesh, flags.slices
    if flags.preset:
        chosen = preset(flags.preset)
        topologies = topologies or chosen.topology
        mesh = chosen.mesh if mesh is None and not flags.search else mesh
        slices = chosen.slices if slices is None and not flags.topology else slices
    if topologies is None:
        raise ValueError(
            "--topology is missing: say the machine, such as v5p:8x8x8, v5e-64 or h100:8, or take a --preset"
        )
    names = topologies.split(",")
    if len(names) > 1 and not flags.search:
        raise ValueError(f"--topology {topologies}: several machines are for --search alone")
    what = load_config(Path(flags.what)) if flags.what.endswith(".py") else flags.what
    given = {
        name: getattr(flags, name)
        for name in ("seq", "batch", "accumulation", "step", "remat", "moments", "moments_on", "param_dtype",
                     "schedule", "tokens", "microbatches", "chunks")
    }  # fmt: skip
    if flags.search:
        given["batch"] = None  # which divides on one mesh and not on the next
    return [
        make_request(what, name, mesh, mtp=not flags.no_mtp, fields=flags.set, slices=slices, **given) for name in names
    ]


def _search(flags: argparse.Namespace, requests: list[Any]) -> None:
    from deepseek_jax.planner.search import confirm, search
    from deepseek_jax.planner.show import search_lines

    found = search(requests, flags.prices, batch=flags.batch)
    tried = confirm(found) if flags.compile else []
    if flags.json:
        out = [one.plan.to_dict() | (one.compiled.to_dict() if one.compiled else {}) for one in tried or found]
        print(json.dumps({"found": out}, indent=2))
        return
    print("\n".join(search_lines(found, tried)))


def _list_presets() -> None:
    from deepseek_jax.parallel.presets import PRESETS

    for name, one in PRESETS.items():
        mesh = ",".join(f"{axis}={n}" for axis, n in vars(one.mesh).items() if n != 1) or "data=1"
        print(f"{name:<12}{one.topology:<12}{mesh:<28}{one.why}")
