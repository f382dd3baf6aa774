"""What the machine at hand can do with a configuration."""

from dataclasses import replace
from typing import Any

import jax

from deepseek_jax.config import ModelConfig


def check_precision(config: ModelConfig) -> None:
    """Refuse float64 where jax would quietly compute in float32."""
    settings: Any = jax.config
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) == "float64" and not settings.jax_enable_x64:
            raise ValueError(f"RunConfig.model.{name} = 'float64': set JAX_ENABLE_X64=1, or jax computes in float32")


def fit_dtype(config: ModelConfig) -> tuple[ModelConfig, str | None]:
    """The configuration with a compute dtype that the device has, and a message where that is another one.

    GPUs before Ampere (Colab's T4) have no bfloat16 units; float16 would need loss scaling, so they get float32.
    """
    device = jax.devices()[0]
    if config.dtype != "bfloat16" or device.platform not in ("gpu", "cuda"):
        return config, None
    capability = float(getattr(device, "compute_capability", "8.0"))
    if capability >= 8.0:
        return config, None
    message = (
        f"{device.device_kind} (compute capability {capability}) has no bfloat16: computing in float32 instead; "
        f"set model.dtype to choose another"
    )
    return replace(config, dtype="float32"), message
