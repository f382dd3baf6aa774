"""`deepseek-jax generate PATH --prompt "def "`: continue texts with the model of a run or of a published checkpoint."""

import argparse
from collections.abc import Sequence


def run(args: Sequence[str]) -> None:
    """Print each prompt and its continuation."""
    parser = argparse.ArgumentParser(
        prog="deepseek-jax generate",
        description="Continue texts with the newest checkpoint of a run, or with a published (Hugging Face) checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="run folder, or folder with config.json and *.safetensors")
    parser.add_argument("--prompt", required=True, action="append", help="text to continue; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to generate at most")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="share of probability sampled from")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a continuation, which leaves it out"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of each prompt")
    parser.add_argument(
        "--speculate", action="store_true", help="decode with the multi-token module: the same text in fewer steps"
    )
    parser.add_argument("--dtype", help="of a published checkpoint (default: bfloat16; float32 on a CPU)")
    options = parser.parse_args(args)
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples}: must be at least 1")

    import deepseek_jax as dsj

    texts = dsj.continue_text(
        dsj.open_model(options.path, options.dtype),
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        stop=tuple(options.stop),
        samples=options.samples,
        speculate=options.speculate,
    )
    for i, text in enumerate(texts):
        print(options.prompt[i // options.samples] + text)
