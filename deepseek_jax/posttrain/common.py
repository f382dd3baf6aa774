"""What every run of post-training is told: where it begins, its rates, its checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from deepseek_jax.config import Remat, require
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.training.config import AdamW


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A learning rate by updates: linear warm-up, then constant, or a half cosine to `final` times the peak."""

    peak: float
    warmup_steps: int = 0
    shape: Literal["constant", "cosine"] = "constant"
    final: float = 0.1
    """Rate over peak at the end of a cosine."""

    def __post_init__(self) -> None:
        require(self.peak > 0, "Rate", "peak", self.peak, "must be greater than 0")
        require(self.warmup_steps >= 0, "Rate", "warmup_steps", self.warmup_steps, "must not be negative")
        require(self.shape in ("constant", "cosine"), "Rate", "shape", self.shape, "must be 'constant' or 'cosine'")
        require(0 <= self.final <= 1, "Rate", "final", self.final, "must be in [0, 1]")

    def at(self, step: int, steps: int) -> float:
        """Of step `step`, from 0, of `steps`."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)
        return self.peak * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


@dataclass(frozen=True, kw_only=True)
class From:
    """A model of which something is made."""

    init_from: str
    """Run folder (its last good checkpoint) or published checkpoint with the weights of step 0 and the tokenizer."""
    template: str | None = None
    """Chat template by name, or "none": texts as they are. None: that of `init_from`, and where it has none, "none"."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the products; None: what a run was trained in, of a published checkpoint bfloat16, on a CPU float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters that are updated."""
    remat: Remat | None = None
    """What the backward pass computes anew; None: as `init_from` says."""
    seed: int = 0
    verify_checkpoints: Literal["full", "sampled", "off"] = "full"
    """How much of a checkpoint is compared with its SHA-256 manifest before it is restored; "off" writes none either."""

    def __post_init__(self) -> None:
        self.check(bool(self.init_from), "init_from", "give a run folder or a published checkpoint")
        self.check(0 <= self.seed < 2**32, "seed", "must be in [0, 2**32)")

    def check(self, condition: bool, name: str, remedy: str) -> None:
        """Raises ValueError, with the field's value and the remedy, unless the condition holds."""
        require(condition, type(self).__name__, name, getattr(self, name), remedy)


@dataclass(frozen=True, kw_only=True)
class PostConfig(From):
    """What all runs of post-training share."""

    rate: Rate
    optimizer: AdamW = field(default_factory=AdamW)
    loss_chunk: int = 512
    """Places of a sequence whose logits exist at once."""
    log_every: int = 1
    eval_every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    max_skipped_in_a_row: int = 10
    """The run stops when so many updates in a row were not finite, and so were not applied."""
    hang_timeout_s: float = 1800.0
    """Seconds without progress after which the process prints the stacks of all threads and ends; 0: never."""
    writers: tuple[str, ...] = ()
    """Where metrics go beside metrics.jsonl: "tensorboard", "wandb", or "package.module:factory"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("loss_chunk", "log_every", "checkpoint_every", "keep_checkpoints", "max_skipped_in_a_row"):
            self.check(getattr(self, name) > 0, name, "must be greater than 0")
        for name in ("eval_every", "hang_timeout_s"):
            self.check(getattr(self, name) >= 0, name, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class ByEpochs(PostConfig):
    """A run that reads given data so and so often."""

    batch_size: int
    """Of an update, over all devices and pieces: windows of conversations (SFT); pairs, or labelled answers (preferences)."""
    epochs: float | None = None
    """How often the data is read; the last batch is filled from the epoch after. None: `steps` says."""
    steps: int | None = None
    """Batches; None: `epochs` says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            (self.epochs is None) != (self.steps is None), "epochs",
            f"give epochs or steps (= {self.steps!r}), one of the two",
        )  # fmt: skip
        for name in ("batch_size", "epochs", "steps"):
            self.check(getattr(self, name) is None or getattr(self, name) > 0, name, "must be greater than 0")

    def steps_of(self, rows: float) -> int:
        """Batches of the run, of data with so many rows an epoch."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(math.ceil(self.epochs * rows / self.batch_size), 1)
