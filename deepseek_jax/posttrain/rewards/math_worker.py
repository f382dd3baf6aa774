"""The process that compares two answers by math-verify; a script, started by `math_pool.py`, that imports nothing of ours.

It reads a JSON array [reference, found] a line and writes {"equal": bool} or {"error": text} a line; the first line it
writes says that it works, {"ready": true}. It sets itself no limit but memory and the alarm that ends a process whose
trainer is gone: math-verify's own limits are alarms that Python handles between bytecodes, and a power of large numbers
is one bytecode.
"""

import json
import logging
import os
import resource
import signal
import sys

MEMORY = 2 << 30  # bytes of address space


def equal(reference: str, found: str) -> bool:
    """Whether math-verify takes the two for the same. Raises what it raises: a fault of it must not pass for "wrong"."""
    from math_verify import parse, verify

    def parsed(text: str) -> list:
        # In a box, all of a text is the answer; outside of one, math-verify would look for the likeliest part of it.
        return parse("\\boxed{" + text + "}", parsing_timeout=0, raise_on_error=True)

    return bool(verify(parsed(reference), parsed(found), timeout_seconds=0, raise_on_error=True))


def main(alarm: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not stand between the answers

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)  # math-verify warns that its own limits are off, for each process
    try:
        if not equal("\\frac{1}{2}", "0.5") or equal("2", "3"):
            raise RuntimeError("math-verify takes 1/2 and 0.5 for different, or 2 and 3 for equal")
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(ready=True)
    for line in sys.stdin:
        signal.alarm(alarm)
        try:
            answer(equal=equal(*json.loads(line)))
        except Exception as error:
            answer(error=f"math-verify raised {type(error).__name__}")
        signal.alarm(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
