"""Meshes, the one table from logical to mesh axes, and the helpers that apply it."""

from deepseek_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
from deepseek_jax.parallel.pipeline import Pipeline
from deepseek_jax.parallel.rules import Weight, named_sharding, per_shard, shard, tree_shardings, unbox

__all__ = [
    "MeshConfig",
    "Pipeline",
    "Weight",
    "make_mesh",
    "named_sharding",
    "per_shard",
    "shard",
    "tree_shardings",
    "unbox",
    "use_mesh",
]
