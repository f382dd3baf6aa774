"""The machine that every test sees: the CPU, as 8 virtual devices, unless the environment already says otherwise."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also keeps an installed libtpu from looking for a TPU
# A machine that is busy, or was halted for a while, is no reason to abort where 8 devices wait for one another.
_FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_cpu_collective_call_terminate_timeout_seconds": "600",
}
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most programs here run once, and unoptimised code of the same formulas compiles in half the time.
    _FLAGS["xla_backend_optimization_level"] = "0"
    if version("jaxlib").startswith("0.10."):  # half the time again; later ones do not know it, and abort
        _FLAGS["xla_cpu_use_fusion_emitters"] = "false"
elif "tpu" not in os.environ["JAX_PLATFORMS"]:
    # Tests compare float32 to 1e-5 and resumed runs bit for bit: a GPU multiplies in TF32 and adds in any order unless told.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    _FLAGS["xla_gpu_deterministic_ops"] = "true"
for _name, _value in _FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_name}={_value}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Of this session alone: its workers and the processes that tests start compile many of the same programs.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache = tempfile.mkdtemp(prefix="deepseek_jax_tests_")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import jax  # noqa: E402 (it reads the environment)


@pytest.fixture(scope="module")
def transformers():
    """transformers, quiet, on one thread of torch; a test that asks for it is skipped where the parity extra is missing."""
    why = "needs the parity extra: pip install -e '.[parity]'"
    pytest.importorskip("torch", reason=why).set_num_threads(1)
    module = pytest.importorskip("transformers", minversion="5.23", reason=why)
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="module")
def goldens(transformers):
    """tests/golden/make_goldens.py as a module, under the same condition."""
    from golden import make_goldens

    return make_goldens


@pytest.fixture(scope="module")
def trl(transformers):
    """TRL, under the same condition."""
    return pytest.importorskip("trl", minversion="1.16", reason="needs the parity extra: pip install -e '.[parity]'")


@pytest.fixture(scope="module")
def trl_folder(trl, tmp_path_factory):
    """What TRL's constructors load."""
    from trl_peer import checkpoint

    return checkpoint(tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module", autouse=True)
def programs_go_with_their_module():
    """A process may map 65,530 pieces of memory, of which every compiled program takes some 15: a worker came to the end."""
    yield
    jax.clear_caches()
