"""`deepseek-jax VERB …`: finds the verb's module, runs it, turns a refused input into one message and exit code 2."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import deepseek_jax
from deepseek_jax.cli.device import choose_platform

# Verb -> (module with `run(args)`, what it does). `--help` reads this table alone: no verb, and no jax, is imported.
VERBS = {
    "models": ("deepseek_jax.cli.models", "list the members of the family and their parameter counts"),
    "plan": ("deepseek_jax.cli.plan", "say what a step needs, takes and costs on a machine, before it is rented"),
    "train": ("deepseek_jax.cli.train", "train from a config file, or continue the run in its folder"),
    "sft": ("deepseek_jax.cli.sft", "fine-tune a model on conversations, or continue the run in its folder"),
    "prefer": ("deepseek_jax.cli.prefer", "learn from preferences: DPO, or a reward model"),
    "grpo": ("deepseek_jax.cli.grpo", "teach a model by rewards, from a config file"),
    "distill": ("deepseek_jax.cli.distill", "teach a student by its teachers' probabilities, from a config file"),
    "r1": ("deepseek_jax.cli.r1", "run the stages of a pipeline such as R1's, or go on where it was cut off"),
    "data": ("deepseek_jax.cli.data", "inspect what a run reads: counts, and the first batches as text"),
    "report": ("deepseek_jax.cli.report", "write one HTML page on a run: figures, curves, heat maps, samples"),
    "certify": (
        "deepseek_jax.cli.certify",
        "prove that a config's run, killed and started again, is bit for bit the same",
    ),
    "convert": ("deepseek_jax.cli.convert", "turn a run folder into a published checkpoint, or the other way round"),
    "inspect": ("deepseek_jax.cli.inspect", "say what a published checkpoint is, from its headers alone"),
    "generate": ("deepseek_jax.cli.generate", "continue texts with the model of a run or a published checkpoint"),
    "chat": ("deepseek_jax.cli.chat", "talk with a model in the terminal"),
    "serve": ("deepseek_jax.cli.serve", "answer calls of the OpenAI API over HTTP"),
}


_STOPPED = 75


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0: done. 2: an input was refused. 74: a checkpoint could not be written. 75: stopped by a signal, all progress saved;
    the same command goes on. 76: too many updates in a row were not finite. 124: a step hung.

    With DEEPSEEK_JAX_TRACEBACK=1 a refused input raises instead, so that its traceback shows.
    """
    parser = argparse.ArgumentParser(
        prog="deepseek-jax",
        description="The DeepSeek model family in JAX.",
        epilog="`deepseek-jax VERB --help` tells more about one verb.",
    )
    parser.add_argument("--version", action="version", version=f"deepseek_jax {deepseek_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (_, summary) in VERBS.items():
        verbs.add_parser(verb, help=summary, add_help=False)
    words = list(sys.argv[1:] if argv is None else argv)
    verb = parser.parse_args(words[:1]).verb  # the rest belongs to the verb, which parses it itself

    choose_platform()
    try:
        importlib.import_module(VERBS[verb][0]).run(words[1:])
    except Exception as error:
        code = 2 if isinstance(error, ValueError) else getattr(error, "exit_code", None)
        who = _process()
        if code is None or os.environ.get("DEEPSEEK_JAX_TRACEBACK") == "1":
            if who:
                print(f"deepseek-jax {verb}: {who}:", file=sys.stderr, flush=True)
            raise
        if not (who and code == _STOPPED and not who.startswith("process 0")):  # all stop alike: one says so
            print(f"deepseek-jax {verb}: {f'{who}: ' if who else ''}{error}", file=sys.stderr)
        if code == 2:
            print("(DEEPSEEK_JAX_TRACEBACK=1 shows where this was raised)", file=sys.stderr)
        if getattr(error, "busy", False):  # a compilation cannot be broken off: end the process over it
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    return 0


def _process() -> str:
    """Which of several processes this is, such as "process 1 of 4"; "" where there is one."""
    hosts = sys.modules.get("deepseek_jax.parallel.hosts")  # not loaded, not joined
    return "" if hosts is None else hosts.name()


if __name__ == "__main__":
    sys.exit(main())
