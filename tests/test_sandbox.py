"""Each wall and limit of the sandbox is what stops a program: beside it stands a run without that wall, or with a wider
limit, in which the same program gets through."""

import os
import socket
import sys
import threading
import time
from dataclasses import replace

import pytest
from walls import LIMITS, needs_walls

from deepseek_jax.posttrain.rewards.sandbox import Sandbox


@pytest.fixture(scope="module")
def box():
    with Sandbox(LIMITS) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def open_box():
    """A sandbox without walls, as where namespaces are missing."""
    sandbox = Sandbox(LIMITS, allow_unsafe=True)
    sandbox._wrong = lambda: "for the test"
    with sandbox:
        assert not sandbox.isolated
        yield sandbox


def within(sandbox, program, stdin="", **limits):
    """The program's end in the same sandbox with other limits."""
    before = sandbox.limits
    sandbox.limits = replace(before, **limits)
    try:
        return sandbox.run(program, stdin)
    finally:
        sandbox.limits = before


@needs_walls
@pytest.mark.parametrize(
    ("program", "tight", "wide", "how"),
    [
        ("import time\nwhile time.process_time() < 1.5: pass", {"cpu_seconds": 1}, {"cpu_seconds": 10}, "signal 9"),
        ("import time; time.sleep(1.2)", {"seconds": 1}, {"seconds": 20}, "time"),
        ("x = bytearray(100 << 20)", {"memory_mb": 100}, {"memory_mb": 256}, "exit 1"),
        ("print('4' * 4000)", {"output_kb": 2}, {"output_kb": 64}, "output"),
        ("open('x', 'wb').write(bytes(2 << 20))", {"files_mb": 1}, {"files_mb": 8}, "exit 1"),
        ("for i in range(3): open(str(i), 'wb').write(bytes(700 << 10))", {"files_mb": 1}, {"files_mb": 8}, "exit 1"),
        ("import os\nfor _ in range(5): os.fork() or os._exit(os.system('') * 0 + __import__('time').sleep(1) or 0)",
         {"processes": 4}, {"processes": 16}, "exit 1"),
        ("import threading, time\nfor _ in range(5): threading.Thread(target=time.sleep, args=(.5,)).start()",
         {"processes": 4}, {"processes": 16}, "exit 1"),
        ("files = [open('/dev/null') for _ in range(80)]", {}, None, "exit 1"),
    ],
    ids=["cpu", "time", "memory", "output", "file", "files", "processes", "threads", "open files"],
)  # fmt: skip
def test_each_limit_is_what_stops_a_program(box, program, tight, wide, how):
    stopped = within(box, program, **tight)
    assert stopped.how == how, stopped
    if wide is not None:
        assert within(box, program, **wide).how == "exit 0"
    if how == "output":
        assert len(stopped.output) <= 2048 + 65536  # what one read may bring beyond the limit


@needs_walls
def test_no_network(box, open_box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = (
            f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5); print('connected')"
        )
        assert open_box.run(program, "").output == b"connected\n"
        assert box.run(program, "").how == "exit 1"
    abstract = b"\0deepseek_jax" + str(os.getpid()).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(abstract)
        server.listen()
        program = f"import socket; socket.socket(socket.AF_UNIX).connect({abstract!r}); print('connected')"
        assert open_box.run(program, "").output == b"connected\n"
        assert box.run(program, "").how == "exit 1"


@needs_walls
def test_no_files_of_the_trainer(box, open_box, tmp_path):
    secret = tmp_path / "tests.json"
    secret.write_text("the expected output")
    read = f"print(open({str(secret)!r}).read())"
    write = f"open({str(secret)!r}, 'w').write('mine')"
    for program in (read, write, f"import shutil; shutil.rmtree({str(tmp_path)!r})"):
        assert box.run(program, "").how == "exit 1"
    assert secret.read_text() == "the expected output"
    assert open_box.run(read, "").output == b"the expected output\n"
    assert open_box.run(write, "").how == "exit 0" and secret.read_text() == "mine"


@needs_walls
def test_the_files_that_are_there_cannot_be_written(box):
    program = """
import os
for folder in ("/", "/usr", "/dev", os.path.dirname(os.__file__)):
    try: open(folder + "/mine", "w"); print("wrote", folder)
    except OSError as error: assert error.errno == 30, error  # EROFS: by its mount, not by whose file it is
for change in (lambda: os.chmod("/", 0o777), lambda: os.remove(os.__file__), lambda: os.chroot("/tmp"), lambda: os.setuid(0)):
    try: change(); print("changed")
    except OSError: pass
import ctypes
libc = ctypes.CDLL(None)
print([libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/tmp", 2)])
print(os.listdir("/tmp"), os.path.exists("/proc/1"), sorted(os.environ))
"""
    ended = box.run(program, "")
    names = sorted({"HOME", "LANG", "PATH", "TMPDIR"} | {"LD_LIBRARY_PATH"} & os.environ.keys())
    assert ended.output.decode().splitlines() == ["[-1, -1, -1]", f"['main.py'] False {names}"], ended


@needs_walls
def test_runs_do_not_see_each_other(box):
    assert box.run("open('/tmp/note', 'w').write('4')", "").how == "exit 0"
    assert box.run("print(open('/tmp/note').read())", "").how == "exit 1"


@needs_walls
def test_nothing_is_left_running(box, open_box):
    """Also where the program has left its session and its parent."""
    program = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv({os.path.realpath(sys.executable)!r}, ["deepseek_jax_stray", "-c", "import time; time.sleep(8)"])
else:
    time.sleep(1)
"""

    def strays():
        found = 0
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline") as file:
                    found += file.read().startswith("deepseek_jax_stray")
            except OSError:
                pass
        return found

    before = strays()
    seen = []
    watch = threading.Thread(target=lambda: (time.sleep(0.8), seen.append(strays())))
    watch.start()
    box.run(program, "")
    watch.join()
    deadline = time.monotonic() + 5
    while strays() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert strays() == before and seen[0] > before, seen


@needs_walls
def test_a_wall_that_does_not_stand_is_noticed(monkeypatch):
    """The probe that runs on opening looks for itself: here the limit of processes is left out, then a file is shown."""
    original = Sandbox._plan

    def without(self, *arguments):
        plan = original(self, *arguments)
        del plan["limits"]["RLIMIT_NPROC"]
        return plan

    monkeypatch.setattr(Sandbox, "_plan", without)
    with pytest.raises(ValueError, match=r"cannot be isolated on this machine \(starts 7 processes\)"), Sandbox(LIMITS):
        pass
    seen = original
    monkeypatch.setattr(
        Sandbox,
        "_plan",
        lambda self, folder, *a: (p := seen(self, folder, *a)) | {"shown": [*p["shown"], "/etc/passwd"]},
    )
    with pytest.raises(ValueError, match=r"\(sees /etc/passwd\)"), Sandbox(LIMITS):
        pass
