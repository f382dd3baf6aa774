"""config.json and `ModelConfig`, both ways, in both spellings: the published one and that of transformers 5.

Every field is known: it is used, it must have the one value that this library computes with, or it has no say in what
the model computes. An unknown field is refused, since nobody can tell what it would change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek_jax.config import (
    GQA,
    MLA,
    Dense,
    ModelConfig,
    MoE,
)
from deepseek_jax.interop.hf_fields import Fields, rope_from_hf, scaling_to_hf
from deepseek_jax.interop.names import ARCHITECTURES, format_of
from deepseek_jax.serialize import check_types

# What transformers 5 leaves out, and the published files carry: the type of the model decides.
_GATES = {
    "deepseek": dict(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False),
    "deepseek_v2": dict(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False),
    "deepseek_v3": dict(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True),
}
_MAY_BE = {
    "deepseek": dict(scoring_func=("softmax",), topk_method=("greedy",), norm_topk_prob=(False, True)),
    "deepseek_v2": dict(
        scoring_func=("softmax",), topk_method=("greedy", "group_limited_greedy"), norm_topk_prob=(False,)
    ),
    "deepseek_v3": dict(scoring_func=("sigmoid",), topk_method=("noaux_tc",), norm_topk_prob=(False, True)),
}


# The last ones say nothing that the tensors' own dtypes do not.
_QUANTIZATION = {
    "quant_method", "fmt", "scale_fmt", "weight_block_size", "activation_scheme", "modules_to_not_convert", "dequantize",
}  # fmt: skip


def config_from_hf(config: Mapping[str, Any], *, name: str = "", dtype: Any = "float32") -> ModelConfig:
    """The configuration that a config.json describes.

    Args:
        config: the file's content.
        name: name of the result; the file's `model_type` by default.
        dtype: compute and parameter dtype of the result; the file's own is that of its tensors alone.

    Raises:
        ValueError: an unknown format, a field that is unknown, missing or ill-typed, two that contradict each other,
            or a value that this library does not compute.
    """
    fields = Fields(config)
    kind = fields.take("model_type", str)
    if kind not in ARCHITECTURES:
        raise fields.wrong("model_type", kind, f"known formats are {', '.join(ARCHITECTURES)}")
    latent = kind in ("deepseek_v2", "deepseek_v3")
    heads, hidden = fields.take("num_attention_heads", int), fields.take("hidden_size", int)
    attention = _latent(fields, heads) if latent else _grouped(fields, heads, hidden, kind)
    depth = fields.take("num_nextn_predict_layers", int, 0) if kind == "deepseek_v3" else 0
    if kind == "deepseek_v3":
        fields.same("num_mtp_layers", depth, "num_nextn_predict_layers")
    model = ModelConfig(
        name=name or kind,
        vocab_size=fields.take("vocab_size", int),
        hidden_size=hidden,
        num_hidden_layers=fields.take("num_hidden_layers", int),
        attention=attention,
        ffn=_experts(fields, kind)
        if kind in _GATES
        else Dense(intermediate_size=fields.take("intermediate_size", int)),
        rope=rope_from_hf(fields, latent),
        max_position_embeddings=fields.take("max_position_embeddings", int),
        rms_norm_eps=fields.take("rms_norm_eps", float),
        tie_word_embeddings=fields.take("tie_word_embeddings", bool, False),
        num_nextn_predict_layers=depth,
        initializer_range=fields.take("initializer_range", float, 0.02),
        bos_token_id=_token(fields, "bos_token_id"),
        eos_token_id=_token(fields, "eos_token_id"),
        dtype=dtype,
        param_dtype=dtype,
    )
    quantization_of(config)
    fields.take("quantization_config", dict, None)
    fields.finish()
    check_types(model)
    return model


def quantization_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Block of one FP8 scale, (out, in), that `quantization_config` states; None where nothing is quantised.

    Raises: ValueError for anything but block-FP8 in e4m3.
    """
    stated = config.get("quantization_config")
    if stated is None:
        return None
    where = "config.json: quantization_config"
    if not isinstance(stated, Mapping):
        raise ValueError(f"{where} = {stated!r}: must be an object")
    if unknown := sorted(set(stated) - _QUANTIZATION):
        raise ValueError(f"{where} = {dict(stated)!r}: unknown fields {unknown}; known: {sorted(_QUANTIZATION)}")
    block = stated.get("weight_block_size", [128, 128])
    if stated.get("quant_method") != "fp8" or stated.get("fmt", "e4m3") != "e4m3":
        raise ValueError(f"{where} = {dict(stated)!r}: only quant_method 'fp8' with fmt 'e4m3' is read here")
    if stated.get("scale_fmt", "ue8m0") != "ue8m0":
        raise ValueError(f"{where}.scale_fmt = {stated['scale_fmt']!r}: must be 'ue8m0' or absent")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ValueError(f"{where}.weight_block_size = {block!r}: must be two sizes, such as [128, 128]")
    return block[0], block[1]


