"""config.json drawn at random as widely as the formats allow: odd sizes, every rule of the gates, rope in every spelling."""

from typing import Any

import literal_checkpoints as literal
import numpy as np

SPELLINGS = ("type", "rope_type", "both", "rope_parameters")


def wide_config(kind: str, draw: np.random.Generator) -> dict[str, Any]:
    """A config.json of this type; every combination is one that both transformers and this library compute."""

    def pick(*values: Any) -> Any:
        return values[draw.integers(len(values))]

    config = literal.random_config(kind, draw)
    heads, layers = config["num_attention_heads"], pick(1, 2, 3)
    config |= dict(
        hidden_size=heads * pick(7, 10, 22), num_hidden_layers=layers, vocab_size=pick(53, 128, 131),
        intermediate_size=pick(17, 40, 129), tie_word_embeddings=pick(True, False), rms_norm_eps=pick(1e-5, 1e-6),
        rope_theta=pick(10000, 10000.0, 500000.0), initializer_range=pick(0.02, 0.006),
    )  # fmt: skip
    if "kv_lora_rank" in config:
        config["num_key_value_heads"] = pick(heads, None)
    else:
        config["num_key_value_heads"] = heads if kind == "deepseek" else pick(1, heads // 2, heads, None)
        if (kind != "deepseek" and pick(True, False)) or config["hidden_size"] // heads % 2:
            config["head_dim"] = pick(6, 16, 34)
        elif kind == "llama":
            config["head_dim"] = None
    if kind == "deepseek" and config["hidden_size"] // heads % 2:
        config["hidden_size"] = heads * 10
        del config["head_dim"]
    config["rope_scaling"] = _scaling(config, pick)
    if "n_routed_experts" in config:
        _experts(config, layers, pick)
    for field in (
        "rope_scaling",
        "head_dim",
        "n_group",
        "topk_group",
        "n_shared_experts",
    ):  # null and absent are the same
        if field in config and config[field] is None and pick(True, False):
            del config[field]
    return spelled(config, pick(*SPELLINGS))


def spelled(config: dict[str, Any], spelling: str) -> dict[str, Any]:
    """The same configuration with rope in this spelling."""
    config, scaling = dict(config), config.get("rope_scaling")
    kind = scaling["rope_type"] if scaling else None
    if spelling == "rope_parameters":
        config.pop("rope_scaling", None)
        config["rope_parameters"] = {**(scaling or {"rope_type": "default"}), "rope_theta": config.pop("rope_theta")}
        if "torch_dtype" in config:
            config["dtype"] = config.pop("torch_dtype")
    elif scaling and spelling != "rope_type":
        rest = scaling if spelling == "both" else {k: v for k, v in scaling.items() if k != "rope_type"}
        config["rope_scaling"] = {**rest, "type": kind}
    return config


def plainly(config: dict[str, Any]) -> dict[str, Any]:
    """In the one spelling, without absences, that the literal forward pass knows."""
    config = {"q_lora_rank": None, "rope_scaling": None, **config}
    if "rope_parameters" in config:
        scaling = dict(config.pop("rope_parameters"))
        config |= dict(rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling)
        if scaling["rope_type"] == "default":
            config["rope_scaling"] = None
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    return config


def _scaling(config: dict[str, Any], pick: Any) -> dict[str, Any] | None:
    original, factor = pick(32, 64), pick(4, 4.0, 40)
    llama3 = dict(low_freq_factor=1.0, high_freq_factor=pick(2.0, 4), original_max_position_embeddings=original)
    yarn: dict[str, Any] = dict(original_max_position_embeddings=original)
    if pick(True, False):
        yarn |= dict(beta_fast=pick(32, 16.0), beta_slow=1)
    if "kv_lora_rank" in config and pick(True, True, False):
        mscale = pick(0.707, 1.0, 1)
        yarn |= dict(mscale=pick(mscale, 0.9), mscale_all_dim=mscale)
    kinds = [None, {}, dict(rope_type="linear"), llama3 | {"rope_type": "llama3"}, yarn | {"rope_type": "yarn"}]
    scaling = pick(*kinds, kinds[-1], kinds[-1])
    if not scaling:
        return None if scaling is None else {"rope_type": "default"}
    return scaling | {"factor": factor}


def _experts(config: dict[str, Any], layers: int, pick: Any) -> None:
    kind, experts = config["model_type"], pick(8, 12)
    groups = (1, 1) if kind == "deepseek" else pick((1, 1), (2, 1), (4, 2), (4, 3), (4, 4))
    reachable = experts // groups[0] * groups[1]
    config |= dict(
        n_routed_experts=experts, moe_intermediate_size=pick(9, 16, 33), num_experts_per_tok=pick(1, 2, min(4, reachable)),
        first_k_dense_replace=pick(0, 1, layers, layers + 1), n_shared_experts=pick(1, 2),
    )  # fmt: skip
    if kind == "deepseek":
        config |= dict(norm_topk_prob=pick(True, False), n_shared_experts=pick(None, 1, 2))
        return
    config |= dict(n_group=groups[0], topk_group=groups[1], routed_scaling_factor=pick(1.0, 2.5, 16.0))
    even = kind == "deepseek_v2"  # transformers' V2 rotates complex views, which need even strides
    config |= dict(
        kv_lora_rank=pick(15 + even, 32, 129 + even), qk_nope_head_dim=pick(7 + even, 16), v_head_dim=pick(9, 16)
    )
    config |= dict(q_lora_rank=pick(None, 21, 40), qk_rope_head_dim=pick(6, 8, 16))
    if kind == "deepseek_v2":
        config["topk_method"] = pick("greedy", "group_limited_greedy")
        if groups == (1, 1) and pick(True, False):
            config |= dict(topk_method="greedy", n_group=None, topk_group=None)
    else:
        config |= dict(num_nextn_predict_layers=pick(0, 1, 1, 2))
