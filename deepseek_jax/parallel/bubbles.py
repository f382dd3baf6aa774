"""Idle time of pipeline schedules (DualPipe's README; GPipe arXiv 1811.06965; interleaving arXiv 2104.04473; zero bubble
arXiv 2401.10241)."""

from __future__ import annotations

from typing import Literal

Schedule = Literal["gpipe", "1f1b", "interleaved", "zb1p", "dualpipe"]


def bubble(
    schedule: Schedule, stages: int, forward: float, backward: float, weights: float = 0.0, *, chunks: int = 2,
    overlapped: float | None = None,
) -> float:  # fmt: skip
    """Time that a stage idles in a step, in the unit of its arguments.

    Args:
        schedule: gpipe and 1f1b idle alike and differ in memory; interleaved has `chunks` parts of the model a stage.
        stages: PP.
        forward: F, of one micro-batch on one stage.
        backward: B, the same, the gradient of the weights included.
        weights: W, of that the gradient of the weights.
        chunks: of the interleaved schedule.
        overlapped: F&B, a forward and a backward pass that hide each other's communication; F + B where not given.
    """
    if stages == 1:
        return 0.0
    if schedule in ("gpipe", "1f1b"):
        return (stages - 1) * (forward + backward)
    if schedule == "interleaved":
        return (stages - 1) * (forward + backward) / chunks
    if schedule == "zb1p":
        return (stages - 1) * (forward + backward - 2 * weights)
    if stages % 2:
        raise ValueError(f"dualpipe with {stages} stages: feeds both ends, so the number of stages must be even")
    together = forward + backward if overlapped is None else overlapped
    return max(0.0, (stages / 2 - 1) * (together + backward - 3 * weights))


def idle_share(schedule: Schedule, stages: int, micro_batches: int, chunks: int = 2) -> float:
    """Share of a step that a stage idles, with B = 2 F and W = F as matrix products have them."""
    idle = bubble(schedule, stages, 1.0, 2.0, 1.0, chunks=chunks)
    return idle / (idle + 3.0 * micro_batches)
