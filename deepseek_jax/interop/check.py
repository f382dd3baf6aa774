"""What a checkpoint holds against what its configuration asks for: missing, left over, of the wrong shape or dtype."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from deepseek_jax.config import GQA, ModelConfig
from deepseek_jax.interop.fp8 import scale_shape
from deepseek_jax.interop.headers import FLOAT8, Checkpoint, TensorInfo
from deepseek_jax.interop.names import copies
from deepseek_jax.interop.rows import Row, scale_name

_FLOATS = ("F32", "BF16", "F16")
_SHOWN = 20


@dataclass
class Problems:
    """Sentences, by kind; all empty where the checkpoint is what its config.json says."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.wrong)

    def lines(self) -> list[str]:
        """One line a group of tensors whose names differ in numbers alone."""
        return [
            *(f"missing: {text}" for text in summarise(self.missing)),
            *(f"left over: {text}" for text in summarise(self.extra)),
            *(f"wrong: {text}" for text in summarise(self.wrong)),
        ]


def check(
    checkpoint: Checkpoint, config: ModelConfig, rows: list[Row], block: tuple[int, int] | None, *, mtp: bool = True
) -> Problems:
    """Compare names, shapes and dtypes; reads no tensor.

    Args:
        checkpoint: headers.
        config: the configuration, with the multi-token modules that the file states.
        rows: its table, without these modules where `mtp` is False.
        block: of the FP8 scales; None where config.json states no quantisation.
        mtp: False passes over the layers of the multi-token modules.
    """
    problems, seen = Problems(), set()
    tensors = checkpoint.tensors
    for row in rows:
        for _, name in row.names():
            if name in seen:
                continue
            seen.add(name)
            if name not in tensors:
                problems.missing.append(name)
                continue
            seen |= _check_one(name, row.tensor_shape, row.fp8, tensors, block, problems)
    for name, original in copies(config).items():
        if name in tensors and original in tensors:
            seen.add(name)
            ours, theirs = tensors[name], tensors[original]
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                problems.wrong.append(
                    f"{name}: {_show(ours)}, but {original}, of which it is a copy, is {_show(theirs)}"
                )
    if isinstance(config.attention, GQA):  # tables of angles that old checkpoints carry; `load_hf` compares them
        seen |= {name for name in tensors if is_angles(name)}
    modules = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    skipped = () if mtp else tuple(f"model.layers.{layer}." for layer in modules)
    problems.extra += [name for name in tensors if name not in seen and not name.startswith(skipped or ("\0",))]
    return problems


def require_whole(problems: Problems, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raises ValueError that lists every problem."""
    if not problems:
        return
    lines = problems.lines()
    shown = lines[:_SHOWN] + ([f"… and {len(lines) - _SHOWN} lines more"] if len(lines) > _SHOWN else [])
    hint = ""
    modules = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    held = any(name.startswith(f"model.layers.{layer}.") for name in checkpoint.tensors for layer in modules)
    if modules and not held:
        hint = (
            f"\nconfig.json states num_nextn_predict_layers = {len(modules)}, but no tensor of these modules is here "
            f"(transformers writes none): mtp=False (--no-mtp) loads the main model alone"
        )
    raise ValueError(f"{checkpoint.folder} is not what its config.json says:\n  " + "\n  ".join(shown) + hint)


def is_angles(name: str) -> bool:
    """Whether this is a layer's table of rope's inverse frequencies."""
    return re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name) is not None


def summarise(texts: Iterable[str]) -> list[str]:
    """Texts that differ in the numbers between dots alone, as one: `model.layers.3-60.mlp.experts.0-255.up (14848)`."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for text in texts:
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", text)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "\0", text)
        groups.setdefault(pattern, []).append(tuple(map(int, numbers)))
    lines = []
    for pattern, places in groups.items():
        spans = [_ranges(sorted(set(column))) for column in zip(*places, strict=True)]
        full = math.prod(len(set(column)) for column in zip(*places, strict=True))
        count = "" if len(places) == 1 else f" ({len(places)}{'' if full == len(places) else ' of these'})"
        for span in spans:
            pattern = pattern.replace("\0", span, 1)
        lines.append(pattern + count)
    return lines


def _check_one(
    name: str,
    shape: tuple[int, ...],
    quantised: bool,
    tensors: dict[str, TensorInfo],
    block: tuple[int, int] | None,
    problems: Problems,
) -> set[str]:
    """Problems of one tensor and its scales; returns the names looked at."""
    info, scale = tensors[name], scale_name(name)
    if info.shape != shape:
        problems.wrong.append(f"{name}: {_show(info)}, expected shape {list(shape)}")
    if info.dtype != FLOAT8:
        if info.dtype not in _FLOATS:
            problems.wrong.append(f"{name}: {_show(info)}, expected one of {', '.join(_FLOATS)}")
        return set()
    if not quantised:
        problems.wrong.append(f"{name}: {_show(info)}, but this tensor is never quantised")
    elif block is None:
        problems.wrong.append(f"{name}: {_show(info)}, but config.json has no quantization_config")
    elif scale not in tensors:
        problems.missing.append(scale)
    else:
        expected = scale_shape((shape[0], shape[1]), block)
        if tensors[scale].shape != expected or tensors[scale].dtype != "F32":
            problems.wrong.append(f"{scale}: {_show(tensors[scale])}, expected F32{list(expected)}")
    return {scale}


def _show(info: TensorInfo) -> str:
    return f"{info.dtype}{list(info.shape)}"


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
