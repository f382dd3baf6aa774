"""The fields of a call's body, taken one at a time: each with its type, and none left over unseen."""

from __future__ import annotations

import difflib
import json
import math
from typing import Any

from deepseek_jax.serve.errors import ApiError, bad_field

_NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object"}


def read_json(raw: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises: ApiError 400 when it is no JSON object, or holds what no tokenizer could encode.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        body = json.loads(raw, parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half of a surrogate pair: send whole characters") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}: send an object", code="invalid_json")
    return body


def is_a(value: Any, kind: type) -> bool:
    """Whether a JSON value is of `kind`: an integer is a number, and a boolean is neither."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float and isinstance(value, int):
        return abs(value) < 2**53
    return isinstance(value, kind) and (kind is not float or math.isfinite(value))


class Fields:
    """An object of a body. `null` says the same as leaving a field out, as in the OpenAI API."""

    def __init__(self, values: dict[str, Any], path: str = ""):
        """
        Args:
            values: the object.
            path: what stands before a field's name in errors, such as "messages[0].".
        """
        self._values = {name: value for name, value in values.items() if value is not None}
        self._path = path
        self._known: set[str] = set()

    def take(self, name: str, *kinds: type, default: Any = None) -> Any:
        """The value of a field, which must be of one of `kinds`; `default` where it is not given.

        Raises: ApiError 400 for another type.
        """
        self._known.add(name)
        if name not in self._values:
            return default
        value = self._values.pop(name)
        if not any(is_a(value, kind) for kind in kinds):
            wanted = " or ".join(_NAMES[kind] for kind in kinds)
            raise bad_field(self._path + name, f"must be {wanted}, not {_shown(value)}", "invalid_type")
        return value

    def require(self, name: str, *kinds: type) -> Any:
        """As `take`, for a field that must be there.

        Raises: ApiError 400 also when it is missing.
        """
        value = self.take(name, *kinds)
        if value is None:
            raise bad_field(self._path + name, "is required", "missing_required_parameter")
        return value

    def allow_only(self, name: str, *allowed: Any, why: str = "is not supported") -> None:
        """Passes over a field that we do not have, where its value asks for nothing.

        Raises: ApiError 400 for any other value.
        """
        self._known.add(name)
        if name in self._values:
            value = self._values.pop(name)
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                also = "leave it out" + "".join(f", or give {json.dumps(one)}" for one in allowed[:1])
                raise bad_field(self._path + name, f"{_shown(value)} {why}: {also}", "unsupported_parameter")

    def ignore(self, *names: str) -> None:
        """Passes over fields that cannot change an answer, whatever they hold."""
        for name in names:
            self._known.add(name)
            self._values.pop(name, None)

    def finish(self) -> None:
        """Raises: ApiError 400 when a field is left that nobody took, with the closest known name."""
        for name in self._values:
            close = difflib.get_close_matches(name, self._known, n=1)
            remedy = f"did you mean {close[0]}?" if close else "leave it out"
            raise bad_field(self._path + name, f"unknown field: {remedy}", "unknown_parameter")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
