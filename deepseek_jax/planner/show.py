"""A plan as text and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.planner.advice import changes
from deepseek_jax.planner.analysis import Plan
from deepseek_jax.planner.request import described
from deepseek_jax.planner.search import Found

GIB = 2**30


def amount(count: float, unit: str = "B") -> str:
    """1536 -> "1.5 KiB"; other units in powers of a thousand."""
    step, names = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit == "B" else (1000, ("", "k", "M", "G", "T", "P"))
    for name in names:
        if abs(count) < step or name == names[-1]:
            return f"{count:.4g} {name}{unit}" if name else f"{count:.4g} {unit}"
        count /= step
    raise AssertionError


def seconds(value: float) -> str:
    """With a unit that leaves a few digits."""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def text(plan: Plan, compiled: dict[str, Any] | None = None) -> str:
    """The whole plan, for a terminal."""
    return "\n".join([*_head(plan), *_memory(plan, compiled), *_speed(plan), *_cost(plan)])


def _head(plan: Plan) -> Iterator[str]:
    request, run = plan.request, plan.request.run
    topology, model = request.topology, request.model
    cloud = f", {topology.cloud_name} by its cloud's name" if topology.cloud_name else ""
    many = f"{topology.slices} slices of " if topology.slices > 1 else ""
    yield f"{model.name}, {request.step} step"
    yield f"  machine   {many}{topology.name}{cloud}: {topology.chips} chips, {topology.devices} devices, {topology.hosts} hosts"
    rows = f"{request.rows} a device" + (f" × {run.accumulation} pieces" if run.accumulation > 1 else "")
    what = "tokens" if request.trains else "places"
    yield f"  mesh      {described(request)}"
    yield f"  batch     {run.batch_size} sequences ({rows}) of {run.seq_len} {what}"
    if request.trains:
        moments = run.optimizer.moment_dtype + (" on the host" if request.moments_at_host else "")
        yield f"  kept      parameters {model.param_dtype}, moments {moments}, compute {model.dtype}, remat {model.remat}"
    piped = request.pipeline_words
    if piped["microbatches"] is not None:
        chunks = f", {piped['chunks']} chunks a stage" if piped["chunks"] > 1 else ""
        yield f"  pipeline  {piped['schedule']}, {piped['microbatches']} microbatches{chunks}"
        if request.not_built is not None and request.run.pipeline is not None:
            yield (
                f"            {request.not_built} is not built here: only its idle time is counted, memory is that of "
                f"{request.run.pipeline.schedule}"
            )
    if request.split(request.exchange.axis) > 1:
        factor = model.expert_buffer_factor
        room = "room for all that can come" if factor is None else f"{factor:g} of an even share"
        own = f", each of {request.slices_of_experts} slices its own" if request.slices_of_experts > 1 else ""
        yield f"  experts   {model.expert_exchange} exchange{own}, buffers with {room}"


def _memory(plan: Plan, compiled: dict[str, Any] | None) -> Iterator[str]:
    room = plan.headroom >= 0
    yield ""
    yield (
        f"Memory of a device, by arithmetic: {'FITS' if room else 'DOES NOT FIT'}: {amount(plan.memory.peak)} of "
        f"{amount(plan.hbm_bytes)}, {'headroom' if room else 'too much by'} {amount(abs(plan.headroom))}"
    )
    if plan.memory.host:
        verdict = "FITS" if plan.host_headroom >= 0 else "DOES NOT FIT"
        yield (
            f"  at the host: {verdict}: {amount(plan.memory.host)} of a device's share, "
            f"{amount(plan.memory.host + plan.host_headroom)}"
        )
    for part, size in plan.memory.by_part.items():
        yield f"  {part:<22}{amount(size):>12}  {'█' * round(40 * size / max(plan.memory.peak, plan.hbm_bytes))}"
    yield f"  at its peak, in the {plan.memory.phase} pass; the largest buffers:"
    for buffer in plan.memory.largest(6):
        yield f"    {amount(buffer.bytes):>12}  {buffer.name}"
    if compiled is not None:
        yield from compiled_lines(plan, compiled)
    if not plan.fits or (compiled is not None and not compiled["fits"]):
        # What arithmetic leaves out, the compiler's answer scales.
        need: int | None = compiled["compiled_bytes_per_device"] if compiled else None
        scale = need / plan.memory.peak if need else 1.0
        yield f"What to change{' (arithmetic, scaled to what the compiler wanted)' if need else ''}:"
        for change in changes(plan.request)[:6]:
            fits = change.memory.peak * scale <= plan.hbm_bytes and change.memory.host <= change.request.host_share
            yield f"    {amount(change.memory.peak * scale):>12}  {'fits' if fits else 'does not fit'}: {change.what}"


def compiled_lines(plan: Plan, compiled: dict[str, Any]) -> Iterator[str]:
    """What the compiler said."""
    need, limit = compiled["compiled_bytes_per_device"], compiled["hbm_bytes"]
    verdict = "FITS" if compiled["fits"] else "DOES NOT FIT"
    yield ""
    if need is None:
        yield f"Compiled for the machine: {verdict}: {compiled['error']}"
    else:
        apart = plan.memory.peak / need - 1
        yield (
            f"Compiled for the machine: {verdict}: {amount(need)} of {amount(limit)}; arithmetic is {apart:+.1%} of that. "
            f"{compiled['compile_seconds']:.0f} s, {amount(compiled['compiler_peak_rss'])} of host memory"
        )
    for name, size in compiled.get("largest_allocations", [])[:8]:
        yield f"    {amount(size):>12}  {name}"
    if compiled.get("collectives"):
        yield "  collectives in the program, by kind: times in the text, bytes once, bytes with loops counted:"
    for row in compiled.get("collectives", []):
        yield f"    {row['kind']:<22}{row['count']:>5}{amount(row['bytes']):>14}{amount(row['dynamic_bytes']):>14}"


def _speed(plan: Plan) -> Iterator[str]:
    flops, times = plan.flops, plan.times
    yield ""
    yield (
        f"FLOPs a token: {amount(flops.forward, 'FLOP')} forward ({amount(flops.attention, 'FLOP')} of it attention), "
        f"{amount(flops.backward, 'FLOP')} backward, {amount(flops.recomputed, 'FLOP')} recomputed"
    )
    yield "Traffic of a device in a step:"
    for one in plan.traffic:
        over = f"over {' × '.join(one.axes)} " if one.axes else ""
        yield f"  {one.name:<34}{amount(one.bytes):>12}  {seconds(one.seconds):>9}  {over}({one.link})"
    if not plan.traffic:
        yield "  none"
    yield (
        f"A step takes at least {seconds(times.bound)} (limit: {times.limit}; compute {seconds(times.compute)}, "
        f"HBM {seconds(times.hbm)}, links {seconds(times.links)}, idle {seconds(times.idle)}), "
        f"{seconds(times.no_overlap)} if nothing overlaps"
    )
    slow = plan.tokens_per_step / times.no_overlap
    yield f"At most {plan.tokens_per_second:,.0f} tokens/s, {slow:,.0f} if nothing overlaps; MFU at most {plan.mfu:.1%}"

    if plan.request.step == "decode":
        each = plan.tokens_per_second / plan.request.run.batch_size
        per_chip = plan.tokens_per_second / plan.request.topology.chips
        yield f"  {each:,.0f} tokens/s of each sequence, {per_chip:,.0f} of each chip"
    if (most := plan.sequences_that_fit) is not None:
        yield f"  room for {most:,} sequences of {plan.request.run.seq_len} places"


def _cost(plan: Plan) -> Iterator[str]:
    price, tokens = plan.price, plan.request.tokens
    if price is None:
        yield f"No price of {plan.request.topology.device} is known: add it to a copy of prices.json and give --prices"
        return
    mark = " (assumed, not looked up)" if price.assumed else ""
    hourly = plan.request.topology.chips * price.amount
    yield f"{hourly:,.2f} {price.currency} an hour at {price.amount:g} a chip{mark}, prices of {price.as_of}: {price.source}"
    if tokens is not None:
        low, high = plan.chip_hours(tokens), plan.chip_hours(tokens, overlap=False)
        yield (
            f"{tokens:.4g} tokens: {low:,.0f} to {high:,.0f} chip hours, {low * price.amount:,.0f} to "
            f"{high * price.amount:,.0f} {price.currency}; both at full speed of every resource, so count on more"
        )


def search_lines(found: list[Found], tried: list[Found]) -> Iterator[str]:
    """What a search found, cheapest first, and what the compiler said of the first."""
    price = found[0].plan.price
    unit = f"{price.currency} a million tokens" if price else "chip hours a million tokens"
    yield f"{'machine':<14}{'mesh':<34}{'remat':<7}{'rows':>5}{'pieces':>7}{'memory':>12}{'step':>10}{unit:>26}"
    for one in found:
        request, times = one.plan.request, one.plan.times
        yield (
            f"{request.topology.name:<14}{described(request):<34}{request.model.remat:<7}{request.rows:>5}"
            f"{request.run.accumulation:>7}{amount(one.plan.memory.peak):>12}{seconds(times.bound):>10}{one.cost:>26.4g}"
        )
    yield "By arithmetic; the cost is half-way between all resources overlapping and none. Step: all overlapping."
    for one in tried:
        assert one.compiled is not None
        yield from compiled_lines(one.plan, one.compiled.to_dict())
        yield f"    {described(one.plan.request)}, remat {one.plan.request.model.remat}, {one.plan.request.rows} rows a device"
    if tried and tried[-1].compiled is not None and not tried[-1].compiled.fits:
        yield f"The compiler refused all {len(tried)} that were tried: take fewer rows or more recomputation"


def picture(plan: Plan, path: str | Path, compiled: dict[str, Any] | None = None) -> None:
    """A bar of memory by part beside the device's limit, as PNG or SVG by the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for index, (part, size) in enumerate(plan.memory.by_part.items()):
        axes.barh("arithmetic", size / GIB, left=left, color=f"C{index}", label=f"{part} {size / GIB:.2f}")
        left += size / GIB
    if compiled is not None and compiled["compiled_bytes_per_device"] is not None:
        axes.barh("compiler", compiled["compiled_bytes_per_device"] / GIB, color="0.5")
    axes.axvline(plan.hbm_bytes / GIB, color="#b3261e", linestyle="--", label=f"a device {plan.hbm_bytes / GIB:.2f}")
    axes.set_xlabel("GiB of a device")
    axes.set_title(f"{plan.request.model.name}, {plan.request.topology.name}, {described(plan.request)}", fontsize=10)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
