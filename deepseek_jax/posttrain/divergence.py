"""How far a student's distribution is from its teachers', with the logits of few places at once.

All divergences are over the whole vocabulary, in nats, and differentiated exactly through the student's probabilities at
given contexts. Where the contexts were sampled by the student, that is the gradient of V4 (its report, section 5:
L = Σ_i w_i KL(π_student ‖ π_teacher_i), full vocabulary): the part that would change which contexts are sampled (the
score-function part) is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.parallel.rules import shard
from deepseek_jax.training.loss import in_chunks
from deepseek_jax.types import Array


@dataclass(frozen=True)
class Divergence:
    """What is minimised at a place, Σ over teachers i, τ the temperature of both softmaxes:

    (1 − mix) · τ² · Σ_i weights[i] · KL_i + mix · (−log p(token)), the last at temperature 1.

    KL_i is KL(teacher ‖ student) forward and KL(student ‖ teacher) reverse. With `top_k` (forward alone) it is that of
    k + 1 events: each of the teacher's k likeliest tokens, and "another token". It is at most the whole KL, equal to it
    at k = vocabulary, and says nothing of how the student divides its probability among the other tokens. τ² keeps the
    size of the gradient (Hinton, Vinyals, Dean, arXiv 1503.02531, section 2).
    """

    weights: tuple[float, ...]
    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    mix: float = 0.0
    top_k: int | None = None


@struct.dataclass
class Live:
    """A teacher whose logits are made when they are needed."""

    hidden: Array
    """[B, T, D]: state before its head; D need not be the student's."""
    w: Array
    """[D, W]: its head."""


@struct.dataclass
class TopK:
    """What is known of a teacher's distributions by their likeliest tokens."""

    ids: Array
    """Int32 [..., k]: the likeliest first."""
    logprobs: Array
    """Float32 [..., k]: of the whole vocabulary's distribution."""
    rest: Array
    """Float32 [...]: log of the probability of all other tokens; −∞ where there are none."""


def kl(p_logits: Array, q_logits: Array) -> Array:
    """KL(p ‖ q) of distributions over the last dim: [..., W] twice -> [...]."""
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def top_k_of(logits: Array, k: int) -> TopK:
    """The k likeliest tokens of distributions [..., W]."""
    logp = jax.nn.log_softmax(logits)
    values, ids = lax.top_k(logp, k)
    return TopK(ids=ids.astype(jnp.int32), logprobs=values, rest=_outside(logp, ids))


def kl_from_top_k(teacher: TopK, logits: Array) -> Array:
    """KL(teacher ‖ student) over the teacher's k tokens and "another one": student's logits [..., W] -> [...].

    Σ_{v in the k} q_v (log q_v − log p_v) + q_rest (log q_rest − log p_rest), p_rest = Σ of the student's other p_v.
    """
    logp = jax.nn.log_softmax(logits)
    inside = jnp.take_along_axis(logp, teacher.ids, axis=-1)
    total = (jnp.exp(teacher.logprobs) * (teacher.logprobs - inside)).sum(axis=-1)
    if teacher.ids.shape[-1] == logits.shape[-1]:
        return total
    # From the logits of the others: 1 − Σ p would lose a small rest to rounding.
    return total + jnp.exp(teacher.rest) * (teacher.rest - _outside(logp, teacher.ids))


def _outside(logp: Array, ids: Array) -> Array:
    """Log of the probability of all tokens but `ids`; −∞ where there are none."""
    if ids.shape[-1] == logp.shape[-1]:
        return jnp.full(logp.shape[:-1], -jnp.inf, logp.dtype)
    chosen = jnp.put_along_axis(jnp.zeros(logp.shape, bool), ids, jnp.array(True), axis=-1, inplace=False)
    return jax.nn.logsumexp(logp, axis=-1, where=~chosen)


Known = Live | TopK


def divergence_sums(
    kind: Divergence, hidden_BTD: Array, w_DW: Array, teachers: tuple[Known, ...], targets_BT: Array, weights_BT: Array,
    chunk: int,
) -> tuple[Array, dict[str, Array]]:  # fmt: skip
    """Σ over places of weight · loss, and the same sums of what it is made of.

    The logits of at most `chunk` places of a sequence exist at once; where a gradient is asked for, a chunk's is worked
    out while they do.

    Args:
        kind: the loss of a place.
        hidden_BTD: the student's state before its head.
        w_DW: its head; cast to the dtype of `hidden_BTD` for the products.
        teachers: as many as `kind.weights`. No gradient flows to them.
        targets_BT: the tokens that follow.
        weights_BT: float; 0 leaves a place out.
        chunk: places of a sequence a piece.

    Returns: the sum, float32 or wider, and by name: `kl` (Σ_i weights[i] KL_i), `kl_i` and `agreement_i` (both likeliest
        tokens are one) of each teacher i, the student's `entropy` and the tokens' `cross_entropy` at temperature 1.
        These have no gradient.
    """
    places = tuple(t.hidden if isinstance(t, Live) else t for t in teachers)
    heads = tuple(t.w if isinstance(t, Live) else None for t in teachers)
    of_places = jax.tree.map(partial(in_chunks, chunk=chunk), (hidden_BTD, places, targets_BT, weights_BT))
    return _sums(kind, of_places[0], w_DW, heads, of_places[1:])


