"""Text from a model: the engine in one call, and the way from a run folder to a model."""

import json
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

from deepseek_jax import storage
from deepseek_jax.infer.engine import Engine, Generation, Request
from deepseek_jax.infer.sampling import Sampling
from deepseek_jax.models.transformer import DeepSeek

_MOST_SLOTS = 32
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
        seed: of the sampling; a prompt's continuation does not depend on the prompts beside it.
        stop_ids: tokens that end a continuation; the model's end-of-sequence token by default.
        vocab_size: ids from here on are never chosen, where the tokenizer has fewer than the model has rows.
        sampling: further fields of `Sampling`: top_k, min_p, repetition_penalty.

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
    if not prompts:
        return []
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"prompt and new tokens are {longest}, more than max_position_embeddings = {config.max_position_embeddings}"
        )
    places = min(-(-longest // _PLACES_STEP) * _PLACES_STEP, config.max_position_embeddings)
    engine = Engine(model, variables, slots=min(len(prompts), _MOST_SLOTS), places=places, vocab_size=vocab_size)
    return engine.generate([Request(prompt=prompt, sampling=how) for prompt in prompts])


class LoadedRun(NamedTuple):
    """A finished or running run, ready to be used."""

    model: DeepSeek
    variables: Any
    tokenizer: Any
    step: int


def load_run(run_dir: str | PathLike[str], step: int | None = None) -> LoadedRun:
    """Model, newest good (or given) checkpoint and tokenizer of a run folder.

    Raises:
        ValueError: no manifest, no checkpoint, or one that does not fit the manifest's configuration.
    """
    from deepseek_jax.checkpoint.store import Store
    from deepseek_jax.config import ModelConfig
    from deepseek_jax.data.tokenizer import load_tokenizer
    from deepseek_jax.models.counts import abstract_variables
    from deepseek_jax.parallel.rules import unbox
    from deepseek_jax.serialize import from_dict

    run_dir = storage.path(run_dir)
    manifest = run_dir / "manifest.json"
    if not manifest.exists():
        raise ValueError(f"{run_dir} is no run folder: it has no manifest.json; give the --run-dir of a training run")
    config = from_dict(ModelConfig, json.loads(manifest.read_text(encoding="utf-8"))["config"]["model"])
    with Store(run_dir / "checkpoints", read_only=True) as store:
        step = store.latest_good() if step is None else step
        if step is None:
            raise ValueError(f"{run_dir} has no checkpoint yet: let the run reach its first one")
        variables, _ = store.restore_params(unbox(abstract_variables(config)), step)
    return LoadedRun(DeepSeek(config), variables, load_tokenizer(run_dir / "tokenizer.json"), step)


def continue_text(run: LoadedRun, prompts: Sequence[str], **options: Any) -> list[str]:
    """Continuations of texts, as text; options as in `generate`."""
    tokenizer = run.tokenizer
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]  # as documents begin in training
    results = generate(
        run.model, run.variables, ids, stop_ids=[tokenizer.eos_id], vocab_size=tokenizer.vocab_size, **options
    )
    return [tokenizer.decode(result.tokens, skip_special=True) for result in results]
