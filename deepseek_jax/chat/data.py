"""What fine-tuning reads: files of conversations, the fields of their rows, and how they become windows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from deepseek_jax.config import require
from deepseek_jax.data.sources import Jsonl, Parquet, Tfds, names_of


@dataclass(frozen=True, kw_only=True)
class Messages:
    """A row holds a conversation as a list of messages in OpenAI's form (see `chat.messages`), and maybe tools.

    The roles "human" and "gpt" of ShareGPT's files are read as user and assistant.
    """

    messages: str = "messages"
    """The field of the list."""
    tools: str = "tools"
    """The field of the tools' definitions; rows may lack it."""
    role: str = "role"
    """Who speaks, in a message ("from" in ShareGPT's files)."""
    content: str = "content"
    """What is said ("value" in ShareGPT's files)."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Those that are read."""
        return (self.messages, self.tools)


@dataclass(frozen=True, kw_only=True)
class PromptResponse:
    """A row holds a question and its answer."""

    prompt: str = "prompt"
    response: str = "response"
    system: str | None = None
    """The field of a system message; rows may lack it. None: there is none."""
    reasoning: str | None = None
    """The field of what was thought before the answer; rows may lack it. None: there is none."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Those that are read."""
        return tuple(name for name in (self.prompt, self.response, self.system, self.reasoning) if name)


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """A row holds a question, its choices, and which is right (DeepSeek LLM, section 5.4, tuned a model on 20M such).

    The user's message is the question and the choices by letter, a line each; the assistant's the letter.
    """

    question: str = "question"
    choices: str = "choices"
    """The field of the choices: a list of 2 to 26 texts, or ARC's {"text": [...], "label": [...]}."""
    answer: str = "answer"
    """The field of the right one: its number from 0, its letter (or label), or its text."""
    with_text: bool = False
    """Whether the assistant repeats the choice's text behind its letter."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Those that are read."""
        return (self.question, self.choices, self.answer)


Rows = Messages | PromptResponse | MultipleChoice


@dataclass(frozen=True, kw_only=True)
class _ChatSource:
    """What all kinds share."""

    name: str | None = None
    """What metrics and messages call it: letters, digits, "_", "." and "-". None: from its path."""
    weight: float = 1.0
    """How often an epoch reads its windows: 2 reads each twice, 0.5 every other one of them."""
    rows: Rows = field(default_factory=Messages)
    """What a row holds."""

    @property
    def reads(self) -> Jsonl | Parquet | Tfds:
        """The source of `data.sources` whose files these are."""
        raise NotImplementedError

    @property
    def default_name(self) -> str:
        """The name where none is given."""
        return self.reads.default_name

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, remedy: str) -> None:
            require(condition, type(self).__name__, name, getattr(self, name), remedy)

        check(
            self.name is None or re.fullmatch(r"[\w.-]+", self.name) is not None,
            "name", "must be made of letters, digits, '_', '.' and '-'; metrics carry it",
        )  # fmt: skip
        check(0 < self.weight < float("inf"), "weight", "must be greater than 0 and finite")
        check(all(self.rows.fields), "rows", "a field's name must not be empty")
        _ = self.reads  # its own checks


@dataclass(frozen=True, kw_only=True)
class ChatJsonl(_ChatSource):
    """Conversations in JSON Lines, gzipped where the name ends in .gz."""

    path: str
    """A file, a folder (its *.jsonl and *.jsonl.gz), or a glob."""

    @property
    def reads(self) -> Jsonl:
        return Jsonl(path=self.path)


@dataclass(frozen=True, kw_only=True)
class ChatParquet(_ChatSource):
    """Conversations in Parquet files. Needs pyarrow."""

    path: str
    """A file, a folder (its *.parquet), or a glob."""

    @property
    def reads(self) -> Parquet:
        return Parquet(path=self.path)


@dataclass(frozen=True, kw_only=True)
class ChatTfds(_ChatSource):
    """Conversations of a dataset of TensorFlow Datasets, prepared as array_record."""

    dataset: str
    """Its name, as tfds.load takes it."""
    split: str = "train"
    data_dir: str | None = None
    """Where it is, or will be, prepared. None: $TFDS_DATA_DIR, or ~/tensorflow_datasets."""

    @property
    def reads(self) -> Tfds:
        return Tfds(dataset=self.dataset, split=self.split, data_dir=self.data_dir)


ChatSource = ChatJsonl | ChatParquet | ChatTfds


@dataclass(frozen=True, kw_only=True)
class ChatData:
    """Conversations to learn answers from. The loss is over what the template marks as the assistant's."""

    sources: tuple[ChatSource, ...]
    template: str | None = None
    """Name of the chat template. None: `dsj.sft` takes that of the model it begins with."""
    tokenizer: str = "init"
    """Path of a tokenizer.json; "init": `dsj.sft` takes that of the model it begins with."""
    train_on: Literal["all", "last"] = "all"
    """Which of a conversation's answers are learned. R1's and V3.1's templates drop the reasoning of all but the last."""
    packing: bool = True
    """Whether a window holds as many whole conversations as fit, which do not see one another (V3, section 5.1); else
    one."""
    too_long: Literal["skip", "cut"] = "skip"
    """What becomes of a conversation of more than seq_len + 1 tokens: left out, or its end lost. Counted either way."""
    held_out_fraction: float = 0.02
    """Share of conversations never trained on, chosen by a hash of what comes before the first answer: all answers to a
    question are on one side. 0: none."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return names_of(self.sources)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, remedy: str) -> None:
            require(condition, "ChatData", name, getattr(self, name), remedy)

        kinds = (ChatJsonl, ChatParquet, ChatTfds)
        check(
            isinstance(self.sources, tuple) and len(self.sources) > 0 and all(type(s) in kinds for s in self.sources),
            "sources", "give a tuple of at least one of " + ", ".join(kind.__name__ for kind in kinds),
        )  # fmt: skip
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        check(not twice, "sources", f"two of them have the name {twice[:1]}; metrics tell them apart by it")
        check(self.tokenizer != "", "tokenizer", 'give a tokenizer.json, or "init"')
        check(self.train_on in ("all", "last"), "train_on", "must be 'all' or 'last'")
        check(self.too_long in ("skip", "cut"), "too_long", "must be 'skip' or 'cut'")
        check(0 <= self.held_out_fraction < 1, "held_out_fraction", "must be in [0, 1), such as 0.02")
