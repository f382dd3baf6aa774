"""Rows of data sets to conversations, and conversations to ids with a mask.

What is wrong with the format of a file (a field that no row can do without is missing, or of another kind) is a
ValueError with its place. What is wrong with one conversation is `LeftOut`, for the caller to count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from deepseek_jax.chat.data import Messages, MultipleChoice, PromptResponse, Rows
from deepseek_jax.chat.messages import check_messages
from deepseek_jax.chat.tagged import THINK, THINK_END
from deepseek_jax.chat.template import Encoded, Template
from deepseek_jax.data.records import NOT_UTF8
from deepseek_jax.data.tokenizer import Tokenizer

NO_ANSWER, MALFORMED, REFUSED, NULL = "no assistant turn", "malformed", "refused by the template", "null"
_ROLES = {"human": "user", "gpt": "assistant"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class LeftOut(Exception):
    """A conversation that cannot be learned from: why, in a word that is counted, and in detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Conversation(NamedTuple):
    """Messages that end with an answer, and the tools that they may call."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None

    @property
    def question(self) -> list[dict[str, Any]]:
        """What comes before the first answer."""
        first = [message["role"] for message in self.messages].index("assistant")
        return self.messages[:first]


def conversation_of(row: dict[str, Any], rows: Rows, where: str) -> Conversation:
    """The conversation of one row. What comes after the last answer is left out, since nothing in it is learned.

    Raises: ValueError for a wrong format, LeftOut for a row that holds no sound conversation.
    """
    if isinstance(rows, Messages):
        messages, tools = _messages(row, rows, where), row.get(rows.tools) or None
        if tools is not None and not isinstance(tools, list):
            raise _wrong(where, rows.tools, tools, "a list of tools in OpenAI's form", rows)
    else:
        messages, tools = (_pair if isinstance(rows, PromptResponse) else _choice)(row, rows, where), None  # type: ignore
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise LeftOut(NO_ANSWER)
    messages = messages[: last + 1]
    try:
        check_messages(messages)
    except ValueError as error:
        raise LeftOut(MALFORMED, str(error)) from None
    try:
        json.dumps([messages, tools], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise LeftOut(NOT_UTF8) from None
    return Conversation(messages, tools)


def encode_conversation(
    conversation: Conversation, template: Template, tokenizer: Tokenizer, *, last_only: bool = False
) -> Encoded:
    """Ids, and which of them are learned: those that the template marks as the assistant's.

    An answer that opens with `<think>` is taken apart for templates that think: these would drop its reasoning, or
    write its tags as text.

    Args:
        last_only: learn the last answer alone.
    Raises: LeftOut where the template has no place for something, or the tokenizer no token.
    """
    messages = conversation.messages
    if template.thinks != "never":
        messages = [_with_reasoning(message) for message in messages]
    thought = bool(messages[-1].get("reasoning_content"))
    thinking = template.thinks == "always" or (template.thinks == "asked" and thought)
    try:
        ids, trained = template.encode(
            tokenizer, messages, tools=conversation.tools, thinking=thinking, add_generation_prompt=False
        )
    except ValueError as error:  # text that is not UTF-8 among it
        raise LeftOut(REFUSED, str(error)) from None
    if last_only:
        trained = _last_run(trained)
    return Encoded(ids, trained)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"] or ""
    if message["role"] != "assistant" or message.get("reasoning_content") or THINK_END not in content:
        return message
    if not content.lstrip().startswith(THINK):
        return message
    reasoning, _, content = content.partition(THINK_END)
    reasoning = reasoning.lstrip().removeprefix(THINK).strip("\n")
    return {**message, "reasoning_content": reasoning, "content": content.lstrip("\n")}


def _last_run(trained: Sequence[bool]) -> list[bool]:
    """The last answer, which is one run: all but its tokens as not learned."""
    end = len(trained) - list(reversed(trained)).index(True) if True in trained else 0
    start = end
    while start and trained[start - 1]:
        start -= 1
    return [start <= i < end for i in range(len(trained))]


def _messages(row: dict[str, Any], rows: Messages, where: str) -> list[dict[str, Any]]:
    value = _field(row, rows.messages, where, rows)
    if isinstance(value, dict):  # a sequence of TFDS: a list for each key
        value = [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise _wrong(where, rows.messages, value, "a list of messages", rows)
    return [_message(message, rows) for message in value]


def _message(message: Any, rows: Messages) -> dict[str, Any]:
    if not isinstance(message, dict) or rows.role not in message:
        raise LeftOut(MALFORMED, f"a message is {message!r:.80}, without the key {rows.role!r}")
    role, content = message[rows.role], message.get(rows.content)
    if isinstance(content, list):  # OpenAI's list of parts
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise LeftOut(MALFORMED, "a content has parts that are no text")
        content = "".join(map(str, texts))
    kept = {k: v for k, v in message.items() if k not in (rows.role, rows.content)}
    return kept | {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _pair(row: dict[str, Any], rows: PromptResponse, where: str) -> list[dict[str, Any]]:
    prompt, response = (_text(row, name, where, rows) for name in (rows.prompt, rows.response))
    if not response.strip():
        raise LeftOut(NO_ANSWER)
    system, reasoning = (
        _text(row, name, where, rows) if name and row.get(name) is not None else ""
        for name in (rows.system, rows.reasoning)
    )
    answer = {"role": "assistant", "content": response} | ({"reasoning_content": reasoning} if reasoning else {})
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}, answer]


def _choice(row: dict[str, Any], rows: MultipleChoice, where: str) -> list[dict[str, Any]]:
    question, choices = _text(row, rows.question, where, rows), _field(row, rows.choices, where, rows)
    answer, labels = _field(row, rows.answer, where, rows), None
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(choices, list):
        raise _wrong(where, rows.choices, choices, "a list of texts", rows)
    if not (2 <= len(choices) <= len(_LETTERS) and all(isinstance(choice, str) for choice in choices)):
        raise LeftOut(MALFORMED, f"{rows.choices} = {choices!r:.80}: must be 2 to {len(_LETTERS)} texts")
    letters = list(_LETTERS[: len(choices)])
    right = _right(answer, choices, labels if isinstance(labels, list) else letters)
    if right is None:
        raise LeftOut(MALFORMED, f"{rows.answer} = {answer!r:.80} is none of the {len(choices)} choices")
    asked = "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))])
    said = f"{letters[right]}. {choices[right]}" if rows.with_text else letters[right]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def _right(answer: Any, choices: list[str], labels: list[Any]) -> int | None:
    """Number of the right choice, which is given by number, label or text; None where it is none of them."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if not isinstance(answer, str):
        return None
    for names in (labels, choices):
        if answer.strip() in names:
            return names.index(answer.strip())
    return None


def _text(row: dict[str, Any], name: str, where: str, rows: Rows) -> str:
    value = _field(row, name, where, rows)
    if not isinstance(value, str):
        raise _wrong(where, name, value, "a string", rows)
    return value


def _field(row: dict[str, Any], name: str, where: str, rows: Rows) -> Any:
    if name not in row:
        raise ValueError(
            f"{where}: the row has the fields {sorted(row)}; there is no {name!r}: name the right one in "
            f"{type(rows).__name__}(…), or give rows=Messages(), PromptResponse() or MultipleChoice() as the row is"
        )
    if row[name] is None:
        raise LeftOut(NULL, name)
    return row[name]


def _wrong(where: str, name: str, value: Any, expected: str, rows: Rows) -> ValueError:
    return ValueError(
        f"{where}: the field {name!r} of {type(rows).__name__} holds a {type(value).__name__} ({value!r:.80}): must be "
        f"{expected}"
    )
