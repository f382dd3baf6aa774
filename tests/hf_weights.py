"""Published checkpoints as the library's variables, for the tests: config.json and tensors, by one table.

Small on purpose: whole float32 arrays in memory, Llama, Qwen2, DeepSeek V2 and V3 only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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

Tensors = Mapping[str, np.ndarray]


def hf_to_model_config(config: Mapping[str, Any], dtype: str = "float32") -> ModelConfig:
    """The configuration that a published config.json describes."""
    mla = "kv_lora_rank" in config
    moe = "n_routed_experts" in config
    heads = config["num_attention_heads"]
    attention = (
        MLA(
            num_attention_heads=heads,
            **{
                name: config[name]
                for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            },
        )
        if mla
        else GQA(
            num_attention_heads=heads,
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            qkv_bias=config["model_type"] == "qwen2",
        )
    )
    ffn = (
        MoE(
            **{
                name: config[name]
                for name in (
                    "intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
                    "num_experts_per_tok", "first_k_dense_replace", "scoring_func", "topk_method", "n_group",
                    "topk_group", "norm_topk_prob", "routed_scaling_factor",
                )
            }
        )
        if moe
        else Dense(intermediate_size=config["intermediate_size"])
    )  # fmt: skip
    return ModelConfig(
        name=config["model_type"],
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        attention=attention,
        ffn=ffn,
        rope=Rope(theta=config["rope_theta"], interleaved=mla, scaling=scaling_of(config["rope_scaling"])),
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        tie_word_embeddings=config["tie_word_embeddings"],
        num_nextn_predict_layers=config.get("num_nextn_predict_layers", 0),
        bos_token_id=config["bos_token_id"],
        eos_token_id=config["eos_token_id"],
        dtype=dtype,
    )


def scaling_of(scaling: Mapping[str, Any] | None) -> None | LinearScaling | Llama3Scaling | YarnScaling:
    """`rope_scaling` of a config.json."""
    if scaling is None:
        return None
    fields = dict(scaling)
    kind = fields.pop("rope_type", None) or fields.pop("type")
    kinds = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}
    return kinds[kind](**{name: value for name, value in fields.items() if name != "type"})


# The table: path in our tree -> (tensor name under the layer, how to read it given (tensor, config)).
# Published matrices are [out, in], ours [in, out], heads apart.

Read = Callable[[np.ndarray, ModelConfig], np.ndarray]
Row = tuple[str, str, Read]


def same(w: np.ndarray, config: ModelConfig) -> np.ndarray:
    return w


def transposed(w: np.ndarray, config: ModelConfig) -> np.ndarray:
    return w.T


def from_heads(w: np.ndarray, config: ModelConfig, heads: int) -> np.ndarray:
    """[heads · H, in] -> [in, heads, H]."""
    return np.moveaxis(w.reshape(heads, -1, w.shape[1]), -1, 0)


def query_heads(w: np.ndarray, config: ModelConfig) -> np.ndarray:
    return from_heads(w, config, config.attention.num_attention_heads)


def kv_heads(w: np.ndarray, config: ModelConfig) -> np.ndarray:
    return from_heads(w, config, config.attention.num_key_value_heads)


def query_bias(b: np.ndarray, config: ModelConfig) -> np.ndarray:
    return b.reshape(config.attention.num_attention_heads, -1)


def kv_bias(b: np.ndarray, config: ModelConfig) -> np.ndarray:
    return b.reshape(config.attention.num_key_value_heads, -1)


def to_heads(w: np.ndarray, config: ModelConfig) -> np.ndarray:
    """[out, heads · H] -> [heads, H, out]."""
    return w.T.reshape(config.attention.num_attention_heads, -1, w.shape[0])


def latent_rows(w: np.ndarray, config: ModelConfig) -> np.ndarray:
    return w[: config.attention.kv_lora_rank].T


def rope_rows(w: np.ndarray, config: ModelConfig) -> np.ndarray:
    return w[config.attention.kv_lora_rank :].T


def key_half(w: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Of each head's key rows and value rows, the first: [N · (P + V), C] -> [C, N, P]."""
    return query_heads(w, config)[:, :, : config.attention.qk_nope_head_dim]


def value_half(w: np.ndarray, config: ModelConfig) -> np.ndarray:
    return query_heads(w, config)[:, :, config.attention.qk_nope_head_dim :]


def mlp_rows(path: str, name: str) -> list[Row]:
    return [(f"{path}/w_{part}", f"{name}.{part}_proj.weight", transposed) for part in ("gate", "up", "down")]


