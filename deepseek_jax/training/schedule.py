"""Rates and batch sizes of a run, as the papers print them: by tokens.

Everything here is arithmetic of the host, in whole numbers and float64: 14.8T tokens fit neither an int32 nor the 24
bits of a float32. The train step gets the rates as a table, a row an update.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from deepseek_jax.config import require


@dataclass(frozen=True, kw_only=True)
class MultiStep:
    """Linear warm-up, then a constant rate that drops at given shares of the tokens (DeepSeek LLM, section 2.3)."""

    peak: float
    """Learning rate after warm-up."""
    warmup_steps: int = 2000
    milestones: tuple[float, ...] = (0.8, 0.9)
    """Shares of all training tokens at which the rate changes."""
    factors: tuple[float, ...] = (0.316, 0.1)
    """Rate over `peak` from each milestone on."""

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, remedy: str) -> None:
            require(condition, "MultiStep", name, getattr(self, name), remedy)

        _check_peak(self)
        check(
            list(self.milestones) == sorted(self.milestones) and all(0 < m < 1 for m in self.milestones),
            "milestones", "must rise and lie between 0 and 1",
        )  # fmt: skip
        check(len(self.factors) == len(self.milestones), "factors", f"needs one per milestone: {self.milestones}")
        check(all(factor > 0 for factor in self.factors), "factors", "must be greater than 0")

    def factor(self, tokens: np.ndarray, horizon: int) -> np.ndarray:
        """Rate over peak, warm-up aside, of updates before which `tokens` were read; `horizon`: all training tokens."""
        share = np.ones(np.shape(tokens))
        for milestone, factor in zip(self.milestones, self.factors, strict=True):
            share = np.where(tokens >= milestone * horizon, factor, share)
        return share


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training."""

    tokens: int
    """Its length."""
    factor: float
    """Rate over the schedule's peak: throughout for "constant", at its end for "cosine"."""
    shape: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        require(self.tokens > 0, "Phase", "tokens", self.tokens, "must be greater than 0")
        require(self.factor > 0, "Phase", "factor", self.factor, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Linear warm-up, then stretches of constant or cosine rate, in tokens (V3, section 4.2). The last factor stays."""

    peak: float
    warmup_steps: int = 2000
    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        _check_peak(self)
        require(len(self.phases) > 0, "Phases", "phases", self.phases, "give at least one Phase")

    def factor(self, tokens: np.ndarray, horizon: int) -> np.ndarray:
        """As `MultiStep.factor`; `horizon` does not matter, since the phases say their lengths."""
        tokens = np.asarray(tokens, np.float64)
        share = np.full(tokens.shape, self.phases[-1].factor)
        begin, before = 0, 1.0
        for phase in self.phases:
            inside = (tokens >= begin) & (tokens < begin + phase.tokens)
            value: Any = phase.factor
            if phase.shape == "cosine":
                bend = 0.5 * (1 + np.cos(np.pi * (tokens - begin) / phase.tokens))
                value = phase.factor + (before - phase.factor) * bend
            share = np.where(inside, value, share)
            begin, before = begin + phase.tokens, phase.factor
        return share


Schedule = MultiStep | Phases


@dataclass(frozen=True, kw_only=True)
class ByTokens:
    """A value that changes once given numbers of tokens have been read, such as λ and γ of V3 (section 4.2)."""

    values: tuple[float, ...]
    boundaries: tuple[int, ...]
    """Tokens after which the next value holds: one fewer than values."""

    def __post_init__(self) -> None:
        require(
            all(value >= 0 for value in self.values), "ByTokens", "values", self.values, "must not be negative",
        )  # fmt: skip
        require(
            len(self.boundaries) == len(self.values) - 1 and list(self.boundaries) == sorted(set(self.boundaries)),
            "ByTokens", "boundaries", self.boundaries, f"must rise, and be one fewer than values = {self.values}",
        )  # fmt: skip

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """The value for updates before which `tokens` were read."""
        return np.asarray(self.values, np.float64)[np.searchsorted(self.boundaries, tokens, side="right")]


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """A batch that grows from `start` to the run's batch_size over the first `tokens`, in equal increments that are
    spread evenly over those tokens (V2 and V3 print both ends and the tokens, not the shape between)."""

    start: int
    """Sequences of the first steps."""
    tokens: int
    """The full batch is reached after that many."""
    increment: int
    """Sequences by which the batch grows at a time."""

    def __post_init__(self) -> None:
        for name in ("start", "tokens", "increment"):
            require(getattr(self, name) > 0, "BatchRamp", name, getattr(self, name), "must be greater than 0")


class Stage(NamedTuple):
    """Steps of one batch size."""

    first_step: int
    first_token: int
    batch_size: int


class Plan(NamedTuple):
    """Which steps read which tokens."""

    stages: tuple[Stage, ...]
    seq_len: int

    def batch_size(self, step: int) -> int:
        """Sequences that step `step` (from 0) reads."""
        return self._stage(step).batch_size

    def tokens_before(self, step: int) -> int:
        """Tokens read by all steps before `step`."""
        stage = self._stage(step)
        return stage.first_token + (step - stage.first_step) * stage.batch_size * self.seq_len

    def steps_for(self, tokens: int) -> int:
        """The fewest steps that read at least `tokens`."""
        stage = max((s for s in self.stages if s.first_token < tokens), default=self.stages[0])
        return stage.first_step + -(-(tokens - stage.first_token) // (stage.batch_size * self.seq_len))

    def step_of(self, sequence: int) -> int:
        """The step that reads a sequence, both counted from 0."""
        token = sequence * self.seq_len
        stage = max(stage for stage in self.stages if stage.first_token <= token)
        return stage.first_step + (token - stage.first_token) // (stage.batch_size * self.seq_len)

    def all_tokens_before(self, steps: int) -> np.ndarray:
        """`tokens_before` of steps 0 … steps - 1, int64 [steps]."""
        tokens = np.empty(steps, np.int64)
        for stage in self.stages:
            rest = np.arange(max(steps - stage.first_step, 0), dtype=np.int64)
            tokens[stage.first_step :] = stage.first_token + rest * (stage.batch_size * self.seq_len)
        return tokens

    def _stage(self, step: int) -> Stage:
        return max(stage for stage in self.stages if stage.first_step <= step)


@functools.lru_cache(maxsize=64)
def make_plan(batch_size: int, seq_len: int, ramp: BatchRamp | None) -> Plan:
    """The stages of a ramp, or the one stage of a constant batch."""
    if ramp is None:
        return Plan((Stage(0, 0, batch_size),), seq_len)
    stages = [Stage(0, 0, ramp.start)]
    grown = batch_size - ramp.start
    for size in range(ramp.start + ramp.increment, batch_size + 1, ramp.increment):
        last = stages[-1]
        threshold = -(-ramp.tokens * (size - ramp.start) // grown)  # tokens, rounded up
        per_step = last.batch_size * seq_len
        steps = max(-(-(threshold - last.first_token) // per_step), 0)
        stage = Stage(last.first_step + steps, last.first_token + steps * per_step, size)
        if steps == 0:
            stages.pop()  # one step can read more than an increment's share of the tokens
        stages.append(stage)
    return Plan(tuple(stages), seq_len)


RATES = ("learning_rate", "mtp_loss_weight", "bias_update_speed")


def rates(config: Any) -> np.ndarray:
    """The columns `RATES` for every update of the `RunConfig`, float64 [steps, 3].

    Row u is of the update after u others: linear warm-up by updates, all else by the tokens read before it.
    """
    steps = config.last_step
    tokens = config.plan.all_tokens_before(steps)
    warmup = np.minimum((np.arange(steps) + 1) / max(config.schedule.warmup_steps, 1), 1)
    learning_rate = config.schedule.peak * warmup * config.schedule.factor(tokens, config.horizon)

    def value(rate: float | ByTokens) -> np.ndarray:
        return rate.at(tokens) if isinstance(rate, ByTokens) else np.full(steps, rate)

    return np.stack([learning_rate, value(config.mtp_loss_weight), value(config.bias_update_speed)], axis=1)


def scaled_tokens(part: Any, ratio: float) -> Any:
    """A schedule, ramp or `ByTokens` with every number of tokens multiplied: a recipe for a shorter run."""

    def short(tokens: int) -> int:
        return max(math.ceil(tokens * ratio), 1)

    if isinstance(part, Phases):
        return replace(part, phases=tuple(replace(p, tokens=short(p.tokens)) for p in part.phases))
    if isinstance(part, ByTokens):
        return replace(part, boundaries=tuple(map(short, part.boundaries)))
    return replace(part, tokens=short(part.tokens)) if isinstance(part, BatchRamp) else part


def _check_peak(schedule: Any) -> None:
    kind = type(schedule).__name__
    require(schedule.peak > 0, kind, "peak", schedule.peak, "must be greater than 0")
    require(schedule.warmup_steps >= 0, kind, "warmup_steps", schedule.warmup_steps, "must not be negative")
