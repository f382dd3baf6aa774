"""The compiled programs of the engine: prefill of a chunk, entry into a slot, decoding, plain or speculative.

Speculative decoding (V3, sections 2.2 and 5.4.3) is lossless in the strongest sense. A row's draw depends on its key, its
place and its logits alone, so the token that plain decoding would have chosen after a draft is known, whatever drafted
it; a draft counts only where it is that token (up to the rounding of the logits: two tokens at once are another product
than one). The draft itself is the multi-token module's choice with the same noise.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from deepseek_jax.infer.sampling import Draws, Settings, sample, sample_recorded
from deepseek_jax.models.cached import Cache, LayerWeights, draft, extend, head, init_cache
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import degree
from deepseek_jax.types import Array


@struct.dataclass
class Slots:
    """What decoding carries from step to step, a row a slot."""

    cache: Cache
    token: Array
    """Int32 [B]: the last token, which is not in the cache yet."""
    place: Array
    """Int32 [B]: where it goes; past the cache's end in a slot that rests."""
    step: Array
    """Int32 [B]: tokens that the continuation has."""
    seen: Array
    """Bool [B, W]: tokens of prompt and continuation."""
    given: Settings
    draft: Array | None
    """Int32 [B]: what the multi-token module thinks comes after `token`; None in plain decoding."""


@struct.dataclass
class Prefilled:
    """Prompts that were run, before their first tokens are drawn."""

    cache: Cache
    """A row a prompt, R rows."""
    hidden: Array
    """[R, D] of their last tokens."""


@struct.dataclass
class Decoded:
    """Some steps of every slot. J is 2 in speculative decoding, else 1."""

    tokens: Array
    """Int32 [steps, B, J]."""
    logprobs: Array
    """Float32 [steps, B, J], of the model as it is."""
    sampled_logprobs: Array
    """Float32 [steps, B, J], of the distribution sampled from."""
    counts: Array
    """Int32 [steps, B]: how many of the J count."""
    experts: Array | None
    """Int16 [steps, L, B, J, X]: experts of the tokens run; the j-th counts where `counts` is more than j."""
    kept: Array | None
    """Uint8 [steps, B, J, ⌈W / 8⌉]: what each token was drawn from, as `sample_recorded` has it."""


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def prefill(
    model: DeepSeek, places: int, speculate: bool, weights: LayerWeights, tokens: Array, positions: Array,
    cache: Cache | None, following: Array, last: Array,
) -> tuple[Array, Cache, Array | None]:  # fmt: skip
    """A chunk of some prompts, a row each: hidden state [R, D] of a token each, cache, experts int16 [R, T, L, X].

    Args:
        model: the model.
        places: of the cache.
        speculate: run the multi-token module too.
        weights: of the model.
        tokens: int32 [R, T].
        positions: int32 [R, T]; `places` for padding.
        cache: of the chunks before; None for the first.
        following: int32 [R, T]: the next token of each; `-1` where it is not known yet.
        last: int32 [R]: the tokens whose hidden states are wanted.
    """
    weights, fresh = weights.turned_back(), cache is None
    if cache is None:
        cache = init_cache(model.config, tokens.shape[0], places, mtp=speculate, looped=weights.looped)
    hidden, cache, experts = extend(model, weights, tokens, positions, cache, fresh)
    if speculate:
        known = following >= 0
        _, cache = draft(
            model, weights, hidden, jnp.where(known, following, 0), jnp.where(known, positions, places), cache, fresh
        )
    if experts is not None:
        experts = jnp.moveaxis(experts, 0, 2).astype(jnp.int16)
    return hidden[jnp.arange(len(last)), last], cache, experts


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def enter(
    model: DeepSeek, draws: Draws, record_kept: bool, weights: LayerWeights, state: Slots, prefilled: Prefilled,
    row: Array, slot: Array, place: Array, seen: Array, given: Settings,
) -> tuple[Slots, tuple[Array, ...]]:  # fmt: skip
    """A prefilled prompt goes into its slot; the first token of its continuation, both log-probabilities, and what it was
    drawn from where that is recorded.

    Args:
        model: the model.
        draws: what this request draws from.
        record_kept: whether the tokens are told that it could have drawn.
        weights: of the model.
        state: of all slots.
        prefilled: the prompt, among others.
        row: which of them it is.
        slot: where it goes.
        place: of the first token: the prompt's length.
        seen: bool [1, W]: tokens of the prompt.
        given: of this row.
    """
    weights = weights.turned_back()
    count = degree("batch")  # rows that a mesh can split; alike, and the first counts

    def rows(x: Array) -> Array:
        return jnp.repeat(lax.dynamic_slice_in_dim(x, row, 1), count, axis=0)

    hidden = rows(prefilled.hidden)[:, None]
    first = sample_recorded(head(model, weights, hidden)[:1, 0], given, seen, jnp.zeros(1, jnp.int32), draws)
    token = first[0]
    seen = seen.at[0, token[0]].set(True)
    cache, proposal = jax.tree.map(rows, prefilled.cache), None
    if state.draft is not None:
        following, position = (jnp.full(hidden.shape[:2], x, jnp.int32) for x in (token[0], place - 1))
        out, cache = draft(model, weights, hidden, following, position, cache)
        proposal, _, _ = sample(head(model, weights, out)[:1, 0], given, seen, jnp.ones(1, jnp.int32), draws)

    def put(all_rows: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(all_rows, new[:1].astype(all_rows.dtype), slot, axis=0)

    state = Slots(
        cache=jax.tree.map(put, state.cache, cache),
        token=put(state.token, token),
        place=put(state.place, place[None]),
        step=put(state.step, jnp.ones(1, jnp.int32)),
        seen=put(state.seen, seen),
        given=jax.tree.map(put, state.given, given),
        draft=None if state.draft is None or proposal is None else put(state.draft, proposal),
    )
    return state, tuple(x[0] for x in first[: 3 + record_kept])


@partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames="record_kept", donate_argnums=5)
def decode(
    model: DeepSeek, steps: int, draws: Draws, record_experts: bool, weights: LayerWeights, state: Slots, resting: Array,
    *, record_kept: bool = False,
) -> tuple[Slots, Decoded]:  # fmt: skip
    """`steps` steps of every slot, one token a step, or one and a draft where the slots hold drafts.

    Args:
        model: the model.
        steps: how many.
        draws: the most that any slot needs.
        record_experts: whether the experts of each token are told.
        weights: of the model.
        state: of all slots.
        resting: bool [B]: slots without a request.
        record_kept: whether the tokens are told that each step could have drawn.
    """
    places = jax.tree.leaves(state.cache)[0].shape[-2]
    one = _plain if state.draft is None else _speculative

    def step(state: Slots, _: None) -> tuple[Slots, Decoded]:
        state, out = one(model, draws, weights.turned_back(), state, places)
        if not record_experts:
            out = replace(out, experts=None)
        elif out.experts is not None:
            out = replace(out, experts=out.experts.astype(jnp.int16))
        return state, out if record_kept else replace(out, kept=None)

    return lax.scan(step, replace(state, place=jnp.where(resting, places, state.place)), None, length=steps)


