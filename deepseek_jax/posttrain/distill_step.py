"""One update of a student from its teachers' probabilities, and the same figures without one."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh

from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import named_sharding
from deepseek_jax.posttrain.divergence import Divergence, Known, Live, TopK, divergence_sums, top_k_of
from deepseek_jax.posttrain.policy import PolicyState, abstract_policy, variables_of
from deepseek_jax.posttrain.update import applied, summed
from deepseek_jax.training.config import AdamW
from deepseek_jax.training.loss import from_chunks, in_chunks
from deepseek_jax.types import Array


@struct.dataclass
class Batch:
    """Rows of tokens."""

    tokens: Array
    """Int32 [B, T + 1]."""
    mask: Array
    """Bool [B, T]: place i counts, where token i + 1 is predicted; never from ids."""
    segment_ids: Array | None = None
    """Int32 [B, T]: what a row holds side by side, from 1, padding 0; None: one text a row, padding behind it."""
    known: tuple[TopK, ...] | None = None
    """Of each teacher, [B, T, …], as it was stored; None: the teachers are asked."""


def _hidden(model: DeepSeek, variables: Any, batch: Batch) -> Array:
    return model.apply(variables, batch.tokens[:, :-1], None, batch.segment_ids, method="hidden").hidden


def _asked(teachers: tuple[DeepSeek, ...], variables: tuple[Any, ...], batch: Batch) -> tuple[Known, ...]:
    """What the teachers say of a batch; their logits are not made yet."""
    if batch.known is not None:
        return batch.known
    return tuple(
        Live(_hidden(model, its, batch), model.apply(its, method="head_kernel"))
        for model, its in zip(teachers, variables, strict=True)
    )


@lru_cache(maxsize=16)
def make_distill_update(
    model: DeepSeek, teachers: tuple[DeepSeek, ...], kind: Divergence, optimizer: AdamW, mesh: Mesh, *, chunk: int = 512,
    pieces: int = 1,
) -> Any:  # fmt: skip
    """The jitted function `(state, teachers' variables, batch, learning rate) -> (state, metrics)`.

    The loss is the mean over the counted places. The state's memory is reused, and where loss or gradient are not finite
    it stays as it is (`applied` is False). Selection biases stay as they are.

    Args:
        model: the student.
        teachers: those that are asked; () where the batches bring what is known of them.
        kind: the loss of a place.
        optimizer: its constants.
        mesh: where the state is.
        chunk: places of a sequence whose logits exist at once.
        pieces: in how many a batch is worked off, one after the other; the update does not depend on it.
    """
    shapes = abstract_policy(model.config, optimizer, mesh, reference=False)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def update(
        state: PolicyState, variables: tuple[Any, ...], batch: Batch, learning_rate: Array
    ) -> tuple[PolicyState, dict[str, Any]]:
        count = jnp.maximum(batch.mask.sum(), 1)

        def piece(part: Batch) -> tuple[Any, dict[str, Array]]:
            known = _asked(teachers, variables, part)

            def objective(params: Any) -> tuple[Array, dict[str, Array]]:
                its = variables_of(params, state.router)
                hidden, w_DW = _hidden(model, its, part), model.apply(its, method="head_kernel")
                weights = part.mask / count.astype(at_least_float32(hidden.dtype))
                return divergence_sums(kind, hidden, w_DW, known, part.tokens[:, 1:], weights, chunk)

            (loss, figures), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
            return grads, {"loss": loss, **figures}

        grads, metrics = summed(piece, batch, pieces)
        return applied(optimizer, state, state.params, grads, metrics, learning_rate, lambda params: {"params": params})

    return update


@lru_cache(maxsize=16)
def make_measure(
    model: DeepSeek, teachers: tuple[DeepSeek, ...], kind: Divergence, mesh: Mesh, *, chunk: int = 512
) -> Any:
    """The jitted function `(student's variables, teachers' variables, batch) -> sums over the counted places`: of the loss
    and of all that `divergence_sums` names. Arguments as of `make_distill_update`."""

    @partial(jax.jit, out_shardings=named_sharding(mesh, (), ()))
    def measure(its: Any, variables: tuple[Any, ...], batch: Batch) -> dict[str, Array]:
        hidden, w_DW = _hidden(model, its, batch), model.apply(its, method="head_kernel")
        known = _asked(teachers, variables, batch)
        weights = batch.mask.astype(at_least_float32(hidden.dtype))
        loss, figures = divergence_sums(kind, hidden, w_DW, known, batch.tokens[:, 1:], weights, chunk)
        return {"loss": loss, **figures}

    return measure


@lru_cache(maxsize=16)
def make_top_k(teacher: DeepSeek, k: int, temperature: float, mesh: Mesh, *, chunk: int = 512) -> Any:
    """The jitted function `(teacher's variables, batch) -> TopK` of every place, counted or not: [B, T, …].

    Args:
        teacher: the model.
        k: tokens of a place.
        temperature: of the softmax.
        mesh: where its variables are; the result is whole on every device.
        chunk: places of a sequence whose logits exist at once.
    """

    @partial(jax.jit, out_shardings=named_sharding(mesh, (), ()))
    def top_k(variables: Any, batch: Batch) -> TopK:
        hidden, w_DW = _hidden(teacher, variables, batch), teacher.apply(variables, method="head_kernel")

        def one(h: Array) -> TopK:
            wide = at_least_float32(h.dtype)
            logits = jnp.einsum("bcd,dw->bcw", h, w_DW.astype(h.dtype), preferred_element_type=wide)
            return top_k_of(logits / temperature, k)

        found = lax.map(one, in_chunks(hidden, chunk))
        return jax.tree.map(partial(from_chunks, places=hidden.shape[1]), found)

    return top_k
