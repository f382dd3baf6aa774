"""Runs of several processes on this machine, joined over loopback: what test_hosts.py and experiments/hosts start.

As a program, `python fleet.py VERB …` is `deepseek-jax VERB …` with the mishap of the environment: MISHAP=sleep:STEP,
MISHAP=raise:STEP or MISHAP=kill:STEP in process MISHAP_PROCESS, or MISHAP=slow in all. ROWS=FILE appends a line a step with
the rows that a process read, to FILE.PROCESS; DIGESTS=FILE one for each state saved or restored, of all its bits.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent

CONFIG = """
from dataclasses import replace
from deepseek_jax import get_config as model
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.parallel import MeshConfig
from deepseek_jax.training import MultiStep, RunConfig

def get_config():
    return RunConfig(
        model=replace(model("deepseek-{kind}-micro"), vocab_size=320, num_hidden_layers={layers}),
        schedule=MultiStep(peak=1e-2, warmup_steps=2),
        data=DataConfig(
            sources=(TextFiles(path={text!r}),), vocab_size=300, held_out_fraction=0.2, cache_dir={cache!r}
        ),
        steps=6, batch_size=16, seq_len=16, log_every=1, checkpoint_every=2, eval_sequences=8, loss_chunk=8,
    )
"""


def corpus(folder: Path, kind: str = "llm", layers: int = 1) -> Path:
    """A config file beside a small corpus."""
    import numpy as np

    text = folder / "text"
    text.mkdir()
    draw = np.random.default_rng(0)
    for i in range(40):
        (text / f"{i}.txt").write_text(" ".join(draw.choice(["alpha", "beta", "gamma", "delta"], 60)))
    config = folder / "small.py"
    config.write_text(CONFIG.format(text=str(text), cache=str(folder / "cache"), kind=kind, layers=layers))
    return config


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Fleet:
    """Processes of one run; `with Fleet(…) as fleet: fleet.wait()`. None is left when the block ends."""

    def __init__(self, words, processes=2, devices=2, env=None, hosts=True):
        """
        Args:
            words: of the command line, without --hosts.
            processes: how many.
            devices: of each.
            env: variables for all.
            hosts: whether they are told of each other; False for the one process that a fleet is compared with.
        """
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
        port = free_port()
        self.processes = []
        for number in range(processes):
            told = ["--hosts", f"127.0.0.1:{port},{processes},{number}", "--hosts-timeout", "60"] if hosts else []
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(TESTS / "fleet.py"), *map(str, words), *told],
                    env={
                        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **(env or {}),
                        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
                    },
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def wait(self, timeout=120):
        """(exit code, stdout, stderr) of each process."""
        deadline = time.monotonic() + timeout
        said = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        return [(process.returncode, *words) for process, words in zip(self.processes, said, strict=True)]

    def send(self, number, what):
        self.processes[number].send_signal(what)


def lines(run_dir) -> list[dict]:
    """metrics.jsonl as far as it is there."""
    file = Path(run_dir) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(run_dir, step, timeout=90):
    """Returns once the run has logged a step."""
    deadline = time.monotonic() + timeout
    while not any(line["step"] >= step for line in lines(run_dir)):
        assert time.monotonic() < deadline, f"{run_dir} does not come to step {step}"
        time.sleep(0.02)


def _mishap():
    from deepseek_jax.parallel import hosts
    from deepseek_jax.training import loop

    kind, _, at = os.environ.get("MISHAP", "").partition(":")
    place, steps = loop.place_batch, []

    def placed(batch, mesh, here):
        process = int(hosts.name().split()[1]) if hosts.name() else 0
        steps.append(1)
        if folder := os.environ.get("ROWS"):
            rows = {number: batch["tokens"][i].tolist() for i, number in enumerate(here.numbers.tolist())}
            with open(f"{folder}.{process}", "a") as file:
                file.write(json.dumps(rows) + "\n")
        if kind == "slow":
            time.sleep(0.1)
        elif kind and process == int(os.environ["MISHAP_PROCESS"]) and len(steps) == int(at):
            if kind == "raise":
                raise OSError("the disk is gone")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        return place(batch, mesh, here)

    loop.place_batch = placed
    if os.environ.get("DIGESTS"):
        resume, save = loop.resume, loop.Saves.save

        def resumed(*args):
            found = resume(*args)
            if found is not None:
                note_digest("restored", found[1], found[0])
            return found

        def saved(self, step, state, *args):
            note_digest("saved", step, state)
            return save(self, step, state, *args)

        loop.resume, loop.Saves.save = resumed, saved


def note_digest(what, step, state):
    from deepseek_jax.parallel import hosts

    whole = hosts.on_first(state)
    if whole is not None:
        with open(os.environ["DIGESTS"], "a") as file:
            file.write(json.dumps({"what": what, "step": step, "digest": digest(whole)}) + "\n")


def digest(tree):
    """Of every bit of a tree of arrays."""
    import jax
    import numpy as np

    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    from deepseek_jax.cli.main import main

    _mishap()
    sys.exit(main())
