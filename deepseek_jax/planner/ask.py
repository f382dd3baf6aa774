"""From what a person types or calls to a request: `dsj.plan`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepseek_jax.config import ModelConfig
from deepseek_jax.models.registry import get_config
from deepseek_jax.parallel.bubbles import Schedule
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.pipeline import SCHEDULES, Pipeline
from deepseek_jax.parallel.rules import RULES
from deepseek_jax.planner.analysis import Plan, analyse
from deepseek_jax.planner.request import PlanRequest, Step, changed, parse_fields, parse_mesh, run_of
from deepseek_jax.planner.topology import Topology, parse_topology
from deepseek_jax.serialize import check_types
from deepseek_jax.training.config import RunConfig


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
    as it takes), one sequence for each shard of the batch, all devices along fsdp. `schedule`: the pipeline's, of "gpipe" and
    "1f1b"; of another that is not built the idle time is counted. `fields` are those of the model to change,
    such as ("num_hidden_layers=4",).

    Raises:
        ValueError: an unknown name (the closest is given), degrees or a batch that do not fit (the nearest that would).
    """
    if isinstance(what, str):
        what = get_config(what)
    given = what if isinstance(what, RunConfig) else None
    model = what.model if isinstance(what, RunConfig) else what
    if isinstance(mesh, str):
        mesh = parse_mesh(mesh)
    elif isinstance(mesh, Mapping):
        mesh = MeshConfig(**{"data": 1, **mesh})
    elif mesh is None:
        mesh = given.mesh if given else MeshConfig(data=1, fsdp=-1, slice=slices or 1)
    if isinstance(topology, str):
        topology = parse_topology(topology, max(mesh.slice, 1) if slices is None else slices)
    degrees = mesh.resolved(topology.devices)
    if fields:
        try:
            model = replace(model, **parse_fields(model, fields))  # type: ignore[arg-type]
        except TypeError as error:  # a text where a number belongs
            raise ValueError(f"--set {' '.join(fields)}: {error}") from None
        check_types(model)
    run = given or run_of(model, batch_size=1, seq_len=seq or min(4096, model.max_position_embeddings))
    pipeline = run.pipeline if degrees["stage"] > 1 else None
    run = replace(run, model=model, mesh=mesh, pipeline=pipeline, seq_len=seq or run.seq_len)
    if batch is None and given is None:
        batch = (accumulation or 1) * math.prod(degrees[axis] for axis in RULES["batch"])
    if given and (batch or accumulation):  # a ramp belongs to the batch that it was written for
        run = replace(run, batch_ramp=None)
    run = replace(run, batch_size=batch or run.batch_size, accumulation=accumulation or run.accumulation)
    if microbatches is not None:
        given_chunks = {} if chunks is None else {"chunks": chunks}
        pipeline = run.pipeline or Pipeline(microbatches=microbatches)
        run = replace(run, pipeline=replace(pipeline, microbatches=microbatches, **given_chunks))
    if schedule in SCHEDULES and run.pipeline is not None:  # which are built: its memory is planned too
        run, schedule = replace(run, pipeline=replace(run.pipeline, schedule=schedule)), None
    run = changed(run, remat=remat, moments=moments, moments_on=moments_on, mtp=mtp, dtype=param_dtype)
    return PlanRequest(run=run, topology=topology, step=step, schedule=schedule, tokens=tokens)


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
