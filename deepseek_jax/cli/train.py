"""`deepseek-jax train CONFIG.py [--run-dir DIR] [--steps N] [--model.ffn.n-group G] …`

A config file is Python that defines `get_config() -> RunConfig`. Every field of the result, nested ones included, is a
flag with the field's own type. The same command on the same run folder continues the run.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from deepseek_jax.training import RunConfig

_PROG = "deepseek-jax train"


def run(args: Sequence[str]) -> None:
    """Load the config file, apply the overrides, train."""
    parser = argparse.ArgumentParser(
        prog=_PROG,
        usage=f"{_PROG} CONFIG.py [--run-dir DIR] [--steps N] [--FIELD VALUE ...]",
        description="Train from a config file, or continue the run in its folder.",
        epilog=f"`{_PROG} CONFIG.py --help` lists every field of that config, with its type and value, as a flag.",
    )
    parser.add_argument("config", metavar="CONFIG.py", help="Python file that defines get_config() -> RunConfig")
    # The first word alone: only the loaded config knows the flags that follow it.
    path = Path(parser.parse_args(args[:1]).config)
    config, run_dir = override(load_config(path), args[1:], run_dir=f"runs/{path.stem}")

    import deepseek_jax as dsj

    print(dsj.train(config, run_dir=run_dir).summary())


def load_config(path: Path) -> "RunConfig":
    """The result of `get_config()` in the Python file `path`, its values checked against their annotations.

    Raises `ValueError` for a missing file, one without `get_config`, or one that returns anything but a sound `RunConfig`.
    """
    from deepseek_jax.serialize import check_types
    from deepseek_jax.training import RunConfig

    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    if path.suffix != ".py":
        raise ValueError(f"{path}: a config file is Python, with a name that ends in .py")
    spec = importlib.util.spec_from_file_location(f"deepseek_jax_config.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in the file look themselves up here
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"{path}: defines no get_config(); a config file needs `def get_config() -> RunConfig`")
    config = get_config()
    if not isinstance(config, RunConfig):
        raise ValueError(f"{path}: get_config() returned a {type(config).__name__}: must be a RunConfig")
    check_types(config)
    return config


def override(config: "RunConfig", args: Sequence[str], run_dir: str, verb: str = "train") -> tuple["RunConfig", str]:
    """Apply command-line flags to `config`; returns it and the run folder (`run_dir` where no flag names one).

    Members of unions keep the kind that `config` gives them: an `MLA` has the flags of an `MLA`. An unknown flag or an
    ill-typed value prints what was wrong and exits with code 2; an impossible combination does so too, or raises the
    `ValueError` of the dataclass that refused it.
    """
    import tyro

    from deepseek_jax.training import RunConfig

    def command(
        run_dir: str = run_dir,
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = config,  # no prefix: --steps, --model.name
    ) -> tuple[RunConfig, str]:
        """Train, or continue the run in its folder.

        Args:
            run_dir: Folder of the run: manifest, metrics, checkpoints, plots.
            config: Fields of the run.
        """
        return config, run_dir

    prog = f"deepseek-jax {verb} CONFIG.py"
    return tyro.cli(command, args=args, prog=prog, config=(tyro.conf.AvoidSubcommands,))
