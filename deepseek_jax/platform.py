"""Which kind of device the code being traced will run on.

Kernels pick their route by it. It is the default backend, unless a caller compiles for a device that is not there
(ahead-of-time compilation for a TPU on a CPU machine) and says so with `compile_for`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, cast

Platform = Literal["cpu", "gpu", "tpu"]

_override: contextvars.ContextVar[Platform | None] = contextvars.ContextVar("deepseek_jax_platform", default=None)


def target() -> Platform:
    """Platform that code traced now is meant for: the innermost `compile_for`, else jax's default backend."""
    chosen = _override.get()
    if chosen is not None:
        return chosen
    import jax

    return of_backend(jax.default_backend())


def of_backend(name: str) -> Platform:
    """Platform of a jax backend or device, by its name."""
    return cast(Platform, {"cuda": "gpu", "rocm": "gpu"}.get(name, name))


@contextlib.contextmanager
def compile_for(platform: Platform) -> Iterator[None]:
    """Trace for `platform` although it may be absent. Note that jit caches do not know of it: use a fresh jit."""
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"compile_for: platform={platform!r} is not one of 'cpu', 'gpu', 'tpu'")
    token = _override.set(platform)
    try:
        yield
    finally:
        _override.reset(token)
