"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from typing import Any

from etils import epath

from deepseek_jax.storage.files import AnyPath, is_local, list_files, path, write_atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_held_here: set[int] = set()  # descriptors of locks, for the children of a fork to close


class RunLock:
    """Keeps a second process out of a run folder: `with RunLock(run_dir): ...`.

    On a local disk the kernel holds the lock (flock on `.lock`) and lets go of it when the process ends, in whatever
    way. On gs://, and on a file system without flock, it is a lease: a file in `.lease/` that a thread renews, and
    that counts until it is `stale_minutes` old. Two programs that begin at the same moment may both be refused,
    never both let in; this needs the storage to show a written file to every list that begins later, as Google's does,
    and clocks that differ by less than half of `stale_minutes`.

    Of a job with several processes, the first alone takes it.
    """

    def __init__(self, run_dir: AnyPath, stale_minutes: float = 10.0):
        """
        Args:
            run_dir: the folder; made when it is missing.
            stale_minutes: after how long without a renewal a lease counts no more; a run that was killed without a
                word on another machine keeps the folder for so long.
        """
        self.run_dir = path(run_dir)
        self._stale = stale_minutes * 60
        self._descriptor: int | None = None
        self._lease: _Lease | None = None

    def acquire(self) -> None:
        """Takes the lock. Raises ValueError where it is held, naming the holder's host, process and start."""
        if self._descriptor is not None or self._lease is not None:
            raise ValueError(f"{self.run_dir}: this RunLock is held already; release it first")
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now_text(), **_this_machine()}
        if not (is_local(self.run_dir) and self._flock(me)):
            self._lease = _Lease(self.run_dir, me, self._stale)

    def check(self) -> None:
        """Raises ValueError when the lock was lost: a lease that could not be renewed in time, as on a suspended
        machine, and that another process may hold by now. Asks no storage."""
        if self._lease is not None and (lost := self._lease.loss()):
            raise ValueError(f"{self.run_dir}: the lock is lost: {lost}; end this run")

    def release(self) -> None:
        """Lets go; a second call does nothing."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)  # the file stays: deleting a locked name would let two in
            os.close(self._descriptor)
            _held_here.discard(self._descriptor)
            self._descriptor = None
        if self._lease is not None:
            self._lease.end()
            self._lease = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _flock(self, me: dict[str, Any]) -> bool:
        """Takes the kernel's lock; False where there is none to take."""
        if fcntl is None:
            return False
        self.run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(me).encode(), 0)
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(_refusal(self.run_dir, _parsed(holder), "")) from None
            if error.errno in _NO_FLOCK:
                return False
            raise
        self._descriptor = descriptor
        _held_here.add(descriptor)
        return True


class _Lease:
    """A file that says who holds the folder, renewed for as long as the process lives.

    A contender writes its own file and then lists the others: of two, at least one sees the other's, and gives way.
    Two can be held side by side only when the older one was found stale and then went on after all, as on a machine
    that slept: it sees the younger one at its next renewal, and is lost.
    """

    def __init__(self, run_dir: epath.Path, me: dict[str, Any], stale: float):
        self._lost: str | None = None
        self._run_dir, self._stale = run_dir, stale
        self._note = {**me, "began": time.time(), "held": False}
        self._folder = run_dir / ".lease"
        self._own = self._folder / f"{uuid.uuid4().hex}.json"
        self._refuse_others(self._others())
        self._renew()
        try:
            others = self._others()
            self._refuse_others(others)
            for other in others:
                other.unlink(missing_ok=True)
            self._note["held"] = True
            self._renew()
        except BaseException:
            self._own.unlink(missing_ok=True)
            raise
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join(timeout=60)
        try:
            self._own.unlink(missing_ok=True)
        except Exception as error:  # the run's own outcome matters more; the lease ends by itself
            logging.getLogger(__name__).warning("%s: the lease was not deleted (%s)", self._run_dir, error)
        if is_local(self._folder):
            with contextlib.suppress(OSError):  # another's lease stands in it
                os.rmdir(self._folder)

    def _keep(self) -> None:
        while not self._ended.wait(self._stale / 10):
            try:
                files = list_files(self._folder)
                rivals = [note for file in files if file != self._own and (note := self._live(file))]
                younger = [note for note in rivals if note.get("held") and note["began"] > self._note["began"]]
                if self._own not in files or younger:
                    who = f": {_who(younger[0])}" if younger else ""
                    self._lost = f"its lease was deleted, or found stale by another process{who}"
                    return
                self._renew()
            except Exception as error:  # whatever the storage throws: the next round tries again
                logging.getLogger(__name__).warning("%s: the lease was not renewed (%s)", self._run_dir, error)
                if self.loss():
                    return

    def loss(self) -> str | None:
        """Why the lease is lost, or None. Told before another may come in, also while a request to the storage hangs."""
        if not self._lost and time.time() - self._renewed > self._stale * 0.8:
            self._lost = f"its lease could not be renewed since {_text_of(self._renewed)}"
        return self._lost

    def _renew(self) -> None:
        now = time.time()
        write_atomic(self._own, json.dumps({**self._note, "renewed": now}))
        self._renewed = now

    def _others(self) -> list[epath.Path]:
        return [file for file in list_files(self._folder) if file.name != self._own.name]

    def _live(self, file: epath.Path) -> dict[str, Any] | None:
        """Who holds that lease; None when it is gone or counts no more."""
        try:
            holder = _parsed(file.read_bytes())
        except FileNotFoundError:
            return None
        if time.time() - holder.get("renewed", 0) > self._stale or _is_dead(holder):
            return None
        return holder

    def _refuse_others(self, files: list[epath.Path]) -> None:
        for file in files:
            if holder := self._live(file):
                until = _text_of(holder["renewed"] + self._stale)
                remedy = f", or if that process is surely gone, delete {file}, or wait until {until}"
                raise ValueError(_refusal(self._run_dir, holder, remedy))


def _refusal(run_dir: epath.Path, holder: dict[str, Any], remedy: str) -> str:
    since = f" since {holder['since']}" if "since" in holder else ""
    return (
        f"{run_dir} is in use: {_who(holder)} has held it{since}; stop that process, or give another run folder{remedy}"
    )


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"


def _parsed(content: bytes) -> dict[str, Any]:
    """A note of a holder; {} for one that cannot be read, such as that of a process between locking and writing."""
    try:
        note = json.loads(content)
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


def _this_machine() -> dict[str, str]:
    """What tells whether two process ids count the same processes: the boot of the kernel and the container."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return {"machine": f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"}
    except OSError:
        return {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to have ended: only a process of this very machine can be asked."""
    if "machine" not in holder or holder["machine"] != _this_machine().get("machine"):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _now_text() -> str:
    return _text_of(time.time())


def _text_of(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _close_in_child() -> None:
    """A forked worker that outlives its parent must not keep the lock; closing its copy does not release ours."""
    for descriptor in _held_here:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held_here.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
