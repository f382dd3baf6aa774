"""AdamW from optax, with moments stored in a dtype of choice."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.training.config import AdamW
from deepseek_jax.types import Array


def decayed(params: Any) -> Any:
    """True for every leaf that weight decay acts on: all but norm scales and biases."""

    def one(path: Any, _: Any) -> bool:
        name = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)][-1]
        return name != "scale" and not name.startswith("b_")

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(config: AdamW, learning_rate: Callable[[Any], Array]) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decoupled, masked decay.

    Args:
        config: its constants.
        learning_rate: rate of an update from the number of updates before it.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            adam if config.moment_dtype == "float32" else _stored_as(adam, jnp.dtype(config.moment_dtype)),
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.scale_by_learning_rate(learning_rate),
        ),
    )


def _stored_as(adam: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """Adam whose state keeps both moments in `dtype` between updates (V3, section 3.3.3)."""

    def cast(state: Any, dtypes: Any) -> Any:
        return state._replace(
            mu=jax.tree.map(lambda x, d: x.astype(d), state.mu, dtypes),
            nu=jax.tree.map(lambda x, d: x.astype(d), state.nu, dtypes),
        )

    def stored(state: Any) -> Any:
        return cast(state, jax.tree.map(lambda _: dtype, state.mu))

    def init(params: Any) -> Any:
        return stored(adam.init(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(grads, cast(state, jax.tree.map(lambda g: g.dtype, grads)), params)
        return updates, stored(state)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
