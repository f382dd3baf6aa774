"""What rewards a run has: each kind a dataclass, `open_rewards` turns them into a scorer.

A reward's score is a number for each completion; the scorer adds them up by `weight`. `name` is what the parts are called
in metrics: by default the kind's own, in lower case, so that two of a kind need names.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deepseek_jax.config import require


def _check(kind: Any, **positive: float) -> None:
    """The fields that all kinds have, and those that must be finite and above 0."""
    owner = type(kind).__name__
    require(math.isfinite(kind.weight), owner, "weight", kind.weight, "must be finite")
    for field, value in positive.items():
        require(math.isfinite(value) and value > 0, owner, field, value, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """1 where the final answer is right, else 0 (R1, section 2.2.2)."""

    verifier: Literal["exact", "math", "plain", "countdown"] = "exact"
    """How it is compared. "exact": the answer tag or last \\boxed{…} is the same number or text. "math": as "exact", and
    what differs goes to math-verify (extra `math`), which also equates formulas, sets and intervals. "plain": the completion
    ends with the reference, for models without tags. "countdown": an expression of the problem's numbers."""
    seconds: float = 5.0
    """"math" alone: how long one comparison may take before its process is killed and the item counted as failed."""
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        _check(self, seconds=self.seconds)
        verifiers = ("exact", "math", "plain", "countdown")
        require(
            self.verifier in verifiers, "Accuracy", "verifier", self.verifier,
            f"must be one of {', '.join(verifiers)}",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Format:
    """1 where the completion is thoughts in think tags and then an answer in answer tags, and nothing else."""

    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class Language:
    """Share of the words of the thoughts that are of the language (R1, section 2.3.2)."""

    language: Literal["en", "zh"] = "en"
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        _check(self)
        require(self.language in ("en", "zh"), "Language", "language", self.language, "must be 'en' or 'zh'")


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """0 up to limit − buffer tokens, then linear to −1 at the limit (DAPO, arXiv 2503.14476, eq. 13)."""

    limit: int
    """Tokens of a completion at which the penalty is whole."""
    buffer: int
    """Tokens before it in which the penalty grows."""
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        _check(self)
        require(
            0 < self.buffer <= self.limit, "Overlong", "buffer", self.buffer, f"must be in (0, limit = {self.limit}]"
        )


@dataclass(frozen=True, kw_only=True)
class Length:
    """Shorter is better within a group (Kimi k1.5, arXiv 2501.12599, section 2.3.3): 0.5 for its shortest completion to
    −0.5 for its longest where the answer is right, and where it is wrong the same but never above 0."""

    of: str = "accuracy"
    """The name of the reward that says, by a score above 0, which answers are right."""
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class Code:
    """The completion's last fenced ```python block, as a program, against the test cases of its problem.

    A problem has them in `extra`, as ("tests", ((input, expected output), …)). Each runs in a process of its own: see
    `rewards/code.py` for what that isolation is and is not. Limits are for one test, but for `budget`.
    """

    score: Literal["share", "all"] = "all"
    """The share of the tests that pass, or 1 only where all do."""
    required: bool = True
    """Whether a problem without tests counts as failed; False, for mixtures of tasks: it scores 0."""
    seconds: float = 10.0
    """Wall time: what ends a program that sleeps. A machine that is busy should not decide what is right, so leave room."""
    cpu_seconds: int = 4
    """Processor time of each process: what ends a program that computes on and on."""
    memory_mb: int = 512
    """Address space of each process."""
    processes: int = 4
    """Processes and threads that may be there at once."""
    files_mb: int = 16
    """What may be written to the temporary folder, and to one file."""
    output_kb: int = 256
    """What may be printed."""
    budget: float = 60.0
    """Wall seconds of all tests of a completion together; tests after them count as not passed."""
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        limits = ("seconds", "cpu_seconds", "memory_mb", "processes", "files_mb", "output_kb", "budget")
        _check(self, **{field: getattr(self, field) for field in limits})
        require(self.score in ("share", "all"), "Code", "score", self.score, "must be 'share' or 'all'")


_JUDGE_PROMPT = """You are grading an answer. Judge whether it is correct, helpful and clear.

Question:
{prompt}

Reference answer (may be empty):
{answer}

Answer to grade:
{completion}"""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A language model's score, from an endpoint that speaks OpenAI's chat completions."""

    base_url: str
    """Such as "http://localhost:8000/v1"."""
    model: str
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is in no configuration."""
    prompt: str = _JUDGE_PROMPT
    """What the judge is asked, with {prompt}, {completion} and {answer}. How it is to write its score is added."""
    scale: tuple[float, float] = (0.0, 10.0)
    """The scores it may give, turned into 0 to 1."""
    timeout: float = 60.0
    """Seconds of one request."""
    retries: int = 2
    """How often a request is asked again after a refusal that may pass (429, 5xx, no connection)."""
    concurrency: int = 8
    """Requests at once."""
    max_tokens: int = 1024
    """Of the judge's answer."""
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        _check(self, timeout=self.timeout, concurrency=self.concurrency, max_tokens=self.max_tokens)
        require(self.base_url.startswith(("http://", "https://")), "Judge", "base_url", self.base_url,
                "must begin with http:// or https://")  # fmt: skip
        low, high = self.scale
        require(math.isfinite(low) and math.isfinite(high) and low < high, "Judge", "scale", self.scale,
                "must be (lowest, highest), finite")  # fmt: skip
        require(self.retries >= 0, "Judge", "retries", self.retries, "must not be negative")
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(self.prompt) if field is not None}
        except ValueError as error:
            raise ValueError(f"Judge.prompt: {error}: write a brace that is meant as {{{{ or }}}}") from None
        require(
            "completion" in fields and fields <= {"prompt", "completion", "answer"},
            "Judge", "prompt", self.prompt,
            "must have {completion}, may have {prompt} and {answer}, and write other braces doubled",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Custom:
    """A function of your own: (problem, completion's text) → score, or (score, {part: number}), or (score, {part: number},
    steps), steps being (characters of the text up to the step's end, its score), … for process rewards.

    It runs in the trainer's process, without a time limit.
    """

    function: str
    """Where it is, "package.module:function"."""
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        _check(self)
        module, _, function = self.function.partition(":")
        require(
            bool(module) and function.isidentifier(), "Custom", "function", self.function,
            "must be 'package.module:function'",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelReward:
    """A reward model's score."""

    path: str
    """Its run folder."""
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        _check(self)
        require(bool(self.path), "ModelReward", "path", self.path, "must be the folder of a reward model")


@dataclass(frozen=True, kw_only=True)
class Only:
    """A reward for some parts of a mixture of problems alone; it gives 0 to the others, and is not asked."""

    reward: Accuracy | Format | Language | Overlong | Code | Judge | Custom | ModelReward
    parts: tuple[str, ...]
    """Names of parts (`prompts.Part`)."""

    @property
    def weight(self) -> float:
        """The reward's."""
        return self.reward.weight

    @property
    def name(self) -> str | None:
        """The reward's."""
        return self.reward.name

    def __post_init__(self) -> None:
        require(len(self.parts) > 0, "Only", "parts", self.parts, "give at least one part's name")


RewardKind = Only | Accuracy | Format | Language | Overlong | Length | Code | Judge | Custom | ModelReward


def name_of(kind: RewardKind) -> str:
    """What the reward is called in metrics."""
    kind = kind.reward if isinstance(kind, Only) else kind
    return kind.name or {"ModelReward": "model"}.get(type(kind).__name__, type(kind).__name__.lower())


def check_parts(rewards: Sequence[RewardKind], problems: Any) -> None:
    """Refuses rewards for parts that the problems (a `prompts.Mix`, or of one kind) do not have.

    Raises: ValueError naming the part.
    """
    known = [part.name for part in getattr(problems, "parts", ())]
    for kind in rewards:
        unknown = [name for name in getattr(kind, "parts", ()) if name not in known]
        require(not unknown, "Only", "parts", unknown, f"must be names of parts of the problems: {known}")
