"""What is planned: a run, on a machine, and which of its steps."""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from deepseek_jax.config import ModelConfig, require
from deepseek_jax.data.config import DataConfig
from deepseek_jax.hardware import Device
from deepseek_jax.layers.expert_parallel import Exchange
from deepseek_jax.parallel.bubbles import Schedule, idle_share
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.one_f_one_b import places
from deepseek_jax.parallel.pipeline import SCHEDULES
from deepseek_jax.parallel.ring import check_length
from deepseek_jax.parallel.rules import RULES
from deepseek_jax.planner.topology import Topology
from deepseek_jax.serialize import check_field
from deepseek_jax.training.config import AdamW, RunConfig
from deepseek_jax.training.schedule import MultiStep

Step = Literal["train", "grpo", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A run on a machine. `run.mesh`, `run.batch_size` and `run.seq_len` are those of the step that is planned.

    For `prefill` and `decode` the batch is the sequences that are served at once and `seq_len` the places of each cache;
    weights are then kept in the compute dtype.
    """

    run: RunConfig
    topology: Topology
    step: Step = "train"
    schedule: Schedule | None = None
    """Whose idle time to count where `run.pipeline` is there; None: that of the pipeline itself. Memory is that of the
    pipeline in any case."""
    tokens: float | None = None
    """To train on, or to serve; for hours and money."""

    def __post_init__(self) -> None:
        require(self.step in get_args(Step), "PlanRequest", "step", self.step, f"must be one of {get_args(Step)}")
        require(
            self.schedule in (None, *get_args(Schedule)), "PlanRequest", "schedule", self.schedule,
            f"must be one of {get_args(Schedule)}",
        )  # fmt: skip
        tokens = self.tokens
        known = tokens is None or (isinstance(tokens, int | float) and 0 < tokens < math.inf)
        require(known, "PlanRequest", "tokens", tokens, "must be a number greater than 0")
        slices = self.degrees["slice"]
        require(
            self.topology.slices in (1, slices), "PlanRequest", "topology", f"{self.topology.slices} slices",
            f"the mesh has slice = {slices}; both must be the same",
        )  # fmt: skip
        split = self.split("batch")
        rows = self.run.piece_size
        if rows % split:
            near = max(1, round(rows / split)) * split * self.run.accumulation
            axes = " × ".join(f"{axis} {self.degrees[axis]}" for axis in RULES["batch"] if self.degrees[axis] > 1)
            raise ValueError(
                f"batch {self.run.batch_size} in {self.run.accumulation} piece(s): {rows} sequences are not divisible by "
                f"{axes} = {split}; the nearest batch that works is {near}"
            )
        check_length(self.run.seq_len, self.split("length"), "seq")
        if (pipeline := self.run.pipeline) is not None:
            stages = self.degrees["stage"]
            pipeline.check_layers(stages, self.piped_layers)
            pipeline.check_rows(stages, rows, split // stages)

    @property
    def model(self) -> ModelConfig:
        return self.run.model

    @property
    def device(self) -> Device:
        return self.topology.kind

    @cached_property
    def degrees(self) -> dict[str, int]:
        """Mesh axis -> degree."""
        return self.run.mesh.resolved(self.topology.devices)

    @property
    def trains(self) -> bool:
        return self.step in ("train", "grpo")

    @property
    def moments_at_host(self) -> bool:
        """Whether the step finds its moments there; updates of reinforcement learning have them on the device."""
        return self.step == "train" and self.run.moments_on == "host"

    @property
    def host_share(self) -> int:
        """Bytes of its host's memory that a device may count on."""
        assert self.device.host_memory
        return int(self.device.host_memory / self.device.per_host)

    def split(self, *names: str) -> int:
        """In how many parts the mesh splits dims with these logical axes."""
        return math.prod(self.degrees[axis] for name in names for axis in RULES[name])

    @property
    def exchange(self) -> Exchange:
        """How experts are served."""
        return Exchange.of(self.model)

    @property
    def slices_of_experts(self) -> int:
        """Slices that hold experts of their own; 1 where each holds all."""
        return self.split(self.exchange.axis) // self.split("expert")

    @property
    def idle_share(self) -> float:
        """Of a step, what stages of the pipeline wait for one another."""
        return self._idle(self.schedule)

    def _idle(self, schedule: Schedule | None) -> float:
        """The same by a schedule; None: that of the pipeline itself."""
        pipeline, stages = self.run.pipeline, self.degrees["stage"]
        if pipeline is None or self.step != "train" or stages == 1:
            return 0.0
        schedule = schedule or ("gpipe" if pipeline.chunks == 1 else "interleaved")
        return idle_share(schedule, stages, pipeline.microbatches, pipeline.chunks)

    @property
    def not_built(self) -> str | None:
        """The schedule whose idle time alone is counted, since no pipeline here runs it."""
        built = (None, *SCHEDULES, "interleaved")
        return None if self.piped_stack is None or self.schedule in built else self.schedule

    @property
    def pipeline_words(self) -> dict[str, Any]:
        """Schedule, microbatches and chunks, for --json; all None where no pipeline runs."""
        pipeline = self.run.pipeline
        if pipeline is None or self.piped_stack is None:
            return {"schedule": None, "microbatches": None, "chunks": None}
        own = "interleaved" if pipeline.schedule == "gpipe" and pipeline.chunks > 1 else pipeline.schedule
        return {"schedule": self.schedule or own, "microbatches": pipeline.microbatches, "chunks": pipeline.chunks}

    @property
    def piped_stack(self) -> str | None:
        """The loop over layers that runs as a pipeline; None where none does."""
        if self.run.pipeline is None or self.degrees["stage"] == 1 or self.step != "train":
            return None
        return "moe_layers" if self.model.num_moe_layers else "dense_layers"

    @property
    def piped_layers(self) -> int:
        """Layers of the loop that a pipeline takes."""
        return self.model.num_moe_layers or self.model.num_dense_layers

    @property
    def pipeline_ticks(self) -> int:
        """In which each stage applies a chunk of layers, forward; 0 without a pipeline."""
        if self.run.pipeline is None or self.piped_stack is None:
            return 0
        return self.run.pipeline.microbatches * self.run.pipeline.chunks + self.degrees["stage"] - 1

    @property
    def layers_of_a_chunk(self) -> int:
        """Of a pipeline; chunks are of equal length, filled up with empty layers."""
        assert self.run.pipeline is not None
        return -(-self.piped_layers // (self.degrees["stage"] * self.run.pipeline.chunks))

    @property
    def empty_layers(self) -> int:
        """Layers that a pipeline computes and keeps beside those of the model."""
        if self.run.pipeline is None or self.piped_stack is None:
            return 0
        places = self.degrees["stage"] * self.run.pipeline.chunks * self.layers_of_a_chunk
        return places - self.piped_layers

    def computed_layers(self, stack: str, layers: int) -> int:
        """Of a loop over so many layers, a pipeline's empty ones with them."""
        return layers + (self.empty_layers if stack == self.piped_stack else 0)

    @property
    def redone(self) -> Literal["none", "v3", "full"]:
        """What the backward pass of the piped layers, or of all, works out again: a `remat` that keeps as much."""
        remat = self.model.remat
        return "full" if self.one_f_one_b or remat == "offload" else remat

    @property
    def ring(self) -> bool:
        """Whether tokens get to their experts by the ring, which serving always takes."""
        return self.model.expert_exchange == "ring" or not self.trains

    @property
    def one_f_one_b(self) -> bool:
        """Whether what is planned is a training step through a 1F1B pipeline."""
        pipeline = self.run.pipeline
        return pipeline is not None and self.piped_stack is not None and pipeline.schedule == "1f1b"

    def rows_in_use(self, stack: str | None) -> float:
        """Sequences of a device that a layer of a stack (None: head and losses) works on at once: all, or a microbatch's."""
        by_microbatch = {self.piped_stack, "mtp", None} if self.one_f_one_b else {self.piped_stack} - {None}
        if self.run.pipeline is None or stack not in by_microbatch:
            return self.rows
        return self.rows * self.degrees["stage"] / self.run.pipeline.microbatches

    def rows_kept(self, stack: str) -> float:
        """Sequences of a device for which a stack keeps what the backward pass reads."""
        pipeline = self.run.pipeline
        if not self.one_f_one_b or pipeline is None:
            # Stages work, and save, in the ticks too in which they have nothing of the batch.
            return self.rows / (1 - self._idle(None))
        if stack == self.piped_stack:
            kept = sum(places(self.degrees["stage"], pipeline.chunks))
            return self.rows * kept / (pipeline.chunks * pipeline.microbatches)
        return self.rows_in_use(stack)

    @property
    def rows(self) -> int:
        """Sequences of a device that are worked off at once."""
        return self.run.piece_size // self.split("batch")

    @property
    def length(self) -> int:
        """Tokens of a sequence on a device."""
        return self.run.seq_len // self.split("length")


def parse_mesh(text: str) -> MeshConfig:
    """ "fsdp=64,expert=8" as a `MeshConfig`; axes that are not named are 1, or whatever is left where one is -1.

    Raises:
        ValueError: an unknown axis (the closest is named), or no whole number.
    """
    degrees: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if equals and not re.fullmatch("-?[0-9]+", value):
            raise ValueError(f"--mesh {text!r}: {part!r} must be AXIS=NUMBER")
        if name in degrees:
            raise ValueError(f"--mesh {text!r}: axis {name!r} is given twice")
        _check_axis(name, f"--mesh {text!r}")
        if not equals:
            raise ValueError(f"--mesh {text!r}: {part!r} must be AXIS=NUMBER")
        degrees[name] = int(value)
    return mesh_of(degrees, f"--mesh {text!r}")


def mesh_of(degrees: Mapping[str, int], where: str) -> MeshConfig:
    """Degrees by axis as a `MeshConfig`; axes that are not named are 1. `where` opens the message of a refusal."""
    for name, degree in degrees.items():
        _check_axis(name, where)
        if type(degree) is not int:
            raise ValueError(f"{where}: {name} = {degree!r}: must be a whole number")
    return MeshConfig(**{"data": 1, **degrees})


def _check_axis(name: str, where: str) -> None:
    known = [field.name for field in fields(MeshConfig)]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        meant = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"{where}: no axis is named {name!r}; {meant}axes are {', '.join(known)}")


def run_of(model: ModelConfig, **given) -> RunConfig:
    """A run of `model` for planning alone: its data and its learning rates matter to no plan."""
    data = DataConfig(tokenizer="unused")
    return RunConfig(model=model, schedule=MultiStep(peak=1e-4, warmup_steps=2), steps=10, data=data, **given)


def changed(
    run: RunConfig, *, remat: str | None = None, moments: str | None = None, moments_on: str | None = None,
    mtp: bool = True, dtype: str | None = None,
) -> RunConfig:  # fmt: skip
    """`run` with the settings that a plan is asked about."""
    model = run.model
    given = {"remat": remat, "param_dtype": dtype}
    model = replace(model, **{name: value for name, value in given.items() if value is not None})
    if not mtp:
        model = replace(model, num_nextn_predict_layers=0)
    optimizer: AdamW = run.optimizer
    if moments is not None:
        optimizer = replace(optimizer, moment_dtype=moments)
    return replace(run, model=model, optimizer=optimizer, moments_on=moments_on or run.moments_on)


def described(request: PlanRequest) -> str:
    """The mesh in words: "fsdp 64 × expert 8"."""
    return " × ".join(f"{axis} {n}" for axis, n in request.degrees.items() if n > 1) or "one device"


def parse_fields(model: ModelConfig, words: Sequence[str]) -> dict[str, object]:
    """Fields of a model as typed: "num_hidden_layers=4", "dtype=bfloat16".

    Raises:
        ValueError: no such field (the closest is named), or no value.
    """
    known = [field.name for field in fields(model)]
    found: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in known or not equals:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
            raise ValueError(
                f"--set {word!r}: must be FIELD=VALUE of a model; did you mean {close[0] if close else known}?"
            )
        found[name] = check_field(type(model), name, _literal(value), f"--set {word}")
    return found


def _literal(value: str) -> object:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
