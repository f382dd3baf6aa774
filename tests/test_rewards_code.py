"""Code of completions is rewarded for what it prints; whatever else it tries scores 0 and leaves the trainer alive.

What stops each attack is in test_sandbox.py.
"""

import time

import pytest
from walls import LIMITS, needs_walls

from deepseek_jax.posttrain.rewards import Code, Item, RewardsFailed, open_rewards
from deepseek_jax.posttrain.rewards import code as codes
from deepseek_jax.posttrain.rewards.sandbox import Sandbox, SandboxFailed
from deepseek_jax.posttrain.tasks import Problem


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
def test_a_sandbox_that_fails_later_is_a_technical_failure(monkeypatch):
    """No score is made up from it, and where all fail the run stops."""
    with open_rewards([Code()]) as scorer:
        original = Sandbox._plan
        monkeypatch.setattr(Sandbox, "_plan", lambda self, *a: original(self, *a) | {"python": "/no/python"})
        with pytest.raises(RewardsFailed, match="for any of 2 completions; 2 times: code: FileNotFoundError"):
            scorer.score([item(DOUBLE, *TESTS)] * 2)
        with pytest.raises(SandboxFailed), Sandbox(LIMITS, allow_unsafe=True) as sandbox:
            sandbox.run(DOUBLE, "2")
