"""Device meshes with axes named by words."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from deepseek_jax import platform


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Degrees of parallelism. Their product is the number of devices; one of them may be -1: whatever is left."""

    data: int = -1
    """Replicas that split the batch."""
    fsdp: int = 1
    """Shards of parameters and optimizer state; splits the batch too."""
    expert: int = 1
    """Shards of the experts; dense weights are sharded and the batch is split over it as well."""
    tensor: int = 1
    """Shards of heads, feed-forward width and vocabulary."""

    def __post_init__(self) -> None:
        degrees = asdict(self)
        for name, degree in degrees.items():
            if degree != -1 and degree < 1:
                raise ValueError(f"MeshConfig.{name} = {degree}: must be at least 1, or -1 for all devices left")
        if sum(degree == -1 for degree in degrees.values()) > 1:
            raise ValueError(f"MeshConfig {degrees}: only one degree may be -1")

    def resolved(self, devices: int) -> dict[str, int]:
        """Axis name -> degree, with -1 resolved for this many devices.

        Raises:
            ValueError: the product of the degrees is not the number of devices.
        """
        degrees = asdict(self)
        fixed = math.prod(degree for degree in degrees.values() if degree != -1)
        said = " × ".join(f"{name} {degree}" for name, degree in degrees.items())
        if -1 in degrees.values():
            if devices % fixed:
                raise ValueError(f"mesh {said}: {fixed} does not divide the {devices} devices")
            return {name: devices // fixed if degree == -1 else degree for name, degree in degrees.items()}
        if fixed != devices:
            raise ValueError(
                f"mesh {said} = {fixed} devices, but there are {devices}: change a degree or set one to -1"
            )
        return degrees


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over `devices` (all of them by default) with every axis of `MeshConfig`, axis types Auto."""
    devices = jax.devices() if devices is None else list(devices)
    degrees = config.resolved(len(devices))
    # Auto, since linen modules and sharding constraints do not work under make_mesh's default, Explicit.
    return jax.make_mesh(
        tuple(degrees.values()), tuple(degrees), devices=devices, axis_types=(AxisType.Auto,) * len(degrees)
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Make `mesh` the ambient one, and trace kernels for its devices' platform."""
    with platform.compile_for(platform.of_backend(mesh.devices.flat[0].platform)), jax.set_mesh(mesh):
        yield mesh
