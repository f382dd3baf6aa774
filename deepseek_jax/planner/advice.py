"""What to change where a plan does not fit, or leaves much room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from deepseek_jax.config import REMATS, MoE
from deepseek_jax.planner.memory import Memory, memory_of
from deepseek_jax.planner.request import PlanRequest, changed
from deepseek_jax.planner.shapes import check_divides
from deepseek_jax.planner.topology import Topology, parse_topology


@dataclass(frozen=True)
class Change:
    """One change to a request."""

    what: str
    request: PlanRequest
    memory: Memory
    """With it."""

    @property
    def fits(self) -> bool:
        return self.memory.peak <= (self.request.device.hbm or 0) and self.memory.host <= self.request.host_share


def changes(request: PlanRequest) -> list[Change]:
    """Single changes that lower the peak, and all that cost no chips together; those that fit first, least first."""
    now = memory_of(request).peak
    found = [Change(what, other, memory_of(other)) for what, other in _tried(request)]
    return sorted((one for one in found if one.memory.peak < now), key=lambda one: (not one.fits, one.memory.peak))


def _tried(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    run, model = request.run, request.model
    together, names = request, []
    if request.trains:
        for remat in REMATS[REMATS.index(model.remat) + 1 :]:
            if remat != "offload" or run.pipeline is None:
                other = replace(request, run=changed(run, remat=remat))
                yield f"--remat {remat}", other
                if remat != "offload":  # which costs the link to the host
                    together, names = other, [f"--remat {remat}"]
        if run.moments_on == "device" and request.step == "train":
            yield "--moments-on host", replace(request, run=changed(run, moments_on="host"))
        if run.optimizer.moment_dtype == "float32":
            yield "--moments bfloat16", replace(request, run=changed(run, moments="bfloat16"))
            together = replace(together, run=changed(together.run, moments="bfloat16"))
            names.append("--moments bfloat16")
    smaller = _fewer_rows(request)
    if smaller is not None:
        yield smaller[0], smaller[1]
        if (less := _fewer_rows(together)) is not None:
            together = less[1]
            names.append(less[0])
    if request.split(request.exchange.axis) > 1 and model.expert_buffer_factor is None:
        bounded = replace(model, expert_buffer_factor=1.5)
        yield "--set expert_buffer_factor=1.5", replace(request, run=replace(run, model=bounded))
        bounded = replace(together.model, expert_buffer_factor=1.5)
        together = replace(together, run=replace(together.run, model=bounded))
        names.append("--set expert_buffer_factor=1.5")
    if len(names) > 1:
        yield " ".join(names), together
    if isinstance(model.ffn, MoE) and request.degrees["slice"] > 1 and not model.expert_across_slices:
        other = _maybe(request, run=replace(run, model=replace(model, expert_across_slices=True)))
        if other is not None:
            yield "--set expert_across_slices=True", other
    yield from _more_experts(request)
    if run.mesh.fsdp != -1:
        grown = _twice(request.topology)
        mesh = replace(run.mesh, fsdp=2 * request.degrees["fsdp"])
        wider = replace(run, mesh=mesh, batch_size=2 * run.batch_size, batch_ramp=None)
        other = _maybe(request, topology=grown, run=wider) if grown else None
        if other is not None and grown is not None:
            yield f"twice the chips, --topology {grown.name} with fsdp {mesh.fsdp}", other


def _twice(topology: Topology) -> Topology | None:
    """Of twice the chips a slice (GPUs: hosts); None where there is no such slice."""
    for dim in (-1, 0) if topology.kind.torus else (0,):
        shape = list(topology.shape)
        shape[dim] *= 2
        grown = replace(topology, shape=tuple(shape))
        try:
            return parse_topology(grown.name, grown.slices)
        except ValueError:
            continue
    return None


def _fewer_rows(request: PlanRequest) -> tuple[str, PlanRequest] | None:
    run, rows = request.run, request.rows
    if rows == 1:
        return None
    if request.trains:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        accumulation = run.accumulation * factor
        return f"--accumulation {accumulation}", replace(
            request, run=replace(run, accumulation=accumulation, batch_ramp=None)
        )
    batch = request.split("batch") * (rows // 2)
    return f"--batch {batch}", replace(request, run=replace(run, batch_size=batch, batch_ramp=None))


def _more_experts(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    """Degrees moved from fsdp to expert: less to gather for each layer."""
    ffn, degrees = request.model.ffn, request.degrees
    if not isinstance(ffn, MoE):
        return
    expert, fsdp = degrees["expert"], degrees["fsdp"]
    for times in (2, 4, 8, 16):
        if fsdp % times or ffn.n_routed_experts % (expert * times):
            return
        mesh = replace(request.run.mesh, fsdp=fsdp // times, expert=expert * times)
        other = _maybe(request, run=replace(request.run, mesh=mesh))
        if other is not None:
            yield f"fsdp={fsdp // times},expert={expert * times} in --mesh", other


def _maybe(request: PlanRequest, **fields) -> PlanRequest | None:
    try:
        other = replace(request, **fields)
        check_divides(other.model, other.degrees)
    except ValueError:
        return None
    return other
