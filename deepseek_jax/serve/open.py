"""From the path of a checkpoint to an engine that can be asked."""

from __future__ import annotations

from typing import Any

_PLACES = 4096


def open_engine(
    path: str, *, slots: int, places: int | None = None, template: str | None = None, dtype: str | None = None
) -> tuple[Any, Any, Any]:
    """Opens a model and makes its engine.

    Args:
        path: run folder, or published (Hugging Face) checkpoint.
        slots: requests that are decoded together.
        places: tokens of prompt and answer that a slot holds; None: 4096, or what the model has positions for.
        template: name of a chat template; None takes the checkpoint's.
        dtype: as in `open_model`.

    Returns:
        Engine, tokenizer, and chat template: None where the checkpoint has none and none was named.

    Raises: ValueError as `open_model`, `get_template` and `Engine`.
    """
    from deepseek_jax.chat import get_template
    from deepseek_jax.infer.engine import Engine
    from deepseek_jax.infer.load import open_model

    chosen = None if template is None else get_template(template)  # a wrong name is seen before the long work
    loaded = open_model(path, dtype=dtype)
    if places is None:
        places = min(_PLACES, loaded.model.config.max_position_embeddings)
    engine = Engine(
        loaded.model, loaded.variables, slots=slots, places=places, tokenizer=loaded.tokenizer,
        vocab_size=loaded.tokenizer.vocab_size, consume=True,
    )  # fmt: skip
    return engine, loaded.tokenizer, chosen or loaded.template
