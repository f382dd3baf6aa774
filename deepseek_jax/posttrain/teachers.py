"""Teachers: who they are, and what is stored of them before a student learns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax import storage
from deepseek_jax.posttrain.distill_step import Batch, make_top_k
from deepseek_jax.posttrain.divergence import TopK
from deepseek_jax.posttrain.rollout import checksum
from deepseek_jax.posttrain.session import Session
from deepseek_jax.training.interrupt import Stopped

FILE_BYTES = 2**26
"""Of what is stored in one go, about: a kill costs no more work than that."""
_ARRAYS = {"ids": np.dtype(np.int32), "logprobs": np.dtype(np.float32), "rest": np.dtype(np.float32)}


def fingerprint(variables: Any) -> str:
    """Hex, of a model's weights: a run that goes on must have the teachers that it began with."""
    return hashlib.blake2b(json.dumps(sorted(checksum(variables).items())).encode(), digest_size=16).hexdigest()


class StoredTeacher:
    """A teacher's `TopK` of every place of numbered windows, in .npy files that are read as memory maps.

    File p has windows [p · per_file, (p + 1) · per_file): `<p>_ids.npy` int32 [n, T, k], `<p>_logprobs.npy` float32
    [n, T, k], `<p>_rest.npy` float32 [n, T]. index.json says what they are of, and which model's.
    """

    def __init__(self, folder: Any, windows: int, places: int, top_k: int, facts: dict[str, Any]):
        """
        Args:
            folder: of this teacher.
            windows: how many there are.
            places: T.
            top_k: k.
            facts: what else decides the numbers, JSON.
        Raises: ValueError where the folder holds something else.
        """
        self.folder, self.windows, self.places, self.top_k = storage.path(folder), windows, places, top_k
        self.per_file = max(FILE_BYTES // (places * (8 * top_k + 4)), 1)
        self.teacher: str | None = None
        """`fingerprint` of the teacher, once something is stored."""
        self._facts = {
            "windows": windows, "places": places, "top_k": top_k,
            "arrays": {name: str(dtype) for name, dtype in _ARRAYS.items()}, **facts,
        }  # fmt: skip
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        index = self.folder / "index.json"
        if index.exists():
            found = json.loads(index.read_text(encoding="utf-8"))
            self.teacher, self.per_file = found.pop("teacher"), found.pop("windows_per_file")
            if found != self._facts:
                named = sorted({*found, *self._facts})
                differ = [f"{n}: {found.get(n)} then, {self._facts.get(n)} now" for n in named]
                differ = [n for n, name in zip(differ, named, strict=True) if found.get(name) != self._facts.get(name)]
                raise ValueError(
                    f"{self.folder} was stored for another run ({'; '.join(differ)}): undo that, or start a new run folder"
                )

    @property
    def missing(self) -> list[int]:
        """Files that are still to be written."""
        if self.teacher is None:
            return list(range(-(-self.windows // self.per_file)))
        there = {p.name for p in self.folder.iterdir()}
        count = -(-self.windows // self.per_file)
        return [p for p in range(count) if not all(self._file(p, name).name in there for name in _ARRAYS)]

    def fill(
        self, model: Any, variables: Any, batch_of: Callable[[Sequence[int]], Batch], rows: int, temperature: float,
        chunk: int, session: Session,
    ) -> None:  # fmt: skip
        """Asks the teacher for what is missing; beside the main thread, so that a signal is heard.

        Args:
            model: the teacher's.
            variables: its weights.
            batch_of: the windows of these numbers, on the mesh.
            rows: windows that are asked for at once.
            temperature: of its softmax.
            chunk: places of a sequence whose logits exist at once.
            session: that the run is in.

        Raises: ValueError where the other files are of another teacher; Stopped.
        """
        its = fingerprint(variables)
        if self.teacher not in (None, its):
            raise ValueError(
                f"{self.folder} is half stored, and of another teacher than {model.config.name} is now (its weights were "
                f"{self.teacher}, and are {its}): give the same one, or start a new run folder"
            )
        if self.teacher is None:
            index = {**self._facts, "windows_per_file": self.per_file, "teacher": its}
            storage.write_atomic(self.folder / "index.json", json.dumps(index, indent=2))
            self.teacher = its
        ask = make_top_k(model, self.top_k, temperature, session.mesh, chunk=chunk)

        def work() -> None:
            for p in self.missing:
                numbers = range(p * self.per_file, min((p + 1) * self.per_file, self.windows))
                found: list[TopK] = []
                for first in range(0, len(numbers), rows):
                    session.watchdog.beat(f"asking the teacher, window {numbers[first]} of {self.windows}")
                    if session.interrupt.requested is not None:
                        raise Stopped(f"{session.interrupt.requested} came")
                    part = list(numbers[first : first + rows])
                    of_part = ask(variables, batch_of([*part, *[part[0]] * (rows - len(part))]))
                    found.append(jax.tree.map(lambda x: x[: len(part)], jax.device_get(of_part)))  # noqa: B023
                for name, dtype in _ARRAYS.items():
                    array = np.concatenate([getattr(one, name) for one in found])
                    storage.save_array(self._file(p, name), array.astype(dtype))

        session.aside(work)

    def rows(self, numbers: Sequence[int]) -> TopK:
        """Of the windows of these numbers, by numpy: [n, T, …]."""

        def one(name: str) -> Any:
            return np.stack([self._map(int(i) // self.per_file, name)[int(i) % self.per_file] for i in numbers])

        return TopK(ids=one("ids"), logprobs=one("logprobs"), rest=one("rest"))

    def _file(self, p: int, name: str) -> Any:
        return self.folder / f"{p:05}_{name}.npy"

    def _map(self, p: int, name: str) -> np.ndarray:
        if (p, name) not in self._maps:
            array = storage.map_array(self._file(p, name))
            windows = min(self.per_file, self.windows - p * self.per_file)
            shape = (windows, self.places, self.top_k)[: array.ndim]
            if array.shape != shape or array.dtype != _ARRAYS[name]:
                raise ValueError(f"{self._file(p, name)} is {array.dtype} {array.shape}, not {_ARRAYS[name]} {shape}")
            self._maps[p, name] = array
        return self._maps[p, name]
