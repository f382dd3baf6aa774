"""`deepseek-jax generate RUN --prompt "def "`: continue a prompt with the newest checkpoint of a run."""

import argparse
from collections.abc import Sequence


def run(args: Sequence[str]) -> None:
    """Print the prompt and its continuation."""
    parser = argparse.ArgumentParser(
        prog="deepseek-jax generate",
        description="Continue a prompt with the newest checkpoint of a run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="run folder that `deepseek-jax train` wrote")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to generate at most")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="share of probability sampled from")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text")
    options = parser.parse_args(args)

    import deepseek_jax as dsj

    [continuation] = dsj.continue_text(
        dsj.load_run(options.run),
        [options.prompt],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(options.prompt + continuation)
