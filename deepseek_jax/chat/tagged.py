"""Templates that mark turns with tokens: V2.5 and V3, R1, V3.1.

They are the published ones (tokenizer_config.json of each model), with one addition: the reasoning of the last answer,
given as `reasoning_content`, is written, so that it can be trained on. That of earlier answers is dropped, as published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from deepseek_jax.chat.messages import Message, call_of, definition_of
from deepseek_jax.chat.template import BOS, END, Parsed, Piece, Request, Template, answer, special

USER, ASSISTANT = special("<｜User｜>"), special("<｜Assistant｜>")
THINK, THINK_END = "<think>", "</think>"
TOKENS = (USER.text, ASSISTANT.text, THINK, THINK_END)
"""What the templates of V3, R1 and (without tools) V3.1 need beside the tokens that begin and end a text."""
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
OUTPUT, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"

_CALL = re.compile(f"{re.escape(CALL)}(.*?){re.escape(SEPARATOR)}(.*?){re.escape(CALL_END)}", re.DOTALL)


def _system(request: Request) -> str:
    """All system messages, wherever they stand, with a blank line between them."""
    return "\n\n".join(message["content"] for message in request.messages if message["role"] == "system")


def _v3(request: Request) -> Iterator[Piece]:
    yield BOS
    yield Piece(_system(request))
    for message in request.messages:
        if message["role"] == "user":
            yield USER
            yield Piece(message["content"])
        elif message["role"] == "assistant":
            yield ASSISTANT
            yield answer(message["content"])
            yield END
    if request.prompt:
        yield ASSISTANT


def _r1(request: Request) -> Iterator[Piece]:
    yield BOS
    yield Piece(_system(request))
    for i, message in enumerate(request.messages):
        if message["role"] == "user":
            yield USER
            yield Piece(message["content"])
        elif message["role"] == "assistant":
            yield ASSISTANT
            if request.is_last(i) and message.get("reasoning_content"):
                yield special(THINK)
                yield Piece("\n")  # the prompt ends with it
                yield answer(f"{message['reasoning_content']}\n")
                yield special(THINK_END, trained=True)
                yield answer(f"\n\n{message['content']}")
            else:
                yield answer(message["content"].rpartition(THINK_END)[2])
            yield END
    if request.prompt:
        yield ASSISTANT
        yield special(THINK)
        yield Piece("\n")


def _v3_1(request: Request) -> Iterator[Piece]:
    if request.thinking and request.tools:
        raise ValueError("thinking=True with tools: V3.1 calls tools without thinking only; pass thinking=False")
    yield BOS
    yield Piece(_system(request))
    if request.tools:
        yield Piece("\n\n" if _system(request) else "")
        yield from _tool_definitions(request)
    before = "system"
    for i, message in enumerate(request.messages):
        role = message["role"]
        if role == "user":
            yield USER
            yield Piece(message["content"])
        elif role == "tool":
            yield special(OUTPUT)
            yield Piece(message["content"])
            yield special(OUTPUT_END)
        elif role == "assistant":
            thought = message.get("reasoning_content") if request.thinking and request.is_last(i) else None
            if before == "user":  # after a tool's output it goes on in the same turn
                yield ASSISTANT
                yield special(THINK if thought else THINK_END)
                if thought:
                    yield answer(thought)
                    yield special(THINK_END, trained=True)
            yield from _v3_1_answer(message, after_tool=before == "tool")
        before = role if role != "system" else before
    if request.prompt and before == "user":
        yield ASSISTANT
        yield special(THINK if request.thinking else THINK_END)


def _v3_1_answer(message: Message, after_tool: bool) -> Iterator[Piece]:
    content = message["content"] or ""
    calls = message.get("tool_calls") or ()
    if not calls and not after_tool and THINK_END in content:
        content = content.partition(THINK_END)[2]
    yield answer(content)
    if calls:
        yield special(CALLS, trained=True)
        for call in calls:
            name, arguments = call_of(call)
            yield special(CALL, trained=True)
            yield answer(name)
            yield special(SEPARATOR, trained=True)
            yield answer(arguments)
            yield special(CALL_END, trained=True)
        yield special(CALLS_END, trained=True)
    yield END


def _tool_definitions(request: Request) -> Iterator[Piece]:
    """The tools, as V3.1's model card writes them; names of tokens in its instruction are tokens."""
    yield Piece("## Tools\nYou have access to the following tools:\n\n")
    for tool in request.tools:
        name, description, parameters = definition_of(tool)
        yield Piece(f"### {name}\nDescription: {description}\n\nParameters: {parameters}\n\n")
    yield Piece("IMPORTANT: ALWAYS adhere to this exact format for tool use:\n")
    yield special(CALLS + CALL)
    yield Piece("tool_call_name")
    yield special(SEPARATOR)
    yield Piece("tool_call_arguments")
    yield special(CALL_END)
    yield Piece("{additional_tool_calls}")
    yield special(CALLS_END)
    yield Piece(
        "\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces"
    )


def split_reasoning(text: str, thinking: bool) -> Parsed:
    """Reasoning and content of an answer. Where `</think>` is missing, a thinking model was cut off while it thought."""
    if not thinking:
        return Parsed(None, text.removeprefix(THINK_END))
    reasoning, _, content = text.partition(THINK_END)
    return Parsed(reasoning.lstrip().removeprefix(THINK).strip("\n"), content.lstrip("\n"))


def _split_v3_1(text: str, thinking: bool) -> Parsed:
    parsed = split_reasoning(text, thinking)
    content, _, block = parsed.content.partition(CALLS)
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name.strip(), "arguments": arguments}}
        for i, (name, arguments) in enumerate(_CALL.findall(block))
    ]
    # A block without one whole call is shown as it is, rather than lost.
    return Parsed(parsed.reasoning, content, calls) if calls else parsed


V3 = Template("v3", _v3)
R1 = Template("r1", _r1, thinks="always", split=split_reasoning)
V3_1 = Template("v3.1", _v3_1, tools=True, thinks="asked", split=_split_v3_1)
