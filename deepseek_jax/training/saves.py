"""A run's saves: at most one a step, none of what is not finite, each failure told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax import storage
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.metrics.writer import JsonlWriter
from deepseek_jax.parallel import hosts
from deepseek_jax.training.guard import all_finite
from deepseek_jax.training.trouble import NotFinite, SaveFailed
from deepseek_jax.training.watchdog import Watchdog


class Saves:
    """What a loop saves through.

    Fields:
        saved: the last step that was given to the store; None where there was none, or it failed.
    """

    def __init__(
        self, store: Store, watchdog: Watchdog, lock: storage.RunLock | None, *, going_on: bool = False, remedy: str = ""
    ):  # fmt: skip
        """
        Args:
            store: where checkpoints go.
            watchdog: told of what begins.
            lock: of the run's folder, looked at before each save; None on processes that hold none.
            going_on: whether a failed save is told of, rather than raised; that of the last one is raised always.
            remedy: what a raised failure says at its end.
        """
        self.saved: int | None = None
        self._store, self._watchdog, self._lock = store, watchdog, lock
        self._going_on, self._remedy = going_on, remedy

    def save(
        self, step: int, state: Any, position: Any, note: Mapping[str, Any], log: JsonlWriter | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Saves a step, unless it is saved, or is the first; writing goes on behind the program's back.

        Args:
            step: names the checkpoint.
            state: a tree of arrays.
            position: the data's, with `get_state()`.
            note: of the checkpoint.
            log: flushed before, since lines that a checkpoint has passed are not written again.
            say: gets a message where a save failed and the run goes on.

        Raises: NotFinite, SaveFailed.
        """
        if self.saved == step or step == 0:
            return
        with hosts.together(f"preparing to save step {step}"):
            if self._lock is not None:
                self._lock.check()
            if log is not None:
                log.flush()
        self.finish(step, say)
        self._watchdog.beat(f"saving step {step}")
        if not bool(all_finite(state)):
            raise NotFinite(f"the state of step {step} holds numbers that are not finite: it is not saved")
        self.saved = step
        try:
            if not self._store.save(step, state, position, note):
                raise OSError(f"a checkpoint of step {step} is there already, and not from this run")
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error, say)

    def finish(self, step: int, say: Callable[[str], None], *, last: bool = False) -> None:
        """Returns when the save under way is on disk, or its failure is told.

        Raises: SaveFailed; with `last` also where the run's `step` is not there.
        """
        self._watchdog.beat(f"finishing the save of step {self.saved}")
        try:
            with hosts.together(f"saving step {self.saved}"):  # its manifests are there once all have come through
                self._store.wait()
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error, say, last=last)
        # As the first process sees it: another's file system may list a step later.
        if last and step and step not in (on_disk := hosts.of_first(self._store.steps())):
            raise SaveFailed(f"step {step}, the last, is not in {self._store.directory}, which holds {on_disk}")

    def _failed(self, error: Exception, say: Callable[[str], None], *, last: bool = False) -> None:
        step, self.saved = self.saved, None
        said = str(error).strip().splitlines() or ["no message"]
        message = (
            f"step {step}: saving a checkpoint to {self._store.directory} failed ({type(error).__name__}: {said[0]}); "
            f"on disk: steps {self._store.steps()}"
        )
        if last or not self._going_on:
            raise SaveFailed(f"{message}. {self._remedy}".removesuffix(". ")) from error
        say(f"{message}; going on")
