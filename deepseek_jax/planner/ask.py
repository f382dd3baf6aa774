"""From what a person types or calls to a request: `dsj.plan`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from deepseek_jax.config import REMATS, ModelConfig
from deepseek_jax.models.registry import get_config
from deepseek_jax.parallel.bubbles import Schedule
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.pipeline import SCHEDULES, Pipeline
from deepseek_jax.parallel.rules import RULES
from deepseek_jax.planner.analysis import Plan, analyse
from deepseek_jax.planner.request import PlanRequest, Step, changed, mesh_of, parse_fields, parse_mesh, run_of
from deepseek_jax.planner.topology import Topology, parse_topology
from deepseek_jax.serialize import check_types
from deepseek_jax.training.config import RunConfig

_DTYPES = ("float32", "bfloat16")
_CHOICES = {
    "step": get_args(Step), "remat": REMATS, "moments": _DTYPES, "moments_on": ("device", "host"),
    "param_dtype": _DTYPES, "schedule": get_args(Schedule),
}  # fmt: skip
_PIPELINE = ("microbatches", "chunks", "schedule")
# What a step has no use for.
_SERVING = ("accumulation", "remat", "moments", "moments_on", "param_dtype", *_PIPELINE)
_UNUSED = {"grpo": ("moments_on", *_PIPELINE), "prefill": _SERVING, "decode": _SERVING}


def make_request(
    what: str | ModelConfig | RunConfig,
    topology: str | Topology,
    mesh: str | MeshConfig | Mapping[str, int] | None = None,
    *,
    seq: int | None = None,
    batch: int | None = None,
    accumulation: int | None = None,
    step: Step = "train",
    remat: str | None = None,
    moments: str | None = None,
    moments_on: str | None = None,
    param_dtype: str | None = None,
    mtp: bool = True,
    microbatches: int | None = None,
    chunks: int | None = None,
    schedule: Schedule | None = None,
    tokens: float | None = None,
    slices: int | None = None,
    fields: Sequence[str] = (),
) -> PlanRequest:
    """The request that these words mean. What is not given is what the run says, or for a model: 4,096 tokens (or as many
    as it takes), one sequence for each shard of the batch, all devices along fsdp. `schedule`: the pipeline's; where no
    pipeline here runs it (zb1p, dualpipe), its idle time alone is counted. `fields` are those of the model to change,
    such as ("num_hidden_layers=4",).

    Raises:
        ValueError: an unknown name (the closest is given), degrees or a batch that do not fit (the nearest that would),
            a setting that the step or the mesh has no use for.
    """
    counts = dict(
        seq=seq, batch=batch, accumulation=accumulation, microbatches=microbatches, chunks=chunks, slices=slices
    )
    choices = dict(
        step=step, remat=remat, moments=moments, moments_on=moments_on, param_dtype=param_dtype, schedule=schedule
    )
    _check_words(counts, choices)
    if isinstance(what, str):
        what = get_config(what)
    given = what if isinstance(what, RunConfig) else None
    model = what.model if isinstance(what, RunConfig) else what
    if isinstance(mesh, str):
        mesh = parse_mesh(mesh)
    elif isinstance(mesh, Mapping):
        mesh = mesh_of(mesh, f"mesh {dict(mesh)}")
    elif mesh is None:
        mesh = given.mesh if given else MeshConfig(data=1, fsdp=-1, slice=slices or 1)
    if isinstance(topology, str):
        topology = parse_topology(topology, max(mesh.slice, 1) if slices is None else slices)
    degrees = mesh.resolved(topology.devices)
    if slices is not None and (slices, slices) != (topology.slices, degrees["slice"]):
        raise ValueError(
            f"--slices {slices}: the mesh has slice = {degrees['slice']}; both must be the same, or leave --slices out"
        )
    if fields:
        model = replace(model, **parse_fields(model, fields))  # type: ignore[arg-type]
        check_types(model)
    run = given or run_of(model, batch_size=1, seq_len=seq or min(4096, model.max_position_embeddings))
    pipeline = run.pipeline if degrees["stage"] > 1 else None
    run = replace(run, model=model, mesh=mesh, pipeline=pipeline, seq_len=seq or run.seq_len)
    if batch is None and given is None:
        batch = (accumulation or 1) * math.prod(degrees[axis] for axis in RULES["batch"])
    if given and (batch or accumulation):  # a ramp belongs to the batch that it was written for
        run = replace(run, batch_ramp=None)
    if step in ("prefill", "decode"):  # what is served is served at once
        run = replace(run, accumulation=1, batch_ramp=None)
    run = replace(run, batch_size=batch or run.batch_size, accumulation=accumulation or run.accumulation)
    pipeline = _pipeline(run.pipeline, degrees["stage"], microbatches, chunks, schedule)
    run = replace(run, pipeline=pipeline)
    run = changed(run, remat=remat, moments=moments, moments_on=moments_on, mtp=mtp, dtype=param_dtype)
    idle = schedule if schedule in ("zb1p", "dualpipe") else None  # the others are the pipeline's own
    return PlanRequest(run=run, topology=topology, step=step, schedule=idle, tokens=tokens)


def _check_words(counts: Mapping[str, int | None], choices: Mapping[str, Any]) -> None:
    """Raise for a number below 1, a word that is none of its choices, a setting that the step has no use for."""
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(
                f"{flag(name)} {value}: must be a whole number, at least 1; left out, the default is taken"
            )
    for name, value in choices.items():
        if value is not None and value not in _CHOICES[name]:
            raise ValueError(f"{flag(name)} {value}: must be one of {', '.join(_CHOICES[name])}")
    step, given = choices["step"], {**counts, **choices}
    for name in _UNUSED.get(step, ()):
        if given[name] is not None:
            raise ValueError(
                f"{flag(name)} {given[name]}: a {step} step has no use for it; leave it out, or --step train"
            )


def flag(name: str) -> str:
    """Of the command line, for a keyword of `make_request`."""
    return f"--{name.replace('_', '-')}"


def _pipeline(
    pipeline: Pipeline | None, stages: int, microbatches: int | None, chunks: int | None, schedule: str | None
) -> Pipeline | None:
    """The run's pipeline with what is given of it."""
    given = {"microbatches": microbatches, "chunks": chunks, "schedule": schedule}
    said = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
    if not said:
        return pipeline
    if stages == 1:
        raise ValueError(f"{said}: of a pipeline, and the mesh has stage = 1: say --mesh stage=4,… or leave it out")
    if pipeline is None and microbatches is None:
        raise ValueError(f"{said}: of a pipeline: give --microbatches too, a multiple of the mesh's stage = {stages}")
    changes: dict[str, Any] = {
        name: n for name, n in (("microbatches", microbatches), ("chunks", chunks)) if n is not None
    }
    if schedule in SCHEDULES:
        changes["schedule"] = schedule
    elif schedule == "interleaved":  # which a pipeline of several chunks is
        changes["schedule"] = "gpipe"
    made = Pipeline(**changes) if pipeline is None else replace(pipeline, **changes)
    if schedule == "interleaved" and made.chunks == 1:
        raise ValueError("--schedule interleaved: give --chunks, 2 or more: of one it is gpipe")
    return made


def plan(
    what: str | ModelConfig | RunConfig,
    topology: str | Topology,
    mesh: str | MeshConfig | Mapping[str, int] | None = None,
    *,
    prices: str | Path | None = None,
    **given: Any,
) -> Plan:
    """Memory, time and money of a step, by arithmetic.

    Args:
        what: a member's name, a model, or a run.
        topology: "v5p:8x8x8", "v5p-1024", "h100:8", …
        mesh: "fsdp=64,expert=8", or degrees; what is not named is 1.
        prices: a file like planner/prices.json.
        given: see `make_request`: seq, batch, step, remat, moments, tokens, …

    Returns: a `Plan`; `print(plan)` shows it, `plan.to_dict()` is one JSON object.
    """
    return analyse(make_request(what, topology, mesh, **given), prices)
