"""`deepseek-jax train CONFIG.py [--run-dir DIR] [--steps N] [--model.ffn.n-group G] …`, and every verb like it.

A config file is Python that defines `get_config()`, which returns the verb's configuration: a `RunConfig` for `train`.
Every field of it, nested ones included, is a flag with the field's own type; a part that is None there, such as a pipeline,
has none, and is set in the file. The same command on the same run folder continues the run. `--hosts` makes it one of several
processes: see docs/pods.md.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any


def run(args: Sequence[str]) -> None:
    """Load the config file, apply the overrides, train."""
    run_verb("train", args, "Train from a config file, or continue the run in its folder.", _train, hosts=True)


def _train() -> tuple[type, Callable[..., Any]]:
    import deepseek_jax as dsj
    from deepseek_jax.training import RunConfig

    return RunConfig, dsj.train


def run_verb(
    verb: str, args: Sequence[str], description: str, kind_and_function: Callable[[], tuple[type, Callable[..., Any]]],
    *, hosts: bool = False,
) -> None:  # fmt: skip
    """A verb that takes a config file, its fields as flags, and a run folder; it prints the result's `summary()`.

    Args:
        verb: its name.
        args: the words after it.
        description: for --help.
        kind_and_function: gives the configuration's class and `function(config, run_dir=…)`; called once they are needed.
        hosts: whether the verb runs on several hosts.
    """
    prog = f"deepseek-jax {verb}"
    args = [*args[:1], *join_hosts(verb, args[1:], hosts)]
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} CONFIG.py [--run-dir DIR] {'[--hosts HOSTS] ' if hosts else ''}[--FIELD VALUE ...]",
        description=description,
        epilog=f"`{prog} CONFIG.py --help` lists every field of that config, with its type and value, as a flag.",
    )
    parser.add_argument("config", metavar="CONFIG.py", help="Python file that defines get_config()")
    if hosts:
        _add_hosts(parser)
    # The first word alone: only the loaded config knows the flags that follow it.
    path = Path(parser.parse_args(args[:1]).config)
    kind, function = kind_and_function()
    config, run_dir = override(load_config(path, kind), args[1:], run_dir=f"runs/{path.stem}", verb=verb)
    result = function(config, run_dir=run_dir)
    from deepseek_jax.parallel.hosts import leads

    if leads():
        print(result.summary())


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hosts",
        metavar="HOSTS",
        help="where the same command runs on several hosts, with one run folder: auto (TPU pod, SLURM, Open MPI, or "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID), or ADDRESS:PORT,NUM,ID",
    )
    parser.add_argument(
        "--hosts-timeout", metavar="SECONDS", type=float, default=300.0,
        help="how long to wait for all of them (default 300)",
    )  # fmt: skip


def join_hosts(verb: str, args: Sequence[str], supported: bool = True) -> list[str]:
    """Joins the hosts that `--hosts` names, before anything else runs; returns the other words.

    Raises: ValueError as `connect_hosts`, and for a verb that runs on one host alone.
    """
    given, rest = split_hosts(verb, args)
    if given.hosts is not None and not {"-h", "--help"} & set(rest):
        if not supported:
            raise ValueError(f"--hosts={given.hosts}: `{verb}` runs on one host; train and sft run on several")
        from deepseek_jax.parallel.hosts import connect_hosts, leads

        joined = connect_hosts(given.hosts, timeout_s=given.hosts_timeout)
        if leads():
            print(joined, file=sys.stderr, flush=True)
    return rest


def split_hosts(verb: str, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`hosts` and `hosts_timeout` of the words, and the other words."""
    parser = argparse.ArgumentParser(prog=f"deepseek-jax {verb}", add_help=False, allow_abbrev=False)
    _add_hosts(parser)
    return parser.parse_known_args(args)


def load_config(path: Path, kind: type | None = None) -> Any:
    """The result of `get_config()` in the Python file `path`, its values checked against their annotations.

    Args:
        path: the file.
        kind: what the result must be; None: a `RunConfig`.

    Raises `ValueError` for a missing file, one without `get_config`, or one that returns anything but a sound config.
    """
    from deepseek_jax.serialize import check_types

    if kind is None:
        from deepseek_jax.training import RunConfig as kind
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
        raise ValueError(f"{path}: defines no get_config(); a config file needs `def get_config() -> {kind.__name__}`")
    config = get_config()
    if not isinstance(config, kind):
        raise ValueError(f"{path}: get_config() returned a {type(config).__name__}: must be a {kind.__name__}")
    check_types(config)
    return config


def override(config: Any, args: Sequence[str], run_dir: str, verb: str = "train") -> tuple[Any, str]:
    """Apply command-line flags to `config`; returns it and the run folder (`run_dir` where no flag names one).

    Members of unions keep the kind that `config` gives them: an `MLA` has the flags of an `MLA`. An unknown flag or an
    ill-typed value prints what was wrong and exits with code 2; an impossible combination does so too, or raises the
    `ValueError` of the dataclass that refused it.
    """
    import tyro

    # The class is known at run time alone; no prefix: --steps, --model.name.
    annotation: Any = Annotated[type(config), tyro.conf.arg(name="")]  # type: ignore

    def command(run_dir: str = run_dir, config: annotation = config) -> tuple[Any, str]:  # type: ignore
        """Begin a run, or continue the one in its folder.

        Args:
            run_dir: Folder of the run: manifest, metrics, checkpoints, plots.
            config: Fields of the run.
        """
        return config, run_dir

    prog = f"deepseek-jax {verb} CONFIG.py"
    return tyro.cli(command, args=args, prog=prog, config=(tyro.conf.AvoidSubcommands,))
