"""`inspect_hf`: what a published checkpoint is, from its config.json and headers alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from deepseek_jax import storage
from deepseek_jax.config import GQA, ModelConfig, MoE
from deepseek_jax.interop.check import Problems, check
from deepseek_jax.interop.headers import Checkpoint, open_folder
from deepseek_jax.interop.hf_config import config_from_hf, quantization_of
from deepseek_jax.interop.names import table
from deepseek_jax.models.counts import Counts, count_params

_PARTS = (
    ("routed experts", r"\.mlp\.experts\."), ("shared experts", r"\.mlp\.shared_experts\."), ("router", r"\.mlp\.gate\."),
    ("dense feed-forward", r"\.mlp\."), ("attention", r"\.self_attn\."), ("embedding", r"^model\.embed_tokens\."),
    ("head", r"^lm_head\."), ("norms", r"norm\.weight$"),
)  # fmt: skip
_OTHER = "other"


@dataclass(frozen=True)
class Inspection:
    """What `inspect_hf` found; `str` of it is the text that the command line prints."""

    checkpoint: Checkpoint
    config: ModelConfig | None
    """None where config.json is not understood; `refused` says why."""
    refused: str
    problems: Problems
    counts: Counts | None
    parts: dict[str, tuple[int, int]]
    """Part -> tensors, bytes; multi-token modules are a part of their own."""
    dtypes: dict[str, tuple[int, int]]
    """Dtype on disk -> tensors, bytes."""

    def __str__(self) -> str:
        lines = [f"{self.checkpoint.folder}", *self._architecture(), ""]
        lines += [f"{len(self.checkpoint.tensors):,} tensors, {_size(self.checkpoint.nbytes)}"]
        lines[-1] += f", {len(self.checkpoint.files)} files"
        for title, groups in (("dtype", self.dtypes), ("part", self.parts)):
            lines += ["", f"{title:24}{'tensors':>10}{'bytes':>14}"]
            ordered = sorted(groups.items(), key=lambda item: -item[1][1])
            lines += [f"{name:24}{count:>10,}{_size(n_bytes):>14}" for name, (count, n_bytes) in ordered]
        lines += [""]
        if self.config is None:
            return "\n".join([*lines, f"not understood: {self.refused}"])
        lines += self.problems.lines() or ["whole: every tensor is there, none is left over, shapes and dtypes fit"]
        return "\n".join(lines)

    def _architecture(self) -> list[str]:
        c, counts = self.config, self.counts
        if c is None or counts is None:
            return [f"model_type {self.checkpoint.config.get('model_type')!r}"]
        kind = str(self.checkpoint.config["model_type"])
        a, ffn = c.attention, c.ffn
        if isinstance(a, GQA):
            attention = f"GQA, {a.num_attention_heads} heads, {a.num_key_value_heads} of keys, head dim {a.head_dim}"
        else:
            attention = f"MLA, {a.num_attention_heads} heads, ranks q {a.q_lora_rank} kv {a.kv_lora_rank}"
        feed = f"dense {ffn.intermediate_size}"
        if isinstance(ffn, MoE):
            feed = f"{ffn.n_routed_experts} experts of {ffn.moe_intermediate_size}, {ffn.num_experts_per_tok} a token, "
            feed += f"{ffn.n_shared_experts} shared, {ffn.first_k_dense_replace} leading dense layers"
        scaling = type(c.rope.scaling).__name__ if c.rope.scaling else "no scaling"
        block = quantization_of(self.checkpoint.config)
        return [
            f"format        {kind}" + (f", FP8 in blocks of {block[0]} × {block[1]}" if block else ""),
            f"layers        {c.num_hidden_layers} of width {c.hidden_size}, vocabulary {c.vocab_size:,}",
            f"attention     {attention}",
            f"feed-forward  {feed}",
            f"rope          theta {c.rope.theta:g}, {scaling}, {c.max_position_embeddings:,} positions",
            f"parameters    {counts.main:,} main, {counts.active:,} active, {counts.mtp:,} multi-token, "
            f"{counts.router_bias + counts.mtp_router_bias:,} selection biases",
        ]


def inspect_hf(path: storage.AnyPath) -> Inspection:
    """Describes a checkpoint folder, local or gs://; reads headers, no tensor.

    Raises: ValueError for a folder or file that does not add up. A configuration that is not understood, and tensors
        that do not fit it, are findings, not errors.
    """
    checkpoint = open_folder(path)
    config, refused, problems, counts = None, "", Problems(), None
    try:
        config = config_from_hf(checkpoint.config, name=checkpoint.folder.name)
        problems = check(checkpoint, config, table(config), quantization_of(checkpoint.config))
        counts = count_params(config)
    except ValueError as error:
        refused, config = str(error), None
    layers = config.num_hidden_layers if config else math.inf
    parts: dict[str, tuple[int, int]] = {}
    dtypes: dict[str, tuple[int, int]] = {}
    for name, info in checkpoint.tensors.items():
        for groups, key in ((parts, _part(name, layers)), (dtypes, info.dtype)):
            count, n_bytes = groups.get(key, (0, 0))
            groups[key] = (count + 1, n_bytes + info.nbytes)
    return Inspection(checkpoint, config, refused, problems, counts, parts, dtypes)


def _part(name: str, layers: float) -> str:
    if name.endswith("_scale_inv"):
        return "FP8 scales"
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= layers:
        return "multi-token modules"
    return next((part for part, pattern in _PARTS if re.search(pattern, name)), _OTHER)


def _size(n_bytes: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes} B"
