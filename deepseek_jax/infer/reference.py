"""A plain sampler without a cache: the meaning of generation.

Each new token runs the whole sequence again, so that what is sampled from is the training forward pass itself; the
engine with caches must equal it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.infer.requests import Generation
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.types import Array

_LENGTH_STEP = 64  # buffers are multiples of it, so that few lengths are compiled


def generate_reference(
    model: DeepSeek,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> list[Generation]:
    """Continue each prompt; arguments as in `generate`, without its requests of their own."""
    config = model.config
    longest = max(map(len, prompts)) + max_new_tokens
    if stop_ids is None:
        stop_ids = () if config.eos_token_id is None else (config.eos_token_id,)
    length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, config.max_position_embeddings)
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    starts = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens, logprobs, ends = _sample(
        model, top_p < 1, temperature > 0, vocab_size or config.vocab_size, variables, tokens, starts, max_new_tokens,
        jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32),
        jnp.asarray(list(stop_ids) or [-1], jnp.int32), jax.random.key(seed),
    )  # fmt: skip
    tokens, logprobs, ends = np.asarray(tokens), np.asarray(logprobs), np.asarray(ends)
    return [
        Generation(tokens=tokens[i, starts[i] : ends[i]].tolist(), logprobs=logprobs[i, starts[i] : ends[i]].tolist())
        for i in range(len(prompts))
    ]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sample(
    model: DeepSeek, nucleus: bool, stochastic: bool, vocab_size: int, variables: Any, tokens_BT: Array, starts_B: Array,
    new_tokens: int, temperature: Array, top_p: Array, stop_ids: Array, key: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Tokens [B, T], log-probabilities of the tokens at their places [B, T], end of each row [B]."""
    rows = jnp.arange(tokens_BT.shape[0])
    head = partial(model.apply, variables, method="head")

    def next_token(state: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        tokens, logprobs, ends, done, step = state
        hidden = model.apply(variables, tokens, method="hidden").hidden
        logits = head(hidden[rows, ends - 1][:, None])[:, 0]
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
        if stochastic:
            # One key a step: a row's choice depends on its own logits and its place in the continuation alone.
            noise = jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:], logits.dtype)
            scaled = logits / temperature
            chosen = jnp.argmax((_nucleus(scaled, top_p) if nucleus else scaled) + noise, axis=-1)
        else:
            chosen = jnp.argmax(logits, axis=-1)
        chosen = chosen.astype(tokens.dtype)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=-1)[:, 0]
        tokens = tokens.at[rows, ends].set(jnp.where(done, tokens[rows, ends], chosen))
        logprobs = logprobs.at[rows, ends].set(jnp.where(done, logprobs[rows, ends], logprob))
        stopped = (chosen[:, None] == stop_ids).any(axis=-1)
        return tokens, logprobs, jnp.where(done, ends, ends + 1), done | stopped, step + 1

    def going(state: tuple[Array, Array, Array, Array, Array]) -> Array:
        return (state[4] < new_tokens) & ~state[3].all()

    done = jnp.zeros(tokens_BT.shape[0], bool)
    logprobs = jnp.zeros(tokens_BT.shape, jnp.promote_types(model.config.dtype, jnp.float32))
    start = (jnp.asarray(tokens_BT), logprobs, jnp.asarray(starts_B), done, jnp.zeros((), jnp.int32))
    return lax.while_loop(going, next_token, start)[:3]


def _nucleus(logits_BW: Array, top_p: Array) -> Array:
    """Logits with −inf outside the smallest set of likeliest tokens whose probabilities reach `top_p`."""
    ordered = jnp.sort(logits_BW, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
    lowest = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BW >= lowest, logits_BW, -jnp.inf)
