"""The checkpoints of a run, through Orbax: state, data iterator and a note, in one commit a step.

A step's folder appears whole or not at all, and a SHA-256 manifest of its files follows. Restoring compares the files
with it, and every leaf's name, shape and dtype with what the program expects, before an array is read; the arrays go
onto whatever mesh the program has now.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from deepseek_jax import storage
from deepseek_jax.checkpoint import digests, leaves
from deepseek_jax.checkpoint.digests import Verify
from deepseek_jax.parallel import hosts

_STATE, _DATA, _META = "state", "data", "meta"  # names of a step's parts on disk
_FORMAT = 1


class ResumableIterator(Protocol):
    """What a data iterator must offer to be saved: a state that JSON holds. Grain's iterators do."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Store:
    """Checkpoints in one folder, named by their step.

    ```python
    with Store(run_dir / "checkpoints") as store:
        if (step := store.latest_good()) is not None:
            state, meta = store.restore(abstract_state, batches, step)
        store.save(step, state, batches, {"config": ...})
    ```
    One process tree writes into a folder at a time; a reader beside it opens the folder with `read_only=True`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int | None = 3,
        async_save: bool = True,
        *,
        read_only: bool = False,
        manifests: bool = True,
    ):
        """
        Args:
            directory: the folder, local or not; made when it is missing, unless read_only.
            keep: how many of the latest steps stay, at least 2; None keeps all.
            async_save: whether `save` returns once the state is copied, and writes behind the program's back.
            read_only: for a program that only restores: nothing in the folder is touched.
            manifests: whether `save` hashes what it has written; reading it all again takes a while for terabytes.
        Raises: ValueError for a bad `keep`, or a folder that is not there to be read.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: give at least 1, or None to keep every checkpoint")
        self.directory = storage.path(directory)
        if storage.is_local(self.directory):
            self.directory = self.directory.resolve()
        if set(os.fspath(self.directory)) & set("*?["):
            raise ValueError(
                f"directory={os.fspath(self.directory)!r}: Orbax takes *, ? and [ in a path for patterns, and would not "
                f"find what it has saved; name the folder otherwise"
            )
        self._read_only, self._manifests = read_only, manifests
        self._hashing: threading.Thread | None = None
        self._hashing_error: BaseException | None = None
        if read_only and not self.directory.is_dir():
            raise ValueError(f"directory={str(directory)!r}: no checkpoints there; give the run's checkpoints folder")
        _quiet()
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        self._ocp = ocp
        if not read_only:
            storage.make_folder(self.directory)  # on a cloud, one that stays when its last object goes
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            # A killed save leaves a temporary folder; the writer that opens the store next clears it away.
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=async_save,
            # Orbax deletes the oldest at the commit, before the new step's manifest is there: never the only good one.
            preservation_policy=None if keep is None else checkpoint_managers.LatestN(max(keep, 2)),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: ResumableIterator | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> bool:
        """Saves one step. The state and the iterator's position are taken before it returns, so the program may go on,
        and give the state's buffers away, at once.

        Args:
            step: names the checkpoint.
            state: a pytree of arrays: any dtype, typed PRNG keys included, sharded in any way.
            data_iterator: its `get_state()` is saved; the same on every process.
            meta: a note that JSON holds, such as the configuration, tokens seen, hashes.
        Returns: False, with nothing written, when this step is saved already.
        Raises: ValueError for a leaf that is no array, a note that JSON cannot hold, or a read-only store; the error
            of an earlier asynchronous save.
        """
        if self._read_only:
            raise ValueError(f"{self.directory} was opened with read_only=True: open it without, to save step {step}")
        named, _ = leaves.flatten(state)
        note = {
            "format": _FORMAT,
            "step": int(step),
            "leaves": leaves.record(named),
            "manifest": self._manifests,
            "meta": dict(meta or {}),
        }
        try:
            json.dumps(note, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta={meta!r}: JSON cannot hold it ({error})") from None
        if int(step) in hosts.of_first(self.steps()):  # one answer: Orbax has all wait for all
            return False
        parts = {
            _STATE: self._ocp.args.PyTreeSave(leaves.to_stored(named)),
            _META: self._ocp.args.JsonSave(note),
        }
        if data_iterator is not None:
            parts[_DATA] = self._ocp.args.JsonSave(dict(data_iterator.get_state()))
        saved = bool(self._manager.save(int(step), args=self._ocp.args.Composite(**parts), force=True))
        if saved and self._manifests:
            self._hashing = threading.Thread(target=self._write_manifest, args=(int(step),), name="checkpoint hashes")
            self._hashing.start()
        return saved

    def _write_manifest(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            digests.write(self.directory / str(step), jax.process_index(), jax.process_count())
        except BaseException as error:
            self._hashing_error = error

    def steps(self) -> list[int]:
        """The steps that are wholly on disk, ascending: read from the disk, not remembered, after a save under way
        has ended. Raises its error, if it failed."""
        self.wait()
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The last step that is wholly on disk, or None; see `steps`."""
        return max(self.steps(), default=None)

    def latest_good(self, verify: Verify = "full", say: Callable[[str], None] = print) -> int | None:
        """The last step whose files are what its manifest says, or None where there is no step to go on from.

        Args:
            verify: see `digests.problems`.
            say: gets a message for every step that is passed over.
        Several processes share the looking, all call this, and come to one answer.

        Returns: None when there are no steps, or only the first save of a program that was killed before its manifest.
        Raises: ValueError when there are steps and none is good; OSError when they cannot be read now.
        """
        passed_over = []
        for step in reversed(hosts.of_first(self.steps())):
            here = self.directory / str(step)
            with hosts.together(f"looking at checkpoint {here}"):
                found, cut_off = self._problems(step, verify)
            said = [json.loads(text) for text in hosts.gather(json.dumps([found, cut_off]))]
            found = sorted({problem for problems, _ in said for problem in problems})
            cut_off = all(cut for problems, cut in said if problems)
            if not found:
                return step
            say(f"checkpoint {here} is passed over: {_first(found)}")
            passed_over.append((f"step {step}: {_first(found)}", cut_off))
        # A save waits for the manifest of the one before, so a kill leaves one step without: more of them are damage.
        if len(passed_over) > 1 or not all(cut_off for _, cut_off in passed_over):
            raise ValueError(
                f"{self.directory} holds no good checkpoint ({'; '.join(text for text, _ in passed_over)}): bring its "
                f"files back, or start a new run folder"
            )
        return None

    def _problems(self, step: int, verify: Verify) -> tuple[list[str], bool]:
        """What is wrong with a step, and whether it is only a save that was cut off."""
        here = self.directory / str(step)
        if verify != "off" and digests.manifests(here):
            if digests.cut_off(here):
                return ["manifests of processes are missing: the save was cut off"], True
            return digests.problems(here, verify, part=(jax.process_index(), jax.process_count())), False
        try:
            promised = self._note(step).get("manifest")
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            return [f"its note cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:200]})"], False
        if promised and verify != "off":
            return ["its manifest is missing: the save was cut off"], True
        return [], False

    def discard(self, step: int) -> None:
        """Deletes one step."""
        self.wait()
        self._manager.reload()  # may have been listed before another process wrote it
        self._manager.delete(int(step))

    def restore(
        self, abstract_state: Any, data_iterator: ResumableIterator | None = None, step: int | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reads one step.

        Args:
            abstract_state: the state's pytree with a `jax.ShapeDtypeStruct` (or an array) a leaf. A leaf's `sharding`
                says where it goes, whatever mesh it was saved from; without one it goes to the default device.
            data_iterator: its `set_state` is called with the saved state.
            step: which one; None is the latest.
        Returns: (state, meta), the arrays bit for bit what was saved.
        Raises: ValueError that names every leaf missing, left over, or of another shape or dtype; when there is no
            such step; when an iterator is given and none was saved.
        """
        return self._restore(abstract_state, data_iterator, step, partial=False)

    def restore_params(self, abstract_variables: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a part of one step, such as {"params": ..., "router": ...} for generation: names are those of the
        state's top level, and what is not asked for is not read. Otherwise as `restore`."""
        return self._restore(abstract_variables, None, step, partial=True)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The note of one step; None is the latest."""
        return self._note(self._which(step))["meta"]

    def wait(self) -> None:
        """Returns when the save under way is on disk. Raises its error, if it failed."""
        hashing, self._hashing = self._hashing, None
        if hashing is not None:
            hashing.join()
        error, self._hashing_error = self._hashing_error, None
        if error is not None:
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()  # it raises the same error once more, for this thread
            self._manager.reload()  # it remembers the failed step as saved
            raise error
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _restore(
        self, abstract_state: Any, data_iterator: ResumableIterator | None, step: int | None, *, partial: bool
    ) -> tuple[Any, dict[str, Any]]:
        args = self._ocp.args
        step = self._which(step)
        note = self._note(step)
        named, treedef = leaves.flatten(abstract_state)
        saved, here = note["leaves"], self.directory / str(step)
        leaves.require_equal(saved, leaves.record(named), where=f"checkpoint {here}", partial=partial)
        template = leaves.to_stored_template(named)
        parts: dict[str, Any] = {
            _STATE: args.PyTreeRestore(
                item=template,
                restore_args=self._ocp.checkpoint_utils.construct_restore_args(template),
                partial_restore=partial,
            )
        }
        if data_iterator is not None:
            if not (here / _DATA).exists():
                raise ValueError(f"checkpoint {here} was saved without a data iterator: restore it without one")
            data_iterator.set_state(_position(here / _DATA))
        restored = self._manager.restore(step, args=args.Composite(**parts))
        state = jax.tree_util.tree_unflatten(treedef, leaves.from_stored(restored[_STATE], named, saved))
        return state, note["meta"]

    def _which(self, step: int | None) -> int:
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise ValueError(f"step={step}: {self.directory} holds {f'steps {steps}' if steps else 'no checkpoint'}")
        return steps[-1] if step is None else int(step)

    def _note(self, step: int) -> dict[str, Any]:
        # Not through Orbax, where processes would have to ask together.
        note = json.loads((self.directory / str(step) / _META / "metadata").read_text())
        if note.get("format") != _FORMAT:
            raise WrongFormat(
                f"checkpoint {self.directory / str(step)} has format {note.get('format')}, this version reads {_FORMAT}"
            )
        return note


class WrongFormat(Exception):
    """A checkpoint of another version of this package: neither damaged nor readable."""

    exit_code = 2


def _position(folder: Any) -> dict[str, Any]:
    """The saved state of the data's iterator, the same for every process, however many there were."""
    by_process = sorted(file for file in folder.iterdir() if file.name.startswith("process_"))  # until version 0.1.0
    return json.loads((by_process or [folder / "metadata"])[0].read_text())


def _first(found: list[str], count: int = 3) -> str:
    return ", ".join(found[:count]) + (f" and {len(found) - count} more" if len(found) > count else "")


def _quiet() -> None:
    """Orbax tells of every save through absl's logger, at levels meant for its own developers; errors stay errors.

    A level that the user has set stays too.
    """
    logger = logging.getLogger("absl")
    if logger.level in (logging.NOTSET, logging.WARNING):
        import absl.logging

        absl.logging.set_verbosity(absl.logging.ERROR)
