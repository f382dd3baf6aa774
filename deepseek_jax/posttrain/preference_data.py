"""Preferences as training data: pairs of answers of which one is preferred, and answers with a label.

What is wrong with the format of a file (a field is missing, or of another kind) is a ValueError with file, line and field.
A row that is sound but cannot be learned from is left out and counted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from deepseek_jax.chat.rows import Conversation, LeftOut, encode_conversation
from deepseek_jax.chat.tagged import THINK, THINK_END
from deepseek_jax.config import require
from deepseek_jax.data.corpus import Document
from deepseek_jax.data.records import NOT_UTF8
from deepseek_jax.data.rows import read_rows
from deepseek_jax.data.sources import Jsonl, Parquet
from deepseek_jax.data.tokenizer import Tokenizer

TOO_LONG, SAME, NO_SUMMARY = "longer than max_tokens", "both answers the same", "no summary"
TWO_PROMPTS = "answers of which one alone has thoughts"
Reads = Literal["all", "summary"]


@dataclass(frozen=True, kw_only=True)
class _File:
    """What both kinds share."""

    path: str
    """A JSONL file, a folder of them or a glob; Parquet where it ends in .parquet."""
    prompt: str = "prompt"
    """The field of the question: a text, or a list of messages."""
    messages: str = "messages"
    """The field of the question in rows without `prompt`."""
    tools: str = "tools"
    """The field of the tools' definitions; rows may lack it."""

    @property
    def reads(self) -> Jsonl | Parquet:
        """The source of `data.sources` whose files these are."""
        return Parquet(path=self.path) if self.path.endswith(".parquet") else Jsonl(path=self.path)

    @property
    def fields(self) -> tuple[str, ...]:
        """Those that are read."""
        return tuple(v for k, v in vars(self).items() if k != "path")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(bool(value), type(self).__name__, name, value, "must not be empty")


@dataclass(frozen=True, kw_only=True)
class PairFile(_File):
    """Rows with a question, the answer that is preferred, and another one.

    An answer is a text, an assistant's message, or a list that ends with it; a list may repeat the question before it, and
    stands for it in rows that have none.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True, kw_only=True)
class LabelFile(_File):
    """Rows with a question, an answer (as in `PairFile`), and its label: true or false, 1 or 0, or another number."""

    response: str = "response"
    label: str = "label"


class Answer(NamedTuple):
    """A conversation up to the token that ends its last answer."""

    ids: np.ndarray
    """Int32 [n]."""
    start: int
    """Where the answer begins: tokens from there on are the assistant's."""


class Example(NamedTuple):
    """One row."""

    answers: tuple[Answer, ...]
    """The chosen and the rejected one, or the labelled one."""
    label: float
    """1 of a pair."""
    side: float
    """A number in [0, 1) from the question's hash; held out where it is low."""


