"""Meshes for machines that people rent, each with the reason for it.

Two facts stand behind all of them: an expert axis of n cuts the weights of experts that a layer gathers by n, at the price
of an all-to-all of tokens, so it wants to lie on one ring of the torus; and a latent of 512 numbers, MLA's, cannot be
sharded over more than 512 devices, so what is left goes to `data`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from deepseek_jax.parallel.mesh import MeshConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A machine, and a mesh that suits it."""

    topology: str
    """Of one slice, as the planner reads it."""
    mesh: MeshConfig
    why: str

    @property
    def slices(self) -> int:
        return self.mesh.slice


def _preset(topology: str, why: str, **degrees: int) -> Preset:
    return Preset(topology=topology, mesh=MeshConfig(**{"data": 1, **degrees}), why=why)


PRESETS: dict[str, Preset] = {
    "gpu-1": _preset("h100:1", "one device: nothing to split"),
    "gpu-8": _preset(
        "h100:8", "all devices meet in one switch, so experts are exchanged, never gathered; dense weights are sharded too",
        expert=8,
    ),
    "v5e-16": _preset("v5e:4x4", "experts along one side of the square, all weights over both", fsdp=4, expert=4),
    "v5e-64": _preset("v5e:8x8", "16 GB a chip: every weight in 64 parts, a layer's experts in 8", fsdp=8, expert=8),
    "v5e-256": _preset("v5e:16x16", "the full pod, whose two sides are closed rings: one for each axis", fsdp=16, expert=16),
    "v6e-64": _preset("v6e:8x8", "as v5e-64: the compute is four times as much, so keep several sequences a chip",
                      fsdp=8, expert=8),
    "v6e-256": _preset("v6e:16x16", "as v5e-256: two closed rings", fsdp=16, expert=16),
    "v5p-128": _preset("v5p:4x4x4", "64 chips: experts along one ring, weights gathered over the other two",
                       fsdp=16, expert=4),
    "v5p-512": _preset("v5p:4x8x8", "256 chips: experts along a ring of 8, weights gathered over 4 x 8",
                       fsdp=32, expert=8),
    "v5p-2048": _preset(
        "v5p:8x8x16", "1,024 chips: a latent of 512 takes 512 shards, so the model is there twice", data=2, fsdp=64, expert=8
    ),
    "2xv5p-512": _preset(
        "v5p:4x8x8", "two slices: gradients alone cross the data-centre network, once a step", slice=2, fsdp=32, expert=8
    ),
    "4xv5e-256": _preset("v5e:16x16", "four pods: as above", slice=4, fsdp=16, expert=16),
}  # fmt: skip
"""By the cloud's name of the machine: v5p counts cores (v5p-128 has 64 chips), v5e and v6e count chips."""


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none; the message names the closest ones.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
        raise ValueError(f"no preset is named {name!r}: {'did you mean ' + ' or '.join(close or list(PRESETS))}?")
    return PRESETS[name]


def mesh_preset(name: str) -> MeshConfig:
    """The mesh for a machine, for a run's configuration: `mesh=mesh_preset("v5p-128")`."""
    return preset(name).mesh
