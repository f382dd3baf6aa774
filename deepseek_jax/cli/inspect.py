"""`deepseek-jax inspect PATH`: what a published checkpoint is, from its headers alone."""

import argparse
import os
from collections.abc import Sequence


def run(args: Sequence[str]) -> None:
    """Print architecture, counts, dtypes, bytes by part, and what is missing or left over."""
    parser = argparse.ArgumentParser(
        prog="deepseek-jax inspect",
        description="Say what a published checkpoint is: architecture, counts, dtypes, bytes by part, tensors missing or "
        "left over. Reads config.json and the headers of *.safetensors, no tensor.",
    )
    parser.add_argument("path", metavar="PATH", help="folder of the checkpoint, local or gs://")
    path = parser.parse_args(args).path
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes alone are evaluated: no accelerator needs to start

    from deepseek_jax.interop.inspect import inspect_hf

    print(inspect_hf(path))
