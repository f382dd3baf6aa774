"""Every parameter of a model, with its logical axes: from the model itself, so that no shape and no rule is written twice."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
from jax.sharding import AbstractMesh

from deepseek_jax.config import ModelConfig
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.parallel.rules import RULES, Names, Weight, partition_spec

WIDE = ("scale", "bias", "w_router")
"""Leaves that are used as they are stored: norms, and all of the router."""


@dataclass(frozen=True)
class Leaf:
    """A parameter."""

    path: str
    """Such as "moe_layers/ffn/experts/w_gate"."""
    shape: tuple[int, ...]
    names: Names
    """Logical axes of its dims."""
    layers: int
    """How many layers are stacked in it; 1 for what is in no stack."""

    @property
    def part(self) -> str:
        """embedding, head, attention, dense, experts, shared, router, mtp or norms."""
        words = self.path.split("/")
        if words[0] == "mtp":
            return "mtp"
        for word, part in _PARTS.items():
            if word in words:
                return part
        return "dense" if "ffn" in words else "norms"

    @property
    def stack(self) -> str | None:
        """The loop that it belongs to: dense_layers, moe_layers, mtp; None for embedding, last norm and head."""
        first = self.path.split("/")[0]
        return first if first in STACKS else None

    @property
    def routed(self) -> bool:
        """Whether it is of routed experts, those of multi-token modules too."""
        return "experts" in self.path.split("/")

    @property
    def wide(self) -> bool:
        return self.path.endswith(("/scale", "/bias")) or "/router/" in self.path


STACKS = ("dense_layers", "moe_layers", "mtp")
_PARTS = {
    "embed": "embedding", "head": "head", "attention": "attention", "experts": "experts", "shared": "shared",
    "router": "router",
}  # fmt: skip


@functools.lru_cache(maxsize=64)
def leaves(model: ModelConfig) -> tuple[Leaf, ...]:
    """All parameters of the model. Counted once a shape of model: what does not change shapes is not looked at."""
    # Neither dtypes nor recomputation change a shape, and one trace takes a second.
    plain = replace(model, remat="none", dtype="float32", param_dtype="float32", name="")
    return _leaves(plain)


@functools.lru_cache(maxsize=64)
def _leaves(model: ModelConfig) -> tuple[Leaf, ...]:
    params = abstract_variables(model)["params"]
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    found = []
    for path, leaf in flat:
        words = [entry.key for entry in path]
        layers = leaf.value.shape[0] if words[0] in STACKS else 1
        found.append(Leaf("/".join(words), tuple(leaf.value.shape), tuple(leaf.names), layers))
    return tuple(found)


def abstract_mesh(degrees: Mapping[str, int]) -> AbstractMesh:
    """A mesh of these degrees, without devices."""
    return AbstractMesh(tuple(degrees.values()), tuple(degrees))


def check_divides(model: ModelConfig, degrees: Mapping[str, int]) -> None:
    """Raise `ValueError` for the first parameter with a dim that its mesh axes do not divide; says what would divide it."""
    mesh = abstract_mesh(degrees)
    for leaf in leaves(model):
        try:
            partition_spec(mesh, leaf.names, leaf.shape, f"parameter {leaf.path}")
        except ValueError as error:
            raise ValueError(f"{error}{_remedy(model, leaf, degrees)}") from None


def _remedy(model: ModelConfig, leaf: Leaf, degrees: Mapping[str, int]) -> str:
    """The nearest product of the axes that divides all dims which they split, of no more devices than there are."""

    def axes(name: str) -> set[str]:
        return {axis for axis in RULES[name] if degrees[axis] > 1}

    devices = math.prod(degrees.values())
    for name, size in zip(leaf.names, leaf.shape, strict=True):
        product = math.prod(degrees[axis] for axis in RULES[name])
        if size % product:
            split = [one for other in leaves(model) for one in zip(other.names, other.shape, strict=True)]
            common = math.gcd(*(dim for other, dim in split if axes(other) == axes(name)))
            divisors = [n for n in range(1, min(common, devices) + 1) if common % n == 0]
            best = min(divisors, key=lambda n: abs(math.log(n / product)))
            whole = "" if devices % best == 0 else f", on a multiple of {best} devices: there are {devices}"
            return f"; the nearest that does is {best}{whole}"
    return ""


def stored(leaf: Leaf, degrees: Mapping[str, int]) -> int:
    """Numbers of a leaf that one device keeps."""
    return math.prod(leaf.shape) // math.prod(degrees[axis] for name in leaf.names for axis in RULES[name])


GATHERED = ("embed", "latent", "expert_embed")
"""Logical axes along which a weight is gathered before a layer uses it; along the others it stays in its shards."""


def used(leaf: Leaf, degrees: Mapping[str, int]) -> int:
    """Numbers of one layer of a leaf that one device holds while it uses them, gathered along `GATHERED`."""
    kept = math.prod(degrees[axis] for name in leaf.names if name not in GATHERED for axis in RULES[name])
    return math.prod(leaf.shape) // leaf.layers // kept


def gathered_axes(leaf: Leaf, degrees: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes over which a leaf is gathered."""
    return tuple(axis for name in leaf.names if name in GATHERED for axis in RULES[name] if degrees[axis] > 1)
