"""Frozen dataclasses to JSON values and back, and a check that values are what the annotations say.

Dataclasses do not check their types, so one wrong value would travel until something far away breaks. Here every
mismatch is a `ValueError` that names the field by its dotted path, the value, and what would be right.

A dataclass is a dict of its fields. In a union or a container the dict also carries its kind (`"type": "MLA"`), even
where one kind is allowed, so the text still reads when a second one joins. Supported beside dataclasses: bool, int,
float, str, None, `Any`, `Literal`, `Path`, `tuple`, `list`, `dict[str, …]` and unions of these.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")

_KIND = "type"


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as nested dicts, lists and scalars, ready for `json.dumps`.

    Raises `ValueError` as `check_types` does: what is written can be read back.
    """
    check_types(config)
    return _write(config, tagged=False)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`.

    A field that has a default may be left out, so that a file written before the field existed still reads. Raises
    `ValueError` for an unknown field (naming the closest known one), a missing field, or a value of the wrong type.
    """
    return _read(cls, values, _Where(cls.__name__))


def check_types(config: Any) -> None:
    """Raise `ValueError` where a value in this dataclass, or in one inside it, does not match its annotation.

    An int may stand for a float; a bool is neither int nor float; a list does not stand for a tuple.
    """
    if not _is_config(config):
        raise ValueError(f"expected a dataclass instance, got {config!r} ({type(config).__name__})")
    _check(type(config), config, _Where(type(config).__name__))


def check_field(cls: type, name: str, value: Any, where: str) -> Any:
    """`value`, if it is what a dataclass says of its field `name`; else a `ValueError` that opens with `where`."""
    _check(_hints(cls)[name], value, _Where(f"{where}: {cls.__name__}.{name}"))
    return value


@dataclasses.dataclass(frozen=True)
class _Where:
    """The place of a value: a dotted path that opens with the outermost dataclass."""

    path: str

    def __truediv__(self, name: str) -> "_Where":
        return _Where(f"{self.path}.{name}")

    def __getitem__(self, key: Any) -> "_Where":
        return _Where(f"{self.path}[{key!r}]")

    def wrong(self, value: Any, expected: str) -> ValueError:
        return ValueError(f"{self.path} = {value!r} ({type(value).__name__}): must be {expected}")


def _write(value: Any, tagged: bool) -> Any:
    if _is_config(value):
        hints = _hints(type(value))
        kind = {_KIND: type(value).__name__} if tagged else {}
        return kind | {name: _write(getattr(value, name), _is_union(hint)) for name, hint in hints.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_write(item, tagged=True) for item in value]
    if isinstance(value, dict):
        return {key: _write(item, tagged=True) for key, item in value.items()}
    return value


def _read(hint: Any, value: Any, where: _Where, tagged: bool = False) -> Any:
    """`value`, as parsed from JSON, in the type that `hint` names."""
    if dataclasses.is_dataclass(hint):
        return _read_config(typing.cast(type, hint), value, where, tagged)
    if _is_union(hint):
        return _read_union(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        hints = _item_hints(hint, len(value), value, where)
        items = [_read(h, item, where[i], tagged=True) for i, (h, item) in enumerate(zip(hints, value, strict=True))]
        return origin(items)
    if origin is dict and isinstance(value, Mapping):
        return {key: _read(args[1], item, where[key], tagged=True) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    _check(hint, value, where)
    return value


def _read_config(cls: type, value: Any, where: _Where, tagged: bool) -> Any:
    if not isinstance(value, Mapping):
        raise where.wrong(value, f"a dict of the fields of {cls.__name__}")
    values = dict(value)
    kind = values.pop(_KIND, None)
    if kind != (cls.__name__ if tagged else None):
        raise (where / _KIND).wrong(kind, repr(cls.__name__) if tagged else "absent")
    hints = _hints(cls)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
            remedy = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(hints)}"
            raise ValueError(f"{where.path} has no field {name!r} ({cls.__name__}): {remedy}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in hints and required and field.name not in values:
            raise ValueError(f"{(where / field.name).path} is missing: must be {_describe(hints[field.name])}")
    return cls(**{name: _read(hints[name], item, where / name) for name, item in values.items()})


def _read_union(hint: Any, value: Any, where: _Where) -> Any:
    members = typing.get_args(hint)
    configs = {m.__name__: m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)}
    if configs and isinstance(value, Mapping):
        kind = value.get(_KIND)
        if kind not in configs:
            raise (where / _KIND).wrong(kind, " or ".join(map(repr, configs)))
        return _read(configs[kind], value, where, tagged=True)
    for member in sorted(members, key=lambda member: member is float):  # an int stays an int where both are allowed
        try:
            return _read(member, value, where)
        except ValueError:
            continue
    raise where.wrong(value, _describe(hint))


def _check(hint: Any, value: Any, where: _Where) -> None:
    """Raise unless `value` is what `hint` says, looking into dataclasses and containers."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return
    if _is_union(hint):
        exact = [member for member in args if isinstance(member, type) and type(value) is member]
        if exact and _is_config(value):
            _check(exact[0], value, where)  # not below: the error should name the field inside
        elif not any(_matches(member, value, where) for member in args):
            raise where.wrong(value, _describe(hint))
    elif origin is Literal:
        if not any(type(value) is type(option) and value == option for option in args):
            raise where.wrong(value, _describe(hint))
    elif origin in (tuple, list):
        if not isinstance(value, origin):
            raise where.wrong(value, _describe(hint))
        for i, (item_hint, item) in enumerate(zip(_item_hints(hint, len(value), value, where), value, strict=True)):
            _check(item_hint, item, where[i])
    elif origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise where.wrong(value, _describe(hint))
        for key, item in value.items():
            _check(args[1], item, where[key])
    elif not isinstance(hint, type):
        raise TypeError(f"{where.path} is annotated {_describe(hint)}, which serialize cannot handle")
    elif not _is_instance(hint, value):
        raise where.wrong(value, _describe(hint))
    elif dataclasses.is_dataclass(hint):
        for name, field_hint in _hints(type(value)).items():
            _check(field_hint, getattr(value, name), where / name)


def _matches(hint: Any, value: Any, where: _Where) -> bool:
    try:
        _check(hint, value, where)
    except ValueError:
        return False
    return True


def _is_instance(hint: type, value: Any) -> bool:
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _item_hints(hint: Any, count: int, value: Any, where: _Where) -> Iterator[Any]:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is list or (len(args) == 2 and args[1] is Ellipsis):
        return iter(args[:1] * count)
    if len(args) != count:
        raise where.wrong(value, f"{_describe(hint)}, {len(args)} items")
    return iter(args)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Field name -> annotation with strings resolved, for the fields that the constructor takes."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    if _KIND in names:
        raise TypeError(f"{cls.__name__}.{_KIND}: this name is taken by the kind of a union's member")
    return {name: hints[name] for name in names}


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _describe(hint: Any) -> str:
    """The annotation as one would write it."""
    if hint is types.NoneType:
        return "None"
    if _is_union(hint):
        return " | ".join(map(_describe, typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
