"""The processes of one run: how they find one another, come to one answer, and fail together.

Each host of a pod runs the same program, and jax joins them: `jax.devices()` are those of all of them. What only one
process knows (which checkpoint is sound, that a file is missing) has to be told to the others, or they wait for it in
the next collective for ever.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from deepseek_jax.parallel.rendezvous import meet

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""The environment's way to say ADDRESS:PORT, NUM and ID; jax itself reads the first."""

HEARTBEAT_S = 60
"""Seconds without a sign of life after which a process counts as dead, and jax ends the others."""
SHUTDOWN_S = 60
"""Seconds that a process which ends waits for the others to do so."""
_LONGEST_S = 7 * 24 * 3600
"""Of waiting for another process's answer: a corpus may take hours to encode. Dead processes are noticed by heartbeat."""

_calls = itertools.count()


class PeerFailed(RuntimeError):
    """Another process failed, and said what with; `exit_code` is its own."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Place(NamedTuple):
    """One process among those of a run."""

    address: str
    """ADDRESS:PORT of process 0."""
    processes: int
    process: int


def connect_hosts(hosts: str = "auto", *, timeout_s: float = 300.0) -> str:
    """Join this process to the others of its run, before anything touches a device.

    Args:
        hosts: "ADDRESS:PORT,NUM,ID": where process 0 listens, how many processes there are, and which this is, from 0.
            "auto" reads the same from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID where they are set,
            and else has jax ask the cluster: TPU pods (also multi-slice, also on GKE), SLURM, Open MPI.
        timeout_s: how long to wait for all processes, in seconds.

    Returns: a line that says how many hosts and devices there are.
    Raises: ValueError for half an environment, a wrong id, no cluster where "auto" looks for one, jax in use already,
        processes that did not come in time. Where jax found the cluster itself and a process does not come, jax ends
        the program with a message of its own, after `timeout_s` too.
    """
    place = _parse(hosts, os.environ)
    if jax.distributed.is_initialized():
        raise ValueError(
            f"hosts={hosts!r}: this process has joined a run already; connect once, at the program's start"
        )
    faulthandler.enable()  # jax ends the process by abort() when another is lost: the stacks say what it was doing
    options: dict[str, Any] = dict(
        initialization_timeout=max(int(timeout_s), 1), heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=SHUTDOWN_S,
    )  # fmt: skip
    if place is not None:
        meet(*place, timeout_s)
        options |= dict(
            coordinator_address=place.address, num_processes=place.processes, process_id=place.process,
            cluster_detection_method="deactivate",
        )  # fmt: skip
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:  # jax found no cluster
        raise ValueError(
            f"hosts='auto': this is no TPU pod, SLURM or Open MPI job that jax knows ({error}): set {_all_variables()}, or "
            f"give --hosts ADDRESS:PORT,NUM,ID"
        ) from None
    except RuntimeError as error:
        raise ValueError(f"hosts={hosts!r}: {error}") from None
    return f"{jax.process_count()} processes, {jax.device_count()} devices: {jax.devices()[0].device_kind}"


def _all_variables() -> str:
    return f"{', '.join(VARIABLES[:-1])} and {VARIABLES[-1]}"


def _parse(hosts: str, environment: Mapping[str, str]) -> Place | None:
    """Where this process stands; None where jax is to ask the cluster."""
    if hosts == "auto":
        given = {name: environment[name] for name in VARIABLES if environment.get(name)}
        # Clusters set the address alone and let jax find the rest.
        if not given or set(given) == {VARIABLES[0]}:
            return None
        missing = [name for name in VARIABLES if name not in given]
        if missing:
            raise ValueError(
                f"hosts='auto': {', '.join(f'{k}={v}' for k, v in given.items())} set, {' and '.join(missing)} not: set "
                f"{_all_variables()}, or none of them"
            )
        words, said = list(given.values()), ", ".join(f"{k}={v}" for k, v in given.items())
    else:
        words, said = hosts.split(","), f"hosts={hosts!r}"
    if len(words) != 3 or not all(re.fullmatch(r"\d+", word) for word in words[1:]):
        raise ValueError(f"{said}: give 'auto', or ADDRESS:PORT,NUM,ID such as 10.0.0.1:8476,4,0")
    address, processes, process = words[0], int(words[1]), int(words[2])
    if not re.fullmatch(r"\S+:\d+", address) or not 0 < int(address.rpartition(":")[2]) < 2**16:
        raise ValueError(f"{said}: the address must be ADDRESS:PORT of process 0, such as 10.0.0.1:8476")
    if not process < processes:
        raise ValueError(f"{said}: the id must be from 0 to {processes - 1}, one for each of {processes} processes")
    return Place(address, processes, process)


def leads() -> bool:
    """Whether this is process 0, which prints and writes what all have in common."""
    return jax.process_index() == 0


def name() -> str:
    """ "process 1 of 4"; "" where there is only one, or jax was not asked for more."""
    if "jax" not in sys.modules or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return ""
    return f"process {jax.process_index()} of {jax.process_count()}"


def require_connected() -> None:
    """Raises ValueError where jax sees a pod whose processes have not been joined: checkpoints would not work."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"this is one of {jax.process_count()} processes, which were not joined: start with --hosts auto, or call "
            f"deepseek_jax.connect_hosts() first"
        )


