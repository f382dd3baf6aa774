"""What a compiled program says of itself: collectives in its text, buffers in its assignment. Plain text in, no jax."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c64|c128)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def shape_bytes(text: str) -> int:
    """Bytes of the largest array in a type such as "(f32[8,128]{1,0}, u32[])"."""
    return max((_bytes(dtype, dims) for dtype, dims in _SHAPE.findall(text)), default=0)


def _bytes(dtype: str, dims: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", dtype)
    size = _BYTES.get(dtype) or (int(digits[1]) // 8 if digits else 1)
    return math.prod(int(dim) for dim in dims.split(",") if dim) * max(size, 1)


@dataclass(frozen=True)
class HloCollective:
    """One collective of a program."""

    kind: str
    shape: str
    """Of its largest operand or result, such as "bf16[1,8192,8192]"."""
    bytes: int
    """Of that array on one device."""
    times: int
    """How often it runs: loops whose length the text tells are counted, others once."""
    group: int
    """Devices of a group; 0 where the text does not tell."""
    where: str
    """Operation of the source, by its op_name."""


@dataclass
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str


def _computations(text: str) -> dict[str, list[_Instruction]]:
    found: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = found.setdefault(match[1], [])
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
    return found


def _entry(text: str) -> str | None:
    match = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return match[1] if match else None


def collectives_in(text: str) -> list[HloCollective]:
    """All collectives of an HLO text, largest total first. One that runs asynchronously is counted once."""
    computations = _computations(text)
    times = _times(computations, _entry(text))
    found: dict[object, HloCollective] = {}
    for name, instructions in computations.items():
        types = {one.name: one.type for one in instructions}
        for one in instructions:
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS or one.opcode.endswith("-done"):
                continue
            operands = re.findall(r"%([\w.\-]+)", one.rest.split(")")[0])
            held = " ".join([one.type, *(types.get(operand, "") for operand in operands)])
            shape = max((f"{dtype}[{dims}]" for dtype, dims in _SHAPE.findall(held)), key=shape_bytes, default="")
            channel = re.search(r"channel_id=(\d+)", one.rest)
            op = re.search(r'op_name="([^"]*)"', one.rest)
            new = HloCollective(
                kind, shape, shape_bytes(shape), times.get(name, 1), _group(one.rest), op[1] if op else ""
            )
            # The phases of one asynchronous collective stand in computations of their own, under one channel.
            key = (kind, channel[1]) if channel else (name, one.name)
            if key not in found or found[key].times < new.times:
                found[key] = new
    return sorted(found.values(), key=lambda one: -one.bytes * one.times)


def _group(rest: str) -> int:
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    return 0


def _times(computations: dict[str, list[_Instruction]], entry: str | None) -> dict[str, int]:
    """How often each computation runs, from the entry down; a program calls no computation that calls it."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        if name not in computations or times.get(name, 0) >= count:
            return
        times[name] = count
        for one in computations[name]:
            called = dict(_CALLED.findall(one.rest))
            loop = trip_count(one.rest, computations.get(called.get("condition", ""), [])) if "body" in called else None
            for role, child in called.items():
                visit(child, count * (loop or 1) if role == "body" else count)
            for branches in _BRANCHES.findall(one.rest):
                for child in re.findall(r"%?([\w.\-]+)", branches):
                    visit(child, count)

    if entry:
        visit(entry, 1)
    return times


def trip_count(rest: str, condition: list[_Instruction]) -> int | None:
    """How often a loop runs: as XLA notes it, or from a condition i < constant; None where neither tells."""
    if match := re.search(r"known_trip_count[^\d]*(\d+)", rest):
        return int(match[1])
    constants = {one.name: one.rest.split(")")[0] for one in condition if one.opcode == "constant"}
    for one in condition:
        if one.opcode == "compare" and "direction=LT" in one.rest:
            operands = re.findall(r"%([\w.\-]+)", one.rest.split(")")[0])
            if len(operands) == 2 and constants.get(operands[1], "").isdigit():
                return int(constants[operands[1]])
    return None


def summary(found: Iterable[HloCollective]) -> list[dict[str, object]]:
    """Collectives by kind and dtype, most bytes first: how many, bytes once, bytes with loops counted."""
    rows: dict[str, list[int]] = {}
    for one in found:
        row = rows.setdefault(f"{one.kind} {one.shape.split('[')[0]}", [0, 0, 0])
        for i, more in enumerate((1, one.bytes, one.bytes * one.times)):
            row[i] += more
    ordered = sorted(rows.items(), key=lambda item: -item[1][2])
    return [dict(kind=kind, count=n, bytes=once, dynamic_bytes=dynamic) for kind, (n, once, dynamic) in ordered]


@dataclass(frozen=True)
class Allocation:
    """A region of a device's memory and what lies in it."""

    name: str
    bytes: int


_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$")
_VALUE = re.compile(r"^ value: <\d+ (.+?) @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")


def allocations(assignment: str, names: dict[str, str], operations: dict[str, str]) -> Iterator[Allocation]:
    """The regions of a buffer assignment's text, largest first. Of what shares a region over time, the largest is named.

    Args:
        assignment: the compiler's buffer-assignment dump.
        names: of shapes that are known, such as those of the state.
        operations: op_name of an instruction.
    """
    regions: list[tuple[int, str]] = []
    inside: list[tuple[int, int, str, str]] = []
    shared = False  # whether the values that follow lie in a region that many share
    for line in assignment.splitlines():
        if match := _ALLOCATION.match(line):
            size, kind = int(match[1]), match[2]
            here = "color" not in kind  # other memory than the device's main one has a colour
            shared = here and "preallocated-temp" in kind
            if not here:
                continue
            if shape := re.search(r"parameter (\d+), shape \|(.*?)\|", kind):
                regions.append(
                    (size, f"{operations.get(f'parameter({shape[1]})', 'argument ' + shape[1])}, {shape[2]}")
                )
            elif not shared and (shape := re.search(r"shape is \|(.*?)\|", kind)):
                regions.append((size, f"{names.get(shape[1], 'result')}, {shape[1]}"))
        elif shared and (match := _VALUE.match(line)):
            inside.append((int(match[2]), int(match[3]), match[1], match[4]))
    for size, name in sorted([*regions, *_apart(inside, names, operations)], reverse=True):
        yield Allocation(name, size)


def _apart(
    values: list[tuple[int, int, str, str]], names: dict[str, str], operations: dict[str, str]
) -> Iterator[tuple[int, str]]:
    taken: list[tuple[int, int]] = []
    for size, offset, name, type_ in sorted(values, key=lambda value: (-value[0], "(phi)" in value[2])):
        if any(offset < end and start < offset + size for start, end in taken):
            continue
        taken.append((offset, offset + size))
        match = re.search(r"\w+\[[\d,]*\]", type_)
        shape = match[0] if match else type_[:60]
        operation = operations.get(re.sub(r"[{ ].*", "", name), "")
        known = names.get(shape)
        yield size, ", ".join(filter(None, (f"like {known}" if known else "", shape, operation or name)))


def op_names(text: str) -> dict[str, str]:
    """Instruction -> its op_name, from the model down; "parameter(3)" -> the argument."""
    text = text.replace("\\'", "'")
    pairs = re.findall(r'^\s+(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE)
    entry = text[text.find("\nENTRY") :]
    arguments = re.findall(r'(parameter\(\d+\)).*?op_name="([^"]*)"', entry)
    return {name: path.partition("/")[2][-100:] for name, path in pairs} | dict(arguments)