def _plain(model: DeepSeek, draws: Draws, weights: LayerWeights, state: Slots, places: int) -> tuple[Slots, Decoded]:
    rows = jnp.arange(state.token.shape[0])
    hidden, cache, experts = extend(model, weights, state.token[:, None], state.place[:, None], state.cache)
    logits = head(model, weights, hidden)[:, 0]
    token, raw, drawn, kept = sample_recorded(logits, state.given, state.seen, state.step, draws)
    state = replace(
        state, cache=cache, token=token, place=state.place + 1, step=state.step + 1,
        seen=state.seen.at[rows, token].set(True),
    )  # fmt: skip
    return state, Decoded(token[:, None], raw[:, None], drawn[:, None], jnp.ones_like(token), experts, kept[:, None])


def _speculative(
    model: DeepSeek, draws: Draws, weights: LayerWeights, state: Slots, places: int
) -> tuple[Slots, Decoded]:
    assert state.draft is not None
    rows = jnp.arange(state.token.shape[0])
    tokens = jnp.stack([state.token, state.draft], axis=1)
    positions = state.place[:, None] + jnp.arange(2)
    hidden, cache, experts = extend(model, weights, tokens, positions, state.cache)
    logits = head(model, weights, hidden)
    first, *of_first = sample_recorded(logits[:, 0], state.given, state.seen, state.step, draws)
    accepted = first == state.draft
    seen = state.seen.at[rows, first].set(True)
    second, *of_second = sample_recorded(logits[:, 1], state.given, seen, state.step + 1, draws)
    seen = seen.at[rows, jnp.where(accepted, second, first)].set(True)
    count = 1 + accepted.astype(jnp.int32)
    # Where the draft was wrong, its row says nothing: the module's cache does not take it, and the model's own cache
    # takes the right token at the same place in the next step.
    kept = jnp.stack([state.place, jnp.where(accepted, state.place + 1, places)], axis=1)
    out, cache = draft(model, weights, hidden, jnp.stack([first, second], axis=1), kept, cache)
    last = jnp.take_along_axis(out, (count - 1)[:, None, None], axis=1)
    proposal, _, _ = sample(head(model, weights, last)[:, 0], state.given, seen, state.step + count, draws)
    state = replace(
        state, cache=cache, token=jnp.where(accepted, second, first), place=state.place + count,
        step=state.step + count, seen=seen, draft=proposal,
    )  # fmt: skip
    tokens, raw, drawn, kept = (
        jnp.stack(pair, axis=1) for pair in zip((first, *of_first), (second, *of_second), strict=True)
    )
    return state, Decoded(tokens, raw, drawn, count, experts, kept)
