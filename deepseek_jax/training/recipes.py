"""Recipes made from recipes: a small twin of a published one, and the stages of context extension behind it."""

from __future__ import annotations

from dataclasses import replace

from deepseek_jax.config import ModelConfig, Rope
from deepseek_jax.data.config import DataConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.schedule import BatchRamp, ByTokens, MultiStep, scaled_tokens


def scaled_down(
    config: RunConfig, *, model: ModelConfig, data: DataConfig, steps: int, batch_size: int, seq_len: int, peak: float,
    warmup_steps: int, bias_update_speed: float | None = None,
) -> RunConfig:  # fmt: skip
    """The twin of a published recipe: every change of rate, batch, λ and γ at the same share of the tokens.

    Args:
        config: the recipe.
        model, data, batch_size, seq_len: of the twin; a small batch keeps at most the ramp's number of increments.
        steps: its length; all tokens together follow.
        peak: its learning rate; a small model bears a larger one.
        warmup_steps: the papers' 2,000 would be all of a short run.
        bias_update_speed: γ while the recipe's is above 0; None keeps the recipe's, which hardly moves in few steps.
    Raises: ValueError where the ramp does not fit the batch.
    """
    increments = 1
    if config.batch_ramp is not None:
        increments = (config.batch_size - config.batch_ramp.start) // config.batch_ramp.increment
        pieces = config.batch_size // config.batch_ramp.increment
        if batch_size % pieces:
            raise ValueError(f"batch_size={batch_size}: must be a multiple of {pieces}, the increments in a full batch")

    def of(tokens: int) -> RunConfig:
        ratio = tokens / config.horizon
        ramp = config.batch_ramp
        if ramp is not None:
            increment = ramp.increment * batch_size // config.batch_size
            grown = scaled_tokens(ramp, ratio).tokens
            ramp = BatchRamp(start=batch_size - increments * increment, tokens=grown, increment=increment)
        speed = scaled_tokens(config.bias_update_speed, ratio)
        if bias_update_speed is not None:
            values = tuple(bias_update_speed if value else 0.0 for value in getattr(speed, "values", (speed,)))
            speed = values[0] if not hasattr(speed, "values") else replace(speed, values=values)
        return replace(
            config,
            model=model, data=data, batch_size=batch_size, seq_len=seq_len, steps=None, train_tokens=tokens,
            batch_ramp=ramp, accumulation=config.accumulation if ramp else 1, mesh=MeshConfig(),
            schedule=replace(scaled_tokens(config.schedule, ratio), peak=peak, warmup_steps=warmup_steps),
            mtp_loss_weight=scaled_tokens(config.mtp_loss_weight, ratio), bias_update_speed=speed,
            loss_chunk=min(config.loss_chunk, seq_len), log_every=max(steps // 50, 1), checkpoint_every=max(steps // 2, 1),
            eval_every=0,
        )  # fmt: skip

    # The ramp's own length goes with the tokens, and the steps with both: found by halving.
    low, high = 1, steps * batch_size * seq_len
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if of(middle).last_step <= steps else (low, middle - 1)
    return of(low)


def extended(
    config: RunConfig, *, rope: Rope, init_from: str, seq_len: int, batch_size: int, steps: int, learning_rate: float
) -> RunConfig:
    """A stage of context extension after the run `config`: longer windows, another RoPE, a constant rate, γ = 0.

    λ is the last of `config`. V3, section 4.3, goes from 4K by 32K to 128K in two stages with the YaRN of the published
    model; V2, section 3.1.4, trains at 32K only.

    Args:
        config: the run before.
        rope: with its YaRN scaling, as the published model has it.
        init_from: run folder of the stage before.
        seq_len, batch_size, steps, learning_rate: of this stage; no warm-up, for the rate goes on.
    """
    weight = config.mtp_loss_weight
    return replace(
        config,
        model=replace(config.model, rope=rope, max_position_embeddings=max(seq_len, config.model.max_position_embeddings)),
        schedule=MultiStep(peak=learning_rate, warmup_steps=0, milestones=(), factors=()),
        seq_len=seq_len, batch_size=batch_size, steps=steps, train_tokens=None, batch_ramp=None, accumulation=1,
        mtp_loss_weight=weight.values[-1] if isinstance(weight, ByTokens) else weight,
        bias_update_speed=0.0, init_from=init_from,
    )  # fmt: skip
