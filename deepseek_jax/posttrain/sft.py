"""Supervised fine-tuning: the loop of pre-training over conversations.

A run of it is a `RunConfig` like any other, so checkpoints, exact resume, the guard, evaluation, meshes and the running
mean of the weights are those of `dsj.train`, and its folder opens, converts and goes on as any run's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

from deepseek_jax import storage
from deepseek_jax.chat.data import ChatData
from deepseek_jax.chat.dataset import Chats, load_chats
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttrain.begin import open_start, own_template
from deepseek_jax.posttrain.common import ByEpochs, Rate
from deepseek_jax.serialize import check_types
from deepseek_jax.training.config import RunConfig, SpikeSkip
from deepseek_jax.training.loop import train
from deepseek_jax.training.lora import LoRA
from deepseek_jax.training.run import Run
from deepseek_jax.training.schedule import Phase, Phases


@dataclass(frozen=True, kw_only=True)
class SFT(ByEpochs):
    """A fine-tuning run. V3: 2 epochs, `Rate(peak=5e-6, shape="cosine", final=0.2)`; R1: 2 to 3 epochs,
    `Rate(peak=5e-5, shape="cosine", final=0.1)`, batch_size 128, seq_len 32768."""

    data: ChatData
    seq_len: int
    """Tokens predicted in a window; conversations of more than one token more are too long."""
    accumulation: int = 1
    """Pieces in which a batch is worked off, one after the other; the result does not depend on it."""
    mtp: Literal["keep", "drop"] = "keep"
    """Whether multi-token modules are trained along, or left out of the run and of what it leaves."""
    mtp_loss_weight: float = 0.1
    """λ of the multi-token loss; V3's at the end of pre-training. The report says nothing of it in fine-tuning."""
    bias_update_speed: float = 0.0
    """γ of the selection bias. V3 ends pre-training with 0; a few kinds of conversations say little about a fair load,
    and balancing by them would send their tokens past the experts that know them."""
    lora: LoRA | None = None
    """Trains low-rank adapters of the weights in place of the weights; what the run leaves is merged."""
    ema_decay: float | None = None
    """Decay a step of a running mean of the weights, kept beside them and evaluated too."""
    spike_skip: SpikeSkip | None = None
    eval_sequences: int = 64
    """Held-out windows of one evaluation, at most, of each source."""
    on_save_error: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seq_len", "accumulation", "eval_sequences"):
            self.check(getattr(self, name) > 0, name, "must be greater than 0")
        for name in ("mtp_loss_weight", "bias_update_speed"):
            self.check(getattr(self, name) >= 0, name, "must not be negative")
        self.check(self.mtp in ("keep", "drop"), "mtp", "must be 'keep' or 'drop'")
        self.check(
            None in (self.template, self.data.template) or self.template == self.data.template, "template",
            f"differs from data.template = {self.data.template!r}: name it once",
        )  # fmt: skip


def sft(config: SFT, run_dir: str | os.PathLike[str], *, progress: bool = True) -> Run:
    """Fine-tune, or continue the run in `run_dir` from its last good checkpoint.

    Args:
        config: of the run.
        run_dir: its folder; as `dsj.train` leaves it. Its manifest names the template, so that `open_model`, `chat` and
            `serve` use it.
        progress: whether progress goes to stderr.

    Raises: as `dsj.train`; ValueError for a model without template where none is named, and for data of which nothing
        can be learned.
    """
    run, data = prepare(config, progress=progress)
    return train(run, run_dir, progress=progress, data=data)


def prepare(config: SFT, *, progress: bool = True) -> tuple[RunConfig, Chats]:
    """The training run that a fine-tuning run is, and its data, loaded. (`dsj.certify` takes the first.)

    Raises: ValueError as `sft`, before anything is written.
    """
    check_types(config)
    mesh = make_mesh(config.mesh)
    named = replace(config, template=config.template or config.data.template)
    start = open_start(named, mesh, mtp=config.mtp == "keep")
    model = start.model.config
    template = own_template(config, start)
    own = storage.path(config.init_from) / "tokenizer.json"
    tokenizer = str(own) if config.data.tokenizer == "init" else config.data.tokenizer
    chats = replace(config.data, template=template, tokenizer=tokenizer)
    data = load_chats(chats, config.seq_len, None, model_vocab_size=model.vocab_size, progress=progress)
    steps = config.steps_of(data.epoch_windows)
    shared = (
        "seq_len", "batch_size", "accumulation", "optimizer", "mesh", "init_from", "loss_chunk", "seed", "log_every",
        "eval_every", "eval_sequences", "checkpoint_every", "keep_checkpoints", "verify_checkpoints", "on_save_error",
        "spike_skip", "max_skipped_in_a_row", "hang_timeout_s", "writers", "mtp_loss_weight", "bias_update_speed",
        "lora", "ema_decay",
    )  # fmt: skip
    run = RunConfig(
        model=model,
        data=chats,
        steps=steps,
        schedule=schedule_of(config.rate, steps, config.batch_size * config.seq_len),
        **{name: getattr(config, name) for name in shared},
    )
    return run, data


def schedule_of(rate: Rate, steps: int, tokens_per_step: int) -> Phases:
    """A `Rate` over so many steps as a schedule by tokens, with the same value at every step."""
    warmup = min(rate.warmup_steps, steps - 1)
    before = () if warmup == 0 else (Phase(tokens=warmup * tokens_per_step, factor=1.0),)
    cosine = rate.shape == "cosine"
    rest = Phase(
        tokens=(steps - warmup) * tokens_per_step,
        factor=max(rate.final, 1e-12) if cosine else 1.0,  # a phase does not end at 0, which no step would read
        shape=rate.shape,
    )
    return Phases(peak=rate.peak, warmup_steps=rate.warmup_steps, phases=(*before, rest))