def _logits(hidden: Array, w: Array) -> Array:
    wide = at_least_float32(hidden.dtype)
    logits = jnp.einsum("bcd,dw->bcw", hidden, w.astype(hidden.dtype), preferred_element_type=wide)
    return shard(logits, "batch", "length", "act_vocab")


def _piece(kind: Divergence, logits: Array, heads: Any, rest: Any) -> tuple[Array, dict[str, Array]]:
    """Loss of one chunk from the student's logits, and the parts."""
    places, targets, weights = rest
    at_tau, likeliest = logits / kind.temperature, logits.argmax(axis=-1)
    figures, total = {}, jnp.zeros(targets.shape, logits.dtype)
    for i, (weight, known, head) in enumerate(zip(kind.weights, places, heads, strict=True)):
        if not isinstance(known, TopK):
            theirs = lax.stop_gradient(_logits(known, head)) / kind.temperature
            best = theirs.argmax(axis=-1)
            if kind.top_k is None:
                pair = (theirs, at_tau) if kind.direction == "forward" else (at_tau, theirs)
                far = kl(*pair)
            else:
                far = kl_from_top_k(top_k_of(theirs, kind.top_k), at_tau)
        else:
            far, best = kl_from_top_k(known, at_tau), known.ids[..., 0]
        total += weight * far
        figures |= {f"kl_{i}": far, f"agreement_{i}": best == likeliest}
    logp = jax.nn.log_softmax(logits)
    # A comparison, not a gather: it stays local where the vocabulary is sharded.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    cross_entropy = -jnp.where(is_target, logp, 0).sum(axis=-1)
    figures |= {"kl": total, "entropy": -(jnp.exp(logp) * logp).sum(axis=-1), "cross_entropy": cross_entropy}
    loss = (1 - kind.mix) * kind.temperature**2 * total
    loss = loss + kind.mix * cross_entropy if kind.mix else loss
    # In padding a number may be anything, NaN included.
    summed = {name: jnp.where(weights > 0, x, 0) * weights for name, x in {"loss": loss, **figures}.items()}
    summed = {name: x.sum() for name, x in summed.items()}
    return summed.pop("loss"), lax.stop_gradient(summed)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(kind: Divergence, hidden: Array, w: Array, heads: Any, rest: Any) -> tuple[Array, dict[str, Array]]:
    def one(piece: Any) -> tuple[Array, dict[str, Array]]:
        return _piece(kind, _logits(piece[0], w), heads, piece[1])

    return jax.tree.map(lambda x: x.sum(), lax.map(one, (hidden, rest)))


def _sums_fwd(kind: Divergence, hidden: Array, w: Array, heads: Any, rest: Any) -> Any:
    wide = at_least_float32(hidden.dtype)

    def one(dw: Array, piece: Any) -> tuple[Array, Any]:
        h, its = piece
        of_logits = jax.value_and_grad(partial(_piece, kind), has_aux=True)
        sums, d_logits = of_logits(_logits(h, w), heads, its)
        d_logits = d_logits.astype(h.dtype)
        dh = jnp.einsum("bcw,dw->bcd", d_logits, w.astype(h.dtype), preferred_element_type=wide)
        dw += jnp.einsum("bcd,bcw->dw", h, d_logits, preferred_element_type=wide)
        return dw, (sums, dh.astype(h.dtype))

    dw, (sums, dh) = lax.scan(one, jnp.zeros(w.shape, wide), (hidden, rest))
    return jax.tree.map(lambda x: x.sum(), sums), (dh, dw.astype(w.dtype))


def _sums_bwd(kind: Divergence, residuals: tuple[Array, Array], d: Any) -> Any:
    dh, dw = residuals
    return (dh * d[0]).astype(dh.dtype), (dw * d[0]).astype(dw.dtype), None, None


_sums.defvjp(_sums_fwd, _sums_bwd)
