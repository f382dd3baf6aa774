"""Which backend the command line asks jax for; must be decided before jax is imported."""

import glob
import importlib.util
import os

_TPU_NODES = ("/dev/accel*", "/dev/vfio/*")
_TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR")
_GPU_NODES = ("/dev/nvidia[0-9]*", "/dev/kfd")


def choose_platform() -> None:
    """Set JAX_PLATFORMS=cpu where jax would look for a TPU in vain, and leave it alone everywhere else.

    libtpu may be installed where no TPU is (it also compiles for absent ones); jax would then try to start it and print
    its errors. A choice that the user has made stands.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if not (_any_node(_TPU_NODES) or _any_node(_GPU_NODES) or any(name in os.environ for name in _TPU_VARIABLES)):
        os.environ["JAX_PLATFORMS"] = "cpu"


def _any_node(patterns: tuple[str, ...]) -> bool:
    return any(glob.glob(pattern) for pattern in patterns)
