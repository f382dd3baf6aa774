"""Which links a collective crosses, what share of its bytes comes over each, and how fast.

A ring on a torus dim uses its two links in both directions where the dim closes, one where it does not; a collective over
mesh axes that fill d dims of the torus has d such rings. An all-to-all is held up by the middle of the longest ring: with k
devices on it, k / 8 times the bytes of a device, its own share among them, over one link; twice that where the dim does not
close. What goes round from one device to the next uses one link in one direction.

GPUs of a host meet in a switch. Of a group of n with g on each host, a host needs what the others have once, and its g
network cards share that: (n − g) / g of n parts for each, while NVLink brings the rest of a device's n − 1. In an
all-to-all (n − g) of the n − 1 parts come over the device's own card. What leaves a slice goes over the network too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deepseek_jax.planner.request import PlanRequest

Link = Literal["ici", "nvlink", "network", "host"]
Way = Literal["gather", "all-to-all", "round"]
"""All-gathers and sums; exchanges in which each device has something else for each other; from one device to the next."""


@dataclass(frozen=True)
class Route:
    """A kind of link that a collective crosses."""

    link: Link
    share: float
    """Of the bytes that a device receives."""
    speed: float
    """Bytes/s that a device receives over it."""


def routes(request: PlanRequest, axes: tuple[str, ...], way: Way = "gather") -> list[Route]:
    """The links of a collective over these mesh axes, of more than one device in all."""
    device, degrees = request.device, request.degrees
    assert device.network and device.link
    if "slice" in axes and degrees["slice"] > 1:
        return [Route("network", 1.0, device.network)]
    n = math.prod(degrees[axis] for axis in axes)
    if not device.torus:
        return _switched(n, _on_a_host(request, axes), way, device.link, device.network)
    rings = _rings(request, n)
    if not rings:
        return [Route("ici", 1.0, 2 * device.link)]  # two cores of one chip
    if way == "round":
        return [Route("ici", 1.0, device.link)]
    if way == "all-to-all":  # a device's own share is in the rings' time, and not in the bytes that it receives
        speed = min(device.link * (8 if closed else 4) / size for size, closed in rings)
        return [Route("ici", 1.0, speed * (n - 1) / n)]
    return [Route("ici", 1.0, sum(device.link * (2 if closed else 1) for _, closed in rings))]


def _switched(n: int, g: int, way: Way, inside: float, outside: float) -> list[Route]:
    """Of a group of n GPUs, g on each host."""
    if g >= n:
        return [Route("nvlink", 1.0, inside)]
    if way == "round":  # all bytes of the device at a host's border
        return [Route("network", 1.0, outside)]
    share = (n - g) / (n - 1) / (1 if way == "all-to-all" else g)
    found = [Route("network", share, outside), Route("nvlink", 1 - share, inside)]
    return found if g > 1 else found[:1]


def _on_a_host(request: PlanRequest, axes: tuple[str, ...]) -> int:
    """GPUs of a host that are in one group over these axes. Axes that stand last are neighbours."""
    left, found = request.topology.shape[1], 1
    for axis in reversed(request.degrees):
        here = min(request.degrees[axis], max(left, 1))
        found *= here if axis in axes else 1
        left //= request.degrees[axis]
    return found


def _rings(request: PlanRequest, devices: int) -> list[tuple[float, bool]]:
    """(chips, whether it closes) of the rings that a group of so many devices lies on: as few dims as hold it."""
    topology, left, found = request.topology, devices / request.device.per_chip, []
    for dim in sorted(range(len(topology.shape)), key=lambda dim: -topology.shape[dim]):
        if left <= 1:
            break
        size = min(left, topology.shape[dim])
        found.append((size, size == topology.shape[dim] and topology.wraps(dim)))
        left /= topology.shape[dim]
    return found
