"""A second process is kept out of a run folder, on a disk and on an object store, and a dead one keeps nobody out."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from deepseek_jax import storage
from deepseek_jax.storage import lock

pytest_plugins = ["fake_gcs"]

HOLD = """
import sys
from deepseek_jax.storage import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(root):
    """A process that holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLD, root]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=["flock", "lease on a disk", "lease"])
def run_dir(request, tmp_path, monkeypatch):
    if request.param == "lease":
        request.getfixturevalue("gcs")
        return "gs://bucket/run"
    if request.param == "lease on a disk":
        monkeypatch.setattr(lock, "fcntl", None)
    return str(tmp_path / "run")


def test_a_second_lock_is_refused(run_dir):
    with storage.RunLock(run_dir) as held:
        with pytest.raises(ValueError, match=rf"is in use: process {os.getpid()} on .+ has held it since 2.*stop that"):
            storage.RunLock(run_dir).acquire()
        with pytest.raises(ValueError, match="held already"):
            held.acquire()
        with storage.RunLock(f"{run_dir}2"):
            held.check()
    with storage.RunLock(run_dir):
        pass
    held.release()


@pytest.mark.parametrize("kind", ["local", "gs"])
def test_another_process_is_refused_until_the_first_is_killed(kind, tmp_path, request):
    run_dir = str(tmp_path / "run")
    if kind == "gs":
        request.getfixturevalue("gcs")
        run_dir = "gs://bucket/run"
    with hold(run_dir) as process:
        try:
            with pytest.raises(ValueError, match=f"process {process.pid} on "):
                storage.RunLock(run_dir).acquire()
        finally:
            process.kill()
        process.wait()
        with storage.RunLock(run_dir):
            pass


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    program = """
import os, sys, time
from deepseek_jax.storage import RunLock
RunLock(sys.argv[1]).acquire()
if child := os.fork():
    print(child, flush=True)
    os.kill(os.getpid(), 9)
os.close(1)
time.sleep(30)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, timeout=20)
    try:
        with storage.RunLock(tmp_path):
            pass
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


def lease_of(gcs) -> tuple[str, dict]:
    [name] = [name for name in gcs.objects if name.startswith("run/.lease/")]
    return name, json.loads(gcs.objects[name].data)


def test_a_lease_of_another_machine_counts_until_it_is_stale(gcs):
    with hold("gs://bucket/run") as process:
        process.kill()
    name, note = lease_of(gcs)
    gcs.put(name, json.dumps(note | {"machine": "elsewhere", "host": "far"}).encode())
    with pytest.raises(ValueError, match=rf"on far .*delete gs://bucket/{name}, or wait until 2"):
        storage.RunLock("gs://bucket/run").acquire()
    assert list(gcs.objects) == [name], "the refused one leaves nothing"
    gcs.put(name, json.dumps(note | {"machine": "elsewhere", "renewed": time.time() - 601}).encode())
    with storage.RunLock("gs://bucket/run"):
        assert lease_of(gcs)[1]["pid"] == os.getpid()
    assert not gcs.objects


def test_of_two_that_begin_at_once_at_most_one_gets_in(gcs):
    held, barrier = [], threading.Barrier(6)

    def contend():
        contender = storage.RunLock("gs://bucket/run")
        barrier.wait()
        try:
            contender.acquire()
            held.append(contender)
        except ValueError:
            pass

    for _ in range(5):
        threads = [threading.Thread(target=contend) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) <= 1
        while held:
            held.pop().release()
        assert not gcs.objects


def until_lost(held) -> str:
    for _ in range(100):
        try:
            held.check()
        except ValueError as error:
            return str(error)
        time.sleep(0.05)
    raise AssertionError("the loss was never told")


def test_a_lease_is_renewed_and_its_loss_is_told(gcs):
    with storage.RunLock("gs://bucket/run", stale_minutes=0.5 / 60) as held:
        time.sleep(0.8)
        with pytest.raises(ValueError, match="is in use"):
            storage.RunLock("gs://bucket/run").acquire()
        held.check()
        gcs.objects.clear()
        time.sleep(0.1)
        gcs.objects.clear()  # a renewal may have been under way
        assert "the lock is lost: its lease was deleted" in until_lost(held)


def test_of_a_sleeper_and_its_successor_the_successor_stays(gcs):
    with storage.RunLock("gs://bucket/run", stale_minutes=1 / 60) as sleeper:
        name, note = lease_of(gcs)
        gcs.objects.clear()  # found stale
        with storage.RunLock("gs://bucket/run", stale_minutes=1 / 60) as successor:
            gcs.put(name, json.dumps(note | {"renewed": time.time()}).encode())  # a renewal that was under way
            assert re.search(rf"the lock is lost: .*process {os.getpid()} on", until_lost(sleeper))
            time.sleep(0.3)
            successor.check()


def test_a_lease_that_cannot_be_renewed_is_lost_before_another_comes(gcs, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no network")

    with storage.RunLock("gs://bucket/run", stale_minutes=0.5 / 60) as held:
        began = time.time()
        monkeypatch.setattr(lock, "list_files", fail)
        assert "could not be renewed since" in until_lost(held) and time.time() - began < 0.6
    assert "the lease was not renewed (no network)" in caplog.text
