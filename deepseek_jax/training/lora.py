"""Low-rank adapters (Hu et al., 2021): W = base + alpha / rank · A · B, of which A and B alone are trained.

The state keeps the base, the adapters and the merged weights, so that whatever reads a run's `params` (evaluation,
generation, conversion, `init_from`) gets merged weights and knows nothing of adapters. What is saved is the optimizer's
moments: two numbers a weight stay in memory, in place of three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import require
from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.parallel.rules import Weight
from deepseek_jax.types import Array

# Name of a matrix -> how many of its last dims it reads from and writes to; the dims before are layers and experts.
_DIMS = {
    "w_q": (1, 2), "w_k": (1, 2), "w_v": (1, 2), "w_o": (2, 1),
    "w_dq": (1, 1), "w_uq": (1, 2), "w_dkv": (1, 1), "w_kr": (1, 1), "w_uk": (1, 2), "w_uv": (1, 2),
    "w_gate": (1, 1), "w_up": (1, 1), "w_down": (1, 1),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which matrices get adapters, and how large. Learning rates are some ten times those of the whole model."""

    rank: int = 16
    alpha: float = 32.0
    """The product of the adapters is multiplied by alpha / rank."""
    targets: tuple[str, ...] = tuple(_DIMS)
    """Names of matrices of attention and feed-forward layers; each expert has adapters of its own."""

    def __post_init__(self) -> None:
        require(self.rank > 0, "LoRA", "rank", self.rank, "must be greater than 0")
        require(self.alpha > 0, "LoRA", "alpha", self.alpha, "must be greater than 0")
        require(
            len(self.targets) > 0 and set(self.targets) <= set(_DIMS), "LoRA", "targets", self.targets,
            f"give some of {', '.join(_DIMS)}",
        )  # fmt: skip


def init_adapters(config: LoRA, params: Any, key: Array) -> Any:
    """Adapters of a tree of parameters, in float32 or wider: A normal with variance 1 / (numbers read), B zero, so that
    merging changes nothing yet.

    Args:
        config: which.
        params: boxed as `DeepSeek.init_boxed` gives them, or plain; so are the adapters.
        key: of the draw.
    Returns: the tree with each target's leaf as {"a": [..., in, rank], "b": [..., rank, out]}, and no other leaf.
    Raises: ValueError where the model has none of the targets.
    """
    found = _adapted(config, params, key)
    require(bool(found), "LoRA", "targets", config.targets, "the model has none of these matrices")
    return found


def _adapted(config: LoRA, params: Any, key: Array) -> dict[str, Any]:
    found = {}
    for i, (name, leaf) in enumerate(sorted(params.items())):
        its_key = jax.random.fold_in(key, i)
        if isinstance(leaf, dict):
            if inside := _adapted(config, leaf, its_key):
                found[name] = inside
        elif name in config.targets:
            value = leaf.value if isinstance(leaf, Weight) else leaf
            first, last = _split(name, value.ndim)
            dtype, read = at_least_float32(value.dtype), math.prod(value.shape[first:last])
            a = jax.random.normal(its_key, (*value.shape[:last], config.rank), dtype) / math.sqrt(read)
            b = jnp.zeros((*value.shape[:first], config.rank, *value.shape[last:]), dtype)
            if isinstance(leaf, Weight):
                a = Weight(a, (*leaf.names[:last], "none"))
                b = Weight(b, (*leaf.names[:first], "none", *leaf.names[last:]))
            found[name] = {"a": a, "b": b}
    return found


def merged(config: LoRA, base: Any, adapters: Any) -> Any:
    """The base with alpha / rank · A · B added to each matrix that has adapters, in the base's dtypes."""
    result = {}
    for name, leaf in base.items():
        if name not in adapters:
            result[name] = leaf
        elif isinstance(leaf, dict):
            result[name] = merged(config, leaf, adapters[name])
        else:
            first, last = _split(name, leaf.ndim)
            letters = "abcdefgh"[: leaf.ndim]
            sums = f"{letters[:last]}r,{letters[:first]}r{letters[last:]}->{letters}"
            product = jnp.einsum(sums, adapters[name]["a"], adapters[name]["b"], precision="highest")
            result[name] = (leaf.astype(product.dtype) + config.alpha / config.rank * product).astype(leaf.dtype)
    return result


def _split(name: str, ndim: int) -> tuple[int, int]:
    """Dims of a matrix from the first that it reads from, and from the first that it writes to."""
    reads, writes = _DIMS[name]
    return ndim - reads - writes, ndim - writes
