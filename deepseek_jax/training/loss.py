"""The training objective: next-token loss, multi-token loss, balance losses.

Every term is a sum over the counted tokens (or sequences) of the *global* batch over their number, which is computed
from the whole batch first: accumulation, packing and sharding cannot change it.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from deepseek_jax.layers.context import valid_after_shift
from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.models.one_f_one_b import pipelined_objective
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.exchange import gather_weight, scattered_sum
from deepseek_jax.parallel.pipeline import stages_of_mesh
from deepseek_jax.parallel.ring import zigzag
from deepseek_jax.parallel.rules import axes_of, degree, sharded_map
from deepseek_jax.types import Array, HiddenOutput, RouterStats


def cross_entropy_sum(
    hidden_BTD: Array, w_DW: Array, targets_BT: Array, weights_BT: Array, chunk: int, kept: Array | None = None
) -> Array:
    """Σ weight · −log softmax(hidden · w)[target], with the logits of at most `chunk` positions at once.

    Where a gradient is asked for, each chunk's is computed while its logits exist, so that they are made once. On a mesh
    every device has its own sequences, places and tokens of the vocabulary; it gathers the weight once, and the weight's
    gradient is added up once.

    Args:
        hidden_BTD: state before the head.
        w_DW: the head's weight; cast to the dtype of `hidden_BTD` for the products.
        targets_BT: token ids.
        weights_BT: float; 0 leaves a position out. No gradient flows to it.
        chunk: positions of a sequence per piece.
        kept: uint8 [B, T, ⌈W / 8⌉]: the tokens that each softmax is over, as `kept_logits` reads them; None: all.

    Returns:
        Scalar, float32 or wider.
    """
    axes, chunk = HeadAxes(axes_of("embed"), axes_of("vocab")), max(chunk // degree("length"), 1)
    everyone = (*axes_of("batch"), *axes_of("length"))

    def local(hidden: Array, w: Array, targets: Array, weights: Array, *kept: Array) -> Array:
        chunks = [in_chunks(x, chunk) for x in (hidden, targets, weights, *kept)]
        total: Any = _chunks_sum(axes, chunks[0], w, chunks[1], chunks[2], chunks[3] if kept else None)
        return lax.psum(total, everyone) if everyone else total

    arguments = (hidden_BTD, w_DW, targets_BT, weights_BT, *(() if kept is None else (kept,)))
    tokens = ("batch", "length")
    in_names = ((*tokens, "none"), ("embed", "vocab"), tokens, tokens, *(() if kept is None else ((*tokens, "none"),)))
    return sharded_map(local, in_names, ())(*arguments)


class HeadAxes(NamedTuple):
    """Mesh axes over which the head's weight is stored in parts."""

    width: tuple[str, ...]
    vocab: tuple[str, ...]


def in_chunks(x: Array, chunk: int) -> Array:
    """[B, T, …] in pieces of about `chunk` places: [n, B, c, …], the last one filled up with zeros.

    Where the mesh splits sequences, each piece has as many places of every part, so that none is gathered.
    """
    B, T = x.shape[:2]
    parts = degree("length")
    part = T // parts
    chunk = min(max(chunk // parts, 1), part)
    x = x.reshape(B, parts, part, *x.shape[2:])
    if pad := -part % chunk:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 3))
    x = jnp.moveaxis(x.reshape(B, parts, -1, chunk, *x.shape[3:]), 2, 0)
    return x.reshape(-1, B, parts * chunk, *x.shape[4:])


