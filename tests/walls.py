"""What tests of the sandbox share: its limits, and whether this machine has walls for it."""

import pytest

from deepseek_jax.posttrain.rewards.sandbox import Limits, Sandbox

LIMITS = Limits(seconds=20, cpu_seconds=10, memory_mb=256, processes=4, files_mb=8, output_kb=64)


def walls():
    try:
        with Sandbox(LIMITS):
            return ""
    except ValueError as error:
        return str(error)


MISSING = walls()
needs_walls = pytest.mark.skipif(bool(MISSING), reason=MISSING)
