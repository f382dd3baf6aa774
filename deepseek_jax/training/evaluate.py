"""Held-out loss and bits per byte."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.loss import cross_entropy_sum, make_targets
from deepseek_jax.training.state import TrainState
from deepseek_jax.training.step import place_batch


def make_evaluation(config: RunConfig, mesh: Mesh, data: Any) -> Callable[[TrainState], dict[str, float]]:
    """A function from a state to `held_out_loss` (nats a token) and `held_out_bits_per_byte`.

    It reads at most `config.eval_sequences` windows, evenly spread over the held-out documents and the same each time.
    Bytes are those of the text that the counted tokens stand for; the end-of-document token stands for none.
    """
    source = data.held_out
    if source is None:
        return lambda state: {}
    count = min(config.eval_sequences, len(source))
    rows = [source[int(i)] for i in np.linspace(0, len(source) - 1, count).round()]
    size = config.batch_size // config.accumulation  # what is known to fit in memory
    rows += [{k: np.zeros_like(x) for k, x in rows[0].items()}] * (-count % size)
    batches = [
        {k: np.stack([row[k] for row in rows[i : i + size]]) for k in rows[0]} for i in range(0, len(rows), size)
    ]
    bytes_of_token = data.tokenizer.byte_lengths()
    text_bytes = 0
    for batch in batches:
        counted = np.asarray(make_targets(batch, 0).counted[0])
        text_bytes += int(bytes_of_token[batch["tokens"][:, 1:][counted]].sum())

    @jax.jit
    def sums(state: TrainState, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        variables = {"params": state.params, **({"router": state.router} if state.router else {})}
        model = DeepSeek(config.model)
        segment_ids = batch["segment_ids"][:, :-1]
        out = model.apply(variables, batch["tokens"][:, :-1], segment_ids=segment_ids, method="hidden")
        w_DW = model.apply(variables, method="head_kernel")
        targets = make_targets(batch, 0)
        weights = targets.counted[0].astype(jnp.float32)
        return cross_entropy_sum(out.hidden, w_DW, targets.tokens[0], weights, config.loss_chunk), weights.sum()

    def evaluate(state: TrainState) -> dict[str, float]:
        results = [sums(state, place_batch(batch, mesh)) for batch in batches]
        nats, tokens = (sum(float(part) for part in parts) for parts in zip(*results, strict=True))
        return {
            "held_out_loss": nats / tokens,
            "held_out_bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        }

    return evaluate
