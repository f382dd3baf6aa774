"""The programs that a plan compiles, lowered on shapes with shardings: no array of the model is ever made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax import platform
from deepseek_jax.config import ModelConfig
from deepseek_jax.infer import programs
from deepseek_jax.infer.sampling import Sampling, settings
from deepseek_jax.models.cached import model_cache_shapes, unstack
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.mesh import use_mesh
from deepseek_jax.parallel.rules import Names, named_sharding, unbox
from deepseek_jax.planner.request import PlanRequest
from deepseek_jax.posttrain.objective import PolicyLoss
from deepseek_jax.posttrain.policy import Rollouts, abstract_policy, make_update
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import BATCH_AXES, compile_train_step


def lower(request: PlanRequest, mesh: Mesh) -> tuple[Any, dict[str, str]]:
    """The step of a request lowered for a mesh, whose devices may be absent, and names of the shapes of its state."""
    make = {"train": _train, "grpo": _grpo, "prefill": _prefill, "decode": _decode}[request.step]
    # Shapes are made outside of the mesh: eager operations under one of absent devices fail.
    with platform.compile_for(platform.of_backend(mesh.devices.flat[0].platform)):
        function, arguments = make(request, mesh)
    with use_mesh(mesh):
        lowered = function.lower(*arguments)
    return lowered, _names(arguments)


def _names(arguments: Any) -> dict[str, str]:
    """HLO type of a device's shard -> the first two leaves of the arguments with that type."""
    found: dict[str, list[str]] = {}
    words = {"float32": "f32", "bfloat16": "bf16", "float64": "f64", "int32": "s32", "bool": "pred"}
    for path, leaf in jax.tree_util.tree_flatten_with_path(arguments)[0]:
        if getattr(leaf, "sharding", None) is None or not leaf.ndim:
            continue
        shape = ",".join(map(str, leaf.sharding.shard_shape(leaf.shape)))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.setdefault(f"{words.get(leaf.dtype.name, leaf.dtype.name)}[{shape}]", []).append(name)
    return {shape: " or ".join(names[:2]) for shape, names in found.items()}


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *names: str) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, names, shape))


def _replicated(mesh: Mesh, tree: Any) -> Any:
    where = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def _train(request: PlanRequest, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    run = request.run
    batch = {"tokens": _array(mesh, (run.batch_size, run.seq_len + 1), jnp.int32, *BATCH_AXES)}
    return compile_train_step(run, mesh), (abstract_state(run, mesh), batch)


def _grpo(request: PlanRequest, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    run, loss = request.run, PolicyLoss()
    model = replace(run.model, num_nextn_predict_layers=0)
    B, T = run.batch_size, run.seq_len
    rollouts = Rollouts(
        tokens=_array(mesh, (B, T + 1), jnp.int32, *BATCH_AXES),
        mask=_array(mesh, (B, T), jnp.bool_, *BATCH_AXES),
        advantages=_array(mesh, (B, 1), jnp.float32, *BATCH_AXES),
        sampler_logprobs=_array(mesh, (B, T), jnp.float32, *BATCH_AXES),
    )
    state = abstract_policy(model, run.optimizer, mesh, reference=loss.kl > 0)
    rate = _replicated(mesh, jax.ShapeDtypeStruct((), jnp.float32))
    module: Any = DeepSeek(model)  # hashable, which its type does not say
    update = make_update(module, loss, run.optimizer, chunk=run.loss_chunk, pieces=run.accumulation)
    return update, (state, rollouts, rate)


def _served(request: PlanRequest) -> ModelConfig:
    """The model as it is served: weights in the compute dtype, nothing recomputed."""
    return replace(request.model, param_dtype=request.model.dtype, remat="none", num_nextn_predict_layers=0)


def _weights(model: ModelConfig, mesh: Mesh) -> Any:
    """`LayerWeights` on shapes, sharded by the rules."""
    boxed = abstract_variables(model)
    shapes = jax.eval_shape(lambda variables: unstack(DeepSeek(model), variables, looped=True), unbox(boxed))
    stacks = ["dense_layers"] * bool(model.num_dense_layers) + ["moe_layers"] * bool(model.num_moe_layers)
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def one(path: Any, leaf: Any) -> Any:
        field, *keys = path
        if field.name == "ends":
            names: Names = _at(boxed, keys)
        else:  # layers[i][collection]…
            collection, *rest = keys[1:]
            names = _at(boxed[collection.key][stacks[keys[0].idx]], rest)
        return _array(mesh, leaf.shape, leaf.dtype, *names)

    return tree.unflatten([one(path, leaf) for path, leaf in flat])


def _at(tree: Any, keys: list[Any]) -> Names:
    for key in keys:
        tree = tree[key.key]
    return tree.names


def _decode(request: PlanRequest, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    model, B = _served(request), request.run.batch_size
    cache = tuple(
        {key: _array(mesh, shape, model.dtype, *names) for key, (shape, names) in one.items()}
        for one in model_cache_shapes(model, B, request.run.seq_len, looped=True)
    )
    row = _array(mesh, (B,), jnp.int32, "batch")
    seen = _array(mesh, (B, model.vocab_size), jnp.bool_, "batch", "none")
    given = jax.tree.map(
        lambda leaf: _array(mesh, (B, *leaf.shape[1:]), leaf.dtype, "batch", *["none"] * (leaf.ndim - 1)),
        jax.eval_shape(lambda: jax.tree.map(jnp.asarray, _settings(model))),
    )
    state = programs.Slots(cache=cache, token=row, place=row, step=row, seen=seen, given=given, draft=None)
    resting = _array(mesh, (B,), jnp.bool_, "batch")
    function = _with_static(programs.decode, DeepSeek(model), 1, "whole", False)
    return function, (_weights(model, mesh), state, resting)


def _settings(model: ModelConfig) -> Any:
    return settings([Sampling(temperature=1.0)], np.ones((1, model.vocab_size), bool))


def _prefill(request: PlanRequest, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    model, B, T = _served(request), request.run.batch_size, request.run.seq_len
    ids = _array(mesh, (B, T), jnp.int32, *BATCH_AXES)
    last = _array(mesh, (B,), jnp.int32, "batch")
    function = _with_static(programs.prefill, DeepSeek(model), T, False)
    return function, (_weights(model, mesh), ids, ids, None, ids, last)


class _with_static:
    """A jitted function with its static arguments given; lowers on the others."""

    def __init__(self, function: Any, *static: Any) -> None:
        self.function, self.static = function, static

    def lower(self, *arguments: Any) -> Any:
        return self.function.lower(*self.static, *arguments)
