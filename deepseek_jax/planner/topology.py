"""Names of machines: "v5p:8x8x8" (chips by torus), "v5p-1024" (the cloud's name), "h100:8", "h100:16x8" (hosts × GPUs)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from deepseek_jax import hardware
from deepseek_jax.hardware import Device

SIDE = 16
"""Chips along a side of the largest slice of v5e and v6e."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices and how they hang together."""

    device: str
    """Name in hardware.py."""
    shape: tuple[int, ...]
    """TPU: chips along each dim of a slice's torus. GPU: hosts, GPUs of a host."""
    slices: int = 1
    """Slices like this, joined by the data-centre network."""

    @property
    def kind(self) -> Device:
        return hardware.by_name(self.device)

    @property
    def chips(self) -> int:
        """Of all slices: what is rented."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """jax devices of all slices."""
        return self.chips * self.kind.per_chip

    @property
    def hosts(self) -> int:
        return -(-self.devices // self.kind.per_host)

    @property
    def name(self) -> str:
        """As `parse_topology` reads it, of one slice."""
        if self.kind.torus:
            return f"{self.device}:{'x'.join(map(str, self.shape))}"
        return (
            f"{self.device}:{self.shape[1]}" if self.shape[0] == 1 else f"{self.device}:{self.shape[0]}x{self.shape[1]}"
        )

    @property
    def cloud_name(self) -> str | None:
        """What Google's cloud calls one slice: v5p-1024 counts cores and has 512 chips, v5e-64 and v6e-64 count chips."""
        return f"{self.device}-{math.prod(self.shape) * self.kind.named_cores}" if self.kind.torus else None

    def wraps(self, dim: int) -> bool:
        """Whether the torus closes along a dim: of v4, v5p and 7x where every dim is a multiple of 4, of v5e and v6e at 16."""
        if self.kind.torus == 3:
            return all(size % 4 == 0 for size in self.shape)
        return self.shape[dim] == 16


def parse_topology(text: str, slices: int = 1) -> Topology:
    """The topology that `text` names.

    Raises:
        ValueError: no such device, or no such shape of it; the message says what would be right.
    """
    if slices < 1:
        raise ValueError(f"slices = {slices}: must be at least 1")
    if match := re.fullmatch(r"(\w[\w-]*?):(\d+(?:x\d+)*)", text):
        name, shape = match[1], tuple(map(int, match[2].split("x")))
        device = hardware.by_name(name)
    elif match := re.fullmatch(r"(\w[\w-]*?)-(\d+)", text.replace("v5litepod", "v5e")):
        device = hardware.by_name(match[1])
        if not device.torus:
            raise ValueError(f"topology {text!r}: say hosts and GPUs, such as {device.name}:{match[2]}")
        shape = _torus(device, text, int(match[2]))
    else:
        raise ValueError(f"topology {text!r}: write DEVICE:SHAPE, such as v5p:8x8x8, v5e-64 or h100:2x8")
    if min(shape) < 1:
        raise ValueError(f"topology {text!r}: every dim must be at least 1")
    if device.torus == 2 and (math.prod(shape) > SIDE**2 or (len(shape) == 2 and max(shape) > SIDE)):
        raise ValueError(
            f"topology {text!r}: a slice of {device.name} has {SIDE**2} chips at most, {SIDE} along a dim; "
            f"ask for several, such as --topology {device.name}:{SIDE}x{SIDE} --slices 2"
        )
    if device.torus and len(shape) != device.torus:
        near = _cubic(math.prod(shape), device.torus)
        known = device.torus == 3 or max(near) <= SIDE
        raise ValueError(
            f"topology {text!r}: {device.name} chips lie in {device.torus} dims, not {len(shape)}"
            + (f"; {math.prod(shape)} chips are {device.name}:{'x'.join(map(str, near))}" if known else "")
        )
    if not device.torus:
        shape = _hosts(device, text, shape)
    return Topology(device=device.name, shape=shape, slices=slices)


def _hosts(device: Device, text: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(hosts, GPUs of a host) of what was typed: both, or GPUs alone."""
    most, count = device.per_host, shape[-1]
    if len(shape) > 2:
        raise ValueError(f"topology {text!r}: write hosts × GPUs of a host, such as {device.name}:16x8")
    if len(shape) == 2:
        if count > most:
            raise ValueError(f"topology {text!r}: a host has {most} GPUs at most, not {count}")
        return shape
    if count <= most:
        return (1, count)
    if count % most:
        near = max(1, round(count / most)) * most
        raise ValueError(f"topology {text!r}: {count} is not a multiple of {most}, a host's GPUs; {near} is")
    return (count // most, most)


def _torus(device: Device, text: str, count: int) -> tuple[int, ...]:
    """The usual shape of a slice by its cloud name."""
    if count < 1:
        raise ValueError(
            f"topology {text!r}: must have a chip at least, such as {device.name}-{4 * device.named_cores}"
        )
    if count % device.named_cores:
        raise ValueError(
            f"topology {text!r}: a {device.name} chip counts as {device.named_cores} cores; {count + 1} works"
        )
    chips = count // device.named_cores
    if device.torus == 2 and chips > SIDE**2:
        return (chips, 1)  # which is refused as any other of that size
    return _cubic(chips, device.torus)


def _cubic(chips: int, dims: int) -> tuple[int, ...]:
    """The shape nearest to a cube (or square) of so many chips, shortest dim first; 3 dims of 4 chips are 2x2x1."""
    if dims == 3 and chips == 4:
        return (2, 2, 1)

    def shapes(left: int, dims: int) -> list[tuple[int, ...]]:
        if dims == 1:
            return [(left,)]
        return [
            (d, *rest)
            for d in range(1, left + 1)
            if left % d == 0
            for rest in shapes(left // d, dims - 1)
            if d <= rest[0]
        ]

    return min(shapes(chips, dims), key=lambda shape: (shape[-1] / shape[0], shape))
