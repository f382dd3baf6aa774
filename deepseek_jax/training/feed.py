"""What a run reads: of each global batch, the rows that this process' devices hold.

Which windows make a batch is arithmetic from its number, and which rows are ours is asked of the sharding, so the
batches depend on neither the mesh, nor the number of processes, nor the pieces of a step: a run goes on with other ones
without a window lost or read twice.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jax.sharding import Mesh

from deepseek_jax.parallel.hosts import Rows, rows_here
from deepseek_jax.parallel.rules import named_sharding
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.step import BATCH_AXES


class Feed:
    """Batches of a run, in order, with the position as a checkpoint holds it: the number of pieces read, and their size."""

    def __init__(self, config: RunConfig, mesh: Mesh, data: Any):
        """
        Args:
            config: of the run.
            mesh: where the batches go.
            data: with `train_batches`.
        """
        self._plan, self._piece = config.plan, config.piece_size
        # Kept for every size: a batch ramp has few of them.
        self.rows = functools.cache(
            lambda size: rows_here(named_sharding(mesh, BATCH_AXES[:1], (size,), "batch"), size)
        )
        self._batches = data.train_batches(config.piece_size, config.seed, share=self._share)

    def read(self, step: int) -> tuple[dict[str, np.ndarray], Rows]:
        """The batch of a step, the next one: arrays [b, T + 1] of the rows that are here, and which these are."""
        size = self._plan.batch_size(step)
        pieces = [next(self._batches) for _ in range(size // self._piece)]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}, self.rows(size)

    def get_state(self) -> dict[str, Any]:
        """The position, the same on every process."""
        return self._batches.get_state() | {"piece": self._piece}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position; without a size, one in pieces as they are now."""
        windows = state["next_index"] * state.get("piece", self._piece)
        assert windows % self._piece == 0  # every step is whole pieces, of any size that divides a batch
        self._batches.set_state({"next_index": windows // self._piece})

    def _share(self, piece: int) -> np.ndarray:
        """The windows that this process reads in place of a piece: its rows of the step, in as many parts as the step
        has pieces."""
        step = self._plan.step_of(piece * self._piece)
        size, first = self._plan.batch_size(step), self._plan.tokens_before(step) // self._plan.seq_len
        ours = self.rows(size).numbers
        part = len(ours) * self._piece // size
        begin = (piece - first // self._piece) * part
        return first + ours[begin : begin + part]
