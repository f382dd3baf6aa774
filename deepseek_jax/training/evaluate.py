"""Held-out loss and bits per byte."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.ring import zigzag
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.loss import cross_entropy_sum, make_targets
from deepseek_jax.training.state import TrainState
from deepseek_jax.training.step import place_batch


def make_evaluation(config: RunConfig, mesh: Mesh, data: Any) -> Callable[[TrainState], dict[str, Any]]:
    """A function from a state to `held_out_loss` (nats a token) and `held_out_bits_per_byte`.

    With several sources these are over all windows read, and `held_out` has both of each source. With `ema_decay` the
    running mean of the weights is evaluated too: `held_out_ema`. `held_out_overflow` is the share of token-expert pairs that
    a bounded buffer left out, where it did.

    It reads at most `config.eval_sequences` windows a source, evenly spread over its held-out documents and the same
    each time. Bytes are those of the text that the counted tokens stand for; the end-of-document token stands for none.
    """
    bytes_of_token = data.tokenizer.byte_lengths()
    sources = {name: _batches(config, source, bytes_of_token) for name, source in data.held_out.items()}

    @jax.jit
    def sums(params: Any, router: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        variables = {"params": params, **({"router": router} if router else {})}
        model = DeepSeek(config.model)
        segment_ids = batch["segment_ids"][:, :-1]
        out = model.apply(variables, batch["tokens"][:, :-1], segment_ids=segment_ids, zigzag_out=True, method="hidden")
        w_DW = model.apply(variables, method="head_kernel")
        targets = jax.tree.map(lambda x: zigzag(x, "none", "batch", "length"), make_targets(batch, 0))
        weights = targets.counted[0].astype(jnp.float32)
        nats = cross_entropy_sum(out.hidden, w_DW, targets.tokens[0], weights, config.loss_chunk)
        routers = out.router.values()
        left_out = sum((stats.overflow.sum() for stats in routers), jnp.zeros(()))
        return nats, weights.sum(), left_out, sum((stats.load.sum() for stats in routers), jnp.zeros(()))

    def of(params: Any, router: Any) -> dict[str, Any]:
        by_source = {}
        for name, (batches, text_bytes) in sources.items():
            results = [sums(params, router, place_batch(batch, mesh)) for batch in batches]
            sums_of_batches = (sum(float(part) for part in parts) for parts in zip(*results, strict=True))
            by_source[name] = (*sums_of_batches, text_bytes)
        if not by_source:
            return {}
        line: dict[str, Any] = {
            f"held_out_{k}": v for k, v in _means(*map(sum, zip(*by_source.values(), strict=True))).items()
        }
        if len(by_source) > 1:
            line["held_out"] = {name: _means(*figures) for name, figures in by_source.items()}
        return line

    def evaluate(state: TrainState) -> dict[str, Any]:
        line = of(state.params, state.router)
        if state.ema and line:
            line["held_out_ema"] = {k.removeprefix("held_out_"): v for k, v in of(state.ema, state.router).items()}
        return line

    return evaluate


def _batches(config: RunConfig, source: Any, bytes_of_token: np.ndarray) -> tuple[list[dict[str, np.ndarray]], int]:
    """The batches that a source is judged by, and the bytes of text in them."""
    count = min(config.eval_sequences, len(source))
    rows = [source[int(i)] for i in np.linspace(0, len(source) - 1, count).round()]
    size = config.piece_size  # what is known to fit in memory
    rows += [{k: np.zeros_like(x) for k, x in rows[0].items()}] * (-count % size)
    batches = [
        {k: np.stack([row[k] for row in rows[i : i + size]]) for k in rows[0]} for i in range(0, len(rows), size)
    ]
    text_bytes = 0
    for batch in batches:
        counted = np.asarray(make_targets(batch, 0).counted[0])
        text_bytes += int(bytes_of_token[batch["tokens"][:, 1:][counted]].sum())
    return batches, text_bytes


def _means(nats: float, tokens: float, left_out: float, chosen: float, text_bytes: int) -> dict[str, float]:
    means = {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / max(text_bytes, 1)}
    return means | ({"overflow": left_out / chosen} if left_out else {})
