"""Programs that nobody has read, run in a child that is shut in: the trainer's side.

What holds, where Linux grants user namespaces: a program sees no network, no process but its own, no file but Python's
standard library and the system's, read-only, and a temporary folder in memory; none of the trainer's environment, open
files or users' rights; it is limited in time, memory, processes, files and output, and dies with its namespace whatever it
does. What it is not: a virtual machine. The kernel is shared, no filter of system calls is set, memory is limited per
process (times `processes`), and a hole in the kernel is a hole here. Run models that are out to break things on a machine
that holds nothing.

Where user namespaces are missing, `Sandbox` refuses, unless it is allowed to go on without walls. Then only the limits, the
clean environment and a temporary folder are left: the program runs as the trainer's user, and can read, write, connect and
kill whatever that user can, tests and trainer included.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SYSTEM = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache")
_MB = 1 << 20
_PROBE_SECONDS = 30.0  # a machine that is busy when the sandbox is opened must not look like one without walls


class SandboxFailed(RuntimeError):
    """The walls could not be put up, or fell with the program in a way that says nothing of it: nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one program; see `kinds.Code`, whose fields these are."""

    seconds: float
    cpu_seconds: int
    memory_mb: int
    processes: int
    files_mb: int
    output_kb: int


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What became of a program."""

    how: str
    """"exit 0", "exit 1", "signal 9", "time" or "output": over its wall time, over its output."""
    output: bytes
    """What it printed, as far as the limit."""
    errors: bytes = field(default=b"", repr=False)
    """The end of what it wrote to standard error."""


# Says "isolated" where each wall stands that this program can see from inside.
_PROBE = """
import os, socket
wrong = []
try:
    for path in ({outside!r}, "/proc/self", "/etc/passwd"):
        if os.path.exists(path): wrong.append("sees " + path)
    for path in ("/outside", {prefix!r} + "/outside"):
        try: open(path, "w"); wrong.append("writes " + path)
        except OSError: pass
    try: socket.create_connection(("127.0.0.1", {port}), 5); wrong.append("connects")
    except OSError: pass
    if os.getpid() > 2: wrong.append("is process %d" % os.getpid())
    children = 0
    try:
        for _ in range({processes} + 3):
            if not os.fork(): import time; time.sleep(60)
            children += 1
        wrong.append("starts %d processes" % children)
    except OSError: pass
except Exception as error: wrong.append(repr(error))
print("; ".join(wrong) or "isolated")
"""


