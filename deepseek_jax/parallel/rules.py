"""The one table from logical axes to mesh axes. Nowhere else is a mesh axis named.

A parameter carries its logical axes in a `Weight` box from where it is declared; an activation is constrained by
`shard(x, names)`. An unknown name, one mesh axis on two dims, and a dim that its axes do not divide are errors: linen's
own rules replicate or drop in silence.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
from flax import struct
from flax.core import meta
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    # dims of parameters
    "layers": (),
    "norm": (),
    "head_dim": (),
    "latent_out": (),  # a latent that a down-projection writes
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert", "context", "stage"),
    "latent": ("fsdp", "expert", "context", "stage"),  # a latent that an up-projection reads
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "expert": ("expert",),
    "expert_of_slice": ("slice", "expert"),  # instead, where slices hold experts of their own
    "expert_embed": ("fsdp", "context", "stage"),
    "router": (),
    # dims of activations
    "stages": ("stage",),  # of the pipeline; the other dims of such an array do without this axis
    "batch": ("slice", "stage", "data", "fsdp", "expert"),
    "length": ("context",),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_ffn": ("tensor",),
    "act_vocab": ("tensor",),
    "none": (),
}

Names = tuple[str, ...]


@struct.dataclass
class Weight(meta.AxisMetadata[Any]):
    """A parameter and the logical axes of its dims; `DeepSeek.init` takes the box off, `tree_shardings` reads it."""

    value: Any
    names: Names = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Weight":
        return replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Weight":
        names = list(self.names)
        names.insert(index, params[meta.PARTITION_NAME])
        return replace(self, names=tuple(names))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Weight":
        names = list(self.names)
        del names[index]
        return replace(self, names=tuple(names))


def unbox(tree: Any) -> Any:
    """Tree with every `Weight` replaced by its array (or abstract array)."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, Weight) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )


def partition_spec(mesh: Mesh | AbstractMesh, names: Names, shape: Sequence[int], what: str) -> PartitionSpec:
    """PartitionSpec of an array of `shape` whose dims have these logical axes.

    Raises:
        ValueError: unknown name, wrong number of names, a mesh axis used twice, or a dim that its axes do not divide.
    """
    if len(names) != len(shape):
        raise ValueError(f"{what}: {len(names)} logical axes {names} for {len(shape)} dims {tuple(shape)}")
    dims = _axes(mesh, names, what)
    for name, size, axes in zip(names, shape, dims, strict=True):
        degree = math.prod(mesh.shape[axis] for axis in axes)
        if size % degree:
            raise ValueError(
                f"{what}: dim {name!r} of {size} is not divisible by {' × '.join(axes)} = {degree}; "
                f"choose degrees that divide it"
            )
    return _spec(dims)


def _spec(dims: Iterable[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(axes or None for axes in dims))


def _axes(mesh: Mesh | AbstractMesh, names: Names, what: str) -> list[tuple[str, ...]]:
    """The mesh axes that split each dim.

    Raises:
        ValueError: unknown name, or a mesh axis used twice.
    """
    used: dict[str, str] = {}
    dims = []
    left = _free_axes(mesh)
    for name in names:
        if name not in RULES:
            raise ValueError(f"{what}: unknown logical axis {name!r}; known are {sorted(RULES)}")
        taken = () if name == "stages" or "stages" not in names else RULES["stages"]
        axes = tuple(axis for axis in RULES[name] if axis in left and axis not in taken)
        for axis in axes:
            if axis in used:
                raise ValueError(f"{what}: mesh axis {axis!r} shards both {used[axis]!r} and {name!r} of {names}")
            used[axis] = name
        dims.append(axes)
    return dims


def _free_axes(mesh: Mesh | AbstractMesh) -> set[str]:
    """Axes of more than one device over which arrays can still be split: inside a shard_map, not those it maps over."""
    return {axis for axis, size in mesh.shape.items() if size > 1} - set(getattr(mesh, "manual_axes", ()))


def named_sharding(mesh: Mesh, names: Names, shape: Sequence[int], what: str = "array") -> NamedSharding:
    """NamedSharding by the table; see `partition_spec` for errors."""
    return NamedSharding(mesh, partition_spec(mesh, names, shape, what))


def tree_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Shardings of a tree with `Weight` leaves (abstract or not); a bare leaf is replicated."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, Weight):
            return NamedSharding(mesh, PartitionSpec())
        return named_sharding(mesh, leaf.names, leaf.value.shape, f"parameter {jax.tree_util.keystr(path)}")

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda leaf: isinstance(leaf, Weight))


