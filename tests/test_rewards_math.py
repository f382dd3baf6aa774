"""math-verify says what is equal; whatever a model writes, its process is bounded and the trainer lives."""

import importlib.util
import os
import subprocess
import sys
import time

import pytest

from deepseek_jax.posttrain.rewards import Accuracy, Item, RewardsFailed, open_rewards
from deepseek_jax.posttrain.rewards import math_pool as pools
from deepseek_jax.posttrain.tasks import Problem

TAGGED = "<think>so</think><answer>{}</answer>"
TOWER = "9^{9^{9^{9}}}"


def item(reference, completion):
    return Item(problem=Problem(prompt="", answer=reference), completion=completion, tokens=1, truncated=False)


@pytest.fixture(scope="module")
def scorer():
    pytest.importorskip("math_verify", reason="the extra `math`")
    with open_rewards([Accuracy(verifier="math", seconds=20)], workers=1) as opened:
        yield opened


@pytest.mark.parametrize(
    ("reference", "answers", "score"),
    [
        (r"\frac{1}{2}", ["0.5", "1/2", r"\frac12", r"\frac{2}{4}", "$1/2$", r"\boxed{\frac{1}{2}}", "50\\%"], 1),
        ("x^2+2x+1", ["(x+1)^2", "(x + 1)(1 + x)"], 1),
        (r"\{1, 2\}", [r"\{2, 1\}"], 1),
        ("$42$", ["42", "42.0", "x = 42", "40+2"], 1),
        ("Paris", ["paris", r"\boxed{Paris}"], 1),
        ("Paris", ["pairs", "sirap", "a r i s p"], 0),
        ("42", ["", "41", "142", "42 or 43", "42, 43", "43, 42", r"\{42, 43\}", "$42$ or $43$", "41}$ $42", "٤٢", "4²",
                r"42}\boxed{43", r"\boxed{42}\boxed{43}", "nan", r"\infty", "40 < x < 43", "the answer is 42"], 0),
    ],
)  # fmt: skip
def test_what_is_equal(scorer, reference, answers, score):
    """Answers in tags are extracted first: math-verify alone takes <answer>42</answer> for no answer."""
    scores = scorer.score([item(reference, TAGGED.format(answer)) for answer in answers])
    assert dict(zip(answers, scores.total.tolist(), strict=True)) == dict.fromkeys(answers, score)
    assert not scores.failures


def test_answers_that_are_none(scorer):
    completions = ["42", "", "<answer>42", TAGGED.format(42) * 2, "<think><answer>42</answer></think>", "9" * 1_000_000]
    completions += [TAGGED.format("9" * 100_000), TAGGED.format("{" * 5000 + "}" * 5000), "\\boxed{" * 100_000]
    scores = scorer.score([item("42", completion) for completion in completions])
    assert not scores.total.any() and not scores.failures


def test_a_tower_of_powers_is_stopped():
    """By the time limit: with a longer one the process would go on."""
    pytest.importorskip("math_verify", reason="the extra `math`")
    begin = time.monotonic()
    with open_rewards([Accuracy(verifier="math", seconds=0.5)], workers=1) as scorer:
        started = time.monotonic() - begin
        answers = [TOWER, "42"]
        scores = scorer.score([item("42", TAGGED.format(answer)) for answer in answers])
        assert scores.total.tolist() == [0, 1] and scores.failed.tolist() == [True, False]
        assert scores.failures == {"accuracy: over 0.5 s, its process was killed": 1}
        with pytest.raises(RewardsFailed, match="for any of 1 completions; 1 times: accuracy: over 0.5 s"):
            scorer.score([item("42", TAGGED.format(TOWER))])
    assert time.monotonic() - begin < 2 * (0.5 + pools._GRACE) + 4 * started + 5


def test_a_tower_is_stopped_by_the_limit_alone():
    """What the test above shows is the limit's doing: this child, given four times the time, still works at its end."""
    pytest.importorskip("math_verify", reason="the extra `math`")
    child = pools._Child(2.0)
    child.wait_until_ready()
    begin = time.monotonic()
    with pytest.raises(pools._Died, match="over 2 s"):
        child.ask("42", TOWER)
    assert 2 <= time.monotonic() - begin < 2 + pools._GRACE + 2 and gone(child.pid)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


WORKERS = {
    "deaf": "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('{\"ready\": true}', flush=True)\n"
    "while True: pass",
    "dies": "import os, sys; print('{\"ready\": true}', flush=True); sys.stdin.readline(); os._exit(3)",
    "sleeps": "import time; print('{\"ready\": true}', flush=True); time.sleep(3600)",
    "broken": 'print(\'{"error": "ImportError: no antlr"}\', flush=True)',
    "counts": "import os, sys; print('{\"ready\": true}', flush=True)\n"
    'for line in sys.stdin: print(\'{"error": "%d"}\' % os.getpid(), flush=True)',
}


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Puts another script in the worker's place."""
    monkeypatch.setattr(pools.importlib.util, "find_spec", lambda name: True)

    def put(name):
        script = tmp_path / f"{name}.py"
        script.write_text(WORKERS[name])
        monkeypatch.setattr(pools, "_WORKER", script)

    return put


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deaf", "over 0.2 s, its process was killed"),
        ("sleeps", "over 0.2 s, its process was killed"),
        ("dies", "its process died"),
    ],
)
def test_a_worker_that_hangs_or_dies_is_replaced(worker, monkeypatch, name, reason):
    monkeypatch.setattr(pools, "_GRACE", 0.2)
    worker(name)
    started = []
    init = pools._Child.__init__
    monkeypatch.setattr(pools._Child, "__init__", lambda self, seconds: (init(self, seconds), started.append(self))[0])
    begin = time.monotonic()
    with pools.MathPool(1, 0.2) as pool:
        assert pool.verify([("1", "2")] * 3) == [reason] * 3
    assert time.monotonic() - begin < 8
    assert len(started) == 3 and all(gone(child.pid) for child in started)


def test_workers_are_recycled_and_closed(worker):
    worker("counts")
    with pools.MathPool(1, 5, recycle=2) as pool:
        pids = pool.verify([("1", "2")] * 5)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 2, 1] and all(gone(int(pid)) for pid in pids)
    with pytest.raises(KeyError), pools.MathPool(1, 5) as pool:
        [pid] = pool.verify([("1", "2")])
        raise KeyError
    assert gone(int(pid))


def test_a_reward_that_cannot_work_is_told_before_training(worker, monkeypatch):
    worker("broken")
    with (
        pytest.raises(ValueError, match="math-verify does not work here: ImportError: no antlr"),
        open_rewards([Accuracy(verifier="math")]),
    ):
        pass
    monkeypatch.setattr(pools.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(ValueError, match=r"Accuracy.verifier = 'math': pip install 'deepseek-jax\[math\]'"),
        open_rewards([Accuracy(verifier="math")]),
    ):
        pass


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="the extra `math`")
def test_the_worker_imports_nothing_of_ours():
    """A child that imported jax would take seconds to start, and a GPU's memory."""
    program = "import runpy, sys; runpy.run_path(sys.argv[1])['equal']('1', '2'); print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", program, str(pools._WORKER)], capture_output=True, text=True, check=True
    )
    assert "sympy" in found.stdout.split() and not {"jax", "numpy", "deepseek_jax"} & set(found.stdout.split())
