"""`deepseek-jax data inspect CONFIG.py [--batches N] [--FIELD VALUE ...]`

Prints what the run of a config file would read: counts by source, and the first packed batches as text.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from deepseek_jax.cli.train import load_config, override

_PROG = "deepseek-jax data inspect"


def run(args: Sequence[str]) -> None:
    """Load the config file, apply the overrides, describe its data."""
    parser = argparse.ArgumentParser(
        prog="deepseek-jax data", description="Look at what a run reads.", epilog=f"`{_PROG} --help` tells more."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("inspect", help="counts by source, and the first packed batches as text", add_help=False)
    parser.parse_args(args[:1])
    _inspect(args[1:])


def _inspect(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        usage=f"{_PROG} CONFIG.py [--batches N] [--FIELD VALUE ...]",
        description="Print counts by source, and the first packed batches of the run as text.",
        epilog="Fields of the config are flags, as in `deepseek-jax train CONFIG.py --help`.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG.py", help="Python file that defines get_config() -> RunConfig")
    parser.add_argument("--batches", type=int, default=1, metavar="N", help="batches to show (default: 1)")
    known, overrides = parser.parse_known_args(args)
    path = Path(known.config)
    config, _ = override(load_config(path), overrides, run_dir=f"runs/{path.stem}", verb="data inspect")

    from deepseek_jax.data.inspect import describe

    print(
        describe(
            config.data,
            config.seq_len,
            batch_size=config.piece_size,
            seed=config.seed,
            batches=known.batches,
            n_tokens=config.plan.tokens_before(config.last_step),
            model_vocab_size=config.model.vocab_size,
        )
    )
