"""`deepseek-jax models [NAME …]`: the registry as a table, counted by abstract evaluation."""

import argparse
import os
from collections.abc import Sequence

_COLUMNS = ("total", "main", "active", "active w/o embedding", "MTP", "router bias")
_WIDTH = 20
_LEGEND = """
Numbers of parameters. main: without multi-token prediction (MTP). active: what one token passes through, both vocabulary
matrices included. router bias: V3's selection biases (main + MTP), which are no parameters. assumed: fields that the
paper leaves open."""


def run(args: Sequence[str]) -> None:
    """Print a row a member, as soon as it is counted."""
    parser = argparse.ArgumentParser(prog="deepseek-jax models", description="The registry and its parameter counts.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="members to show (default: all)")
    names = parser.parse_args(args).names
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes alone are evaluated: no accelerator needs to start

    import deepseek_jax as dsj

    configs = [dsj.get_config(name) for name in names or dsj.list_configs()]
    first = max(len(config.name) for config in configs)
    print("model".ljust(first), *(column.rjust(_WIDTH) for column in _COLUMNS), " assumed")
    for config in configs:
        counts = dsj.count_params(config)
        numbers = (counts.total, counts.main, counts.active, counts.active_without_embedding, counts.mtp)
        cells = [f"{number:,}" if number else "-" for number in numbers]
        biases = [f"{number:,}" for number in (counts.router_bias, counts.mtp_router_bias) if number]
        cells.append(" + ".join(biases) or "-")
        print(config.name.ljust(first), *(cell.rjust(_WIDTH) for cell in cells), "", ", ".join(config.assumed) or "-")
    print(_LEGEND)
