"""Proof that a run which is killed and started again is the run that was not, on the user's own configuration."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax import storage
from deepseek_jax.checkpoint import leaves
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.metrics.manifest import package_versions
from deepseek_jax.metrics.writer import read_jsonl
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.serialize import check_types, to_dict
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.state import abstract_state

# What depends on the clock, not on the run.
_TIMES = {"tokens_per_second", "mfu"}

_CHILD = """
import json, sys
from deepseek_jax.serialize import from_dict
from deepseek_jax.training import RunConfig, train
with open(sys.argv[1], encoding="utf-8") as file:
    config = from_dict(RunConfig, json.load(file))
train(config, sys.argv[2], progress=False)
"""


def certify(
    config: RunConfig, run_dir: str | os.PathLike[str], *, steps: int = 10, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Trains 2·steps unbroken, and again with the process killed after the save at step `steps`, and compares.

    Compared bit for bit: parameters, optimizer, selection bias, guard, the data iterator's state, every number of
    every line of metrics.jsonl but the speeds. Each start is a process of its own on the devices at hand; this one must
    not hold them (a GPU's memory).

    Args:
        config: the run; its schedule stays as it is laid out, its logging and checkpoints are set for the proof.
        run_dir: where the two runs go (`unbroken/`, `killed/`); its manifest.json gets the certificate, as does that of
            a run that is already there.
        steps: half the length of the proof.
        say: gets a line about each stage.
    Returns: the certificate: `equal`, `differences`, hashes of state and losses, versions, device.
    Raises: ValueError for a configuration that cannot be, RuntimeError when a run fails for a reason of its own.
    """
    check_types(config)
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    if not storage.is_local(run_dir):
        raise ValueError(f"run_dir={str(run_dir)!r}: a proof needs a local folder, whose saves it can watch")
    folder = Path(run_dir).expanduser()
    config = replace(
        config,
        train_tokens=config.horizon, steps=2 * steps, checkpoint_every=steps, keep_checkpoints=2, log_every=1,
        eval_every=0, sample_prompts=(), writers=(), profile=None, verify_checkpoints="full",
    )  # fmt: skip
    if config.last_step < 2 * steps:
        raise ValueError(f"steps={steps}: the run has only {config.last_step} steps, fewer than twice that")
    unbroken, killed = folder / "unbroken", folder / "killed"
    for run in (unbroken, killed):
        if run.exists():
            raise ValueError(f"run_dir={str(run_dir)!r}: {run} exists; name a folder without a proof in it")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "config.json"
        file.write_text(json.dumps(to_dict(config)), encoding="utf-8")
        say(f"unbroken run of {2 * steps} steps in {unbroken}")
        _finish(_start(file, unbroken), unbroken)
        say(f"the same run, killed after its save at step {steps}, in {killed}")
        child = _start(file, killed)
        _kill_after(child, killed, steps)
        say("started again")
        _finish(_start(file, killed), killed)
    began = [start["from_step"] for start in json.loads((killed / "manifest.json").read_text(encoding="utf-8"))["runs"]]
    if began != [0, steps]:
        raise RuntimeError(f"the run in {killed} began at steps {began}, should be {[0, steps]}: nothing is proved")
    differences = _differences(config, unbroken, killed)
    certificate = {
        "equal": not differences,
        "differences": differences,
        "steps": 2 * steps,
        "killed_after": steps,
        "state_sha256": _state_digest(config, killed),
        "losses_sha256": hashlib.sha256(json.dumps(_lines(killed)).encode()).hexdigest(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "packages": package_versions(),
        "device": json.loads((killed / "manifest.json").read_text(encoding="utf-8"))["devices"],
        "config": to_dict(config),
    }
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    storage.write_atomic(path, json.dumps(manifest | {"certificate": certificate}, indent=2) + "\n")
    return certificate


def _start(config: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "said.txt").open("ab") as said:  # a pipe that nobody empties would stop the child
        words = [sys.executable, "-c", _CHILD, str(config), str(run_dir)]
        return subprocess.Popen(words, stderr=said, stdout=subprocess.DEVNULL)


def _finish(child: subprocess.Popen[bytes], run_dir: Path) -> None:
    if child.wait():
        said = (run_dir / "said.txt").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the run in {run_dir} ended with code {child.returncode}:\n{said[-4000:]}")


def _kill_after(child: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    """SIGKILL once the checkpoint of `step` is whole, with whatever the process is doing then."""
    manifest = run_dir / "checkpoints" / str(step) / "sha256.0.json"
    while not manifest.exists():
        if child.poll() is not None:
            _finish(child, run_dir)
            raise RuntimeError(f"the run in {run_dir} ended without a checkpoint of step {step}")
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    if child.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the run in {run_dir} ended before it could be killed: give it more steps after the save")


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = read_jsonl(run_dir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in _TIMES} for line in lines]


def _restored(config: RunConfig, run_dir: Path) -> dict[str, str]:
    """Leaf name -> SHA-256 of the last checkpoint's, the data iterator's state with them."""
    positions: list[bytes] = []

    class Iterator:
        def get_state(self) -> dict[str, Any]:
            return {}

        def set_state(self, state: dict[str, Any]) -> None:
            positions.append(json.dumps(state, sort_keys=True).encode())

    with Store(run_dir / "checkpoints", read_only=True) as store:
        restored, _ = store.restore(abstract_state(config, make_mesh(config.mesh)), Iterator(), config.last_step)
    named, _ = leaves.flatten(restored)
    content = {name: np.asarray(jax.device_get(leaf)).tobytes() for name, leaf in named.items()}
    return {name: hashlib.sha256(value).hexdigest() for name, value in (content | {"data": positions[0]}).items()}


def _state_digest(config: RunConfig, run_dir: Path) -> str:
    return hashlib.sha256(json.dumps(_restored(config, run_dir), sort_keys=True).encode()).hexdigest()


def _differences(config: RunConfig, unbroken: Path, killed: Path) -> list[str]:
    """What differs between two runs, in words; the first few of each kind."""
    ours, theirs = _restored(config, unbroken), _restored(config, killed)
    found = [f"state: {name}" for name in ours if ours[name] != theirs.get(name)][:10]
    for one, other in zip(_lines(unbroken), _lines(killed), strict=False):
        if json.dumps(one) != json.dumps(other):
            names = [name for name in one if json.dumps(one[name]) != json.dumps(other.get(name))]
            found.append(f"metrics: line of step {one['step']}: {', '.join(names)}")
    counts = [len(_lines(run)) for run in (unbroken, killed)]
    if counts[0] != counts[1]:
        found.append(f"metrics: {counts[0]} and {counts[1]} lines")
    return found[:20]
