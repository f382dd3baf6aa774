"""Why a test is skipped, or left to `make studies`."""

import importlib.util

import jax
import pytest

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; the CPU has 8 virtual ones")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


def study(*values, id=None):
    """A case of a parametrised test that `make studies` runs: others of the test stand for it in `make test`."""
    return pytest.param(*values, id=id, marks=pytest.mark.study)
