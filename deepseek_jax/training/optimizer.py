"""AdamW from optax, with moments stored in a dtype and a memory of choice."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.training.config import AdamW
from deepseek_jax.types import Array


def decayed(params: Any) -> Any:
    """True for every leaf that weight decay acts on: all but norm scales and biases."""

    def one(path: Any, _: Any) -> bool:
        name = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)][-1]
        return name != "scale" and not name.startswith("b_")

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(
    config: AdamW, learning_rate: Callable[[Any], Array], *, on_host: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then AdamW with decoupled, masked decay. Gradients are to come in float32 or wider.

    Args:
        config: its constants.
        learning_rate: rate of an update from the number of updates before it.
        on_host: moments come in the host's memory, and go back there. `update` then takes `ok`, bool [], too: where it is
            False, they stay as they were; counts are the caller's.
    """
    adam = _stored_as(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps), config.moment_dtype)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            _from_host(adam) if on_host else adam,
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.scale_by_learning_rate(learning_rate),
        ),
    )


def _stored_as(adam: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Adam that computes in float32 or wider, and keeps both moments in `dtype` between updates (V3, section 3.3.3).

    "float32" is float64 for parameters of that. Gradients come in float32 or wider.
    """

    def cast(state: Any, to: Callable[[Array], Any]) -> Any:
        def all_of(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.astype(to(x)), tree)

        return state._replace(mu=all_of(state.mu), nu=all_of(state.nu))

    def stored(state: Any) -> Any:
        return cast(state, lambda x: at_least_float32(x.dtype) if dtype == "float32" else jnp.dtype(dtype))

    def init(params: Any) -> Any:
        return stored(adam.init(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = jax.tree.leaves(grads)[0].dtype
        updates, state = adam.update(grads, cast(state, lambda x: wide), params)
        return updates, stored(state)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


_STACKS = {"dense_layers", "moe_layers", "mtp"}
"""Parts of the parameters whose leaves hold a layer in each row."""


def _from_host(adam: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`adam` with moments that wait in the host's memory, and come for one layer at a time.

    Fetched as a whole, the compiler would bring them before the backward pass, and save nothing.
    """

    update_of: Any = adam.update

    def update(grads: Any, state: Any, params: Any = None, *, ok: Array, **_: Any) -> tuple[Any, Any]:
        def step(part: tuple[Any, Any, Any]) -> tuple[Any, tuple[Any, Any]]:
            grads, *old = part
            mu, nu = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), old)
            updates, new = update_of(grads, state._replace(mu=mu, nu=nu))
            kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), (new.mu, new.nu), (mu, nu))
            return updates, jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), kept)

        def stack(part: tuple[Any, Any, Any]) -> tuple[Any, tuple[Any, Any]]:
            # Written where it was read: updates over the gradients, moments over the old ones.
            def layer(i: Array, part: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
                updates, moments = step(jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), part))
                return jax.tree.map(
                    lambda x, new: lax.dynamic_update_index_in_dim(x, new, i, 0), part, (updates, *moments)
                )

            updates, *moments = lax.fori_loop(0, len(jax.tree.leaves(part)[0]), layer, part)
            return updates, tuple(moments)

        done = {
            name: (stack if name in _STACKS else step)((part, state.mu[name], state.nu[name]))
            for name, part in grads.items()
        }
        mu, nu = ({name: moments[i] for name, (_, moments) in done.items()} for i in range(2))
        new = state._replace(count=optax.safe_increment(state.count), mu=mu, nu=nu)
        return {name: updates for name, (updates, _) in done.items()}, new

    return optax.GradientTransformationExtraArgs(adam.init, update)  # type: ignore[arg-type]
