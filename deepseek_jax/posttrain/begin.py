"""The weights that post-training begins with: of a run or of a published checkpoint, in their shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from deepseek_jax import platform, storage
from deepseek_jax.chat import TEMPLATES
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.infer.load import template_of
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import sharded_shapes
from deepseek_jax.posttrain.common import From
from deepseek_jax.serialize import from_dict
from deepseek_jax.training.devices import fit_dtype


@dataclass(frozen=True)
class Start:
    """Where a run of post-training begins.

    Fields:
        model: in the dtypes that the run computes and updates in.
        tokenizer: of the folder.
        template: chat template, or None.
        load: gives the variables, `{"params", "router"}`, in their shards.
    """

    model: DeepSeek
    tokenizer: Tokenizer
    template: Any
    load: Callable[[], dict[str, Any]]


def open_start(
    config: From, mesh: Mesh, field: str = "init_from", *, folder: str | None = None, mtp: bool = False
) -> Start:
    """Looks into the folder that `config.init_from` (or another `field` of `config`) names; reads no weights yet.

    `folder` is the folder where the field is one within another, such as "teachers[0].path".

    Multi-token modules stay where `mtp` is given alone: reinforcement learning neither trains nor uses them.

    Raises: ValueError for a folder that is neither kind, lacks its tokenizer, or whose model is smaller than it.
    """
    named: str = getattr(config, field) if folder is None else folder
    source = storage.path(named)
    what = f"{type(config).__name__}.{field} = {named!r}"
    if (source / "manifest.json").exists():
        values = json.loads((source / "manifest.json").read_text(encoding="utf-8"))["config"]["model"]
        found = from_dict(ModelConfig, values)
        dtype = config.dtype or found.dtype
    elif (source / "config.json").exists():
        from deepseek_jax.interop.hf_config import config_from_hf

        found = config_from_hf(json.loads((source / "config.json").read_text(encoding="utf-8")))
        dtype = config.dtype or ("float32" if platform.target() == "cpu" else "bfloat16")
    else:
        raise ValueError(f"{what} has neither manifest.json (a run) nor config.json (a published checkpoint)")
    if not (source / "tokenizer.json").exists():
        raise ValueError(f"{what} has no tokenizer.json: put the model's there")
    tokenizer = load_tokenizer(source)
    tokenizer.require_fits(found.vocab_size)
    model = replace(
        found, dtype=dtype, param_dtype=config.param_dtype, remat=config.remat or found.remat,
        num_nextn_predict_layers=found.num_nextn_predict_layers if mtp else 0,
        expert_buffer_factor=None,  # nothing here would say how much a bound leaves out
    )  # fmt: skip
    model, _ = fit_dtype(model)
    template = template_of(source, tokenizer, config.template)
    return Start(DeepSeek(model), tokenizer, template, lambda: _load(model, source, mesh, what, config))


def own_template(config: From, start: Start) -> str:
    """Name of the start's chat template, one of ours, whose masks say what an answer is.

    Raises: ValueError for a folder that names none, or carries a text of its own.
    """
    name = getattr(start.template, "name", None)
    config.check(
        name in TEMPLATES, "template",
        f"{config.init_from} names none of ours; give one of {', '.join(TEMPLATES)}. 'llm' needs no token of its own",
    )  # fmt: skip
    return str(name)


def abstract_model(model: ModelConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a model's variables."""
    return sharded_shapes(mesh, abstract_variables(model))


def _load(model: ModelConfig, source: Any, mesh: Mesh, what: str, config: From) -> dict[str, Any]:
    if not (source / "manifest.json").exists():
        from deepseek_jax.interop.load import load_hf

        _, variables = load_hf(source, config.param_dtype, mesh, mtp=model.num_nextn_predict_layers > 0)
        return variables
    with Store(source / "checkpoints", read_only=True) as store:
        step = store.latest_good(config.verify_checkpoints)
        if step is None:
            raise ValueError(f"{what} has no finished checkpoint: give the folder of a run that has one")
        manifest = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
        saved = from_dict(ModelConfig, manifest["config"]["model"])
        wanted = abstract_model(replace(model, param_dtype=saved.param_dtype), mesh)
        # A leaf of multi-token modules is asked for by nobody, and stays on disk.
        variables, _ = store.restore_params(wanted, step)
    target = abstract_model(model, mesh)
    return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), variables, target)
