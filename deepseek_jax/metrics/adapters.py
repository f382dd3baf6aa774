"""Metrics to other places than metrics.jsonl: TensorBoard, Weights & Biases, or a writer of one's own.

A writer is anything with `write(step, values)` and `close()`. metrics.jsonl stays the record: a writer that fails while
a run goes on is reported in the log and does not stop it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from deepseek_jax import storage

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_log = logging.getLogger(__name__)


@runtime_checkable
class Writer(Protocol):
    """What `open_writers` gives, and what a factory of one's own must return."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One metric line: names -> numbers, strings, None, and dicts, lists or arrays of these; see `scalars`."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


def scalars(values: Mapping[str, Any], first_layer: int = 0) -> dict[str, float]:
    """The numbers of a metric line under flat names, for tools that draw single curves.

    Args:
        values: a metric line. Nested dicts join their names with "/"; a list becomes one name an item, of the decoder's
            routers `layer_03`, of multi-token modules `depth_1`, else the number alone; and their finite mean.
        first_layer: number of the first layer that has experts.
    Returns: name -> float, NaN and infinities among them. Left out are strings, None and what has two dims or more,
        such as the load of every expert: `max_violation` and `entropy` say what it comes to.
    """
    flat: dict[str, float] = {}
    _flatten("", values, first_layer, flat)
    return flat


def check_writers(names: Sequence[str]) -> None:
    """Refuses what `open_writers` would, as far as that is seen without opening anything; for before the long work.

    Raises: ValueError for a name that is none of those, or a package that is missing, with the command that installs it.
    """
    for name in names:
        module, colon, attribute = name.partition(":")
        if name in _PACKAGES:
            if importlib.util.find_spec(_PACKAGES[name]) is None:
                raise ValueError(f"writers: {name!r} needs {_PACKAGES[name]}: pip install 'deepseek-jax[{name}]'")
        elif not (colon and module and attribute):
            raise ValueError(f"writers: {name!r} is none of 'tensorboard', 'wandb' or 'package.module:factory'")


def open_writers(
    names: Sequence[str], run_dir: str | os.PathLike[str], config_dict: Mapping[str, Any],
    *, resume_step: int | None = None,
) -> list[Writer]:  # fmt: skip
    """Opens each writer by its name.

    Args:
        names: "tensorboard" (event files in run_dir/tensorboard), "wandb" (needs WANDB_API_KEY, a login, or
            WANDB_MODE=offline; WANDB_PROJECT names the project), or "package.module:factory", a function of one's own
            that is called as factory(run_dir, config_dict) and returns a `Writer`.
        run_dir: the run's folder.
        config_dict: the resolved configuration, ready for JSON.
        resume_step: the step that was restored, or None for a run that begins anew.
    Raises: ValueError for a name that is none of these, a package that is missing (with the command that installs it),
        or a writer that cannot be opened.
    """
    check_writers(names)
    opened: list[Writer] = []
    try:
        for name in names:
            opened.append(_Careful(name, _open(name, storage.path(run_dir), config_dict, resume_step)))
    except BaseException:
        for writer in opened:
            writer.close()
        raise
    return opened


