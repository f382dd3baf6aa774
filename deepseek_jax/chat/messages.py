"""Conversations as lists of dicts, and the check that every template makes before it renders one.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`. An assistant's may add
`"reasoning_content": str` (what it thought before `content`) and `"tool_calls"` in OpenAI's form, a list of
`{"type": "function", "function": {"name": str, "arguments": str | dict}}`; then `content` may be None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: Sequence[Message]) -> None:
    """Raises: ValueError when `messages` is empty, when a role or a content is missing or of the wrong kind, and when
    an assistant or a tool speaks out of turn."""
    if not messages:
        raise ValueError("messages=[]: a conversation needs at least one message")
    before = None
    for i, message in enumerate(messages):
        where, role, content = f"messages[{i}]", message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"{where}: role={role!r} is not known; give one of {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise ValueError(f"{where}: content={content!r} of role {role!r}: give the text as a str")
        if not isinstance(message.get("reasoning_content") or "", str):
            raise ValueError(f"{where}: reasoning_content={message['reasoning_content']!r}: give the text as a str")
        if role != "assistant" and (calls or message.get("reasoning_content")):
            raise ValueError(f"{where}: role={role!r} has tool_calls or reasoning_content; only an assistant may")
        if role == "assistant" and before not in ("user", "tool"):
            raise ValueError(
                f"{where}: an assistant answers a user or a tool, but follows {before!r}; add the question"
            )
        if role == "tool" and before not in ("assistant", "tool"):
            raise ValueError(
                f"{where}: role='tool' follows {before!r}; put it after the assistant that called the tool"
            )
        before = role if role != "system" else before  # templates may move a system message to the front


def call_of(tool_call: Any) -> tuple[str, str]:
    """Name and arguments, as JSON text, of one call in OpenAI's form. Raises: ValueError when it has another form."""
    try:
        function = tool_call["function"]
        name, arguments = function["name"], function["arguments"]
    except (KeyError, TypeError):
        form = '{"type": "function", "function": {"name": …, "arguments": …}}'
        raise ValueError(f"tool_calls: {tool_call!r} is not of the form {form}") from None
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def definition_of(tool: Any) -> tuple[str, str, str]:
    """Name, description and parameters, as JSON text, of a tool in OpenAI's form.

    Raises: ValueError when it has another form.
    """
    try:
        function = tool["function"]
        name, description, parameters = function["name"], function.get("description", ""), function["parameters"]
    except (KeyError, TypeError):
        form = '{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
        raise ValueError(f"tools: {tool!r} is not of the form {form}") from None
    return name, description, json.dumps(parameters, ensure_ascii=False)