def sharded_shapes(mesh: Mesh, boxed: Any) -> Any:
    """`ShapeDtypeStruct`s, with their shardings, of a tree with `Weight` leaves (abstract or not)."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unbox(boxed),
        tree_shardings(mesh, boxed),
    )


def shard(x: jax.Array, *names: str) -> jax.Array:
    """Constrain `x` to the ambient mesh by its logical axes; without a mesh, `x` itself."""
    if not on_mesh():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, names, x.shape, "activation"))


def degree(name: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """In how many parts `mesh`, or the ambient one, splits a dim with this logical axis; 1 without a mesh.

    Of the ambient mesh, axes that a shard_map has split already count no more.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[axis] for axis in set(RULES[name]) & _free_axes(mesh))


def on_mesh() -> bool:
    """Whether there is an ambient mesh with an axis that arrays can still be split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and bool(_free_axes(mesh))


def axes_of(name: str) -> tuple[str, ...]:
    """Axes of the ambient mesh that split a dim with this logical axis; not those of degree 1 or mapped over already."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else tuple(axis for axis in RULES[name] if axis in _free_axes(mesh))


def sharded_map(function: Callable[..., Any], in_names: Sequence[Names], out_names: Any) -> Callable[..., Any]:
    """`function` of local arrays, run by every device on its shards (shard_map); it may talk to others. Without a mesh,
    `function` itself.

    It is mapped over all axes of the ambient mesh that a shard_map around it (the pipeline's) has not mapped yet.

    Args:
        function: see above.
        in_names: logical axes of each argument's dims.
        out_names: of the result, or a tuple of those of its parts; dims of the result are trusted to divide.
    """
    if not on_mesh():
        return function
    mesh = jax.sharding.get_abstract_mesh()
    several = bool(out_names) and isinstance(out_names[0], tuple)
    parts = out_names if several else (out_names,)
    out_specs = tuple(_spec(_axes(mesh, names, "sharded_map result")) for names in parts)

    def run(*arrays: jax.Array) -> Any:
        given = zip(in_names, arrays, strict=True)
        specs = tuple(partition_spec(mesh, names, x.shape, "sharded_map argument") for names, x in given)
        mapped = jax.shard_map(
            function, in_specs=specs, out_specs=out_specs if several else out_specs[0],
            axis_names=set(mesh.axis_names) - set(mesh.manual_axes), check_vma=False,
        )  # fmt: skip
        return mapped(*arrays)

    return run


def per_shard(
    function: Callable[..., jax.Array], in_names: Sequence[Names | None], out_names: Names
) -> Callable[..., jax.Array]:
    """`function` run on each shard's local arrays; without a mesh, `function` itself.

    For kernels that the compiler cannot partition. An argument whose names are None must be None. The function must
    not need other shards: no named dim may be contracted.
    """

    def run(*arrays: jax.Array | None) -> jax.Array:
        given = [(array, names) for array, names in zip(arrays, in_names, strict=True) if array is not None and names]

        def local(*parts: jax.Array) -> jax.Array:
            left = iter(parts)
            return function(*(None if array is None else next(left) for array in arrays))

        return sharded_map(local, [names for _, names in given], out_names)(*(array for array, _ in given))

    return run