class Sandbox:
    """Runs programs, from several threads if need be; a context manager.

    Args:
        limits: of each program.
        allow_unsafe: go on without walls where this machine has none.

    Raises, on entering: ValueError where there are no walls and `allow_unsafe` is False.
    """

    def __init__(self, limits: Limits, *, allow_unsafe: bool = False):
        self.limits, self.allow_unsafe = limits, allow_unsafe
        self.isolated = True
        """Whether the walls stand, once entered."""

    def __enter__(self) -> Sandbox:
        self._python = os.path.realpath(sys.executable)
        self._folder = tempfile.mkdtemp(prefix="deepseek_jax_code_")
        try:
            if wrong := self._wrong():
                if not self.allow_unsafe:
                    raise ValueError(
                        f"code of completions cannot be isolated on this machine ({wrong}). It needs Linux 5.12 or later with "
                        "user namespaces; in Docker they need --security-opt seccomp=unconfined --security-opt "
                        "apparmor=unconfined, on Ubuntu 24.04 sysctl kernel.apparmor_restrict_unprivileged_userns=0. "
                        "allow_unsafe_code=True runs it without isolation, with all rights of this user"
                    )
                self.isolated = False
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wrong(self) -> str:
        """What of the walls does not stand; empty where all do."""
        if sys.platform != "linux":
            return f"{sys.platform} has no namespaces"
        try:
            with socket.create_server(("127.0.0.1", 0)) as server:
                probe = _PROBE.format(
                    outside=self._folder, prefix=sys.base_prefix, processes=self.limits.processes,
                    port=server.getsockname()[1],
                )  # fmt: skip
                ended = self.run(probe, "", max(self.limits.seconds, _PROBE_SECONDS))
        except SandboxFailed as failure:
            return str(failure)
        said = ended.output.decode(errors="replace").strip()
        if (ended.how, said) == ("exit 0", "isolated"):
            return ""
        return (
            said or f"a program in there ends with {ended.how}: {ended.errors.decode(errors='replace').strip()[-200:]}"
        )

    def run(self, program: str, stdin: str, seconds: float | None = None) -> Ended:
        """Runs a Python program with an input, for at most so many seconds (by default those of the limits).

        Raises: SandboxFailed where it did not come to run.
        """
        seconds = seconds or self.limits.seconds
        code = program.encode("utf-8", "replace")
        reader, writer = os.pipe()
        try:
            folder = self._folder if self.isolated else tempfile.mkdtemp(dir=self._folder)
            process = subprocess.Popen(
                [self._python, "-I", "-S", str(_CHILD), json.dumps(self._plan(folder, len(code), writer))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                env=self._environment(), pass_fds=(writer,), start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        try:
            how, outputs = self._followed(process, code + stdin.encode("utf-8", "replace"), reader, seconds)
        finally:
            _kill(process)
            os.close(reader)
            if not self.isolated:
                shutil.rmtree(folder, ignore_errors=True)
        said = outputs[2].decode(errors="replace").splitlines()
        failure = next((line for line in said if line.startswith("error ")), None)
        if failure or "ready" not in said:
            raise SandboxFailed(failure.removeprefix("error ") if failure else f"not started after {seconds:g} s")
        # pid 1 of the namespace says how the program ended; where it could not, it was killed with it.
        how = how or next((line for line in said if line.startswith(("exit ", "signal "))), "signal 9")
        return Ended(how=how, output=outputs[0], errors=outputs[1])

    def _environment(self) -> dict[str, str]:
        kept = ("LD_LIBRARY_PATH",)  # where this Python may have its own library
        return {name: os.environ[name] for name in kept if name in os.environ}

    def _plan(self, folder: str, length: int, status: int) -> dict[str, Any]:
        limits = self.limits
        # Besides the program: this process and pid 1 of the namespace, where all are the same user's.
        others = 0 if os.geteuid() == 0 else 2
        shown = [path for path in _SYSTEM if os.path.exists(path)]
        prefix = os.path.realpath(sys.base_prefix)
        if not any(prefix.startswith(path + "/") for path in shown):
            shown = [path for path in shown if not path.startswith(prefix + "/")] + [prefix]
        return {
            "isolate": self.isolated, "folder": folder, "length": length, "status": status, "python": self._python,
            "shown": shown, "files_mb": limits.files_mb, "environment": self._environment(),
            "limits": {
                "RLIMIT_CPU": limits.cpu_seconds, "RLIMIT_AS": limits.memory_mb * _MB, "RLIMIT_CORE": 0,
                "RLIMIT_FSIZE": limits.files_mb * _MB, "RLIMIT_NOFILE": 64,
            } | ({"RLIMIT_NPROC": limits.processes + others} if self.isolated else {}),
        }  # fmt: skip

    def _followed(
        self, process: subprocess.Popen[bytes], stdin: bytes, status: int, seconds: float
    ) -> tuple[str, list[bytes]]:
        """Feeds a process and reads it until it has ended, or has to.

        Returns: why it has to be killed, or ""; its output, the end of its errors, what the status pipe says.
        """
        assert process.stdin and process.stdout and process.stderr
        deadline = time.monotonic() + seconds
        outputs, printed, sent = [b"", b"", b""], 0, 0
        limit = self.limits.output_kb * 1024
        with selectors.DefaultSelector() as selector:
            for number, pipe in enumerate((process.stdout, process.stderr, status)):
                selector.register(pipe, selectors.EVENT_READ, number)
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE, None)
            while len(selector.get_map()) > (not process.stdin.closed):  # a process need not read
                ready = selector.select(max(deadline - time.monotonic(), 0))
                if not ready or time.monotonic() > deadline:
                    return "time", outputs
                for key, _ in ready:
                    if key.data is None:
                        try:
                            sent += os.write(key.fd, stdin[sent : sent + 65536])
                        except BrokenPipeError:
                            sent = len(stdin)
                        if sent == len(stdin):
                            selector.unregister(process.stdin)
                            process.stdin.close()
                        continue
                    more = os.read(key.fd, 65536)
                    if not more:
                        selector.unregister(key.fileobj)
                    outputs[key.data] += more
                    outputs[1] = outputs[1][-2000:]
                    printed += len(more) if key.data < 2 else 0
                    if printed > limit:
                        return "output", outputs
        return "", outputs


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with its group; the group's leader is not reaped before, so that the number is still its own."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # what macOS says of a group that has ended
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
