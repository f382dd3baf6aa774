"""Rows of tokens: in which order they are taken, how long they are, where they lie."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.parallel.rules import named_sharding


class Endless:
    """Things without end, each by its number (`self[number]`); the position is how many were taken."""

    _next = 0

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError

    def take(self, count: int) -> list[Any]:
        """The next ones."""
        self._next += count
        return [self[index] for index in range(self._next - count, self._next)]

    def get_state(self) -> dict[str, Any]:
        """The position."""
        return {"next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position."""
        self._next = int(state["next"])


class Order(Endless):
    """The numbers below `count`, in a new order each epoch."""

    def __init__(self, count: int, seed: int):
        self._count, self._seed = count, seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self._count)
        if self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng((self._seed, epoch)).permutation(self._count)
        return int(self._epoch[1][place])


def few_lengths(needed: int, longest: int) -> int:
    """The length of rows that need so many places: one of four up to `longest`, so that few programs are compiled."""
    quarter = -(-longest // 4) if longest > 64 else longest
    return min(-(-needed // quarter) * quarter, longest)


def placed(batch: Any, mesh: Mesh) -> Any:
    """A tree of numpy's arrays on a mesh, the rows (first dims) split over those devices that share a batch."""

    def one(x: Any) -> jax.Array:
        return jax.device_put(x, named_sharding(mesh, ("batch", *("none",) * (x.ndim - 1)), x.shape, "batch"))

    return jax.tree.map(one, batch)
