"""Generation from caches: slots that requests share, prefill in chunks, decoding that stays on the device.

A request is prefilled alone, by itself, into a slot; all slots decode together, several steps at a time, and a slot whose
request has ended is refilled at once. Shapes depend on the number of slots, the places of a slot and a few widths of
chunks only, so programs are few, and a request's result depends on no other: every operation of a step treats rows alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from deepseek_jax.infer.sampling import Sampling, Settings, sample, settings
from deepseek_jax.models.transformer import Cache, DeepSeek, init_cache
from deepseek_jax.types import Array


class Generation(NamedTuple):
    """What a prompt was continued with."""

    tokens: list[int]
    """New tokens, the stop token included where one came."""
    logprobs: list[float]
    """Log-probability of each new token under the model (temperature 1, whole vocabulary), nats."""
    sampled_logprobs: list[float]
    """Under the distribution that it was drawn from; 0 at temperature 0."""


class Request(NamedTuple):
    """A prompt, and how it is continued."""

    prompt: Sequence[int]
    sampling: Sampling


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
    """Bool [B, W]."""
    given: Settings


class Engine:
    """A model with caches, ready for requests.

    ```python
    engine = Engine(model, variables, slots=8, places=1024)
    results = engine.generate([Request(ids, Sampling(max_new_tokens=64)), …])
    ```
    """

    def __init__(
        self, model: DeepSeek, variables: Any, *, slots: int = 8, places: int = 1024, chunk: int = 256,
        decode_steps: int = 8, vocab_size: int | None = None,
    ):  # fmt: skip
        """
        Args:
            model: the model; its multi-token modules are not used.
            variables: its parameters and, where it has them, selection biases.
            slots: requests that are decoded together.
            places: tokens of prompt and continuation that a slot holds.
            chunk: most tokens of a prompt that are run at once.
            decode_steps: tokens of a slot that are decoded before the host looks at them.
            vocab_size: ids from here on are never chosen, where the tokenizer has fewer than the model has rows.

        Raises:
            ValueError: a number below 1, or more places than the model has positions.
        """
        config = model.config
        for name, value in (("slots", slots), ("places", places), ("chunk", chunk), ("decode_steps", decode_steps)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if places > config.max_position_embeddings:
            raise ValueError(
                f"places = {places}: {config.name} has max_position_embeddings = {config.max_position_embeddings}"
            )
        self.model, self.variables = model, variables
        self.slots, self.places, self.decode_steps = slots, places, decode_steps
        self.chunk = min(_power_of_two(chunk), _power_of_two(places))
        self.vocab_size = vocab_size or config.vocab_size

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Continues every request, in the order given.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, or one that does not fit a slot, naming the request.
        """
        for i, request in enumerate(requests):
            self._check(i, request)
        results: list[Generation] = [Generation([], [], []) for _ in requests]
        waiting = deque(range(len(requests)))
        running: dict[int, int] = {}  # slot -> request
        state = self._empty([Sampling()] * self.slots)
        stochastic = any(request.sampling.temperature > 0 for request in requests)
        while waiting or running:
            for slot in range(self.slots):
                while slot not in running and waiting:
                    number = waiting.popleft()
                    state, first = self._prefill(state, slot, requests[number], stochastic)
                    if not self._take(results[number], requests[number].sampling, first):
                        running[slot] = number
            if not running:
                continue
            resting = np.array([slot not in running for slot in range(self.slots)])
            state, out = _decode(
                self.model, self.decode_steps, self.vocab_size, stochastic, self.variables, state, resting
            )
            steps = jax.device_get(out)
            for slot, number in list(running.items()):
                for step in range(self.decode_steps):
                    if self._take(results[number], requests[number].sampling, [column[step, slot] for column in steps]):
                        del running[slot]
                        break
        return results

    def _take(self, result: Generation, sampling: Sampling, new: Sequence[Any]) -> bool:
        """Adds a token to a result; whether that ends it."""
        for values, value in zip(result, new, strict=True):
            values.append(value.item())
        return len(result.tokens) >= sampling.max_new_tokens or result.tokens[-1] in sampling.stop_ids

    def _empty(self, rows: list[Sampling]) -> Slots:
        count, config = len(rows), self.model.config
        return Slots(
            cache=init_cache(config, count, self.places),
            token=jnp.zeros(count, jnp.int32),
            place=jnp.full(count, self.places, jnp.int32),
            step=jnp.zeros(count, jnp.int32),
            seen=jnp.zeros((count, config.vocab_size), bool),
            given=jax.tree.map(jnp.asarray, settings(rows)),
        )

    def _prefill(self, state: Slots, slot: int, request: Request, stochastic: bool) -> tuple[Slots, list[np.ndarray]]:
        """Runs the prompt into a slot, chunk by chunk, and draws its first token."""
        prompt = np.asarray(request.prompt, np.int32)
        one = init_cache(self.model.config, 1, self.places)
        for start in range(0, len(prompt), self.chunk):
            part = prompt[start : start + self.chunk]
            width = min(_power_of_two(len(part)), self.chunk)
            tokens = np.zeros((1, width), np.int32)
            tokens[0, : len(part)] = part
            positions = np.full((1, width), self.places, np.int32)
            positions[0, : len(part)] = np.arange(start, start + len(part))
            hidden, one = _extend(self.model, start == 0, self.variables, tokens, positions, one)
        seen = np.zeros((1, self.model.config.vocab_size), bool)
        seen[0, prompt] = True
        return _enter(
            self.model, self.vocab_size, stochastic, self.variables, state, one, hidden[:, len(part) - 1], slot,
            np.int32(len(prompt)), seen, settings([request.sampling]),
        )  # fmt: skip

    def _check(self, number: int, request: Request) -> None:
        config, prompt = self.model.config, request.prompt
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty: give at least one token (such as the begin-of-sequence token)")
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ValueError(f"prompt {number} has ids outside the vocabulary of {config.vocab_size}")
        if len(prompt) + request.sampling.max_new_tokens > self.places:
            raise ValueError(
                f"prompt {number} of {len(prompt)} tokens and max_new_tokens = {request.sampling.max_new_tokens} are "
                f"more than the {self.places} places of a slot"
            )


