"""From logits to a token, request by request: every row has settings and a random stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from deepseek_jax.config import require
from deepseek_jax.types import Array

_HOTTEST = 1e4  # by then all tokens are alike; far below where float32 overflows


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request is sampled."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens, of equal ones those with the lower ids; 0: all."""
    top_p: float = 1.0
    """Only the smallest set of likeliest tokens whose probabilities, among those that top_k leaves, reach this."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that the prompt or the continuation holds (CTRL)."""
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the continuation, and belong to it."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation; its text ends before them. They need an engine with a tokenizer."""

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, remedy: str) -> None:
            require(condition, "Sampling", name, getattr(self, name), remedy)

        for name in ("max_new_tokens", "top_k", "seed"):
            check(isinstance(getattr(self, name), Integral), name, "must be a whole number")
        check(self.max_new_tokens >= 1, "max_new_tokens", "must be at least 1")
        check(not self.temperature < 0, "temperature", "must not be negative")
        check(self.temperature <= _HOTTEST, "temperature", f"must be at most {_HOTTEST:g}")
        check(0 <= self.top_k < 2**31, "top_k", "must be in [0, 2**31); 0 takes all")
        check(0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        check(0 <= self.min_p <= 1, "min_p", "must be in [0, 1]")
        check(self.repetition_penalty > 0, "repetition_penalty", "must be greater than 0; 1 penalises nothing")
        check(0 <= self.seed < 2**32, "seed", "must be in [0, 2**32)")
        check(not isinstance(self.stop, str) and all(self.stop), "stop", "must be a tuple of texts, none of them empty")

    @property
    def draws(self) -> Draws:
        """What the sampler has to be compiled for."""
        if self.temperature == 0:
            return "nothing"
        return "whole" if self.top_k == 0 and self.top_p == 1 and self.min_p == 0 else "truncated"


Draws = Literal["nothing", "whole", "truncated"]
"""What rows of a batch draw from: all are greedy; some draw from whole distributions; some from truncated ones."""
DRAWS: tuple[Draws, ...] = ("nothing", "whole", "truncated")


@struct.dataclass
class Settings:
    """`Sampling` of B rows as arrays."""

    temperature: Array
    """Float32 [B]; so are the next three."""
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    top_k: Array
    """Int32 [B]."""
    key: Array
    """Uint32 [B, 2]: raw data of each row's key."""
    allowed: Array
    """Bool [B, W]: the tokens that may be chosen."""


def settings(
    rows: Sequence[Sampling], allowed_BW: Any, samples: Sequence[int] | None = None, salt: int = 0
) -> Settings:
    """The arrays of some rows, on the host.

    Args:
        rows: how each is sampled.
        allowed_BW: bool: the tokens that may be chosen.
        samples: which of the samples of its prompt each row is; the first of all by default.
        salt: in [0, 2**32): of the prompt, so that prompts with one seed have noise of their own.
    """

    def floats(name: str) -> Any:
        return np.array([getattr(row, name) for row in rows], np.float32)

    return Settings(
        temperature=floats("temperature"),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        repetition_penalty=floats("repetition_penalty"),
        top_k=np.array([row.top_k for row in rows], np.int32),  # type: ignore[arg-type]
        # As `jax.random.key` holds a seed, without a call to the device for each request.
        key=np.array(list(zip(samples or [0] * len(rows), (row.seed ^ salt for row in rows), strict=True)), np.uint32),  # type: ignore[arg-type]
        allowed=allowed_BW,
    )


def sample(
    logits_BW: Array, given: Settings, seen_BW: Array, step_B: Array, draws: Draws
) -> tuple[Array, Array, Array]:
    """One token a row.

    Args:
        logits_BW: float32 or wider.
        given: of the rows.
        seen_BW: bool: tokens that the penalty acts on.
        step_B: int32: how many tokens the continuation has; a row's draw depends on its key and this alone.
        draws: the most that any row needs; less is compiled for less.

    Returns:
        Tokens int32 [B]; their log-probabilities under the model as it is (temperature 1, all allowed tokens) and under
        the distribution that was sampled from (0 for a row with temperature 0), float32 [B], nats.
    """
    token, raw, sampled_from, _ = sample_recorded(logits_BW, given, seen_BW, step_B, draws)
    return token, raw, sampled_from


def sample_recorded(
    logits_BW: Array, given: Settings, seen_BW: Array, step_B: Array, draws: Draws
) -> tuple[Array, Array, Array, Array]:
    """As `sample`, and the tokens that each row could have drawn: uint8 [B, ⌈W / 8⌉], bit i of byte j for token 8 j + i.

    A row with temperature 0 could have drawn the one alone that it took. What does not want the sets costs nothing, once
    compiled.
    """
    W = logits_BW.shape[-1]
    logits = jnp.where(given.allowed, logits_BW, -jnp.inf)
    raw = jax.nn.log_softmax(logits, axis=-1)
    penalty = given.repetition_penalty[:, None]
    logits = jnp.where(seen_BW, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    chosen = jnp.argmax(logits, axis=-1)
    sampled_from, could_BW = jnp.zeros_like(raw[:, 0]), False
    if draws != "nothing":
        greedy = given.temperature == 0
        kept = logits / jnp.where(greedy, 1, given.temperature)[:, None]
        if draws == "truncated":
            kept = _truncated(kept, given)
        kept = jax.nn.log_softmax(kept, axis=-1)
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(given.key, impl="threefry2x32"), step_B)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (W,), logits.dtype))(keys)
        drawn = jnp.argmax(kept + noise, axis=-1)
        chosen = jnp.where(greedy, chosen, drawn)
        of_chosen = jnp.take_along_axis(kept, chosen[:, None], axis=-1)[:, 0]
        sampled_from = jnp.where(greedy, 0, of_chosen)
        could_BW = ~greedy[:, None] & (kept > -jnp.inf)
    bits = jnp.packbits(could_BW | (jnp.arange(W) == chosen[:, None]), axis=-1, bitorder="little")
    return chosen.astype(jnp.int32), jnp.take_along_axis(raw, chosen[:, None], axis=-1)[:, 0], sampled_from, bits


def _truncated(logits_BW: Array, given: Settings) -> Array:
    """Logits with −inf outside what top_k, top_p and min_p leave; the likeliest token always stays."""
    B, W = logits_BW.shape
    order = jnp.argsort(logits_BW, axis=-1, descending=True, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits_BW, order, axis=-1), axis=-1)
    place = jnp.arange(W)
    inside = place < jnp.where(given.top_k == 0, W, given.top_k)[:, None]
    kept = jnp.where(inside, probabilities, 0)
    before = jnp.cumsum(kept, axis=-1) - kept
    top_p = given.top_p[:, None]
    # At 1 rounding of the sum must not cut the tail of a row that has truncated neighbours.
    inside &= (before < top_p * kept.sum(axis=-1, keepdims=True)) | (top_p >= 1)
    inside &= probabilities >= given.min_p[:, None] * probabilities[:, :1]
    inside |= place == 0
    keep = jnp.zeros((B, W), bool).at[jnp.arange(B)[:, None], order].set(inside)
    return jnp.where(keep, logits_BW, -jnp.inf)
