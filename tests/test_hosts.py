"""Several processes make one run: the same numbers, each its own rows, one answer, and one end for all."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from fleet import Fleet, corpus, digest, free_port, lines, wait_for_step
from helpers import micro, run_config

import deepseek_jax as dsj
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.cli.main import main
from deepseek_jax.cli.train import load_config
from deepseek_jax.data.pipeline import TokenSource, batches
from deepseek_jax.parallel import MeshConfig, hosts, make_mesh
from deepseek_jax.parallel.hosts import Rows
from deepseek_jax.parallel.rendezvous import meet
from deepseek_jax.training import feed as feed_module
from deepseek_jax.training import loop
from deepseek_jax.training.feed import Feed
from deepseek_jax.training.schedule import BatchRamp
from deepseek_jax.training.state import abstract_state

NOT_OURS = re.compile(r"Gloo|peer ranks|^[\d\s]*$|^[IWE]\d{4} \d\d:\d\d")  # of gloo and the compiler
MESH = ["--mesh.data", "4", "--mesh.fsdp", "2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def train_here(config, run_dir, mesh, monkeypatch=None, **fields):
    """The run in this process, on all its devices; the tokens of each step, where `monkeypatch` is given."""
    seen = []
    if monkeypatch is not None:
        place = loop.place_batch
        monkeypatch.setattr(
            loop, "place_batch", lambda batch, *more: (seen.append(batch["tokens"]), place(batch, *more))[1]
        )
    dsj.train(replace(load_config(config), mesh=mesh, **fields), run_dir, progress=False)
    if monkeypatch is not None:
        monkeypatch.undo()
    return seen


def said_by(text):
    """What a process printed, without what gloo and the compiler print on their own."""
    return [line for line in text.splitlines() if not NOT_OURS.search(line)]


def assert_same_losses(ours, theirs, within=1e-6):
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "loss_main", "held_out_loss"):
            assert (name in one) == (name in other), (one["step"], name)
            if name in one:
                assert abs(one[name] - other[name]) <= within * abs(other[name]), (one["step"], name)


def rows_of(file, processes):
    """Of each step: (rows of the batch, as {number: tokens}, from all processes; how many each process read)."""
    parts = [[json.loads(line) for line in Path(f"{file}.{k}").read_text().splitlines()] for k in range(processes)]
    steps = []
    for step in zip(*parts, strict=True):
        steps.append(
            ({int(number): row for part in step for number, row in part.items()}, [len(part) for part in step])
        )
    return steps


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices; the CPU has 8 virtual ones")
def test_two_processes_are_one_run_that_a_signal_to_either_stops(config, tmp_path, monkeypatch):
    """2 × 4 devices, SIGTERM to the second process, then one process with another mesh: all of it the unbroken run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    digests = tmp_path / "digests"
    batches_read = train_here(config, whole, MeshConfig(data=4, fsdp=2), monkeypatch)
    words = ["train", config, *MESH, "--run-dir", broken]
    with Fleet(
        words, devices=4, env={"MISHAP": "slow", "ROWS": str(tmp_path / "rows"), "DIGESTS": str(digests)}
    ) as fleet:
        wait_for_step(broken, 1)
        fleet.send(1, signal.SIGTERM)
        ended = fleet.wait()
    assert [code for code, *_ in ended] == [75, 75], ended
    assert "stopped at step" in ended[0][2] and "the same command goes on from there" in ended[0][2]
    assert said_by(ended[1][1]) == said_by(ended[1][2]) == [], "process 1 is quiet"

    steps = max(int(folder.name) for folder in (broken / "checkpoints").iterdir())
    assert 1 <= steps < 6
    assert sorted(p.name for p in (broken / "checkpoints" / str(steps)).glob("sha256.*")) == [
        "sha256.0.json", "sha256.1.json",
    ]  # fmt: skip
    rows = rows_of(tmp_path / "rows", 2)
    assert len(rows) == steps
    for (found, counts), batch in zip(rows, batches_read, strict=False):
        assert counts == [8, 8], "each reads its half of the 16"
        np.testing.assert_array_equal([found[number] for number in range(16)], batch)
    assert_same_losses(lines(broken), lines(whole)[: steps + 1])

    run = replace(load_config(config), mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    with Store(broken / "checkpoints", read_only=True) as store:
        state, _ = store.restore(abstract_state(run, make_mesh(run.mesh)), step=steps)
    noted = json.loads(digests.read_text().splitlines()[-1])
    assert noted == {"what": "saved", "step": steps, "digest": digest(jax.device_get(state))}, "bit for bit"
    rest = train_here(config, broken, MeshConfig(data=1, fsdp=4, tensor=2), monkeypatch)
    np.testing.assert_array_equal(rest, batches_read[steps:])
    assert_same_losses(lines(broken), lines(whole), within=2e-5)  # another mesh adds up in another order
    first, after = lines(broken)[steps + 1], lines(whole)[steps + 1]
    assert abs(first["loss"] - after["loss"]) <= 1e-6 * after["loss"]


def test_a_killed_process_ends_the_other_and_the_run_goes_on(config, tmp_path, monkeypatch):
    words = ["train", config, "--mesh.data", "2", "--run-dir", tmp_path]
    with Fleet(words, devices=1, env={"MISHAP": "kill:6", "MISHAP_PROCESS": "1"}) as fleet:
        fleet.processes[1].wait(timeout=120)
        killed = time.monotonic()
        ended = fleet.wait(timeout=180)
        assert time.monotonic() - killed < hosts.HEARTBEAT_S + hosts.SHUTDOWN_S + 20
    assert ended[1][0] == -signal.SIGKILL
    assert ended[0][0] not in (0, 75), ended[0]
    # Python's own error, or the stacks of all threads as one that Python does not know aborts the process.
    assert re.search(r"Traceback|\(most recent call first\)", ended[0][2]), ended[0][2]
    assert "process 0 of 2" in ended[0][2] or "JAX distributed service" in ended[0][2]
    rest = train_here(config, tmp_path, MeshConfig(data=jax.device_count()), monkeypatch)
    assert len(rest) in (2, 4), "it goes on from step 4, or from step 2 where the kill met the save of step 4"
    assert [line["step"] for line in lines(tmp_path)] == list(range(7))


FOUR = """
    import json, sys
    import numpy as np
    import deepseek_jax as dsj
    print(dsj.connect_hosts(sys.argv[1], timeout_s=60))
    import jax
    from deepseek_jax.parallel import MeshConfig, hosts, make_mesh
    from deepseek_jax.parallel.rules import named_sharding
    from deepseek_jax.training.step import place_batch

    me = jax.process_index()
    whole = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
    for layout in (dict(data=8), dict(data=2, tensor=4), dict(data=1, fsdp=4, tensor=2), dict(data=1, tensor=8)):
        mesh = make_mesh(MeshConfig(**layout))
        here = hosts.rows_here(named_sharding(mesh, ("batch",), (8,)), 8)
        placed = place_batch({"tokens": whole[here.numbers]}, mesh, here)["tokens"]
        assert placed.shape == (8, 3)
        for shard in placed.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
        every = place_batch({"tokens": whole}, mesh)["tokens"]
        assert (jax.jit(lambda a, b: (a == b).all())(placed, every)).item()
        print(json.dumps([layout, here.numbers.tolist()]))
    assert hosts.gather(f"from {me}") == [f"from {k}" for k in range(4)]
    assert hosts.of_first([me, None]) == [0, None]
    moved = hosts.on_first({"w": placed})
    assert (moved is None) == (me > 0) and (me or np.array_equal(moved["w"], whole))
    try:
        with hosts.together("counting"):
            if me == 2:
                raise ValueError("lost count")
    except (ValueError, hosts.PeerFailed) as error:
        print(json.dumps([type(error).__name__, str(error), getattr(error, "exit_code", 2)]))
"""


def _lists(text):
    """Lists of JSON in what a process printed; gloo writes to the same output, also in the midst of a line."""
    place, decoder = 0, json.JSONDecoder()
    while found := re.compile(r'\[\{?"').search(text, place):
        value, place = decoder.raw_decode(text, found.start())
        yield value


def test_four_processes_hold_their_rows_and_come_to_one_answer(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(FOUR), f"{address},4,{number}"],
            env=os.environ | flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(4)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 4, ended
    said = [list(_lists(out)) for out, _ in ended]
    assert "4 processes, 8 devices" in ended[0][0]
    rows = {json.dumps(layout): [part[i][1] for part in said] for i, (layout, _) in enumerate(said[0][:4])}
    assert list(rows.values()) == [
        [[0, 1], [2, 3], [4, 5], [6, 7]],  # rows of its own
        [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2,  # two processes hold one half: they read the same
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [list(range(8))] * 4,
    ]
    failed = "process 2 failed while counting: ValueError: lost count"
    assert [part[4] for part in said] == [
        ["PeerFailed", failed, 2], ["PeerFailed", failed, 2], ["ValueError", "lost count", 2], ["PeerFailed", failed, 2],
    ]  # fmt: skip


@pytest.mark.parametrize("ramp", [None, BatchRamp(start=8, tokens=1000, increment=4)])
def test_rows_of_processes_make_up_the_batches_of_a_run(ramp, monkeypatch):
    """With accumulation and a ramp, for rows that lie anyhow, at every position that a run may go on from."""
    run = run_config(micro("llm-gqa"), batch_size=16, accumulation=4, batch_ramp=ramp, seq_len=4)
    source = TokenSource(np.arange(1 + 700 * 4), 4)

    class Tokens:
        def train_batches(self, *sizes, **options):
            return batches(source, *sizes, **options)

    def feed(process):
        # Four shards of the rows, dealt to two processes crosswise.
        def rows(sharding, size):
            return Rows(np.flatnonzero(np.isin(np.arange(size) * 4 // size, ((0, 3), (1, 2))[process])), size)

        monkeypatch.setattr(feed_module, "rows_here", rows)
        return Feed(run, make_mesh(MeshConfig(), jax.devices()[:1]), Tokens())

    feeds, plain = [feed(0), feed(1)], batches(source, run.piece_size, run.seed)
    positions = []
    for step in range(14):
        positions.append(plain.get_state())
        assert feeds[0].get_state() == feeds[1].get_state() == positions[-1] | {"piece": run.piece_size}
        size = run.plan.batch_size(step)
        whole = np.concatenate([next(plain)["tokens"] for _ in range(size // run.piece_size)])
        joined = np.full_like(whole, -1)
        for part, here in (f.read(step) for f in feeds):
            assert here.of == size and len(here.numbers) == size // 2
            joined[here.numbers] = part["tokens"]
        np.testing.assert_array_equal(joined, whole)
    again = feed(1)
    again.set_state(positions[9])
    feeds[1].set_state(positions[9])
    np.testing.assert_array_equal(again.read(9)[0]["tokens"], feeds[1].read(9)[0]["tokens"])


# Mistakes


def meeting(*processes):
    """What each of some processes is told: (processes, process) are theirs."""
    address, told = f"127.0.0.1:{free_port()}", {}

    def one(number, place):
        try:
            meet(address, *place, timeout_s=1.5)
        except ValueError as error:
            told[number] = str(error)

    threads = [threading.Thread(target=one, args=entry) for entry in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told, address


def test_processes_meet_or_each_is_told_why_not():
    assert meeting((3, 0), (3, 2), (3, 1))[0] == {}
    told, address = meeting((4, 0), (4, 2))
    assert set(told) == {0, 1} and told[0] == told[1]
    assert f"process 1, 3 of 4 did not come to {address} within 1.5 s: start every process" in told[0]
    told, address = meeting((2, 1))
    assert f"process 1 of 2: process 0 does not answer at {address} within 1.5 s" in told[0]
    told, _ = meeting((3, 0), (3, 1), (3, 1))
    assert "two processes have the id 1" in told[0] and "give each its own" in told[0]
    told, _ = meeting((2, 0), (3, 1))
    assert "was told of 3 processes" in told[0] and "give every process the same number" in told[1]
    told, _ = meeting((2, 0), (2, 0))
    assert any("cannot listen" in text and "give id 0 to one process alone" in text for text in told.values())


@pytest.mark.parametrize(
    ("words", "environment", "error"),
    [
        ("10.0.0.1:1,2", {}, r"hosts='10.0.0.1:1,2': give 'auto', or ADDRESS:PORT,NUM,ID such as"),
        ("10.0.0.1,2,0", {}, r"the address must be ADDRESS:PORT of process 0"),
        ("10.0.0.1:99999,2,0", {}, r"the address must be ADDRESS:PORT"),
        ("10.0.0.1:80,2,2", {}, r"hosts='10.0.0.1:80,2,2': the id must be from 0 to 1, one for each of 2 processes"),
        ("auto", {"JAX_NUM_PROCESSES": "2"}, r"JAX_NUM_PROCESSES=2 set, JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not"),
        (
            "auto", {"JAX_COORDINATOR_ADDRESS": "a:80", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "5"},
            r"JAX_PROCESS_ID=5: the id must be from 0 to 1",
        ),
    ],
)  # fmt: skip
def test_a_wrong_place_is_refused_before_anything_starts(words, environment, error, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=error):
        dsj.connect_hosts(words)


def test_no_cluster_and_verbs_for_one_host(config, tmp_path, capsys, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    here = [sys.executable, "-m", "deepseek_jax.cli.main"]
    done = subprocess.run(
        [*here, "train", config, "--hosts", "auto"], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(dsj.__file__)), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2 and "no TPU pod, SLURM or Open MPI job" in done.stderr, done.stderr
    assert "give --hosts ADDRESS:PORT,NUM,ID" in done.stderr
    for verb in ("prefer", "grpo", "distill", "r1"):
        assert main([verb, "any.py", "--hosts", "auto"]) == 2
        assert "runs on one host; train and sft run on several" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--hosts" in capsys.readouterr().out


def test_hosts_of_gpus_are_no_slices():
    """XLA numbers them as it numbers slices of TPUs, but weights may be sharded over all."""

    @dataclass(frozen=True)
    class Device:
        id: int
        platform: str

        @property
        def slice_index(self):
            return self.id // 8

    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=8), [Device(i, "gpu") for i in range(16)])
    assert [d.slice_index for d in mesh.devices.flat] == [0] * 8 + [1] * 8
    with pytest.raises(ValueError, match="MeshConfig.slice = 1: the devices lie in 2 slices, set it to that"):
        make_mesh(MeshConfig(data=1, fsdp=2, expert=8), [Device(i, "tpu") for i in range(16)])
