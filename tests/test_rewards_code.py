"""Code of completions is rewarded for what it prints; whatever else it tries scores 0 and touches nothing.

Each wall and limit is shown to be what stops an attack: beside it stands a run without that wall, or with a wider limit,
in which the same program gets through.
"""

import os
import socket
import threading
import time
from dataclasses import replace

import pytest

from deepseek_jax.posttrain.rewards import Code, Item, RewardsFailed, open_rewards
from deepseek_jax.posttrain.rewards import code as codes
from deepseek_jax.posttrain.rewards.sandbox import Limits, Sandbox, SandboxFailed
from deepseek_jax.posttrain.tasks import Problem

LIMITS = Limits(seconds=20, cpu_seconds=10, memory_mb=256, processes=4, files_mb=8, output_kb=64)


def walls():
    try:
        with Sandbox(LIMITS):
            return ""
    except ValueError as error:
        return str(error)


MISSING = walls()
needs_walls = pytest.mark.skipif(bool(MISSING), reason=MISSING)


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


def item(program, *tests, before="<think>so</think>", answer=""):
    problem = Problem(prompt="", answer=answer, extra=(("tests", tests),))
    return Item(problem=problem, completion=f"{before}```python\n{program}\n```", tokens=1, truncated=False)


DOUBLE = "print(2 * int(input()))"
TESTS = (("2\n", "4\n"), ("5", "10"), ("-1", "-2"))


@needs_walls
@pytest.mark.parametrize(("score", "expected"), [("all", [1, 0, 0]), ("share", [1, 1 / 3, 0])])
def test_programs_are_scored_by_their_tests(score, expected):
    batch = [item(DOUBLE, *TESTS), item("print(int(input()) + 2)", *TESTS), item("print(", *TESTS)]
    with open_rewards([Code(score=score)]) as scorer:
        scores = scorer.score(batch)
        assert scores.total.tolist() == expected and not scores.failed.any()
        with pytest.raises(RewardsFailed, match="3 times: code: the problem has no tests"):
            scorer.score([item(DOUBLE)] * 3)
        with pytest.raises(RewardsFailed, match="tests must be pairs of text"):
            scorer.score([item(DOUBLE, ("2", 4))])


@needs_walls
def test_problems_without_tests_in_a_mixture():
    with open_rewards([Code(required=False)]) as scorer:
        scores = scorer.score([item(DOUBLE)])
    assert scores.total.tolist() == [0] and not scores.failures


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a"), ("```python\na\n```\nor\n```py\nb\n\nc\n```\n", "b\n\nc"), ("```\na\n```", None),
        ("```python\na\n```\n```sh\nb\n```", "a"), ("```python\na", None), ("a", None), ("", None), ("```python\n\n```", None),
        ("<think>```python\na\n```</think>", None), ("<think>```python\na\n```", None), ("```python\n" * 50_000, None),
        ("```python\n" + "a\n" * 50_000 + "```", None), ("<think>x</think>```python\na\n```<think>```", None),
    ],
)  # fmt: skip
def test_the_last_program_after_the_thoughts(text, program):
    assert codes.last_program(text) == program


def test_outputs_are_compared_as_wholes():
    assert codes.same_output("1 \n2\n\n", "1\n2") and codes.same_output("", "\n")
    for printed in ("1", "1\n2\n3", "12", "1\n\n2", " 1\n2", "1\n2\n٣", ""):
        assert not codes.same_output(printed, "1\n2"), printed


# Row 14 of the faults to withstand, with what a trainer would lose by each. None of these may print 4.
ATTACKS = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "spins": "while True: pass",
    "sleeps": "import time; time.sleep(1000)",
    "allocates": "x = bytearray(10 << 30); print(4)",
    "exits": "import os; os._exit(0)",
    "prints on": "while True: print('4' * 1000)",
    "complains on": "import sys\nwhile True: sys.stderr.write('4' * 1000)",
    "kills": "import os\nfor pid in (-1, 1, os.getppid()):\n    try: os.kill(pid, 9)\n    except OSError: pass\nos.killpg(0, 9)",
    "stays": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)",
    "first line": "print(4)\nprint(5)",
    "deep": "def f(n): return f(n + 1)\nimport sys; sys.setrecursionlimit(10**9); f(0)",
    "closes": "import os, time; os.closerange(0, 64); time.sleep(1000)",
    "forges": "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'exit 0\\n')\n    except OSError: pass\nos._exit(1)",
}  # fmt: skip


