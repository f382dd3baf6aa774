"""The machine that every test sees: the CPU, as 8 virtual devices, unless the environment already says otherwise."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also keeps an installed libtpu from looking for a TPU
_FLAGS = {"xla_force_host_platform_device_count": "8"}
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most programs here run once, and unoptimised code of the same formulas compiles in half the time.
    _FLAGS["xla_backend_optimization_level"] = "0"
for _name, _value in _FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_name}={_value}".strip()
