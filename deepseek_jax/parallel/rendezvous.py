"""All processes say that they are there, before jax starts: it ends a program by abort() where one is missing.

Process 0 listens on the port that jax's service takes over afterwards. Each other process sends one line of JSON and
reads one; whatever else connects is ignored.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any

_RETRY_S = 0.25
_LINE = 4096  # bytes; the longest line


def meet(address: str, processes: int, process: int, timeout_s: float) -> None:
    """Returns once all processes are there.

    Args:
        address: ADDRESS:PORT of process 0.
        processes: how many there are.
        process: which one this is.
        timeout_s: how long to wait for them.

    Raises: ValueError on every process that is reached: where one did not come in time, two have one id, or they do not
        agree on their number.
    """
    me = {"process": process, "processes": processes, "host": socket.gethostname()}
    deadline = time.monotonic() + timeout_s
    if processes == 1:
        return
    if process == 0:
        _host(address, me, deadline, timeout_s)
    else:
        _join(address, me, deadline, timeout_s)


def _host(address: str, me: dict[str, Any], deadline: float, timeout_s: float) -> None:
    port, processes = int(address.rpartition(":")[2]), me["processes"]
    there: dict[int, tuple[socket.socket, str]] = {}
    wrong = ""
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        server = socket.create_server(
            ("", port), family=family, backlog=processes, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} of {address} ({error.strerror}): choose a free port, the same on "
            f"every process, and give id 0 to one process alone"
        ) from None
    with server:
        while len(there) < processes - 1 and not wrong:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [number for number in range(1, processes) if number not in there]
                wrong = (
                    f"process {', '.join(map(str, missing[:8]))} of {processes} did not come to {address} within "
                    f"{timeout_s:g} s: start every process, with ids from 0 to {processes - 1}, and see that this "
                    f"address can be reached from there"
                )
                break
            server.settimeout(left)
            with suppress(TimeoutError):
                connection, _ = server.accept()
                wrong = _welcome(connection, me, there)
    for connection, _ in there.values():
        with suppress(OSError), connection:
            connection.sendall(json.dumps({"wrong": wrong}).encode() + b"\n")
    if wrong:
        raise ValueError(wrong)


def _welcome(connection: socket.socket, me: dict[str, Any], there: dict[int, tuple[socket.socket, str]]) -> str:
    """Takes a process in; what is wrong with it, or ""."""
    try:
        connection.settimeout(5)
        other = json.loads(_line(connection))
        process, processes, host = int(other["process"]), int(other["processes"]), str(other["host"])
    except (OSError, ValueError, KeyError, TypeError):  # a stranger
        connection.close()
        return ""
    wrong = ""
    if processes != me["processes"]:
        wrong = (
            f"process {process} on {host} was told of {processes} processes, process 0 on {me['host']} of "
            f"{me['processes']}: give every process the same number"
        )
    elif process in there:
        wrong = f"two processes have the id {process}, on {there[process][1]} and on {host}: give each its own"
    if wrong:
        with suppress(OSError), connection:
            connection.sendall(json.dumps({"wrong": wrong}).encode() + b"\n")
    else:
        there[process] = connection, host
    return wrong


def _join(address: str, me: dict[str, Any], deadline: float, timeout_s: float) -> None:
    host, _, port = address.rpartition(":")
    why = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                connection.sendall(json.dumps(me).encode() + b"\n")
                # Process 0 says what is wrong when its own time is over, which may be a little later than ours.
                connection.settimeout(max(deadline - time.monotonic(), 0) + 10)
                answer = json.loads(_line(connection))
        except (OSError, ValueError) as error:  # not there yet, or it ended; ours or another's server
            why = str(error)
            time.sleep(_RETRY_S)
            continue
        if answer["wrong"]:
            raise ValueError(answer["wrong"])
        return
    raise ValueError(
        f"process {me['process']} of {me['processes']}: process 0 does not answer at {address} within {timeout_s:g} s "
        f"({why}): start it, and see that this address can be reached from {me['host']}"
    )


def _line(connection: socket.socket) -> bytes:
    """What comes up to a newline. Raises ConnectionError where the other side ends before, ValueError for a long one."""
    received = b""
    while not received.endswith(b"\n"):
        part = connection.recv(_LINE)
        if not part:
            raise ConnectionError("it hung up")
        received += part
        if len(received) > _LINE:
            raise ValueError("the line is too long")
    return received
