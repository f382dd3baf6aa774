"""The cheapest way to train on given machines: meshes, recomputation and rows a device, by arithmetic first, then compiled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek_jax.config import REMATS, MoE
from deepseek_jax.parallel.rules import RULES
from deepseek_jax.planner.analysis import Plan, analyse
from deepseek_jax.planner.compiled import Compiled, compile_plan
from deepseek_jax.planner.request import PlanRequest, changed
from deepseek_jax.planner.shapes import check_divides

MARGIN = 0.92
"""Share of a device's memory that arithmetic may fill: the compiler's own need differs by some percent."""
_ROWS = (1, 2, 4, 8, 16, 32)
_LONG = 16384  # tokens of a sequence from which splitting it is worth a look


@dataclass(frozen=True)
class Found:
    """A way that fits."""

    plan: Plan
    compiled: Compiled | None = None

    @property
    def seconds_per_token(self) -> float:
        """Of all chips together, half-way between all overlapping and nothing."""
        times = self.plan.times
        return (times.bound + times.no_overlap) / 2 / self.plan.tokens_per_step

    @property
    def cost(self) -> float:
        """Money for a million tokens, or chip hours where no price is known."""
        hours = self.seconds_per_token * self.plan.request.topology.chips / 3600 * 1e6
        return hours * (self.plan.price.amount if self.plan.price else 1.0)


def search(
    requests: Iterable[PlanRequest], prices: str | Path | None = None, *, batch: int | None = None, keep: int = 8
) -> list[Found]:
    """The cheapest ways to do a step's work, cheapest first.

    Args:
        requests: one a machine, which says model, sequence length and precision; mesh, remat and rows are searched.
        prices: see `analyse`.
        batch: sequences of a step, worked off in pieces where they must; None: rows a device are searched instead.
        keep: how many to return.

    Raises:
        ValueError: nothing fits; the message says what came nearest.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"--batch {batch}: must be at least 1; left out, rows a device are searched")
    found: list[Found] = []
    nearest: Plan | None = None
    for request in requests:
        for candidate in candidates(request, batch):
            plan = analyse(candidate, prices)
            if plan.memory.peak <= MARGIN * plan.hbm_bytes and plan.host_headroom >= 0:
                found.append(Found(plan))
            elif nearest is None or plan.memory.peak / plan.hbm_bytes < nearest.memory.peak / nearest.hbm_bytes:
                nearest = plan
    if not found:
        if nearest is None:
            raise ValueError("no mesh of these machines divides the model's dims and the batch")
        raise ValueError(
            f"nothing fits: the nearest is {nearest.request.degrees} on {nearest.request.topology.name}, "
            f"{nearest.memory.peak / 2**30:.1f} GiB of {nearest.hbm_bytes / 2**30:.1f}"
            + (", and too much at the host" if nearest.host_headroom < 0 else "")
            + ": take more or larger chips"
        )
    return sorted(found, key=lambda one: one.cost)[:keep]


def confirm(found: list[Found], count: int = 3) -> list[Found]:
    """The first of `found` that the compiler takes, compiled, with those before it that it refused; at most `count` tries.

    Where arithmetic and the compiler disagree, the compiler is right.
    """
    tried = []
    for one in found[:count]:
        tried.append(Found(one.plan, compile_plan(one.plan.request)))
        if tried[-1].compiled is not None and tried[-1].compiled.fits:
            break
    return tried


def candidates(request: PlanRequest, batch: int | None = None) -> Iterator[PlanRequest]:
    """Requests like this one with other meshes, recomputation and rows a device, where everything divides."""
    for degrees in meshes(request):
        run = replace(request.run, mesh=replace(request.run.mesh, **degrees), batch_ramp=None, pipeline=None)
        split = math.prod(degrees[axis] for axis in RULES["batch"])
        for rows in _ROWS:
            if batch is not None:
                if batch % (split * rows):
                    continue
                sized = replace(run, batch_size=batch, accumulation=batch // (split * rows))
            else:
                sized = replace(run, batch_size=split * rows, accumulation=1)
            for remat in REMATS if request.trains else (request.model.remat,):
                try:
                    yield replace(request, run=changed(sized, remat=remat))
                except ValueError:
                    break


def meshes(request: PlanRequest) -> Iterator[dict[str, int]]:
    """Degrees of all axes: powers of two and the like for experts, context and tensor; the rest along fsdp, then data."""
    devices, model = request.topology.devices, request.model
    slices = request.degrees["slice"]
    inside = devices // slices
    experts = model.ffn.n_routed_experts if isinstance(model.ffn, MoE) else 1
    heads = model.attention.num_attention_heads
    contexts = [n for n in (1, 2, 4, 8, 16, 32) if n == 1 or request.run.seq_len >= _LONG]
    for expert in (n for n in (1, 2, 4, 8, 16, 32, 64) if experts % n == 0 and inside % n == 0):
        for context in contexts:
            for tensor in (n for n in (1, 2, 4, 8) if heads % n == 0):
                left, over = divmod(inside, expert * context * tensor)
                if over or not left:
                    continue
                for data in (n for n in (1, 2, 4, 8, 16) if left % n == 0):
                    degrees = {
                        "slice": slices, "stage": 1, "data": data, "fsdp": left // data, "expert": expert,
                        "context": context, "tensor": tensor,
                    }  # fmt: skip
                    if _divides(request, degrees):
                        yield degrees


def _divides(request: PlanRequest, degrees: dict[str, int]) -> bool:
    try:
        check_divides(request.model, degrees)
    except ValueError:
        return False
    return True