@needs_walls
def test_attacks_score_nothing_and_end_in_time():
    kind = Code(seconds=2, cpu_seconds=1, memory_mb=256, budget=10)
    with open_rewards([kind]) as scorer:
        begin = time.monotonic()
        scores = scorer.score(
            [item(program, ("", "4")) for program in ATTACKS.values()] + [item("print(4)", ("", "4"))]
        )
    assert dict(zip([*ATTACKS, "right"], scores.total.tolist(), strict=True)) == dict.fromkeys(ATTACKS, 0) | {
        "right": 1
    }
    assert not scores.failed.any()  # a program's failure is its own
    assert time.monotonic() - begin < (kind.seconds + 2) * len(ATTACKS) / 2 + 5


@needs_walls
def test_a_crash_does_not_print_nothing():
    """An exception has printed "", and that is not what a test that expects "" asks for."""
    programs = (
        "1 / 0",
        "import os; os._exit(1)",
        "import os; os.kill(os.getpid(), 9)",
        "x = bytearray(10 << 30)",
        "pass",
    )
    with open_rewards([Code()]) as scorer:
        assert scorer.score([item(program, ("", "")) for program in programs]).total.tolist() == [0, 0, 0, 0, 1]


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
    except OSError: pass
for change in (lambda: os.chmod("/", 0o777), lambda: os.remove(os.__file__), lambda: os.chroot("/tmp"), lambda: os.setuid(0)):
    try: change(); print("changed")
    except OSError: pass
import ctypes
libc = ctypes.CDLL(None)
print([libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/tmp", 2)])
print(os.listdir("/tmp"), os.path.exists("/proc/1"), sorted(os.environ))
"""
    ended = box.run(program, "")
    assert ended.output.decode().splitlines()[-2:] == [
        "[-1, -1, -1]", "['main.py'] False ['HOME', 'LANG', 'PATH', 'TMPDIR']"
    ] and len(ended.output.splitlines()) == 2, ended  # fmt: skip


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
        os.execv({os.path.realpath(__import__("sys").executable)!r}, ["deepseek_jax_stray", "-c", "import time; time.sleep(8)"])
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


def test_the_child_never_has_what_it_should_print(monkeypatch):
    """What is expected, and the environment with whatever secrets, are not in what the child is given."""
    given = []

    class Recorded(codes.Sandbox):
        def run(self, program, stdin, seconds=None):
            given.append((program, stdin, self._environment(), str(self._plan("", 1, 2))))
            return super().run(program, stdin, seconds)

    monkeypatch.setenv("SECRET", "expected-output")
    with Recorded(LIMITS, allow_unsafe=True) as sandbox, codes.CodeReward(Code(), sandbox, 1) as reward:
        given.clear()
        [outcome] = reward([item("import os; print(os.environ.get('SECRET'))", ("in", "expected-output"))])
        assert outcome.score == 0 and not outcome.reason
    assert len(given) == 1 and "expected-output" not in repr(given)


def test_without_walls_code_is_refused_unless_allowed(monkeypatch):
    """As where the kernel gives no user namespaces."""
    original = Sandbox._plan
    monkeypatch.setattr(
        Sandbox, "_plan", lambda self, *a: original(self, *a) | ({"shown": ["/no/such/file"]} if self.isolated else {})
    )
    refused = r"code of completions cannot be isolated on this machine \(.*user namespaces.*allow_unsafe_code=True"
    with pytest.raises(ValueError, match=refused), open_rewards([Code()]):
        pass
    with open_rewards([Code(seconds=5, cpu_seconds=1, memory_mb=256)], allow_unsafe_code=True) as scorer:
        programs = [DOUBLE, "while True: pass", "x = bytearray(10 << 30)", "1 / 0"]
        scores = scorer.score([item(program, ("2", "4")) for program in programs])
    assert scores.total.tolist() == [1, 0, 0, 0] and not scores.failed.any()


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


@needs_walls
def test_a_sandbox_that_fails_later_is_a_technical_failure(monkeypatch):
    """No score is made up from it, and where all fail the run stops."""
    with open_rewards([Code()]) as scorer:
        original = Sandbox._plan
        monkeypatch.setattr(Sandbox, "_plan", lambda self, *a: original(self, *a) | {"python": "/no/python"})
        with pytest.raises(RewardsFailed, match="for any of 2 completions; 2 times: code: FileNotFoundError"):
            scorer.score([item(DOUBLE, *TESTS)] * 2)
        with pytest.raises(SandboxFailed), Sandbox(LIMITS, allow_unsafe=True) as sandbox:
            sandbox.run(DOUBLE, "2")
