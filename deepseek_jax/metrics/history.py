"""What a metrics.jsonl says, read once as a stream and kept as curves: a file of gigabytes fits in little memory.

The loads of all experts are most of such a file (58 layers of 256 experts: 120 KB a line), so only those of a few
lines are parsed; everything else is kept whole.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepseek_jax import storage

_KEPT_LOADS = 200  # moments in the picture of loads over time
_LOAD = re.compile(r'"load": \[\[.*?\]\]')


@dataclass
class History:
    """Curves of a run."""

    lines: int = 0
    unreadable: int = 0
    """Lines that are no metric lines, left out; one cut short at the end is not counted."""
    last_step: int = 0
    tokens: float = 0.0
    values: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    """Name -> (step, tokens, value) of every line that has the number."""
    layers: dict[tuple[str, str], list[tuple[float, list[float]]]] = field(default_factory=dict)
    """(group of routers, name) -> (step, a value a layer)."""
    held_out: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)
    """(source, name) -> (step, value)."""
    last_load: tuple[int, dict[str, np.ndarray]] | None = None
    """Step, and group -> [layers, experts], of the last line with loads."""
    loads: dict[tuple[str, int], list[tuple[float, np.ndarray]]] = field(default_factory=dict)
    """(group, layer in it) -> (step, [experts]) of a few layers, at no more than some hundreds of steps."""

    def curve(self, name: str, by: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """(steps or tokens, values) of a name; empty where no line has it."""
        points = np.array(self.values.get(name, ()), dtype=np.float64).reshape(-1, 3)
        return points[:, 1 if by == "tokens" else 0], points[:, 2]

    def last(self, name: str) -> float | None:
        """The last finite value of a name."""
        finite = [value for _, _, value in self.values.get(name, ()) if math.isfinite(value)]
        return finite[-1] if finite else None

    def median(self, name: str) -> float | None:
        """The median of the finite values of a name."""
        finite = [value for _, _, value in self.values.get(name, ()) if math.isfinite(value)]
        return float(np.median(finite)) if finite else None

    def sources(self) -> list[str]:
        """Names of the sources that were evaluated one by one."""
        return list(dict.fromkeys(source for source, _ in self.held_out))


def read_history(path: str | os.PathLike[str]) -> History:
    """Reads a metrics.jsonl, finished or still growing. A file that is not there gives an empty history."""
    history, loads = History(), _Loads()
    file = storage.path(path)
    if not file.exists():
        return history
    held = ""  # the last line with loads, parsed when it turns out to be the last
    with file.open("rb") as stream:
        for raw in stream:
            line = raw.decode("utf-8", "replace")
            if not line.endswith("\n"):  # a run cut short within a line, or one that is writing it now
                break
            has_loads = '"load": [[' in line
            whole = has_loads and loads.wants_one()
            record = _parse(line if whole or not has_loads else _LOAD.sub('"load": null', line))
            if record is None:
                history.unreadable += bool(line.strip())
                continue
            held = line if has_loads else held
            _add(history, record)
            if whole:
                loads.add(record["step"], _load_of(record))
    record = _parse(held) if held else None
    if record is not None:
        history.last_load = record["step"], _load_of(record)
        history.loads = loads.chosen(history.last_load)
    return history


class _Loads:
    """Loads at every line, then at every second, every fourth …: never more than `_KEPT_LOADS`."""

    def __init__(self) -> None:
        self.kept: list[tuple[float, dict[str, np.ndarray]]] = []
        self.stride, self.seen = 1, 0

    def wants_one(self) -> bool:
        self.seen += 1
        return (self.seen - 1) % self.stride == 0

    def add(self, step: int, groups: dict[str, np.ndarray]) -> None:
        self.kept.append((step, groups))
        if len(self.kept) > _KEPT_LOADS:
            self.kept = self.kept[::2]
            self.stride *= 2

    def chosen(self, last: tuple[int, dict[str, np.ndarray]]) -> dict[tuple[str, int], list[tuple[float, np.ndarray]]]:
        """Loads over time of the first, middle and last layer of each group."""
        kept = self.kept if self.kept and self.kept[-1][0] == last[0] else [*self.kept, last]
        found = {}
        for name, load_LE in last[1].items():
            count = len(load_LE)
            for layer in sorted({0, count // 2, count - 1}) if count else ():
                rows = [(step, groups[name][layer]) for step, groups in kept if _same(groups.get(name), load_LE)]
                found[name, layer] = rows
        return found


def _same(load: np.ndarray | None, other: np.ndarray) -> bool:
    return load is not None and load.shape == other.shape


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _load_of(record: dict[str, Any]) -> dict[str, np.ndarray]:
    groups = {}
    for name, stats in _dict(record.get("router")).items():
        load = _array(_dict(stats).get("load"))
        if load is not None and load.ndim == 2 and load.size:
            groups[str(name)] = load
    return groups


def _add(history: History, record: dict[str, Any]) -> None:
    step = record["step"]
    history.lines += 1
    history.last_step = max(history.last_step, step)
    tokens = _number(record.get("tokens"))
    history.tokens = max(history.tokens, tokens or 0.0)
    for name, value in record.items():
        number = _number(value)
        if number is not None:
            history.values.setdefault(name, []).append((step, math.nan if tokens is None else tokens, number))
    for group, stats in _dict(record.get("router")).items():
        for name, value in _dict(stats).items():
            array = None if name == "load" else _array(value)
            if array is not None and array.ndim == 1 and array.size:
                history.layers.setdefault((str(group), str(name)), []).append((step, array.tolist()))
    _add_held_out(history, step, record)


def _add_held_out(history: History, step: int, record: dict[str, Any]) -> None:
    """Every source by its name, and the running mean of the weights as one more."""
    by_source = _dict(record.get("held_out"))
    figures = {str(name): _dict(value) for name, value in by_source.items()}
    if ema := _dict(record.get("held_out_ema")):
        figures["mean of the weights (EMA)"] = ema
    for source, values in figures.items():
        for name in ("loss", "bits_per_byte"):
            number = _number(values.get(name))
            if number is not None:
                history.held_out.setdefault((source, name), []).append((step, number))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A number, the strings for what JSON cannot hold among them."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


def _array(value: Any) -> np.ndarray | None:
    if not isinstance(value, list):
        return None
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):  # no numbers, or rows of different lengths
        return None
