"""What the policy is asked: problems in an order that a seed decides, and as ids."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepseek_jax.chat.template import Template
from deepseek_jax.config import require
from deepseek_jax.data.pipeline import Mixture
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.posttrain.rows import Endless, Order
from deepseek_jax.posttrain.tasks import (
    ChainSum,
    Countdown,
    Problem,
    ReasoningGym,
    RunningSum,
    Split,
    problem,
    read_problems,
    split_of,
)


@dataclass(frozen=True, kw_only=True)
class ProblemFile:
    """Problems of a JSONL file: an object a line. Split by their prompts, as those of a task are."""

    path: str
    prompt: str = "prompt"
    """The field of the question."""
    answer: str = "answer"
    """The field of the reference."""

    def __post_init__(self) -> None:
        require(bool(self.path), "ProblemFile", "path", self.path, "give a JSONL file")


Source = RunningSum | ChainSum | Countdown | ReasoningGym | ProblemFile


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of a mixture's problems."""

    name: str
    """What rewards (`Only`) and messages call it."""
    problems: Source
    weight: float = 1.0
    """Its share of the problems, relative to the other parts' weights."""

    def __post_init__(self) -> None:
        require(bool(self.name), "Part", "name", self.name, "give it a name")
        require(0 < self.weight < math.inf, "Part", "weight", self.weight, "must be greater than 0 and finite")


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Problems of several kinds, interleaved evenly in fixed proportions."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        require(len(names) > 0 and len(set(names)) == len(names), "Mix", "parts", names, "must have names that differ")


class Problems(Endless):
    """Problems without end, each by its number; the position is the number of the next one."""

    def __init__(self, source: Source | Mix, split: Split, seed: int):
        """
        Raises: ValueError for a file that cannot be read, or holds no problem of the split.
        """
        self._source, self._seed = source, seed
        self._split: Split = split
        self._file: list[Problem] | None = None
        self._order: Order | None = None
        self._parts: Mixture | None = None
        if isinstance(source, Mix):
            parts = [Problems(part.problems, split, seed) for part in source.parts]
            self._parts = Mixture(parts, [part.weight for part in source.parts])
        if isinstance(source, ProblemFile):
            every = read_problems(source.path, prompt=source.prompt, answer=source.answer)
            self._file = [p for p in every if split_of(p.prompt) == split]
            if not self._file:
                raise ValueError(
                    f"ProblemFile.path = {source.path!r}: none of its {len(every)} problems is of the split {split!r}, "
                    f"which holds {'nine' if split == 'train' else 'one'} in ten: give more problems"
                )
            self._order = Order(len(self._file), seed)

    def __getitem__(self, index: int) -> Problem:
        """Problem number `index`; those of a file come in a new order each epoch."""
        if self._parts is not None:
            assert isinstance(self._source, Mix)
            part, inner = self._parts.place(index)
            return replace(self._parts.sources[part][inner], source=self._source.parts[part].name)
        if self._file is None or self._order is None:
            assert not isinstance(self._source, ProblemFile | Mix)
            return problem(self._source, self._split, index, self._seed)
        return self._file[self._order[index]]

    @property
    def fingerprint(self) -> str:
        """Hex hash of the problems of files; what a task draws follows from its configuration."""
        parts = [part.fingerprint for part in self._parts.sources] if self._parts is not None else [repr(self._file)]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Prompter:
    """How a problem becomes the ids that the policy goes on from, and a continuation a text that rewards read.

    Fields:
        tokenizer: of the policy.
        template: chat template; None: the problem's text behind the token that begins a document.
        stop_ids: tokens that end a completion.
        opened: what the prompt writes of the answer already, such as `<think>` and a line break; completions get it back.
    """

    tokenizer: Tokenizer
    template: Any
    stop_ids: tuple[int, ...]
    opened: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: Any) -> Prompter:
        """Raises: ValueError where the tokenizer lacks a token that the template needs."""
        if template is None:
            return cls(tokenizer, None, (tokenizer.eos_id,), "")
        if not isinstance(template, Template):
            raise ValueError(
                f"the template of the folder is a text of its own ({template.name}): name one of ours in `template`, so that "
                f"it is known where answers begin and end"
            )
        thinking = template.thinks != "never"
        question: Any = [{"role": "user", "content": "?"}]
        template.encode(tokenizer, question, thinking=thinking)  # now, rather than at the first problem
        text = template.render(question, thinking=thinking)
        opened = text[text.rindex("<think>") :] if text.rstrip().endswith("<think>") else ""
        return cls(tokenizer, template, tuple(template.stop_ids(tokenizer)), opened)

    def ids(self, prompt: str) -> list[int]:
        """Of the prompt, up to where the policy begins."""
        if self.template is None:
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        thinking = self.template.thinks != "never"
        return self.template.encode(self.tokenizer, [{"role": "user", "content": prompt}], thinking=thinking).ids

    def text(self, tokens: Sequence[int]) -> str:
        """Of a completion, without the token that ended it, with think tags."""
        tokens = list(tokens)
        if tokens and tokens[-1] in self.stop_ids:
            tokens.pop()
        inside, text = [], ""
        for token in tokens:
            if token < self.tokenizer.vocab_size:
                inside.append(token)
            else:  # a model may have more rows than its tokenizer ids, and untrained ones draw them
                text, inside = text + self.tokenizer.decode(inside, skip_special=True) + "\ufffd", []
        return self.opened + text + self.tokenizer.decode(inside, skip_special=True)
