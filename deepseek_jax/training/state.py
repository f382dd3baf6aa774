"""What a run carries from step to step, made on any mesh with the same values and the same tree."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import degree, sharded_shapes, unbox
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.guard import Guard, init_guard
from deepseek_jax.training.lora import init_adapters
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.types import Array


@struct.dataclass
class TrainState:
    """Everything a step reads and writes."""

    step: Array
    """Int32: updates applied."""
    params: Any
    router: Any
    """Selection biases; `{}` where the model has none."""
    opt_state: Any
    ema: Any
    """Running mean of the parameters; `{}` where the run keeps none."""
    guard: Guard
    lora: Any = struct.field(default_factory=dict)
    """"base": the frozen weights, "adapters": what is trained; `params` are then the two merged. `{}` where `params`
    themselves are trained."""

    @property
    def trained(self) -> Any:
        """What the optimizer updates."""
        return self.lora["adapters"] if self.lora else self.params


def new_state(config: RunConfig, params: Any, router: Any) -> TrainState:
    """The state of a run that begins with these weights and selection biases (`{}` where the model has none)."""
    lora = {}
    if config.lora is not None:
        key = jax.random.fold_in(jax.random.key(config.seed), 0x10FA)  # not that of the weights themselves
        base = jax.tree.map(lambda param: jnp.array(param, copy=True), params)
        lora = {"base": base, "adapters": init_adapters(config.lora, params, key)}
    trained = lora.get("adapters", params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        router=router,
        opt_state=make_optimizer(config.optimizer, lambda step: jnp.zeros(())).init(trained),
        ema={} if config.ema_decay is None else jax.tree.map(_wide_copy, params),
        guard=init_guard(config.spike_skip, at_least_float32(config.model.dtype)),
        lora=lora,
    )


def _wide_copy(param: Array) -> Array:
    """In float32 or wider: in bfloat16, 1 + 0.001 · anything is 1. A copy, since no buffer can be given away twice."""
    return jnp.array(param, at_least_float32(param.dtype), copy=True)


def _boxed_state(config: RunConfig, key: Array) -> TrainState:
    # Only the shape matters, which the mesh must divide; the compiler drops the forward pass itself.
    tokens = jnp.zeros((config.piece_size, 2 * degree("length")), jnp.int32)
    variables = DeepSeek(config.model).init_boxed(key, tokens)
    return new_state(config, variables["params"], variables.get("router", {}))


def abstract_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """The state as `ShapeDtypeStruct`s, with shardings where a mesh is given. Makes no array."""
    boxed = jax.eval_shape(lambda: _boxed_state(config, jax.random.key(config.seed)))
    if mesh is None:
        return unbox(boxed)
    state = sharded_shapes(mesh, boxed)
    return replace(state, opt_state=jax.tree.map(_on_host, state.opt_state)) if config.moments_on == "host" else state


def _on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A moment's shape in the host's memory; the count of updates stays."""
    if not leaf.ndim or leaf.sharding is None:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind("pinned_host"))


def init_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """A fresh state from `config.seed`; on a mesh each leaf is made in its shards."""
    key = jax.random.key(config.seed)

    def create(key: Array) -> TrainState:
        return unbox(_boxed_state(config, key))

    if mesh is None:
        return jax.jit(create)(key)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(create, out_shardings=shardings)(key)
