"""What a chat template is: a function from messages to pieces, and pieces to text or to ids with a training mask.

A piece says who wrote it. Names of special tokens become tokens in what the template wrote, and stay text in what a
user, a tool or a model wrote: nobody can forge a turn by typing `<｜Assistant｜>`. The mask is made beside the ids, from
the same pieces, so it needs no search for the answers afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from deepseek_jax.chat.messages import Message, Tool, check_messages
from deepseek_jax.data.tokenizer import BOS_TOKEN, EOS_TOKEN, Tokenizer

_NAME = re.compile(r"<[^<>]+>")


class Piece(NamedTuple):
    """A run of a conversation's text.

    Fields:
        text: the text; where `special`, names of special tokens and nothing else.
        special: whether `text` names tokens, rather than being text.
        trained: whether it is the assistant's output, which fine-tuning learns from; the token that ends it included.
    """

    text: str
    special: bool = False
    trained: bool = False


class Encoded(NamedTuple):
    """A conversation as ids, and for each id whether fine-tuning learns to predict it; both of the same length."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Parsed:
    """An answer taken apart.

    Fields:
        reasoning: what stands before `</think>`; None where the model did not think.
        content: the answer.
        tool_calls: in OpenAI's form; `arguments` is the model's text, which need not be valid JSON.
    """

    reasoning: str | None
    content: str
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """What a template renders: checked messages and what was asked for with them."""

    messages: Sequence[Message]
    tools: Sequence[Tool]
    thinking: bool
    prompt: bool  # whether the text ends where the assistant is to begin

    def is_last(self, index: int) -> bool:
        return index == len(self.messages) - 1


@dataclass(frozen=True)
class Template:
    """How one kind of model writes conversations.

    Fields:
        name: its key in `TEMPLATES`.
        build: yields the pieces of a request.
        system, tools: whether it has a place for system messages, for tools and their calls.
        thinks: whether the model thinks before it answers: "never", "always", or when asked by `thinking=True`.
        stop: names of the tokens that end an answer.
        split: takes an answer apart; see `parse`.
    """

    name: str
    build: Callable[[Request], Iterator[Piece]]
    system: bool = True
    tools: bool = False
    thinks: Literal["never", "always", "asked"] = "never"
    stop: tuple[str, ...] = (EOS_TOKEN,)
    split: Callable[[str, bool], Parsed] = lambda text, thinking: Parsed(None, text)

    def pieces(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        """The conversation in pieces.

        Args:
            messages: see `chat.messages`.
            tools: definitions of tools in OpenAI's form.
            thinking: whether the model is to think first, where the template leaves the choice.
            add_generation_prompt: whether the text ends where the assistant is to begin. Pass False for a
                conversation that ends with its answer, such as one to train on.
        Raises: ValueError when the messages are malformed, or ask for what the template has no place for.
        """
        check_messages(messages)
        self._check_place(messages, tools, thinking)
        if add_generation_prompt and messages[-1]["role"] == "assistant":
            raise ValueError(
                "add_generation_prompt=True after an assistant's message: pass False, or add the user's next message"
            )
        return _joined(self.build(Request(messages, tools or (), thinking, add_generation_prompt)))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as one text, for people to read: names and text that spells a name look alike in it."""
        pieces = self.pieces(messages, tools=tools, thinking=thinking, add_generation_prompt=add_generation_prompt)
        return "".join(piece.text for piece in pieces)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> Encoded:
        """The conversation as ids with a training mask. Arguments and errors as `pieces` and `encode_pieces`."""
        pieces = self.pieces(messages, tools=tools, thinking=thinking, add_generation_prompt=add_generation_prompt)
        return encode_pieces(tokenizer, pieces)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that end an answer. Raises: ValueError when the tokenizer lacks one."""
        return tuple(_id(tokenizer, name) for name in self.stop)

    def parse(self, text: str, thinking: bool = False) -> Parsed:
        """Takes an answer apart: what the model wrote after the prompt, without the token that ends it.

        Args:
            text: the answer, with think tags and tokens of tool calls by name.
            thinking: as in the request that it answers.
        """
        return self.split(text, self.thinks == "always" or (thinking and self.thinks == "asked"))

    def _check_place(self, messages: Sequence[Message], tools: Sequence[Tool] | None, thinking: bool) -> None:
        calls = tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
        if calls and not self.tools:
            raise ValueError(f"template {self.name!r} has no place for tools, their calls or outputs; 'v3.1' has")
        if not self.system and any(m["role"] == "system" for m in messages):
            raise ValueError(
                f"template {self.name!r} has no place for a system message; put its text into the first user message"
            )
        if self.thinks == "never" and thinking:
            raise ValueError(f"thinking=True: models of template {self.name!r} do not think; pass False")
        if self.thinks == "never" and any(m.get("reasoning_content") for m in messages):
            raise ValueError(
                f"template {self.name!r} has no place for reasoning_content; leave it out, or use 'r1' or 'v3.1'"
            )


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Encoded:
    """Ids and training mask of pieces.

    Neighbouring texts are encoded as one, as the published templates are, except where training begins: a prompt's ids
    are then also the first ids of the conversation with the answer.

    Raises: ValueError when the tokenizer lacks a token that a piece names.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for piece in _joined(pieces):
        if piece.special:
            new = [_id(tokenizer, name) for name in _NAME.findall(piece.text)]
        else:
            new = tokenizer.encode(piece.text)
        ids += new
        trained += [piece.trained] * len(new)
    return Encoded(ids, trained)


def special(text: str, *, trained: bool = False) -> Piece:
    """A piece that names tokens."""
    return Piece(text, True, trained)


def answer(text: str) -> Piece:
    """A piece that the assistant wrote."""
    return Piece(text, False, True)


BOS = special(BOS_TOKEN)
END = special(EOS_TOKEN, trained=True)  # of an answer: the model must learn to stop


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same text in fewest pieces: neighbours of the same kind as one, empty ones left out."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1][1:] == piece[1:]:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + piece.text)
        elif piece.text:
            joined.append(piece)
    return joined


def _id(tokenizer: Tokenizer, name: str) -> int:
    if name not in tokenizer.special:
        raise ValueError(f"the tokenizer has no token {name!r}, which this template needs: use a template that fits it")
    return tokenizer.special[name]