class TensorBoard:
    """Event files, written by tensorboardX: no TensorFlow is needed to write them, and `tensorboard` alone to look."""

    def __init__(self, folder: str | os.PathLike[str], *, first_layer: int = 0, resume_step: int | None = None):
        """
        Args:
            folder: where event files go; one a start.
            first_layer: number of the first layer that has experts.
            resume_step: later steps of earlier starts are taken back; None takes back all of them.
        """
        from tensorboardX import SummaryWriter

        purge = 0 if resume_step is None else resume_step + 1
        self._first_layer = first_layer
        # A file is named by the second; the suffix keeps a start at once after another from writing over its file.
        self._writer = SummaryWriter(os.fspath(folder), purge_step=purge, filename_suffix=f".{purge}", flush_secs=30)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in scalars(values, self._first_layer).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(
        self, project: str, name: str, config: Mapping[str, Any],
        *, run_id: str | None = None, folder: str | None = None, first_layer: int = 0,
    ):  # fmt: skip
        """
        Args:
            project, name: how W&B lists the run.
            config: the resolved configuration.
            run_id: W&B's id of the run, which a later start continues; None draws one.
            folder: local folder for W&B's own files; None lets W&B choose.
            first_layer: number of the first layer that has experts.
        """
        wandb: Any = importlib.import_module("wandb")
        self._first_layer = first_layer
        self._run: Any = wandb.init(
            project=project, name=name, config=dict(config), id=run_id, resume="allow" if run_id else None, dir=folder
        )
        # W&B's own step only grows, and would drop what a resumed run does again: ours is an axis of its own.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        """What a later start passes as `run_id`."""
        return self._run.id

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **scalars(values, self._first_layer)})

    def close(self) -> None:
        self._run.finish()


class _Careful:
    """A writer whose failures are logged, the first of each stretch, instead of ending a run of weeks."""

    def __init__(self, name: str, writer: Writer):
        self.name, self.writer = name, writer
        self._failing = False

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        try:
            self.writer.write(step, values)
            self._failing = False
        except Exception as error:
            if not self._failing:
                _log.warning("writer %r failed at step %d: %r; metrics.jsonl has the line", self.name, step, error)
            self._failing = True

    def close(self) -> None:
        try:
            self.writer.close()
        except Exception as error:
            _log.warning("writer %r failed to close: %r", self.name, error)


def _open(name: str, run_dir: Any, config: Mapping[str, Any], resume_step: int | None) -> Writer:
    first_layer = ((config.get("model") or {}).get("ffn") or {}).get("first_k_dense_replace") or 0
    try:
        if name == "tensorboard":
            return TensorBoard(run_dir / "tensorboard", first_layer=first_layer, resume_step=resume_step)
        if name == "wandb":
            return _open_wandb(run_dir, config, resume_step, first_layer)
        module, _, attribute = name.partition(":")
        writer = getattr(importlib.import_module(module), attribute)(run_dir, config)
    except Exception as error:  # whatever it is, it is to be mended before the run begins
        raise ValueError(f"writers: {name!r} cannot be opened ({type(error).__name__}: {error})") from error
    if not isinstance(writer, Writer):
        raise ValueError(f"writers: {name!r} returned {writer!r}: it needs write(step, values) and close()")
    return writer


def _open_wandb(run_dir: Any, config: Mapping[str, Any], resume_step: int | None, first_layer: int) -> Wandb:
    """The W&B run of this folder: the one before, where the run goes on."""
    note = run_dir / "wandb_id"
    known = note.read_text().strip() if resume_step is not None and note.exists() else None
    writer = Wandb(
        os.environ.get("WANDB_PROJECT", "deepseek_jax"), run_dir.name, config, run_id=known or None,
        folder=os.fspath(run_dir) if storage.is_local(run_dir) else None, first_layer=first_layer,
    )  # fmt: skip
    storage.write_atomic(note, writer.run_id)
    return writer


def _flatten(name: str, value: Any, first_layer: int, flat: dict[str, float]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{name}/{key}" if name else str(key), item, first_layer, flat)
        return
    if value is None or isinstance(value, str):
        return
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):  # a list of strings, or of lists of different lengths
        return
    if numbers.ndim == 0:
        flat[name] = float(numbers)
    elif numbers.ndim == 1:
        group = name.split("/")[-2] if name.startswith("router/") else ""
        for i, number in enumerate(numbers.tolist()):
            flat[f"{name}/{_item(group, i, first_layer)}"] = number
        if finite := [number for number in numbers.tolist() if math.isfinite(number)]:
            flat[f"{name}/mean"] = sum(finite) / len(finite)


def _item(group: str, index: int, first_layer: int) -> str:
    if group == "moe_layers":
        return f"layer_{first_layer + index:02}"
    return f"depth_{index + 1}" if group else str(index + 1)
