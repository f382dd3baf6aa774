"""Why a test is skipped on a machine that lacks what it needs."""

import importlib.util

import jax
import pytest

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; the CPU has 8 virtual ones")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