@dataclass(frozen=True)
class Encoder:
    """Conversations to ids by a chat template; without one, question and answer between begin and end token.

    Fields:
        tokenizer: of the model.
        template: chat template, or None.
        reads: the whole last answer, or what comes behind its thoughts.
    """

    tokenizer: Tokenizer
    template: Any
    reads: Reads = "all"

    def __call__(self, question: Sequence[Any], answer: Any, tools: Any = None) -> Answer:
        """Raises: LeftOut where the template has no place for something; ValueError for messages without a template."""
        if self.reads == "summary":
            answer = summary_of(answer)
        if self.template is None:
            if [m.get("role") for m in question] != ["user"]:
                raise ValueError("a conversation of messages needs a chat template: name one, such as template='llm'")
            prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(question[0]["content"])]
            ids = [*prompt, *self.tokenizer.encode(answer.get("content") or ""), self.tokenizer.eos_id]
            return Answer(np.asarray(ids, np.int32), len(prompt))
        conversation = Conversation([*question, self._taken_apart(answer)], tools or None)
        ids, trained = encode_conversation(conversation, self.template, self.tokenizer, last_only=True)
        # The mask was made beside the ids: where the answer ends is known, whatever the ids are.
        end = len(trained) - trained[::-1].index(True)
        return Answer(np.asarray(ids[:end], np.int32), trained.index(True))

    def _taken_apart(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Thoughts that stand in the text, as a policy writes them, in their own field."""
        content = answer.get("content") or ""
        thought = content.lstrip().startswith(THINK) or THINK_END in content
        if self.template.thinks == "never" or answer.get("reasoning_content") or not thought:
            return answer
        parsed = self.template.parse(content, thinking=True)
        calls = {"tool_calls": parsed.tool_calls} if parsed.tool_calls else {}
        return {**answer, "content": parsed.content, "reasoning_content": parsed.reasoning or "", **calls}


def summary_of(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without its thoughts; an empty one where it was cut off in them."""
    content = answer.get("content") or ""
    if THINK_END in content:
        content = content.rpartition(THINK_END)[2].lstrip("\n")
    elif content.lstrip().startswith(THINK):
        content = ""
    return {k: v for k, v in answer.items() if k != "reasoning_content"} | {"content": content}


@dataclass
class Preferences:
    """A file, encoded.

    Fields:
        train, held_out: examples; all answers to a question are on one side.
        skipped: reason -> rows left out for it; places: reason -> the first one, with what was wrong.
        fingerprint: hex hash of all that decides which batches come.
    """

    train: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def skip(self, reason: str, where: str) -> None:
        """Counts a row that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.places.setdefault(reason, where)

    def left_out(self) -> str:
        """In words: how many for which reason, and where the first one is."""
        return "; ".join(f"{n:,} {why} ({self.places[why]})" for why, n in sorted(self.skipped.items())) or "nothing"


def load_preferences(
    file: PairFile | LabelFile,
    encoder: Encoder,
    *,
    max_tokens: int,
    held_out_fraction: float,
    labels: Literal["probability", "number"] = "probability",
    one_prompt: bool = False,
) -> Preferences:
    """Reads, encodes and splits a file.

    Args:
        file: where the rows are.
        encoder: makes ids.
        max_tokens: of a conversation; rows with a longer one are left out.
        held_out_fraction: share of the questions that is held out, chosen by a hash; at least one, unless it is 0.
        labels: what a label may be: in [0, 1], or any finite number.
        one_prompt: leave out pairs whose answers follow upon different tokens, since one of them alone has thoughts:
            probabilities of such answers say nothing of each other.

    Raises: ValueError for a wrong format, with its place, and where nothing is left.
    """
    found = Preferences()
    examples: list[Example] = []
    for where, row in read_rows(file.reads, found.skip, file.fields):
        try:
            example = _example(row, file, encoder, where, labels, one_prompt)
            if (longest := max(len(a.ids) for a in example.answers)) > max_tokens:
                raise LeftOut(TOO_LONG, f"{longest} tokens, max_tokens = {max_tokens}")
            examples.append(example)
        except LeftOut as why:
            found.skip(why.reason, f"{where}: {why.detail}" if why.detail else where)
    if not examples:
        raise ValueError(f"{file.path} holds nothing to learn from; left out: {found.left_out()}")
    below, sides = 0.0, sorted({example.side for example in examples})
    if held_out_fraction:
        if len(sides) < 2:
            raise ValueError(
                f"held_out_fraction = {held_out_fraction}: {file.path} has one question, and the split is by question: "
                f"give more, or held_out_fraction=0"
            )
        # The fraction, moved where a small file would have a side without questions.
        below = min(max(held_out_fraction, (sides[0] + sides[1]) / 2), sides[-1])
    digest = hashlib.blake2b(json.dumps([encoder.tokenizer.sha256, max_tokens]).encode(), digest_size=16)
    for example in examples:
        held_out = example.side < below
        (found.held_out if held_out else found.train).append(example)
        digest.update(repr((held_out, example.label, [a.start for a in example.answers])).encode())
        for answer in example.answers:
            digest.update(answer.ids.tobytes())
    found.fingerprint = digest.hexdigest()
    return found


def _example(
    row: dict[str, Any], file: PairFile | LabelFile, encoder: Encoder, where: str, labels: str, one_prompt: bool
) -> Example:
    names = (file.chosen, file.rejected) if isinstance(file, PairFile) else (file.response,)
    for name in names if isinstance(file, PairFile) else (*names, file.label):
        if row.get(name) is None:
            said = "holds null" if name in row else f"is missing: the row has {sorted(row)}"
            raise ValueError(f"{where}: the field {name!r} {said}; name the right one in {type(file).__name__}(…)")
    found = [_answer(row[name], f"{where}: the field {name!r}") for name in names]
    question = _question(row, file, where)
    if question is None:
        question = found[0][0]
    for name, (before, _) in zip(names, found, strict=True):
        if not question or before not in ([], question):
            asked = f"none of the fields {file.prompt!r} and {file.messages!r}" if not question else "another question"
            raise ValueError(
                f"{where}: the field {name!r} stands beside {asked}: give both answers one question, in {file.prompt!r} "
                f"or as the messages before them"
            )
    answers = [answer for _, answer in found]
    if len(answers) == 2 and answers[0] == answers[1]:
        raise LeftOut(SAME)
    if encoder.reads == "summary" and any(
        not summary_of(a)["content"].strip() and not a.get("tool_calls") for a in answers
    ):
        raise LeftOut(NO_SUMMARY)
    label = 1.0 if isinstance(file, PairFile) else _label(row[file.label], f"{where}: the field {file.label!r}", labels)
    try:
        text = json.dumps([question, *answers], ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise LeftOut(NOT_UTF8) from None
    try:
        encoded = tuple(encoder(question, answer, row.get(file.tools)) for answer in answers)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if len(encoded) == 2:
        first, second = encoded
        if one_prompt and first.ids[: first.start].tolist() != second.ids[: second.start].tolist():
            raise LeftOut(TWO_PROMPTS)
        if first.ids.tolist() == second.ids.tolist():
            raise LeftOut(SAME)
    return Example(encoded, label, Document(where, json.dumps(question, ensure_ascii=False)).side)


def _question(row: dict[str, Any], file: _File, where: str) -> list[Any] | None:
    """The messages of the question; None where the row has it in its answers alone."""
    for name in (file.prompt, file.messages):
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, str):
            return [{"role": "user", "content": value}]
        if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
            return value
        raise ValueError(
            f"{where}: the field {name!r} holds {value!r:.80}: must be a text, or a list of messages such as "
            f'{{"role": "user", "content": …}}'
        )
    return None


def _answer(value: Any, what: str) -> tuple[list[Any], dict[str, Any]]:
    """(messages before it, the assistant's message)."""
    if isinstance(value, str):
        return [], {"role": "assistant", "content": value}
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(
            f"{what} holds {value!r:.80}: must be a text, an assistant's message, or a list that ends with it"
        )
    if messages[-1].get("role") != "assistant":
        raise ValueError(
            f"{what} ends with the role {messages[-1].get('role')!r}: must end with an assistant's message"
        )
    return messages[:-1], messages[-1]


def _label(value: Any, what: str, labels: str) -> float:
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise ValueError(f"{what} holds {value!r:.80}: must be true, false or a finite number")
    if labels == "probability" and not 0 <= value <= 1:
        raise ValueError(f"{what} holds {value!r}: must be 0, 1 or between; other numbers need kind='regression'")
    return float(value)
