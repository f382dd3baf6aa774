"""What the engine is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from deepseek_jax.infer.sampling import Sampling


@dataclass(kw_only=True)
class Generation:
    """What a prompt is continued with; it grows while the engine works on it."""

    tokens: list[int] = field(default_factory=list)
    """New tokens, the stop token included where one came."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each new token under the model (temperature 1, all allowed tokens), nats."""
    sampled_logprobs: list[float] = field(default_factory=list)
    """Under the distribution that it was drawn from; 0 at temperature 0."""
    text: str = ""
    """The new tokens as text, without special tokens, the stop token and what `Sampling.stop` ends it with; empty where the
    engine has no tokenizer. It grows by whole characters; U+FFFD stands at the end for one that was never finished."""
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    """None while it grows."""
    drafts: int = 0
    """Tokens that the multi-token module proposed, and that could have been used."""
    accepted: int = 0
    """Proposals that were right, so that a step gave two tokens."""
    experts: np.ndarray | None = field(default=None, compare=False)
    """Int16 [prompt + new tokens − 1, L, X], at the end, with `record_experts`: the experts of every token that was run
    (the last new one was not), in each MoE layer."""
    kept: np.ndarray | None = field(default=None, compare=False)
    """Uint8 [new tokens, ⌈W / 8⌉], at the end, with `record_kept`: the tokens that each new one was drawn from, as
    `Sampling` and `Request.allowed` left them; bit i of byte j is for token 8 j + i."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt, and how it is continued."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    """Continuations wanted; they share one prefill, and the first is what one sample alone would be."""
    allowed: np.ndarray | None = None
    """Bool [vocabulary]: the tokens that may be chosen; None: all."""


def check(
    request: Request, name: str, *, vocabulary: int, choosable: int, places: int, texts: bool, kept: bool
) -> None:
    """Refuses what an engine cannot do, before anything runs.

    Args:
        request: what is asked for.
        name: of its prompt, for the message.
        vocabulary: rows of the model's embedding.
        choosable: ids below this may be chosen.
        places: tokens that a slot holds.
        texts: whether the engine has a tokenizer.
        kept: whether the engine records what tokens are drawn from.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, one that does not fit a slot, or an impossible wish.
    """
    prompt, sampling = request.prompt, request.sampling
    if not len(prompt):
        raise ValueError(f"{name} is empty: give at least one token (such as the begin-of-sequence token)")
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} must be a list of token ids, not {ids.dtype} {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocabulary:
        outside = sorted({int(i) for i in ids if not 0 <= i < vocabulary})[:5]
        raise ValueError(f"{name} has ids outside the vocabulary of {vocabulary}: {outside}")
    if len(prompt) + sampling.max_new_tokens > places:
        raise ValueError(
            f"{name} of {len(prompt)} tokens and max_new_tokens = {sampling.max_new_tokens} are more than the {places} "
            f"places of a slot"
        )
    if request.samples < 1:
        raise ValueError(f"samples = {request.samples} of {name}: must be at least 1")
    if sampling.stop and not texts:
        raise ValueError(f"stop = {sampling.stop} of {name}: texts need an engine with a tokenizer")
    if kept and sampling.repetition_penalty != 1:
        # The set would be told, but not how the penalty moved the probabilities in it.
        raise ValueError(
            f"repetition_penalty = {sampling.repetition_penalty} of {name}: must be 1 with record_kept, whose sets make the "
            f"distribution that was sampled from out of the model's at one temperature"
        )
    if request.allowed is not None:
        allowed = np.asarray(request.allowed)
        if allowed.shape != (vocabulary,) or allowed.dtype != bool:
            raise ValueError(f"allowed of {name} must be {vocabulary} bools, not {allowed.dtype} {allowed.shape}")
        if not allowed[:choosable].any():
            raise ValueError(f"allowed of {name} allows no token")
