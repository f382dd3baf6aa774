"""Device meshes with axes named by words."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from deepseek_jax import platform


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Degrees of parallelism. Their product is the number of devices; one of them may be -1: whatever is left.

    Axes that talk most stand last, where a topology's neighbours are: `slice` crosses the data-centre network, `tensor`
    wants the fastest links.
    """

    slice: int = 1
    """Slices of a multi-slice machine, joined by the data-centre network: replicas that split the batch. With
    `ModelConfig.expert_across_slices` each holds experts of its own."""
    stage: int = 1
    """Stages of the pipeline; each runs a part of the layers. Weights are stored in shards over it too."""
    data: int = -1
    """Replicas that split the batch."""
    fsdp: int = 1
    """Shards of parameters and optimizer state; splits the batch too."""
    expert: int = 1
    """Shards of the experts; dense weights are sharded and the batch is split over it as well."""
    context: int = 1
    """Parts of a sequence; weights are sharded over it as well."""
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
        said = " × ".join(f"{name} {degree}" for name, degree in degrees.items() if degree != 1) or "of one device"
        if -1 in degrees.values():
            if devices % fixed == 0:
                return {name: devices // fixed if degree == -1 else degree for name, degree in degrees.items()}
            wrong = f"mesh {said}: {fixed} does not divide the {devices} devices"
        elif fixed == devices:
            return degrees
        else:
            wrong = f"mesh {said} = {fixed} devices, but there are {devices}"
        raise ValueError(f"{wrong}: {_remedy(degrees, devices)}")


def _remedy(degrees: dict[str, int], devices: int) -> str:
    """The nearest mesh that works: one degree changed, as little as possible."""
    given = {name: degree for name, degree in degrees.items() if degree not in (1, -1)}
    open_degree = next((name for name, degree in degrees.items() if degree == -1), None)
    choices = []
    for name, degree in given.items():
        others = math.prod(given.values()) // degree
        if devices % others == 0:
            left = devices // others
            fits = [part for part in range(1, left + 1) if left % part == 0] if open_degree else [left]
            best = min(fits, key=lambda part: abs(math.log(part / degree)))
            choices.append((abs(math.log(best / degree)), f"{name} {best}"))
    nearest = f"{min(choices)[1]} would work, " if choices else ""
    return f"{nearest}{'or ' if choices else ''}{'fewer degrees' if open_degree else 'one degree of -1 takes what is left'}"


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over `devices` (all of them by default) with every axis of `MeshConfig`, axis types Auto.

    On TPUs the axes are laid along the torus. Devices of several slices are grouped by slice along `slice`.

    Raises:
        ValueError: the degrees do not fit the devices, or `slice` does not fit the slices of TPUs that they lie in.
    """
    devices = jax.devices() if devices is None else list(devices)
    degrees = config.resolved(len(devices))
    # GPUs have a slice_index too, one a host: it binds nothing, and hosts come one after the other in `devices`.
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices}) if on_tpu else 1
    if slices > 1 and degrees["slice"] != slices:
        raise ValueError(f"MeshConfig.slice = {degrees['slice']}: the devices lie in {slices} slices, set it to that")
    if not on_tpu:
        grid = np.asarray(devices, dtype=object).reshape(tuple(degrees.values()))
    elif slices > 1:
        inside = {name: 1 if name == "slice" else degree for name, degree in degrees.items()}
        across = {name: degree if name == "slice" else 1 for name, degree in degrees.items()}
        grid = mesh_utils.create_hybrid_device_mesh(
            tuple(inside.values()), tuple(across.values()), devices, allow_split_physical_axes=True
        )
    else:
        # An expert axis often takes a part of a torus' axis alone.
        grid = mesh_utils.create_device_mesh(tuple(degrees.values()), devices, allow_split_physical_axes=True)
    # Auto, since linen modules and sharding constraints do not work under make_mesh's default, Explicit.
    return Mesh(grid, tuple(degrees), axis_types=(AxisType.Auto,) * len(degrees))


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What `jax.jit` must be told of programs with a ragged all-to-all on this mesh.

    libtpu 0.0.42 insists on a barrier of the exchange's own, which it does not find on many layouts of more than 512 chips
    ("Assigned barrier is not acceptable"); let be, it takes one of all chips there.
    """
    if mesh.devices.flat[0].platform != "tpu" or mesh.size <= 512 or mesh.shape["expert"] * mesh.shape["slice"] == 1:
        return None
    return {"xla_tpu_force_custom_barrier_for_ragged_all_to_all": "false"}


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[Any]:
    """Make `mesh` the ambient one, and trace kernels for its devices' platform. None: all stays as it is."""
    if mesh is None:
        yield mesh
        return
    with platform.compile_for(platform.of_backend(mesh.devices.flat[0].platform)), jax.set_mesh(mesh):
        yield mesh
