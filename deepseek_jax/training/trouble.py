"""What ends a run early, and what the host does about bad updates and failed saves."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from deepseek_jax import storage
from deepseek_jax.training.config import RunConfig


class TrainingFailed(RuntimeError):
    """The run cannot go on; `exit_code` is the command line's."""

    exit_code = 1


class NotFinite(TrainingFailed):
    """Too many updates in a row were left out, or a number in the state is not finite."""

    exit_code = 76


class SaveFailed(TrainingFailed):
    """A checkpoint could not be written; EX_IOERR of sysexits.h."""

    exit_code = 74


class SkipWatch:
    """Follows the guard's counts from the host, a step behind, and stops a run that only skips."""

    def __init__(self, config: RunConfig, run_dir: Any, say: Callable[[str], None], skipped: int = 0):
        """
        Args:
            config: of the run.
            run_dir: where the batches of skipped updates go when the run stops.
            say: gets a message for each update left out.
            skipped: updates left out before.
        """
        self._limit, self._run_dir, self._say = config.max_skipped_in_a_row, run_dir, say
        self._skipped = skipped
        self._batches: deque[tuple[int, dict[str, np.ndarray]]] = deque(maxlen=self._limit + 1)
        self._waiting: tuple[int, Any] | None = None

    def consumed(self, step: int, batch: dict[str, np.ndarray], metrics: Any) -> None:
        """After step `step` was started with this host batch; looks at the step before, which waits for that one."""
        self._batches.append((step, batch))
        self.look()
        self._waiting = (step, metrics)

    def look(self) -> None:
        """Looks at the last step.

        Raises: NotFinite when as many updates in a row were left out as the configuration allows.
        """
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        skipped = int(metrics["skipped"])
        if skipped == self._skipped:
            return
        self._skipped = skipped
        loss, norm, in_a_row = (float(metrics[name]) for name in ("loss", "grad_norm", "skipped_in_a_row"))
        self._say(f"step {step}: update left out (loss {loss:.4g}, gradient norm {norm:.4g}), {skipped} so far")
        if in_a_row >= self._limit:
            folder = self._save(step)
            raise NotFinite(
                f"{self._limit} updates in a row were not finite, or spikes, up to step {step} (loss {loss:.4g}, gradient "
                f"norm {norm:.4g}): stopped. Their batches are in {folder}; no checkpoint holds anything of them. "
                f"RunConfig.max_skipped_in_a_row sets the limit"
            )

    def _save(self, last: int) -> Any:
        folder = self._run_dir / "skipped"
        for step, batch in self._batches:
            if last - self._limit < step <= last:
                buffer = io.BytesIO()
                np.savez(buffer, allow_pickle=False, **batch)
                rows = f".{jax.process_index()}" if jax.process_count() > 1 else ""  # each has rows of its own
                storage.write_atomic(folder / f"step_{step}{rows}.npz", buffer.getvalue())
        return folder
