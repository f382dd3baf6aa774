"""From a folder to a model that generates: run folders and published checkpoints."""

import json
from os import PathLike
from typing import Any, NamedTuple

from deepseek_jax import platform, storage
from deepseek_jax.models.transformer import DeepSeek

TEMPLATE_NAME = "deepseek_jax_template"
"""Key in tokenizer_config.json of what this project wrote."""


class Loaded(NamedTuple):
    """A model, ready to be used."""

    model: DeepSeek
    variables: Any
    tokenizer: Any
    template: Any = None
    """How a conversation becomes tokens (`deepseek_jax.chat`); None where the folder does not say."""
    step: int | None = None
    """Of the run's checkpoint; None for a published one."""


def open_model(path: str | PathLike[str], dtype: str | None = None) -> Loaded:
    """The model of a run folder (newest good checkpoint) or of a published one.

    Args:
        path: what `train` wrote, or a folder with config.json, *.safetensors and tokenizer.json; local or gs://.
        dtype: of a published model's parameters and products; by default "bfloat16", on a CPU "float32".

    Raises:
        ValueError: a folder that is neither, one without a tokenizer, or as `load_run` and `load_hf`.
    """
    folder = storage.path(path)
    if (folder / "manifest.json").exists():
        if dtype is not None:
            raise ValueError(
                f"dtype = {dtype!r}: {folder} is a run, which computes in the dtypes that it was trained in"
            )
        return load_run(path)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has neither manifest.json (a run) nor config.json (a published checkpoint)")
    from deepseek_jax.data.tokenizer import load_tokenizer
    from deepseek_jax.interop.load import load_hf

    if not (folder / "tokenizer.json").exists():
        raise ValueError(
            f"{folder} has no tokenizer.json: put the model's tokenizer.json and tokenizer_config.json there"
        )
    tokenizer = load_tokenizer(folder)
    template = template_of(folder, tokenizer)
    wanted: Any = dtype or ("float32" if platform.target() == "cpu" else "bfloat16")
    if wanted not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype = {wanted!r}: must be 'float32', 'bfloat16' or 'float16'")
    model, variables = load_hf(folder, wanted)
    tokenizer.require_fits(model.config.vocab_size)
    return Loaded(model, variables, tokenizer, template)


def template_of(folder: Any, tokenizer: Any, name: str | None = None) -> Any:
    """The chat template of that name; by default the one that a run's manifest names, or that a published checkpoint wants
    or carries. (`convert` notes that of a run in tokenizer_config.json, since tokens and kind of model do not tell.) None
    for a base model.

    Raises: ValueError for an unknown name.
    """
    from deepseek_jax.chat import find_template, get_template, load_folder_template
    from deepseek_jax.data.vocabulary import TOKENIZER_CONFIG

    manifest = folder / "manifest.json"
    if name is None and manifest.exists():
        name = json.loads(manifest.read_text(encoding="utf-8")).get("template")
        if name is None:
            return None
    stated = folder / TOKENIZER_CONFIG
    if name is None and stated.exists():
        name = json.loads(stated.read_text(encoding="utf-8")).get(TEMPLATE_NAME)
    if name is not None:
        return None if name == "none" else get_template(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = find_template({"name": folder.name, **config}, tokenizer)
    if found is not None:
        return get_template(found)
    try:
        return load_folder_template(folder)
    except ValueError:  # a base model
        return None


def load_run(run_dir: str | PathLike[str], step: int | None = None) -> Loaded:
    """Model, newest good (or given) checkpoint and tokenizer of a run folder.

    Raises:
        ValueError: no manifest, no checkpoint, or one that does not fit the manifest's configuration.
    """
    from deepseek_jax.checkpoint.store import Store
    from deepseek_jax.config import ModelConfig
    from deepseek_jax.data.tokenizer import load_tokenizer
    from deepseek_jax.models.counts import abstract_variables
    from deepseek_jax.parallel.rules import unbox
    from deepseek_jax.serialize import from_dict

    run_dir = storage.path(run_dir)
    manifest = run_dir / "manifest.json"
    if not manifest.exists():
        raise ValueError(f"{run_dir} is no run folder: it has no manifest.json; give the --run-dir of a training run")
    config = from_dict(ModelConfig, json.loads(manifest.read_text(encoding="utf-8"))["config"]["model"])
    with Store(run_dir / "checkpoints", read_only=True) as store:
        step = store.latest_good() if step is None else step
        if step is None:
            raise ValueError(f"{run_dir} has no checkpoint yet: let the run reach its first one")
        variables, _ = store.restore_params(unbox(abstract_variables(config)), step)
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    return Loaded(DeepSeek(config), variables, tokenizer, template_of(run_dir, tokenizer), step=step)
