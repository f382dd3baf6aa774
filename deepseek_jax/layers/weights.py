"""How every parameter is declared: one line gives name, shape, logical axes, initial value and storage dtype."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from deepseek_jax.parallel.rules import Names, Weight
from deepseek_jax.types import Array


def weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: Names,
    *,
    dtype: str,
    stddev: float | None = None,
    constant: float | None = None,
) -> Array:
    """Declare parameter `name` of `module`: normal with `stddev` (all papers: 0.006), or `constant`.

    The box that carries the logical axes exists only in the tree that linen's `init` builds.
    """
    if (stddev is None) == (constant is None):
        raise ValueError(f"parameter {name}: give either stddev or constant")
    create = initializers.normal(stddev) if stddev is not None else initializers.constant(constant or 0.0)

    def boxed(key: Array) -> Any:  # linen takes the box off, so what `param` returns is the array
        return Weight(create(key, shape, jnp.dtype(dtype)), axes)

    return module.param(name, boxed)


def for_product(w: Array, dtype: Any, wide_sums: bool) -> Array:
    """A stored weight for `layers.linear`: in the compute dtype, or in float32 or wider, whose gradient is then summed so."""
    return w.astype(at_least_float32(w.dtype) if wide_sums else dtype)


def at_least_float32(*dtypes: str | jnp.dtype) -> jnp.dtype:
    """The dtype for norms, router, softmax and losses: float32, or float64 where the model runs in it."""
    return jnp.result_type(jnp.float32, *(jnp.dtype(dtype) for dtype in dtypes))
