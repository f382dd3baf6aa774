"""What the parity tests share: golden cases, random variables under which every part matters, relative distance."""

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hf_weights import hf_to_model_config, hf_to_variables
from safetensors.numpy import load_file

import deepseek_jax as dsj

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "config.json").exists())


@dataclass(frozen=True)
class Golden:
    """A checkpoint and what transformers computes with it."""

    config: dsj.ModelConfig
    variables: dict[str, Any]
    tokens: np.ndarray
    logits: np.ndarray
    mtp_logits: np.ndarray


def load_golden(case: str, dtype: str = "float32") -> Golden:
    folder = GOLDEN / case
    config = hf_to_model_config(json.loads((folder / "config.json").read_text()), dtype)
    expected = load_file(folder / "expected.safetensors")
    tokens = expected["tokens"]
    none = np.zeros((0, *tokens.shape, config.vocab_size), np.float32)
    return Golden(
        config=config,
        variables=hf_to_variables(load_file(folder / "model.safetensors"), config),
        tokens=tokens,
        logits=expected["logits"],
        mtp_logits=expected.get("mtp_logits", none),
    )


@cache
def abstract_variables(config: dsj.ModelConfig) -> Any:
    """Shapes of `DeepSeek(config).init`, in float32 whatever the configuration says."""
    config = dataclasses.replace(config, dtype="float32", param_dtype="float32")
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return jax.eval_shape(dsj.DeepSeek(config).init, jax.random.key(0), tokens)


def random_variables(config: dsj.ModelConfig, seed: int) -> dict[str, Any]:
    """Variables in float64 numpy: norms off 1, gate biases off 0, projections of about unit gain."""
    draw = np.random.default_rng(seed)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [entry.key for entry in path]
        if names[-1] == "scale":
            return draw.uniform(0.5, 1.5, shape.shape)
        if names[0] == "router":
            return draw.uniform(-0.3, 0.3, shape.shape)
        return draw.normal(0.0, 0.25 if names[-2:] == ["router", "w"] else 0.16, shape.shape)

    return jax.tree_util.tree_map_with_path(leaf, abstract_variables(config))


def relative(ours: Any, truth: np.ndarray) -> float:
    """Largest difference over largest value."""
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    assert ours.shape == truth.shape, f"{ours.shape} and {truth.shape}"
    return float(np.abs(ours - truth).max() / np.abs(truth).max()) if truth.size else 0.0


def with_target(mtp_logits: Any, depth: int) -> np.ndarray:
    """Multi-token logits of depth k without the last k positions, which have no input token."""
    return np.asarray(mtp_logits)[depth - 1, :, : np.shape(mtp_logits)[2] - depth]