def _power_of_two(n: int) -> int:
    return max(1 << (n - 1).bit_length(), 8)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _extend(model: DeepSeek, fresh: bool, variables: Any, tokens: Array, positions: Array, cache: Cache) -> Any:
    return model.apply(variables, tokens, positions, cache, fresh, method="extend")


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _enter(
    model: DeepSeek, vocab_size: int, stochastic: bool, variables: Any, state: Slots, one: Cache, hidden_1D: Array,
    slot: Array, place: Array, seen: Array, given: Settings,
) -> tuple[Slots, list[Array]]:  # fmt: skip
    """A prefilled prompt goes into its slot, with the first token of its continuation."""
    logits = model.apply(variables, hidden_1D[:, None], method="head")[:, 0]
    token, raw, drawn = sample(logits, given, seen, jnp.zeros(1, jnp.int32), vocab_size, stochastic)

    def put(all_rows: Array, row: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(all_rows, row.astype(all_rows.dtype), slot, axis=0)

    new = Slots(
        cache=jax.tree.map(
            lambda rows, row: lax.dynamic_update_slice_in_dim(rows, row, slot, axis=1), state.cache, one
        ),
        token=put(state.token, token),
        place=put(state.place, place[None]),
        step=put(state.step, jnp.ones(1, jnp.int32)),
        seen=put(state.seen, seen.at[0, token[0]].set(True)),
        given=jax.tree.map(put, state.given, given),
    )
    return new, [token[0], raw[0], drawn[0]]


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _decode(
    model: DeepSeek, steps: int, vocab_size: int, stochastic: bool, variables: Any, state: Slots, resting: Array
) -> tuple[Slots, tuple[Array, Array, Array]]:
    """`steps` tokens of every slot: tokens and both log-probabilities, [steps, B] each."""
    rows = jnp.arange(state.token.shape[0])
    places = jax.tree.leaves(state.cache)[0].shape[2]

    def one(state: Slots, _: None) -> tuple[Slots, tuple[Array, Array, Array]]:
        hidden, cache = model.apply(variables, state.token[:, None], state.place[:, None], state.cache, method="extend")
        logits = model.apply(variables, hidden, method="head")[:, 0]
        token, raw, drawn = sample(logits, state.given, state.seen, state.step, vocab_size, stochastic)
        new = replace(
            state, cache=cache, token=token, place=state.place + 1, step=state.step + 1,
            seen=state.seen.at[rows, token].set(True),
        )  # fmt: skip
        return new, (token, raw, drawn)

    state = replace(state, place=jnp.where(resting, places, state.place))
    return lax.scan(one, state, None, length=steps)
