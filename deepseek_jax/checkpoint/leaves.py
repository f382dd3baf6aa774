"""A pytree as a nested dict of plain arrays, whatever its classes are, and back.

A checkpoint that mirrors Python classes (optax states, dataclasses) breaks when a class is renamed, and can be read
only in part with their help. So what is stored is a dict of dicts keyed by attribute names, dict keys and indices, and
a record of each leaf's shape and dtype, against which a restore is checked: Orbax casts dtypes without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

# Leaf name such as "params/embed/embedding" -> [dtype name, shape], and for PRNG keys [.., .., implementation].
Record = dict[str, list[Any]]

_RAW_KEY = "key<"  # jax's own prefix of the dtype name of typed PRNG keys


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """(leaf name -> leaf in the tree's order, treedef). Names are the path's parts joined by "/".

    Raises: ValueError when two leaves have one name.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named = {"/".join(_part(entry) for entry in path): leaf for path, leaf in pairs}
    if len(named) != len(pairs):
        raise ValueError(f"a state of {len(pairs)} leaves has only {len(named)} different leaf names")
    return named, treedef


def record(named: Mapping[str, Any]) -> Record:
    """Dtype and shape of each leaf. A typed PRNG key's dtype is its kind, such as "key<fry>"; where the leaf is real,
    not abstract, its implementation's name follows, from which a restore makes the key.

    Raises: ValueError for a leaf that is no array, such as a Python number, which has no dtype of its own.
    """
    for name, leaf in named.items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(f"leaf {name!r} is {leaf!r} ({type(leaf).__name__}): make it an array, by jnp.asarray")
    entries: Record = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named.items()}
    for name, leaf in named.items():
        if _is_key(leaf) and isinstance(leaf, jax.Array):
            entries[name].append(str(jax.random.key_impl(leaf)))
    return entries


def require_equal(saved: Record, wanted: Record, *, where: str, partial: bool = False) -> None:
    """Raises ValueError that names every leaf that differs.

    Args:
        saved: what the checkpoint holds.
        wanted: what the program expects.
        where: names the checkpoint in the message.
        partial: whether the checkpoint may hold leaves that are not wanted.
    """
    differences = [f"{name}: expected, not in the checkpoint" for name in wanted if name not in saved]
    if not partial:
        differences += [f"{name}: in the checkpoint, not expected" for name in saved if name not in wanted]
    for name in wanted:
        if name in saved and saved[name][:2] != wanted[name][:2]:
            differences.append(f"{name}: the checkpoint has {_show(saved[name])}, expected {_show(wanted[name])}")
    if differences:
        raise ValueError(
            f"{where} does not match this configuration in {len(differences)} leaves:\n  "
            + "\n  ".join(differences)
            + "\nuse the configuration it was saved with, or another run folder"
        )


def to_stored(named: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict that Orbax gets: PRNG keys as their raw data, no leaf of size zero (Orbax stores none)."""
    return _nested((name, _raw(leaf)) for name, leaf in named.items() if _size(leaf))


def to_stored_template(named: Mapping[str, Any]) -> dict[str, Any]:
    """The same tree as `jax.ShapeDtypeStruct`s, each with a sharding: its own, or the default device's."""
    return _nested((name, _raw_template(leaf)) for name, leaf in named.items() if _size(leaf))


def from_stored(stored: Mapping[str, Any], named_templates: Mapping[str, Any], saved: Record) -> list[Any]:
    """The leaves in the order of the templates: keys made by the implementation on record, leaves of size zero anew."""
    leaves = []
    for name, template in named_templates.items():
        if not _size(template):
            leaves.append(jax.numpy.zeros(template.shape, template.dtype, device=_sharding(template)))
            continue
        leaf: Any = stored
        for part in name.split("/"):
            leaf = leaf[part]
        leaves.append(jax.random.wrap_key_data(leaf, impl=saved[name][2]) if _is_key(template) else leaf)
    return leaves


def _part(entry: Any) -> str:
    """One step of a path: the attribute's name, the dict's key, or the index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            part = str(getattr(entry, attribute))
            if "/" in part or not part:
                raise ValueError(f"state key {part!r}: a name must not be empty or hold '/'")
            return part
    raise ValueError(f"state path entry {entry!r} has no name")


def _nested(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, leaf in items:
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape))


def _is_key(leaf: Any) -> bool:
    return str(leaf.dtype).startswith(_RAW_KEY)


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _raw_template(leaf: Any) -> jax.ShapeDtypeStruct:
    if _is_key(leaf):
        raw = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=_sharding(leaf))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding


def _show(entry: list[Any]) -> str:
    dtype, shape = entry[:2]
    return f"{dtype}[{','.join(map(str, shape))}]"
