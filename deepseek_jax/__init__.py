"""The DeepSeek model family in JAX.

    import deepseek_jax as dsj

    config = dsj.get_config("deepseek-v3-micro")
    model = dsj.DeepSeek(config)
    variables = model.init(key, tokens)

Every public name is imported on first use (PEP 562): importing this package imports neither jax nor anything above it,
starts no backend and opens no connection, so the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deepseek_jax.chat.data import ChatData, ChatJsonl, ChatParquet, ChatTfds
    from deepseek_jax.config import (
        GQA,
        MLA,
        Dense,
        LinearScaling,
        Llama3Scaling,
        ModelConfig,
        MoE,
        Rope,
        YarnScaling,
    )
    from deepseek_jax.infer.engine import Engine
    from deepseek_jax.infer.generate import continue_text, generate
    from deepseek_jax.infer.load import load_run, open_model
    from deepseek_jax.infer.requests import Generation, Request
    from deepseek_jax.infer.sampling import Sampling
    from deepseek_jax.interop.inspect import inspect_hf
    from deepseek_jax.interop.load import load_hf
    from deepseek_jax.interop.save import save_hf
    from deepseek_jax.metrics.report import report
    from deepseek_jax.models.counts import Counts, count_params
    from deepseek_jax.models.registry import get_config, list_configs
    from deepseek_jax.models.transformer import DeepSeek
    from deepseek_jax.parallel.hosts import connect_hosts
    from deepseek_jax.planner.analysis import Plan
    from deepseek_jax.planner.ask import plan
    from deepseek_jax.posttrain.distill import distill
    from deepseek_jax.posttrain.distill_config import Distill
    from deepseek_jax.posttrain.grpo import grpo
    from deepseek_jax.posttrain.grpo_config import GRPO
    from deepseek_jax.posttrain.prefer import Prefer, prefer
    from deepseek_jax.posttrain.r1 import R1, Stage, r1
    from deepseek_jax.posttrain.reject import Rejection, reject
    from deepseek_jax.posttrain.sft import SFT, sft
    from deepseek_jax.training import RunConfig, certify, train

# Public name -> module that defines it: the block above, for the interpreter. A test holds the two equal.
_HOME = {
    "DeepSeek": "models.transformer",
    "get_config": "models.registry",
    "list_configs": "models.registry",
    "count_params": "models.counts",
    "Counts": "models.counts",
    "plan": "planner.ask",
    "Plan": "planner.analysis",
    "train": "training",
    "connect_hosts": "parallel.hosts",
    "certify": "training",
    "sft": "posttrain.sft",
    "SFT": "posttrain.sft",
    "prefer": "posttrain.prefer",
    "Prefer": "posttrain.prefer",
    "distill": "posttrain.distill",
    "Distill": "posttrain.distill_config",
    "ChatData": "chat.data",
    "ChatJsonl": "chat.data",
    "ChatParquet": "chat.data",
    "ChatTfds": "chat.data",
    "report": "metrics.report",
    "r1": "posttrain.r1",
    "R1": "posttrain.r1",
    "Stage": "posttrain.r1",
    "reject": "posttrain.reject",
    "Rejection": "posttrain.reject",
    "grpo": "posttrain.grpo",
    "GRPO": "posttrain.grpo_config",
    "load_hf": "interop.load",
    "save_hf": "interop.save",
    "inspect_hf": "interop.inspect",
    "RunConfig": "training",
    "generate": "infer.generate",
    "Engine": "infer.engine",
    "Request": "infer.requests",
    "Generation": "infer.requests",
    "Sampling": "infer.sampling",
    "load_run": "infer.load",
    "open_model": "infer.load",
    "continue_text": "infer.generate",
    "ModelConfig": "config",
    "GQA": "config",
    "MLA": "config",
    "Dense": "config",
    "MoE": "config",
    "Rope": "config",
    "LinearScaling": "config",
    "Llama3Scaling": "config",
    "YarnScaling": "config",
}

__all__ = [
    "GQA",
    "GRPO",
    "MLA",
    "R1",
    "SFT",
    "ChatData",
    "ChatJsonl",
    "ChatParquet",
    "ChatTfds",
    "Counts",
    "DeepSeek",
    "Dense",
    "Distill",
    "Engine",
    "Generation",
    "LinearScaling",
    "Llama3Scaling",
    "MoE",
    "ModelConfig",
    "Plan",
    "Prefer",
    "Rejection",
    "Request",
    "Rope",
    "RunConfig",
    "Sampling",
    "Stage",
    "YarnScaling",
    "__version__",
    "certify",
    "connect_hosts",
    "continue_text",
    "count_params",
    "distill",
    "generate",
    "get_config",
    "grpo",
    "inspect_hf",
    "list_configs",
    "load_hf",
    "load_run",
    "open_model",
    "plan",
    "prefer",
    "r1",
    "reject",
    "report",
    "save_hf",
    "sft",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
