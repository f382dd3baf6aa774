"""`deepseek-jax report RUN [--output FILE]`: one HTML page on a run, finished or not."""

import argparse
from collections.abc import Sequence


def run(args: Sequence[str]) -> None:
    """Write the page and print where it lies."""
    parser = argparse.ArgumentParser(
        prog="deepseek-jax report",
        description="Write one HTML page on a run: figures, curves, heat maps, configuration, samples. It needs no "
        "network and may be made at any time, while the run goes on too.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder that `deepseek-jax train` writes")
    parser.add_argument("--output", metavar="FILE", help="where the page goes (default: RUN/report.html)")
    options = parser.parse_args(args)

    import deepseek_jax as dsj

    print(dsj.report(options.run, options.output))
