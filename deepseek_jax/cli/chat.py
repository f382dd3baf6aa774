"""`deepseek-jax chat PATH`: a conversation in the terminal."""

import argparse
import contextlib
import os
import secrets
import sys
from collections.abc import Sequence


def run(args: Sequence[str]) -> None:
    """Load the model, then talk until /exit or Ctrl-D."""
    parser = argparse.ArgumentParser(
        prog="deepseek-jax chat",
        description="Talk with the model of a run folder or of a published (Hugging Face) checkpoint. /help lists the "
        "commands of a conversation. Lines may be piped in: then answers alone are written.",
    )
    parser.add_argument("path", metavar="PATH", help="run folder, or folder with config.json and *.safetensors")
    parser.add_argument("--template", metavar="NAME", help="chat template (default: that of the checkpoint)")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--thinking", action="store_true", help="ask the model to think first, where its template can")
    parser.add_argument("--temperature", type=float, default=0.6, metavar="X", help="0: the likeliest (default: 0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="probability kept (default: 0.95)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of an answer (default: what the history leaves)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same answers (default: random)")
    parser.add_argument(
        "--places", type=int, metavar="N", help="tokens of the conversation (default: 4096, or what the model has)"
    )
    parser.add_argument("--dtype", help="of a published model (default: bfloat16, on a CPU float32)")
    options = parser.parse_args(args)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: must be at least 1")

    from deepseek_jax.chat import TEMPLATES
    from deepseek_jax.infer.sampling import Sampling
    from deepseek_jax.serve.open import open_engine
    from deepseek_jax.serve.terminal import Terminal

    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=seed)
    engine, tokenizer, template = open_engine(
        options.path, slots=1, places=options.places, template=options.template, dtype=options.dtype
    )
    if template is None:
        raise ValueError(
            f"{options.path} has no chat template (a base model?): give --template NAME, one of "
            f"{', '.join(sorted(TEMPLATES))}; or continue texts with `deepseek-jax generate`"
        )
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # input() edits lines and remembers them once it is imported

    talks = sys.stdin.isatty()
    shows = sys.stdout.isatty()
    if talks:
        print(f"{options.path}, chat template {template.name}. /help lists the commands, Ctrl-D leaves.")
    Terminal(
        engine,
        tokenizer,
        template,
        sampling,
        max_new_tokens=options.max_new_tokens,
        system=options.system,
        thinking=options.thinking,
        write=lambda text: print(text, end="", flush=True),
        prompt="> " if talks else "",
        colour=shows and "NO_COLOR" not in os.environ,
        speed=shows,
    ).run()
    if talks:
        print()
