"""The machine that every test sees: the CPU, as 8 virtual devices, unless the environment already says otherwise."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also keeps an installed libtpu from looking for a TPU
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