def layer_rows(config: ModelConfig, moe: bool) -> list[Row]:
    """One decoder layer."""
    rows: list[Row] = [
        ("attention_norm/scale", "input_layernorm.weight", same),
        ("ffn_norm/scale", "post_attention_layernorm.weight", same),
    ]
    if isinstance(config.attention, GQA):
        for letter, weight, bias in (
            ("q", query_heads, query_bias),
            ("k", kv_heads, kv_bias),
            ("v", kv_heads, kv_bias),
        ):
            rows.append((f"attention/w_{letter}", f"self_attn.{letter}_proj.weight", weight))
            if config.attention.qkv_bias:
                rows.append((f"attention/b_{letter}", f"self_attn.{letter}_proj.bias", bias))
    else:
        if config.attention.q_lora_rank is None:
            rows += [("attention/w_q", "self_attn.q_proj.weight", query_heads)]
        else:
            rows += [
                ("attention/w_dq", "self_attn.q_a_proj.weight", transposed),
                ("attention/q_norm/scale", "self_attn.q_a_layernorm.weight", same),
                ("attention/w_uq", "self_attn.q_b_proj.weight", query_heads),
            ]
        rows += [
            ("attention/w_dkv", "self_attn.kv_a_proj_with_mqa.weight", latent_rows),
            ("attention/w_kr", "self_attn.kv_a_proj_with_mqa.weight", rope_rows),
            ("attention/kv_norm/scale", "self_attn.kv_a_layernorm.weight", same),
            ("attention/w_uk", "self_attn.kv_b_proj.weight", key_half),
            ("attention/w_uv", "self_attn.kv_b_proj.weight", value_half),
        ]
    rows += [("attention/w_o", "self_attn.o_proj.weight", to_heads)]
    if not moe:
        return rows + mlp_rows("ffn", "mlp")
    rows += [("ffn/router/w", "mlp.gate.weight", transposed)]
    rows += mlp_rows("ffn/experts", "mlp.experts.*")
    if config.ffn.n_shared_experts:
        rows += mlp_rows("ffn/shared", "mlp.shared_experts")
    if config.ffn.topk_method == "noaux_tc":
        rows += [("router:ffn/router/bias", "mlp.gate.e_score_correction_bias", same)]
    return rows


def mtp_rows(config: ModelConfig) -> list[Row]:
    """One multi-token module, published as a layer after the last."""
    prefixed = []
    for path, name, read in layer_rows(config, moe=isinstance(config.ffn, MoE)):
        prefixed.append((f"router:block/{path[7:]}" if path.startswith("router:") else f"block/{path}", name, read))
    return [
        ("embedding_norm/scale", "enorm.weight", same),
        ("hidden_norm/scale", "hnorm.weight", same),
        ("w_proj", "eh_proj.weight", transposed),
        ("norm/scale", "shared_head.norm.weight", same),
        *prefixed,
    ]


def hf_to_variables(tensors: Tensors, config: ModelConfig) -> dict[str, Any]:
    """{"params": …, "router": …} as nested dicts of float32 arrays; a tensor left over or missing raises KeyError."""
    left = set(tensors)
    variables: dict[str, Any] = {"params": {}, "router": {}}

    def take(name: str) -> np.ndarray:
        left.discard(name)
        return tensors[name]

    def put(path: str, value: np.ndarray) -> None:
        collection, path = ("router", path[7:]) if path.startswith("router:") else ("params", path)
        *parents, leaf = path.split("/")
        node = variables[collection]
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.ascontiguousarray(value)

    def stack(group: str, rows: list[Row], layers: range) -> None:
        for path, name, read in rows if layers else []:
            stacked = []
            for index in layers:
                full = f"model.layers.{index}.{name}"
                if "*" in full:
                    experts = range(config.ffn.n_routed_experts)
                    stacked.append(np.stack([read(take(full.replace("*", str(e))), config) for e in experts]))
                else:
                    stacked.append(read(take(full), config))
            kind = "router:" if path.startswith("router:") else ""
            put(f"{kind}{group}/{path.removeprefix('router:')}", np.stack(stacked))

    put("embed/embedding", take("model.embed_tokens.weight"))
    put("final_norm/scale", take("model.norm.weight"))
    if not config.tie_word_embeddings:
        put("head/w", take("lm_head.weight").T)
    dense, layers = config.num_dense_layers, config.num_hidden_layers
    modules = range(layers, layers + config.num_nextn_predict_layers)
    stack("dense_layers", layer_rows(config, moe=False), range(dense))
    stack("moe_layers", layer_rows(config, moe=True) if dense < layers else [], range(dense, layers))
    stack("mtp", mtp_rows(config) if modules else [], modules)
    for index in modules:  # copies of the shared embedding and head
        for name, of in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            copy = take(f"model.layers.{index}.{name}.weight")
            if not np.array_equal(copy, tensors[f"{of}.weight"]):
                raise ValueError(f"model.layers.{index}.{name}.weight is no copy of {of}.weight")
    if left:
        raise KeyError(f"tensors left over: {sorted(left)}")
    if not variables["router"]:
        del variables["router"]
    return variables
