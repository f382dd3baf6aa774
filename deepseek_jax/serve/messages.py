"""Messages and tools of a chat, in the forms that the OpenAI API allows, as chat templates take them."""

from __future__ import annotations

from typing import Any

from deepseek_jax.serve.errors import bad_field
from deepseek_jax.serve.fields import Fields

_ROLES = ("system", "user", "assistant", "tool")


def read_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """The messages, each with its content as one string.

    Raises: ApiError 400 for what no template could render.
    """
    if not messages:
        raise bad_field("messages", "is empty: give at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def read_tools(tools: list[Any]) -> list[dict[str, Any]]:
    """The tools, each with a description and parameters, which the API lets callers leave out.

    Raises: ApiError 400 for another kind than functions, or a field that we do not know.
    """
    read = []
    for i, tool in enumerate(tools):
        fields = _object(tool, f"tools[{i}]")
        fields.allow_only("type", "function")
        function = _object(fields.require("function", dict), f"tools[{i}].function")
        fields.finish()
        known = {
            "name": function.require("name", str),
            "description": function.take("description", str, default=""),
            "parameters": function.take("parameters", dict, default={"type": "object", "properties": {}}),
        }
        function.allow_only("strict", False)
        function.finish()
        read.append({"type": "function", "function": known})
    return read


def _object(value: Any, path: str) -> Fields:
    if not isinstance(value, dict):
        raise bad_field(path, "must be an object", "invalid_type")
    return Fields(value, f"{path}.")


def _message(message: Any, path: str) -> dict[str, Any]:
    fields = _object(message, path)
    role = fields.require("role", str)
    if role == "developer":  # the newer name of the same role
        role = "system"
    if role not in _ROLES:
        raise bad_field(f"{path}.role", f"{role!r}: must be one of {', '.join(_ROLES)}")
    content = fields.take("content", str, list)
    read: dict[str, Any] = {"role": role, "content": _text(content, path)}
    if role == "assistant":
        read["tool_calls"] = _tool_calls(fields.take("tool_calls", list, default=[]), path) or None
        read["reasoning_content"] = fields.take("reasoning_content", str)
        fields.ignore("refusal", "annotations")  # parts of a reply of the API that no template shows
    elif role == "tool":
        read["tool_call_id"] = fields.take("tool_call_id", str)
        fields.ignore("name")  # templates know a tool's result by its place
    if content is None and not read.get("tool_calls"):
        raise bad_field(f"{path}.content", "is required", "missing_required_parameter")
    fields.finish()
    return {name: value for name, value in read.items() if value is not None or name == "content"}


def _tool_calls(calls: list[Any], path: str) -> list[Any]:
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        given = [function.get(name) for name in ("name", "arguments")] if isinstance(function, dict) else [None]
        if not all(isinstance(one, str) for one in given):
            form = '{"type": "function", "function": {"name": "…", "arguments": "…"}}'
            raise bad_field(f"{path}.tool_calls[{i}]", f"must be {form}", "invalid_type")
    return calls


def _text(content: str | list[Any] | None, path: str) -> str | None:
    if not isinstance(content, list):
        return content
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad_field(f"{path}.content[{i}]", 'must be {"type": "text", "text": …}: models here read text alone')
        texts.append(part["text"])
    return "".join(texts)