def config_to_hf(config: ModelConfig, *, torch_dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json of this configuration, in the published spelling, which transformers 4 and 5 both read.

    What is ours alone does not travel: remat, scan, compute dtypes, V2's device and communication losses and capacity.

    Raises: ValueError where no published format holds the configuration.
    """
    kind = format_of(config)
    attention, ffn = config.attention, config.ffn
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": attention.num_attention_heads, "intermediate_size": ffn.intermediate_size,
        "hidden_act": "silu", "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps, "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range, "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id, "rope_theta": config.rope.theta,
        "rope_scaling": scaling_to_hf(config.rope.scaling), "attention_dropout": 0.0, "use_cache": True,
        "torch_dtype": torch_dtype,
    }  # fmt: skip
    if kind != "qwen2":
        out["attention_bias"] = False
    if isinstance(attention, GQA):
        out["num_key_value_heads"] = attention.num_key_value_heads
        if kind == "llama" or attention.head_dim * attention.num_attention_heads != config.hidden_size:
            out["head_dim"] = attention.head_dim
    else:
        out["num_key_value_heads"] = attention.num_attention_heads
        for field in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            out[field] = getattr(attention, field)
    if isinstance(ffn, MoE):
        for field in (
            "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
            "first_k_dense_replace", "scoring_func", "norm_topk_prob",
        ):  # fmt: skip
            out[field] = getattr(ffn, field)
        out |= {"moe_layer_freq": 1, "seq_aux": True}
        out["aux_loss_alpha"] = ffn.sequence_loss_alpha if kind == "deepseek_v3" else ffn.expert_loss_alpha
        if kind != "deepseek":
            for field in ("topk_method", "n_group", "topk_group", "routed_scaling_factor"):
                out[field] = getattr(ffn, field)
    if kind == "deepseek_v3":
        out["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    return out


def quantization_to_hf(*, power_of_two: bool) -> dict[str, Any]:
    """`quantization_config` of a checkpoint in block-FP8, as V3 (float scales) and V3.1 (powers of two) publish it."""
    stated = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    return stated | ({"scale_fmt": "ue8m0"} if power_of_two else {})


def _grouped(fields: Fields, heads: int, hidden: int, kind: str) -> GQA:
    head_dim = fields.take("head_dim", int, 0)
    if not head_dim and (heads <= 0 or hidden % heads):
        raise fields.wrong("num_attention_heads", heads, f"must divide hidden_size = {hidden}, or give head_dim")
    return GQA(
        num_attention_heads=heads,
        num_key_value_heads=fields.take("num_key_value_heads", int, heads),
        head_dim=head_dim or hidden // heads,
        qkv_bias=kind == "qwen2",
    )


def _latent(fields: Fields, heads: int) -> MLA:
    fields.same("num_key_value_heads", heads, "num_attention_heads (MLA has a key for every head)")
    attention = MLA(
        num_attention_heads=heads,
        q_lora_rank=fields.take("q_lora_rank", int, None),
        **{
            field: fields.take(field, int)
            for field in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        },
    )
    fields.same("head_dim", attention.qk_rope_head_dim, "qk_rope_head_dim")
    fields.same("qk_head_dim", attention.qk_nope_head_dim + attention.qk_rope_head_dim, "qk_nope + qk_rope head dims")
    return attention


def _experts(fields: Fields, kind: str) -> MoE | Dense:
    dense = fields.take("intermediate_size", int)
    experts = fields.take("n_routed_experts", int, None)
    if experts is None and kind == "deepseek":
        return Dense(intermediate_size=dense)
    gate = {field: fields.take(field, type(value), value) for field, value in _GATES[kind].items()}
    for field, allowed in _MAY_BE[kind].items():
        if gate[field] not in allowed:
            raise fields.wrong(field, gate[field], f"model_type {kind!r} computes {' or '.join(map(repr, allowed))}")
    if kind == "deepseek":
        groups: dict[str, Any] = {}
    else:
        groups = {field: fields.take(field, int, 1) for field in ("n_group", "topk_group")}
        if gate["topk_method"] == "greedy":  # the groups have no say
            groups["topk_group"] = groups["n_group"]
        groups["routed_scaling_factor"] = fields.take("routed_scaling_factor", float, 1.0)
    alpha = fields.take("aux_loss_alpha", float, 0.0)
    if not fields.take("seq_aux", bool, True) and alpha:
        raise fields.wrong("seq_aux", False, "the balance loss of a whole batch is not computed here")
    fields.same("n_local_experts", experts, "n_routed_experts")
    fields.same("num_local_experts", experts, "n_routed_experts")
    return MoE(
        intermediate_size=dense,
        n_routed_experts=fields.take("n_routed_experts", int),
        n_shared_experts=fields.take("n_shared_experts", int, 0),
        moe_intermediate_size=fields.take("moe_intermediate_size", int),
        num_experts_per_tok=fields.take("num_experts_per_tok", int),
        first_k_dense_replace=min(fields.take("first_k_dense_replace", int, 0), fields.take("num_hidden_layers", int)),
        sequence_loss_alpha=alpha if kind == "deepseek_v3" else 0.0,
        expert_loss_alpha=0.0 if kind == "deepseek_v3" else alpha,
        **gate,
        **groups,
    )


def _token(fields: Fields, name: str) -> int | None:
    value = fields.config.get(name)
    if isinstance(value, list):
        fields.take(name, list)
        if len(value) != 1:
            raise fields.wrong(name, value, "give one id: a model has one such token here")
        return value[0]
    return fields.take(name, int, None)
