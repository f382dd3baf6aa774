"""Tokens and text from a model: the engine in one call."""

from collections.abc import Sequence
from typing import Any

from deepseek_jax.infer.engine import Engine
from deepseek_jax.infer.load import Loaded
from deepseek_jax.infer.requests import Generation, Request
from deepseek_jax.infer.sampling import Sampling
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import degree

_MOST_SLOTS, _MOST_ROWS = 32, 8
_PLACES_STEP = 64  # slots have a multiple of it, so that few lengths are compiled


def generate(
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
    samples: int = 1,
    speculate: bool = False,
    tokenizer: Any = None,
    **sampling: Any,
) -> list[Generation]:
    """Continue each prompt.

    Args:
        model: the model.
        variables: its parameters and, where it has them, selection biases.
        prompts: token ids, at least one a prompt.
        max_new_tokens: at most so many new tokens each.
        temperature: 0 takes the likeliest token.
        top_p: samples from the smallest set of tokens with at least this probability.
        seed: of the sampling; a prompt's continuation does not depend on the prompts beside it. In bfloat16 other numbers
            of slots and `speculate` may round a logit differently, and so change a token where two are nearly as likely.
        stop_ids: tokens that end a continuation; the model's end-of-sequence token by default.
        vocab_size: ids from here on are never chosen, where the tokenizer has fewer than the model has rows; by default
            the tokenizer's, where one is given.
        samples: continuations of each prompt, one after the other in the result.
        speculate: decode with the model's multi-token module: the same tokens in fewer steps.
        tokenizer: gives `Generation.text`, and knows `stop` by it.
        sampling: further fields of `Sampling`: top_k, min_p, repetition_penalty, stop.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, a sequence longer than the model's positions.
    """
    config = model.config
    if stop_ids is None:
        stop_ids = () if config.eos_token_id is None else (config.eos_token_id,)
    how = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop_ids=tuple(stop_ids),
        **sampling,
    )  # fmt: skip
    if not len(prompts):
        return []
    if samples < 1:
        raise ValueError(f"samples = {samples}: must be at least 1")
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"prompt and new tokens are {longest}, more than max_position_embeddings = {config.max_position_embeddings}"
        )
    places = min(-(-longest // _PLACES_STEP) * _PLACES_STEP, config.max_position_embeddings)
    slots, batch = min(len(prompts) * samples, _MOST_SLOTS), degree("batch")
    engine = Engine(
        model, variables, slots=-(-slots // batch) * batch, prefill_rows=min(len(prompts), _MOST_ROWS), places=places,
        vocab_size=vocab_size, speculate=speculate, tokenizer=tokenizer,
    )  # fmt: skip
    return engine.generate([Request(prompt=prompt, sampling=how, samples=samples) for prompt in prompts])


def continue_text(loaded: Loaded, prompts: Sequence[str], **options: Any) -> list[str]:
    """Continuations of texts, as text; options as in `generate`."""
    tokenizer = loaded.tokenizer
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]  # as documents begin in training
    results = generate(
        loaded.model, loaded.variables, ids, stop_ids=[tokenizer.eos_id], vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer, **options,
    )  # fmt: skip
    return [result.text for result in results]
