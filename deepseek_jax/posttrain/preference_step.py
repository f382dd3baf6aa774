"""The state of learning from preferences, and one update of it, whatever the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from deepseek_jax.config import ModelConfig
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.parallel.rules import named_sharding, sharded_shapes
from deepseek_jax.posttrain.preference_batches import Batch
from deepseek_jax.posttrain.update import applied, summed
from deepseek_jax.training.config import AdamW
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.types import Array


@struct.dataclass
class PreferenceState:
    """What training carries from update to update."""

    step: Array
    """Int32: updates applied."""
    params: Any
    """Of the model: the policy, or a reward model's backbone."""
    router: Any
    """Selection biases, which stay as they are; `{}` where the model has none."""
    head: Any
    """A reward model's; `{}` of a policy."""
    opt_state: Any
    reference: Any
    """Parameters that DPO measures from; `{}` of a reward model."""


Gradient = Callable[[PreferenceState, Batch, int], tuple[Any, dict[str, Array]]]
"""From state, (a piece of) a batch and the batch's examples to the gradient of `trained(state)` and metrics; those of pieces
add up."""
Scores = Callable[[PreferenceState, Batch], dict[str, Array]]
"""What an evaluation needs of each example."""


def trained(state: PreferenceState) -> dict[str, Any]:
    """What the optimizer sees."""
    return {"params": state.params, "head": state.head}


def init_preference(
    optimizer: AdamW, variables: Any, *, reference: bool, head: Callable[[], Any] | None = None
) -> PreferenceState:
    """The state of training that begins with these variables, which it takes a copy of; the reference is a copy too."""

    def copied(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)

    params, made = copied(variables["params"]), {} if head is None else head()
    return PreferenceState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        router=copied(variables.get("router", {})),
        head=made,
        opt_state=make_optimizer(optimizer, lambda step: jnp.zeros(())).init({"params": params, "head": made}),
        reference=copied(params) if reference else {},
    )


def abstract_preference(
    model: ModelConfig, optimizer: AdamW, mesh: Mesh, *, reference: bool, head: Callable[[], Any] | None = None
) -> PreferenceState:
    """`init_preference`'s state as `ShapeDtypeStruct`s with their shardings on a mesh."""
    make = partial(init_preference, optimizer, reference=reference, head=head)
    return sharded_shapes(mesh, jax.eval_shape(make, abstract_variables(model)))


def shardings_of(shapes: PreferenceState) -> Any:
    """The shardings of a state, in a form that can be hashed."""
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, shapes))
    return tree, tuple(leaves)


@lru_cache(maxsize=16)
def make_scores(scores: Scores, mesh: Mesh) -> Any:
    """The same function jitted; what it gives is whole on every device."""
    return jax.jit(scores, out_shardings=named_sharding(mesh, (), ()))


@lru_cache(maxsize=16)
def make_preference_update(gradient: Gradient, optimizer: AdamW, *, pieces: int = 1, shardings: Any = None) -> Any:
    """The jitted function `(state, batch, learning rate) -> (state, metrics)`. The state's memory is reused, and where loss
    or gradient are not finite it stays as it is (`applied` is False).

    Args:
        gradient: of the loss.
        optimizer: its constants.
        pieces: in how many the batch is worked off, one after the other; the update does not depend on it.
        shardings: those that the state keeps, from `shardings_of`; None: there is one device.
    """
    kept = None if shardings is None else (jax.tree.unflatten(*shardings), None)

    @partial(jax.jit, donate_argnums=0, out_shardings=kept)
    def update(state: PreferenceState, batch: Batch, rate: Array) -> tuple[PreferenceState, dict[str, Any]]:
        examples = batch.labels.shape[0]
        grads, metrics = summed(lambda part: gradient(state, part, examples), batch, pieces)
        return applied(optimizer, state, trained(state), grads, metrics, rate, lambda after: after)

    return update