def from_chunks(x: Array, places: int) -> Array:
    """The inverse of `in_chunks`, for `places` = T."""
    parts = degree("length")
    n, B = x.shape[:2]
    x = jnp.moveaxis(x.reshape(n, B, parts, -1, *x.shape[3:]), 0, 2)
    return x.reshape(B, parts, -1, *x.shape[4:])[:, :, : places // parts].reshape(B, places, *x.shape[4:])


def kept_logits(logits: Array, kept: Array | None) -> Array:
    """Logits [..., W], −inf where a token's bit is 0 in `kept` [..., ⌈W / 8⌉]; bit i of byte j is for token 8 j + i.

    Where no bit is set, in padding, all tokens stay.
    """
    if kept is None:
        return logits
    bits = jnp.unpackbits(kept, axis=-1, count=logits.shape[-1], bitorder="little")
    return jnp.where((bits == 1) | ~kept.any(axis=-1, keepdims=True), logits, -jnp.inf)


_SUMS = 8
"""Runs of the vocabulary in which devices add up their gradients of the head: at once, the compiler has them whole twice."""

Piece = tuple[Array, Array, Array, Array | None]
"""Hidden states, targets, weights and kept tokens of a chunk."""


def _piece(axes: HeadAxes, w: Array, piece: Piece) -> tuple[Array, Array, Array]:
    """Loss of one chunk, its probabilities [B, c, W] and where its targets are; W are this device's tokens."""
    hidden, targets, weights, kept = piece
    wide = at_least_float32(hidden.dtype)
    logits = jnp.einsum("bcd,dw->bcw", hidden, w, preferred_element_type=wide)
    first = lax.axis_index(axes.vocab) * w.shape[1] if axes.vocab else 0
    if axes.vocab and kept is not None:
        size = w.shape[1] * lax.axis_size(axes.vocab)
        mask = kept_logits(jnp.zeros((*logits.shape[:-1], size), wide), kept)
        logits += lax.dynamic_slice_in_dim(mask, first, w.shape[1], axis=-1)
    else:
        logits = kept_logits(logits, kept)

    def over_vocab(reduce: Any, x: Array) -> Array:
        return reduce(x, axes.vocab) if axes.vocab else x

    highest = over_vocab(lax.pmax, logits.max(axis=-1, keepdims=True))
    exponentials = jnp.exp(logits - highest)
    total = over_vocab(lax.psum, exponentials.sum(axis=-1, keepdims=True))
    # A comparison, not a gather: it stays local where the vocabulary is sharded.
    is_target = targets[..., None] == jnp.arange(w.shape[1]) + first
    target_logit = over_vocab(lax.psum, jnp.where(is_target, logits, 0).sum(axis=-1))
    losses = jnp.log(total[..., 0]) + highest[..., 0] - target_logit
    return (losses * weights).sum(), exponentials / total, is_target


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks_sum(
    axes: HeadAxes, hidden: Array, w: Array, targets: Array, weights: Array, kept: Array | None
) -> Array:  # fmt: skip
    whole = gather_weight(w, axes.width, 0, hidden.dtype.name)

    def step(total: Array, piece: Piece) -> tuple[Array, None]:
        return total + _piece(axes, whole, piece)[0], None

    start = jnp.zeros((), at_least_float32(hidden.dtype))
    return lax.scan(step, start, (hidden, targets, weights, kept))[0]


def _chunks_fwd(
    axes: HeadAxes, hidden: Array, w: Array, targets: Array, weights: Array, kept: Array | None
):  # fmt: skip
    wide = at_least_float32(hidden.dtype)
    whole = gather_weight(w, axes.width, 0, hidden.dtype.name)
    (D, W), parts = whole.shape, _SUMS if axes.width and whole.shape[1] % _SUMS == 0 else 1

    def step(carry: tuple[Array, Array], piece: Piece):
        total, dw_PDw = carry
        loss, probabilities, is_target = _piece(axes, whole, piece)
        d_logits = ((probabilities - is_target) * piece[2][..., None]).astype(hidden.dtype)
        dh = jnp.einsum("bcw,dw->bcd", d_logits, whole, preferred_element_type=wide)
        d_logits = d_logits.reshape(*d_logits.shape[:-1], parts, W // parts)
        dw_PDw += jnp.einsum("bcd,bcpw->pdw", piece[0], d_logits, preferred_element_type=wide)
        return (total + loss, dw_PDw), dh.astype(hidden.dtype)

    start = (jnp.zeros((), wide), jnp.zeros((parts, D, W // parts), wide))
    (total, dw_PDw), dh = lax.scan(step, start, (hidden, targets, weights, kept))
    dw_PDw = lax.map(lambda part: scattered_sum(part, axes.width, 0), dw_PDw)
    dw = dw_PDw.swapaxes(0, 1).reshape(-1, W)
    # Together, or the compiler keeps the whole dw until the optimizer asks for its part.
    dh, dw = lax.optimization_barrier((dh, dw))
    return total, (dh, dw.astype(w.dtype))


def _chunks_bwd(axes: HeadAxes, residuals: tuple[Array, Array], d: Array):
    dh, dw = residuals
    # Every device's total depends on this device's tokens of the vocabulary; dh is their part of it, and the parts are
    # added up where the shards of `hidden` meet again.
    d = lax.psum(d, axes.vocab) if axes.vocab else d
    return (dh * d).astype(dh.dtype), (dw * d).astype(dw.dtype), None, None, None


_chunks_sum.defvjp(_chunks_fwd, _chunks_bwd)


class Targets(NamedTuple):
    """What each position must predict, for depth 0 (the main model) to the depth of multi-token prediction."""

    tokens: Array
    """Int32 [1 + depth, B, T]; `[k, :, i]` is token i + k + 1."""
    counted: Array
    """Bool [1 + depth, B, T]: that token exists, lies in the same document, and is not masked out."""


def make_targets(batch: Mapping[str, Any], depth: int) -> Targets:
    """Targets of a batch `{"tokens": [B, T + 1], optional "segment_ids": [B, T + 1], optional "loss_mask": [B, T + 1]}`.

    `loss_mask` says of each token whether it is to be learned; segment 0 is padding.
    """
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    present = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
    learned = batch.get("loss_mask")
    targets, counted = [], []
    for k in range(1, depth + 2):
        # Depth k reads token i + k - 1 and predicts token i + k: both must belong to the document of token i.
        ok = valid_after_shift(present, segment_ids, k) & valid_after_shift(present, segment_ids, k - 1)
        if learned is not None:
            ok &= jnp.roll(learned.astype(bool), -k, axis=1)
        targets.append(jnp.roll(tokens, -k, axis=1)[:, :-1])
        counted.append(ok[:, :-1])
    return Targets(jnp.stack(targets), jnp.stack(counted))


@struct.dataclass
class Totals:
    """How many tokens and sequences the whole batch counts; the denominators of every mean."""

    tokens: Array
    """Float [1 + depth]."""
    sequences: dict[str, Array]
    """Float [] for `moe_layers`, [depth] for `mtp`: sequences with a counted token in the router's eyes."""


def make_totals(batch: dict[str, Array], depth: int, dtype: Any) -> Totals:
    """Totals of the whole batch of an optimizer step; at least 1 each, so that an empty batch has loss 0."""
    counted = make_targets(batch, depth).counted
    tokens, segment_ids = batch["tokens"][:, :-1], batch.get("segment_ids")
    segment_ids = None if segment_ids is None else segment_ids[:, :-1]
    present = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0

    def sequences(shift: int) -> Array:
        return jnp.maximum(valid_after_shift(present, segment_ids, shift).any(axis=1).sum(), 1).astype(dtype)

    return Totals(
        tokens=jnp.maximum(counted.sum(axis=(1, 2)), 1).astype(dtype),
        sequences={
            "moe_layers": sequences(0),
            "mtp": jnp.stack([sequences(k) for k in range(1, depth + 1)]) if depth else jnp.zeros(0, dtype),
        },
    )


@struct.dataclass
class Losses:
    """The parts of the objective, each already divided by its total: parts of a batch add up."""

    main: Array
    mtp: Array
    """[depth], not weighted by λ."""
    balance: Array
    router: dict[str, RouterStats]


def loss_parts(
    config: Any,
    params: Any,
    router: Any,
    batch: dict[str, Array],
    totals: Totals,
    mtp_loss_weight: Array | float,
    *,
    train: bool = True,
) -> tuple[Array, Losses]:
    """Objective of (a piece of) a batch: main + λ/depth · Σ multi-token (V3 eq. 24–25) + balance losses.

    Args:
        config: the `RunConfig`.
        params: of the model.
        router: selection biases; `{}` where the model has none.
        batch: see `make_targets`.
        totals: of the whole batch of the step, of which `batch` may be a piece.
        mtp_loss_weight: λ.
        train: drop tokens beyond capacity where the member does so.
    """
    model, pipeline = DeepSeek(config.model), config.pipeline
    depth = config.model.num_nextn_predict_layers
    variables = {"params": params, **({"router": router} if router else {})}
    segment_ids = batch.get("segment_ids")
    arguments: dict[str, Any] = dict(
        tokens=batch["tokens"][:, :-1], segment_ids=None if segment_ids is None else segment_ids[:, :-1], train=train
    )
    w_DW = model.apply(variables, method="head_kernel")
    targets = jax.tree.map(lambda x: zigzag(x, "none", "batch", "length"), make_targets(batch, depth))

    def objective(out: HiddenOutput, w_DW: Array, targets: Targets, shared: tuple[Totals, Array | float]) -> Any:
        return _objective(config, out, w_DW, targets, *shared)

    if pipeline is None or pipeline.schedule == "gpipe" or stages_of_mesh() == 1:
        out = model.apply(variables, **arguments, zigzag_out=True, pipeline=pipeline, method="hidden")
        total, losses = objective(out, w_DW, targets, (totals, mtp_loss_weight))
        return total, replace(losses, router=out.router)
    entry = model.apply(variables, **arguments, method="enter")
    shared = jax.tree.map(jnp.asarray, (totals, mtp_loss_weight))
    total, losses, stats = pipelined_objective(
        config.model, pipeline, objective, variables, w_DW, entry, targets, shared, totals.sequences["moe_layers"]
    )
    if "moe_layers" in stats:  # those of the tail are in already
        losses = replace(losses, balance=losses.balance + _balance(stats["moe_layers"], totals.sequences["moe_layers"]))
    return total, replace(losses, router=stats)


def _balance(stats: RouterStats, sequences: Array) -> Array:
    """Balance losses of some layers as means over `sequences`, a number for all layers or one for each."""
    losses = [(loss_LB.sum(axis=1) / sequences).sum() for loss_LB in stats.balance_loss.values()]
    return sum(losses, jnp.zeros((), sequences.dtype))


def _objective(
    config: Any, out: HiddenOutput, w_DW: Array, targets: Targets, totals: Totals, mtp_loss_weight: Array | float
) -> tuple[Array, Losses]:
    """Objective of the states of some sequences and of the routers that `out` has; without statistics."""
    depth = config.model.num_nextn_predict_layers

    def mean(k: int, hidden: Array) -> Array:
        weights = targets.counted[k].astype(totals.tokens.dtype)
        return cross_entropy_sum(hidden, w_DW, targets.tokens[k], weights, config.loss_chunk) / totals.tokens[k]

    main = mean(0, out.hidden)
    mtp = (
        jnp.stack([mean(k, out.mtp_hidden[k - 1]) for k in range(1, depth + 1)]) if depth else jnp.zeros(0, main.dtype)
    )
    balances = (_balance(stats, totals.sequences[name]) for name, stats in out.router.items())
    balance = sum(balances, jnp.zeros((), main.dtype))
    total = main + balance
    if depth:
        total += mtp_loss_weight / depth * mtp.sum()
    return total, Losses(main=main, mtp=mtp, balance=balance, router={})
