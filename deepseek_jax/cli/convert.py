"""`deepseek-jax convert SRC DST`: a run folder as a published checkpoint, and the other way round."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

_DTYPES = ("float32", "bfloat16", "float16", "float8")


def run(args: Sequence[str]) -> None:
    """Find out what SRC is, and write DST."""
    parser = argparse.ArgumentParser(
        prog="deepseek-jax convert",
        description="Turn a run folder into a published (Hugging Face) checkpoint, a published checkpoint into a run "
        "folder, which `generate` opens and `init_from` takes, or write a published one again in another dtype.",
    )
    parser.add_argument("source", metavar="SRC", help="run folder, or folder with config.json and *.safetensors")
    parser.add_argument("target", metavar="DST", help="new folder")
    parser.add_argument("--to", choices=("hf", "run"), help="what DST becomes (default: what SRC is not)")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of the tensors (default: bfloat16 in hf, float32 in run); float8: 128 × 128 blocks",
    )
    parser.add_argument("--ue8m0", action="store_true", help="FP8 scales are powers of two, as in V3.1")
    parser.add_argument("--no-mtp", action="store_true", help="leave multi-token prediction modules out")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the last good one)")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, or its folder (default: that of SRC)")
    options = parser.parse_args(args)

    from deepseek_jax import storage

    source = storage.path(options.source)
    is_run = (source / "manifest.json").exists()
    if not is_run and not (source / "config.json").exists():
        raise ValueError(f"{source} has neither manifest.json (a run) nor config.json (a published checkpoint)")
    to = options.to or ("hf" if is_run else "run")
    if not is_run and options.step is not None:
        raise ValueError(f"--step {options.step}: {source} is a published checkpoint, which has no steps")
    if to == "run":
        if is_run:
            raise ValueError(f"{source} is a run folder already: copy it, or give --to hf")
        if options.ue8m0:
            raise ValueError("--ue8m0: a run folder holds no FP8 scales")
        print(hf_to_run(source, options.target, options.dtype or "float32", not options.no_mtp, options.tokenizer))
        return
    dtype = options.dtype or "bfloat16"
    if is_run:
        print(
            run_to_hf(source, options.target, dtype, options.step, not options.no_mtp, options.ue8m0, options.tokenizer)
        )
        return
    from deepseek_jax.interop.rewrite import rewrite_hf

    mtp, tokenizer = not options.no_mtp, options.tokenizer
    print(rewrite_hf(source, options.target, dtype, ue8m0=options.ue8m0, mtp=mtp, tokenizer=tokenizer))


def run_to_hf(
    source: Any,
    target: str,
    dtype: Any = "bfloat16",
    step: int | None = None,
    mtp: bool = True,
    ue8m0: bool = False,
    tokenizer: str | None = None,
) -> Any:
    """The last good (or given) checkpoint of a run folder as a published checkpoint with its tokenizer.

    Raises: ValueError as `load_run` and `save_hf`.
    """
    from deepseek_jax import storage
    from deepseek_jax.infer.load import TEMPLATE_NAME, load_run
    from deepseek_jax.interop.save import save_hf
    from deepseek_jax.models.transformer import DeepSeek

    loaded = load_run(source, step)
    model, variables = loaded.model, loaded.variables
    if not mtp:
        model = DeepSeek(replace(model.config, num_nextn_predict_layers=0))
        variables = {name: {k: v for k, v in tree.items() if k != "mtp"} for name, tree in variables.items()}
    folder = save_hf(target, model, variables, dtype, ue8m0=ue8m0, tokenizer=tokenizer or loaded.tokenizer)
    if tokenizer is None:  # what transformers needs beside tokenizer.json
        text = {i: loaded.tokenizer.decode([i]) for i in (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id)}
        stated = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": text[loaded.tokenizer.bos_id],
            "eos_token": text[loaded.tokenizer.eos_id],
            "pad_token": loaded.tokenizer.decode([loaded.tokenizer.pad_id]),
            "model_max_length": model.config.max_position_embeddings,
            **({} if loaded.template is None else {TEMPLATE_NAME: loaded.template.name}),
        }
        storage.write_atomic(folder / "tokenizer_config.json", json.dumps(stated, indent=2, ensure_ascii=False) + "\n")
    return folder


def hf_to_run(source: Any, target: str, dtype: Any = "float32", mtp: bool = True, tokenizer: str | None = None) -> Any:
    """A published checkpoint as a run folder that has finished step 0: manifest, tokenizer, checkpoint.

    `generate` opens it, and `RunConfig.init_from` takes its weights where the run's model has the same `param_dtype`.

    Raises: ValueError as `load_hf`; for a folder that holds a run already; without a tokenizer.
    """
    from deepseek_jax import storage
    from deepseek_jax.checkpoint.store import Store
    from deepseek_jax.data.tokenizer import load_tokenizer
    from deepseek_jax.interop.load import load_hf
    from deepseek_jax.metrics.manifest import write_manifest
    from deepseek_jax.serialize import to_dict

    if dtype == "float8":
        raise ValueError("dtype = 'float8': a run computes with its weights: give float32, bfloat16 or float16")
    folder = storage.path(target)
    if (folder / "manifest.json").exists():
        raise ValueError(f"{folder} holds a run already: give a new folder")
    if tokenizer is None and not (source / "tokenizer.json").exists():
        raise ValueError(f"{source} has no tokenizer.json: give --tokenizer")
    words = load_tokenizer(tokenizer or source)
    model, variables = load_hf(source, dtype, mtp=mtp)
    words.require_fits(model.config.vocab_size)
    storage.make_folder(folder)
    words.save(folder / "tokenizer.json")
    with Store(folder / "checkpoints", async_save=False) as store:
        store.save(0, variables, meta={"converted_from": str(source)})
    write_manifest(folder, {"model": to_dict(model.config)}, {"converted_from": str(source)})
    return folder
