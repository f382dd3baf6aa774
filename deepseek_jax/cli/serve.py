"""`deepseek-jax serve PATH`: an HTTP endpoint that speaks the OpenAI API."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

_KEY_VARIABLE = "DEEPSEEK_JAX_API_KEY"


def run(args: Sequence[str]) -> None:
    """Load the model, then answer calls until a signal comes."""
    parser = argparse.ArgumentParser(
        prog="deepseek-jax serve",
        description="Serve a run folder or a published (Hugging Face) checkpoint over HTTP: POST /v1/chat/completions, "
        "POST /v1/completions, GET /v1/models, GET /health, as clients of the OpenAI API expect them.",
        epilog="SIGTERM or Ctrl-C once: finish the accepted calls, refuse new ones with 503, end with 0; twice: end "
        "without finishing them. Needs the extra `serve`: pip install 'deepseek-jax[serve]'.",
    )
    parser.add_argument("path", metavar="PATH", help="run folder, or folder with config.json and *.safetensors")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port (default: 8000; 0: a free one)")
    parser.add_argument("--name", help="of the model, in the API (default: the last part of PATH)")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="answers decoded together (default: 8)")
    parser.add_argument(
        "--places", type=int, metavar="N", help="tokens of prompt and answer (default: 4096, or what the model has)"
    )
    parser.add_argument(
        "--queue", type=int, default=64, metavar="N", help="answers that may wait for a slot (default: 64)"
    )
    parser.add_argument("--template", metavar="NAME", help="chat template (default: that of the checkpoint)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(_KEY_VARIABLE),
        help=f"what clients must send; better in {_KEY_VARIABLE}, which no list of processes shows (default: none)",
    )
    parser.add_argument("--dtype", help="of a published model (default: bfloat16, on a CPU float32)")
    options = parser.parse_args(args)

    from deepseek_jax.serve import bind, create_app, serve
    from deepseek_jax.serve.open import open_engine

    name = options.name or Path(options.path).resolve().name
    with bind(options.host, options.port) as listener:
        engine, tokenizer, template = open_engine(
            options.path, slots=options.slots, places=options.places, template=options.template, dtype=options.dtype
        )
        app = create_app(engine, tokenizer, template, name=name, queue=options.queue, api_key=options.api_key)
        host, port = listener.getsockname()[:2]
        chat = "no chat template" if template is None else f"chat template {template.name}"
        print(
            f"http://{f'[{host}]' if ':' in host else host}:{port}/v1 serves model {name!r}: "
            f"{engine.slots} slots of {engine.places} tokens, {chat}",
            flush=True,
        )
        serve(app, listener)
