"""What a run of distillation is: a student, its teachers, and on whose tokens it learns from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_jax.chat.data import ChatData
from deepseek_jax.config import require
from deepseek_jax.data.config import DataConfig
from deepseek_jax.posttrain.common import PostConfig
from deepseek_jax.posttrain.divergence import Divergence
from deepseek_jax.posttrain.prompts import Mix, ProblemFile
from deepseek_jax.posttrain.rewards import RewardKind
from deepseek_jax.posttrain.tasks import ChainSum, Countdown, ReasoningGym, RunningSum


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model that the student learns from."""

    path: str
    """Run folder (its last good checkpoint) or published checkpoint, with the student's tokenizer and vocabulary."""
    weight: float = 1.0
    """w_i of its divergence. Weights need not add up to 1: what they add up to scales the loss."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which its weights are held; all teachers are in memory together."""

    def __post_init__(self) -> None:
        require(bool(self.path), "Teacher", "path", self.path, "give a run folder or a published checkpoint")
        require(0 < self.weight < float("inf"), "Teacher", "weight", self.weight, "must be greater than 0 and finite")


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Reverse divergence on what the student writes (V4): a step samples `samples` completions of each of `prompts`
    problems, and minimises Σ_i w_i KL(student ‖ teacher_i) over the whole vocabulary, averaged over the sampled tokens.

    The gradient is exact through the student's probabilities at the contexts that were sampled; that the student could
    come into other contexts (the score-function part) is left out, as in V4.
    """

    problems: RunningSum | ChainSum | Countdown | ReasoningGym | ProblemFile | Mix
    prompts: int = 32
    samples: int = 4
    max_prompt_tokens: int = 512
    """Problems with longer prompts are passed over, and counted."""
    max_new_tokens: int = 1024
    temperature: float = 1.0
    """That completions are sampled at. The divergence is between the distributions at temperature 1 whatever it is."""
    slots: int = 64
    """Completions that are decoded at once."""
    eval_problems: int = 64
    """Problems of the test split that an evaluation answers."""
    rewards: tuple[RewardKind, ...] = ()
    """What an evaluation judges greedy answers by; () samples no greedy answers. Nothing is learned from rewards."""
    reward_workers: int = 2
    """Processes of each reward that has processes."""
    allow_unsafe_code: bool = False
    """Run code of completions also where this machine cannot isolate it (see `rewards.Code`)."""

    def __post_init__(self) -> None:
        for name in (
            "prompts", "samples", "max_prompt_tokens", "max_new_tokens", "slots", "eval_problems", "reward_workers",
            "temperature",
        ):  # fmt: skip
            require(getattr(self, name) > 0, "OnPolicy", name, getattr(self, name), "must be greater than 0")

    @property
    def rows(self) -> int:
        """Of a step."""
        return self.prompts * self.samples

    @property
    def places(self) -> int:
        """Of a row, at most; with its last token."""
        return self.max_prompt_tokens + self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class FromLogits:
    """Forward divergence on given tokens, such as answers that the teacher wrote: KL(teacher ‖ student), averaged over the
    tokens that the data counts (a conversation's answers, all tokens of documents)."""

    data: ChatData | DataConfig
    """Conversations or documents, encoded by the student's tokenizer."""
    batch_size: int
    """Windows of an update."""
    seq_len: int
    """Tokens predicted in a window."""
    top_k: int | None = None
    """Compare the teachers' k likeliest tokens, and "another one" (see `Divergence`); None: the whole vocabulary."""
    stored: bool = False
    """Whether the teachers' k likeliest tokens are worked out before the first step, into the run's folder, for every window
    of the data, so that the teachers are not in memory while the student learns: 8 k + 4 bytes a token and teacher."""
    temperature: float = 1.0
    """τ of both softmaxes."""
    mix: float = 0.0
    """Share of the cross-entropy of the data's tokens in the loss."""
    eval_sequences: int = 64
    """Held-out windows of one evaluation, at most, of each source."""

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, remedy: str) -> None:
            require(condition, "FromLogits", name, getattr(self, name), remedy)

        for name in ("batch_size", "seq_len", "temperature", "eval_sequences"):
            check(getattr(self, name) > 0, name, "must be greater than 0")
        check(self.top_k is None or self.top_k > 0, "top_k", "must be greater than 0, or None for the whole vocabulary")
        check(
            not self.stored or self.top_k is not None, "stored", "needs top_k: whole distributions are not written down"
        )
        check(0 <= self.mix < 1, "mix", "must be in [0, 1); with 1 nothing would come from a teacher: use dsj.sft")
        extra = self.data.extra_tokens if isinstance(self.data, DataConfig) else ()
        check(not extra, "data", "must have no extra_tokens: the student's tokenizer is used as it is")

    @property
    def rows(self) -> int:
        """Of a step."""
        return self.batch_size

    @property
    def places(self) -> int:
        """Of a row; with its last token."""
        return self.seq_len + 1


@dataclass(frozen=True, kw_only=True)
class Distill(PostConfig):
    """Learning from other models' probabilities. `init_from` is the student.

    Distillation by samples alone (R1's students) is `dsj.sft` on the teacher's answers.
    """

    teachers: tuple[Teacher, ...]
    method: OnPolicy | FromLogits
    steps: int
    pieces: int = 1
    """In how many an update is worked off, one after the other; less memory, the same update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(len(self.teachers) > 0, "teachers", "give at least one")
        for name in ("steps", "pieces"):
            self.check(getattr(self, name) > 0, name, "must be greater than 0")
        rows = self.method.rows
        self.check(rows % self.pieces == 0, "pieces", f"must divide the {rows} rows of a step")
        data = self.method.data if isinstance(self.method, FromLogits) else None
        named = data.template if isinstance(data, ChatData) else None
        self.check(
            None in (self.template, named) or self.template == named, "template",
            f"differs from method.data.template = {named!r}: name it once",
        )  # fmt: skip

    @property
    def divergence(self) -> Divergence:
        """What is minimised at a place."""
        weights, method = tuple(teacher.weight for teacher in self.teachers), self.method
        if isinstance(method, OnPolicy):
            return Divergence(weights, "reverse")
        return Divergence(weights, "forward", method.temperature, method.mix, method.top_k)
