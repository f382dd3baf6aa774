"""Small models with weights at which everything matters, and comparisons."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax as dsj
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.tokenizer import byte_tokenizer
from deepseek_jax.training import MultiStep, RunConfig
from deepseek_jax.training.loss import loss_parts, make_totals
from deepseek_jax.training.state import abstract_state


def micro(kind: str, **fields: Any) -> ModelConfig:
    """`deepseek-<kind>-micro` with fields replaced."""
    return replace(dsj.get_config(f"deepseek-{kind}-micro"), **fields)


def random_variables(config: ModelConfig, seed: int = 0, scale: float = 0.15) -> Any:
    """Variables with every leaf random: norms away from 1, biases away from 0, logits that differ."""
    shapes = jax.eval_shape(dsj.DeepSeek(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    draw = np.random.default_rng(seed)  # numpy: jax would compile a program for every shape

    def one(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        noise = draw.standard_normal(leaf.shape)
        value = 1 + 0.3 * noise if name == "scale" else (0.1 if name == "bias" else scale) * noise
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def save_model_of_bytes(folder: Path, **fields: Any) -> None:
    """A random model with bytes for tokens, as a published checkpoint with its tokenizer; `fields` of its configuration."""
    config = micro("llm-gqa", bos_token_id=0, eos_token_id=1, **fields)
    dsj.save_hf(folder, dsj.DeepSeek(config), random_variables(config, scale=0.05))
    byte_tokenizer().save(folder / "tokenizer.json")


def random_tokens(config: ModelConfig, shape: tuple[int, int], seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


def one_device_flags() -> str:
    """XLA_FLAGS of these tests, for a process with one device."""
    return re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ["XLA_FLAGS"]).strip()


def run_config(model: ModelConfig, **fields: Any) -> RunConfig:
    """A short run of `model`; its data is never read by the step tests."""
    defaults: dict[str, Any] = dict(
        schedule=MultiStep(peak=1e-2, warmup_steps=2), steps=20, batch_size=8, seq_len=16, loss_chunk=8,
        data=DataConfig(tokenizer="unused"),
    )  # fmt: skip
    return RunConfig(model=model, **(defaults | fields))


def loss_and_gradients(run: RunConfig, variables: Any, batch: Any) -> Any:
    """((objective, its parts with the routers' statistics), the gradient by every parameter)."""

    def objective(params: Any) -> Any:
        totals = make_totals(batch, run.model.num_nextn_predict_layers, jnp.float32)
        return loss_parts(run, params, variables.get("router", {}), batch, totals, 0.3)

    return jax.value_and_grad(objective, has_aux=True)(variables["params"])


def variables_on(mesh: Any, run: RunConfig, variables: Any) -> Any:
    """Variables in their shards."""
    state = abstract_state(run, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, {"params": state.params, "router": state.router})
    return {k: jax.device_put(x, shardings[k]) for k, x in variables.items()}


def assert_trees_close(actual: Any, expected: Any, rtol: float, atol: float = 0.0) -> None:
    """Every leaf within `rtol` of its own largest value."""
    flat_actual, tree_actual = jax.tree_util.tree_flatten_with_path(actual)
    flat_expected, tree_expected = jax.tree_util.tree_flatten_with_path(expected)
    assert tree_actual == tree_expected
    for (path, a), (_, e) in zip(flat_actual, flat_expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        bound = atol + rtol * max(np.abs(e).max(initial=0), 1e-30)
        difference = np.abs(a - e).max(initial=0)
        assert difference <= bound, f"{jax.tree_util.keystr(path)}: {difference:.3g} > {bound:.3g}"