def gather(text: str) -> list[str]:
    """What each process says, by process. All of them call this, in the same order; it waits for the last one."""
    if jax.process_count() == 1:
        return [text]
    from jax._src import distributed  # the only way to the store that jax's processes share

    client: Any = distributed.global_state.client
    place = f"deepseek_jax/{next(_calls)}"
    client.key_value_set(f"{place}/{jax.process_index()}", text or " ")
    client.wait_at_barrier(place, _LONGEST_S * 1000)
    said = {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(place)}
    return ["" if said[process] == " " else said[process] for process in range(jax.process_count())]


def of_first(value: Any) -> Any:
    """Process 0's value on every process; what JSON holds."""
    return json.loads(gather(json.dumps(value) if leads() else "")[0])


@contextmanager
def together(doing: str) -> Iterator[None]:
    """What one process fails in fails on all: none is left to wait for it.

    Args:
        doing: for the message, such as "reading the data".
    Raises: what was raised here; PeerFailed where another process failed.
    """
    if jax.process_count() == 1:
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    code = 2 if isinstance(failure, ValueError) else getattr(failure, "exit_code", 1)
    said = gather("" if failure is None else json.dumps([code, f"{type(failure).__name__}: {str(failure)[:500]}"]))
    if failure is not None:
        raise failure
    for process, text in enumerate(said):
        if text:
            code, message = json.loads(text)
            raise PeerFailed(f"process {process} failed while {doing}: {message}", code)


class Rows(NamedTuple):
    """Rows of a batch."""

    numbers: np.ndarray
    """Int64 [b], ascending."""
    of: int
    """Rows of the whole batch."""


def rows_here(sharding: Sharding, rows: int) -> Rows:
    """The rows that this process' devices hold of an array [rows] with this sharding."""
    held = np.zeros(rows, bool)
    indices: Any = sharding.addressable_devices_indices_map((rows,))
    for (index,) in indices.values():
        held[index] = True
    return Rows(np.flatnonzero(held), rows)


def on_first(tree: Any) -> Any | None:
    """A tree of arrays spread over all processes on the first device of process 0; None on the others.

    Leaf by leaf, since each passes through every device in whole.
    """

    def one(leaf: jax.Array) -> Any:
        if leaf.is_fully_addressable:
            return jax.device_put(leaf, jax.local_devices()[0])
        mesh = leaf.sharding.mesh  # type: ignore[attr-defined]
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        whole = jax.jit(lambda x: x, out_shardings=replicated)(leaf)
        jax.block_until_ready(whole)
        return jax.device_put(whole.addressable_data(0), jax.local_devices()[0]) if leads() else None

    moved = jax.tree.map(one, tree)
    return moved if leads() else None
