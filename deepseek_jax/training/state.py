"""What a run carries from step to step, made on any mesh with the same values and the same tree."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import tree_shardings, unbox
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.types import Array


@struct.dataclass
class TrainState:
    """Everything a step reads and writes."""

    step: Array
    """Int32: optimizer steps done."""
    params: Any
    router: Any
    """Selection biases; `{}` where the model has none."""
    opt_state: Any


def _boxed_state(config: RunConfig, key: Array) -> TrainState:
    # Only the number of sequences matters, which the mesh must divide; the compiler drops the forward pass itself.
    tokens = jnp.zeros((config.batch_size // config.accumulation, 2), jnp.int32)
    variables = DeepSeek(config.model).init_boxed(key, tokens)
    params = variables["params"]
    opt_state = make_optimizer(config.optimizer, config.schedule, config.steps).init(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, router=variables.get("router", {}), opt_state=opt_state
    )


def abstract_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """The state as `ShapeDtypeStruct`s, with shardings where a mesh is given. Makes no array."""
    boxed = jax.eval_shape(lambda key: _boxed_state(config, key), jax.random.key(config.seed))
    plain = unbox(boxed)
    if mesh is None:
        return plain
    shardings = tree_shardings(mesh, boxed)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), plain, shardings)


def init_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """A fresh state from `config.seed`; on a mesh each leaf is made in its shards."""
    key = jax.random.key(config.seed)

    def create(key: Array) -> TrainState:
        return unbox(_boxed_state(config, key))

    if mesh is None:
        return jax.jit(create)(key)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(create, out_shardings=shardings)(key)
